"""The leak check: samples of several splits and what their covers look like in; what one split has of another out.

A leak is a group (album) in two splits, the same cover in two, byte for byte, or two covers that look alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from shard_tools.core.errors import BadFileError
from shard_tools.core.files import hash64
from shard_tools.core.parallel import run_tasks
from shard_tools.dataset.images import COVER_BYTES
from shard_tools.dataset.source import Entry, read_entry
from shard_tools.shards.index import Index
from shard_tools.shards.tar import read_sample

NEAR = 4  # bits of 64 in which the dHashes of covers that look alike may differ
CHUNK, EXAMPLES = 256, 5


class SplitCovers(NamedTuple):
    """The distinct covers of ``N`` samples: ``which`` int64 ``[N]`` tells the place of each sample's among them,
    ``hashes`` uint64 ``[K]`` are of their bytes. ``prints`` ``[S]`` of ``fingerprints.PRINT`` tell what they look like,
    of those that can be decoded, whose places are ``sound`` int64 ``[S]``."""

    which: np.ndarray
    hashes: np.ndarray
    sound: np.ndarray
    prints: np.ndarray

    def name(self, place: int) -> str:
        """What a group is called that has nothing but a cover."""
        return f"cover:{int(self.hashes[place]):016x}"


class Leaks(NamedTuple):
    """Pairs of samples in different splits, int64 ``[P, 2]``: one pair for each group, cover, or pair of covers that
    look alike. ``lookalikes``: covers with close dHashes that are different pictures all the same; no leaks."""

    groups: np.ndarray
    covers: np.ndarray
    near: np.ndarray
    lookalikes: np.ndarray


class Files(NamedTuple):
    """Some covers of a source."""

    source: Path
    entries: list[Entry]


class Rows(NamedTuple):
    """Some samples of a shard, by rows of its index."""

    path: Path
    rows: np.ndarray


def hash_files(task: Files) -> list[int | tuple[str, str]]:
    """The hash of each file's bytes; or the reason and detail of why it can't be read."""
    found: list[int | tuple[str, str]] = []
    for entry in task.entries:
        try:
            found.append(hash64(read_entry(task.source, entry, COVER_BYTES)))
        except BadFileError as error:
            found.append((error.reason, error.detail))
    return found


def print_files(task: Files) -> list[tuple | None]:
    """What the covers of files look like, the fields of a ``PICTURE_DTYPE``; None for one that can't be decoded."""
    return [_look(lambda entry=entry: read_entry(task.source, entry, COVER_BYTES)) for entry in task.entries]


def print_rows(task: Rows) -> list[tuple | None]:
    """As ``print_files``, of samples."""
    with open(task.path, "rb") as file:
        return [_look(lambda row=row: read_sample(file, row)[1]) for row in task.rows]


def _look(read: Callable[[], bytes]) -> tuple | None:
    from shard_tools.curation.fingerprints import fingerprint  # here, for imagehash is needed by nothing else of verify

    try:
        return fingerprint(read())
    except BadFileError:  # packing will say so, and verify --full
        return None


def look_at_files(source: Path, entries: Sequence[Entry],
                  workers: int) -> tuple[SplitCovers, dict[int, tuple[str, str]]]:
    """The covers of a source, one entry a sample, those left out that can't be read: ``{place: (reason, detail)}``."""
    _check_packages()
    chunks = [Files(source, list(entries[i:i + CHUNK])) for i in range(0, len(entries), CHUNK)]
    found = [item for part in _run(hash_files, chunks, workers, "reading", len(entries)) for item in part]
    bad = {i: item for i, item in enumerate(found) if isinstance(item, tuple)}
    hashes = np.array([item for item in found if not isinstance(item, tuple)], np.uint64)
    distinct, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    readable = [entry for i, entry in enumerate(entries) if i not in bad]
    chosen = [readable[i] for i in first]
    chunks = [Files(source, chosen[i:i + CHUNK]) for i in range(0, len(chosen), CHUNK)]
    prints = [item for part in _run(print_files, chunks, workers, "looking", len(chosen)) for item in part]
    return _covers(which, distinct, prints), bad


def look_at_shards(indexes: Sequence[Index], workers: int) -> SplitCovers:
    """The covers of packed samples, by index and row."""
    _check_packages()
    hashes = np.concatenate([index.rows["cover_hash"] for index in indexes])
    distinct, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    tasks, places, start = [], [], 0
    for index in indexes:
        mine = np.sort(first[(first >= start) & (first < start + len(index.rows))])
        rows = np.array(index.rows[mine - start])
        for shard, path in enumerate(index.shards):
            here = rows["shard"] == shard
            if here.any():
                tasks.append(Rows(path, rows[here]))
                places += which[mine[here]].tolist()
        start += len(index.rows)
    found = [item for part in _run(print_rows, tasks, workers, "looking", len(first)) for item in part]
    by_place = dict(zip(places, found, strict=True))
    return _covers(which, distinct, [by_place[place] for place in range(len(first))])


def _covers(which: np.ndarray, hashes: np.ndarray, prints: Sequence[tuple | None]) -> SplitCovers:
    from shard_tools.curation.fingerprints import PICTURE_DTYPE

    sound = [place for place, item in enumerate(prints) if item]
    return SplitCovers(which, hashes, np.array(sound, np.int64), np.array([prints[place] for place in sound], PICTURE_DTYPE))


def _check_packages() -> None:
    try:
        import shard_tools.curation.fingerprints  # noqa: F401
    except ImportError as error:
        raise ValueError(f"to find covers that look alike a package is missing ({error}): pip install -e '.[dedup]'"
                         ) from None


def _run(function: Any, tasks: list[Any], workers: int, label: str, total: int) -> Iterator[Any]:
    with tqdm(total=total, desc=label, unit=" covers") as bar:
        for part in run_tasks(function, tasks, min(workers, len(tasks))):
            yield part
            bar.update(len(part))


def near_pairs(covers: SplitCovers, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of covers whose dHashes are at most ``distance`` bits apart, int64 ``[P, 2]`` each: of those that look
    alike, as shard_tools.dedup finds it, and of those that are different pictures all the same."""
    from shard_tools.curation.similarity import same_pictures

    alike, others = same_pictures(covers.prints, distance)
    return covers.sound[alike], covers.sound[others]


def find_leaks(splits: np.ndarray, groups: np.ndarray, covers: SplitCovers, near: np.ndarray,
               lookalikes: np.ndarray) -> Leaks:
    """What is in more than one split.

    Args:
        splits: int ``[N]``, of each sample.
        groups: int ``[N]``, the number of its group.
        covers: of the samples.
        near: int64 ``[P, 2]``, places of covers that look alike.
        lookalikes: int64 ``[P, 2]``, places of those that only seem so to dHash.
    """
    firsts = np.full((len(covers.hashes), int(splits.max()) + 1), -1)  # the first sample with each cover in each split
    order = np.arange(len(splits))[::-1]
    firsts[covers.which[order], splits[order]] = order
    return Leaks(_torn(splits, groups), _torn(splits, covers.which), _across(firsts, near), _across(firsts, lookalikes))


def _torn(splits: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """For each number that samples of two splits have, the first sample with it and the first in another split."""
    _, first, which = np.unique(numbers, return_index=True, return_inverse=True)
    other = np.flatnonzero(splits != splits[first[which]])
    _, places = np.unique(which[other], return_index=True)
    return np.stack([first[which[other[places]]], other[places]], 1)


def _across(firsts: np.ndarray, pairs: np.ndarray) -> np.ndarray:
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
    if len(leaks.lookalikes):
        print(f"            {len(leaks.lookalikes):,} pairs of covers have close dHashes, but are different pictures "
              "(flat ones, as a rule): no leaks")
    return 1 if len(leaks.groups) + len(leaks.covers) + len(leaks.near) else 0
