"""Confidence intervals, p values and effect sizes. Rows are songs, one of each album unless it says otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BLOCK = 2**21  # random numbers in memory at a time


class Figure(NamedTuple):
    """A value, its 95% bootstrap interval over albums (None: not computed) and a p-value (None: no test)."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def bootstrap_of(statistic: Callable[[np.ndarray], float], count: int, *, seed: int, resamples: int = 1000,
                 level: float = 0.95) -> Figure:
    """A statistic of ``count`` songs and its percentile interval over songs drawn with replacement.

    ``statistic`` is of the songs at positions int64 ``[count]``; ``level`` is the share of the draws in the interval.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.
    """
    rng = np.random.default_rng(seed)
    drawn = [statistic(rng.integers(count, size=count)) for _ in range(resamples)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Figure(float(statistic(np.arange(count))), float(low), float(high))


def bootstrap_mean(values: np.ndarray, *, seed: int, resamples: int = 1000, level: float = 0.95) -> Figure:
    """The mean of values ``[N]``, those that are NaN left out, and its interval; NaN if none is left."""
    values = _present(values)
    if not len(values):
        return Figure(math.nan, math.nan, math.nan)
    return bootstrap_of(lambda rows: values[rows].mean(), len(values), seed=seed, resamples=resamples, level=level)


def margins(scores: np.ndarray, genres: np.ndarray | None, groups: np.ndarray) -> np.ndarray:
    """By how much each cover fits its own audio better than that of other albums, float64 ``[N]``.

    Of scores ``[i, j]`` of cover i with the audio of song j, such as cosines, less their mean over the others, with
    genres ``[N]`` over those of its genre; NaN for a song without any.
    """
    compared = groups[:, None] != groups[None]
    if genres is not None:
        compared &= genres[:, None] == genres[None]
    counts = compared.sum(1)
    means = (scores * compared).sum(1, dtype=np.float64) / np.maximum(counts, 1)
    return np.where(counts, np.diagonal(scores) - means, np.nan)


def permutation_p(scores: np.ndarray, genres: np.ndarray | None, groups: np.ndarray, *, seed: int,
                  permutations: int = 9999) -> float:
    """p of the mean score of covers with their own audio, against audio permuted among the covers.

    Takes scores, genres and groups as ``margins`` does. Albums are what is permuted: the scores of several songs of one
    are averaged first, else their similarity would count as evidence. From ``1 / (1 + permutations)`` to 1.

    Source: Phipson and Smyth 2010, "Permutation P-values Should Never Be Zero".
    """
    albums, first, album_of, counts = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    starts, order = np.cumsum(counts) - counts, np.argsort(album_of, kind="stable")
    sums = np.add.reduceat(scores[np.ix_(order, order)].astype(np.float64), starts, axis=0)
    scores = np.add.reduceat(sums, starts, axis=1) / np.outer(counts, counts)
    strata = np.zeros(len(albums)) if genres is None else genres[first]

    rng, sums = np.random.default_rng(seed), np.zeros(permutations)
    for stratum in np.unique(strata):
        own = np.flatnonzero(strata == stratum)
        block, cover = scores[np.ix_(own, own)], np.arange(len(own))
        for start, rows in _blocks(permutations, len(own)):
            audio = rng.permuted(np.broadcast_to(cover, (rows, len(own))), axis=1)
            sums[start:start + rows] += block[cover, audio].sum(1)
    return _p_value(sums, np.trace(scores), np.abs(scores).max() * len(scores))


def sign_flip_p(differences: np.ndarray, *, seed: int, permutations: int = 9999) -> float:
    """One-sided p of a mean above 0, against random signs of the differences ``[N]``; NaN are left out. Source: Fisher
    1935, "The Design of Experiments", section 21; p as in ``permutation_p``."""
    differences = _present(differences)
    rng = np.random.default_rng(seed)
    flipped = [(2.0 * rng.integers(2, size=(rows, len(differences)), dtype=np.int8) - 1) @ differences
               for _, rows in _blocks(permutations, len(differences))]
    return _p_value(np.concatenate(flipped), differences.sum(), np.abs(differences).sum())


def retrieval(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The rank of each song's own cover among all covers by its audio, 1 for the best, float64 ``[N]``.

    Scores ``[i, j]`` are of the audio of song i with cover j: transposed to what ``margins`` takes. Covers of the own
    album are not compared. Ties count half. Recall at k by chance is k / N.
    """
    other, own = groups[:, None] != groups[None], np.diagonal(scores)[:, None]
    # Lower scores are counted, not higher ones: so scores that are NaN rank last.
    return 1 + (other & ~(scores < own)).sum(1) - 0.5 * (other & (scores == own)).sum(1)


def intraclass(features: np.ndarray) -> float:
    """How much of what varies in features ``[N, K, D]`` of K covers of each of N songs, both at least 2, is due to the
    audio: near 0 for none, 1 if noise does not matter.

    Source: Shrout and Fleiss 1979, "Intraclass correlations", ICC(1, 1); mean squares are summed over dimensions.
    """
    songs, samples, _ = features.shape
    means = features.mean(1, dtype=np.float64)
    between = samples * np.square(means - means.mean(0)).sum() / (songs - 1)
    within = np.square(features - means[:, None]).sum() / (songs * (samples - 1))
    return float((between - within) / (between + (samples - 1) * within))


def attribute_figures(estimates: np.ndarray, truth: np.ndarray, genres: np.ndarray | None) -> np.ndarray:
    """Squared correlation of attributes estimated from covers with their truth, float64 ``[A]`` in [0, 1].

    Covers drawn from the true posterior reach the share of the truth's variance that audio explains: the mean of K
    estimates stands for the posterior mean, and the variance that the noise leaves in it is taken off. How strongly
    a model shows an attribute does not matter. A negative correlation counts as 0, as does what does not vary.

    Estimates are ``[N, K, A]`` from K covers of each of N songs, K at least 4, or 1 for what has no noise, which is not
    corrected; with genres ``[N]`` their means are taken off. Source: Spearman 1904, "The Proof and Measurement of
    Association between Two Things" (correction for attenuation).
    """
    estimates, truth = estimates.astype(np.float64), truth.astype(np.float64)
    samples, average = estimates.shape[1], estimates.mean(1)
    mean, weights = _centred(average, genres)
    true, _ = _centred(truth, genres)
    freedom = weights.sum()
    # Sums of squares over the same degrees of freedom throughout, which cancel.
    variance, spread = np.square(mean).sum(0), np.square(true).sum(0)
    noise = weights @ estimates.var(1, ddof=1) / samples if samples > 1 else 0.0
    # A model that ignores the audio has nothing but noise in its mean: the difference is 0 up to sampling, and dividing
    # by that would give anything. A variance is known to a share of sqrt(2 / freedom) of itself; less than two of these
    # is taken for two, so such a model gets near 0, and one that follows the audio barely somewhat less than its due.
    floor = min(1.0, 2 * math.sqrt(2 / max(freedom, 1.0))) * variance
    shared = np.maximum((mean * true).sum(0), 0.0)
    # What is constant is so only up to rounding.
    varies = (variance > 1e-12 * np.square(average).sum(0)) & (spread > 1e-12 * np.square(truth).sum(0))
    return np.minimum(1.0, np.divide(shared**2, np.maximum(variance - noise, floor) * spread,
                                     out=np.zeros_like(shared), where=varies))


def attribute_score(estimates: np.ndarray, truth: np.ndarray, predicted: np.ndarray, genres: np.ndarray | None
                    ) -> float:
    """What covers show of the attributes in their audio: near 0 for nothing, 1 for all that a regressor knows.

    Pure noise gets about 0.18 / sqrt(N) on average, over the mean figure of the prediction: half of it correlates above
    0, and see the floor in ``attribute_figures``. NaN if the prediction ``[N, A]`` from the audio explains nothing.
    """
    known = attribute_figures(predicted[:, None], truth, genres).mean()
    return float(attribute_figures(estimates, truth, genres).mean() / known) if known > 0 else math.nan


def r2_and_slope(estimates: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Figures that are not corrected for noise, each ``[A]``, of estimates ``[N, K, A]`` and the truth ``[N, A]``.

    The coefficient of determination of the truth by the mean estimate as it stands, and the slope of the regression of
    the estimate on the truth: for the true posterior the share that audio explains, more if exaggerated.
    """
    mean, truth = estimates.mean(1, dtype=np.float64), truth.astype(np.float64)
    true = truth - truth.mean(0)
    spread = np.square(true).sum(0)
    return 1 - np.square(truth - mean).sum(0) / spread, (true * mean).sum(0) / spread


def _present(values: np.ndarray) -> np.ndarray:
    """Float64 without NaN."""
    return values[~np.isnan(values)].astype(np.float64)


def _blocks(rows: int, width: int) -> list[tuple[int, int]]:
    """Starts and counts of blocks of so many rows, each of bounded size."""
    size = max(1, BLOCK // max(1, width))
    return [(start, min(size, rows - start)) for start in range(0, rows, size)]


def _p_value(drawn: np.ndarray, observed: float, scale: float) -> float:
    """``(1 + number at least the observed) / (1 + number drawn)``; NaN prove nothing. Equal sums in another order
    differ by rounding, so what is less by a trifle of the scale counts as equal."""
    return float((1 + np.sum(~(drawn < observed - 1e-9 * scale))) / (1 + len(drawn)))


def _centred(values: np.ndarray, genres: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Values ``[N, A]`` less the means of their genres (None: of all), and ``[N]`` what that leaves of the variance of
    each; its sum is the degrees of freedom."""
    _, stratum, counts = np.unique(np.zeros(len(values)) if genres is None else genres, return_inverse=True,
                                   return_counts=True)
    means = np.zeros((len(counts), values.shape[1]))
    np.add.at(means, stratum, values)
    return values - (means / counts[:, None])[stratum], 1 - 1 / counts[stratum]
