"""A whole evaluation of a run, and a quick one for a pause in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from covergen.data.dataset import ShardDataset
from covergen.distributed.collectives import Ranks
from covergen.evaluation import judge as judges
from covergen.evaluation import report, scores
from covergen.evaluation.cover_reader import Probes
from covergen.evaluation.generation import baselines, make_covers
from covergen.evaluation.metrics import inception_features
from covergen.evaluation.songs import Songs, choose_songs, cover_batches, mismatched_pairing, read_songs
from covergen.inference.trained_model import TrainedModel, open_model
from covergen.runs.checkpoint import step_of

REFERENCE, COPIED_FROM = 5000, 100_000  # training covers that FID compares with, and among which copies are searched
QUICK_SONGS, QUICK_SAMPLES, SHOWN = 128, 2, 16


@dataclass(frozen=True)
class FeatureExtractor:
    """The networks that compute features of covers."""

    judge: TrainedModel | None  # of covers and audio; None without audio
    probes: Probes  # of genres and attributes
    inception: bool = False  # quality in Inception's features instead of the judge's or, without one, the reader's

    def quality(self, covers: Tensor) -> Tensor:
        """The features ``[N, D]`` in which quality is measured, of uint8 covers ``[N, 3, R, R]``."""
        if self.inception:
            return inception_features(covers, self.judge.device if self.judge else "cpu")
        return judges.embed_covers(self.judge, covers) if self.judge else self.probes.reader.features(covers).cpu()

    def compute(self, covers: Tensor) -> scores.CoverFeatures:
        """All features of uint8 covers ``[N, K, 3, R, R]``."""
        flat = covers.flatten(0, 1)
        embedded = judges.embed_covers(self.judge, flat) if self.judge else None
        by_song = [None if part is None else part.unflatten(0, covers.shape[:2]).numpy()
                   for part in (embedded, *self.probes.reader.predict(flat))]
        embedded, genres, attributes = by_song
        quality = embedded[:, 0] if self.judge and not self.inception else self.quality(covers[:, 0]).numpy()
        return scores.CoverFeatures(embedded, quality, genres, attributes)


def evaluate(run: TrainedModel, extractor: FeatureExtractor | None, songs: Songs, held_out: ShardDataset,
             train: ShardDataset, *, samples_per_song: int, seed: int, ranks: Ranks, check_interrupt: Callable[[], None]
             ) -> tuple[dict[str, dict[str, scores.Figure]], dict[str, dict[str, float]], Tensor]:
    """The table of a run, its attributes one by one (on demo data), and its covers uint8 ``[N, K, 3, R, R]``.

    Songs are of ``held_out``; K is ``samples_per_song``. Only rank 0 has tables, a progress bar and needs an extractor.
    """
    base = baselines(run, songs, train, seed)
    conditional = run.model.conditional
    audio = run.normalizer(songs.raw) if conditional else None
    unconditional, no_audio = run, base["any"]
    if hasattr(run.config.options, "guidance"):
        unconditional, no_audio = open_model(run.folder, which=str(step_of(run.checkpoint)), options={
            "guidance": 0.0, "sampling_steps": run.config.options.sampling_steps}), audio
    bar = tqdm(total=3 * len(songs) * samples_per_song // ranks.ranks, unit="cover", disable=ranks.rank > 0,
               dynamic_ncols=True)

    def progress(made: int) -> None:
        bar.update(made)
        check_interrupt()

    def make(by: TrainedModel, audio: np.ndarray | None, column: str) -> Tensor:
        bar.set_description(column)
        return make_covers(by, audio if conditional else None, len(songs), samples_per_song, seed, ranks, progress)

    covers = {"run": make(run, audio, "run"), "real": songs.covers[:, None]}
    covers["shuffled"] = covers["run"][torch.from_numpy(mismatched_pairing(songs.groups, seed))]
    covers["genre_mean"] = make(run, base["genre_mean"], "genre_mean")
    covers["unconditional"] = make(unconditional, no_audio, "unconditional")
    covers["copy"] = base["copy"][:, None]
    bar.close()
    gaps = scores.denoising_gaps(run, songs, seed, ranks, check_interrupt) if run.model.denoising_loss else {}
    if extractor is None:
        return {}, {}, covers["run"]

    columns, training = {}, []
    for name, part in covers.items():
        check_interrupt()
        columns[name] = extractor.compute(part)
    rows = choose_songs(train, COPIED_FROM, 0, run.config.training.album_subset)
    for part in cover_batches(train, rows, run.resolution):
        check_interrupt()
        training.append(extractor.quality(part).numpy())
    training = np.concatenate(training)
    truth = extractor.probes.truth and extractor.probes.truth.attributes(held_out, songs.rows)
    predicted = extractor.probes.predict(songs.raw)
    embedded = judges.embed_audio(extractor.judge, songs.raw).numpy() if extractor.judge else None
    table = scores.measure(columns, embedded, songs, training[:REFERENCE],
                           None if held_out.index.split == "train" else training, truth, predicted, seed,
                           check_interrupt)
    table["run"] |= gaps
    details = {} if truth is None or predicted is None else scores.each_attribute(
        columns["run"].attributes, truth, predicted, songs.strata, extractor.probes.truth.names)
    return table, details, covers["run"]


class QuickEvaluation:
    """The same songs of the validation split all through a run."""

    def __init__(self, shards: ShardDataset, resolution: int, judge: TrainedModel | None, seed: int) -> None:
        """Takes shards with raw audio, and the resolution of the run; ValueError for a judge of other shards."""
        if judge is not None:
            judges.check_audio(judge, shards)
        self.songs = read_songs(shards, choose_songs(shards, QUICK_SONGS, seed), resolution)
        self.genres, self.judge, self.seed = shards.metadata["genres"], judge, seed

    def __call__(self, run: TrainedModel) -> tuple[dict[str, float], list[str], list[list[Any]]]:
        """Scalars ``eval/...``, and columns and rows of a table of songs."""
        alone = Ranks()
        audio = run.normalizer(self.songs.raw) if run.model.conditional else None
        covers = make_covers(run, audio, len(self.songs), QUICK_SAMPLES, self.seed, alone, lambda made: None)
        figures: dict[str, scores.Figure] = {}
        if self.judge is not None:
            embedded = judges.embed_covers(self.judge, covers.flatten(0, 1)).unflatten(0, covers.shape[:2])
            figures |= scores.dependence(embedded.numpy(), judges.embed_audio(self.judge, self.songs.raw).numpy(),
                                         self.songs, self.seed)
        if run.model.denoising_loss:
            figures |= scores.denoising_gaps(run, self.songs, self.seed, alone)
        return (report.scalars({"run": figures}, "eval"),
                *report.song_table(self.judge, self.songs, covers, self.genres, SHOWN))
