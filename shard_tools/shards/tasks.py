"""The tasks of packing, a shard each: writing it from the source in one pass, or from shards that were written before.

The order of samples hangs on their keys alone, so shards can be laid out before any file is read. Where a candidate
proves bad, ``repartition_shard`` makes the right ones of them, without reading the source again.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shard_tools.core.errors import BadFileError, SourceChangedError
from shard_tools.core.files import file_sha256, hash64, read_bounded
from shard_tools.core.quarantine import Drop, drop_lines
from shard_tools.dataset.images import fit_cover
from shard_tools.dataset.vectors import parse_vector
from shard_tools.shards.candidates import from_line, probe_sample
from shard_tools.shards.index import ROW
from shard_tools.shards.statistics import Blocks, Moments, Statistics
from shard_tools.shards.tar import TarWriter

# Of a candidate: state (one of the three below), size of its cover, dimension of its vector (0 = none).
CHECKED = np.dtype([("state", "u1"), ("width", "<u4"), ("height", "<u4"), ("dimension", "<u4")])
BAD, MISFIT, PACKED = range(3)  # MISFIT: valid, but not of the expected format, and so not in the shard
_RESULT_BYTES = 2**29  # of a shard of a million samples, all of them dropped with a reason


@dataclass(frozen=True)
class ShardResult:
    """What the index needs to know of a finished shard.

    Attributes:
        rows: ``[n]`` of ``ROW``.
        album: ``[n]`` bool, whether a row's group is of an album key; else it is of the cover's hash.
        bytes, sha256: of the tar.
        moments: statistics of the audio, empty ones where there is none.
        checked: ``[m]`` of ``CHECKED``, of every candidate of the shard; none of a shard that was made of others.
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
    # No other process has it, of this machine or another: a killed run's worker may still be writing.
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


def is_done(result_path: Path, *paths: Path) -> bool:
    """Whether an earlier run left a result, and at one of these paths the shard that it speaks of."""
    try:
        result = read_result(result_path)
    except SourceChangedError:  # none yet, or half of one, of a machine that crashed
        return False
    return any(path.is_file() and path.stat().st_size == result.bytes and file_sha256(path) == result.sha256
               for path in paths)


@dataclass(frozen=True)
class SampleFormat:
    """What samples are taken to be: covers of ``resolution``, unless ``resize`` brings all to it, and vectors of
    ``dimension``, 0 = there are none."""

    resolution: int
    resize: bool
    dimension: int


@dataclass(frozen=True)
class WriteTask:
    """One shard to be: candidates ``start`` to ``stop`` of ``work/order.npy``, into ``work/name``, from where an
    earlier run may have moved it to ``out``."""

    work: Path
    source: Path
    out: Path
    name: str
    number: int
    start: int
    stop: int
    genres: tuple[str, ...]
    max_pixels: int
    expected: SampleFormat
    blocks: Blocks

    @property
    def shard_path(self) -> Path:
        return self.work / self.name

    @property
    def result_path(self) -> Path:
        return self.work / f"written-{self.name}-{self.expected.resolution}-{self.expected.dimension}.npz"


def write_shard(task: WriteTask) -> int:
    """Writes one shard and, after it, its result, unless that was done before; returns the number of candidates.

    SourceChangedError for a file that is not of the size that it was listed with.
    """
    if is_done(task.result_path, task.shard_path, task.out / task.name):
        return task.stop - task.start
    expected, genres = task.expected, {name: number for number, name in enumerate(task.genres)}
    statistics = Statistics(expected.dimension, task.blocks)
    rows, albums, drops = [], [], []
    checked = np.zeros(task.stop - task.start, CHECKED)
    with _new_shard(task.shard_path) as tar:
        for i, candidate in enumerate(map(from_line, read_lines(task.work, task.start, task.stop))):
            sample = probe_sample(task.source, candidate, task.max_pixels, drops)
            if sample is None:
                continue
            dimension, cover = 0 if sample.vector is None else len(sample.vector), sample.cover
            fits = sample.width == sample.height == expected.resolution
            packed = dimension == expected.dimension and (fits or expected.resize)
            try:
                if packed and not (fits and sample.plain):
                    cover = fit_cover(cover, expected.resolution, task.max_pixels)
            except BadFileError as error:  # markers that were right, of a picture that is not
                drops.append(Drop(candidate.cover.path, "cover", error.reason, error.detail))
                continue
            checked[i] = (PACKED if packed else MISFIT, sample.width, sample.height, dimension)
            if not packed:
                continue
            if dimension:
                statistics.add(sample.vector)
            cover_at, audio_at = tar.add(candidate.key, cover, sample.audio, sample.cover)
            group = hash64(candidate.album.encode()) >> 1 if candidate.album else 0
            albums.append(bool(candidate.album))
            rows.append((task.number, cover_at, len(cover), audio_at, len(sample.audio), genres[candidate.genre],
                         group, 0, 0))
    rows, albums, metadata = np.array(rows, ROW), np.array(albums, bool), np.array(tar.metadata, "<u8").reshape(-1, 2)
    rows["cover_hash"], rows["crc"] = metadata.T
    rows["group"] = np.where(albums, rows["group"], (rows["cover_hash"] >> np.uint64(1)).astype(np.int64))
    write_result(task.result_path, ShardResult(rows, albums, tar.offset, tar.hash.hexdigest(), statistics.finish(),
                                               checked, drop_lines(drops)))
    return task.stop - task.start


@contextmanager
def _new_shard(path: Path) -> Iterator[TarWriter]:
    """Writes a shard under a temporary name, and finishes and renames it when that went well."""
    temporary = path.with_name(temporary_name(path.name))
    with open(temporary, "wb", buffering=0) as file, TarWriter(file) as tar:
        yield tar
        tar.finish()
    os.replace(temporary, path)


def read_lines(work: Path, start: int, stop: int) -> list[bytes]:
    """The lines of candidates ``start`` to ``stop`` in the order of the samples."""
    offsets = np.load(work / "order.npy", mmap_mode="r", allow_pickle=False)[start:stop].tolist()
    with open(work / "candidates.jsonl", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
        return [lines[at:lines.find(b"\n", at)] for at in offsets]


@dataclass(frozen=True)
class SampleRange:
    """Samples ``start`` to ``stop`` of a shard that was written."""

    shard_path: Path
    result_path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class RepartitionTask:
    """One shard, ``out/name``, and what it is made of."""

    work: Path
    out: Path
    name: str
    number: int
    ranges: tuple[SampleRange, ...]
    dimension: int
    blocks: Blocks

    @property
    def shard_path(self) -> Path:
        return self.out / self.name

    @property
    def result_path(self) -> Path:
        return self.work / f"repartitioned-{self.name}.npz"


def repartition_shard(task: RepartitionTask) -> int:
    """Writes one shard and, after it, its result, unless that was done before; returns the number of its samples.

    SourceChangedError where what was written before is not there any more.
    """
    count = sum(part.stop - part.start for part in task.ranges)
    if is_done(task.result_path, task.shard_path):
        return count
    statistics, rows, albums = Statistics(task.dimension, task.blocks), [], []
    try:
        with _new_shard(task.shard_path) as tar:
            for part in task.ranges:
                result = read_result(part.result_path)
                rows.append(result.rows[part.start:part.stop])
                albums.append(result.album[part.start:part.stop])
                _copy(part.shard_path, rows[-1], tar, statistics)
    except FileNotFoundError as error:
        raise SourceChangedError(f"{error.filename}, made before, is gone; run the command again") from None
    rows = np.concatenate(rows)
    rows["shard"] = task.number
    write_result(task.result_path, ShardResult(rows, np.concatenate(albums), tar.offset, tar.hash.hexdigest(),
                                               statistics.finish(), np.empty(0, CHECKED)))
    return count


def _copy(shard: Path, rows: np.ndarray, tar: TarWriter, statistics: Statistics) -> None:
    """Appends samples as they lie in a shard, and moves the offsets of their rows with them."""
    vectors_at = rows["audio_offset"].astype(np.int64)
    begins = rows["cover_offset"].astype(np.int64) - 512
    lengths = np.where(vectors_at > 0, vectors_at + rows["audio_bytes"], begins + 512 + rows["cover_bytes"])
    lengths = (lengths + 511) // 512 * 512 - begins
    with open(shard, "rb", buffering=0) as file:
        columns = (begins, lengths, rows["cover_bytes"], vectors_at, rows["audio_bytes"], rows["crc"])
        for i, (begin, length, cover_bytes, audio_at, audio_bytes, crc) in enumerate(
                zip(*(part.tolist() for part in columns), strict=True)):
            data = os.pread(file.fileno(), length, begin)
            cover, audio = data[512:512 + cover_bytes], data[audio_at - begin:][:audio_bytes] if audio_at else b""
            if len(data) != length or zlib.crc32(audio, zlib.crc32(cover)) != crc:
                raise SourceChangedError(f"{shard}, made before, is damaged; run the command again")
            rows["cover_offset"][i] = tar.offset + 512
            if audio_at:
                rows["audio_offset"][i] = tar.offset + audio_at - begin
                statistics.add(parse_vector(audio, statistics.buffer.shape[1]))
            tar.add_bytes(data)
