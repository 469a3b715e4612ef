"""Checks a folder of shards and prints a line for every problem: ``python -m shard_tools.verify DIR``.

Nothing in the folder is trusted: names are checked before they are opened, no member is unpickled or written anywhere.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from shard_tools import cli
from shard_tools.cli import Range, checked
from shard_tools.core.files import file_sha256
from shard_tools.core.parallel import available_workers, run_tasks
from shard_tools.core.quarantine import QUARANTINE
from shard_tools.curation.fingerprints import fingerprint_shards
from shard_tools.curation.leakage import MAX_DISTANCE, find_leaks, near_duplicates, show_leaks
from shard_tools.dataset.demo_truth import TRUTH, read_columns
from shard_tools.remote.filesystem import is_remote
from shard_tools.shards.index import (
    Index,
    check_metadata,
    metadata_bytes,
    open_index,
    read_metadata,
    row_problems,
    splits_in,
)
from shard_tools.shards.state import FOLDER
from shard_tools.shards.tar import ShardCheck, check_shard, read_sample


@checked
def verify(shards: str, full: bool = False, leaks: bool = False,
           workers: Annotated[int | None, Range(1, 1024)] = None) -> int:
    """Checks the names, sizes and hashes of a folder of shards, and that index and shards fit. Returns 1 for a problem.

    Args:
        shards: the folder.
        full: also read and decode every cover and vector, and name the bad samples.
        leaks: also search for what is in two splits: a group (album), a cover, or near duplicates of one; a leak is a
            problem.
        workers: processes; none = one a core.
    """
    root = Path(shards)
    if is_remote(shards):
        raise ValueError(f"{shards}: expected a folder of this machine; what training reads from a URL is checked by "
                         "its SHA-256 as it comes")
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; expected one that shard_tools.pack has written")
    problems, indexes = _check_folder(root)
    checks = []
    for index in indexes:
        metadata, end = index.metadata, 0
        for shard in metadata["shards"]:
            start, end = end, end + shard["samples"]
            checks.append(ShardCheck(
                index.root / shard["name"], shard["bytes"], shard["sha256"], np.array(index.rows[start:end]) if full
                else None, metadata["resolution"], metadata["audio"]["dimension"] if metadata["audio"] else 0))
    with tqdm(total=len(checks), desc="verifying", unit=" shards") as bar:
        for found in run_tasks(check_shard, checks, min(workers or available_workers(), len(checks))):
            problems += found
            bar.update()
    for problem in problems:
        print(problem)
    samples = sum(len(index.rows) for index in indexes)
    print(f"{root}: {len(problems) or 'no'} problem(s) in {samples:,} samples, {len(checks):,} shards, "
          f"{sum(check.bytes for check in checks) / 1e6:,.1f} MB" + ("" if full else " (--full decodes every sample)"))
    if leaks and problems:
        print("leaks were not searched for: the problems come first")
    elif leaks:
        return _look_for_leaks(indexes, workers or available_workers())
    return 1 if problems else 0


def _look_for_leaks(indexes: list[Index], workers: int) -> int:
    covers = fingerprint_shards(indexes, workers)
    starts = np.cumsum([0, *(len(index.rows) for index in indexes)])

    def name_of(sample: int) -> str:
        number = int(np.searchsorted(starts, sample, side="right")) - 1
        index, row = indexes[number], indexes[number].rows[sample - starts[number]]
        with open(index.shards[row["shard"]], "rb") as file:
            return f"{index.split}/{index.metadata['genres'][row['genre']]}/{read_sample(file, row)[0]}"

    splits = np.repeat(np.arange(len(indexes)), np.diff(starts))
    groups = np.concatenate([index.rows["group"] for index in indexes])
    return show_leaks(find_leaks(splits, groups, covers, *near_duplicates(covers, MAX_DISTANCE)), name_of)


def _check_folder(root: Path) -> tuple[list[str], list[Index]]:
    """The problems of everything but the shards' contents, and the indexes that can be used."""
    problems, indexes = [], []
    if (root / FOLDER).exists():
        problems.append(f"{FOLDER}: unfinished; run the pack command again to go on")
    problems += [f"{path.name}: left by a killed run" for path in sorted(root.glob(".*.tmp"))]
    if os.path.lexists(root / TRUTH):
        try:
            read_columns(root / TRUTH, TRUTH)
        except ValueError as error:
            problems.append(str(error))
    if not (splits := list(splits_in(root))):
        problems.append("no <split>.index.json: not a finished folder of shards")
    expected: set[str] = set()
    for split in splits:
        path, rows = root / f"{split}.index.json", root / f"{split}.index.npy"
        try:
            metadata = read_metadata(path)
            if path.read_bytes() != metadata_bytes(metadata):  # a flipped bit can leave JSON that means the same
                raise ValueError(f"{path.name} is not as it was written; pack the shards again")
            check_metadata(metadata, split)
            if _sha256(rows) != metadata["rows_sha256"]:
                raise ValueError(f"{rows.name} is missing or not what was written; pack the shards again")
            index = open_index(root, split)
        except (ValueError, OSError) as error:
            problems.append(f"{split}.index: {error}")
            continue
        indexes.append(index)
        expected |= {shard["name"] for shard in index.metadata["shards"]}
        problems += [f"{missing}.index.json: missing; {split} was packed together with it"
                     for missing in set(index.metadata["splits"]).difference(splits)]
        problems += [f"{split}.index.npy: {problem}" for problem in row_problems(index)]
        if _sha256(root / QUARANTINE) != index.metadata["quarantine_sha256"]:
            problems.append(f"{QUARANTINE}: missing or not what was written")
    if len(indexes) == len(splits):  # otherwise it is not known which shards belong here
        expected |= {f"{split}.index.npy" for split in splits}
        problems += [f"{path.name}: belongs to no index" for kind in ("*.tar", "*.index.npy")
                     for path in sorted(root.glob(kind)) if path.name not in expected]
    return list(dict.fromkeys(problems)), indexes


def _sha256(path: Path) -> str:
    """The hash of a file, "" where there is none that can be read."""
    with contextlib.suppress(OSError):
        return file_sha256(path)
    return ""


if __name__ == "__main__":
    cli.run(verify)
