"""Finds the blocks of audio vectors, and adds up mean and standard deviation.

A vector joins the features of several sources; what a source does not know is filled with zeros. Where the joins lie is
seen in the data: in long runs of exact zeros that begin or end at the same column in many vectors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PRESENCE_RULE = ("A block is present in a vector when any of its values differs from 0; mean and std of a column are "
                 "over the vectors in which its block is present (population std; 0 = constant or never present).")
SUPPORT = 0.01  # share of the vectors that must show a boundary
_CONTENDERS = 16  # boundaries of one cluster that are weighed against each other

Blocks = tuple[tuple[int, int], ...]


def detect_blocks(vectors: np.ndarray) -> Blocks:
    """The ``[start, end)`` of every block, from a fair sample of vectors ``[N, D]``; one if there is no sign of more.

    Columns that are 0 everywhere are left out. A boundary needs 1% of the vectors, a run of at least
    max(8, D // 50) columns, and 1% of vectors in which one of the blocks beside it is absent. Among boundaries close to
    each other (a source's last feature may happen to be 0 in some tracks) the one that explains most absences wins.
    """
    count, dimension = vectors.shape
    alive = np.flatnonzero((vectors != 0).any(0))
    zero = (vectors if len(alive) == dimension else vectors[:, alive]) == 0
    shortest, needed = max(8, dimension // 50), max(1, int(np.ceil(SUPPORT * count)))
    width = len(alive) + 1
    padded = np.zeros(count * width + 1, bool)  # a False between the rows ends their runs
    padded[1:].reshape(count, width)[:, :-1] = zero
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    starts, ends = edges[::2] % width, edges[1::2] % width  # of the runs of zeros: first column, that behind the last
    long = ends - starts >= shortest
    support = np.bincount(np.concatenate([starts[long], ends[long]]), minlength=len(alive) + 1)
    found = [c for c in np.flatnonzero(support >= needed).tolist() if shortest <= c <= len(alive) - shortest]
    clusters: list[list[int]] = []
    for cut in found:
        if clusters and cut - clusters[-1][-1] < shortest:
            clusters[-1].append(cut)
        else:
            clusters.append([cut])
    clusters = [sorted(cluster, key=lambda c: -support[c])[:_CONTENDERS] for cluster in clusters]
    bounds = [0, *(cluster[0] for cluster in clusters), len(alive)]

    def absences(start: int, end: int) -> int:
        return int(zero[:, start:end].all(1).sum())

    def is_missing(start: int, end: int) -> bool:
        # Sparse features are all 0 by chance, as often as their shares of zeros multiply to; a missing source is not.
        chance = zero[:, start:end].mean(0).prod() * count
        return absences(start, end) >= max(needed, 2 * chance)

    for i, cluster in enumerate(clusters, 1):
        low, high = bounds[i - 1], bounds[i + 1]
        bounds[i] = max(cluster, key=lambda c: (absences(low, c) + absences(c, high), support[c]))
    chosen = [0]
    for cut, high in itertools.pairwise(bounds[1:]):
        if is_missing(chosen[-1], cut) or is_missing(cut, high):
            chosen.append(cut)
    starts_at = [0, *(int(alive[cut]) for cut in chosen[1:]), dimension]
    return tuple(itertools.pairwise(starts_at))


def blocks_of_sizes(sizes: Sequence[int], dimension: int) -> Blocks:
    """The blocks that a person gave by their sizes; ValueError unless these add up to the vectors' dimension."""
    if min(sizes) < 1 or sum(sizes) != dimension:
        raise ValueError(f"--audio_blocks {','.join(map(str, sizes))} add up to {sum(sizes)}, "
                         f"but the vectors have {dimension} numbers")
    return tuple(itertools.pairwise(itertools.accumulate(sizes, initial=0)))


@dataclass
class Moments:
    """Running statistics, float64, per column ``[D]`` over the vectors in which the column's block is present."""

    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def empty(cls, dimension: int) -> Moments:
        return cls(*np.zeros((3, dimension)), np.full(dimension, np.inf), np.full(dimension, -np.inf))

    @classmethod
    def of(cls, vectors: np.ndarray, blocks: Blocks) -> Moments:
        """The moments of vectors ``[N, D]``."""
        moments = cls.empty(vectors.shape[1])
        for start, end in blocks:
            values = vectors[:, start:end]
            present = values.any(1)
            values = values if present.all() else values[present]
            if len(values):
                moments.low[start:end], moments.high[start:end] = values.min(0), values.max(0)
                values = values.astype(np.float64)
                moments.count[start:end] = len(values)
                moments.mean[start:end] = values.mean(0)
                values -= moments.mean[start:end]
                moments.m2[start:end] = np.square(values, out=values).sum(0)
        return moments

    def merge(self, other: Moments) -> Moments:
        """Both together (Chan, Golub and LeVeque 1979). Merge in a fixed order: floating point sums depend on it."""
        count = self.count + other.count
        share = np.divide(other.count, count, out=np.zeros_like(count), where=count > 0)
        delta = other.mean - self.mean
        return Moments(count, self.mean + delta * share, self.m2 + other.m2 + delta**2 * self.count * share,
                       np.minimum(self.low, other.low), np.maximum(self.high, other.high))

    def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and population standard deviation; a constant column has exactly its value and 0, not rounding noise."""
        constant = self.low == self.high
        std = np.sqrt(np.divide(self.m2, self.count, out=np.zeros_like(self.m2), where=self.count > 0))
        return np.where(constant, self.low, self.mean), np.where(constant, 0.0, std)


_STATISTICS_BYTES = 2**21  # vectors are added to the statistics in chunks of this many bytes of float64


class Statistics:
    """Moments of vectors that come one by one, added up in chunks: the same chunks give the same last bits."""

    def __init__(self, dimension: int, blocks: Blocks):
        self.moments, self.blocks, self.filled = Moments.empty(dimension), blocks, 0
        self.buffer = np.empty((max(1, -(-_STATISTICS_BYTES // (8 * dimension))) if dimension else 0, dimension), "<f4")

    def add(self, vector: np.ndarray) -> None:
        self.buffer[self.filled] = vector
        self.filled += 1
        if self.filled == len(self.buffer):
            self.finish()

    def finish(self) -> Moments:
        if self.filled:
            self.moments = self.moments.merge(Moments.of(self.buffer[:self.filled], self.blocks))
            self.filled = 0
        return self.moments
