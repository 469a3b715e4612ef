"""Covers from a trained model: ``python -m covergen.generate --run RUN --out covers.png``, from noise or for audio.

A run folder in; a grid, single files or an array out. Needs neither the shards of the run nor accelerate, webdataset or
wandb.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from covergen.runtime import hearing, pictures
from covergen.runtime.machine import use_threads
from covergen.runtime.run import AT_ONCE, Run, open_run
from shard_tools import cli


def main(run: str, out: str = "covers.png", n: int | None = None, audio: str | None = None,
         from_shards: str | None = None, split: str = "test", rows: int = 8, latents: str | None = None, seed: int = 0,
         truncation: float | None = None, ema: bool = True, checkpoint: str = "auto", threads: int = 0) -> int:
    """Generates covers from a run. A conditional model makes a row of --n covers for each audio; columns share noise.

    Args:
        run: folder of the run.
        out: covers.png for one picture of all, a folder for a PNG each, x.npy for float32 [N, 3, R, R] as the network
            gave it (-1 to 1 after a tanh, 0 to 1 after a sigmoid; row after row).
        n: covers, of conditional models for each audio; default 64, conditional 8.
        audio: what conditional models hear: .npy vectors or AcousticBrainz low-level .json, separated by commas, or a
            folder of them.
        from_shards: a folder of shards instead, whose tracks are heard.
        split: of those shards.
        rows: how many of their tracks, of as many genres as there are; 0 for all.
        latents: a .npy of noise [N, latent] instead of --n and --seed.
        seed: of the noise.
        truncation: draws the noise again where it is further from its mean than so many standard deviations.
        ema: false takes the weights as trained instead of their moving average.
        checkpoint: auto (the best by validation where there is one, else the newest), last, or the number of a step.
        threads: that compute; 0: the machine's cores.
    """
    use_threads(threads)
    check_out(out)
    if n is not None and n < 1:
        raise ValueError(f"--n {n}: must be above 0")
    if rows < 0:
        raise ValueError(f"--rows {rows}: must be 0 (all) or more")
    if truncation is not None and not truncation > 0:
        raise ValueError(f"--truncation {truncation}: must be above 0")
    opened = open_run(run, which=checkpoint, averaged=ema)
    if opened.model.sample is None:
        raise ValueError(f"{run} is an {opened.config.model}: it reconstructs covers and can't make any from noise; "
                         "try python -m covergen.analyze reconstruct")
    heard = listen(opened, audio, from_shards, split, rows)
    count = n or (8 if heard else 64)
    noise = read_latents(latents, opened, n) if latents else opened.model.latents(
        count, torch.Generator().manual_seed(seed), truncation)
    total = len(noise) * (len(heard.names) if heard else 1)
    write(out, sampled(opened, noise, heard), total, len(noise) if heard else 8, heard, opened)
    kind = "averaged weights" if ema and opened.config.training.ema and opened.model.averaged else "weights as trained"
    print(f"{total} covers of {opened.resolution} px from {opened.checkpoint} ({kind}): {out}")
    return 0


def check_out(out: str) -> None:
    """Raises ValueError unless the name says what to write: .png, .npy or a folder."""
    if not is_folder(out) and Path(out).suffix.lower() not in (".png", ".npy"):
        raise ValueError(f"--out {out}: expected .png (one picture), .npy (an array) or / (a folder) at the end")
    if not is_folder(out) and Path(out).is_dir():
        raise ValueError(f"--out {out} is a folder; end it with / to write files into it")


def is_folder(out: str) -> bool:
    return out.endswith("/") or not Path(out).suffix


def listen(run: Run, audio: str | None, from_shards: str | None, split: str, rows: int) -> hearing.Heard | None:
    """What a conditional model is to hear; None for others.

    Raises:
        ValueError: audio for a model that hears none, or none or two kinds for one that does.
    """
    if not run.model.conditional:
        if audio or from_shards:
            raise ValueError(f"{run.folder} is a {run.config.model}, which hears no audio; leave --audio and "
                             "--from_shards away")
        return None
    if bool(audio) == bool(from_shards):
        known = run.facts["shards"]
        raise ValueError(f"{run.folder} is a {run.config.model}: give it --audio FILE or --from_shards DIR"
                         + (f" (it was trained on {known})" if known else ""))
    if audio:
        return hearing.read_files(audio, run.facts["audio"])
    return hearing.read_shards(from_shards, split, rows, run.facts["audio"])


def read_latents(path: str, run: Run, n: int | None) -> Tensor:
    """Noise ``[N, L]`` from a .npy file.

    Raises:
        ValueError: not such a file, not finite, not of the model's size, or not the N that was also asked for.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"--latents {path} can't be read as .npy: {error}") from None
    size = run.model.latents(1, torch.Generator(), None).shape[1]
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.shape[1] != size or found.dtype.kind not in "fiu":
        shape = f"{list(found.shape)} of {found.dtype}" if isinstance(found, np.ndarray) else "several arrays"
        raise ValueError(f"--latents {path}: expected numbers of shape [N, {size}], found {shape}")
    if not len(found) or (n is not None and n != len(found)):
        raise ValueError(f"--latents {path} holds {len(found)}, --n says {n}; leave --n away")
    found = found.astype(np.float32)
    if not np.isfinite(found).all():
        raise ValueError(f"--latents {path} holds values that are not finite")
    return torch.from_numpy(found)


def sampled(run: Run, noise: Tensor, heard: hearing.Heard | None) -> Iterator[Tensor]:
    """Images ``[<= AT_ONCE, 3, R, R]`` as the network gives them: all noise, for each audio in turn."""
    for audio in run.scale(heard.raw) if heard else [None]:
        for part in noise.split(AT_ONCE):
            images = run.sample(part, None if audio is None else np.repeat(audio[None], len(part), 0))
            if not images.isfinite().all():
                print("note: covers that are not finite, grey in pictures: this run has diverged, or its audio is far "
                      "from what it heard in training", file=sys.stderr)
            yield images


def write(out: str, parts: Iterator[Tensor], total: int, columns: int, heard: hearing.Heard | None, run: Run) -> None:
    """Writes images as they come, every file whole or not at all; only one picture of all is held in memory."""
    path = Path(out)
    if is_folder(out):
        names = [f"{place // columns:04d}_{heard.names[place // columns]}_{place % columns:02d}" if heard
                 else f"{place:05d}" for place in range(total)]
        for name, image in zip(names, (image for part in parts for image in part), strict=True):
            pictures.save(path / f"{name}.png", pictures.plain(pictures.to_unit(image, run.model.low)))
        return
    if path.suffix.lower() == ".png":
        covers = torch.cat([pictures.to_unit(part, run.model.low) for part in parts])
        pictures.save(path, pictures.grid(covers, columns, [name[:24] for name in heard.names] if heard else ()))
        return
    with pictures.written(path) as temporary:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32,
                                          shape=(total, 3, run.resolution, run.resolution))
        start = 0
        for part in parts:
            array[start:start + len(part)] = part.numpy()
            start += len(part)
        array.flush()


if __name__ == "__main__":
    cli.run(main)
