"""From candidates to shards: the work under way in; every shard in its place, whole and on the disk, out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shard_tools.formats import plan
from shard_tools.formats.blocks import Blocks
from shard_tools.formats.gather import Expected, GatherTask, gather_shard
from shard_tools.formats.layout import Drop
from shard_tools.formats.pool import Pool
from shard_tools.formats.recut import RecutTask, recut_shard
from shard_tools.formats.schema import Schema
from shard_tools.formats.work import Work, note, recall

Gathered = dict[str, list[GatherTask]]
Tasks = dict[str, Sequence[GatherTask | RecutTask]]


@dataclass(frozen=True)
class Orders:
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
    """The tasks whose shards lie in their place, by split; what the samples were brought to; the vectors' blocks."""

    tasks: Tasks
    expected: Expected
    blocks: Blocks


def make_shards(work: Work, orders: Orders, drops: list[Drop]) -> Packed:
    """Reads, checks and packs all candidates, or what of it an earlier run left; the bad ones are added to ``drops``.

    Raises:
        ValueError: there is nothing to pack, or the vectors are not what is said of them.
        SourceChangedError: the source, or what was made before, is not what it was.
    """
    drops += work.drops
    if not sum(work.counts.values()):
        plan.settle(plan.Survey(), None, None)  # raises
    gathered, expected, blocks = _gather(work, orders, drops)
    if all(plan.all_taken(task) for task in _all(gathered)):
        for task in _all(gathered):
            if task.shard_path.exists():
                os.replace(task.shard_path, orders.root / task.name)
        return Packed(gathered, expected, blocks)
    drops += plan.strays(_all(gathered), expected, orders.schema)
    kept = {split: shards for split, shards in gathered.items() if any(map(plan.any_taken, shards))}
    if not kept:
        raise ValueError("nothing to pack: no sample has both the commonest cover size and the commonest vector size")
    known = recall(work)
    if "recut_blocks" not in known:  # else some of the gathered shards may be gone
        vectors = plan.vectors_of_shards(next(iter(kept.values())), expected.dimension)
        known["recut_blocks"] = plan.choose_blocks(vectors, expected.dimension, orders.audio_blocks)
        note(work, known)
    blocks = _blocks(known["recut_blocks"])
    tasks = {split: plan.recut_tasks(split, shards, orders.samples_per_shard, blocks)
             for split, shards in kept.items()}
    spent = {split: list(shards) for split, shards in kept.items()}

    def done(task: Any) -> list[Path]:  # what was gathered for it goes: the disk need not hold everything twice
        shards, last = spent[task.name.partition("-")[0]], task.stretches[-1].shard_path
        while shards and shards[0].shard_path != last:
            shards.pop(0).shard_path.unlink(missing_ok=True)
        return [orders.root / task.name]

    _run(recut_shard, list(_all(tasks)), orders, "cutting anew", done)
    return Packed(tasks, expected, blocks)


def _gather(work: Work, orders: Orders, drops: list[Drop]) -> tuple[Gathered, Expected, Blocks]:
    """All candidates in shards; again where most are not what the first of them let expect, which is rare."""
    known = recall(work)
    expected = Expected(**known["expected"]) if known else plan.first_look(
        work.folder, orders.source, orders.resolution, orders.schema, orders.max_pixels)
    while True:
        basis = next(split for split, count in work.counts.items() if count)  # train, where there is one
        blocks = _blocks(known["blocks"]) if known.get("gathered") else plan.choose_blocks(
            plan.vectors_of_source(work.folder, orders.source, work.counts[basis], expected.dimension),
            expected.dimension, orders.audio_blocks)
        gathered = plan.gather_tasks(
            work.counts, orders.samples_per_shard, work=work.folder, source=orders.source, out=orders.root,
            genres=tuple(work.genres), max_pixels=orders.max_pixels, expected=expected, blocks=blocks)
        if "recut_blocks" not in known or not plan.all_known(_all(gathered)):  # what is done already is only checked
            _run(gather_shard, list(_all(gathered)), orders, "packing",
                 lambda task: [task.result_path, task.shard_path if task.shard_path.exists()
                               else task.out / task.name])
        found = plan.survey(_all(gathered))
        try:
            settled = plan.settle(found, orders.resolution, orders.schema)
        except ValueError:
            drops += found.drops
            raise
        if not known.get("gathered"):
            known = {"expected": vars(settled), "gathered": settled == expected, "blocks": blocks}
            note(work, known)
        if settled == expected:
            drops += found.drops
            return gathered, expected, blocks
        expected = settled


def _blocks(bounds: list[list[int]] | Blocks) -> Blocks:
    return tuple((start, end) for start, end in bounds)


def _all(tasks: dict[str, Any]) -> Iterable[Any]:
    return chain.from_iterable(tasks.values())


def _run(function: Any, tasks: list[Any], orders: Orders, label: str, files: Callable[[Any], list[Path]]) -> None:
    """Runs tasks; when it ends, all files that they made are on the disk: a thread sees to that meanwhile."""
    with ThreadPoolExecutor(1) as thread, tqdm(desc=label, unit=" samples", smoothing=0.05) as bar:
        results = orders.pool.run(function, tasks)
        waiting = []
        for task, count in zip(tasks, results, strict=True):
            bar.update(count)
            waiting.append(thread.submit(_sync, files(task)))
        for future in waiting:
            future.result()


def _sync(paths: list[Path]) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
