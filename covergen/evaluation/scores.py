"""Every figure of an evaluation, with its interval and p value; what each means is in ``METRICS``, in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from covergen.data.batch import Batch
from covergen.data.sampling import seed_of
from covergen.distributed.collectives import Ranks
from covergen.evaluation import metrics, statistics
from covergen.evaluation.songs import Songs, mismatched_pairing
from covergen.evaluation.statistics import Figure
from covergen.inference.trained_model import TrainedModel

RESAMPLES = 250  # of figures that take long
NEIGHBOURS = 5  # of precision, recall, density and coverage
BATCH = 64  # covers whose denoising loss is computed together
DRAWS = 8  # times and noises at which each cover's loss is measured
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
    "attribute_score": "how well covers show the attributes that the audio determines, 1 is all that can be known",
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


@dataclass(frozen=True)
class CoverFeatures:
    """What networks compute of one column's covers, K of each of N songs."""

    judge: np.ndarray | None  # the judge's embeddings, unit vectors [N, K, 128]; None without a judge
    quality: np.ndarray  # features for FID and the like, [N, D], of the first cover
    genres: np.ndarray | None  # predicted, [N, K]
    attributes: np.ndarray | None  # estimated, [N, K, 8]; None but on demo data


def measure(columns: dict[str, CoverFeatures], audio: np.ndarray | None, songs: Songs, reference: np.ndarray,
            training: np.ndarray | None, truth: np.ndarray | None, predicted: np.ndarray | None, seed: int,
            check_interrupt: Callable[[], None]) -> dict[str, dict[str, Figure]]:
    """The table: column -> metric -> figure.

    Audio is the judge's embeddings of it, ``[N, 128]``, or None. ``reference`` are quality features of training covers
    ``[M, D]``, ``training`` those of all of them, among which copies are searched; None: they are not. The truth and
    what a network predicts of it from the audio are attributes ``[N, 8]``; None but on demo data.
    """
    table: dict[str, dict[str, Figure]] = {}
    held_out = columns["real"].quality
    for name, features in columns.items():
        check_interrupt()
        row: dict[str, Figure] = {}
        if audio is not None and features.judge is not None:
            row |= dependence(features.judge, audio, songs, seed)
        if truth is not None and predicted is not None and features.attributes is not None:
            row |= attributes(features.attributes, truth, predicted, songs.strata, seed)
        if features.genres is not None and (songs.genres >= 0).any():
            row["genre_accuracy"] = genre_accuracy(features.genres, songs.genres, seed)
        fake, real = torch.from_numpy(features.quality), torch.from_numpy(reference)
        likeness = {"fid": metrics.frechet(real, fake), "kid": metrics.kernel(real, fake, seed)[0]}
        if min(len(fake), len(real)) > NEIGHBOURS + 1:
            likeness |= metrics.prdc_of(real[:len(fake)], fake, k=NEIGHBOURS)
        if training is not None:
            likeness["copied"] = metrics.copied(fake, torch.from_numpy(held_out), torch.from_numpy(training))
        table[name] = row | {metric: Figure(value) for metric, value in likeness.items()}
    for row in table.values():
        for metric in ("dependence", "within_genre"):
            real = table["real"].get(metric)
            if metric in row and real and real.value > 0:
                row[f"{metric}_share"] = Figure(*(part / real.value for part in row[metric][:3]))
    return table


def dependence(covers: np.ndarray, audio: np.ndarray, songs: Songs, seed: int) -> dict[str, Figure]:
    """Whether embedded covers ``[N, K, D]`` fit their own songs' audio ``[N, D]`` better than other songs'."""
    scores, row = covers.mean(1) @ audio.T, {}  # [covers, songs], means over the samples
    for name, genres in (("dependence", None), ("within_genre", songs.strata)):
        margins = statistics.margins(scores, genres, songs.groups)
        if not (known := np.isfinite(margins)).any():
            continue
        row[name] = statistics.bootstrap_mean(margins[known], seed=seed)._replace(
            p=statistics.permutation_p(scores, genres, songs.groups, seed=seed))
    ranks = statistics.retrieval((covers[:, 0] @ audio.T).T, songs.groups)
    for k in (1, 5, 10):
        row[f"r@{k}"] = statistics.bootstrap_mean((ranks <= k).astype(float), seed=seed)
    row["median_rank"] = statistics.bootstrap_of(lambda rows: float(np.median(ranks[rows])), len(ranks), seed=seed)
    if covers.shape[1] > 1:
        row["icc"] = statistics.bootstrap_of(lambda rows: statistics.intraclass(covers[rows]), len(covers), seed=seed,
                                             resamples=100)
    return row


def attributes(estimates: np.ndarray, truth: np.ndarray, predicted: np.ndarray, strata: np.ndarray,
               seed: int) -> dict[str, Figure]:
    """The attribute score of estimates ``[N, K, 8]``, in total and within genres."""
    return {name: statistics.bootstrap_of(
                lambda rows, genres=genres: statistics.attribute_score(
                    estimates[rows], truth[rows], predicted[rows], None if genres is None else genres[rows]),
                len(truth), seed=seed, resamples=RESAMPLES)
            for name, genres in (("attribute_score", None), ("attribute_within_genre", strata))}


def each_attribute(estimates: np.ndarray, truth: np.ndarray, predicted: np.ndarray, strata: np.ndarray,
                   names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of every attribute what is estimated from covers ``[N, K, 8]`` and what a network predicts from the audio.

    R2 and slope are uncorrected: even a perfect sampler has a low R2, and a slope of what audio explains.
    """
    r2, slope = statistics.r2_and_slope(estimates, truth)
    figures = {"r2": r2, "slope": slope, "squared_correlation": statistics.attribute_figures(estimates, truth, None),
               "within_genre": statistics.attribute_figures(estimates, truth, strata),
               "known": statistics.attribute_figures(predicted[:, None], truth, None),
               "known_within_genre": statistics.attribute_figures(predicted[:, None], truth, strata)}
    return {name: {key: float(values[column]) for key, values in figures.items()} for column, name in enumerate(names)}


def genre_accuracy(predicted: np.ndarray, genres: np.ndarray, seed: int) -> Figure:
    """Balanced accuracy of genres predicted from covers ``[N, K]``; songs of unknown genre are left out."""
    known = genres >= 0
    predicted, labels = predicted[known], np.repeat(genres[known, None], predicted.shape[1], 1)

    def accuracy(rows: np.ndarray) -> float:
        return metrics.balanced_accuracy(*(torch.from_numpy(part[rows].ravel()) for part in (labels, predicted)))

    return statistics.bootstrap_of(accuracy, len(labels), seed=seed, resamples=RESAMPLES)


def denoising_gaps(run: TrainedModel, songs: Songs, seed: int, ranks: Ranks,
                   check_interrupt: Callable[[], None] = lambda: None) -> dict[str, Figure]:
    """By what share of itself the loss grows with another song's audio, overall and with one of the same genre.

    The same cover meets the same times and noises with both; p by sign flips.
    """
    audio = run.normalizer(songs.raw)
    right, row = denoising_losses(run, songs, audio, seed, ranks, check_interrupt).numpy(), {}
    for name, genres in (("denoising_gap", None), ("denoising_gap_within", songs.strata)):
        chosen = mismatched_pairing(songs.groups, seed, genres)
        known = chosen >= 0
        if not known.any():
            continue
        mismatched = audio[np.where(known, chosen, np.arange(len(songs)))]
        wrong = denoising_losses(run, songs, mismatched, seed, ranks, check_interrupt).numpy()
        shares = ((wrong - right) / right.mean())[known]
        row[name] = statistics.bootstrap_mean(shares, seed=seed)._replace(p=statistics.sign_flip_p(shares, seed=seed))
    return row


@torch.no_grad()
def denoising_losses(run: TrainedModel, songs: Songs, audio: np.ndarray, seed: int, ranks: Ranks,
                     check_interrupt: Callable[[], None]) -> Tensor:
    """Denoising losses ``[N]`` of the songs' covers with scaled audio ``[N, A]``, means over ``DRAWS`` draws."""
    vectors = torch.from_numpy(audio)

    def losses(start: int) -> Tensor:
        check_interrupt()
        part = slice(start, start + BATCH)
        batch = Batch(songs.covers[part].to(run.device), vectors[part].to(run.device), None, None)
        total = torch.zeros(len(batch.cover), dtype=torch.float64)
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(seed_of(seed, "denoising", start, draw))
            noise = run.model.phases[0].sample_noise(len(batch.cover), generator)
            noise = {name: value.to(run.device) for name, value in noise.items()}
            total += run.model.denoising_loss(run.networks, batch, noise).double().cpu()
        return total / DRAWS

    return torch.cat(ranks.share(range(0, len(songs), BATCH), losses))
