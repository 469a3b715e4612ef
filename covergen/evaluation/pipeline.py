"""An evaluation small enough for a pause in training: a run as it is now in, a few figures and a table of songs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from covergen.data.batch import downscale
from covergen.data.dataset import ShardDataset
from covergen.distributed.collectives import Ranks
from covergen.evaluation import judge, report
from covergen.evaluation import judge as judges
from covergen.evaluation import scores as denoising
from covergen.evaluation import scores as table
from covergen.evaluation.generation import Songs, baselines, choose, make_covers, mismatched_pairing, read_songs
from covergen.inference.trained_model import TrainedModel, open_model
from covergen.runs.checkpoint import step_of

REFERENCE, MOST = 5000, 100_000  # training covers that FID compares with, and among which copies are looked for


def evaluate(run: TrainedModel, judge: TrainedModel | None, reader: Any, songs: Songs, held_out: ShardDataset, train: ShardDataset, *,
             noises: int, seed: int, ranks: Ranks, inner: Callable | None, tick: Callable[..., None], quiet: bool
             ) -> tuple[dict[str, dict[str, table.Figure]], dict[str, dict[str, float]], Tensor]:
    """The table of a run, its attributes one by one (on demo data), and its covers uint8 ``[N, noises, 3, R, R]``.

    Only rank 0 has tables.

    Args:
        run, judge, reader: see the modules of ``covergen.evaluation``.
        songs: of ``held_out``; train: the split that the run learned from.
        noises, seed, ranks, tick: see ``make_covers``.
        inner: images to the features that tell quality; None: the judge's, else the reader's.
        quiet: no progress bar.
    """
    base = baselines(run, songs, train, seed)
    hears = run.model.conditional
    own = run.normalizer(songs.raw) if hears else None
    mute = run
    if hasattr(run.config.options, "guidance"):
        mute = open_model(run.folder, which=str(step_of(run.checkpoint)),
                        options={"guidance": 0.0, "sampling_steps": run.config.options.sampling_steps})
    bar = tqdm(total=3 * len(songs) * noises // ranks.ranks, unit="cover", disable=quiet, dynamic_ncols=True)

    def made(by: TrainedModel, heard: np.ndarray | None, key: str) -> Tensor:
        def count(number: int) -> None:
            bar.update(number)
            tick()
        bar.set_description(key)
        return make_covers(by, heard if hears else None, len(songs), noises, seed, ranks, count)

    covers = {"run": made(run, own, "run"), "real": songs.covers[:, None]}
    covers["shuffled"] = covers["run"][torch.from_numpy(mismatched_pairing(songs.groups, seed))]
    covers["genre_mean"] = made(run, base["genre_mean"], "genre_mean")
    covers["unconditional"] = made(mute, base["any"] if mute is run else own, "unconditional")
    covers["copy"] = base["copy"][:, None]
    bar.close()
    losses = denoising.gaps(run, songs, seed, ranks, tick) if run.model.denoising_loss else {}
    if ranks.rank:
        return {}, {}, covers["run"]
    views = {name: look(part, judge, reader, inner, tick) for name, part in covers.items()}
    training = known_features(run, train, lambda part: features_of(part, judge, reader, inner), tick)
    truth, predicted = reader.truth_of(held_out, songs.rows), reader.predict(songs.raw)
    heard = judges.embed_audio(judge, songs.raw).numpy() if judge else None
    found = table.measure(views, heard, songs, training[:REFERENCE],
                          None if held_out.index.split == "train" else training, truth, predicted, seed, tick)
    found["run"] |= losses
    details = {}
    if truth is not None and predicted is not None:
        details = table.each_attribute(views["run"].attributes, truth, predicted, table.kinds(songs),
                                       reader.truth.names)
    return found, details, covers["run"]


def known_features(run: TrainedModel, train: ShardDataset, see: Callable[[Tensor], Tensor], tick: Callable[..., None]
                   ) -> np.ndarray:
    """Quality features of one cover of every album that a run was trained on (at most ``MOST``), ``[M, D]``."""
    rows = choose(train, MOST, 0, run.config.training.album_subset)
    parts = []
    for start in range(0, len(rows), 512):
        tick()
        parts.append(see(downscale(train.read(rows[start:start + 512]).cover, run.resolution)))
    return torch.cat(parts).numpy()


def features_of(covers: Tensor, judge: TrainedModel | None, reader: Any, inner: Callable | None) -> Tensor:
    """What quality is measured in: Inception's features, else the judge's, else the reader's."""
    if inner:
        return inner(covers, judge.device if judge else "cpu")
    return judges.embed_covers(judge, covers) if judge else reader.features(covers)


def look(covers: Tensor, judge: TrainedModel | None, reader: Any, inner: Callable | None, tick: Callable[..., None]
         ) -> table.Views:
    """What judge and reader see in covers uint8 ``[N, K, 3, R, R]``."""
    count, noises = covers.shape[:2]
    flat = covers.flatten(0, 1)
    tick()
    genres, attributes = reader.read(flat)

    def shaped(part: Tensor | None) -> np.ndarray | None:
        return None if part is None else part.unflatten(0, (count, noises)).numpy()

    seen = shaped(judges.embed_covers(judge, flat)) if judge else None
    looks = seen[:, 0] if judge and not inner else features_of(covers[:, 0], judge, reader, inner).numpy()
    return table.Views(seen, looks, shaped(genres), shaped(attributes))


SONGS, NOISES, SHOWN = 128, 2, 16


class QuickEvaluation:
    """The same songs of the validation split all through a run."""

    def __init__(self, shards: ShardDataset, resolution: int, arbiter: TrainedModel | None, seed: int) -> None:
        """Args: shards: with raw audio; resolution: of the run; arbiter: a judge, or None; seed: of the songs.

        Raises:
            ValueError: a judge of other shards.
        """
        if arbiter is not None:
            judge.same_audio(arbiter, shards)
        self.songs = read_songs(shards, choose(shards, SONGS, seed), resolution)
        self.genres, self.arbiter, self.seed = shards.metadata["genres"], arbiter, seed

    def __call__(self, run: TrainedModel) -> tuple[dict[str, float], list[str], list[list[Any]]]:
        """Scalars ``eval/...``, and columns and rows of a table of songs."""
        alone = Ranks()
        heard = run.normalizer(self.songs.raw) if run.model.conditional else None
        covers = make_covers(run, heard, len(self.songs), NOISES, self.seed, alone, lambda made: None)
        figures: dict[str, table.Figure] = {}
        if self.arbiter is not None:
            seen = judge.embed_covers(self.arbiter, covers.flatten(0, 1)).unflatten(0, covers.shape[:2])
            figures |= table.dependence(seen.numpy(), judge.embed_audio(self.arbiter, self.songs.raw).numpy(), self.songs,
                                        self.seed)
        if run.model.denoising_loss:
            figures |= denoising.gaps(run, self.songs, self.seed, alone)
        shown = report.song_table(self.arbiter, self.songs, covers, self.genres, SHOWN)
        return report.scalars({"run": figures}, "eval"), *shown
