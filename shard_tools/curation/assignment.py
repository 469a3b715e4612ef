"""Which split a group goes to: ratios that fit every genre, from a keyed hash of each group; and ``splits.csv``.

A group's position in [0, 1) is a keyed hash of (seed, group), and thresholds (0.8 and 0.9) make a split of it. That
alone is not enough: hashes are as good as coin throws, so 50 groups would be off by 4 percentage points as a rule. And
any rule that knows the whole set, and so can be exact, may move an old group when another is added: were none ever
moved whatever is added, in whatever order, a group's split would depend on nothing but itself, and be such a hash. So
the groups nearest the thresholds are moved, only where ratios are off and only as many as it takes, and ``splits.csv``
remembers: what an earlier run has assigned stays where it is, and what is new fills what is short.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from shard_tools.core.files import GROUPS_BYTES, read_bounded, write_atomically
from shard_tools.core.tables import parse_table, table_bytes
from shard_tools.dataset.layout import SPLITS

FILE = "splits.csv"
COLUMNS = ("group", "split", "rule")
TOLERANCE = 0.005  # a ratio may be off by so much before a group is moved for it
MAX_MOVES = 60  # that don't help by themselves and are tried all the same
FEW_GROUPS = 50  # of a genre; where there are fewer, several genres make up for each other's rounding


class Component(NamedTuple):
    """Groups that must stay in one split: their names, and how many of them are in each genre."""

    groups: tuple[str, ...]
    genres: dict[str, int]


class Assignment(NamedTuple):
    """The split of every component."""

    splits: list[str]
    small: dict[str, int]  # the genres with too few components to split, and how many they have
    reassigned: list[str]  # groups that had to leave their split, because a new one binds them to groups of another


def position(group: str, seed: int) -> float:
    """A group's position in [0, 1), the same for ever."""
    digest = hashlib.blake2b(group.encode("utf-8", "surrogateescape"), digest_size=8, key=str(seed).encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def assign(components: Sequence[Component], ratios: Sequence[float], seed: int, min_groups: int,
           known: Mapping[str, str]) -> Assignment:
    """Splits components so that each genre's groups come as near to the ratios as whole groups can.

    The order of the components doesn't matter, and the ratios of train, val and test add up to 1. A genre of fewer
    components than ``min_groups`` stays in train, with all that have a part in it. ``known`` is ``{group: split}`` of
    an earlier run.
    """
    sizes = Counter(genre for component in components for genre in component.genres)
    small = {genre: size for genre, size in sorted(sizes.items()) if size < min_groups}
    splits, free, moved = [0] * len(components), [], []
    positions = [position(min(component.groups), seed) for component in components]
    edges = [0.0, *accumulate(ratios)]
    for i in sorted(range(len(components)), key=lambda i: min(components[i].groups)):
        groups = components[i].groups
        before = Counter(SPLITS.index(known[group]) for group in groups if group in known)
        if before:
            splits[i] = max(before, key=lambda split: (before[split], -split))
            moved += [group for group in groups if known.get(group, SPLITS[splits[i]]) != SPLITS[splits[i]]]
        elif not small.keys() & components[i].genres:
            splits[i] = bisect_right(edges[1:-1], positions[i])
            free.append(i)
    genres = [genre for genre in sorted(sizes) if genre not in small]
    _Balance(components, ratios, splits, edges, positions, genres).improve(free)
    return Assignment([SPLITS[split] for split in splits], small, sorted(moved))


class _Balance:
    """How many groups each genre has in each split, and how many it may have."""

    def __init__(self, components: Sequence[Component], ratios: Sequence[float], splits: list[int],
                 edges: list[float], positions: list[float], genres: list[str]):
        self.components, self.splits, self.edges = components, splits, edges
        self.positions, self.genres = positions, genres
        self.counts = {genre: [0, 0, 0] for genre in genres}
        for component, split in zip(components, splits, strict=True):
            for genre in self.counts.keys() & component.genres:
                self.counts[genre][split] += component.genres[genre]
        self.whole, self.allowed, short = {}, {}, [0.0] * len(ratios)
        for genre, counts in self.counts.items():
            total, slack = sum(counts), TOLERANCE * sum(counts)
            best = self.whole[genre] = round_counts(total, ratios, short if total < FEW_GROUPS else [0] * len(ratios))
            short = [before + ratio * total - count for before, ratio, count in zip(short, ratios, best, strict=True)]
            self.allowed[genre] = [(min(count, math.ceil(ratio * total - slack)),
                                    max(count, math.floor(ratio * total + slack)))
                                   for count, ratio in zip(best, ratios, strict=True)]

    def improve(self, free: list[int]) -> None:
        """Moves components, of ``free`` ones only, until no move brings the genres nearer to what they may have: one by
        one, or, where one of many groups is in the way, that one first and others for it."""
        of_genre = {genre: [i for i in free if genre in self.components[i].genres] for genre in self.genres}
        moved = True
        while moved:
            moved = False
            for genre in self.genres:
                while self._off(genre) and (self._step(genre, of_genre[genre]) or self._detour(genre, of_genre[genre])):
                    moved = True

    def _off(self, genre: str) -> int:
        """By how many groups a genre misses what it may have."""
        return sum(max(low - count, count - high, 0)
                   for count, (low, high) in zip(self.counts[genre], self.allowed[genre], strict=True))

    def _step(self, genre: str, free: list[int]) -> tuple[int, int, int] | None:
        """Makes the move that helps a genre most, of equals the one nearest to a threshold; None if none helps."""
        over = [count - whole for count, whole in zip(self.counts[genre], self.whole[genre], strict=True)]
        for move in sorted(self._moves(free), key=lambda move: over[move[2]] - over[move[1]]):
            genres = self.counts.keys() & self.components[move[0]].genres
            before = sum(map(self._off, genres))
            self._shift(*move)
            if sum(map(self._off, genres)) < before:
                return move
            self._shift(move[0], move[2], move[1])
        return None

    def _detour(self, genre: str, free: list[int]) -> bool:
        """Makes a move that does not help and then those of smaller components that do, if all is better in the end."""
        before = sum(map(self._off, self.genres))
        for move in self._moves(free)[:MAX_MOVES]:
            self._shift(*move)
            size, made = self.components[move[0]].genres[genre], [move]
            smaller = [i for i in free if self.components[i].genres[genre] < size]
            while self._off(genre) and (further := self._step(genre, smaller)):
                made.append(further)
            if sum(map(self._off, self.genres)) < before:
                return True
            for i, here, there in reversed(made):
                self._shift(i, there, here)
        return False

    def _moves(self, free: list[int]) -> list[tuple[int, int, int]]:
        """(component, from, to), by the distance from the threshold: the nearest of those with the same counts."""
        nearest: dict[Any, tuple[float, int, int, int]] = {}
        for i in free:
            here, position, counts = self.splits[i], self.positions[i], tuple(sorted(self.components[i].genres.items()))
            for there in {0, 1, 2} - {here}:
                far = max(self.edges[there] - position, position - self.edges[there + 1])
                known = nearest.get((counts, here, there))
                if known is None or far < known[0]:
                    nearest[counts, here, there] = (far, i, here, there)
        return [move[1:] for move in sorted(nearest.values())]

    def _shift(self, i: int, here: int, there: int) -> None:
        self.splits[i] = there
        for genre in self.counts.keys() & self.components[i].genres:
            self.counts[genre][here] -= self.components[i].genres[genre]
            self.counts[genre][there] += self.components[i].genres[genre]


def round_counts(total: int, ratios: Sequence[float], short: Sequence[float]) -> list[int]:
    """Whole numbers that add up to ``total`` and are less than 1 off the ratios; the largest remainders are rounded up,
    with what other genres have come ``short`` counted in."""
    exact = [ratio * total for ratio in ratios]
    counts = [math.floor(number + 1e-9) for number in exact]
    order = sorted(range(len(ratios)), key=lambda i: (round(counts[i] - exact[i] - short[i], 9), i))
    for i in order[:total - sum(counts)]:
        counts[i] += 1
    return counts


def write_splits(path: Path, splits: Mapping[str, str], rule: str) -> None:
    """Writes ``{group: split}`` whole or not at all."""
    write_atomically(path, table_bytes(COLUMNS, [(group, split, rule) for group, split in sorted(splits.items())]))


def read_splits(path: Path) -> tuple[dict[str, str], str]:
    """``{group: split}`` of a file, and the rule that it was made by."""
    try:
        rows = parse_table(read_bounded(path, GROUPS_BYTES), COLUMNS)
        if wrong := next((row for row in rows if row[1] not in SPLITS), None):
            raise ValueError(f"{wrong[1]!r} of {wrong[0]!r} is none of {', '.join(SPLITS)}")
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} can't be read as an earlier split ({error}); mend it, or delete it to begin "
                         "anew") from None
    return {group: split for group, split, _ in rows}, rows[-1][2] if rows else ""
