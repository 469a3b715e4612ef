"""Covers from a trained model: ``python -m covergen.generate --run RUN --out covers.png``, from noise or for audio.

Needs neither the shards of the run nor accelerate, webdataset or wandb.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from covergen.distributed.environment import use_threads
from covergen.inference import audio_inputs
from covergen.inference import images as pictures
from covergen.inference.trained_model import AT_ONCE, TrainedModel, open_model
from covergen.runs.checkpoint import step_of
from shard_tools import __version__, cli
from shard_tools.cli import Range
from shard_tools.music import embed as tags

EMBEDDED_SIDE = 600  # pixels that a cover in an audio file has at least, without --size
UPSCALE = "a plain Lanczos upscale, which adds no detail"


@cli.checked
def main(run: str, out: str = "covers.png", n: Annotated[int | None, Range(1)] = None, audio: str | None = None,
         pca: str | None = None, from_shards: str | None = None, split: str = "test",
         rows: Annotated[int, Range(0)] = 8, latents: str | None = None, seed: int = 0,
         truncation: Annotated[float | None, Range(gt=0)] = None,
         guidance: Annotated[float | None, Range(0, lt=math.inf)] = None,
         sampling_steps: Annotated[int | None, Range(1)] = None, size: Annotated[int | None, Range(32, 4096)] = None,
         embed: str | None = None, in_place: bool = False, ema: bool = True, checkpoint: str = "auto",
         threads: int = 0) -> int:
    """Generates covers from a run. A conditional model makes a row of --n covers for each audio; columns share noise.

    A PNG tells in its text ``covergen`` what it was made of, as JSON; the same options make the same cover again.

    Args:
        run: folder of the run.
        out: covers.png for one picture of all, a folder for a PNG each, x.npy for float32 [N, 3, R, R] as the network
            gave it (-1 to 1 after a tanh, 0 to 1 after a sigmoid; row after row).
        n: covers, of conditional models for each audio; default 64, conditional 8.
        audio: for conditional models: songs (.mp3, .flac, .ogg, .opus, .wav, .m4a), where the run knows the
            extractor it was trained with; .npy vectors; .json descriptors; separated by commas or blanks, or folders.
        pca: the file (pca.npz) that made the run's vectors, where it was trained on those of a PCA.
        from_shards: a folder of shards instead, of whose tracks covers are made.
        split: of those shards.
        rows: how many of their tracks, of as many genres as there are; 0 for all.
        latents: a .npy of noise [N, latent] instead of --n and --seed.
        seed: of the noise.
        truncation: draws the noise again where it is further from its mean than so many standard deviations.
        guidance: of flow, instead of the run's: 1 is the model itself, above 1 exaggerates what the audio asks for, 0
            ignores it.
        sampling_steps: of flow, instead of the run's: more are slower and more exact.
        size: side of each cover in pictures, in pixels; a plain Lanczos upscale, which adds no detail. One cover in a
            .png is then the whole picture.
        embed: audio files, as many as rows, separated likewise (without any: those of --audio): the row's first cover
            is written as front cover into the tags of a copy, NAME.covergen.mp3 beside --out, resized to --size or
            else at least 600 px.
        in_place: --embed writes into the files themselves.
        ema: false takes the weights as trained instead of their moving average.
        checkpoint: auto (the best by validation where there is one, else the newest), last, or the number of a step.
        threads: that compute; 0: the machine's cores.
    """
    use_threads(threads)
    kind = "/" if is_folder(out) else Path(out).suffix.lower()
    if kind not in ("/", ".png", ".npy"):
        raise ValueError(f"--out {out}: expected .png (one picture), .npy (an array) or / (a folder) at the end")
    if kind != "/" and Path(out).is_dir():
        raise ValueError(f"--out {out} is a folder; end it with / to write files into it")
    if kind == ".npy" and size is not None:
        raise ValueError(f"--size {size}: an array has the covers as the network gave them; leave it away, or write "
                         "a .png or a folder")
    if in_place and embed is None:
        raise ValueError("--in_place says where --embed writes; give --embed FILE too, or leave it away")
    if embed == "":
        if audio is None:
            raise ValueError("--embed: expected audio files, or --audio with songs that are to get the covers")
        embed = audio
    folder = Path(out) if kind == "/" else Path(out).parent
    songs = {} if embed is None else tags.targets(audio_inputs.listed(embed), folder, in_place)
    given = {"guidance": guidance, "sampling_steps": sampling_steps}
    opened = open_model(run, which=checkpoint, averaged=ema,
                        options={name: value for name, value in given.items() if value is not None})
    if opened.model.sample is None:
        raise ValueError(f"{run} is an {opened.config.model}: it reconstructs covers and can't make any from noise; "
                         "try python -m covergen.analyze reconstruct")
    if guidance is not None and not opened.model.conditional:
        raise ValueError(f"--guidance: {run} takes no audio that could guide it; leave it away")
    inputs = read_audio(opened, audio, from_shards, split, rows, pca)
    made = len(inputs.names) if inputs else 1
    if songs and len(songs) != made:
        raise ValueError(f"--embed names {len(songs)} audio files for {made} row{'s' * (made > 1)} of covers; expected "
                         "one file for each row, which is one for each audio (without audio: one file)")
    count = n or (8 if inputs else 64)
    noise = read_latents(latents, opened, n) if latents else opened.model.latents(
        count, torch.Generator().manual_seed(seed), truncation)
    averaged = bool(ema and opened.config.training.ema and opened.model.ema_networks)
    about = {**describe(opened, inputs), "averaged": averaged, "n": len(noise), "size": size,
             **({"latents_sha256": hashlib.sha256(Path(latents).read_bytes()).hexdigest()} if latents else
                {"seed": seed, "truncation": truncation})}
    firsts: list[Tensor] | None = [] if songs else None
    write(out, sample(opened, noise, inputs, firsts), made, len(noise), inputs, opened, size, about)
    print(f"{made * len(noise)} covers of {opened.resolution} px from {opened.checkpoint} "
          f"({'averaged weights' if averaged else 'weights as trained'}): {out}"
          + (f", at {size} px ({UPSCALE})" if size else ""))
    if songs:
        put_in(songs, firsts, size or max(EMBEDDED_SIDE, opened.resolution), opened)
    return 0


def is_folder(out: str) -> bool:
    return out.endswith("/") or not Path(out).suffix


def read_audio(run: TrainedModel, audio: str | None, from_shards: str | None, split: str, rows: int,
               pca: str | None) -> audio_inputs.AudioInputs | None:
    """The audio for a conditional model, of one kind; None for others, for which none may be given."""
    if not run.model.conditional:
        if audio or from_shards:
            raise ValueError(f"{run.folder} is a {run.config.model}, which takes no audio; leave --audio and "
                             "--from_shards away")
        return None
    if bool(audio) == bool(from_shards):
        known = run.metadata["shards"]
        raise ValueError(f"{run.folder} is a {run.config.model}: give it --audio FILE or --from_shards DIR"
                         + (f" (it was trained on {known})" if known else ""))
    if audio:
        return audio_inputs.read_files(audio, run.metadata["audio"], [pca] if pca else [])
    return audio_inputs.read_shards(run, from_shards, split, rows)


def read_latents(path: str, run: TrainedModel, n: int | None) -> Tensor:
    """Noise ``[N, L]`` from a .npy file; ValueError unless it is finite, of the model's size and of ``n`` rows."""
    try:
        if Path(path).exists() and not Path(path).is_file():  # a FIFO would be waited for
            raise ValueError("not a file")
        found = np.load(path, allow_pickle=False)
    except Exception as error:  # the boundary to numpy, whose header may hold any literal
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


def describe(run: TrainedModel, inputs: audio_inputs.AudioInputs | None) -> dict[str, Any]:
    """What a cover was made with, as far as the run and the audio go, as values of JSON."""
    options = {name: getattr(run.config.options, name) for name in ("guidance", "sampling_steps")
               if hasattr(run.config.options, name)}
    tracks = zip(inputs.names, inputs.raw, strict=True) if inputs else ()
    return {"version": __version__, "run": run.folder.resolve().name, "model": run.config.model,
            "step": step_of(run.checkpoint), **options,
            "audio": [{"name": name, "sha256": hashlib.sha256(raw.astype("<f4").tobytes()).hexdigest()}
                      for name, raw in tracks]}


def sample(run: TrainedModel, noise: Tensor, inputs: audio_inputs.AudioInputs | None,
           firsts: list[Tensor] | None) -> Iterator[Tensor]:
    """Images ``[<= AT_ONCE, 3, R, R]`` as the network gives them: all noise, for each audio in turn.

    The first image of each audio, or of all without audio, is added to ``firsts`` if that is given.
    """
    for audio in run.normalizer(inputs.raw) if inputs else [None]:
        for number, part in enumerate(noise.split(AT_ONCE)):
            images = run.sample(part, None if audio is None else np.repeat(audio[None], len(part), 0))
            if not images.isfinite().all():
                print("note: covers that are not finite, grey in pictures: this run has diverged, or its audio is far "
                      "from that of its training", file=sys.stderr)
            if firsts is not None and number == 0:
                firsts.append(images[0].clone())  # not a view, which would keep them all
            yield images


def write(out: str, parts: Iterator[Tensor], rows: int, count: int, inputs: audio_inputs.AudioInputs | None,
          run: TrainedModel, size: int | None, about: dict[str, Any]) -> None:
    """Writes images, ``rows`` rows of ``count``, as they come, every file whole or not at all.

    ``inputs`` name the rows. ``about`` goes into pictures; that of a single file has its own row and column, and the
    audio of that row only. Raises ValueError where one picture of all would be larger than common viewers open.
    """
    path, total = Path(out), rows * count
    if is_folder(out):
        for number, image in enumerate(image for part in parts for image in part):
            row, column = divmod(number, count)
            name = f"{row:04d}_{inputs.names[row]}_{column:02d}" if inputs else f"{number:05d}"
            own = {**about, "audio": about["audio"][row:row + 1], "row": row, "column": column}
            pictures.save(path / f"{name}.png", pictures.plain(pictures.to_unit(image, run.model.pixel_min), size), own)
    elif path.suffix.lower() == ".png":
        if size and total * size**2 > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"--size {size}: one picture of {total} covers would have {total * size**2 // 10**6} "
                             f"million pixels, more than viewers open; end --out with / for a file each")
        covers = torch.cat([pictures.to_unit(part, run.model.pixel_min) for part in parts])
        labels = [name[:24] for name in inputs.names] if inputs else ()
        pictures.save(path, pictures.plain(covers[0], size) if size and total == 1 else
                      pictures.grid(covers, count if inputs else 8, labels, size), about)
    else:
        pictures.save_array(path, (total, 3, run.resolution, run.resolution), parts)


def put_in(songs: dict[Path, Path], covers: list[Tensor], side: int, run: TrainedModel) -> None:
    """Writes a cover of ``side`` px into the tags of each audio file (source -> file to write), if all are finite."""
    if not all(cover.isfinite().all() for cover in covers):
        raise ValueError("--embed: a cover is not finite, so no audio file was touched; try another --checkpoint")
    for (source, target), cover in zip(songs.items(), covers, strict=True):
        tags.embed(source, target, pictures.plain(pictures.to_unit(cover, run.model.pixel_min), side))
        resized = "" if side == run.resolution else f" ({UPSCALE})"
        print(f"cover of {side} px{resized} in the tags of {target}")


if __name__ == "__main__":
    cli.run(main, several=("audio", "embed"), bare=("embed",))
