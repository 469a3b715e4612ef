"""What a picture looks like: a picture in, a few numbers that tell it from others out; many of those in, pairs out."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image

from shard_tools.core.errors import BadFileError
from shard_tools.core.files import hash64, write_atomically
from shard_tools.core.quarantine import Drop
from shard_tools.dataset.images import COVER_BYTES, MAX_PIXELS, claimed_size, load, to_rgb, upright
from shard_tools.dataset.source import Entry, read_entry

VERSION = 1  # raise it whenever the same file gives another print

SIDE = 32
# pixels: width x height of the picture as it is. small: the picture, upright, squeezed to SIDE x SIDE.
PICTURE_DTYPE = np.dtype([("dhash", "<u8"), ("pixels", "<u8"), ("small", "u1", (SIDE, SIDE, 3))])
FINGERPRINT_DTYPE = np.dtype([("sound", "?"), ("hash", "<u8"), ("print", PICTURE_DTYPE)])  # hash: of the file's bytes
BITS = 64
_COUNT = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(1, dtype=np.uint8)
_SHARED = 3  # bands that a pair has in common at least; with 3 of 7 a key has 27 bits, so that few pairs are looked at


def fingerprint(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int, np.ndarray]:
    """What the bytes of a cover look like, the fields of a ``PICTURE_DTYPE``. A large JPEG is decoded at a part of its size.

    Raises:
        BadFileError: as of ``codec.probe_cover``.
    """
    image, turn, _ = load(data, max_pixels, SIDE)
    width, height = claimed_size(data) if image.format == "JPEG" else image.size
    image = upright(to_rgb(image), turn)
    return dhash(image), width * height, np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


class FingerprintTask(NamedTuple):
    """Some covers of a source, and the folder in which their prints are kept for the next run."""

    source: Path
    entries: tuple[Entry, ...]
    memory: Path
    max_pixels: int

    @property
    def path(self) -> Path:
        """Where the prints are kept: a name that changes with any of the files."""
        what = json.dumps([VERSION, self.max_pixels, str(self.source), self.entries])
        return self.memory / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.npy"


def fingerprint_chunk(task: FingerprintTask) -> tuple[np.ndarray, list[Drop]]:
    """What some covers look like, ``FINGERPRINT_DTYPE`` ``[n]``, and why those that are not sound can't be used.

    Each file is read once; one that has the bytes of another is not decoded again.
    """
    rows = _remembered(task)
    known = rows is not None
    rows = rows if known else np.zeros(len(task.entries), FINGERPRINT_DTYPE)
    drops, seen = [], {}
    for i, entry in enumerate(task.entries):
        if rows["sound"][i]:
            continue
        try:
            data = read_entry(task.source, entry, COVER_BYTES)
            value = hash64(data)
            if value not in seen:
                seen[value] = fingerprint(data, task.max_pixels)
            rows[i] = (True, value, seen[value])
        except BadFileError as error:
            drops.append(Drop(entry.path, "cover", error.reason, error.detail))
    if not known:
        output = io.BytesIO()
        np.save(output, rows, allow_pickle=False)
        write_atomically(task.path, output.getvalue())
    return rows, drops


def _remembered(task: FingerprintTask) -> np.ndarray | None:
    try:
        rows = np.load(task.path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return rows if rows.dtype == FINGERPRINT_DTYPE and rows.shape == (len(task.entries),) else None


def dhash(image: Image.Image) -> int:
    """The difference hash of a picture, 64 bits: whether each of 8 x 8 places is darker than the one right of it.

    Source: http://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html, by imagehash.
    """
    return int.from_bytes(np.packbits(imagehash.dhash(image, 8).hash).tobytes(), "big")


def hamming(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The number of bits in which hashes differ, uint64 ``[N]`` each, as uint8 ``[N]``."""
    return _COUNT[(one ^ other).view(np.uint16).reshape(-1, 4)].sum(1, dtype=np.uint8)


def close_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """All pairs of hashes that differ in ``distance`` bits or fewer, int64 ``[P, 2]``, rows ``i < j`` in order.

    Exact: hashes that differ in d bits agree in 3 of d + 3 bands of bits, whichever bits those are. Hashes that are
    equal give all their pairs: 10,000 all-black covers give 50 million.

    Args:
        hashes: uint64 ``[N]``.
        distance: bits, 0 to 61.
    """
    values, place = np.unique(np.ascontiguousarray(hashes, np.uint64), return_inverse=True)
    codes = [one * len(values) + other for one, other in _close(values, distance)]
    codes = np.unique(np.concatenate([*codes, np.zeros(0, np.int64)]))
    return _expand(np.stack([codes // max(1, len(values)), codes % max(1, len(values))], 1), place)


def _close(values: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields pairs of places of distinct hashes that are close, some of them several times and either way round."""
    edges = np.linspace(0, BITS, distance + _SHARED + 1).round().astype(int).tolist()
    bands = [((1 << high) - 1) ^ ((1 << low) - 1) for low, high in pairwise(edges)]
    for chosen in combinations(bands, _SHARED) if distance else ():
        keys = values & np.uint64(sum(chosen))
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        at, step = np.arange(len(keys)), 1
        while len(at := at[at + step < len(keys)]):  # those whose key the place `step` further on has too
            at = at[keys[at] == keys[at + step]]
            one, other = order[at], order[at + step]
            near = hamming(values[one], values[other]) <= distance
            yield np.minimum(one, other)[near], np.maximum(one, other)[near]
            step += 1


def _expand(pairs: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Pairs of distinct values, and the value of each item, as pairs of items, with those of equal values."""
    order = np.argsort(place, kind="stable")
    counts = np.bincount(place)
    starts = np.cumsum(counts) - counts
    pairs = np.concatenate([pairs, np.repeat(np.flatnonzero(counts > 1)[:, None], 2, 1)])
    sizes = counts[pairs[:, 0]] * counts[pairs[:, 1]]
    nth = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    first, second = np.repeat(pairs, sizes, 0).T
    items = np.stack([order[starts[first] + nth // counts[second]], order[starts[second] + nth % counts[second]]], 1)
    items = np.sort(items[(first != second) | (items[:, 0] < items[:, 1])], axis=1)
    return items[np.lexsort((items[:, 1], items[:, 0]))]
