"""Samples that can't be read: what was read and what failed in; a list for people, and a stop at too many, out."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

NAMED = 10  # damaged samples that a process warns of one by one
SOON = 1_000  # reads after which the share of failures is judged, or those of one pass where that is less
TRIES = 100  # samples in a row that may fail before a further one makes no sense


class CorruptSample(ValueError):
    """A sample that can't be read: its shard, the byte where its cover lies, its key as far as known, and why."""

    def __init__(self, shard: str, offset: int | None, reason: str, key: str | None = None) -> None:
        self.shard, self.offset, self.reason, self.key = shard, offset, reason, key
        where = "" if offset is None else f" at byte {offset}"
        super().__init__(f"{shard}: damaged sample{where}{f' ({key})' if key else ''}: {reason}")

    @property
    def name(self) -> tuple[str, int | None, str | None]:
        """The same for the same sample."""
        return self.shard, self.offset, self.key if self.offset is None else None

    def line(self) -> str:
        """As it stands in a list for people."""
        return json.dumps({"shard": self.shard, "offset": self.offset, "key": self.key, "reason": self.reason}) + "\n"


def is_corruption(error: Exception) -> bool:
    """Whether what reading and decoding raised is the sample's fault: bytes that are wrong or gone, or a bad disk.

    A network, a limit or a permission that fails is none: another time the sample would be sound.
    """
    kinds = (ValueError, RuntimeError, IndexError, OverflowError, FileNotFoundError)
    return isinstance(error, kinds) or (isinstance(error, OSError) and error.errno == errno.EIO)


class CorruptionLog:
    """The damaged samples of a stream, each of which is named once; safe from many threads.

    Attributes:
        damaged: different damaged samples that this process has met.
    """

    def __init__(self, limit: float, samples: int) -> None:
        """Args: limit: largest share of reads that may fail, 0 for none at all; samples: in one pass."""
        self.limit, self.soon = limit, min(SOON, samples)
        self.read, self.failed, self.file = 0, 0, None
        self.known: set[tuple] = set()
        self.unlisted: list[CorruptSample] = []
        self.last: deque[CorruptSample] = deque(maxlen=3)
        self.lock = threading.Lock()

    @property
    def damaged(self) -> int:
        return len(self.known)

    def keep(self, file: Path) -> None:
        """From now on damaged samples are listed in a file of JSON lines, which processes and runs may share."""
        with self.lock:
            self.file = file
            self._list()

    def seen(self, count: int, failures: Iterable[CorruptSample] = ()) -> None:
        """Takes note of ``count`` reads, some of which failed.

        Raises:
            ValueError: too many did.
        """
        with self.lock:
            self.read += count
            for failure in failures:
                self.failed += 1
                if failure.name not in self.known:
                    self._name(failure)
            self._list()
            early = self.limit > 0 and self.read < self.soon
            if self.failed > self.limit * self.read and not early:
                raise ValueError(
                    f"{self.failed:,} of {self.read:,} samples read are damaged, above --max_corrupt {self.limit:g}; "
                    f"the last: {'; '.join(map(str, self.last))}. shard_tools.verify --full names all; pack the shards "
                    "again, or go on without the damaged samples with a larger --max_corrupt")

    def total(self) -> int:
        """Different damaged samples that all processes of the run have listed so far, or this one has met."""
        try:
            return max(self.damaged, len(_names(self.file.read_text()))) if self.file else self.damaged
        except OSError:
            return self.damaged

    def _name(self, failure: CorruptSample) -> None:
        self.known.add(failure.name)
        self.unlisted.append(failure)
        self.last.append(failure)
        if self.damaged <= NAMED:
            warnings.warn(f"left out {failure}; another sample takes its place", stacklevel=3)
        elif self.damaged == NAMED + 1:
            warnings.warn(f"more than {NAMED} damaged samples: further ones are counted (data/corrupt in the log) and "
                          f"listed in {self.file or 'corrupt_samples.jsonl of the run'}", stacklevel=3)

    def _list(self) -> None:
        """Appends to the file what no process has listed there yet."""
        if self.file is None or not self.unlisted:
            return
        with open(self.file, "a+") as file:
            with contextlib.suppress(OSError):  # a file system without locks: two processes may list the same
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            there = _names(file.read())
            file.writelines(failure.line() for failure in self.unlisted if failure.name not in there)
        self.unlisted = []


def _names(text: str) -> set[tuple]:
    """What a list names; a line that a crash cut names nothing."""
    found = set()
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            found.add(CorruptSample(entry["shard"], entry["offset"], entry["reason"], entry["key"]).name)
    return found


def replace_corrupt(rows: np.ndarray, load: Callable[[np.ndarray, np.ndarray], dict[int, CorruptSample]],
                another: Callable[[np.ndarray, int], np.ndarray], damage: CorruptionLog) -> np.ndarray:
    """Rows ``[B]`` that all could be read: those given, with others in the places of damaged ones.

    Args:
        rows: to begin with.
        load: ``(rows [n], slots [n])`` reads rows into slots and tells which slots failed, and why.
        another: ``(slots [n], attempt)`` names other rows for slots; the same ones each time, so that batches stay the
            same however often they are made.
        damage: takes note.

    Raises:
        ValueError: too many are damaged.
    """
    rows, slots = rows.copy(), np.arange(len(rows))
    for attempt in range(1, TRIES + 1):
        failures = load(rows[slots], slots)
        damage.seen(len(slots), failures.values())
        if not failures:
            return rows
        slots = np.array(sorted(failures))
        rows[slots] = another(slots, attempt)
    raise ValueError(f"{TRIES} samples in a row are damaged, the last: {next(iter(failures.values()))}; "
                     "shard_tools.verify --full tells more")
