"""Writes samples into WebDataset tar shards, reads single ones again, and checks a shard against its index."""

from __future__ import annotations

import hashlib
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

from shard_tools.core.errors import BadFileError
from shard_tools.core.files import file_sha256, hash64
from shard_tools.dataset.images import COVER_BYTES, probe_cover
from shard_tools.dataset.vectors import VECTOR_BYTES, parse_vector

KEY = re.compile(r"[A-Za-z0-9_%~-]{1,96}", re.ASCII)
_PIECE = 2**20  # bytes that are written and hashed at once
_SWITCH_INTERVAL = 0.0002  # seconds a thread waits for Python's lock before it asks: writing needs it shortly, often
_PADDING = tuple(map(bytes, range(tarfile.BLOCKSIZE)))


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
    """The key, cover and vector (b"" = none) of one row, from its opened shard, or BadFileError."""
    at, size = int(row["cover_offset"]), int(row["cover_bytes"])
    if size > COVER_BYTES or row["audio_bytes"] > VECTOR_BYTES:
        raise BadFileError("damaged sample", f"{size:,} and {row['audio_bytes']:,} bytes are no cover and vector")
    key, cover = _read_member(file, at, size, ".jpg")
    audio_key, audio = key, b""
    if row["audio_bytes"]:
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
    """The key in the 512 bytes before a member's data at ``at``; BadFileError where packing writes others for data of
    that size and kind (``.jpg`` or ``.npy``)."""
    name = header[:100].rstrip(b"\0").decode("ascii", "replace")
    key = name.removesuffix(kind)
    if not KEY.fullmatch(key) or header != member_header(name, size) or key == name:
        raise BadFileError("damaged sample", f"{key!r}: no header of a {kind} at byte {at - tarfile.BLOCKSIZE:,}")
    return key


class TarWriter:
    """Writes samples as members whose headers hold nothing but name and size, and hashes what it writes.

    A second thread writes and hashes, which needs no Python lock, until ``finish`` or the end of its ``with``.

    Attributes:
        offset: bytes written or in hand.
        metadata: (hash of the cover as found, crc) of every sample that was added, when all is written.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.offset, self.hash = file, 0, hashlib.sha256()
        self.metadata: list[tuple[int, int]] = []
        self._parts: list[bytes] = []
        self._samples: list[tuple[bytes, bytes, bytes]] = []
        self._begun, self._error = 0, None
        self._pieces: queue.SimpleQueue[tuple[bytes, list] | None] = queue.SimpleQueue()
        self._free_pieces = threading.Semaphore(4)
        self._switch_interval = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL)
        self._thread = threading.Thread(target=self._write_pieces, daemon=True)
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

    def finish(self) -> None:
        """Ends the archive; returns when all is written."""
        self.add_bytes(bytes(2 * tarfile.BLOCKSIZE))
        self._hand_over(1)
        self.__exit__()
        if self._error:
            raise self._error

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._pieces.put(None)
            self._thread.join()
            sys.setswitchinterval(self._switch_interval)

    def _hand_over(self, least: int) -> None:
        if self.offset - self._begun < least:
            return
        if self._error:
            raise self._error
        self._free_pieces.acquire()
        self._pieces.put((b"".join(self._parts), self._samples))
        self._parts, self._samples, self._begun = [], [], self.offset

    def _write_pieces(self) -> None:
        while (item := self._pieces.get()) is not None:
            piece, samples = item
            try:
                if self._error is None:
                    self.file.write(piece)
                    self.hash.update(piece)
                    self.metadata += [(hash64(found), zlib.crc32(audio, zlib.crc32(cover)))
                                   for found, cover, audio in samples]
            except OSError as error:  # a full disk: raised where the samples come from
                self._error = error
            self._free_pieces.release()


@dataclass(frozen=True)
class ShardCheck:
    """One shard to check: what the index says of it, and with ``full`` the rows of its samples."""

    path: Path
    bytes: int
    sha256: str
    rows: np.ndarray | None
    resolution: int
    dimension: int


def check_shard(check: ShardCheck) -> list[str]:
    """The problems of one shard, each as a line that begins with its name."""
    name = check.path.name
    if not check.path.is_file():
        return [f"{name}: missing"]
    problems, size = [], check.path.stat().st_size
    if size != check.bytes:
        problems.append(f"{name}: {size:,} bytes, expected {check.bytes:,}")
    elif file_sha256(check.path) != check.sha256:
        problems.append(f"{name}: its SHA-256 is not the index's: damaged or changed")
    if check.rows is not None:
        problems += [f"{name}: {problem}" for problem in _sample_problems(check)]
    return problems


def _sample_problems(check: ShardCheck) -> list[str]:
    """Reads every sample at its offset and decodes it; what lies between samples must be nothing."""
    problems, at, keys = [], 0, set()
    with open(check.path, "rb") as file:
        for i, row in enumerate(check.rows):
            try:
                key, cover, audio = read_sample(file, row)
                extents = [(int(row["cover_offset"]), len(cover))]
                if audio:
                    extents.append((int(row["audio_offset"]), len(audio)))
                for start, length in extents:
                    if start != at + tarfile.BLOCKSIZE:
                        raise BadFileError("damaged sample", f"{key}: a gap or an overlap before it")
                    at = start + length + -length % tarfile.BLOCKSIZE
                if key in keys:
                    raise BadFileError("damaged sample", f"{key}: the key occurs twice")
                keys.add(key)
                try:
                    info = probe_cover(cover)
                    if not info.plain or (info.width, info.height) != (check.resolution, check.resolution):
                        raise BadFileError("wrong cover", "not a baseline RGB JPEG of "
                                                          f"{check.resolution} x {check.resolution}")
                    if audio and not np.isfinite(parse_vector(audio, check.dimension)).all():
                        raise BadFileError("not finite", "the vector holds NaN or infinity")
                except BadFileError as error:
                    raise BadFileError("damaged sample", f"{key}: {error}") from None
            except BadFileError as error:
                problems.append(f"sample {i}: {error.detail}")
                ends = (int(row[f"{part}_offset"]) + int(row[f"{part}_bytes"]) for part in ("cover", "audio"))
                at = max(at, *(end + -end % tarfile.BLOCKSIZE for end in ends))  # go on with the next
        file.seek(min(at, check.bytes))
        if file.read(2 * tarfile.BLOCKSIZE + 1) != bytes(2 * tarfile.BLOCKSIZE):
            problems.append("its end is not where the last sample ends")
    return problems
