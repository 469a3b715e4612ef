"""The second pass of packing: planned samples in; one WebDataset tar, its index rows and its audio statistics out."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shard_tools.formats.blocks import Blocks, Moments
from shard_tools.formats.codec import COVER_BYTES, VECTOR_BYTES, fit_cover, read_vector, write_vector
from shard_tools.formats.index import ROW, file_sha256, hash64, write_atomically
from shard_tools.formats.layout import Candidate
from shard_tools.formats.probe import from_line
from shard_tools.formats.source import BadFileError, Entry, read_entry

KEY = re.compile(r"[A-Za-z0-9_%~-]{1,96}", re.ASCII)
_STATISTICS_BYTES = 2**21  # vectors are added to the statistics in lots of this many bytes of float64


class SourceChangedError(ValueError):
    """The source is not what it was when it was checked: all that was learned of it is void."""


def shard_name(split: str, number: int, total: int) -> str:
    return f"{split}-{number:05d}-of-{total:05d}.tar"


@dataclass(frozen=True)
class ShardTask:
    """One shard: rows ``start`` to ``stop`` of ``work/plan.npy``, into ``out/name``.

    ``dimension`` 0 = samples have no vectors.
    """

    work: Path
    source: Path
    out: Path
    name: str
    number: int
    start: int
    stop: int
    resolution: int
    max_pixels: int
    dimension: int
    blocks: Blocks

    @property
    def result_path(self) -> Path:
        return self.work / f"{self.name}.npz"


@dataclass(frozen=True)
class ShardResult:
    """What the index needs to know of a finished shard: rows ``[n]`` of ``ROW``, size, SHA-256, audio statistics."""

    rows: np.ndarray
    bytes: int
    sha256: str
    moments: Moments | None


def member_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member's data: a regular file, mode 0644, owner 0, time 0."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def read_sample(file: BinaryIO, row: np.void) -> tuple[str, bytes, bytes]:
    """The key, cover and vector (b"" = none) of one row, from its opened shard.

    Raises:
        BadFileError: the shard does not hold there what the index says.
    """
    at, size = int(row["cover_offset"]), int(row["cover_bytes"])
    if size > COVER_BYTES or row["audio_bytes"] > VECTOR_BYTES:
        raise BadFileError("damaged sample", f"{size:,} and {row['audio_bytes']:,} bytes are no cover and vector")
    key, cover = _read_member(file, at, size, ".jpg")
    if not row["audio_bytes"]:
        audio_key, audio = key, b""
    else:
        audio_key, audio = _read_member(file, int(row["audio_offset"]), int(row["audio_bytes"]), ".npy")
    if audio_key != key:
        raise BadFileError("damaged sample", f"cover {key!r} and vector {audio_key!r} have different keys")
    if zlib.crc32(audio, zlib.crc32(cover)) != row["crc"]:
        raise BadFileError("damaged sample", f"{key}: its bytes are not those that were packed")
    return key, cover, audio


def _read_member(file: BinaryIO, at: int, size: int, kind: str) -> tuple[str, bytes]:
    if not tarfile.BLOCKSIZE <= at < os.fstat(file.fileno()).st_size:
        raise BadFileError("damaged sample", f"no member can begin at byte {at}")
    file.seek(at - tarfile.BLOCKSIZE)
    header, data = file.read(tarfile.BLOCKSIZE), file.read(size)
    key = header_key(header, at, size, kind)
    if len(data) != size:
        raise BadFileError("damaged sample", f"{key}: cut short")
    return key, data


def header_key(header: bytes, at: int, size: int, kind: str) -> str:
    """The key in a member's header of 512 bytes.

    Args:
        header: as it lies in the shard.
        at: where it ends and the member's data begins.
        size: of the data in bytes.
        kind: ``.jpg`` or ``.npy``.

    Raises:
        BadFileError: it is not what packing writes before data of that size and kind.
    """
    name = header[:100].rstrip(b"\0").decode("ascii", "replace")
    key = name.removesuffix(kind)
    if not KEY.fullmatch(key) or header != member_header(name, size) or key == name:
        raise BadFileError("damaged sample", f"{key!r}: no header of a {kind} at byte {at - tarfile.BLOCKSIZE:,}")
    return key


class TarWriter:
    """Writes members whose headers hold nothing but name and size, and hashes what it writes."""

    def __init__(self, file: BinaryIO):
        self.file, self.offset, self.hash = file, 0, hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Appends a regular file; returns the position of its data."""
        self._write(member_header(name, len(data)))
        start = self.offset
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return start

    def finish(self) -> None:
        self._write(bytes(2 * tarfile.BLOCKSIZE))

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.offset += len(data)


def pack_shard(task: ShardTask) -> int:
    """Writes one shard and, after it, its result, unless that was done before; returns the number of its samples.

    Raises:
        SourceChangedError: a file is not what it was when it was checked.
    """
    if _is_packed(task):
        return task.stop - task.start
    plan = np.load(task.work / "plan.npy", mmap_mode="r", allow_pickle=False)[task.start:task.stop]
    rows = np.zeros(len(plan), ROW)
    moments, lot = Moments.empty(task.dimension), []
    temporary = task.out / f".{task.name}.{os.getpid()}.tmp"  # whatever a killed run's worker may still be doing
    with open(task.work / "candidates.jsonl", "rb") as lines, open(temporary, "wb") as file:
        tar = TarWriter(file)
        for i, sound in enumerate(plan):
            lines.seek(int(sound["line"]))
            candidate = from_line(lines.read(int(sound["line_bytes"])))
            cover, vector = _read_sample(task, candidate, sound)
            cover_at, audio_at, audio = tar.add(f"{candidate.key}.jpg", cover), 0, b""
            if vector is not None:
                audio = write_vector(vector)
                audio_at = tar.add(f"{candidate.key}.npy", audio)
                lot.append(vector)
                if len(lot) * vector.size * 8 >= _STATISTICS_BYTES:
                    moments, lot = moments.merge(Moments.of(np.stack(lot), task.blocks)), []
            rows[i] = (task.number, cover_at, len(cover), audio_at, len(audio), sound["genre"], sound["group"],
                       sound["cover_hash"], zlib.crc32(audio, zlib.crc32(cover)))
        tar.finish()
        file.flush()
        os.fsync(file.fileno())
    if lot:
        moments = moments.merge(Moments.of(np.stack(lot), task.blocks))
    os.replace(temporary, task.out / task.name)
    result = io.BytesIO()
    np.savez(result, rows=rows, bytes=tar.offset, sha256=tar.hash.hexdigest(),
             moments=np.stack([moments.count, moments.mean, moments.m2, moments.low, moments.high]))
    write_atomically(task.result_path, result.getvalue())
    return len(plan)


def read_result(task: ShardTask) -> ShardResult:
    """The result that ``pack_shard`` left; ValueError if it is damaged."""
    try:
        with np.load(task.result_path, allow_pickle=False) as parts:
            moments = Moments(*parts["moments"]) if task.dimension else None
            result = ShardResult(parts["rows"], int(parts["bytes"]), str(parts["sha256"]), moments)
        if result.rows.dtype != ROW or len(result.rows) != task.stop - task.start:
            raise ValueError("not the rows of this shard")
        return result
    except Exception as error:  # the boundary to numpy and zipfile, which raise a dozen kinds
        raise ValueError(f"{task.result_path} is damaged ({error}); delete it and run the command again") from None


def _is_packed(task: ShardTask) -> bool:
    """Whether a shard and its result are there from before; what is damaged is made again."""
    try:
        result, path = task.result_path.is_file() and read_result(task), task.out / task.name
        return bool(result) and result.bytes == _size(path) and file_sha256(path) == result.sha256
    except (OSError, ValueError):
        return False


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _read_sample(task: ShardTask, candidate: Candidate, sound: np.void) -> tuple[bytes, np.ndarray | None]:
    cover = read_again(task.source, candidate.cover, COVER_BYTES, int(sound["cover_hash"]))
    if not (sound["plain"] and sound["width"] == sound["height"] == task.resolution):
        cover = fit_cover(cover, task.resolution, task.max_pixels)
    if not candidate.audio:
        return cover, None
    vector = read_vector(read_again(task.source, candidate.audio, VECTOR_BYTES, int(sound["audio_hash"])))
    assert len(vector) == task.dimension
    return cover, vector


def read_again(source: Path, entry: Entry, limit: int, expected: int) -> bytes:
    """The bytes of a file that was checked before, if their hash is still ``expected``.

    Raises:
        SourceChangedError: it is not, or the file can't be read any more.
    """
    try:
        data = read_entry(source, entry, limit)
    except BadFileError as error:
        raise SourceChangedError(f"{entry.path} can't be read any more ({error}); run the command again") from None
    if hash64(data) != expected:
        raise SourceChangedError(f"{entry.path} changed while it was packed; run again when nothing writes to --source")
    return data
