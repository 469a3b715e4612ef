"""Computes the vectors of some inputs: one task of ``features``, in any process."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shard_tools.core.errors import BadFileError
from shard_tools.core.quarantine import Drop
from shard_tools.dataset.images import COVER_BYTES
from shard_tools.dataset.layout import AUDIO_SUFFIXES, COVERS, read_name
from shard_tools.dataset.source import read_path
from shard_tools.dataset.vectors import VECTOR_BYTES, read_vector, vector_header, write_vector
from shard_tools.extractors import Extractor
from shard_tools.extractors.acousticbrainz import JSON_BYTES
from shard_tools.extractors.audio import duration, excerpt_spans, numbered

FOLDER = ".features"  # of files under way, in the out folder
_UNWRITABLE = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ)


class Input(NamedTuple):
    """What one vector is made of, or one for each excerpt."""

    name: str  # where its vector goes, below the folder of vectors and without suffix
    path: str  # what quarantine calls it
    files: tuple[Path | None, ...] = ()  # of vectors that of each source, None where one is absent
    data: bytes | None = None  # where there is no file
    error: BadFileError | None = None  # why it can't be used
    cover: Path | None = None  # where covers go beside the vectors
    position: int = 0  # bytes of an archive that are read with it; 0 = it is from none


class Options(NamedTuple):
    """What is the same for every input."""

    make: Callable[[], Extractor]  # importable by name, for every process makes its own
    out: Path  # folder for quarantine, and of work under way
    vectors: Path  # folder of the vectors
    excerpt: float | None = None  # length of an excerpt of an audio file in seconds, None = all of it
    excerpts: int = 1  # at most so many
    keep_json: bool = False  # write what the extractor computes of audio beside the vector


def compute(options: Options,
            task: tuple[Sequence[Input], int]) -> tuple[int, int, list[tuple[Path, str]], list[Drop], int]:
    """Computes and writes what is not there yet, of some inputs and how far the source has been read with them.

    Returns how many vectors were made and how many were there already, (cover, where it goes below the folder of
    covers) of both, the bad files, and how far the source has been read.
    """
    inputs, position = task
    extractor = options.make()
    counts, links, drops = [0, 0], [], []
    for item in inputs:
        stage = "cover"
        try:
            if item.cover:
                kind = read_name(item.cover.name)[1]
                if kind not in COVERS:
                    raise BadFileError("not a cover", f"{item.cover.name}: expected {', '.join(sorted(COVERS))}")
                read_path(item.cover, COVER_BYTES)
            stage = "audio"
            vectors = list(_vectors(extractor, options, item))
        except BadFileError as error:
            drops.append(Drop(item.path, stage, error.reason, error.detail))
            continue
        problems = []
        for name, make in vectors:
            target = options.vectors / f"{name}.npy"
            try:
                is_there = False
                with contextlib.suppress(OSError):
                    whole = len(vector_header(len(extractor.schema.names))) + 4 * len(extractor.schema.names)
                    is_there = target.stat().st_size == whole and (not options.keep_json
                                                                   or target.with_suffix(".json").is_file())
                if not is_there:
                    _write(options, target, *make())
            except BadFileError as error:
                problems.append(error)
                continue
            counts[is_there] += 1
            if item.cover:
                links.append((item.cover, f"{name}.{kind}"))
        if len(problems) == len(vectors):  # of several excerpts one may be silent where another is not
            drops.append(Drop(item.path, stage, problems[0].reason, problems[0].detail))
    return *counts, links, drops, position


def _vectors(extractor: Extractor, options: Options,
             item: Input) -> Iterator[tuple[str, Callable[[], tuple[np.ndarray, bytes | None]]]]:
    """Yields the name of each vector of an input, and what computes it and the JSON to write beside it."""
    if item.error:
        raise item.error
    path = item.files[0] if item.files else None
    if extractor.of_vectors:
        yield item.name, lambda: (extractor.of_vectors(
            [file and read_vector(read_path(file, VECTOR_BYTES)) for file in item.files]), None)
    elif path is None or path.suffix.lower() not in AUDIO_SUFFIXES:
        yield item.name, lambda: (extractor.of_json(read_path(path, JSON_BYTES) if path else item.data), None)
    elif options.excerpt is None:
        yield item.name, lambda: _of_audio(extractor, options, path, 0.0, None)
    else:
        for number, (start, seconds) in enumerate(excerpt_spans(duration(path), options.excerpt, options.excerpts)):
            name = numbered(item.name, number) if options.excerpts > 1 else item.name
            yield name, lambda start=start, seconds=seconds: _of_audio(extractor, options, path, start, seconds)


def _of_audio(extractor: Extractor, options: Options, path: Path, start: float,
              seconds: float | None) -> tuple[np.ndarray, bytes | None]:
    if not options.keep_json:
        return extractor.of_audio(path, start, seconds), None
    data = extractor.json_of_audio(path, start, seconds)
    return extractor.of_json(data), data


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
