"""What finished shards amount to: their results in; the rows and facts of a split's index, and its groups, out.

Of a sample 17 bytes are held at once (group, cover hash, whether the group is an album), and twice that while they are
sorted; index rows come and go shard by shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from shard_tools.formats.blocks import PRESENCE_RULE, Moments
from shard_tools.formats.gather import GatherTask
from shard_tools.formats.packing import Packed, Tasks
from shard_tools.formats.recut import RecutTask
from shard_tools.formats.schema import Schema
from shard_tools.formats.shards import read_result


def settle_groups(tasks: Tasks) -> dict[str, np.ndarray]:
    """The group of every sample ``[n]`` int64 of each split; one without album key gets that of the album that has its
    cover, if there is one."""
    parts: dict[str, list[np.ndarray]] = {"group": [], "cover_hash": [], "album": []}
    ends = []
    for shards in tasks.values():
        for task in shards:
            result = read_result(task.result_path)
            parts["group"].append(result.rows["group"].copy())
            parts["cover_hash"].append(result.rows["cover_hash"].copy())
            parts["album"].append(result.album)
        ends.append(sum(map(len, parts["album"])))
    group, cover_hash, album = (np.concatenate(parts.pop(name)) for name in ("group", "cover_hash", "album"))
    _join(group, cover_hash, album)
    return dict(zip(tasks, np.split(group, ends[:-1]), strict=True))


def _join(group: np.ndarray, cover_hash: np.ndarray, album: np.ndarray) -> None:
    albums, others = np.flatnonzero(album), np.flatnonzero(~album)
    if not len(albums) or not len(others):
        return
    albums = albums[np.lexsort((group[albums], cover_hash[albums]))]
    hashes = cover_hash[albums]
    at = np.minimum(np.searchsorted(hashes, cover_hash[others]), len(hashes) - 1)  # the first = smallest group
    same = hashes[at] == cover_hash[others]
    group[others[same]] = group[albums[at[same]]]


def split_facts(shards: Sequence[GatherTask | RecutTask], genres: list[str], groups: np.ndarray) -> dict[str, Any]:
    """What an index says of one split."""
    counts, listed = np.zeros(len(genres), np.int64), []
    for task in shards:
        result = read_result(task.result_path)
        counts += np.bincount(result.rows["genre"], minlength=len(genres))
        listed.append({"name": task.name, "samples": len(result.rows), "bytes": result.bytes, "sha256": result.sha256})
    return {"samples": len(groups), "groups": len(np.unique(groups)), "shards": listed,
            "genre_counts": dict(zip(genres, counts.tolist(), strict=True))}


def split_rows(shards: Sequence[GatherTask | RecutTask], groups: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of one split's index, shard by shard."""
    start = 0
    for task in shards:
        rows = read_result(task.result_path).rows
        rows["group"] = groups[start:start + len(rows)]
        start += len(rows)
        yield rows


def audio_facts(packed: Packed, basis: str, schema: Schema | None) -> dict[str, Any] | None:
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
            "mean": mean.tolist(), "std": std.tolist(), **({"features": schema.facts()} if schema else {})}
