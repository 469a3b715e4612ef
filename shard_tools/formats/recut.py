"""Where candidates proved bad: the shards that were gathered without them in; shards of the right sizes out.

All samples that are to stay lie in the gathered shards in their order, so a shard is made of a few ranges of bytes.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shard_tools.formats.blocks import Blocks
from shard_tools.formats.codec import parse_vector
from shard_tools.formats.gather import CHECKED
from shard_tools.formats.shards import (
    ShardResult,
    Statistics,
    TarWriter,
    is_done,
    read_result,
    temporary_name,
    write_result,
)
from shard_tools.formats.source import SourceChangedError


@dataclass(frozen=True)
class Stretch:
    """Samples ``start`` to ``stop`` of a gathered shard."""

    shard_path: Path
    result_path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class RecutTask:
    """One shard, ``out/name``, and what it is made of."""

    work: Path
    out: Path
    name: str
    number: int
    stretches: tuple[Stretch, ...]
    dimension: int
    blocks: Blocks

    @property
    def result_path(self) -> Path:
        return self.work / f"recut-{self.name}.npz"


def recut_shard(task: RecutTask) -> int:
    """Writes one shard and, after it, its result, unless that was done before; returns the number of its samples.

    Raises:
        SourceChangedError: what was gathered is not there any more.
    """
    count = sum(stretch.stop - stretch.start for stretch in task.stretches)
    if is_done(task.result_path, task.out / task.name):
        return count
    statistics, rows, albums = Statistics(task.dimension, task.blocks), [], []
    temporary = task.out / temporary_name(task.name)
    with open(temporary, "wb", buffering=0) as file:
        tar = TarWriter(file)
        try:
            for stretch in task.stretches:
                part = read_result(stretch.result_path)
                rows.append(part.rows[stretch.start:stretch.stop])
                albums.append(part.album[stretch.start:stretch.stop])
                _copy(stretch.shard_path, rows[-1], tar, statistics)
            sha256 = tar.finish()
        except FileNotFoundError as error:
            tar.close()
            raise SourceChangedError(f"{error.filename}, made before, is gone; run the command again") from None
        except BaseException:
            tar.close()
            raise
    os.replace(temporary, task.out / task.name)
    rows = np.concatenate(rows)
    rows["shard"] = task.number
    write_result(task.result_path, ShardResult(rows, np.concatenate(albums), tar.offset, sha256, statistics.finish(),
                                               np.empty(0, CHECKED)))
    return count


def _copy(shard: Path, rows: np.ndarray, tar: TarWriter, statistics: Statistics) -> None:
    """Appends samples as they lie in a shard, and moves the offsets of their rows with them."""
    vectors_at = rows["audio_offset"].astype(np.int64)
    begins = rows["cover_offset"].astype(np.int64) - 512
    lengths = np.where(vectors_at > 0, vectors_at + rows["audio_bytes"], begins + 512 + rows["cover_bytes"])
    lengths = (lengths + 511) // 512 * 512 - begins
    with open(shard, "rb", buffering=0) as file:
        places = (begins, lengths, rows["cover_bytes"], vectors_at, rows["audio_bytes"], rows["crc"])
        for i, (begin, length, cover_bytes, audio_at, audio_bytes, crc) in enumerate(
                zip(*(part.tolist() for part in places), strict=True)):
            data = os.pread(file.fileno(), length, begin)
            cover, audio = data[512:512 + cover_bytes], data[audio_at - begin:][:audio_bytes] if audio_at else b""
            if len(data) != length or zlib.crc32(audio, zlib.crc32(cover)) != crc:
                raise SourceChangedError(f"{shard}, made before, is damaged; run the command again")
            rows["cover_offset"][i] = tar.offset + 512
            if audio_at:
                rows["audio_offset"][i] = tar.offset + audio_at - begin
                statistics.add(parse_vector(audio, statistics.lot.shape[1]))
            tar.add_bytes(data)
