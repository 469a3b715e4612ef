"""Candidates for samples as lines of JSON, so that no process holds them all, and the check of one's files."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shard_tools.core.errors import BadFileError, SourceChangedError
from shard_tools.core.quarantine import Drop
from shard_tools.dataset.images import COVER_BYTES, probe_cover
from shard_tools.dataset.layout import Candidate
from shard_tools.dataset.source import Entry, read_entry
from shard_tools.dataset.vectors import VECTOR_BYTES, is_finite, read_vector, vector_header, vector_start, write_vector


class ProbedSample(NamedTuple):
    """A candidate whose files are valid.

    Attributes:
        cover: bytes as found.
        width, height: of the cover in pixels, upright.
        plain: the cover's bytes can stay as they are if its size is right.
        audio: as the bytes of a canonical ``.npy``, b"" = no vector.
        vector: its numbers, float32 ``[D]``.
    """

    cover: bytes
    width: int
    height: int
    plain: bool
    audio: bytes
    vector: np.ndarray | None


def to_line(candidate: Candidate) -> bytes:
    """A line of ASCII; an f-string, for ``json.dumps`` takes as long as reading the file."""
    split, genre, key, album, cover, audio = candidate
    vector = _entry_text(audio) if audio else "null"
    return f'["{split}",{quoted(genre)},"{key}",{quoted(album)},{_entry_text(cover)},{vector}]\n'.encode("ascii")


def _entry_text(entry: Entry) -> str:
    path, size, stamp, member = entry
    return f"[{quoted(path)},{size},{stamp},{list(member)}]"


def from_line(line: bytes) -> Candidate:
    split, genre, key, album, cover, audio = json.loads(line.decode("ascii"))
    return Candidate(split, genre, key, album, _entry(cover), _entry(audio) if audio else None)


def _entry(parts: list) -> Entry:
    path, size, stamp, member = parts
    return Entry(path, size, stamp, tuple(member))


def probe_sample(source: Path, candidate: Candidate, max_pixels: int, drops: list[Drop]) -> ProbedSample | None:
    """Reads the files of a candidate, each once, and checks them; None = one is bad, all that are go to the drops.

    Raises:
        SourceChangedError: a file is not of the size that it was listed with.
    """
    entry, audio_entry = candidate.cover, candidate.audio
    info, cover, audio, vector = None, b"", b"", None
    try:
        cover = _read(source, entry, COVER_BYTES)
        info = probe_cover(cover, max_pixels)
    except BadFileError as error:
        drops.append(Drop(entry.path, "cover", error.reason, error.detail))
    if audio_entry:  # read even when the cover is bad: every bad file is named in one run
        try:
            audio, vector = canonical(_read(source, audio_entry, VECTOR_BYTES))
        except BadFileError as error:
            drops.append(Drop(audio_entry.path, "audio", error.reason, error.detail))
    if info is None or (audio_entry and vector is None):
        return None
    return ProbedSample(cover, *info, audio, vector)


def canonical(data: bytes) -> tuple[bytes, np.ndarray]:
    """A ``.npy`` file as the bytes that we write, and its numbers; BadFileError as ``read_vector``."""
    start, dimension = vector_start(data)
    if start and len(data) == start + 4 * dimension:  # float32 already: the numbers stay where they are
        vector = np.frombuffer(data, "<f4", offset=start)
        if is_finite(vector):
            header = vector_header(dimension)
            return (data if data.startswith(header) else header + data[start:]), vector
    vector = read_vector(data)
    return write_vector(vector), vector


def _read(source: Path, entry: Entry, limit: int) -> bytes:
    data = read_entry(source, entry, limit)
    if entry.size not in (-1, len(data)):
        raise SourceChangedError(f"{entry.path} had {entry.size:,} bytes and now has {len(data):,}: it changed while "
                                 "it was packed; run again when nothing writes to --source")
    return data


@lru_cache(maxsize=4)
def _keyed(seed: int) -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=8, key=str(seed).encode())


def shuffle_key(seed: int, split: str, key: str) -> int:
    """64 bits by which the samples of a split are sorted: a shuffle that depends on the seed and the keys alone."""
    digest = _keyed(seed).copy()
    digest.update(f"{split}/{key}".encode())
    return int.from_bytes(digest.digest(), "big")
