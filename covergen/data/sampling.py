"""The order of samples: positions of an endless stream to rows, without ever building a list of rows.

An epoch is a keyed permutation of ``range(size)``: a Feistel network over the next power of four, walked until it
lands inside. Position ``p`` of the endless stream is entry ``p % size`` of epoch ``p // size``, so any part of any
epoch is known at once, a resume needs one number, and an epoch has every row exactly once however it is divided.

Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains" (cycle walking, generalised Feistel).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch

ROUNDS = 6
TRIES = 16  # draws of a row of the same genre before any other will do


def keys(*parts: int | str, count: int = ROUNDS) -> np.ndarray:
    """``[count]`` uint64 keys that depend on all the parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8 * count).digest()
    return np.frombuffer(digest, "<u8")


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on all the parts."""
    return int(keys(*parts, count=1)[0]) >> 1


def scramble(values: np.ndarray) -> np.ndarray:
    """A bijective hash of uint64 values (the finaliser of splitmix64: Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(entries: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Entries of one epoch's permutation of ``range(size)``; int64 in, int64 out, same shape."""
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    rounds = keys("order", seed, epoch)

    def encrypt(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & mask
        for key in rounds:
            left, right = right, left ^ (scramble(right + key) & mask)
        return (left << half) | right

    values = encrypt(entries.astype(np.uint64))
    while (outside := values >= size).any():
        values[outside] = encrypt(values[outside])
    return values.astype(np.int64)


def rows_of_albums(groups: np.ndarray, subset: str) -> np.ndarray:
    """The rows of albums ``[N]`` that are a ``judge``'s (a fixed quarter, by hash), a ``generator``'s (the others) or
    ``all``."""
    judged = scramble(scramble(groups.astype(np.uint64))) % np.uint64(4) == 0
    return np.flatnonzero({"judge": judged, "generator": ~judged, "all": np.ones(len(groups), bool)}[subset])


def rank_slice(batch_size: int, rank: int, ranks: int) -> range:
    """Which part of a global batch a rank reads: as much as the others, or one more or less."""
    return range(batch_size * rank // ranks, batch_size * (rank + 1) // ranks)


def stratified_rows(genres: np.ndarray, count: int) -> list[int]:
    """At most ``count`` rows, round by round one of every genre, from the genre ``[N]`` of all rows."""
    by_genre = [np.flatnonzero(genres == genre)[:count].tolist() for genre in np.unique(genres)]
    return [row for rows in zip_longest(*by_genre) for row in rows if row is not None][:count]


class SampleOrder:
    """Every sample once an epoch."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Rows ``[n]`` at the positions ``[n]`` of the endless stream."""
        rows = np.empty(len(positions), np.int64)
        epochs = positions // self.size
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = permute(positions[here] % self.size, self.size, self.seed, int(epoch))
        return rows


class GroupOrder:
    """Every album once an epoch, with one of its tracks drawn anew each time."""

    def __init__(self, groups: np.ndarray, seed: int) -> None:
        """``groups``: ``[N]`` album of every row."""
        groups = torch.from_numpy(np.require(groups, requirements=["C", "W"]))
        # By torch, in a quarter of numpy's time.
        ordered, self.sorted_rows = (part.numpy() for part in torch.sort(groups, stable=True))
        self.starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        self.counts = np.diff(self.starts, append=len(groups))
        self.albums = SampleOrder(len(self.starts), seed)
        self.size, self.seed = len(self.starts), seed

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Rows ``[n]`` at the positions ``[n]`` of the endless stream."""
        albums = self.albums(positions)
        draws = scramble(scramble(positions.astype(np.uint64)) + keys("track", self.seed, count=1))
        return self.sorted_rows[self.starts[albums] + (draws % self.counts[albums].astype(np.uint64)).astype(np.int64)]


class MismatchedAudioSampler:
    """Another row for every position of the stream, always of another album, every second one of the same genre."""

    def __init__(self, groups: np.ndarray, genres: np.ndarray, seed: int) -> None:
        """``groups``, ``genres``: ``[N]`` of the rows to draw from; ValueError if they are all of one album."""
        if not len(groups) or (groups == groups[0]).all():
            raise ValueError("mismatched pairs need tracks of two albums or more; pack more albums")
        self.groups, self.genres, self.seed = groups, genres, seed
        self.sorted_rows = np.argsort(genres, kind="stable")
        self.known, self.starts, self.counts = np.unique(genres[self.sorted_rows], return_index=True,
                                                         return_counts=True)

    def __call__(self, positions: np.ndarray, groups: np.ndarray, genres: np.ndarray) -> np.ndarray:
        """Rows ``[n]`` for the positions ``[n]`` of the endless stream, whose albums and genres are given.

        Where a genre has no other album (after some tries) the row is of any genre.
        """
        rows = np.full(len(positions), -1, np.int64)
        draws = scramble(scramble(positions.astype(np.uint64)) + keys("partner", self.seed, count=1))
        genre = np.searchsorted(self.known, genres).clip(max=len(self.known) - 1)
        same = (positions % 2 == 0) & (self.known[genre] == genres)
        for attempt in range(2 * TRIES):
            draws = scramble(draws + np.uint64(attempt + 1))
            offsets = (draws % self.counts[genre].astype(np.uint64)).astype(np.int64)
            within = self.sorted_rows[self.starts[genre] + offsets]
            anywhere = (draws % np.uint64(len(self.groups))).astype(np.int64)
            drawn = np.where(same & (attempt < TRIES), within, anywhere)
            rows = np.where((rows < 0) & (self.groups[drawn] != groups), drawn, rows)
            if (rows >= 0).all():
                return rows
        for slot in np.flatnonzero(rows < 0):  # one album is nearly everything
            rows[slot] = np.flatnonzero(self.groups != groups[slot])[0]
        return rows


WHOLE_BYTES = 32 * 10**9  # shards of so many bytes together are mixed as a whole
WINDOW = 64  # shards that are mixed where there are more
AHEAD = 16_384  # samples of an epoch without windows whose shards are fetched first


class ShardWindow(NamedTuple):
    """Part of the stream, from one position to before another, and the shards it needs, the first needed first."""

    start: int
    stop: int
    shards: list[int]


def shards_mixed(metadata: dict[str, Any], window: int | None) -> int:
    """How many shards are mixed, 0 for all, from the metadata of an index and what was asked for (None = the rule)."""
    if window is None:
        window = WINDOW if sum(shard["bytes"] for shard in metadata["shards"]) > WHOLE_BYTES else 0
    return 0 if window >= len(metadata["shards"]) else window


def shard_bounds(metadata: dict[str, Any], subset: np.ndarray | None) -> np.ndarray:
    """``[S + 1]``: where each shard's rows begin among a subset (ascending; None = all), and their number."""
    bounds = np.cumsum([0, *(shard["samples"] for shard in metadata["shards"])])
    return bounds if subset is None else np.searchsorted(subset, bounds)


def make_order(metadata: dict[str, Any], samples: int, subset: np.ndarray | None, groups: np.ndarray | None, seed: int,
               window: int | None) -> SampleOrder | GroupOrder | WindowOrder:
    """The order of an index: from positions in the stream to positions among the rows that are read.

    Args:
        metadata: of the index.
        samples, subset: how many rows are read, and which, ascending; None = all.
        groups: their albums, to have every album once an epoch; None to have every sample.
        seed: of the order.
        window: shards that are mixed, 0 = all, None = by the rule.
    """
    whole = SampleOrder(samples, seed) if groups is None else GroupOrder(groups, seed)
    count = shards_mixed(metadata, window)
    return WindowOrder(whole, shard_bounds(metadata, subset), seed, count) if count else whole


class _Epoch(NamedTuple):
    rows: np.ndarray | None  # that are read, ascending, None = all
    bounds: np.ndarray  # [S + 1] where each shard's begin
    shards: np.ndarray  # in the epoch's order, those without samples left out
    ends: np.ndarray  # [W + 1] where each window begins


class WindowOrder:
    """Every sample (or album) once an epoch; only the shards of a window are mixed at a time."""

    def __init__(self, whole: SampleOrder | GroupOrder, bounds: np.ndarray, seed: int, window: int) -> None:
        """Of an order without windows, and where each shard's rows begin, ``[S + 1]``; ``window``: shards in one."""
        self.whole, self.bounds, self.seed, self.shards, self.size = whole, bounds, seed, window, whole.size
        self._epoch = lru_cache(maxsize=3)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> _Epoch:
        rows, bounds = None, self.bounds
        if isinstance(self.whole, GroupOrder):
            albums = self.whole
            draws = scramble(scramble(np.arange(self.size, dtype=np.uint64)) + keys("drawn", self.seed, epoch, count=1))
            drawn = (draws % albums.counts.astype(np.uint64)).astype(np.int64)
            rows = np.sort(albums.sorted_rows[albums.starts + drawn])
            bounds = np.searchsorted(rows, bounds)
        count = len(bounds) - 1
        shards = permute(np.arange(count), count, seed_of("shards", self.seed), epoch)
        shards = shards[np.diff(bounds)[shards] > 0]
        starts = np.cumsum([0, *np.diff(bounds)[shards]])
        return _Epoch(rows, bounds, shards, np.append(starts[:-1:self.shards], starts[-1]))

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Rows ``[n]`` at the positions ``[n]`` of the endless stream."""
        rows = np.empty(len(positions), np.int64)
        for number, window, here in self.parts(positions):
            epoch, shards = self._epoch(number), self.shards_of(number, window)
            sizes = np.diff(epoch.bounds)[shards]
            entries = positions[here] % self.size - int(epoch.ends[window])
            inside = permute(entries, int(sizes.sum()), seed_of("window", self.seed, number), window)
            before = np.cumsum([0, *sizes])
            shard = np.searchsorted(before, inside, side="right") - 1
            rows[here] = epoch.bounds[shards[shard]] + inside - before[shard]
            if epoch.rows is not None:
                rows[here] = epoch.rows[rows[here]]
        return rows

    def parts(self, positions: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
        """(epoch, window in it, mask of the positions that are there) of every window that has one of the positions."""
        epochs, parts = positions // self.size, []
        for epoch in np.unique(epochs).tolist():
            ends = self._epoch(epoch).ends
            windows = np.where(epochs == epoch, np.searchsorted(ends, positions % self.size, side="right") - 1, -1)
            parts += [(epoch, window, windows == window) for window in np.unique(windows[windows >= 0]).tolist()]
        return parts

    def shards_of(self, epoch: int, window: int) -> np.ndarray:
        """The shards of a window."""
        return self._epoch(epoch).shards[window * self.shards:(window + 1) * self.shards]

    def window(self, position: int) -> ShardWindow:
        """The window that a position is in."""
        epoch, window, _ = self.parts(np.array([position]))[0]
        start, stop = (epoch * self.size + int(end) for end in self._epoch(epoch).ends[window:window + 2])
        return ShardWindow(start, stop, self.shards_of(epoch, window).tolist())


def window_at(order: SampleOrder | GroupOrder | WindowOrder, subset: np.ndarray | None, metadata: dict[str, Any],
              position: int) -> ShardWindow:
    """The shard window that a position of the stream is in; without windows an epoch is one, with all its shards."""
    if isinstance(order, WindowOrder):
        return order.window(position)
    start, bounds = position // order.size * order.size, shard_bounds(metadata, subset)
    ahead = order(np.arange(position, position + min(order.size, AHEAD)))
    first = dict.fromkeys((np.searchsorted(bounds, ahead, side="right") - 1).tolist())
    used = dict.fromkeys(np.flatnonzero(np.diff(bounds)).tolist())
    return ShardWindow(start, start + order.size, list(first | used))


class WindowMismatchedAudioSampler:
    """Mismatched audio from the same window of shards, see ``MismatchedAudioSampler``."""

    def __init__(self, order: WindowOrder, bounds: np.ndarray,
                 sampler_of: Callable[[np.ndarray], MismatchedAudioSampler]) -> None:
        """``bounds``: ``[S + 1]`` where each shard's begin among the rows with audio.

        ``sampler_of`` makes a sampler of some of the rows with audio, given by their positions among them.
        """
        self.order = order

        def of_window(epoch: int, window: int) -> tuple[np.ndarray, MismatchedAudioSampler]:
            shards = order.shards_of(epoch, window)
            candidates = np.concatenate([np.arange(bounds[shard], bounds[shard + 1]) for shard in shards])
            try:
                return candidates, sampler_of(candidates)
            except ValueError as error:
                raise ValueError(f"{error}, or give a larger --shard_window: mismatched audio is of the same "
                                 "window") from None
        self._of_window = lru_cache(maxsize=4)(of_window)

    def __call__(self, positions: np.ndarray, groups: np.ndarray, genres: np.ndarray) -> np.ndarray:
        """Positions ``[n]`` among the rows with audio, for the positions ``[n]`` of the stream with their albums and
        genres."""
        rows = np.empty(len(positions), np.int64)
        for epoch, window, here in self.order.parts(positions):
            candidates, sampler = self._of_window(epoch, window)
            rows[here] = candidates[sampler(positions[here], groups[here], genres[here])]
        return rows
