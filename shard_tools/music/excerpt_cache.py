"""What was heard of the files of a library: files to hear in; their vectors, kept file by file, or reasons out.

A file's memory is found by its path, size and time and by what heard it: a library that has grown, or other genres and
covers, cost only the hearing of what is new.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shard_tools.core.errors import BadFileError
from shard_tools.core.files import read_bounded, write_atomically
from shard_tools.core.parallel import Pool
from shard_tools.dataset.source import Entry


class Excerpt(NamedTuple):
    """An excerpt that was heard: its number in the track, where it starts and how long it is, in seconds, and its
    vector float32 ``[D]``."""

    number: int
    start: float
    seconds: float
    vector: np.ndarray


class ExtractedTrack(NamedTuple):
    """The length of a track in seconds, and the parts of it that were heard."""

    seconds: float
    parts: list[Excerpt]


@dataclass(frozen=True)
class ExtractTask:
    """A file of a library to hear: where it is, what hears it (importable by name), and where that is kept."""

    source: Path
    path: str
    listen: Callable[[Path], ExtractedTrack]
    memory: Path

    @property
    def begun(self) -> Path:
        return self.memory.with_suffix(".begun")


def cache_folder(folder: Path, entry: Entry, *metadata: object) -> Path:
    """Where to keep what is heard of a file as it now is; ``metadata`` say what hears it."""
    digest = hashlib.sha256(json.dumps([entry.path, entry.size, entry.stamp, *metadata]).encode()).hexdigest()[:32]
    return folder / digest[:2] / f"{digest}.json"


def load(memory: Path) -> ExtractedTrack:
    """What was heard of a file.

    Raises:
        ValueError: it is not kept, or damaged.
    """
    try:
        seconds, lines, *digest = json.loads(read_bounded(memory))
        if digest and digest != [_digest(memory, seconds, lines)]:  # older ones have none
            raise ValueError("it is not what was written, or of another file")
        return ExtractedTrack(float(seconds), [Excerpt(int(number), float(start), float(length),
                                           np.frombuffer(base64.b64decode(text, validate=True), "<f4"))
                                      for number, start, length, text in lines])
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{memory} is damaged ({error}); delete it and run the command again") from None


def _digest(memory: Path, seconds: float, lines: list[list]) -> str:
    return hashlib.sha256(json.dumps([memory.stem, seconds, lines]).encode()).hexdigest()


def is_cached(memory: Path) -> bool:
    """Whether what was heard of a file is there and whole."""
    try:
        return bool(load(memory))
    except ValueError:
        return False


def extract_all(tasks: Sequence[ExtractTask], pool: Pool) -> Iterator[tuple[ExtractTask, BadFileError | None]]:
    """Hears files on several processes; yields each task once, with what was wrong with its file.

    A file at which a process dies (decoders do) is heard again alone; if that dies too, the file is bad.

    Raises:
        ChildProcessError: processes die, but not of a file.
    """
    waiting = list(tasks)
    while waiting:
        suspects = [task for task in waiting if task.begun.exists()]  # by a process that died, now or in an older run
        for task in suspects:
            try:
                yield task, next(pool.run(extract, [task], alone=True))
            except ChildProcessError:
                task.begun.unlink()
                yield task, BadFileError("crashes the decoder", "the process that heard it died")
        apart = set(suspects)
        waiting = [task for task in waiting if task not in apart]
        done = 0
        try:
            for result in pool.run(extract, waiting):
                done += 1
                yield waiting[done - 1], result
        except ChildProcessError:
            if not any(task.begun.exists() for task in waiting[done:]):
                raise
        waiting = waiting[done:]


def extract(task: ExtractTask) -> BadFileError | None:
    """Hears a file and keeps that, unless it is kept already; returns what is wrong with the file."""
    if is_cached(task.memory):
        return None
    task.memory.parent.mkdir(exist_ok=True)
    task.begun.touch()
    try:
        seconds, parts = task.listen(task.source / task.path)
        lines = [[*metadata, base64.b64encode(vector.astype("<f4").tobytes()).decode()] for *metadata, vector in parts]
        write_atomically(task.memory, json.dumps([seconds, lines, _digest(task.memory, seconds, lines)]).encode())
    except BadFileError as error:
        return error
    finally:
        task.begun.unlink()
    return None
