"""Decides over a data set as a whole: the format of its samples, which don't fit it, the blocks, and the shards."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np

from shard_tools.core.errors import BadFileError
from shard_tools.core.quarantine import Drop
from shard_tools.dataset.schema import FILE, Schema
from shard_tools.dataset.source import read_entry
from shard_tools.dataset.vectors import VECTOR_BYTES, canonical, parse_vector
from shard_tools.shards.candidates import from_line, probe_sample
from shard_tools.shards.statistics import Blocks, blocks_of_sizes, detect_blocks
from shard_tools.shards.tasks import (
    BAD,
    MISFIT,
    RepartitionTask,
    SampleFormat,
    SampleRange,
    WriteTask,
    read_lines,
    read_result,
)

MISFITS = 0.05  # share of vectors of a wrong size that is taken for damage, and not for another kind of vectors
SAMPLE_VECTORS, SAMPLE_BYTES = 4096, 2**25  # blocks are detected on so many vectors at most
_PROBED = 64  # samples from which it is guessed what most are


@dataclass
class Survey:
    """What the candidates proved to be: counts of square covers by side, of vectors by dimension, of valid samples, of
    those that were packed by split, whether these are all, and the bad files."""

    sides: Counter = field(default_factory=Counter)
    dimensions: Counter = field(default_factory=Counter)
    valid: int = 0
    packed: Counter = field(default_factory=Counter)
    complete: bool = True
    drops: list[Drop] = field(default_factory=list)


def guess_format(work: Path, source: Path, resolution: int | None, schema: Schema | None,
                 max_pixels: int) -> SampleFormat:
    """What the samples are likely to be, from the first of them: the order is a shuffle."""
    lines = read_lines(work, 0, _PROBED)
    found = [sample for line in lines if (sample := probe_sample(source, from_line(line), max_pixels, []))]
    sides = Counter(sample.width for sample in found if sample.width == sample.height)
    dimensions = Counter(0 if sample.vector is None else len(sample.vector) for sample in found)
    return SampleFormat(resolution or (_commonest(sides) if sides else 0), resolution is not None,
                    len(schema.names) if schema else _commonest(dimensions) if dimensions else 0)


def survey(tasks: dict[str, list[WriteTask]]) -> Survey:
    """Adds up what was found of all candidates, shard by shard; SourceChangedError where a result is not there."""
    found = Survey()
    for split, task in ((split, task) for split, shards in tasks.items() for task in shards):
        result = read_result(task.result_path)
        valid = result.checked[result.checked["state"] != BAD]
        found.sides.update(valid["width"][valid["width"] == valid["height"]].tolist())
        found.dimensions.update(valid["dimension"].tolist())
        found.valid += len(valid)
        found.packed[split] += len(result.rows)
        found.complete &= len(result.rows) == len(result.checked)
        found.drops += (Drop(**json.loads(line)) for line in result.drops.splitlines())
    return found


def decide_format(found: Survey, resolution: int | None, schema: Schema | None) -> SampleFormat:
    """What samples must be to be packed: the commonest size of square covers, and dimension of vectors.

    ValueError: nothing is left, no cover is square and no resolution was given, or vectors are not what is said.
    """
    if not found.valid:
        raise ValueError("nothing to pack: not one sample of --source is valid; see quarantine.jsonl in --out")
    if resolution is None and not found.sides:
        raise ValueError("no cover of --source is square; give --resolution: covers are cropped and resized to it")
    dimension = len(schema.names) if schema else _commonest(found.dimensions)
    others = found.dimensions.copy()
    others.pop(dimension, None)
    if schema and others.total() > MISFITS * found.valid:
        raise ValueError(f"{others.total():,} of {found.valid:,} vectors are not what {FILE} says, {schema}: most of "
                         f"them have {_commonest(others)} numbers; vectors of different descriptors can't be mixed: "
                         "pack them one by one")
    return SampleFormat(resolution or _commonest(found.sides), resolution is not None, dimension)


def misfits(tasks: Iterable[WriteTask], expected: SampleFormat, schema: Schema | None) -> Iterator[Drop]:
    """The drops of valid samples that are not of the expected format."""
    side, reason = expected.resolution, f"{FILE} says" if schema else "most vectors have"
    for task in tasks:
        checked = read_result(task.result_path).checked
        for i in np.flatnonzero(checked["state"] == MISFIT).tolist():
            _, width, height, dimension = checked[i].tolist()
            candidate = from_line(*read_lines(task.work, task.start + i, task.start + i + 1))
            if not expected.resize and not width == height == side:
                yield Drop(candidate.cover.path, "cover", "wrong cover size",
                           f"{width} x {height}; most square covers are {side} x {side}; "
                           f"--resolution {side} would crop and resize it")
            if dimension != expected.dimension:
                yield Drop(candidate.audio.path, "audio", "wrong vector size",
                           f"{dimension} numbers, {reason} {expected.dimension}")


def choose_blocks(vectors: Iterable[np.ndarray], dimension: int, sizes: Sequence[int] | None) -> Blocks:
    """The blocks of vectors of a dimension: by their sizes (ValueError unless they add up), or detected on a sample."""
    if not dimension:
        return ()
    if sizes:
        return blocks_of_sizes(sizes, dimension)
    sample = np.array(list(vectors), np.float32)
    return detect_blocks(sample) if len(sample) else ((0, dimension),)


def sample_size(dimension: int) -> int:
    return max(1, min(SAMPLE_VECTORS, SAMPLE_BYTES // (4 * dimension))) if dimension else 0


def vectors_of_source(work: Path, source: Path, count: int, dimension: int) -> Iterator[np.ndarray]:
    """The first vectors among ``count`` candidates, bad ones left out; they are read again with their samples."""
    for line in read_lines(work, 0, min(count, sample_size(dimension))):
        audio = from_line(line).audio
        try:
            vector = canonical(read_entry(source, audio, VECTOR_BYTES))[1] if audio else ()
        except BadFileError:
            continue
        if len(vector) == dimension:
            yield vector


def vectors_of_shards(tasks: Iterable[WriteTask], dimension: int) -> Iterator[np.ndarray]:
    """The first vectors of shards that were written."""
    left = sample_size(dimension)
    for task in tasks:
        rows = read_result(task.result_path).rows[:left] if left else ()
        left -= len(rows)
        for row in rows:
            with open(task.shard_path, "rb") as file:
                file.seek(int(row["audio_offset"]))
                yield parse_vector(file.read(int(row["audio_bytes"])), dimension)


def shard_bounds(split: str, count: int, samples_per_shard: int) -> Iterator[tuple[int, str, int, int]]:
    """Yields (number, name, start, stop) of every shard of a split; their sizes differ by one at most."""
    total = -(-count // samples_per_shard)
    for i in range(total):
        yield i, f"{split}-{i:05d}-of-{total:05d}.tar", count * i // total, count * (i + 1) // total


def write_tasks(counts: dict[str, int], samples_per_shard: int, **common) -> dict[str, list[WriteTask]]:
    """The shards of every split if all of its candidates are valid; ``common`` is alike in all of them."""
    tasks, first = {}, 0
    for split, count in counts.items():
        if count:
            tasks[split] = [WriteTask(name=name, number=number, start=first + start, stop=first + stop, **common)
                            for number, name, start, stop in shard_bounds(split, count, samples_per_shard)]
        first += count
    return tasks


def repartition_tasks(split: str, written: Sequence[WriteTask], samples_per_shard: int, blocks: Blocks,
                      ) -> list[RepartitionTask]:
    """The shards of what is in shards that were written."""
    ends = list(accumulate(len(read_result(task.result_path).rows) for task in written))
    begins, tasks, one = [0, *ends[:-1]], [], written[0]
    for number, name, start, stop in shard_bounds(split, ends[-1], samples_per_shard):
        parts = range(bisect_right(ends, start), bisect_left(begins, stop))
        ranges = tuple(SampleRange(written[i].shard_path, written[i].result_path, max(start, begins[i]) - begins[i],
                                   min(stop, ends[i]) - begins[i]) for i in parts if ends[i] > begins[i])
        tasks.append(RepartitionTask(one.work, one.out, name, number, ranges, one.expected.dimension, blocks))
    return tasks


def _commonest(counts: Counter) -> int:
    """The value that occurs most; of several, the largest."""
    return max(counts.items(), key=lambda pair: pair[::-1])[0]
