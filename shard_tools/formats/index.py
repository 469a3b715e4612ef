"""The index beside a split's shards: ``<split>.index.json`` (facts) and ``<split>.index.npy`` (one row a sample).

Shards are plain WebDataset tars; the index adds what a tar can't tell without reading it: where every sample lies, its
genre, album and cover hash, the statistics of the audio, and the hash of every file. It is written last, the JSON after
everything else, so a folder that has ``<split>.index.json`` is complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = 1
SPLITS = ("train", "val", "test")

# One sample. Offsets are of the member's data inside its shard, in bytes; audio_bytes 0 = the sample has no vector.
# genre: position in the index's sorted list; group: album key hashed to 63 bits; cover_hash: of the cover as found.
# crc: zlib.crc32 of the cover's bytes and the vector's after them, as they lie in the shard.
ROW = np.dtype([
    ("shard", "<u4"), ("cover_offset", "<u8"), ("cover_bytes", "<u4"), ("audio_offset", "<u8"), ("audio_bytes", "<u4"),
    ("genre", "<i2"), ("group", "<i8"), ("cover_hash", "<u8"), ("crc", "<u4"),
])

GROUPS_BYTES = 2**30  # of a table of samples or groups; a line is 60 bytes or so
FACTS_BYTES = 2**27  # most bytes of a JSON that are read; 100,000 shards have 20 million
SHARD_NAME = re.compile(r"([a-z]+)-(\d{5,})-of-(\d{5,})\.tar", re.ASCII)


@dataclass(frozen=True)
class Index:
    """An opened index.

    Attributes:
        root: folder of the shards.
        split: ``train``, ``val`` or ``test``.
        facts: the JSON: schema, options, samples, groups, genres, genre_counts, resolution, audio (None, or dimension,
            blocks, presence rule, mean and std over train), shards (name, samples, bytes, sha256 each), drops.
        rows: ``[N]`` of ``ROW``, memory-mapped read-only.
    """

    root: Path
    split: str
    facts: dict[str, Any]
    rows: np.ndarray

    @property
    def shards(self) -> list[Path]:
        return [self.root / shard["name"] for shard in self.facts["shards"]]


def hash64(data: bytes) -> int:
    """The first 64 bits of SHA-256, little endian."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bounded(path: Path, limit: int = FACTS_BYTES) -> bytes:
    """The bytes of a regular file, which a FIFO or a device is not.

    Raises:
        OSError: it can't be read.
        ValueError: no regular file, or larger than the limit.
    """
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):  # a FIFO would be waited for
        raise ValueError("not a file")
    if facts.st_size > limit:
        raise ValueError(f"{facts.st_size:,} bytes, the limit is {limit:,}")
    return path.read_bytes()


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, syncs it and renames it into place: it is whole or absent."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _digest(facts: dict[str, Any]) -> str:
    body = {key: value for key, value in facts.items() if key != "self_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_index(root: Path, split: str, facts: dict[str, Any], count: int,
                rows: Iterable[np.ndarray]) -> None:
    """Writes rows, then facts (with the hash of the rows and their own), each atomically.

    Args: count: of the rows; rows: parts ``[n]`` of ``ROW``, of which one at a time is held.
    """
    rows_path = root / f"{split}.index.npy"
    temporary = root / f".{split}.index.npy.tmp"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {
        "descr": np.lib.format.dtype_to_descr(ROW), "fortran_order": False, "shape": (count,)})
    digest = hashlib.sha256(header.getvalue())
    with open(temporary, "wb") as file:
        file.write(header.getvalue())
        for part in rows:
            assert part.dtype == ROW
            data = part.tobytes()
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, rows_path)
    facts = {"schema": SCHEMA, "split": split, **facts, "rows_sha256": digest.hexdigest()}
    facts["self_sha256"] = _digest(facts)
    write_atomically(root / f"{split}.index.json", facts_bytes(facts))


def facts_bytes(facts: dict[str, Any]) -> bytes:
    """The one way in which facts are written as JSON."""
    return (json.dumps(facts, indent=1, sort_keys=True) + "\n").encode()


def read_facts(path: Path) -> dict[str, Any]:
    """The checked JSON of an index.

    Raises:
        ValueError: damaged, or written by another version.
    """
    try:
        facts = json.loads(read_bounded(path))
        whole = facts["self_sha256"] == _digest(facts)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a shard index ({error}); pack the shards again") from None
    if not whole:
        raise ValueError(f"{path} is damaged: its own checksum does not fit; pack the shards again")
    if facts["schema"] != SCHEMA:
        raise ValueError(f"{path} has schema {facts['schema']}, this version reads {SCHEMA}; pack the shards again")
    return facts


def local_root(root: str | Path, cache: str | Path | None = None, cache_gb: float | None = None) -> Path:
    """The folder where an index is: as given, or where that of a URL is kept, see ``elsewhere.local_index``."""
    if "://" not in str(root):
        return Path(root)
    from shard_tools.formats.elsewhere import local_index
    return local_index(str(root), cache, cache_gb)


def open_index(root: str | Path, split: str) -> Index:
    """Opens the index of one split without reading its rows.

    Raises:
        FileNotFoundError: the folder has no index for the split (says which it has).
        ValueError: damaged, or rows and facts disagree.
    """
    root = local_root(root)
    path = root / f"{split}.index.json"
    if not path.is_file():
        have = ", ".join(splits_in(root)) or "none"
        raise FileNotFoundError(f"{root} has no finished {split!r} split (found: {have}); make it: shard_tools.pack")
    facts = read_facts(path)
    try:
        if not (root / f"{split}.index.npy").is_file():  # a FIFO would be waited for
            raise ValueError("no such file")
        rows = np.lib.format.open_memmap(root / f"{split}.index.npy", mode="r")  # refuses objects
    except Exception as error:  # the boundary to numpy, whose header may hold any literal
        raise ValueError(f"{root / f'{split}.index.npy'} can't be read ({error}); pack the shards again") from None
    if rows.dtype != ROW or rows.shape != (facts["samples"],):
        raise ValueError(f"{root}: {split}.index.npy does not belong to {split}.index.json; pack the shards again")
    return Index(root, split, facts, rows)


def splits_in(root: str | Path) -> Iterator[str]:
    """The finished splits of a folder, in the order train, val, test, then any other."""
    found = {path.name.removesuffix(".index.json") for path in local_root(root).glob("*.index.json")}
    yield from (split for split in SPLITS if split in found)
    yield from sorted(found.difference(SPLITS))
