"""In which order samples are seen: stream positions in, rows of the index out, without ever building a list of rows.

An epoch is a keyed permutation of ``range(size)``: a Feistel network over the next power of four, walked until it
lands inside. Position ``p`` of the endless stream is entry ``p % size`` of epoch ``p // size``, so any part of any
epoch is known at once, a resume needs one number, and an epoch has every row exactly once however it is cut.

Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains" (cycle walking, generalised Feistel).
"""

from __future__ import annotations

import hashlib
from itertools import zip_longest

import numpy as np
import torch

ROUNDS = 6
TRIES = 16  # draws of a partner of the same genre before any other will do


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


def permute(places: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where one epoch's permutation of ``range(size)`` sends each place; int64 in, int64 out, same shape."""
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    rounds = keys("order", seed, epoch)

    def encrypt(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & mask
        for key in rounds:
            left, right = right, left ^ (scramble(right + key) & mask)
        return (left << half) | right

    values = encrypt(places.astype(np.uint64))
    while (outside := values >= size).any():
        values[outside] = encrypt(values[outside])
    return values.astype(np.int64)


def of_albums(groups: np.ndarray, whose: str) -> np.ndarray:
    """The rows of the albums that are a judge's (a fixed quarter, by hash), a generator's (the others) or all.

    Args: groups: ``[N]`` album of every row; whose: ``judge``, ``generator`` or ``all``.
    """
    judged = scramble(scramble(groups.astype(np.uint64))) % np.uint64(4) == 0
    return np.flatnonzero({"judge": judged, "generator": ~judged, "all": np.ones(len(groups), bool)}[whose])


def share_of(batch_size: int, rank: int, ranks: int) -> range:
    """Which places of a global batch a rank reads: as many as the others, or one more or less."""
    return range(batch_size * rank // ranks, batch_size * (rank + 1) // ranks)


def varied(genres: np.ndarray, count: int) -> list[int]:
    """At most ``count`` rows, round by round one of every genre, from the genre ``[N]`` of all rows."""
    members = [np.flatnonzero(genres == genre)[:count].tolist() for genre in np.unique(genres)]
    return [row for rows in zip_longest(*members) for row in rows if row is not None][:count]


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
        """Args: groups: ``[N]`` album of every row; seed: of the whole order."""
        groups = torch.from_numpy(np.require(groups, requirements=["C", "W"]))
        ordered, self.members = (part.numpy() for part in torch.sort(groups, stable=True))  # a quarter of numpy's time
        self.starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        self.counts = np.diff(self.starts, append=len(groups))
        self.albums = SampleOrder(len(self.starts), seed)
        self.size, self.seed = len(self.starts), seed

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Rows ``[n]`` at the positions ``[n]`` of the endless stream."""
        albums = self.albums(positions)
        draws = scramble(scramble(positions.astype(np.uint64)) + keys("track", self.seed, count=1))
        return self.members[self.starts[albums] + (draws % self.counts[albums].astype(np.uint64)).astype(np.int64)]


class Partners:
    """For every place of the stream another row, always of another album, and every second one of the same genre."""

    def __init__(self, groups: np.ndarray, genres: np.ndarray, seed: int) -> None:
        """Args: groups, genres: ``[N]`` of the rows that may be partners; seed: of all draws.

        Raises:
            ValueError: they are all of one album.
        """
        if not len(groups) or (groups == groups[0]).all():
            raise ValueError("mismatched pairs need tracks of two albums or more; pack more albums")
        self.groups, self.genres, self.seed = groups, genres, seed
        self.members = np.argsort(genres, kind="stable")
        self.known, self.starts, self.counts = np.unique(genres[self.members], return_index=True, return_counts=True)

    def __call__(self, positions: np.ndarray, groups: np.ndarray, genres: np.ndarray) -> np.ndarray:
        """Rows ``[n]`` for the positions ``[n]`` of the endless stream, whose albums and genres are given.

        Where a genre has no other album (after some tries) the partner is of any genre.
        """
        rows = np.full(len(positions), -1, np.int64)
        draws = scramble(scramble(positions.astype(np.uint64)) + keys("partner", self.seed, count=1))
        genre = np.searchsorted(self.known, genres).clip(max=len(self.known) - 1)
        same = (positions % 2 == 0) & (self.known[genre] == genres)
        for attempt in range(2 * TRIES):
            draws = scramble(draws + np.uint64(attempt + 1))
            within = self.members[self.starts[genre] + (draws % self.counts[genre].astype(np.uint64)).astype(np.int64)]
            anywhere = (draws % np.uint64(len(self.groups))).astype(np.int64)
            drawn = np.where(same & (attempt < TRIES), within, anywhere)
            rows = np.where((rows < 0) & (self.groups[drawn] != groups), drawn, rows)
            if (rows >= 0).all():
                return rows
        for place in np.flatnonzero(rows < 0):  # one album is nearly everything
            rows[place] = np.flatnonzero(self.groups != groups[place])[0]
        return rows
