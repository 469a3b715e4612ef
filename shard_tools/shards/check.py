"""Checks one shard against its index."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shard_tools.core.errors import BadFileError
from shard_tools.core.files import file_sha256
from shard_tools.dataset.images import probe_cover
from shard_tools.dataset.vectors import parse_vector
from shard_tools.shards.index import SHARD_NAME
from shard_tools.shards.tar import read_sample


@dataclass(frozen=True)
class ShardCheck:
    """One shard to check: what the index says of it, and with ``full`` the rows of its samples."""

    path: Path
    bytes: int
    sha256: str
    rows: np.ndarray | None
    resolution: int
    dimension: int


def check_shard(check: ShardCheck) -> list[str]:
    """The problems of one shard, each as a line that begins with its name."""
    name = check.path.name
    assert SHARD_NAME.fullmatch(name)
    if not check.path.is_file():
        return [f"{name}: missing"]
    problems = []
    size = check.path.stat().st_size
    if size != check.bytes:
        problems.append(f"{name}: {size:,} bytes, expected {check.bytes:,}")
    elif file_sha256(check.path) != check.sha256:
        problems.append(f"{name}: its SHA-256 is not the index's: damaged or changed")
    if check.rows is not None:
        problems += [f"{name}: {problem}" for problem in _sample_problems(check)]
    return problems


def _sample_problems(check: ShardCheck) -> list[str]:
    """Reads every sample at its offset and decodes it; what lies between samples must be nothing."""
    problems, at, keys = [], 0, set()
    with open(check.path, "rb") as file:
        for i, row in enumerate(check.rows):
            try:
                key, cover, audio = read_sample(file, row)
                extents = [(int(row["cover_offset"]), len(cover))]
                if audio:
                    extents.append((int(row["audio_offset"]), len(audio)))
                for start, length in extents:
                    if start != at + tarfile.BLOCKSIZE:
                        raise BadFileError("damaged sample", f"{key}: a gap or an overlap before it")
                    at = start + length + -length % tarfile.BLOCKSIZE
                if key in keys:
                    raise BadFileError("damaged sample", f"{key}: the key occurs twice")
                keys.add(key)
                _decode(key, cover, audio, check)
            except BadFileError as error:
                problems.append(f"sample {i}: {error.detail}")
                ends = (int(row[f"{part}_offset"]) + int(row[f"{part}_bytes"]) for part in ("cover", "audio"))
                at = max(at, *(end + -end % tarfile.BLOCKSIZE for end in ends))  # go on with the next
        file.seek(min(at, check.bytes))
        if file.read(2 * tarfile.BLOCKSIZE + 1) != bytes(2 * tarfile.BLOCKSIZE):
            problems.append("its end is not where the last sample ends")
    return problems


def _decode(key: str, cover: bytes, audio: bytes, check: ShardCheck) -> None:
    try:
        info = probe_cover(cover)
        if not info.plain or (info.width, info.height) != (check.resolution, check.resolution):
            raise BadFileError("wrong cover", f"not a baseline RGB JPEG of {check.resolution} x {check.resolution}")
        if audio and not np.isfinite(parse_vector(audio, check.dimension)).all():
            raise BadFileError("not finite", "the vector holds NaN or infinity")
    except BadFileError as error:
        raise BadFileError("damaged sample", f"{key}: {error}") from None
