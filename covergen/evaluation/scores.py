"""Every figure of an evaluation: covers of each column, a judge and a reader in; a table of intervals out.

``measure`` returns ``{column: {metric: Figure}}``; what a metric means is in ``METRICS``, in the order they are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from covergen.data.batch import Batch
from covergen.data.sampling import seed_of
from covergen.distributed.collectives import Ranks
from covergen.evaluation import metrics as quality
from covergen.evaluation import statistics
from covergen.evaluation.generation import Songs, mismatched_pairing
from covergen.evaluation.metrics import balanced_accuracy
from covergen.inference.trained_model import TrainedModel

RESAMPLES = 1000
NEIGHBOURS = 5  # of precision, recall, density and coverage
METRICS = {
    "dependence": "judge's cosine with the right audio minus that with wrong audio",
    "dependence_share": "the same as a share of the real covers'",
    "within_genre": "dependence among songs of one genre",
    "within_genre_share": "the same as a share of the real covers'",
    "r@1": "share of songs whose cover is the best for their audio, among all",
    "r@5": "among the best 5",
    "r@10": "among the best 10",
    "median_rank": "of the song's cover, 1 is best",
    "icc": "share of the covers' variance that audio makes, 1 - this is noise's",
    "attribute_score": "how well covers show the attributes that the audio tells, 1 is all that can be known",
    "attribute_within_genre": "the same with genre means taken off",
    "genre_accuracy": "balanced accuracy of a classifier of real covers in telling the song's genre",
    "fid": "Frechet distance to training covers, smaller is better",
    "kid": "kernel distance to training covers, smaller is better",
    "precision": "share of covers that look like real ones", "recall": "share of real covers that covers look like",
    "density": "precision that counts neighbours", "coverage": "share of real covers with a cover nearby",
    "copied": "share of covers nearer to a training cover than half of the real test covers are",
    "denoising_gap": "denoising loss with another song's audio minus that with the right one, as a share of it",
    "denoising_gap_within": "the same with a song of the same genre",
}


class Figure(NamedTuple):
    """A value, its 95% bootstrap interval over albums (None: not computed) and a p-value (None: no test)."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Views:
    """What is seen of one column's covers.

    Attributes:
        features: by the judge, ``[N, K, 128]``, unit vectors.
        quality: features for FID and the like, ``[N, D]``, of the first noise.
        genres: read from covers, ``[N, K]``.
        attributes: read from covers, ``[N, K, 8]``; None but on demo data.
    """

    features: np.ndarray | None
    quality: np.ndarray
    genres: np.ndarray | None
    attributes: np.ndarray | None


def measure(views: dict[str, Views], heard: np.ndarray | None, songs: Songs, reference: np.ndarray,
            training: np.ndarray | None, truth: np.ndarray | None, predicted: np.ndarray | None, seed: int,
            tick: Callable[[str], None]) -> dict[str, dict[str, Figure]]:
    """Args:
        views: of every column.
        heard: the songs' audio as the judge hears it, ``[N, 128]``; None without audio.
        songs: what is evaluated with.
        reference: quality features of training covers ``[M, D]``.
        training: the same of all of them, among which copies are looked for; None: not looked for.
        truth, predicted: attributes ``[N, 8]``, and what a network predicts of them from the audio; None but on demo
            data.
        seed: of resampling and of permutations.
        tick: told each column before it is measured; may raise to stop.
    """
    table: dict[str, dict[str, Figure]] = {}
    held_out = views["real"].quality
    for name, view in views.items():
        tick(name)
        row: dict[str, Figure] = {}
        if heard is not None and view.features is not None:
            row |= dependence(view.features, heard, songs, seed)
        if truth is not None and predicted is not None and view.attributes is not None:
            row |= attributes(view.attributes, truth, predicted, kinds(songs), seed)
        if view.genres is not None and (songs.genres >= 0).any():
            row["genre_accuracy"] = genre_accuracy(view.genres, songs.genres, seed)
        row |= likeness(view.quality, reference, seed)
        if training is not None:
            row["copied"] = Figure(quality.copied(*map(torch.from_numpy, (view.quality, held_out, training))))
        table[name] = row
    for row in table.values():
        for metric in ("dependence", "within_genre"):
            real = table["real"].get(metric)
            if metric in row and real and real.value > 0:
                row[f"{metric}_share"] = Figure(*(part / real.value for part in row[metric][:3]))
    return table


def dependence(features: np.ndarray, heard: np.ndarray, songs: Songs, seed: int) -> dict[str, Figure]:
    """Whether covers ``[N, K, D]`` fit their own songs' audio ``[N, D]`` better than other songs'."""
    scores, row = features.mean(1) @ heard.T, {}  # [covers, songs], means over the noises
    for name, genres in (("dependence", None), ("within_genre", kinds(songs))):
        gaps = statistics.gaps(scores, genres, songs.groups)
        if not (known := np.isfinite(gaps)).any():
            continue
        p = statistics.permutation_p(scores, genres, songs.groups, seed=seed)
        row[name] = Figure(*statistics.bootstrap_mean(gaps[known], seed=seed), p)
    ranks = statistics.retrieval((features[:, 0] @ heard.T).T, songs.groups)
    for k in (1, 5, 10):
        row[f"r@{k}"] = Figure(*statistics.bootstrap_mean((ranks <= k).astype(float), seed=seed))
    row["median_rank"] = Figure(*statistics.bootstrap_of(lambda some: float(np.median(ranks[some])), len(ranks),
                                                         seed=seed))
    if features.shape[1] > 1:
        row["icc"] = Figure(*statistics.bootstrap_of(lambda some: statistics.intraclass(features[some]), len(features),
                                                     seed=seed, resamples=100))
    return row


def kinds(songs: Songs) -> np.ndarray:
    """Genres ``[N]`` where a song of unknown genre is alone in its own."""
    return np.where(songs.genres >= 0, songs.genres, -1 - np.arange(len(songs)))


def attributes(readings: np.ndarray, truth: np.ndarray, predicted: np.ndarray, genres: np.ndarray,
               seed: int) -> dict[str, Figure]:
    """The attribute score of readings ``[N, K, 8]``, in total and within genres."""
    return {name: Figure(*statistics.bootstrap_of(
        lambda some, kinds=kinds: statistics.attribute_score(readings[some], truth[some], predicted[some],
                                                             None if kinds is None else kinds[some]),
        len(truth), seed=seed, resamples=RESAMPLES // 4))
        for name, kinds in (("attribute_score", None), ("attribute_within_genre", genres))}


def each_attribute(readings: np.ndarray, truth: np.ndarray, predicted: np.ndarray, genres: np.ndarray,
                   names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of every attribute what is read from covers ``[N, K, 8]`` and what a network predicts from the audio.

    R2 and slope are uncorrected: even a perfect sampler has a low R2, and a slope of what audio can tell.
    """
    r2, slope = statistics.reading_r2_and_slope(readings, truth)
    figures = {"r2": r2, "slope": slope, "squared_correlation": statistics.attribute_figures(readings, truth, None),
               "within_genre": statistics.attribute_figures(readings, truth, genres),
               "known": statistics.attribute_figures(predicted[:, None], truth, None),
               "known_within_genre": statistics.attribute_figures(predicted[:, None], truth, genres)}
    return {name: {key: float(values[place]) for key, values in figures.items()} for place, name in enumerate(names)}


def genre_accuracy(read: np.ndarray, genres: np.ndarray, seed: int) -> Figure:
    """Balanced accuracy of genres read from covers ``[N, K]``; songs of unknown genre are left out."""
    known = np.flatnonzero(genres >= 0)

    def of(some: np.ndarray) -> float:
        labels = np.repeat(genres[known[some], None], read.shape[1], 1)
        return balanced_accuracy(torch.from_numpy(labels.ravel()), torch.from_numpy(read[known[some]].ravel()))

    return Figure(*statistics.bootstrap_of(of, len(known), seed=seed, resamples=RESAMPLES // 4))


def likeness(made: np.ndarray, reference: np.ndarray, seed: int) -> dict[str, Figure]:
    """How much like training covers ``[M, D]`` one cover of each song ``[N, D]`` is."""
    one, real = torch.from_numpy(made), torch.from_numpy(reference)
    row = {"fid": Figure(quality.frechet(real, one)), "kid": Figure(quality.kernel(real, one, seed)[0])}
    if min(len(one), len(real)) > NEIGHBOURS + 1:
        found = quality.prdc_of(real[:len(one)], one, k=NEIGHBOURS)
        row |= {name: Figure(value) for name, value in found.items()}
    return row


AT_ONCE = 64
DRAWS = 8  # times and noises at which each cover's loss is measured


def gaps(run: TrainedModel, songs: Songs, seed: int, ranks: Ranks, tick: Callable[[], None] = lambda: None) -> dict[str, Figure]:
    """By what share of itself the loss grows with another song's audio, overall and with one of the same genre.

    The same cover meets the same times and noises with both, so that nothing but the audio differs; p by sign flips.

    Args:
        run: whose model has a ``denoising_loss``.
        songs, seed: with any audio.
        ranks: among whom the work is shared; tick: called now and then, may raise to stop.
    """
    heard = run.normalizer(songs.raw)
    right, row = losses(run, songs, heard, seed, ranks, tick).numpy(), {}
    for name, genres in (("denoising_gap", None), ("denoising_gap_within", kinds(songs))):
        chosen = mismatched_pairing(songs.groups, seed, genres)
        known = chosen >= 0
        if not known.any():
            continue
        wrong = losses(run, songs, heard[np.where(known, chosen, np.arange(len(songs)))], seed, ranks, tick).numpy()
        shares = ((wrong - right) / right.mean())[known]
        row[name] = Figure(*statistics.bootstrap_mean(shares, seed=seed), statistics.sign_flip_p(shares, seed=seed))
    return row


@torch.no_grad()
def losses(run: TrainedModel, songs: Songs, heard: np.ndarray, seed: int, ranks: Ranks, tick: Callable[[], None]) -> Tensor:
    """Denoising losses ``[N]`` of the songs' covers with scaled audio ``[N, A]``, means over ``DRAWS`` draws."""
    audio = torch.from_numpy(heard)

    def some(start: int) -> Tensor:
        tick()
        part = slice(start, start + AT_ONCE)
        batch = Batch(songs.covers[part].to(run.device), audio[part].to(run.device), None, None)
        total = torch.zeros(len(batch.cover), dtype=torch.float64)
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(seed_of(seed, "denoising", start, draw))
            noise = run.model.phases[0].sample_noise(len(batch.cover), generator)
            noise = {name: value.to(run.device) for name, value in noise.items()}
            total += run.model.denoising_loss(run.networks, batch, noise).double().cpu()
        return total / DRAWS

    return torch.cat(ranks.share(range(0, len(songs), AT_ONCE), some))
