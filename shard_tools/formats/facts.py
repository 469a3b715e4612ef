"""The shape of an index: facts and rows that may come from anywhere in; what is wrong with them out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from shard_tools.formats.index import SHARD_NAME, Index

_TYPES = {"samples": int, "groups": int, "resolution": int, "genres": list, "genre_counts": dict, "shards": list,
          "splits": list, "drops": dict, "quarantine_sha256": str, "rows_sha256": str}
_FEATURES = {"features": str, "version": int, "dimension": int, "options": dict, "heard": dict, "sha256": str}
_SHARD = {"name": str, "samples": int, "bytes": int, "sha256": str}


def check_facts(facts: dict[str, Any], split: str) -> None:
    """Refuses facts of another shape, and names that could lead out of the folder.

    The checksum inside tells damage from no damage, not friend from foe.

    Raises:
        ValueError: naming the fact.
    """
    for name, kind in _TYPES.items():
        _require(isinstance(facts.get(name), kind), name)
    _require(facts.get("split") == split and split in facts["splits"], "split")
    for i, shard in enumerate(facts["shards"]):
        _require(isinstance(shard, dict) and all(isinstance(shard.get(k), t) for k, t in _SHARD.items()), "shards")
        match = SHARD_NAME.fullmatch(shard["name"])
        _require(match and (match[1], int(match[2]), int(match[3])) == (split, i, len(facts["shards"])), "shards")
        _require(shard["samples"] > 0 and shard["bytes"] > 0, "shards")
    _require(facts["samples"] == sum(shard["samples"] for shard in facts["shards"]) > 0, "samples")
    _require(facts["genres"] == sorted(set(map(str, facts["genres"]))), "genres")
    _require(all(is_plain_name(genre) for genre in facts["genres"]), "genres")
    _require(all(isinstance(other, str) and other.isalpha() for other in facts["splits"]), "splits")
    _require("audio" in facts and is_audio(facts["audio"]), "audio")
    if facts["audio"]:
        counts = facts["audio"].get("block_counts")
        _require(isinstance(counts, list) and len(counts) == len(facts["audio"]["blocks"])
                 and all(isinstance(count, int) for count in counts), "audio")
    _require(all(isinstance(n, int) for n in [*facts["genre_counts"].values(), *facts["drops"].values()]), "drops")


def is_audio(audio: Any, known: bool = True) -> bool:
    """Whether it is what facts say of vectors: None, or their dimension, blocks that fill it, mean and standard
    deviation (or, unless they must be ``known``, None), and perhaps what the numbers are."""
    if audio is None:
        return True
    if not isinstance(audio, dict) or type(audio.get("dimension")) is not int or audio["dimension"] < 1:
        return False
    for name in ("mean", "std"):
        numbers = audio.get(name)
        if (numbers is not None or known) and not (
                isinstance(numbers, list) and len(numbers) == audio["dimension"]
                and all(isinstance(number, float) and math.isfinite(number) for number in numbers)):
            return False
    blocks, features = audio.get("blocks"), audio.get("features", {})
    if not isinstance(blocks, list) or not blocks or not all(
            isinstance(block, list) and [type(edge) for edge in block] == [int, int] for block in blocks):
        return False
    edges = [edge for block in blocks for edge in block]
    return ([edges[0], edges[-1]] == [0, audio["dimension"]] and edges[1:-1:2] == edges[2::2]
            and edges == sorted(edges) and isinstance(features, dict)
            and all(isinstance(features.get(name), kind) for name, kind in _FEATURES.items() if features))


def row_problems(index: Index) -> list[str]:
    """What the rows of an index say that its (checked) facts deny; empty = they can be used."""
    rows, facts = index.rows, index.facts
    counts = [shard["samples"] for shard in facts["shards"]]
    if not np.array_equal(rows["shard"], np.repeat(np.arange(len(counts)), counts)):
        return ["rows and shards do not belong together"]
    problems = []
    labels = np.bincount(np.clip(rows["genre"], 0, len(facts["genres"])), minlength=len(facts["genres"]))
    if (rows["genre"] < 0).any() or labels.tolist() != [facts["genre_counts"].get(genre) for genre in facts["genres"]]:
        problems.append("genres of the rows are not those that were counted")
    if len(np.unique(rows["group"])) != facts["groups"]:
        problems.append("groups of the rows are not those that were counted")
    if ((rows["audio_bytes"] > 0) != (facts["audio"] is not None)).any():
        problems.append("rows with and without vectors are mixed")
    return problems


def is_plain_name(name: str) -> bool:
    """Whether a name is one step down in a folder, and nothing else."""
    return name not in ("", ".", "..") and not set("/\\\0") & set(name)


def _require(condition: Any, name: str) -> None:
    if not condition:
        raise ValueError(f"{name!r} is not what shard_tools.pack writes; pack the shards again")
