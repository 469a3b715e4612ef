"""The cache of excerpts: what was extracted of each file of a library, and the extraction of what is missing.

An entry is found by the path, size and time of its file and by what extracted it: a library that has grown, or other
genres and covers, cost only the extraction of what is new.
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
    """An excerpt: its number in the track, its start and length in seconds, and its vector float32 ``[D]``."""

    number: int
    start: float
    seconds: float
    vector: np.ndarray


@dataclass(frozen=True)
class ExtractTask:
    """A file ``path`` of the library ``source``; ``extract`` gives its length and ``Excerpt``s for the file ``cache``.

    ``extract`` is importable by name, for other processes.
    """

    source: Path
    path: str
    extract: Callable[[Path], tuple[float, Sequence[tuple]]]
    cache: Path

    @property
    def begun(self) -> Path:
        return self.cache.with_suffix(".begun")


def cache_path(folder: Path, entry: Entry, *extraction: object) -> Path:
    """Where the excerpts of a file as it now is are kept; ``extraction`` says how they are made, as values of JSON."""
    digest = hashlib.sha256(json.dumps([entry.path, entry.size, entry.stamp, *extraction]).encode()).hexdigest()[:32]
    return folder / digest[:2] / f"{digest}.json"


def load(cache: Path) -> tuple[float, list[Excerpt]]:
    """The length of a track in seconds, and its excerpts.

    ValueError if they are not in the cache, or damaged.
    """
    try:
        seconds, lines, digest = json.loads(read_bounded(cache))
        if digest != _digest(cache, seconds, lines):
            raise ValueError("it is not what was written, or of another file")
        return float(seconds), [Excerpt(int(number), float(start), float(length),
                                        np.frombuffer(base64.b64decode(text, validate=True), "<f4"))
                                for number, start, length, text in lines]
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{cache} is damaged ({error}); delete it and run the command again") from None


def _digest(cache: Path, seconds: float, lines: list[list]) -> str:
    return hashlib.sha256(json.dumps([cache.stem, seconds, lines]).encode()).hexdigest()


def is_cached(cache: Path) -> bool:
    """Whether the excerpts of a file are in the cache and whole."""
    try:
        return bool(load(cache))
    except ValueError:
        return False


def extract_all(tasks: Sequence[ExtractTask], pool: Pool) -> Iterator[tuple[ExtractTask, BadFileError | None]]:
    """Extracts on several processes; yields each task once, with what was wrong with its file.

    A file at which a process dies (decoders do) is tried again alone; if that dies too, the file is bad. Where
    processes die, but not of a file, ``ChildProcessError`` passes.
    """
    waiting = list(tasks)
    while waiting:
        suspects = [task for task in waiting if task.begun.exists()]  # by a process that died, now or in an older run
        for task in suspects:
            try:
                yield task, next(pool.run(extract, [task], alone=True))
            except ChildProcessError:
                task.begun.unlink()
                yield task, BadFileError("crashes the decoder", "the process that decoded it died")
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
    """Puts the excerpts of a file into the cache, unless they are there; returns what is wrong with the file."""
    if is_cached(task.cache):
        return None
    task.cache.parent.mkdir(exist_ok=True)
    task.begun.touch()
    try:
        seconds, excerpts = task.extract(task.source / task.path)
        lines = [[*span, base64.b64encode(vector.astype("<f4").tobytes()).decode()] for *span, vector in excerpts]
        write_atomically(task.cache, json.dumps([seconds, lines, _digest(task.cache, seconds, lines)]).encode())
    except BadFileError as error:
        return error
    finally:
        task.begun.unlink()
    return None
