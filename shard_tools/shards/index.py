"""The index beside a split's shards: ``<split>.index.json`` (metadata) and ``<split>.index.npy`` (one row a sample).

It adds to plain WebDataset tars what only reading them would show. The JSON is written after everything else, so a
folder that has ``<split>.index.json`` is complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shard_tools.core.files import atomic_path, open_regular, read_bounded, write_atomically
from shard_tools.dataset.layout import SPLITS

SCHEMA = 1

# One sample. Offsets are of the member's data inside its shard, in bytes; audio_bytes 0 = the sample has no vector.
# genre: position in the index's sorted list; group: album key hashed to 63 bits; cover_hash: of the cover as found.
# crc: zlib.crc32 of the cover's bytes and the vector's after them, as they lie in the shard.
ROW = np.dtype([
    ("shard", "<u4"), ("cover_offset", "<u8"), ("cover_bytes", "<u4"), ("audio_offset", "<u8"), ("audio_bytes", "<u4"),
    ("genre", "<i2"), ("group", "<i8"), ("cover_hash", "<u8"), ("crc", "<u4"),
])
SHARD_NAME = re.compile(r"([a-z]+)-(\d{5,})-of-(\d{5,})\.tar", re.ASCII)


@dataclass(frozen=True)
class Index:
    """An opened index.

    Attributes:
        root: folder of the shards.
        split: ``train``, ``val`` or ``test``.
        metadata: the JSON: schema, options, samples, groups, genres, genre_counts, resolution, audio (None, or
            dimension, blocks, presence_rule, mean and std over train), shards (name, samples, bytes, sha256 of each),
            drops (counts by reason).
        rows: ``[N]`` of ``ROW``, memory-mapped read-only.
    """

    root: Path
    split: str
    metadata: dict[str, Any]
    rows: np.ndarray

    @property
    def shards(self) -> list[Path]:
        return [self.root / shard["name"] for shard in self.metadata["shards"]]


def _digest(metadata: dict[str, Any]) -> str:
    body = {key: value for key, value in metadata.items() if key != "self_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_index(root: Path, split: str, metadata: dict[str, Any], count: int, rows: Iterable[np.ndarray]) -> None:
    """Writes ``count`` rows (parts ``[n]`` of ``ROW``, of which one at a time is held), then metadata (with the hash of
    the rows and their own), each atomically."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {
        "descr": np.lib.format.dtype_to_descr(ROW), "fortran_order": False, "shape": (count,)})
    digest = hashlib.sha256(header.getvalue())
    with atomic_path(root / f"{split}.index.npy") as temporary, open(temporary, "wb") as file:
        file.write(header.getvalue())
        for part in rows:
            assert part.dtype == ROW
            data = part.tobytes()
            file.write(data)
            digest.update(data)
    metadata = {"schema": SCHEMA, "split": split, **metadata, "rows_sha256": digest.hexdigest()}
    metadata["self_sha256"] = _digest(metadata)
    write_atomically(root / f"{split}.index.json", metadata_bytes(metadata))


def metadata_bytes(metadata: dict[str, Any]) -> bytes:
    """The one way in which metadata are written as JSON."""
    return (json.dumps(metadata, indent=1, sort_keys=True) + "\n").encode()


def read_metadata(path: Path | str, data: bytes | None = None) -> dict[str, Any]:
    """The checked JSON of an index: of a file, or ``data`` that were read already and come from there.

    ValueError where it is damaged, or was written by another version.
    """
    try:
        metadata = json.loads(read_bounded(path) if data is None else data)
        whole = metadata["self_sha256"] == _digest(metadata)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a shard index ({error}); pack the shards again") from None
    if not whole:
        raise ValueError(f"{path} is damaged: its own checksum does not fit; pack the shards again")
    if metadata["schema"] != SCHEMA:
        raise ValueError(f"{path} has schema {metadata['schema']}, this version reads {SCHEMA}; pack the shards again")
    return metadata


def open_index(root: str | Path, split: str) -> Index:
    """Opens the index of one split without reading its rows.

    FileNotFoundError where the folder has none; ValueError where it is damaged, or rows and metadata disagree.
    """
    root = Path(root)
    path = root / f"{split}.index.json"
    if not path.is_file():
        have = ", ".join(splits_in(root)) or "none"
        raise FileNotFoundError(f"{root} has no finished {split!r} split (found: {have}); make it: shard_tools.pack")
    metadata = read_metadata(path)
    try:
        open_regular(root / f"{split}.index.npy").close()
        rows = np.lib.format.open_memmap(root / f"{split}.index.npy", mode="r")  # refuses objects
    except Exception as error:  # the boundary to numpy, whose header may hold any literal
        raise ValueError(f"{root / f'{split}.index.npy'} can't be read ({error}); pack the shards again") from None
    if rows.dtype != ROW or rows.shape != (metadata["samples"],):
        raise ValueError(f"{root}: {split}.index.npy does not belong to {split}.index.json; pack the shards again")
    return Index(root, split, metadata, rows)


def splits_in(root: str | Path) -> Iterator[str]:
    """The finished splits of a folder, in the order train, val, test, then any other."""
    found = {path.name.removesuffix(".index.json") for path in Path(root).glob("*.index.json")}
    yield from (split for split in SPLITS if split in found)
    yield from sorted(found.difference(SPLITS))


_TYPES = {"samples": int, "groups": int, "resolution": int, "genres": list, "genre_counts": dict, "shards": list,
          "splits": list, "drops": dict, "quarantine_sha256": str, "rows_sha256": str}
_FEATURES = {"features": str, "version": int, "dimension": int, "options": dict, "excerpt": dict, "sha256": str}
_SHARD = {"name": str, "samples": int, "bytes": int, "sha256": str}


def check_metadata(metadata: dict[str, Any], split: str) -> None:
    """Raises ValueError, naming the entry, for metadata of another shape, and names that could lead out of the folder.

    The checksum inside protects against damage, not against whoever writes both.
    """
    for name, kind in _TYPES.items():
        _require(isinstance(metadata.get(name), kind), name)
    _require(metadata.get("split") == split and split in metadata["splits"], "split")
    for i, shard in enumerate(metadata["shards"]):
        _require(isinstance(shard, dict) and all(isinstance(shard.get(k), t) for k, t in _SHARD.items()), "shards")
        match = SHARD_NAME.fullmatch(shard["name"])
        _require(match and (match[1], int(match[2]), int(match[3])) == (split, i, len(metadata["shards"])), "shards")
        _require(shard["samples"] > 0 and shard["bytes"] > 0, "shards")
    _require(metadata["samples"] == sum(shard["samples"] for shard in metadata["shards"]) > 0, "samples")
    _require(metadata["genres"] == sorted(set(map(str, metadata["genres"]))), "genres")
    _require(all(is_plain_name(genre) for genre in metadata["genres"]), "genres")
    _require(all(isinstance(other, str) and other.isalpha() for other in metadata["splits"]), "splits")
    _require("audio" in metadata and is_audio(metadata["audio"]), "audio")
    if metadata["audio"]:
        counts = metadata["audio"].get("block_counts")
        _require(isinstance(counts, list) and len(counts) == len(metadata["audio"]["blocks"])
                 and all(isinstance(count, int) for count in counts), "audio")
    counts = [*metadata["genre_counts"].values(), *metadata["drops"].values()]
    _require(all(isinstance(count, int) for count in counts), "drops")


def is_audio(audio: Any, known: bool = True) -> bool:
    """Whether it is what metadata say of vectors: None, or their dimension, blocks that fill it, mean and standard
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
    """What the rows of an index say that its (checked) metadata deny; empty = they can be used."""
    rows, metadata = index.rows, index.metadata
    counts = [shard["samples"] for shard in metadata["shards"]]
    if not np.array_equal(rows["shard"], np.repeat(np.arange(len(counts)), counts)):
        return ["rows and shards do not belong together"]
    problems = []
    genres = metadata["genres"]
    labels = np.bincount(np.clip(rows["genre"], 0, len(genres)), minlength=len(genres))
    if (rows["genre"] < 0).any() or labels.tolist() != [metadata["genre_counts"].get(genre) for genre in genres]:
        problems.append("genres of the rows are not those that were counted")
    if len(np.unique(rows["group"])) != metadata["groups"]:
        problems.append("groups of the rows are not those that were counted")
    if ((rows["audio_bytes"] > 0) != (metadata["audio"] is not None)).any():
        problems.append("rows with and without vectors are mixed")
    return problems


def is_plain_name(name: str) -> bool:
    """Whether a name is one step down in a folder, and nothing else."""
    return name not in ("", ".", "..") and not set("/\\\0") & set(name)


def _require(condition: Any, name: str) -> None:
    if not condition:
        raise ValueError(f"{name!r} is not what shard_tools.pack writes; pack the shards again")
