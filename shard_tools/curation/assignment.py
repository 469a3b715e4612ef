"""Which split a group goes to: units of groups with what they count for in, a split for each out; and its memory.

A group's place in [0, 1) is a keyed hash of (seed, group), and thresholds (0.8 and 0.9) make a split of it. That alone
is not enough: hashes are as good as coin throws, so 50 groups would be off by 4 percentage points as a rule. And any
rule that sees the whole set, and so can be exact, may move an old group when another is added: were none ever moved
whatever is added, in whatever order, a group's split would depend on nothing but itself, and be such a hash. So the
groups nearest the thresholds are moved, only where ratios are off and only as many as it takes, and ``splits.csv``
remembers: what an earlier run has assigned stays where it is, and what is new fills what is short.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from shard_tools.core.files import GROUPS_BYTES, read_bounded, write_atomically
from shard_tools.dataset.layout import SPLITS

FILE = "splits.csv"
COLUMNS = ("group", "split", "rule")
TOLERANCE = 0.005  # a share may be off by so much before a group is moved for it
MOVES = 60  # that don't help by themselves, and are looked at
FEW = 50  # groups of a genre; where there are fewer, several genres make up for each other's rounding


class Unit(NamedTuple):
    """Groups that must not be torn apart: their names, and how many of them are in each genre."""

    groups: tuple[str, ...]
    genres: dict[str, int]


class Assignment(NamedTuple):
    """``splits``: one a unit; ``small``: the genres with too few units to share out, and how many they have; ``reassigned``:
    the groups that had to leave the split they were in, because a new one binds them to groups of another."""

    splits: list[str]
    small: dict[str, int]
    reassigned: list[str]


def position(group: str, seed: int) -> float:
    """A group's place in [0, 1), the same for ever."""
    digest = hashlib.blake2b(group.encode("utf-8", "surrogateescape"), digest_size=8, key=str(seed).encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def assign(units: Sequence[Unit], ratios: Sequence[float], seed: int, min_groups: int,
           known: Mapping[str, str]) -> Assignment:
    """Shares units out so that each genre's groups come as near to the ratios as whole groups can.

    Args:
        units: in an order that doesn't matter.
        ratios: of train, val and test, adding up to 1.
        seed: of the hash.
        min_groups: a genre of fewer units stays in train, with all units that have a part in it.
        known: ``{group: split}`` of an earlier run.
    """
    sizes = Counter(genre for unit in units for genre in unit.genres)
    small = {genre: size for genre, size in sorted(sizes.items()) if size < min_groups}
    order = sorted(range(len(units)), key=lambda i: min(units[i].groups))
    splits, free, torn = [0] * len(units), [], []
    places = [position(min(unit.groups), seed) for unit in units]
    edges = [0.0, *accumulate(ratios)]
    for i in order:
        before = Counter(SPLITS.index(known[group]) for group in units[i].groups if group in known)
        if before:
            splits[i] = max(before, key=lambda split: (before[split], -split))
            torn += [group for group in units[i].groups if known.get(group, SPLITS[splits[i]]) != SPLITS[splits[i]]]
        elif not small.keys() & units[i].genres:
            splits[i] = bisect_right(edges[1:-1], places[i])
            free.append(i)
    _Balance(units, ratios, splits, edges, places, [genre for genre in sorted(sizes) if genre not in small]).mend(free)
    return Assignment([SPLITS[split] for split in splits], small, sorted(torn))


class _Balance:
    """How many groups each genre has in each split, and how many it may have."""

    def __init__(self, units: Sequence[Unit], ratios: Sequence[float], splits: list[int], edges: list[float],
                 places: list[float], genres: list[str]):
        self.units, self.splits, self.edges, self.places, self.genres = units, splits, edges, places, genres
        self.counts = {genre: [0, 0, 0] for genre in genres}
        for unit, split in zip(units, splits, strict=True):
            for genre in self.counts.keys() & unit.genres:
                self.counts[genre][split] += unit.genres[genre]
        self.whole, self.allowed, short = {}, {}, [0.0] * len(ratios)
        for genre, counts in self.counts.items():
            total, slack = sum(counts), TOLERANCE * sum(counts)
            whole = self.whole[genre] = whole_numbers(total, ratios, short if total < FEW else [0.0] * len(ratios))
            short = [before + share * total - best for before, share, best in zip(short, ratios, whole, strict=True)]
            self.allowed[genre] = [(min(best, math.ceil(share * total - slack)),
                                    max(best, math.floor(share * total + slack)))
                                   for best, share in zip(whole, ratios, strict=True)]

    def mend(self, free: list[int]) -> None:
        """Moves units, of ``free`` ones only, until no move brings the genres nearer to what they may have: one by one,
        or, where a unit of many groups is in the way, that one first and others for it."""
        of_genre = {genre: [i for i in free if genre in self.units[i].genres] for genre in self.genres}
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
            genres = self.counts.keys() & self.units[move[0]].genres
            before = sum(map(self._off, genres))
            self._shift(*move)
            if sum(map(self._off, genres)) < before:
                return move
            self._undo(move)
        return None

    def _detour(self, genre: str, free: list[int]) -> bool:
        """Makes a move that does not help, and after it those of smaller units that do, if all is better in the end."""
        before = sum(map(self._off, self.genres))
        for move in self._moves(free)[:MOVES]:
            self._shift(*move)
            size, made = self.units[move[0]].genres[genre], [move]
            smaller = [i for i in free if self.units[i].genres[genre] < size]
            while self._off(genre) and (further := self._step(genre, smaller)):
                made.append(further)
            if sum(map(self._off, self.genres)) < before:
                return True
            for last in reversed(made):
                self._undo(last)
        return False

    def _moves(self, free: list[int]) -> list[tuple[int, int, int]]:
        """(unit, from, to), by how far the unit is from the threshold: the nearest of those that count alike."""
        nearest: dict[Any, tuple[float, int, int, int]] = {}
        for i in free:
            here, place, alike = self.splits[i], self.places[i], tuple(sorted(self.units[i].genres.items()))
            for there in range(3):
                if there != here:
                    far = max(self.edges[there] - place, place - self.edges[there + 1])
                    known = nearest.get((alike, here, there))
                    if known is None or far < known[0]:
                        nearest[alike, here, there] = (far, i, here, there)
        return [move[1:] for move in sorted(nearest.values())]

    def _shift(self, i: int, here: int, there: int) -> None:
        self.splits[i] = there
        for genre in self.counts.keys() & self.units[i].genres:
            self.counts[genre][here] -= self.units[i].genres[genre]
            self.counts[genre][there] += self.units[i].genres[genre]

    def _undo(self, move: tuple[int, int, int]) -> None:
        self._shift(move[0], move[2], move[1])


def whole_numbers(total: int, ratios: Sequence[float], short: Sequence[float]) -> list[int]:
    """Whole numbers that add up to ``total`` and are less than 1 off the ratios; the largest remainders are rounded up,
    with what has come ``short`` elsewhere counted in."""
    exact = [share * total for share in ratios]
    whole = [math.floor(number + 1e-9) for number in exact]
    for i in sorted(range(len(ratios)), key=lambda i: (round(whole[i] - exact[i] - short[i], 9), i)
                    )[:total - sum(whole)]:
        whole[i] += 1
    return whole


def rule_of(by: str, seed: int, ratios: Sequence[float]) -> str:
    """What must be the same for an earlier split to be gone on with."""
    return f"by {by}, seed {seed}, ratios {'/'.join(f'{100 * share:.6g}' for share in ratios)}"


def write_splits(path: Path, splits: Mapping[str, str], rule: str) -> None:
    """Writes ``{group: split}`` whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([group, split, rule] for group, split in sorted(splits.items()))
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))


def read_splits(path: Path) -> tuple[dict[str, str], str]:
    """``{group: split}`` of a file, and the rule that it was made by.

    Raises:
        ValueError: it can't be read.
    """
    try:
        rows = csv.reader(io.StringIO(read_bounded(path, GROUPS_BYTES).decode("utf-8", "surrogateescape"), newline=""))
        if tuple(next(rows, ())) != COLUMNS:
            raise ValueError(f"expected the columns {', '.join(COLUMNS)}")
        splits, rule = {}, ""
        for group, split, rule in rows:  # noqa: B007
            if split not in SPLITS:
                raise ValueError(f"line {rows.line_num}: {split!r} is none of {', '.join(SPLITS)}")
            splits[group] = split
    except (ValueError, OSError, csv.Error) as error:
        raise ValueError(f"{path} can't be read as an earlier split ({error}); mend it, or delete it to begin "
                         "anew") from None
    return splits, rule
