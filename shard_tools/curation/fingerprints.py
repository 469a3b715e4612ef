"""Fingerprints of covers: the difference hash and a small copy of each picture, computed on several processes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from shard_tools.core.errors import BadFileError
from shard_tools.core.extras import need
from shard_tools.core.files import hash64, write_atomically
from shard_tools.core.parallel import run_tasks
from shard_tools.dataset.images import COVER_BYTES, MAX_PIXELS, claimed_size, load, to_rgb, upright
from shard_tools.dataset.source import Entry, read_entry
from shard_tools.shards.index import Index
from shard_tools.shards.tar import read_sample

VERSION = 1  # raise it whenever the same file gives another fingerprint

SIDE = 32
# hash: of the file's bytes, where it can be read. pixels: width x height of the picture as it is. thumbnail: the
# picture, upright, squeezed to SIDE x SIDE.
FINGERPRINT_DTYPE = np.dtype([("readable", "?"), ("decoded", "?"), ("hash", "<u8"), ("dhash", "<u8"), ("pixels", "<u8"),
                              ("thumbnail", "u1", (SIDE, SIDE, 3))])
CHUNK = 128  # covers of a task


class DistinctCovers(NamedTuple):
    """The covers of ``N`` samples, those with the same bytes once."""

    index: np.ndarray  # int64 ``[N]``, which of the distinct covers each sample has; -1 = its file can't be read
    fingerprints: np.ndarray  # ``FINGERPRINT_DTYPE`` ``[K]``, sorted by hash

    def select(self, samples: Sequence[int]) -> DistinctCovers:
        used, index = np.unique(self.index[samples], return_inverse=True)
        return DistinctCovers(index, self.fingerprints[used])

    def group_name(self, number: int) -> str:
        """What a group is called of which nothing is known but its cover."""
        return f"cover:{int(self.fingerprints['hash'][number]):016x}"


class FingerprintTask(NamedTuple):
    """Some covers."""

    source: Path  # a folder or zip, or a shard
    covers: tuple[Entry, ...] | np.ndarray  # files of the source, or rows of the shard's index
    max_pixels: int = MAX_PIXELS  # covers of more are not decoded
    cache: Path | None = None  # folder that stores the fingerprints of files for the next run

    @property
    def cache_path(self) -> Path:
        """A name that changes with any of the files."""
        key = json.dumps([VERSION, self.max_pixels, str(self.source), self.covers])
        return self.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"


def fingerprint_files(source: Path, covers: Sequence[Entry], workers: int, max_pixels: int = MAX_PIXELS,
                      cache: Path | None = None) -> tuple[DistinctCovers, dict[int, BadFileError]]:
    """Fingerprints files of a folder or zip; also returns, by position, the errors of those that can't be decoded.

    Results in ``cache`` of files that are not among the covers are removed.
    """
    tasks = [FingerprintTask(source, tuple(covers[i:i + CHUNK]), max_pixels, cache)
             for i in range(0, len(covers), CHUNK)]
    if cache:
        cache.mkdir(parents=True, exist_ok=True)
    hashes, readable, errors = np.zeros(len(covers), np.uint64), np.zeros(len(covers), bool), {}
    distinct: dict[int, np.ndarray] = {}
    start = 0
    for rows, bad in _run(tasks, len(covers), workers):
        hashes[start:start + len(rows)], readable[start:start + len(rows)] = rows["hash"], rows["readable"]
        errors |= {start + i: error for i, error in bad.items()}
        for value, i in zip(*np.unique(rows["hash"], return_index=True), strict=True):
            if rows["readable"][i] and int(value) not in distinct:
                distinct[int(value)] = rows[i:i + 1].copy()
        start += len(rows)
    if cache:
        for path in set(cache.iterdir()) - {task.cache_path for task in tasks}:
            path.unlink()
    fingerprints = np.concatenate([np.zeros(0, FINGERPRINT_DTYPE), *(distinct[value] for value in sorted(distinct))])
    return DistinctCovers(np.where(readable, np.searchsorted(fingerprints["hash"], hashes), -1), fingerprints), errors


def fingerprint_shards(indexes: Sequence[Index], workers: int) -> DistinctCovers:
    """Fingerprints the covers of packed samples, in the order of the indexes and their rows."""
    hashes, first, index = np.unique(np.concatenate([index.rows["cover_hash"] for index in indexes]),
                                     return_index=True, return_inverse=True)
    fingerprints = np.zeros(len(hashes), FINGERPRINT_DTYPE)
    tasks, positions, start = [], [], 0
    for opened in indexes:
        of_split = np.flatnonzero((first >= start) & (first < start + len(opened.rows)))
        rows = np.array(opened.rows[first[of_split] - start])
        start += len(opened.rows)
        for number, path in enumerate(opened.shards):
            in_shard = np.flatnonzero(rows["shard"] == number)
            if len(in_shard):
                tasks.append(FingerprintTask(path, rows[in_shard]))
                positions.append(of_split[in_shard])
    for position, (rows, _) in zip(positions, _run(tasks, len(hashes), workers), strict=True):
        fingerprints[position] = rows
    fingerprints["hash"] = hashes  # of the file that was packed, not of what it was packed as
    return DistinctCovers(index, fingerprints)


def _run(tasks: Sequence[FingerprintTask], total: int,
         workers: int) -> Iterator[tuple[np.ndarray, dict[int, BadFileError]]]:
    need("dedup", "imagehash")
    with tqdm(total=total, desc="fingerprints", unit=" covers", smoothing=0.05) as bar:
        for rows, errors in run_tasks(fingerprint_task, tasks, min(workers, len(tasks))):
            yield rows, errors
            bar.update(len(rows))


def fingerprint_task(task: FingerprintTask) -> tuple[np.ndarray, dict[int, BadFileError]]:
    """``FINGERPRINT_DTYPE`` ``[n]`` of some covers, and the errors of those that can't be read or decoded.

    Each file is read once; one that has the bytes of another is not decoded again.
    """
    rows, errors, known = None, {}, {}
    if task.cache:
        with contextlib.suppress(OSError, ValueError, EOFError):
            rows = np.load(task.cache_path, allow_pickle=False)
    is_cached = rows is not None and rows.dtype == FINGERPRINT_DTYPE and rows.shape == (len(task.covers),)
    rows = rows if is_cached else np.zeros(len(task.covers), FINGERPRINT_DTYPE)
    for i, read in enumerate(_readers(task)):
        if rows["decoded"][i]:
            continue
        try:
            data = read()
            rows["readable"][i], rows["hash"][i] = True, hash64(data)
            value = int(rows["hash"][i])
            if value not in known:
                known[value] = fingerprint(data, task.max_pixels)
            rows[i] = (True, True, value, *known[value])
        except BadFileError as error:
            errors[i] = error
    if task.cache and not is_cached:
        output = io.BytesIO()
        np.save(output, rows, allow_pickle=False)
        write_atomically(task.cache_path, output.getvalue())
    return rows, errors


def _readers(task: FingerprintTask) -> Iterator[Callable[[], bytes]]:
    """Yields a function for each cover that reads its bytes."""
    if isinstance(task.covers, tuple):
        for entry in task.covers:
            yield lambda entry=entry: read_entry(task.source, entry, COVER_BYTES)
        return
    with open(task.source, "rb") as shard:
        for row in task.covers:
            yield lambda row=row: read_sample(shard, row)[1]


def fingerprint(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int, np.ndarray]:
    """The ``dhash``, ``pixels`` and ``thumbnail`` of a cover's bytes. A large JPEG is decoded at a part of its size."""
    image, turn, _ = load(data, max_pixels, SIDE)
    width, height = claimed_size(data) if image.format == "JPEG" else image.size
    image = upright(to_rgb(image), turn)
    return dhash(image), width * height, np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def dhash(image: Image.Image) -> int:
    """The difference hash of a picture, 64 bits: whether each of 8 x 8 cells is darker than the one right of it.

    Source: http://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html, by imagehash.
    """
    import imagehash  # of an extra

    return int.from_bytes(np.packbits(imagehash.dhash(image, 8).hash).tobytes(), "big")
