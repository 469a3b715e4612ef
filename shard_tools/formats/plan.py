"""Between the two passes: all rows that proved sound in; the samples to pack, in their order, and the drops out.

Only here are the size of the covers, the dimension of the vectors and the groups known, and with them how many samples
there are to share among shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shard_tools.formats.blocks import Blocks, blocks_of_sizes, detect_blocks
from shard_tools.formats.codec import VECTOR_BYTES, read_vector
from shard_tools.formats.index import SPLITS
from shard_tools.formats.layout import Candidate, Drop
from shard_tools.formats.probe import SOUND, ProbeTask, from_line
from shard_tools.formats.probe import read_rows as rows_of_chunk
from shard_tools.formats.schema import FILE, Schema
from shard_tools.formats.shards import ShardTask, read_again, shard_name

STRAYS = 0.05  # share of vectors of a wrong size that is taken for damage, and not for another kind of vectors
SAMPLE_VECTORS, SAMPLE_BYTES = 4096, 2**25  # blocks are detected on so many vectors at most


@dataclass(frozen=True)
class Plan:
    """What will be packed: rows ``[N]`` of ``SOUND`` by split and shuffled, the common sizes, and what was dropped."""

    rows: np.ndarray
    resolution: int
    dimension: int
    drops: list[Drop]

    def split_rows(self, split: str) -> np.ndarray:
        return self.rows[slice(*np.searchsorted(self.rows["split"], [SPLITS.index(split), SPLITS.index(split) + 1]))]


def read_rows(tasks: Iterable[ProbeTask]) -> np.ndarray:
    """The rows of all chunks, ``[N]`` of ``SOUND``."""
    parts = [rows_of_chunk(task) for task in tasks]
    return np.concatenate(parts) if parts else np.empty(0, SOUND)


def make_plan(work: Path, rows: np.ndarray, resolution: int | None, schema: Schema | None = None) -> Plan:
    """Chooses the covers' size and the vectors' dimension, drops what differs, settles groups and order.

    Args:
        work: folder of the candidates' lines.
        rows: ``[N]`` of ``SOUND``.
        resolution: size to bring every cover to; None = the commonest square size, covers of another size are dropped.
        schema: what the vectors are said to be.

    Raises:
        ValueError: nothing is left, no cover is square and no resolution was given, or vectors are not what is said.
    """
    if not len(rows):
        raise ValueError("nothing to pack: not one sample of --source is sound; see quarantine.jsonl in --out")
    drops = []
    keep = np.ones(len(rows), bool)
    if resolution is None:
        square = rows["width"][rows["width"] == rows["height"]]
        if not len(square):
            raise ValueError("no cover of --source is square; give --resolution: covers are cropped and resized to it")
        resolution = _commonest(square)
        keep = (rows["width"] == resolution) & (rows["height"] == resolution)
        for row, candidate in _candidates(work, rows[~keep]):
            drops.append(Drop(candidate.cover.path, "cover", "wrong cover size",
                              f"{row['width']} x {row['height']}; most square covers are {resolution} x {resolution}; "
                              f"--resolution {resolution} would crop and resize it"))
    dimension = len(schema.names) if schema else _commonest(rows["dimension"])
    fits = rows["dimension"] == dimension
    if schema and (~fits).mean() > STRAYS:
        other = _commonest(rows["dimension"][~fits])
        raise ValueError(f"{(~fits).sum():,} of {len(rows):,} vectors are not what {FILE} says, {schema}: most of them "
                         f"have {other} numbers; vectors of different descriptors can't be mixed: pack them one by one")
    expected = f"{FILE} says" if schema else "most vectors have"
    for row, candidate in _candidates(work, rows[~fits]):
        drops.append(Drop(candidate.audio.path, "audio", "wrong vector size",
                          f"{row['dimension']} numbers, {expected} {dimension}"))
    rows = rows[keep & fits]
    if not len(rows):
        raise ValueError("nothing to pack: no sample has both the commonest cover size and the commonest vector size")
    _join_groups(rows)
    return Plan(rows[np.lexsort((rows["line"], rows["order"], rows["split"]))], resolution, dimension, drops)


def choose_blocks(work: Path, source: Path, plan: Plan, split: str, sizes: Sequence[int] | None) -> Blocks:
    """The blocks of the vectors: as given by their sizes, or detected on a fair sample of one split.

    Raises:
        ValueError: the sizes don't add up to the dimension.
        SourceChangedError: a file is not what it was when it was checked.
    """
    if not plan.dimension:
        return ()
    if sizes:
        return blocks_of_sizes(sizes, plan.dimension)
    count = max(1, min(SAMPLE_VECTORS, SAMPLE_BYTES // (4 * plan.dimension)))
    sample = plan.split_rows(split)[:count]  # the order is a shuffle, so its beginning is a fair sample
    vectors = np.empty((len(sample), plan.dimension), np.float32)
    for vector, (row, candidate) in zip(vectors, _candidates(work, sample), strict=True):
        vector[:] = read_vector(read_again(source, candidate.audio, VECTOR_BYTES, int(row["audio_hash"])))
    return detect_blocks(vectors)


def shard_tasks(plan: Plan, samples_per_shard: int, work: Path, source: Path, out: Path, max_pixels: int,
                blocks: Blocks) -> dict[str, list[ShardTask]]:
    """The shards of every split that has samples; their sizes differ by one at most."""
    tasks: dict[str, list[ShardTask]] = {}
    for split in SPLITS:
        count = len(plan.split_rows(split))
        first = int(np.searchsorted(plan.rows["split"], SPLITS.index(split)))
        total = -(-count // samples_per_shard)
        bounds = [first + count * i // max(total, 1) for i in range(total + 1)]
        if total:
            tasks[split] = [
                ShardTask(work, source, out, shard_name(split, i, total), i, bounds[i], bounds[i + 1], plan.resolution,
                          max_pixels, plan.dimension, blocks) for i in range(total)]
    return tasks


def _commonest(values: np.ndarray) -> int:
    """The value that occurs most; of several, the largest."""
    return max(Counter(values.tolist()).items(), key=lambda pair: pair[::-1])[0]


def _join_groups(rows: np.ndarray) -> None:
    """Gives a sample without album key the group of the album that has its cover, if there is one."""
    albums, others = np.flatnonzero(rows["album"]), np.flatnonzero(~rows["album"])
    if not len(albums) or not len(others):
        return
    albums = albums[np.lexsort((rows["group"][albums], rows["cover_hash"][albums]))]
    hashes = rows["cover_hash"][albums]
    at = np.minimum(np.searchsorted(hashes, rows["cover_hash"][others]), len(hashes) - 1)  # the first = smallest group
    same = hashes[at] == rows["cover_hash"][others]
    rows["group"][others[same]] = rows["group"][albums[at[same]]]


def _candidates(work: Path, rows: np.ndarray) -> Iterable[tuple[np.void, Candidate]]:
    with open(work / "candidates.jsonl", "rb") as lines:
        for row in rows:
            lines.seek(int(row["line"]))
            yield row, from_line(lines.read(int(row["line_bytes"])))
