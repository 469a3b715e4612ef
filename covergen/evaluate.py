"""Does a run's cover follow the music? ``python -m covergen.evaluate --run RUN --shards DIR [--judge RUN]``.

A run, held-out songs and a judge in; one table out (terminal, JSON, W&B): the run beside real covers, shuffled audio,
the genre's mean, no audio, and copies of training covers. Starts on several processes as training does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from covergen.data.dataset import ShardDataset, open_split
from covergen.distributed.collectives import join
from covergen.distributed.environment import keep_memory, use_threads
from covergen.distributed.interrupts import StopSignal
from covergen.evaluation import judge as judges
from covergen.evaluation import metrics as quality
from covergen.evaluation import report
from covergen.evaluation.cover_reader import open_reader
from covergen.evaluation.demo_truth import read_truth
from covergen.evaluation.generation import choose, read_songs
from covergen.evaluation.pipeline import evaluate
from covergen.inference.cover_inputs import find_split
from covergen.inference.trained_model import TrainedModel, open_model
from covergen.runs import config
from covergen.runs.checkpoint import step_of
from covergen.training import tracking
from shard_tools import cli
from shard_tools.core.files import write_atomically

LEAST = 8  # songs
SHOWN = 16  # songs whose covers are shown on W&B


def main(run: str, shards: str | None = None, judge: str | None = None, split: str = "test", songs: int = 1000,
         noises: int = 4, seed: int = 0, guidance: float | None = None, sampling_steps: int | None = None,
         checkpoint: str = "auto", inception: bool = False, out: str | None = None, wandb: bool | None = None,
         threads: int = 0) -> int:
    """Measures whether a run's covers follow the music, how good they are and whether they are copies.

    Args:
        run: folder of the run.
        shards: folder of shards with an index; default: those that the run was trained on.
        judge: a run of --model contrast --album_subset judge; default: one that is trained for these shards (5 minutes)
            and kept in the cache folder.
        split: whose songs are heard.
        songs: how many at most, each of another album.
        noises: covers for each song.
        seed: of the choice of songs, the noises and the resampling.
        guidance: of models that have it, instead of the run's.
        sampling_steps: likewise.
        checkpoint: auto (the best by validation where there is one, else the newest), last, or the number of a step.
        inception: FID and the like in the standard Inception features (downloads them) instead of the judge's.
        out: the JSON; default RUN/evaluations/step_..., by checkpoint, split and guidance.
        wandb: also shows the table in the run's W&B; default: if the run was tracked there.
        threads: that compute; 0: the machine's cores.
    """
    if noises < 2 or songs < LEAST:
        raise ValueError(f"--songs {songs} --noises {noises}: expected {LEAST} songs and 2 noises or more")
    stop = StopSignal(0)
    use_threads(threads)
    keep_memory()
    ranks = join()
    options = {name: value for name, value in (("guidance", guidance), ("sampling_steps", sampling_steps))
               if value is not None}
    opened = open_model(run, which=checkpoint, options=options)
    if opened.model.sample is None:
        raise ValueError(f"{run} is an {opened.config.model}: it makes no covers from noise or audio")
    root, split = find_split(opened, shards, split, ("test",))
    held_out, train = (ShardDataset(root, name, audio_scale="raw") for name in (split, "train"))
    chosen = choose(held_out, songs, seed)
    check(opened, held_out, len(chosen))
    heard = read_songs(held_out, chosen, opened.resolution)

    def say(text: str) -> None:
        if ranks.rank == 0:
            tqdm.write(text)

    def tick(_: Any = None) -> None:
        if stop:
            raise SystemExit(f"stopped ({stop.reason}); nothing was written")

    arbiter, reader = None, None
    if ranks.rank == 0:  # who alone looks at what all make
        if held_out.dimension:
            arbiter = judges.open_judge(judge or judges.default_judge(root, train.identity, opened.resolution, tick))
            judges.same_audio(arbiter, train)
        if opened.config.training.album_subset != "generator":
            say(f"note: {run} was trained on albums of the judge's, whose figures may flatter it a little (train with "
                "--album_subset generator)")
        reader = open_reader(train, open_split(root, "val", needed=False, audio_scale="raw"),
                             opened.resolution, read_truth(root), say=say, tick=tick)
    inner = quality.inception_features if inception else None
    if inner:
        inner(heard.covers[:1])  # fails before hours of work
    figures, details, covers = evaluate(opened, arbiter, reader, heard, held_out, train, noises=noises, seed=seed,
                                        ranks=ranks, inner=inner, tick=tick, quiet=ranks.rank > 0)
    if ranks.rank == 0:
        path = Path(out) if out else default_path(opened, split, options, inception)
        metadata = {"run": str(run), "model": opened.config.model, "checkpoint": opened.checkpoint.name, "shards": root,
                 "split": split, "songs": len(heard), "noises": noises, "seed": seed, **options,
                 "judge": str(arbiter.folder) if arbiter else None,
                 "features": "inception" if inception else "judge" if arbiter else "reader",
                 "reader": reader.figures,
                 "attributes": details, "genres": len(np.unique(heard.genres[heard.genres >= 0]))}
        result = report.as_json(metadata, figures)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
        print(report.as_text(metadata, figures))
        print(path)
        if wandb if wandb is not None else opened.config.training.tracker == "wandb":
            tracking.show_table(opened.folder, config.read_run(opened.folder).flat(), step_of(opened.checkpoint),
                                report.scalars(figures, "test"),
                                *report.song_table(arbiter, heard, covers, held_out.metadata["genres"], SHOWN))
    ranks.close()
    return 0


def check(run: TrainedModel, shards: ShardDataset, found: int) -> None:
    """Raises ValueError unless the run can be evaluated on these shards."""
    if run.resolution > shards.resolution:
        raise ValueError(f"{shards.index.root} has covers of {shards.resolution} px; {run.folder} makes "
                         f"{run.resolution} px")
    if run.model.conditional and run.normalizer.dimension != shards.dimension:
        raise ValueError(f"{shards.index.root} has vectors of {shards.dimension} numbers; {run.folder} hears "
                         f"{run.normalizer.dimension}")
    if found < LEAST:
        raise ValueError(f"{shards.index.root} has {found} albums in {shards.index.split}; a figure needs {LEAST} or "
                         "more; pack more, or choose another --split")


def default_path(run: TrainedModel, split: str, options: dict[str, Any], inception: bool) -> Path:
    """Where a result goes: by checkpoint, split and whatever differs from the run's own options."""
    more = "".join(f"_{name}_{value:g}" for name, value in options.items()) + "_inception" * inception
    return run.folder / "evaluations" / f"{run.checkpoint.name}_{split}{more}.json"


if __name__ == "__main__":
    cli.run(main)
