"""The one pass over the source: candidates of a shard in; the shard, as if all were sound, and what they are, out.

The order of samples hangs on their keys alone, so shards can be laid out before any file is read. If every candidate
proves sound, they are the shards; if not, ``formats.recut`` makes the right ones of them, without another look at the
source.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shard_tools.formats.blocks import Blocks
from shard_tools.formats.codec import fit_cover
from shard_tools.formats.index import ROW, hash64
from shard_tools.formats.layout import Drop
from shard_tools.formats.probe import Sample, check_sample, drop_lines, from_line
from shard_tools.formats.shards import ShardResult, Statistics, TarWriter, is_done, temporary_name, write_result
from shard_tools.formats.source import BadFileError

# Of a candidate: state (one of the three below), size of its cover, dimension of its vector (0 = none).
CHECKED = np.dtype([("state", "u1"), ("width", "<u4"), ("height", "<u4"), ("dimension", "<u4")])
BAD, OTHER, TAKEN = range(3)  # OTHER: sound, but of another size than was expected, and so not in the shard


@dataclass(frozen=True)
class Expected:
    """What samples are taken to be: ``resolution`` is the only size of covers that is taken, unless ``resize`` brings
    all to it; ``dimension`` of the vectors, 0 = there are none."""

    resolution: int
    resize: bool
    dimension: int


@dataclass(frozen=True)
class GatherTask:
    """One shard to be: candidates ``start`` to ``stop`` of ``work/order.npy``, into ``work/name``.

    ``out`` is where the shard may have been moved to by an earlier run.
    """

    work: Path
    source: Path
    out: Path
    name: str
    number: int
    start: int
    stop: int
    genres: tuple[str, ...]
    max_pixels: int
    expected: Expected
    blocks: Blocks

    @property
    def shard_path(self) -> Path:
        return self.work / self.name

    @property
    def result_path(self) -> Path:
        return self.work / f"gathered-{self.name}-{self.expected.resolution}-{self.expected.dimension}.npz"


def gather_shard(task: GatherTask) -> int:
    """Writes one shard and, after it, its result, unless that was done before; returns the number of candidates.

    Raises:
        SourceChangedError: a file is not of the size that it was listed with.
    """
    if is_done(task.result_path, task.shard_path, task.out / task.name):
        return task.stop - task.start
    expected, genres = task.expected, {name: number for number, name in enumerate(task.genres)}
    statistics = Statistics(expected.dimension, task.blocks)
    rows, albums, drops = [], [], []
    checked = np.zeros(task.stop - task.start, CHECKED)
    temporary = task.work / temporary_name(task.name)
    with open(temporary, "wb", buffering=0) as file:
        tar = TarWriter(file)
        try:
            for i, candidate in enumerate(map(from_line, read_lines(task.work, task.start, task.stop))):
                sample = check_sample(task.source, candidate, task.max_pixels, drops)
                if sample is None:
                    continue
                dimension = 0 if sample.vector is None else len(sample.vector)
                try:
                    cover = _take(expected, sample, dimension, task.max_pixels)
                except BadFileError as error:  # markers that were right, of a picture that is not
                    drops.append(Drop(candidate.cover.path, "cover", error.reason, error.detail))
                    continue
                checked[i] = (OTHER if cover is None else TAKEN, sample.width, sample.height, dimension)
                if cover is None:
                    continue
                if dimension:
                    statistics.add(sample.vector)
                cover_at, audio_at = tar.add(candidate.key, cover, sample.audio, sample.cover)
                group = hash64(candidate.album.encode()) >> 1 if candidate.album else 0
                albums.append(bool(candidate.album))
                rows.append((task.number, cover_at, len(cover), audio_at, len(sample.audio), genres[candidate.genre],
                             group, 0, 0))
            sha256 = tar.finish()
        except BaseException:
            tar.close()
            raise
    os.replace(temporary, task.shard_path)
    rows, albums, facts = np.array(rows, ROW), np.array(albums, bool), np.array(tar.facts, "<u8").reshape(-1, 2)
    rows["cover_hash"], rows["crc"] = facts.T
    rows["group"] = np.where(albums, rows["group"], (rows["cover_hash"] >> np.uint64(1)).astype(np.int64))
    write_result(task.result_path, ShardResult(
        rows, albums, tar.offset, sha256, statistics.finish(), checked,
        drop_lines(drops)))
    return task.stop - task.start


def _take(expected: Expected, sample: Sample, dimension: int, max_pixels: int) -> bytes | None:
    """The cover as it is to be packed; None = the sample is not what is expected."""
    fits = sample.width == sample.height == expected.resolution
    if dimension != expected.dimension or not (fits or expected.resize):
        return None
    return sample.cover if fits and sample.plain else fit_cover(sample.cover, expected.resolution, max_pixels)


def read_lines(work: Path, start: int, stop: int) -> list[bytes]:
    """The lines of candidates ``start`` to ``stop`` in the order of the samples."""
    places = np.load(work / "order.npy", mmap_mode="r", allow_pickle=False)[start:stop].tolist()
    with open(work / "candidates.jsonl", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
        return [lines[at:lines.find(b"\n", at)] for at in places]


def wrong_size(task: GatherTask, at: int, width: int, height: int, resolution: int) -> Drop:
    """The drop of candidate ``at`` of a task, a cover of another size than most."""
    path = from_line(*read_lines(task.work, task.start + at, task.start + at + 1)).cover.path
    return Drop(path, "cover", "wrong cover size",
                f"{width} x {height}; most square covers are {resolution} x {resolution}; "
                f"--resolution {resolution} would crop and resize it")


def wrong_dimension(task: GatherTask, at: int, found: int, expected: str) -> Drop:
    """The drop of candidate ``at`` of a task, a vector of another dimension than ``expected`` says."""
    path = from_line(*read_lines(task.work, task.start + at, task.start + at + 1)).audio.path
    return Drop(path, "audio", "wrong vector size", f"{found} numbers, {expected}")
