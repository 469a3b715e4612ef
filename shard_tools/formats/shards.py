"""Shards as bytes: samples in; a WebDataset tar with its hash, and the index rows that find them again, out."""

from __future__ import annotations

import hashlib
import io
import os
import queue
import re
import sys
import tarfile
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shard_tools.formats.blocks import Blocks, Moments
from shard_tools.formats.codec import COVER_BYTES, VECTOR_BYTES
from shard_tools.formats.index import file_sha256, hash64, read_bounded
from shard_tools.formats.source import BadFileError, SourceChangedError

KEY = re.compile(r"[A-Za-z0-9_%~-]{1,96}", re.ASCII)
_STATISTICS_BYTES = 2**21  # vectors are added to the statistics in lots of this many bytes of float64
_RESULT_BYTES = 2**29  # of a shard of a million samples, all of them dropped with a reason
_PIECE = 2**20  # bytes that are written and hashed at once
_PATIENCE = 0.0002  # seconds that a thread waits for Python's lock before it asks: writing needs it shortly, and often


def shard_name(split: str, number: int, total: int) -> str:
    return f"{split}-{number:05d}-of-{total:05d}.tar"


def member_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member's data: a regular file, mode 0644, owner 0, time 0.

    As ``tarfile.TarInfo.tobuf`` of the format USTAR, at a tenth of its time.
    """
    path, length = name.encode("ascii"), b"%011o" % size
    if len(path) > 100 or size >= 8**11:
        raise ValueError(f"{name!r} of {size:,} bytes does not fit into a tar header")
    return b"".join((path, bytes(100 - len(path)), _MODE, length, _TIME, b"%06o" % (_REST + sum(path) + sum(length)),
                     _TAIL))


_EMPTY = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_MODE, _TIME, _TAIL = _EMPTY[100:124], _EMPTY[135:148], _EMPTY[154:]
_REST = sum(_EMPTY[:124] + _EMPTY[135:148] + b" " * 8 + _EMPTY[156:])  # of the checksum, which counts itself as blanks


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
    """Writes samples as members whose headers hold nothing but name and size, and hashes what it writes.

    A second thread writes and hashes: neither needs Python's lock.

    Attributes:
        offset: bytes written or in hand.
        facts: (hash of the cover as found, crc) of every sample that was added, when all is written.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.offset, self.hash = file, 0, hashlib.sha256()
        self.facts: list[tuple[int, int]] = []
        self._parts: list[bytes] = []
        self._samples: list[tuple[bytes, bytes, bytes]] = []
        self._begun, self._error = 0, None
        self._pieces: queue.SimpleQueue[tuple[bytes, list] | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(4)
        self._patience = sys.getswitchinterval()
        sys.setswitchinterval(_PATIENCE)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def add(self, key: str, cover: bytes, audio: bytes, found: bytes) -> tuple[int, int]:
        """Appends a sample, whose cover was ``found`` so; returns the positions of its cover's and its vector's data
        (0 where it has none)."""
        self._samples.append((found, cover, audio))
        cover_at, audio_at, parts = self.offset + 512, 0, self._parts
        parts += (member_header(key + ".jpg", len(cover)), cover, _PADDING[-len(cover) % 512])
        self.offset = cover_at + -(-len(cover) // 512) * 512
        if audio:
            audio_at = self.offset + 512
            parts += (member_header(key + ".npy", len(audio)), audio, _PADDING[-len(audio) % 512])
            self.offset = audio_at + -(-len(audio) // 512) * 512
        self._hand_over(_PIECE)
        return cover_at, audio_at

    def add_bytes(self, data: bytes) -> None:
        """Appends whole members as they are."""
        self._parts.append(data)
        self.offset += len(data)
        self._hand_over(_PIECE)

    def finish(self) -> str:
        """Ends the archive; returns its SHA-256 when all is written."""
        self.add_bytes(bytes(2 * tarfile.BLOCKSIZE))
        self._hand_over(1)
        self.close()
        if self._error:
            raise self._error
        return self.hash.hexdigest()

    def close(self) -> None:
        self._pieces.put(None)
        self._thread.join()
        sys.setswitchinterval(self._patience)

    def _hand_over(self, least: int) -> None:
        if self.offset - self._begun < least:
            return
        if self._error:
            raise self._error
        self._room.acquire()
        self._pieces.put((b"".join(self._parts), self._samples))
        self._parts, self._samples, self._begun = [], [], self.offset

    def _work(self) -> None:
        while (work := self._pieces.get()) is not None:
            piece, samples = work
            try:
                if self._error is None:
                    self.file.write(piece)
                    self.hash.update(piece)
                    self.facts += [(hash64(found), zlib.crc32(audio, zlib.crc32(cover)))
                                   for found, cover, audio in samples]
            except OSError as error:  # a full disk: raised where the samples come from
                self._error = error
            self._room.release()


_PADDING = tuple(map(bytes, range(tarfile.BLOCKSIZE)))


class Statistics:
    """Moments of vectors that come one by one, added up in lots: the same lots give the same last bits."""

    def __init__(self, dimension: int, blocks: Blocks):
        self.moments, self.blocks, self.filled = Moments.empty(dimension), blocks, 0
        self.lot = np.empty((max(1, -(-_STATISTICS_BYTES // (8 * dimension))) if dimension else 0, dimension), "<f4")

    def add(self, vector: np.ndarray) -> None:
        self.lot[self.filled] = vector
        self.filled += 1
        if self.filled == len(self.lot):
            self._merge()

    def finish(self) -> Moments:
        if self.filled:
            self._merge()
        return self.moments

    def _merge(self) -> None:
        self.moments = self.moments.merge(Moments.of(self.lot[:self.filled], self.blocks))
        self.filled = 0


@dataclass(frozen=True)
class ShardResult:
    """What the index needs to know of a finished shard.

    Attributes:
        rows: ``[n]`` of ``ROW``.
        album: ``[n]`` bool, whether a row's group is of an album key; else it is of the cover's hash.
        bytes, sha256: of the tar.
        moments: statistics of the audio, empty ones where there is none.
        checked: ``[m]`` of ``CHECKED`` (formats.gather), of every candidate of the shard; none of a shard that was
            made of other shards.
        drops: bad files, JSON lines.
    """

    rows: np.ndarray
    album: np.ndarray
    bytes: int
    sha256: str
    moments: Moments
    checked: np.ndarray
    drops: bytes = b""


def temporary_name(name: str) -> str:
    """One that no other process has, of this machine or another: a killed run's worker may still be writing."""
    return f".{name}.{int.from_bytes(os.urandom(6))}.tmp"


def write_result(path: Path, result: ShardResult) -> None:
    parts, moments = io.BytesIO(), result.moments
    np.savez(parts, rows=result.rows, album=result.album, bytes=result.bytes, sha256=result.sha256,
             moments=np.stack([moments.count, moments.mean, moments.m2, moments.low, moments.high]),
             checked=result.checked, drops=np.frombuffer(result.drops, np.uint8))
    # Not synced: what a crash of the machine leaves of it is seen by its digest, and the shard is made again.
    temporary = path.with_name(temporary_name(path.name))
    temporary.write_bytes(_digest(path, parts.getvalue()) + parts.getvalue())
    os.replace(temporary, path)


def read_result(path: Path) -> ShardResult:
    """The result that ``write_result`` left under this name; SourceChangedError for anything else."""
    try:
        data = read_bounded(path, _RESULT_BYTES)
    except (OSError, ValueError) as error:
        raise SourceChangedError(f"{path}, made before, can't be read ({error}); run again") from None
    if data[:32] != _digest(path, data[32:]):
        raise SourceChangedError(f"{path}, made before, is damaged; run the command again")
    with np.load(io.BytesIO(data[32:]), allow_pickle=False) as parts:
        return ShardResult(parts["rows"], parts["album"], int(parts["bytes"]), str(parts["sha256"]),
                           Moments(*parts["moments"]), parts["checked"], parts["drops"].tobytes())


def _digest(path: Path, data: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + data).digest()


def is_done(result_path: Path, *places: Path) -> bool:
    """Whether an earlier run left a result, and in one of these places the shard that it speaks of."""
    try:
        result = read_result(result_path)
    except SourceChangedError:  # none yet, or half of one, of a machine that crashed
        return False
    return any(path.is_file() and path.stat().st_size == result.bytes and file_sha256(path) == result.sha256
               for path in places)
