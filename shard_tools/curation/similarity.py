"""Which covers are near-duplicates: pairs by perceptual hash and by tiny image, each verified by aligning the two.

dHash and images of 4 x 4 are blind: to them all flat, dark or simple pictures are alike. They only propose pairs; the
two of a pair are then laid upon each other at 32 x 32 pixels, as well as a small shift, a small zoom and another
brightness can do it, and what then still differs, but for one corner of the size of a badge, must be little beside what
the pictures show.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.spatial import cKDTree

SAME_LIMIT, CHAIN_LIMIT = 1.0, 1.5  # differences: below, one picture; below, perhaps, where a third is like both
FARTHEST = 9.0  # stands for a difference that isn't worth measuring
# Measured on drawn and real covers (tests/shard_tools/test_dedup.py). What may be left over, as a share of the broad
# contrast (of 8 x 8 cells) and of the detail below it: an eye notices other shadings at once, detail suffers from any
# handling.
_BROAD, _DETAIL = 0.15, 0.42
_CELLS, _COARSE = (0.3, 2.0), 0.5  # what is left over at 4 x 4, as share and levels, and at 16 x 16, of contrast
_GAIN, _SHIFT, _ZOOM, _BRIGHTER = 0.15, 0.016, 0.032, 35.0  # the most that is evened out; of the side; levels
_PLAIN, _LEAST, _SAME = 1.0, 0.6, 2  # levels: contrast of a flat picture; always allowed; what nobody notices
_NEIGHBOURS, _REACH, _WIDE, _AXES = 10, 100.0, 24, 16
_BITS = 64
_COUNT = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(1, dtype=np.uint8)
_SHARED = 3  # bands that a pair has in common at least; with 3 of 7 a key has 27 bits, so that few pairs are compared


def duplicates_by_hash(fingerprints: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs with dHashes at most ``distance`` bits apart, int64 ``[P, 2]`` each: near-duplicates, and collisions, which
    are different pictures all the same. Whether a pair is one depends on the two alone, not on what else there is."""
    pairs = close_pairs(fingerprints["dhash"], distance)
    same = differences(fingerprints["thumbnail"], pairs) < SAME_LIMIT
    return pairs[same], pairs[~same]


def duplicates_by_tiny_image(fingerprints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Near-duplicates among each picture's 10 nearest by tiny image, int64 ``[P, 2]``, and their L1 distances there.

    L1 is the sum of absolute differences in levels, float32 ``[P]``. Neighbours are searched for along the main axes.
    Source: J. Bustos, "Towards album artwork generation based on audio" (2020), which takes any near neighbour for a
    duplicate.
    """
    tiny = tiny_images(fingerprints["thumbnail"])
    if len(tiny) < 2:
        return np.zeros((0, 2), np.int64), np.zeros(0, np.float32)
    exact = tiny.astype(np.float64)
    axes = np.linalg.eigh(np.cov(exact.T))[1][:, ::-1][:, :_AXES]
    points = exact @ axes
    found = cKDTree(points).query(points, k=min(_WIDE + 1, len(tiny)), distance_upper_bound=_REACH)[1]
    one, nth = np.nonzero(found < len(tiny))
    other = found[one, nth]
    one, other = one[one != other], other[one != other]
    far = np.abs(tiny[one] - tiny[other]).sum(1)
    order = np.lexsort((other, far, one))
    one, other, far = one[order], other[order], far[order]
    rank = np.arange(len(one)) - np.searchsorted(one, one)
    nearest = rank < _NEIGHBOURS
    pairs, first = np.unique(np.sort(np.stack([one, other], 1)[nearest], axis=1), axis=0, return_index=True)
    same = differences(fingerprints["thumbnail"], pairs) < SAME_LIMIT
    return pairs[same], far[nearest][first[same]]


def hamming(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The number of bits in which hashes differ, uint64 ``[N]`` each, as uint8 ``[N]``."""
    return _COUNT[(one ^ other).view(np.uint16).reshape(-1, 4)].sum(1, dtype=np.uint8)


def close_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """All pairs of hashes that differ in ``distance`` bits or fewer, int64 ``[P, 2]``, rows ``i < j`` in order.

    Exact: hashes that differ in d bits agree in 3 of d + 3 bands of bits, whichever bits those are. Hashes that are
    equal give all their pairs: 10,000 black covers give 50 million. Hashes are uint64 ``[N]``, the distance 61 at most.
    """
    values, which = np.unique(np.ascontiguousarray(hashes, np.uint64), return_inverse=True)
    codes = [np.zeros(0, np.int64)]  # of pairs of distinct hashes, some several times
    edges = np.linspace(0, _BITS, distance + _SHARED + 1).round().astype(int).tolist()
    bands = [((1 << high) - 1) ^ ((1 << low) - 1) for low, high in pairwise(edges)]
    for chosen in combinations(bands, _SHARED) if distance else ():
        keys = values & np.uint64(sum(chosen))
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        at, step = np.arange(len(keys)), 1
        while len(at := at[at + step < len(keys)]):  # those whose key the one `step` further on has too
            at = at[keys[at] == keys[at + step]]
            one, other = order[at], order[at + step]
            near = hamming(values[one], values[other]) <= distance
            codes.append(np.minimum(one, other)[near] * len(values) + np.maximum(one, other)[near])
            step += 1
    codes = np.unique(np.concatenate(codes))
    return _expand(np.stack([codes // max(1, len(values)), codes % max(1, len(values))], 1), which)


def _expand(pairs: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Pairs of items from pairs of distinct values and the value of each item, those of equal values among them."""
    order = np.argsort(which, kind="stable")
    counts = np.bincount(which)
    starts = np.cumsum(counts) - counts
    pairs = np.concatenate([pairs, np.repeat(np.flatnonzero(counts > 1)[:, None], 2, 1)])
    sizes = counts[pairs[:, 0]] * counts[pairs[:, 1]]
    nth = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    first, second = np.repeat(pairs, sizes, 0).T
    items = np.stack([order[starts[first] + nth // counts[second]], order[starts[second] + nth % counts[second]]], 1)
    items = np.sort(items[(first != second) | (items[:, 0] < items[:, 1])], axis=1)
    return items[np.lexsort((items[:, 1], items[:, 0]))]


def tiny_images(thumbnails: np.ndarray) -> np.ndarray:
    """Thumbnails ``[N, 32, 32, 3]`` at 4 x 4 with their mean level taken off, float32 ``[N, 48]``."""
    cells = _downscale(thumbnails, 4).reshape(len(thumbnails), -1)
    return cells - cells.mean(1, keepdims=True)


def differences(thumbnails: np.ndarray, pairs: np.ndarray, limit: float = SAME_LIMIT) -> np.ndarray:
    """How different the pictures of pairs are, float32 ``[P]``: the residual of the best alignment, 0 = none, 1 = as
    much as may be left between copies of one picture. What is clearly above the limit is given as ``FARTHEST``.

    Thumbnails are uint8 ``[N, 32, 32, 3]``, pairs int64 ``[P, 2]``.
    """
    result = np.full(len(pairs), FARTHEST, np.float32)
    tiny = tiny_images(thumbnails)
    left = _filter(pairs, 50_000, lambda part: _cells_agree(tiny, part, limit))
    left = left[_filter(pairs[left], 64, lambda part: _coarsely_similar(*thumbnails[part.T], limit))]
    for start in range(0, len(left), 32):
        part = left[start:start + 32]
        result[part] = _residual(*thumbnails[pairs[part].T])
    return result


def _filter(pairs: np.ndarray, step: int, test: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The positions of the pairs that pass a test, which is given some at a time."""
    found = [start + np.flatnonzero(test(pairs[start:start + step])) for start in range(0, len(pairs), step)]
    return np.concatenate([*found, np.zeros(0, np.int64)])


def _downscale(pictures: np.ndarray, side: int) -> np.ndarray:
    """Square pictures ``[N, S, S, 3]`` at another side, float32 ``[N, 3, side, side]``."""
    count, before = pictures.shape[:2]
    rows = pictures.reshape(count, side, before // side, -1).mean(2, dtype=np.float32)
    cells = rows.reshape(count, side, side, before // side, 3).mean(3)
    return np.ascontiguousarray(cells.transpose(0, 3, 1, 2))


def _cells_agree(tiny: np.ndarray, pairs: np.ndarray, limit: float) -> np.ndarray:
    """Whether tiny images agree in 14 of their 16 cells, as far as their contrast lets one tell."""
    one, other = tiny[pairs.T]
    apart = np.partition(((one - other) ** 2).reshape(-1, 3, 16).mean(1), 13, axis=1)[:, :14].mean(1)
    contrast = np.sqrt(np.minimum((one**2).mean(1), (other**2).mean(1)))
    return np.sqrt(apart) < limit * (_CELLS[0] * contrast + _CELLS[1])


def _coarsely_similar(one: np.ndarray, other: np.ndarray, limit: float) -> np.ndarray:
    """Whether thumbnails are worth comparing at their full size."""
    error, contrast = _align(_downscale(one, 16), _downscale(other, 16))
    return (error < limit * _COARSE * np.maximum(contrast, 1.5)) | _identical(one, other)


def _residual(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The differences of thumbnails, float32 ``[P]``."""
    whole = [_downscale(picture, picture.shape[1]) for picture in (one, other)]
    error, contrast = _align(*whole)
    broad = np.maximum(*(_contrast(_downscale(picture, 8)) / np.maximum(_contrast(full), 0.1)
                         for picture, full in zip((one, other), whole, strict=True))).clip(0, 1)
    found = error / np.maximum(contrast * (_BROAD * broad + _DETAIL * np.sqrt(1 - broad**2)), _LEAST)
    found[contrast < _PLAIN] = FARTHEST
    found[_identical(one, other)] = 0
    return np.minimum(found, FARTHEST)


def _identical(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether nobody could tell them apart: the only way for flat pictures, which have no contrast to tell by."""
    return np.abs(one.astype(np.int16) - other).max((1, 2, 3)) <= _SAME


def _contrast(pictures: np.ndarray) -> np.ndarray:
    flat = pictures.reshape(len(pictures), 3, -1)
    flat = flat - flat.mean(2, keepdims=True)
    return np.sqrt((flat**2).mean((1, 2)))


def _align(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The residual of pictures, float32 ``[P, 3, S, S]``, after alignment, and the lesser contrast; levels ``[P]``.

    ``other - one`` is fitted by least squares as a change of contrast and brightness, and a shift and zoom along either
    axis (first-order, as optical flow does it); then again without the window of a fifth of the side that fits worst.
    """
    count, _, side, _ = one.shape
    middle, across = (one + other) / 2, np.linspace(-1, 1, side, dtype=np.float32)
    parts = np.empty((count, 7, 3, side, side), np.float32)  # the six changes, and what they are to explain
    parts[:, 0], parts[:, 1], parts[:, 6] = one - 128, 1, other - one
    parts[:, 4], parts[:, 2] = np.gradient(middle, axis=(2, 3))
    parts[:, 3], parts[:, 5] = parts[:, 2] * across, parts[:, 4] * across[:, None]
    flat = parts.reshape(count, 7, -1)
    products = flat @ flat.transpose(0, 2, 1)
    error = ((_weights(products, side)[:, None] @ flat).reshape(count, 3, side, side) ** 2).sum(1)
    window = _worst_window(error, side * 3 // 16)
    lost = parts.transpose(0, 3, 4, 1, 2)[window].reshape(count, -1, 7, 3)  # [P, W, 7, 3]
    area = side * side - lost.shape[1]
    sums = parts[:, (0, 6)].sum((3, 4)) - lost[:, :, (0, 6)].sum(1)  # [P, 2, 3]
    lost = lost.transpose(0, 2, 1, 3).reshape(count, 7, -1)
    products = (products - lost @ lost.transpose(0, 2, 1)).astype(np.float64)
    weights = _weights(products, side)
    left = np.sqrt(np.maximum(np.einsum("pi,pij,pj->p", weights, products, weights), 0) / (3 * area))
    left[np.abs(sums[:, 1]).max(1) > _BRIGHTER * area] = np.inf
    powers = (products[:, 0, 0], products[:, 0, 0] + 2 * products[:, 0, 6] + products[:, 6, 6])
    means = (sums[:, 0] / area, (sums[:, 0] + sums[:, 1]) / area)
    spread = np.minimum(*(power / (3 * area) - (mean**2).mean(1) for power, mean in zip(powers, means, strict=True)))
    return left, np.sqrt(np.maximum(spread, 0))


def _weights(products: np.ndarray, side: int) -> np.ndarray:
    """How much of each part makes up what can't be explained, ``[P, 7]``, from the parts' products ``[P, 7, 7]``."""
    most = np.array([_GAIN, np.inf, *2 * (_SHIFT * side, _ZOOM * side)], products.dtype)
    ridge = np.diag(np.array([2, 0.01, 0.1, 0.1, 0.1, 0.1], products.dtype)) * 3 * side**2
    change = np.linalg.solve(products[:, :6, :6] + ridge, products[:, :6, 6:])[..., 0].clip(-most, most)
    change[:, 1] += (products[:, 1, 6] - (products[:, 1, :6] * change).sum(1)) / products[:, 1, 1]
    return np.concatenate([-change, np.ones_like(change[:, :1])], 1)


def _worst_window(error: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Picture, row and column ``[P, size, size]`` of the pixels of the window with the largest error ``[P, S, S]``."""
    sums = sliding_window_view(sliding_window_view(error, size, 1).sum(-1), size, 2).sum(-1)
    top, left = np.unravel_index(sums.reshape(len(sums), -1).argmax(1), sums.shape[1:])
    steps = np.arange(size)
    picture, top, left = np.arange(len(error))[:, None, None], top[:, None, None], left[:, None, None]
    return tuple(np.broadcast_arrays(picture, top + steps[:, None], left + steps))
