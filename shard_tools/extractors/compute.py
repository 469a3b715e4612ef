"""One piece of the work of ``features``: tracks in; a vector of each beside the others, and a line a bad file, out."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shard_tools.core.errors import BadFileError
from shard_tools.core.quarantine import Drop
from shard_tools.dataset.images import COVER_BYTES
from shard_tools.dataset.layout import AUDIO_SUFFIXES, COVERS, read_name
from shard_tools.dataset.source import Entry, read_entry
from shard_tools.dataset.vectors import VECTOR_BYTES, read_vector, vector_header, write_vector
from shard_tools.extractors import Extractor
from shard_tools.extractors.acousticbrainz import JSON_BYTES
from shard_tools.extractors.audio import duration, numbered, starts

FOLDER = ".features"  # of files under way, in the out folder
_UNWRITABLE = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ)

Make = Callable[[], tuple[np.ndarray, bytes | None]]  # a vector, and the JSON that is kept of it


class Item(NamedTuple):
    """One track.

    Attributes:
        name: where its vector goes, below the folder of vectors and without suffix.
        path: what quarantine calls it.
        files: its file; of vectors that of each source, None where one is absent.
        data: the bytes, or what is wrong with them, where there is no file.
        cover: its picture, where covers go beside the vectors.
    """

    name: str
    path: str
    files: tuple[Path | None, ...] = ()
    data: bytes | BadFileError | None = None
    cover: Path | None = None


class Options(NamedTuple):
    """What holds for every track.

    Attributes:
        make: gives the extractor; importable by name, for every process makes its own.
        out: folder for quarantine, and of work under way.
        vectors: folder of the vectors.
        excerpt: seconds to hear of an audio file at once, None = all of it.
        excerpts: at most so many.
        keep_json: keep what the extractor says of audio beside the vector.
    """

    make: Callable[[], Extractor]
    out: Path
    vectors: Path
    excerpt: float | None = None
    excerpts: int = 1
    keep_json: bool = False


class Task(NamedTuple):
    """Some tracks, and how far the source has been read with them (bytes of an archive, else tracks)."""

    items: list[Item]
    options: Options
    position: int


class Result(NamedTuple):
    """What became of a task.

    Attributes:
        written: vectors that were made.
        kept: vectors that were there already.
        links: (cover, where it goes below the folder of covers) of both.
        drops: bad files.
        position: of the task.
    """

    written: int
    kept: int
    links: list[tuple[Path, str]]
    drops: list[Drop]
    position: int


def compute(task: Task) -> Result:
    """Computes and writes what is not there yet.

    Raises:
        OSError: the disk is full, or the like.
        ValueError: what the extractor needs is not installed.
    """
    options, extractor = task.options, task.options.make()
    counts, links, drops = [0, 0], [], []
    for item in task.items:
        stage = "cover"
        try:
            kind = item.cover and _check_cover(item.cover)
            stage = "audio"
            parts = list(_parts(extractor, options, item))
        except BadFileError as error:
            drops.append(Drop(item.path, stage, error.reason, error.detail))
            continue
        problems = []
        for name, make in parts:
            target = options.vectors / f"{name}.npy"
            try:
                is_there = _is_there(options, target, len(extractor.schema.names))
                if not is_there:
                    _write(options, target, *make())
            except BadFileError as error:
                problems.append(error)
                continue
            counts[is_there] += 1
            if item.cover:
                links.append((item.cover, f"{name}.{kind}"))
        if len(problems) == len(parts):  # of several excerpts one may be silent where another is not
            drops.append(Drop(item.path, stage, problems[0].reason, problems[0].detail))
    return Result(*counts, links, drops, task.position)


def _parts(extractor: Extractor, options: Options, item: Item) -> Iterator[tuple[str, Make]]:
    """Yields (name, what makes it) of the vectors that a track is to have."""
    if isinstance(item.data, BadFileError):
        raise item.data
    if item.data is not None:
        yield item.name, lambda: (extractor.of_json(item.data), None)
        return
    path = item.files[0]
    if extractor.of_vectors:
        yield item.name, lambda: (extractor.of_vectors([_read_vector(file) for file in item.files]), None)
    elif path.suffix.lower() not in AUDIO_SUFFIXES:
        yield item.name, lambda: (extractor.of_json(read_entry(path.parent, Entry(path.name, -1, 0), JSON_BYTES)), None)
    elif options.excerpt is None:
        yield item.name, lambda: _hear(extractor, options, path, 0.0, None)
    else:
        for number, (start, seconds) in enumerate(starts(duration(path), options.excerpt, options.excerpts)):
            name = numbered(item.name, number) if options.excerpts > 1 else item.name
            yield name, lambda start=start, seconds=seconds: _hear(extractor, options, path, start, seconds)


def _hear(extractor: Extractor, options: Options, path: Path, start: float,
          seconds: float | None) -> tuple[np.ndarray, bytes | None]:
    if not options.keep_json:
        return extractor.of_audio(path, start, seconds), None
    data = extractor.json_of_audio(path, start, seconds)
    return extractor.of_json(data), data


def _read_vector(path: Path | None) -> np.ndarray | None:
    return None if path is None else read_vector(read_entry(path.parent, Entry(path.name, -1, 0), VECTOR_BYTES))


def _is_there(options: Options, target: Path, dimension: int) -> bool:
    with contextlib.suppress(OSError):
        whole = len(vector_header(dimension)) + 4 * dimension
        return target.stat().st_size == whole and (not options.keep_json or target.with_suffix(".json").is_file())
    return False


def _write(options: Options, target: Path, vector: np.ndarray, data: bytes | None) -> None:
    """Writes a vector, and its JSON before it, so that where a vector is nothing is missing.

    Not synced: what a crash of the machine leaves of a file is shorter, and is made again.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for path, content in ((target.with_suffix(".json"), data), (target, write_vector(vector))):
            if content is not None:
                # Not beside it: the name may be as long as can be. Other machines have processes of this number too.
                temporary = options.out / FOLDER / f"{os.uname().nodename}-{os.getpid()}"
                temporary.write_bytes(content)
                os.replace(temporary, path)
    except OSError as error:
        if error.errno not in _UNWRITABLE:  # the disk's fault, not the name's
            raise
        raise BadFileError("unwritable name", error.strerror) from None


def _check_cover(path: Path) -> str:
    """The suffix of a cover that can be read, without its dot."""
    kind = read_name(path.name)[1]
    if kind not in COVERS:
        raise BadFileError("not a cover", f"{path.name}: expected {', '.join(sorted(COVERS))}")
    read_entry(path.parent, Entry(path.name, -1, 0), COVER_BYTES)
    return kind
