"""Does a run's cover follow the music? ``python -m covergen.evaluate --run RUN --shards DIR [--judge RUN]``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from covergen.data.dataset import ShardDataset, open_split
from covergen.distributed.collectives import join
from covergen.distributed.environment import keep_memory, use_threads
from covergen.distributed.interrupts import StopSignal
from covergen.evaluation import judge as judges
from covergen.evaluation import report
from covergen.evaluation.cover_reader import open_probes
from covergen.evaluation.demo_truth import read_truth
from covergen.evaluation.metrics import inception_features
from covergen.evaluation.pipeline import SHOWN, FeatureExtractor, evaluate
from covergen.evaluation.songs import choose_songs, read_songs
from covergen.inference.cover_inputs import find_split
from covergen.inference.trained_model import open_model
from covergen.runs.checkpoint import step_of
from covergen.runs.folder import check_fit
from covergen.training import tracking
from shard_tools import cli
from shard_tools.core.files import write_atomically

MIN_SONGS = 8


@cli.checked
def main(run: str, shards: str | None = None, judge: str | None = None, split: str = "test",
         num_songs: Annotated[int, cli.Range(MIN_SONGS)] = 1000, samples_per_song: Annotated[int, cli.Range(2)] = 4,
         seed: int = 0, guidance: float | None = None, sampling_steps: int | None = None, checkpoint: str = "auto",
         inception: bool = False, out: str | None = None, wandb: bool | None = None, threads: int = 0) -> int:
    """Measures whether a run's covers follow the music, how good they are and whether they are copies.

    Args:
        run: folder of the run.
        shards: folder of shards with an index; default: those that the run was trained on.
        judge: a run of --model contrast --album_subset judge; default: one that is trained for these shards (5 minutes)
            and cached.
        split: whose songs are evaluated with.
        num_songs: how many songs at most, each of another album.
        samples_per_song: covers for each song.
        seed: of the choice of songs, the noise and the resampling.
        guidance: of models that have it, instead of the run's.
        sampling_steps: likewise.
        checkpoint: auto (the best by validation where there is one, else the newest), last, or the number of a step.
        inception: FID and the like in the standard Inception features (downloads them) instead of the judge's.
        out: the JSON; default RUN/evaluations/step_..., by checkpoint, split and guidance.
        wandb: also shows the table in the run's W&B; default: if the run was tracked there.
        threads: that compute; 0: the machine's cores.
    """
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
    chosen = choose_songs(held_out, num_songs, seed)
    check_fit(opened.folder, opened.metadata, root, held_out.metadata, audio=opened.model.conditional)
    if len(chosen) < MIN_SONGS:
        raise ValueError(f"{root} has {len(chosen)} albums in {split}; a figure needs {MIN_SONGS} or more; pack more, "
                         "or choose another --split")
    songs = read_songs(held_out, chosen, opened.resolution)

    def check_interrupt() -> None:
        if stop:
            raise SystemExit(f"stopped ({stop.reason}); nothing was written")

    extractor = None
    if ranks.rank == 0:  # which alone measures what all make
        arbiter = None
        if held_out.dimension:
            arbiter = judges.open_judge(
                judge or judges.default_judge(root, train.identity, opened.resolution, check_interrupt))
            judges.check_audio(arbiter, train)
        if opened.config.training.album_subset != "generator":
            tqdm.write(f"note: {run} was trained on albums of the judge's, whose figures may flatter it a little "
                       "(train with --album_subset generator)")
        validation = open_split(root, "val", needed=False, audio_scale="raw")
        probes = open_probes(train, validation, opened.resolution, read_truth(root), say=tqdm.write,
                             check_interrupt=check_interrupt)
        extractor = FeatureExtractor(arbiter, probes, inception)
    if inception:
        inception_features(songs.covers[:1])  # fails before hours of work
    table, attributes, covers = evaluate(opened, extractor, songs, held_out, train, seed=seed, ranks=ranks,
                                         samples_per_song=samples_per_song, check_interrupt=check_interrupt)
    if extractor:
        more = "".join(f"_{name}_{value:g}" for name, value in options.items()) + "_inception" * inception
        path = Path(out or opened.folder / "evaluations" / f"{opened.checkpoint.name}_{split}{more}.json")
        metadata = {"run": str(run), "model": opened.config.model, "checkpoint": opened.checkpoint.name, "shards": root,
                    "split": split, "num_songs": len(songs), "samples_per_song": samples_per_song, "seed": seed,
                    **options, "judge": str(arbiter.folder) if arbiter else None,
                    "features": "inception" if inception else "judge" if arbiter else "reader",
                    "reader": probes.figures, "attributes": attributes,
                    "genres": len(np.unique(songs.genres[songs.genres >= 0]))}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(report.as_json(metadata, table), indent=1) + "\n").encode())
        print(report.as_text(metadata, table), path, sep="\n")
        if wandb if wandb is not None else opened.config.training.tracker == "wandb":
            tracking.show_table(opened.folder, step_of(opened.checkpoint), report.scalars(table, "test"),
                                *report.song_table(arbiter, songs, covers, held_out.metadata["genres"], SHOWN))
    ranks.close()
    return 0


if __name__ == "__main__":
    cli.run(main)
