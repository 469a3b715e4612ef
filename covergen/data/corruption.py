"""Corrupt samples: what takes the place of one in a batch, and when a run has met too many of them."""

from __future__ import annotations

import json
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

WARNINGS = 10  # corrupt samples that a process warns of one by one
JUDGED_AFTER = 1_000  # reads after which the share of failures counts, or those of one epoch where that is less
ATTEMPTS = 100  # samples in a row that may be corrupt before trying another makes no sense


class CorruptSample(ValueError):
    """A sample that can't be read: its shard, the byte where its cover lies, its key as far as known, and why."""

    def __init__(self, shard: str, offset: int | None, reason: str, key: str | None = None) -> None:
        self.line = json.dumps({"shard": shard, "offset": offset, "key": key, "reason": reason}) + "\n"
        where = "" if offset is None else f" at byte {offset}"
        super().__init__(f"{shard}: damaged sample{where}{f' ({key})' if key else ''}: {reason}")


Failures = dict[int, CorruptSample]  # by their slots in a batch


class CorruptionLog:
    """Counts and names the corrupt samples of a stream, and stops at too many; safe from many threads."""

    def __init__(self, limit: float, samples: int) -> None:
        """Args: limit: largest share of reads that may fail, 0 for none at all; samples: in an epoch."""
        self.limit, self.judged_after = limit, min(JUDGED_AFTER, samples)
        self.read, self.failed = 0, 0
        self.lines: set[str] = set()  # a line for each different sample that this process or the file knows
        self.latest: deque[str] = deque(maxlen=3)
        self.file: Path | None = None
        self.file_end = 0
        self.lock = threading.Lock()

    def list_in(self, file: Path) -> None:
        """From now on names corrupt samples in a file of JSON lines, which processes and resumed runs share."""
        with self.lock:
            known, self.lines, self.file = self.lines, set(), file
            self._append(known)

    def seen(self, count: int, failures: Iterable[CorruptSample] = ()) -> None:
        """Takes note of ``count`` reads, some of which failed; ValueError when too many did."""
        with self.lock:
            self.read += count
            for failure in failures:
                self.failed += 1
                if str(failure) not in self.latest:
                    self.latest.append(str(failure))
                if failure.line not in self.lines:
                    self._warn(failure)
                    self._append({failure.line})
            early = self.limit > 0 and self.read < self.judged_after
            if self.failed > self.limit * self.read and not early:
                raise ValueError(
                    f"{self.failed:,} of {self.read:,} samples read are damaged, above --max_corrupt {self.limit:g}; "
                    f"the last: {'; '.join(self.latest)}. shard_tools.verify --full names all; pack the "
                    "shards again, or go on without the damaged samples with a larger --max_corrupt")

    def total(self) -> int:
        """Different corrupt samples that all processes of the run have listed so far, or this one has met."""
        with self.lock:
            self._append(set())
            return len(self.lines)

    def _warn(self, failure: CorruptSample) -> None:
        if len(self.lines) < WARNINGS:
            warnings.warn(f"left out {failure}; the next sample takes its place", stacklevel=4)
        elif len(self.lines) == WARNINGS:
            warnings.warn(f"more than {WARNINGS} damaged samples: further ones are counted (data/corrupt in the log) "
                          f"and listed in {self.file or 'corrupt_samples.jsonl of the run'}", stacklevel=4)

    def _append(self, lines: set[str]) -> None:
        """Reads what was added to the file since the last time, and adds those lines that it lacks."""
        if self.file is not None and (lines or self.file.is_file()):
            with open(self.file, "a+") as file:
                file.seek(self.file_end)
                self.lines |= set(file)
                file.writelines(sorted(lines - self.lines))
                self.file_end = file.tell()
        self.lines |= lines


def replace_corrupt(rows: np.ndarray, load: Callable[[np.ndarray, np.ndarray], Failures],
                    following: Callable[[np.ndarray, np.ndarray], np.ndarray], log: CorruptionLog | None, *,
                    source: object) -> np.ndarray:
    """Rows ``[B]`` that all were loaded: those given, and for corrupt ones others, always the same.

    ``load(rows [n], slots [n])`` loads rows into slots and returns which slots failed, ``following(rows, slots)`` names
    the rows to load instead. Raises ValueError when too many are corrupt, without a ``log`` at the first.
    """
    rows, slots = rows.copy(), np.arange(len(rows))
    for _ in range(ATTEMPTS):
        failures = load(rows[slots], slots)
        if failures and log is None:
            raise ValueError(f"{source}/{next(iter(failures.values()))} (shard_tools.verify --full {source} names all)")
        if log is not None:
            log.seen(len(slots), failures.values())
        if not failures:
            return rows
        slots = np.array(sorted(failures))
        rows[slots] = following(rows[slots], slots)
    raise ValueError(f"{ATTEMPTS} samples in a row are damaged, the last: {next(iter(failures.values()))}; "
                     f"shard_tools.verify --full {source} names all")
