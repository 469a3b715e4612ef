"""The first pass of packing: candidates in; a compact row for every sound one and a line for every bad file out.

Candidates wait in a file, one JSON line each, so that no process holds them all; a chunk of lines is a task.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shard_tools.formats.codec import COVER_BYTES, VECTOR_BYTES, probe_cover, read_vector
from shard_tools.formats.index import SPLITS, hash64, write_atomically
from shard_tools.formats.layout import Candidate, Drop
from shard_tools.formats.source import BadFileError, Entry, read_entry

CHUNK = 512
DIGEST = 32  # bytes at the end of a chunk's rows, of them and of its drops

# line, line_bytes: where the candidate's line lies. order: the seeded shuffle. dimension 0 = no vector.
# plain: the cover's bytes can stay as they are if its size is right. group: of the album key, or of the cover's hash
# where album is False.
SOUND = np.dtype([
    ("line", "<u8"), ("line_bytes", "<u4"), ("split", "u1"), ("genre", "<i2"), ("order", "<u8"), ("album", "?"),
    ("group", "<i8"), ("cover_hash", "<u8"), ("audio_hash", "<u8"), ("width", "<u4"), ("height", "<u4"), ("plain", "?"),
    ("dimension", "<u4"),
])


@dataclass(frozen=True)
class ProbeTask:
    """One chunk of candidates: ``count`` lines from byte ``start`` of ``work/candidates.jsonl``."""

    work: Path
    source: Path
    number: int
    start: int
    count: int
    genres: tuple[str, ...]
    seed: int
    max_pixels: int

    @property
    def rows_path(self) -> Path:
        return self.work / f"probe-{self.number:06d}.rows"

    @property
    def drops_path(self) -> Path:
        return self.work / f"probe-{self.number:06d}.jsonl"


def to_line(candidate: Candidate) -> bytes:
    return (json.dumps(candidate) + "\n").encode()


def from_line(line: bytes) -> Candidate:
    split, genre, key, album, cover, audio = json.loads(line)
    return Candidate(split, genre, key, album, _entry(cover), _entry(audio) if audio else None)


def _entry(parts: list) -> Entry:
    return Entry(*parts[:3], tuple(parts[3]))


def drop_lines(drops: Iterable[Drop]) -> bytes:
    """Drops as JSON lines; names that are no UTF-8 keep their bytes as escapes."""
    return "".join(json.dumps(drop._asdict()) + "\n" for drop in drops).encode()


def probe_chunk(task: ProbeTask) -> int:
    """Checks the candidates of a chunk and writes their rows and drops, unless that was done; returns their number."""
    if _is_probed(task):
        return task.count
    rows, drops = [], []
    with open(task.work / "candidates.jsonl", "rb") as file:
        file.seek(task.start)
        for at, line in _lines(file, task.count):
            row = _probe(task, from_line(line), drops)
            if row:
                rows.append((at, len(line), *row))
    listed, data = drop_lines(drops), np.array(rows, SOUND).tobytes()
    write_atomically(task.drops_path, listed)
    write_atomically(task.rows_path, data + _digest(task, data, listed))  # last: it says that the chunk is done
    return task.count


def read_rows(task: ProbeTask) -> np.ndarray:
    """The rows of a chunk that was checked, ``[n]`` of ``SOUND``."""
    return np.frombuffer(task.rows_path.read_bytes()[:-DIGEST], SOUND)


def _digest(task: ProbeTask, rows: bytes, drops: bytes) -> bytes:
    return hashlib.sha256(b"%d %d %b%b" % (task.number, len(rows), rows, drops)).digest()


def _is_probed(task: ProbeTask) -> bool:
    """Whether a chunk was checked before; notes of it that are damaged would lose samples, and are made again."""
    if not task.rows_path.is_file() or not task.drops_path.is_file():
        return False
    data = task.rows_path.read_bytes()
    return data[-DIGEST:] == _digest(task, data[:-DIGEST], task.drops_path.read_bytes())


def _lines(file: BinaryIO, count: int) -> Iterator[tuple[int, bytes]]:
    for _ in range(count):
        at = file.tell()
        yield at, file.readline()


def _probe(task: ProbeTask, candidate: Candidate, drops: list[Drop]) -> tuple | None:
    split, genre, key, album, cover, audio = candidate
    facts, dimension, cover_hash, audio_hash = None, 0, 0, 0
    try:
        data = read_entry(task.source, cover, COVER_BYTES)
        cover_hash, facts = hash64(data), probe_cover(data, task.max_pixels)
    except BadFileError as error:
        drops.append(Drop(cover.path, "cover", error.reason, error.detail))
    if audio:  # looked at even when the cover is bad: every bad file is named in one run
        try:
            data = read_entry(task.source, audio, VECTOR_BYTES)
            audio_hash, dimension = hash64(data), len(read_vector(data))
        except BadFileError as error:
            drops.append(Drop(audio.path, "audio", error.reason, error.detail))
    if facts is None or (audio and not dimension):
        return None
    group = (hash64(album.encode()) if album else cover_hash) >> 1
    return (SPLITS.index(split), task.genres.index(genre), shuffle_key(task.seed, split, key), bool(album), group,
            cover_hash, audio_hash, facts.width, facts.height, facts.plain, dimension)


def shuffle_key(seed: int, split: str, key: str) -> int:
    """64 bits by which the samples of a split are sorted: a shuffle that depends on the seed and the keys alone."""
    digest = hashlib.blake2b(f"{split}/{key}".encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big")
