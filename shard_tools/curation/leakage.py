"""The leak check: groups, covers and near-duplicates of covers that are in more than one split."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from shard_tools.curation.fingerprints import DistinctCovers
from shard_tools.curation.similarity import duplicates_by_hash

MAX_DISTANCE = 4  # bits of 64 in which the dHashes of near-duplicates may differ
EXAMPLES = 5


class Leaks(NamedTuple):
    """Pairs of samples in different splits, int64 ``[P, 2]``: one pair for each leak."""

    groups: np.ndarray
    covers: np.ndarray  # byte for byte
    near: np.ndarray  # near-duplicates
    collisions: np.ndarray  # covers whose dHashes are close, but which are different pictures; these are no leaks


def near_duplicates(covers: DistinctCovers, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of distinct covers whose dHashes are at most ``distance`` bits apart, int64 ``[P, 2]`` each:
    near-duplicates, as shard_tools.dedup finds them, and collisions. Covers that can't be decoded are in none."""
    decoded = np.flatnonzero(covers.fingerprints["decoded"])
    duplicates, collisions = duplicates_by_hash(covers.fingerprints[decoded], distance)
    return decoded[duplicates], decoded[collisions]


def find_leaks(splits: np.ndarray, groups: np.ndarray, covers: DistinctCovers, duplicates: np.ndarray,
               collisions: np.ndarray) -> Leaks:
    """What is in more than one split.

    ``splits`` and ``groups`` are the numbers of each sample's, int ``[N]``; ``duplicates`` and ``collisions`` are as of
    ``near_duplicates``.
    """
    firsts = np.full((len(covers.fingerprints), int(splits.max()) + 1), -1)  # the first sample by cover and split
    order = np.arange(len(splits))[::-1]
    firsts[covers.index[order], splits[order]] = order
    return Leaks(_in_two_splits(splits, groups), _in_two_splits(splits, covers.index),
                 _between_splits(firsts, duplicates), _between_splits(firsts, collisions))


def _in_two_splits(splits: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """For each number that samples of two splits have, the first sample with it and the first in another split."""
    _, first, which = np.unique(numbers, return_index=True, return_inverse=True)
    other = np.flatnonzero(splits != splits[first[which]])
    _, chosen = np.unique(which[other], return_index=True)
    return np.stack([first[which[other[chosen]]], other[chosen]], 1)


def _between_splits(firsts: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """For each pair of covers that are in different splits, a sample with the one and a sample with the other."""
    has = firsts >= 0
    pairs = pairs[(has[pairs[:, 0]] | has[pairs[:, 1]]).sum(1) > 1]
    one = has[pairs[:, 0]].argmax(1)  # the first split with the one cover; of the other the first that is not it
    others = has[pairs[:, 1]] & (np.arange(firsts.shape[1]) != one[:, None])
    one = np.where(others.any(1), one, firsts.shape[1] - 1 - has[pairs[:, 0], ::-1].argmax(1))
    other = np.where(others.any(1), others.argmax(1), has[pairs[:, 1]].argmax(1))
    found = np.stack([firsts[pairs[:, 0], one], firsts[pairs[:, 1], other]], 1)
    return np.unique(np.sort(found, axis=1), axis=0)


def show_leaks(leaks: Leaks, name_of: Callable[[int], str]) -> int:
    """Prints what was found with the first examples; returns the exit status, 1 if there is a leak."""
    for what, pairs in (("groups", leaks.groups), ("identical covers", leaks.covers), ("similar covers", leaks.near)):
        print(f"leak check: {len(pairs):,} {what} in more than one split")
        for one, other in pairs[:EXAMPLES].tolist():
            print(f"    {name_of(one)}  and  {name_of(other)}")
    if len(leaks.collisions):
        print(f"            {len(leaks.collisions):,} pairs of covers have close dHashes, but are different pictures "
              "(flat ones, as a rule): no leaks")
    return 1 if len(leaks.groups) + len(leaks.covers) + len(leaks.near) else 0
