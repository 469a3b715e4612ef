"""What holds of a data set as a whole: what its samples are expected to be, what they proved to be, who is dropped.

Nothing here holds more of a sample than a few numbers, and most hold one shard's at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from shard_tools.core.errors import BadFileError, SourceChangedError
from shard_tools.core.quarantine import Drop, read_drops
from shard_tools.dataset.schema import FILE, Schema
from shard_tools.dataset.source import read_entry
from shard_tools.dataset.vectors import VECTOR_BYTES, parse_vector
from shard_tools.shards import tasks as gather
from shard_tools.shards.candidates import canonical, check_sample, from_line
from shard_tools.shards.statistics import Blocks, blocks_of_sizes, detect_blocks
from shard_tools.shards.tar import shard_name
from shard_tools.shards.tasks import RepartitionTask, SampleFormat, SampleRange, WriteTask, read_result

STRAYS = 0.05  # share of vectors of a wrong size that is taken for damage, and not for another kind of vectors
SAMPLE_VECTORS, SAMPLE_BYTES = 4096, 2**25  # blocks are detected on so many vectors at most
_LOOKED_AT = 64  # samples from which it is guessed what most are


@dataclass
class Survey:
    """What the candidates proved to be: counts of square covers by side, of vectors by dimension, of sound samples,
    and the bad files."""

    sides: Counter = field(default_factory=Counter)
    dimensions: Counter = field(default_factory=Counter)
    sound: int = 0
    drops: list[Drop] = field(default_factory=list)


def guess_format(work: Path, source: Path, resolution: int | None, schema: Schema | None, max_pixels: int) -> SampleFormat:
    """What the samples are likely to be, from the first of them: the order is a shuffle."""
    looked = (check_sample(source, from_line(line), max_pixels, []) for line in gather.read_lines(work, 0, _LOOKED_AT))
    found = [sample for sample in looked if sample]
    sides = Counter(sample.width for sample in found if sample.width == sample.height)
    dimensions = Counter(0 if sample.vector is None else len(sample.vector) for sample in found)
    return SampleFormat(resolution or (_commonest(sides) if sides else 0), resolution is not None,
                    len(schema.names) if schema else _commonest(dimensions) if dimensions else 0)


def survey(tasks: Iterable[WriteTask]) -> Survey:
    """Adds up what was found of all candidates, shard by shard."""
    found = Survey()
    for task in tasks:
        result = read_result(task.result_path)
        sound = result.checked[result.checked["state"] != gather.BAD]
        found.sides.update(sound["width"][sound["width"] == sound["height"]].tolist())
        found.dimensions.update(sound["dimension"].tolist())
        found.sound += len(sound)
        found.drops += read_drops(result.drops)
    return found


def decide_format(found: Survey, resolution: int | None, schema: Schema | None) -> SampleFormat:
    """What samples must be to be packed: the commonest size of square covers, and dimension of vectors.

    Raises:
        ValueError: nothing is left, no cover is square and no resolution was given, or vectors are not what is said.
    """
    if not found.sound:
        raise ValueError("nothing to pack: not one sample of --source is sound; see quarantine.jsonl in --out")
    if resolution is None and not found.sides:
        raise ValueError("no cover of --source is square; give --resolution: covers are cropped and resized to it")
    dimension = len(schema.names) if schema else _commonest(found.dimensions)
    others = found.dimensions.copy()
    others.pop(dimension, None)
    if schema and others.total() > STRAYS * found.sound:
        raise ValueError(f"{others.total():,} of {found.sound:,} vectors are not what {FILE} says, {schema}: most of "
                         f"them have {_commonest(others)} numbers; vectors of different descriptors can't be mixed: "
                         "pack them one by one")
    return SampleFormat(resolution or _commonest(found.sides), resolution is not None, dimension)


def misfits(tasks: Iterable[WriteTask], expected: SampleFormat, schema: Schema | None) -> Iterator[Drop]:
    """The drops of sound samples that are not what is expected."""
    said = f"{FILE} says" if schema else "most vectors have"
    for task in tasks:
        checked = read_result(task.result_path).checked
        for i in np.flatnonzero(checked["state"] == gather.OTHER).tolist():
            _, width, height, dimension = checked[i].tolist()
            if not expected.resize and not width == height == expected.resolution:
                yield gather.wrong_size(task, i, width, height, expected.resolution)
            if dimension != expected.dimension:
                yield gather.wrong_dimension(task, i, dimension, f"{said} {expected.dimension}")


def choose_blocks(vectors: Iterable[np.ndarray], dimension: int, sizes: Sequence[int] | None) -> Blocks:
    """The blocks of vectors of a dimension: as given by their sizes, or detected on a fair sample.

    Raises:
        ValueError: the sizes don't add up to the dimension.
    """
    if not dimension:
        return ()
    if sizes:
        return blocks_of_sizes(sizes, dimension)
    sample = np.empty((sample_size(dimension), dimension), np.float32)
    count = 0
    for count, vector in enumerate(vectors, 1):
        sample[count - 1] = vector
    return detect_blocks(sample[:count]) if count else ((0, dimension),)


def sample_size(dimension: int) -> int:
    return max(1, min(SAMPLE_VECTORS, SAMPLE_BYTES // (4 * dimension))) if dimension else 0


def vectors_of_source(work: Path, source: Path, count: int, dimension: int) -> Iterator[np.ndarray]:
    """The first vectors among ``count`` candidates, unsound ones left out; they are read again with their samples."""
    for line in gather.read_lines(work, 0, min(count, sample_size(dimension))):
        audio = from_line(line).audio
        try:
            vector = canonical(read_entry(source, audio, VECTOR_BYTES))[1] if audio else ()
        except BadFileError:
            continue
        if len(vector) == dimension:
            yield vector


def vectors_of_shards(tasks: Iterable[WriteTask], dimension: int) -> Iterator[np.ndarray]:
    """The first vectors of gathered shards."""
    left = sample_size(dimension)
    for task in tasks:
        if not left:
            return
        rows = read_result(task.result_path).rows[:left]
        left -= len(rows)
        with open(task.shard_path, "rb") as file:
            for row in rows:
                file.seek(int(row["audio_offset"]))
                yield parse_vector(file.read(int(row["audio_bytes"])), dimension)


def all_known(tasks: Iterable[WriteTask]) -> bool:
    """Whether the results of all tasks are there, though their shards may be gone."""
    try:
        return all(read_result(task.result_path) is not None for task in tasks)
    except SourceChangedError:
        return False


def all_taken(task: WriteTask) -> bool:
    return bool((read_result(task.result_path).checked["state"] == gather.TAKEN).all())


def any_taken(task: WriteTask) -> bool:
    return len(read_result(task.result_path).rows) > 0


def share_out(count: int, samples_per_shard: int) -> list[tuple[int, int]]:
    """(start, stop) of every shard; their sizes differ by one at most."""
    total = -(-count // samples_per_shard)
    bounds = [count * i // max(total, 1) for i in range(total + 1)]
    return list(pairwise(bounds))


def write_tasks(counts: dict[str, int], samples_per_shard: int, **common) -> dict[str, list[WriteTask]]:
    """The shards of every split if all of its candidates are sound; ``common`` is alike in all of them."""
    tasks, first = {}, 0
    for split, count in counts.items():
        bounds = share_out(count, samples_per_shard)
        if bounds:
            tasks[split] = [WriteTask(name=shard_name(split, i, len(bounds)), number=i, start=first + start,
                                       stop=first + stop, **common) for i, (start, stop) in enumerate(bounds)]
        first += count
    return tasks


def repartition_tasks(split: str, gathered: Sequence[WriteTask], samples_per_shard: int, blocks: Blocks) -> list[RepartitionTask]:
    """The shards of what was taken into gathered ones."""
    ends = list(accumulate(len(read_result(task.result_path).rows) for task in gathered))
    begins, tasks, first = [0, *ends[:-1]], [], 0
    bounds = share_out(ends[-1], samples_per_shard)
    for number, (start, stop) in enumerate(bounds):
        while ends[first] <= start:
            first += 1
        stretches = []
        at = first
        while at < len(gathered) and begins[at] < stop:
            if ends[at] > begins[at]:
                stretches.append(SampleRange(gathered[at].shard_path, gathered[at].result_path,
                                         max(start, begins[at]) - begins[at], min(stop, ends[at]) - begins[at]))
            at += 1
        one = gathered[0]
        tasks.append(RepartitionTask(one.work, one.out, shard_name(split, number, len(bounds)), number, tuple(stretches),
                               one.expected.dimension, blocks))
    return tasks


def _commonest(counts: Counter) -> int:
    """The value that occurs most; of several, the largest."""
    return max(counts.items(), key=lambda pair: pair[::-1])[0]
