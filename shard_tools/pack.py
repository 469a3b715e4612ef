"""``python -m shard_tools.pack --source DIR_OR_ZIP --out DIR``: covers and vectors in, shards and their index out.

Two passes over the source, each shared among processes: every file is checked, then what proved sound is packed, a
shard a task. Between them all that must be known of the whole is: the sizes, the groups, how many samples to share out.
What is finished is noted in ``OUT/.pack`` until the end, so that the same command goes on where a killed one stopped.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from shard_tools import __version__
from shard_tools.formats import work as job
from shard_tools.formats.blocks import PRESENCE_RULE, Blocks, Moments
from shard_tools.formats.codec import MAX_PIXELS
from shard_tools.formats.companions import find_schema
from shard_tools.formats.index import SPLITS, write_index
from shard_tools.formats.layout import Drop, Listing, open_layout
from shard_tools.formats.plan import Plan, choose_blocks, make_plan, read_rows, shard_tasks
from shard_tools.formats.pool import available_workers, run_tasks
from shard_tools.formats.probe import probe_chunk
from shard_tools.formats.quarantine import show_reasons, verdict, write_quarantine
from shard_tools.formats.remote import is_remote
from shard_tools.formats.schema import Schema
from shard_tools.formats.shards import ShardTask, SourceChangedError, pack_shard, read_result
from shard_tools.formats.source import open_source
from shard_tools.formats.staging import pack_to
from shard_tools.formats.truth import TRUTH, copy_truth


def pack(source: str, out: str, dataset: Literal["auto", "audio-cover", "cover"] = "auto",
         resolution: int | None = None, samples_per_shard: int = 1000, seed: int = 0,
         audio_blocks: tuple[int, ...] | None = None, max_failure_rate: float = 0.05, max_pixels: int = MAX_PIXELS,
         workers: int | None = None, overwrite: bool = False) -> int:
    """Packs covers and audio vectors into WebDataset shards with an index; bad files go to OUT/quarantine.jsonl.

    The same command after an interruption goes on where it stopped. Returns 1 when too many files were bad, else 0.
    Of demo data its truth, attributes.npz, is copied too, also to shards that were packed before. What groups.csv (of
    shard_tools.dedup) and features.json (of shard_tools.features and collect) say of covers and vectors is heeded.

    Args:
        source: folder or zip (read in place): the thesis' data sets, <split>/<genre>/, <genre>/, or plain files.
        out: folder to write to; new, empty, or left by the same command. A URL (s3://, gs://): shards are uploaded as
            each is finished, the index last.
        dataset: audio-cover, cover (covers without vectors), or auto: audio-cover where there is one.
        resolution: side of the covers in pixels; none = as found, the commonest size of square ones.
        samples_per_shard: at most so many samples in a shard.
        seed: of the order of the samples.
        audio_blocks: sizes of the vector's blocks, such as 580,580; none = detected from runs of zeros.
        max_failure_rate: share of bad files above which the exit status is 1.
        max_pixels: covers of more pixels are bad files.
        workers: processes; none = one a core, 12 at most.
        overwrite: replace finished shards that were packed otherwise.

    Raises:
        ValueError: nothing to pack, or OUT holds something else.
    """
    if is_remote(out):
        asked = dict(locals())
        return pack_to(out, overwrite, lambda folder: pack(**{**asked, "out": str(folder)}))
    started = time.monotonic()
    for name, value, low, high in (
            ("samples_per_shard", samples_per_shard, 1, 10**6), ("resolution", resolution, 1, 8192),
            ("seed", seed, 0, 2**63), ("workers", workers, 1, 1024), ("max_pixels", max_pixels, 1, 178_000_000),
            ("max_failure_rate", max_failure_rate, 0, 1)):
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name} {value}: expected {low:,} to {high:,}")
    options = {"dataset": dataset, "resolution": resolution, "samples_per_shard": samples_per_shard, "seed": seed,
               "audio_blocks": list(audio_blocks) if audio_blocks else None, "max_pixels": max_pixels}
    source_path, root = Path(source).resolve(), Path(out).resolve()
    if root == source_path or source_path in root.parents:
        raise ValueError(f"--out {out} lies in --source {source}: shards would become input; choose another folder")
    listing = open_layout(open_source(source_path), dataset)
    schema = find_schema(listing.source, listing.top, listing.audio_folders())
    workers = workers or available_workers()
    root.mkdir(parents=True, exist_ok=True)
    with job.locked(root):
        facts = [] if overwrite else job.finished(root)
        if facts:
            job.check_same(root, facts, options, listing)
            added = _copy_truth(source_path, listing, root)
            print(f"{root} is already packed" + (f"; {TRUTH} was added" if added else ""))
            return _verdict(sum(facts[0]["drops"].values()), sum(f["samples"] for f in facts), max_failure_rate)
        work = job.begin(root, listing, options, overwrite)
        if dataset == "audio-cover" and not listing.paired:
            raise ValueError("--dataset audio-cover, but --source holds no vectors; use --dataset cover")
        chunks = work.probe_tasks(source_path, seed, max_pixels)
        _run(probe_chunk, chunks, workers, "checking", work.candidates)
        drops = work.drops + [drop for task in chunks for drop in job.read_drops(task.drops_path)]
        try:
            plan = make_plan(work.folder, read_rows(chunks), resolution, schema)
        except ValueError:  # nothing to pack: say why as fully as otherwise
            write_quarantine(root, drops)
            _report_drops(root, drops)
            raise
        drops += plan.drops
        np.save(work.folder / "plan.npy", plan.rows, allow_pickle=False)
        basis = next(split for split in SPLITS if len(plan.split_rows(split)))  # train, where there is one
        try:
            blocks = choose_blocks(work.folder, source_path, plan, basis, audio_blocks)
            tasks = shard_tasks(plan, samples_per_shard, work.folder, source_path, root, max_pixels, blocks)
            _run(pack_shard, [task for split in tasks.values() for task in split], workers, "packing", len(plan.rows))
        except SourceChangedError:
            job.forget(root)
            raise
        common = {
            "options": options, "version": __version__, "source_sha256": work.source_sha256, "splits": list(tasks),
            "genres": work.genres, "resolution": plan.resolution, "ignored_files": work.ignored,
            "drops": dict(sorted(Counter(drop.reason for drop in drops).items())),
            "quarantine_sha256": write_quarantine(root, drops),
            "audio": _audio_facts(plan, blocks, tasks[basis], basis, schema),
        }
        _copy_truth(source_path, listing, root)  # before the index: with that the folder is finished
        for split, shards in tasks.items():
            write_index(root, split, *_split_index(common, plan.split_rows(split), shards))
        job.end(root)
        _report(root, plan, tasks, drops, common, time.monotonic() - started)
        return _verdict(len(drops), len(plan.rows), max_failure_rate)


def _run(function: Any, tasks: list[Any], workers: int, label: str, total: int) -> None:
    with tqdm(total=total, desc=label, unit=" samples", smoothing=0.05) as bar:
        for count in run_tasks(function, tasks, min(workers, len(tasks))):
            bar.update(count)


def _copy_truth(source: Path, listing: Listing, root: Path) -> bool:
    """As ``copy_truth``; a damaged one stops nothing, for the covers are sound without it."""
    try:
        return copy_truth(source, listing, root)
    except ValueError as error:
        print(f"warning: {error}; packing without it")
        return False


def _audio_facts(plan: Plan, blocks: Blocks, shards: list[ShardTask], basis: str, schema: Schema | None,
                 ) -> dict[str, Any] | None:
    """Dimension, blocks, what is known of the numbers, and the statistics over one split, merged shard by shard."""
    if not plan.dimension:
        return None
    moments = Moments.empty(plan.dimension)
    for task in shards:
        moments = moments.merge(read_result(task).moments)
    mean, std = moments.mean_and_std()
    return {"dimension": plan.dimension, "blocks": [list(block) for block in blocks], "presence_rule": PRESENCE_RULE,
            "statistics_of": basis, "block_counts": [int(moments.count[start]) for start, _ in blocks],
            "mean": mean.tolist(), "std": std.tolist(), **({"features": schema.facts()} if schema else {})}


def _split_index(common: dict[str, Any], rows: np.ndarray,
                 shards: list[ShardTask]) -> tuple[dict[str, Any], np.ndarray]:
    """The facts and rows of one split's index."""
    results = [read_result(task) for task in shards]
    counts = np.bincount(rows["genre"], minlength=len(common["genres"])).tolist()
    facts = common | {
        "samples": len(rows), "groups": len(np.unique(rows["group"])),
        "genre_counts": dict(zip(common["genres"], counts, strict=True)),
        "shards": [{"name": task.name, "samples": len(result.rows), "bytes": result.bytes, "sha256": result.sha256}
                   for task, result in zip(shards, results, strict=True)],
    }
    return facts, np.concatenate([result.rows for result in results])


def _report(root: Path, plan: Plan, tasks: dict[str, list[ShardTask]], drops: list[Drop], facts: dict[str, Any],
            seconds: float) -> None:
    for split, shards in tasks.items():
        rows = plan.split_rows(split)
        size = sum((root / task.name).stat().st_size for task in shards)
        print(f"{split:5} {len(rows):9,} samples  {len(np.unique(rows['group'])):9,} groups  {len(shards):5,} shards  "
              f"{size / 1e6:10,.1f} MB")
    if facts["audio"]:
        blocks, basis = facts["audio"]["blocks"], facts["audio"]["statistics_of"]
        print(f"covers {plan.resolution} x {plan.resolution}; vectors of {plan.dimension}, blocks "
              + ", ".join(f"[{start}, {end})" for start, end in blocks)
              + (f"; {facts['audio']['features']['features']}" if "features" in facts["audio"] else ""))
        if basis != "train":
            print(f"warning: there is no train split; the audio statistics are those of {basis}")
    if (root / TRUTH).is_file():
        print(f"truth  {TRUTH}: what the demo's covers show")
    per_group = np.unique(np.unique(plan.rows[["group", "split"]])["group"], return_counts=True)[1]
    if leaks := int((per_group > 1).sum()):
        print(f"warning: {leaks:,} groups (albums) are in more than one split; scores on val and test will flatter")
    _report_drops(root, drops)
    print(f"{len(plan.rows):,} samples in {seconds:.1f} s, {len(plan.rows) / seconds:,.0f} a second")
    nearest = 2 ** (plan.resolution.bit_length() - 1)  # models are built for powers of two
    smaller = "" if nearest == plan.resolution else f" --resolution {nearest}"
    print(f"next: accelerate launch -m covergen.train --model wgan_gp --shards {root}{smaller}")


def _report_drops(root: Path, drops: list[Drop]) -> None:
    small = any(drop.reason == "wrong cover size" for drop in drops)
    show_reasons(root, drops, hint="--resolution N crops and resizes covers of every size to N x N" if small else "")


def _verdict(dropped: int, packed: int, max_failure_rate: float) -> int:
    return verdict(dropped, packed, max_failure_rate, "{:,} bad files to {:,} samples", "what was sound is packed")


if __name__ == "__main__":
    from shard_tools import cli

    cli.run(pack)
