"""Makes shards of candidates, by tasks that run in many processes, and the metadata of their index."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from shard_tools.core.errors import SourceChangedError
from shard_tools.core.files import sync
from shard_tools.core.parallel import Pool
from shard_tools.core.quarantine import Drop
from shard_tools.dataset.schema import Schema
from shard_tools.shards import plan
from shard_tools.shards.state import PackState
from shard_tools.shards.statistics import PRESENCE_RULE, Blocks, Moments
from shard_tools.shards.tasks import (
    RepartitionTask,
    SampleFormat,
    WriteTask,
    read_result,
    repartition_shard,
    write_shard,
)

Tasks = dict[str, Sequence[WriteTask | RepartitionTask]]


@dataclass(frozen=True)
class PackOptions:
    """What is to be packed and how; ``resolution`` None = the commonest, ``audio_blocks`` None = they are detected."""

    source: Path
    root: Path
    resolution: int | None
    samples_per_shard: int
    audio_blocks: Sequence[int] | None
    max_pixels: int
    schema: Schema | None
    pool: Pool


@dataclass(frozen=True)
class Packed:
    """The tasks whose shards lie in the out folder, by split; what the samples were brought to; the vectors' blocks."""

    tasks: Tasks
    expected: SampleFormat
    blocks: Blocks


def make_shards(state: PackState, options: PackOptions, drops: list[Drop]) -> Packed:
    """Reads, checks and packs all candidates, or what of it an earlier run left; the bad ones are added to ``drops``.

    ValueError: there is nothing to pack, or the vectors are not what is said of them; SourceChangedError: the source,
    or what was made before, is not what it was.
    """
    drops += state.drops
    if not sum(state.counts.values()):
        plan.decide_format(plan.Survey(), None, None)  # raises
    written, found, expected, blocks = _write(state, options, drops)
    if found.complete:
        for task in _all(written):
            if task.shard_path.exists():
                os.replace(task.shard_path, options.root / task.name)
        return Packed(written, expected, blocks)
    drops += plan.misfits(_all(written), expected, options.schema)
    written = {split: shards for split, shards in written.items() if found.packed[split]}
    if not written:
        raise ValueError("nothing to pack: no sample has both the commonest cover size and the commonest vector size")
    known = state.load()
    if "repartition_blocks" not in known:  # else some of the shards that were written may be gone
        vectors = plan.vectors_of_shards(next(iter(written.values())), expected.dimension)
        known["repartition_blocks"] = plan.choose_blocks(vectors, expected.dimension, options.audio_blocks)
        state.save(known)
    blocks = _blocks(known["repartition_blocks"])
    tasks = {split: plan.repartition_tasks(split, shards, options.samples_per_shard, blocks)
             for split, shards in written.items()}
    spent = {split: list(shards) for split, shards in written.items()}

    def done(task: RepartitionTask) -> list[Path]:  # what it was made of goes: the disk need not hold everything twice
        shards, last = spent[task.name.partition("-")[0]], task.ranges[-1].shard_path
        while shards and shards[0].shard_path != last:
            shards.pop(0).shard_path.unlink(missing_ok=True)
        return [task.shard_path]

    _run(repartition_shard, list(_all(tasks)), options, "repartitioning", done)
    return Packed(tasks, expected, blocks)


def _write(state: PackState, options: PackOptions, drops: list[Drop],
           ) -> tuple[dict[str, list[WriteTask]], plan.Survey, SampleFormat, Blocks]:
    """All candidates in shards; again where most are not what the first of them let expect, which is rare."""
    known = state.load()
    expected = SampleFormat(**known["expected"]) if known else plan.guess_format(
        state.folder, options.source, options.resolution, options.schema, options.max_pixels)
    while True:
        basis = next(split for split, count in state.counts.items() if count)  # train, where there is one
        blocks = _blocks(known["blocks"]) if known.get("written") else plan.choose_blocks(
            plan.vectors_of_source(state.folder, options.source, state.counts[basis], expected.dimension),
            expected.dimension, options.audio_blocks)
        tasks = plan.write_tasks(
            state.counts, options.samples_per_shard, work=state.folder, source=options.source, out=options.root,
            genres=tuple(state.genres), max_pixels=options.max_pixels, expected=expected, blocks=blocks)
        found = None
        if "repartition_blocks" in known:  # their shards may be gone, and are not needed
            with suppress(SourceChangedError):
                found = plan.survey(tasks)
        if found is None:
            _run(write_shard, list(_all(tasks)), options, "packing",
                 lambda task: [task.result_path, task.shard_path if task.shard_path.exists()
                               else task.out / task.name])
            found = plan.survey(tasks)
        try:
            decided = plan.decide_format(found, options.resolution, options.schema)
        except ValueError:
            drops += found.drops
            raise
        if not known.get("written"):
            known = {"expected": vars(decided), "written": decided == expected, "blocks": blocks}
            state.save(known)
        if decided == expected:
            drops += found.drops
            return tasks, found, expected, blocks
        expected = decided


def _blocks(bounds: list[list[int]] | Blocks) -> Blocks:
    return tuple((start, end) for start, end in bounds)


def _all(tasks: dict[str, Any]) -> Iterable[Any]:
    return chain.from_iterable(tasks.values())


def _run(function: Any, tasks: list[Any], options: PackOptions, label: str, files: Callable[[Any], list[Path]]) -> None:
    """Runs tasks; when it ends, all files that they made are on the disk: a thread sees to that meanwhile."""
    with ThreadPoolExecutor(1) as thread, tqdm(desc=label, unit=" samples", smoothing=0.05) as bar:
        waiting = []
        for task, count in zip(tasks, options.pool.run(function, tasks), strict=True):
            bar.update(count)
            waiting += [thread.submit(sync, path) for path in files(task)]
        for future in waiting:
            future.result()


def assign_groups(tasks: Tasks) -> dict[str, np.ndarray]:
    """The group of every sample ``[n]`` int64 of each split; one without album key gets that of the album that has its
    cover, if there is one."""
    parts, ends = [], []
    for shards in tasks.values():
        for result in (read_result(task.result_path) for task in shards):
            parts.append((result.rows["group"].copy(), result.rows["cover_hash"].copy(), result.album))
        ends.append(sum(len(album) for *_, album in parts))
    group, cover_hash, album = map(np.concatenate, zip(*parts, strict=True))
    albums, others = np.flatnonzero(album), np.flatnonzero(~album)
    if len(albums):
        albums = albums[np.lexsort((group[albums], cover_hash[albums]))]
        hashes = cover_hash[albums]
        at = np.minimum(np.searchsorted(hashes, cover_hash[others]), len(hashes) - 1)  # the first = smallest group
        same = hashes[at] == cover_hash[others]
        group[others[same]] = group[albums[at[same]]]
    return dict(zip(tasks, np.split(group, ends[:-1]), strict=True))


def split_metadata(shards: Sequence[WriteTask | RepartitionTask], genres: list[str], groups: np.ndarray,
                   ) -> dict[str, Any]:
    """What an index says of one split."""
    counts, listed = np.zeros(len(genres), np.int64), []
    for task in shards:
        result = read_result(task.result_path)
        counts += np.bincount(result.rows["genre"], minlength=len(genres))
        listed.append({"name": task.name, "samples": len(result.rows), "bytes": result.bytes, "sha256": result.sha256})
    return {"samples": len(groups), "groups": len(np.unique(groups)), "shards": listed,
            "genre_counts": dict(zip(genres, counts.tolist(), strict=True))}


def split_rows(shards: Sequence[WriteTask | RepartitionTask], groups: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of one split's index, shard by shard."""
    start = 0
    for task in shards:
        rows = read_result(task.result_path).rows
        rows["group"] = groups[start:start + len(rows)]
        start += len(rows)
        yield rows


def audio_metadata(packed: Packed, basis: str, schema: Schema | None) -> dict[str, Any] | None:
    """Dimension, blocks, what is known of the numbers, and the statistics over one split, merged shard by shard."""
    dimension, blocks = packed.expected.dimension, packed.blocks
    if not dimension:
        return None
    moments = Moments.empty(dimension)
    for task in packed.tasks[basis]:
        moments = moments.merge(read_result(task.result_path).moments)
    mean, std = moments.mean_and_std()
    return {"dimension": dimension, "blocks": [list(block) for block in blocks], "presence_rule": PRESENCE_RULE,
            "statistics_of": basis, "block_counts": [int(moments.count[start]) for start, _ in blocks],
            "mean": mean.tolist(), "std": std.tolist(), **({"features": schema.metadata()} if schema else {})}
