"""What runs have learned, in pictures and numbers: ``python -m covergen.analyze WHAT --run RUN --out FILE.png``."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from covergen.analyses import curves, interpolate, latent, matrix, neighbours, reconstruct
from covergen.distributed.environment import use_threads
from covergen.inference.trained_model import open_model
from covergen.models.base import Model
from covergen.runs.sync import fetched_run
from covergen.training import tracking
from shard_tools import cli
from shard_tools.cli import Range

MOST = 64  # covers along one side of a picture


@dataclass(frozen=True)
class Analysis:
    """One kind of picture."""

    draw: Callable[..., str]  # returns its report
    takes: dict[str, Any]  # options beside those that all have, with their defaults
    writes: tuple[str, ...] = (".png",)  # kinds of files
    several: bool = False  # takes several runs
    able: Callable[[Model], bool] = lambda model: model.sample is not None  # whether a model can be shown so
    needs: str = "makes covers from noise"  # what such a model does, to say why another can't


DATA = {"shards": None, "split": None}
ANALYSES = {
    "reconstruct": Analysis(reconstruct.draw, {**DATA, "n": None, "images": None}, (".png", ".npy"), several=True,
                            able=lambda model: model.reconstruct is not None, needs="reconstructs covers"),
    "latent": Analysis(latent.draw, {**DATA, "n": 5000, "genres": None, "seed": 0},
                       able=lambda model: model.encode is not None, needs="encodes covers"),
    "matrix": Analysis(matrix.draw, {**DATA, "n": 8, "genres": None, "seed": 0, "truncation": None},
                       able=lambda model: model.sample is not None and model.conditional,
                       needs="makes covers from audio"),
    "interpolate": Analysis(interpolate.draw, {**DATA, "n": 8, "frames": 10, "seed": 0, "truncation": None},
                            (".png", ".gif")),
    "curves": Analysis(curves.draw, {}, several=True),
    "neighbours": Analysis(neighbours.draw, {**DATA, "n": 8, "compare": 256, "seed": 0, "truncation": None}),
}


@cli.checked
def main(what: Literal["reconstruct", "latent", "matrix", "interpolate", "curves", "neighbours"],
         run: tuple[str, ...], out: str, shards: str | None = None, split: str | None = None, n: int | None = None,
         images: str | None = None, genres: tuple[str, ...] | None = None,
         frames: Annotated[int | None, Range(2, MOST)] = None, compare: Annotated[int | None, Range(1)] = None,
         seed: int | None = None, truncation: Annotated[float | None, Range(gt=0)] = None,
         checkpoint: str | None = None, threads: int = 0, wandb: bool = False) -> int:
    """Draws one picture about runs, and prints what it says in numbers.

      reconstruct  covers and what autoencoders make of them, a row for each run, with errors
      latent       t-SNE of the latents of covers by genre, and whether neighbours share their genre
      matrix       genres by noise of a conditional model, and how much the audio matters
      interpolate  walks between latents, and of conditional models between audios
      curves       losses and learning rates of runs against images seen
      neighbours   the training covers nearest to generated ones, and whether the model copies

    Args:
        what: the picture, see above.
        run: run folder; several separated by commas for reconstruct and curves.
        out: x.png; for reconstruct also x.npy, float32 [N, 3, R, R] in [0, 1]; for interpolate also x.gif, moving.
        shards: folder of shards; default: those that the run was trained on.
        split: of the shards; default val (reconstruct), train (neighbours: what is searched), else test; latent takes
            several separated by commas.
        n: how many covers (reconstruct, default 8; latent 5000), columns (matrix 8) or rows (interpolate, neighbours
            8). 0 is all, for latent and for x.npy; without --n an x.npy of --images has all of them.
        images: folder of pictures of any size instead of shards (reconstruct).
        genres: only these, separated by commas; default all (latent) or the first eight (matrix).
        frames: steps of a walk (interpolate); default 10.
        compare: how many generated and as many held-out covers are compared (neighbours); default 256.
        seed: of everything random; default 0.
        truncation: draws noise again where it is further from its mean than so many standard deviations.
        checkpoint: auto (the best by validation where there is one, else the newest), last, or the number of a step;
            default auto.
        threads: that compute; 0: the machine's cores.
        wandb: also shows the picture in the W&B runs of the run folders.
    """
    given = {"shards": shards, "split": split, "n": n, "images": images, "genres": genres, "frames": frames,
             "compare": compare, "seed": seed, "truncation": truncation, "checkpoint": checkpoint}
    given = {name: value for name, value in given.items() if value is not None}
    analysis, path = ANALYSES[what], Path(out)
    check(what, run, path, given, wandb)
    use_threads(threads)
    options = {name: given.get(name, default) for name, default in analysis.takes.items()}
    folders = [fetched_run(folder) for folder in run]
    if what == "curves":
        report = analysis.draw(folders, path, **options)
    else:
        opened = [open_model(folder, which=checkpoint or "auto") for folder in folders]
        for one in opened:
            if not analysis.able(one.model):
                raise ValueError(f"{what} needs a model that {analysis.needs}; {one.folder} is a {one.config.model}")
        report = analysis.draw(opened if analysis.several else opened[0], path, **options)
    print(f"{report}\n{path}")
    if wandb:
        for folder in folders:
            tracking.show(folder, what, path)
    return 0


def check(what: str, run: tuple[str, ...], path: Path, given: dict[str, Any], wandb: bool) -> None:
    """Raises ValueError for options that don't go together, before anything is read."""
    analysis, kind = ANALYSES[what], path.suffix.lower()
    for name in given:
        if name not in analysis.takes and (name != "checkpoint" or what == "curves"):
            fitting = [other for other, one in ANALYSES.items() if name in one.takes]
            raise ValueError(f"--{name} is not for {what}"
                             + (f", only for {', '.join(fitting)}" if fitting else ", which reads no weights"))
    if kind not in analysis.writes:
        raise ValueError(f"--out {path}: {what} writes {' or '.join(analysis.writes)}")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--out {path}: expected the name of a file in a folder that can be written")
    if not all(run) or (len(run) > 1 and (not analysis.several or kind == ".npy")):
        raise ValueError(f"--run {','.join(run)}: {what} to {kind} takes one run folder")
    if len(set(run)) < len(run):
        raise ValueError(f"--run {','.join(run)}: a run folder is named twice")
    if wandb and kind == ".npy":
        raise ValueError("--wandb shows pictures, not a .npy")
    if "images" in given and (other := {"shards", "split"} & given.keys()):
        raise ValueError(f"--images and --{min(other)} exclude each other: covers are from a folder of pictures or "
                         "from shards")
    cli.check_range("n", given.get("n"), Range(0) if what == "latent" or kind == ".npy" else Range(1, MOST))


if __name__ == "__main__":
    cli.run(main)
