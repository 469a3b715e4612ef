"""Which shards are needed when: an index and a place in the stream in; rows in an order that keeps shards together out.

A large set of shards is not mixed as a whole: an epoch is a keyed permutation of the shards, cut into windows of some
shards each, and a keyed permutation of the samples of each window. So a machine needs a shard once an epoch, for a
short while, and every sample is still seen exactly once an epoch, as a pure function of (index, seed, position).
(Packing has shuffled the samples over all shards already, so any window is a fair sample of everything.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from covergen.runtime.order import GroupOrder, Partners, SampleOrder, keys, permute, scramble, seed_of

WHOLE_BYTES = 32 * 10**9  # shards of so many bytes together are mixed as a whole
WINDOW = 64  # shards that are mixed where there are more
LOOKED_AHEAD = 16_384  # samples of a whole that tell which shards are needed first


class Window(NamedTuple):
    """Part of the stream, from one position to before another, and the shards it needs, the first needed first."""

    start: int
    stop: int
    shards: list[int]


def shards_mixed(facts: dict[str, Any], window: int | None) -> int:
    """How many shards are mixed, 0 for all, from the facts of an index and what was asked for (None = the rule)."""
    if window is None:
        window = WINDOW if sum(shard["bytes"] for shard in facts["shards"]) > WHOLE_BYTES else 0
    return 0 if window >= len(facts["shards"]) else window


def first_rows(facts: dict[str, Any]) -> np.ndarray:
    """``[S + 1]``: the row at which each shard begins, and the number of rows."""
    return np.cumsum([0, *(shard["samples"] for shard in facts["shards"])])


def shard_bounds(facts: dict[str, Any], some: np.ndarray | None) -> np.ndarray:
    """``[S + 1]``: the place among some rows (ascending; None = all) at which each shard's begin, and their number."""
    return first_rows(facts) if some is None else np.searchsorted(some, first_rows(facts))


def make_order(facts: dict[str, Any], samples: int, some: np.ndarray | None, groups: np.ndarray | None, seed: int,
               window: int | None) -> SampleOrder | GroupOrder | WindowOrder:
    """The order of an index: positions of the stream in, places among the rows that are seen out.

    Args:
        facts: of the index.
        samples: how many rows are seen.
        some: which, ascending; None = all.
        groups: their albums, to see every album once an epoch; None to see every sample.
        seed: of the order.
        window: shards that are mixed, 0 = all, None = by the rule.
    """
    whole = SampleOrder(samples, seed) if groups is None else GroupOrder(groups, seed)
    count = shards_mixed(facts, window)
    return WindowOrder(whole, shard_bounds(facts, some), seed, count) if count else whole


class _Epoch(NamedTuple):
    """places: that are seen, ascending, None = all; bounds: ``[S + 1]`` where each shard's begin; shards: in the
    epoch's order, those without samples left out; ends: ``[W + 1]`` where each window begins."""

    places: np.ndarray | None
    bounds: np.ndarray
    shards: np.ndarray
    ends: np.ndarray


class WindowOrder:
    """Every sample (or album) once an epoch, shards in windows."""

    def __init__(self, whole: SampleOrder | GroupOrder, bounds: np.ndarray, seed: int, window: int) -> None:
        """Args:
            whole: the order without windows, which knows samples and albums.
            bounds: ``[S + 1]`` places where each shard's begin.
            seed: of the order.
            window: shards in a window.
        """
        self.whole, self.bounds, self.seed, self.shards, self.size = whole, bounds, seed, window, whole.size
        self._epoch = lru_cache(maxsize=3)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> _Epoch:
        places, bounds = None, self.bounds
        if isinstance(self.whole, GroupOrder):
            albums = self.whole
            draws = scramble(scramble(np.arange(self.size, dtype=np.uint64)) + keys("drawn", self.seed, epoch, count=1))
            drawn = (draws % albums.counts.astype(np.uint64)).astype(np.int64)
            places = np.sort(albums.members[albums.starts + drawn])
            bounds = np.searchsorted(places, bounds)
        count = len(bounds) - 1
        shards = permute(np.arange(count), count, seed_of("shards", self.seed), epoch)
        shards = shards[np.diff(bounds)[shards] > 0]
        starts = np.cumsum([0, *np.diff(bounds)[shards]])
        return _Epoch(places, bounds, shards, np.append(starts[:-1:self.shards], starts[-1]))

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Places ``[n]`` at the positions ``[n]`` of the endless stream."""
        found = np.empty(len(positions), np.int64)
        for epoch, window, here in self.parts(positions):
            about = self._epoch(epoch)
            shards, start = self._members(about, window), int(about.ends[window])
            sizes = np.diff(about.bounds)[shards]
            size = int(sizes.sum())
            inside = permute(positions[here] % self.size - start, size, seed_of("window", self.seed, epoch), window)
            before = np.cumsum([0, *sizes])
            shard = np.searchsorted(before, inside, side="right") - 1
            found[here] = about.bounds[shards[shard]] + inside - before[shard]
            if about.places is not None:
                found[here] = about.places[found[here]]
        return found

    def parts(self, positions: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
        """(epoch, window in it, mask of the positions that are there) of every window that the positions touch."""
        epochs, found = positions // self.size, []
        for epoch in np.unique(epochs).tolist():
            ends = self._epoch(epoch).ends
            windows = np.where(epochs == epoch, np.searchsorted(ends, positions % self.size, side="right") - 1, -1)
            found += [(epoch, window, windows == window) for window in np.unique(windows[windows >= 0]).tolist()]
        return found

    def shards_of(self, epoch: int, window: int) -> np.ndarray:
        """The shards of a window."""
        return self._members(self._epoch(epoch), window)

    def _members(self, about: _Epoch, window: int) -> np.ndarray:
        return about.shards[window * self.shards:(window + 1) * self.shards]

    def window(self, position: int) -> Window:
        """The window that a position is in."""
        epoch, window, _ = self.parts(np.array([position]))[0]
        start, stop = (epoch * self.size + int(end) for end in self._epoch(epoch).ends[window:window + 2])
        return Window(start, stop, self.shards_of(epoch, window).tolist())


def window_at(order: SampleOrder | GroupOrder | WindowOrder, some: np.ndarray | None, facts: dict[str, Any],
              position: int) -> Window:
    """The window that a position of the stream is in; without windows an epoch is one, with all its shards."""
    if isinstance(order, WindowOrder):
        return order.window(position)
    start = position // order.size * order.size
    bounds = first_rows(facts)
    ahead = order(np.arange(position, position + min(order.size, LOOKED_AHEAD)))
    seen = np.searchsorted(bounds, ahead if some is None else some[ahead], side="right") - 1
    first = seen[np.sort(np.unique(seen, return_index=True)[1])].tolist()
    used = np.flatnonzero(np.diff(shard_bounds(facts, some))).tolist()
    return Window(start, start + order.size, first + sorted(set(used).difference(first)))


class WindowPartners:
    """Mismatched audio from the same window of shards, see ``Partners``, as places among the audible rows."""

    def __init__(self, order: WindowOrder, bounds: np.ndarray, partners: Callable[[np.ndarray], Partners]) -> None:
        """Args:
            order: of the samples.
            bounds: ``[S + 1]`` places among the audible rows where each shard's begin.
            partners: that some of the audible rows, by their places, make.

        Raises:
            ValueError: there is nothing to be a partner.
        """
        if bounds[-1] == bounds[0]:
            raise ValueError("mismatched pairs need tracks with audio; pack some")
        self.order, self.bounds = order, bounds

        def of(epoch: int, window: int) -> tuple[np.ndarray, Partners]:
            shards = order.shards_of(epoch, window)
            places = np.concatenate([np.arange(bounds[shard], bounds[shard + 1]) for shard in shards])
            try:
                return places, partners(places)
            except ValueError as error:
                raise ValueError(f"{error}, or give a larger --shard_window: partners are of the same window") from None
        self._of = lru_cache(maxsize=4)(of)

    def __call__(self, positions: np.ndarray, groups: np.ndarray, genres: np.ndarray) -> np.ndarray:
        """Places ``[n]`` among the audible rows for the positions ``[n]``, whose albums and genres are given."""
        found = np.empty(len(positions), np.int64)
        for epoch, window, here in self.order.parts(positions):
            places, partners = self._of(epoch, window)
            found[here] = places[partners(positions[here], groups[here], genres[here])]
        return found
