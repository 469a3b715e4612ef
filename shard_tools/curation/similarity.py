"""Which pictures are the same one for an eye: their prints in; pairs of them, and how far apart they are, out.

dHash and thumbnails of 4 x 4 are blind: to them all flat, dark or simple pictures are alike. They only propose pairs;
the two of a pair are then laid upon each other at 32 x 32 pixels, as well as a small shift, a small zoom and another
brightness can do it, and what then still differs, but for one corner of the size of a badge, must be little beside what
the pictures show.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.spatial import cKDTree

from shard_tools.curation.fingerprints import close_pairs

SAME_LIMIT, CHAIN_LIMIT = 1.0, 1.5  # differences: below, one picture; below, perhaps, where a third is like both
FARTHEST = 9.0  # stands for a difference that isn't worth measuring
# Measured on drawn and real covers (tests/test_dedup.py). What may be left over, as a share of the broad contrast (of
# 8 x 8 cells) and of the detail below it: shadings that differ are seen at once, detail suffers from any handling.
_BROAD, _DETAIL = 0.15, 0.42
_CELLS, _COARSE = (0.3, 2.0), 0.5  # what is left over at 4 x 4, as share and levels, and at 16 x 16, of contrast
_GAIN, _SHIFT, _ZOOM, _BRIGHTER = 0.15, 0.016, 0.032, 35.0  # the most that is evened out; of the side; levels
_PLAIN, _LEAST, _SAME = 1.0, 0.6, 2  # levels: contrast of a flat picture; always allowed; what nobody sees
_NEIGHBOURS, _REACH, _WIDE, _AXES = 10, 100.0, 24, 16


def same_pictures(prints: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs with dHashes at most ``distance`` bits apart, int64 ``[P, 2]`` each: one picture; and different ones.

    Whether a pair is one depends on the two alone, not on what else there is.

    Args:
        prints: ``fingerprints.PRINT`` ``[N]``.
        distance: bits.
    """
    pairs = close_pairs(prints["dhash"], distance)
    alike = differences(prints["small"], pairs) < SAME_LIMIT
    return pairs[alike], pairs[~alike]


def near_pairs(prints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that are one picture among each one's 10 nearest by thumbnail, int64 ``[P, 2]``, and the thumbnails' L1.

    Thumbnails are 4 x 4 x 3, their mean level taken off; L1 is the sum of absolute differences, float32 ``[P]``.
    Neighbours are looked for along the thumbnails' main axes. Source: J. Bustos, "Towards album artwork generation
    based on audio" (2020), which takes any near neighbour for a duplicate.
    """
    thumbs = thumbnails(prints["small"])
    if len(thumbs) < 2:
        return np.zeros((0, 2), np.int64), np.zeros(0, np.float32)
    exact = thumbs.astype(np.float64)
    axes = np.linalg.eigh(np.cov(exact.T))[1][:, ::-1][:, :_AXES]
    places = exact @ axes
    found = cKDTree(places).query(places, k=min(_WIDE + 1, len(thumbs)), distance_upper_bound=_REACH)[1]
    one, nth = np.nonzero(found < len(thumbs))
    other = found[one, nth]
    one, other = one[one != other], other[one != other]
    far = thumb_distance(thumbs, np.stack([one, other], 1))
    order = np.lexsort((other, far, one))
    one, other, far = one[order], other[order], far[order]
    rank = np.arange(len(one)) - np.searchsorted(one, one)
    chosen = rank < _NEIGHBOURS
    pairs, first = np.unique(np.sort(np.stack([one, other], 1)[chosen], axis=1), axis=0, return_index=True)
    alike = differences(prints["small"], pairs) < SAME_LIMIT
    return pairs[alike], far[chosen][first[alike]]


def thumbnails(small: np.ndarray) -> np.ndarray:
    """Small pictures ``[N, 32, 32, 3]`` as 3 x 4 x 4 with mean 0, float32 ``[N, 48]``."""
    cells = _shrunk(small, 4).reshape(len(small), -1)
    return cells - cells.mean(1, keepdims=True)


def thumb_distance(thumbs: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    return np.abs(thumbs[pairs[:, 0]] - thumbs[pairs[:, 1]]).sum(1)


def differences(small: np.ndarray, pairs: np.ndarray, limit: float = SAME_LIMIT) -> np.ndarray:
    """How different the pictures of pairs are, float32 ``[P]``: what the best overlay leaves, 0 = nothing, 1 = as much
    as may be left between copies of one picture. What is clearly above the limit is given as ``FARTHEST``.

    Args:
        small: uint8 ``[N, 32, 32, 3]``.
        pairs: int64 ``[P, 2]``.
        limit: up to which differences matter.
    """
    result = np.full(len(pairs), FARTHEST, np.float32)
    thumbs = thumbnails(small)
    left = _chosen(pairs, 50_000, lambda part: _cells_agree(thumbs, part, limit))
    left = left[_chosen(pairs[left], 64, lambda part: _coarsely(*(small[part[:, side]] for side in (0, 1)), limit))]
    for at in range(0, len(left), 32):
        part = left[at:at + 32]
        result[part] = _finely(*(small[pairs[part, side]] for side in (0, 1)))
    return result


def _chosen(pairs: np.ndarray, step: int, test: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The places of the pairs that pass a test, which is given some at a time."""
    found = [at + np.flatnonzero(test(pairs[at:at + step])) for at in range(0, len(pairs), step)]
    return np.concatenate([*found, np.zeros(0, np.int64)])


def _shrunk(small: np.ndarray, side: int) -> np.ndarray:
    """Square pictures ``[N, S, S, 3]`` at another side, float32 ``[N, 3, side, side]``."""
    count, before = small.shape[:2]
    rows = small.reshape(count, side, before // side, -1).mean(2, dtype=np.float32)
    cells = rows.reshape(count, side, side, before // side, 3).mean(3)
    return np.ascontiguousarray(cells.transpose(0, 3, 1, 2))


def _cells_agree(thumbs: np.ndarray, pairs: np.ndarray, limit: float) -> np.ndarray:
    """Whether thumbnails agree in 14 of their 16 cells, as far as their contrast lets one tell."""
    one, other = thumbs[pairs[:, 0]], thumbs[pairs[:, 1]]
    apart = np.partition(((one - other) ** 2).reshape(-1, 3, 16).mean(1), 13, axis=1)[:, :14].mean(1)
    contrast = np.sqrt(np.minimum((one**2).mean(1), (other**2).mean(1)))
    return np.sqrt(apart) < limit * (_CELLS[0] * contrast + _CELLS[1])


def _coarsely(one: np.ndarray, other: np.ndarray, limit: float) -> np.ndarray:
    """Whether small pictures are worth comparing finely."""
    error, contrast = _overlay(_shrunk(one, 16), _shrunk(other, 16))
    return (error < limit * _COARSE * np.maximum(contrast, 1.5)) | _identical(one, other)


def _finely(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The difference of small pictures, float32 ``[P]``."""
    whole = [_shrunk(picture, picture.shape[1]) for picture in (one, other)]
    error, contrast = _overlay(*whole)
    broad = np.maximum(*(_contrast(_shrunk(picture, 8)) / np.maximum(_contrast(full), 0.1)
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


def _overlay(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is left of pictures, float32 ``[P, 3, S, S]``, laid upon each other; the lesser contrast; levels ``[P]``.

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
    places = _worst_window(error, side * 3 // 16)
    lost = parts.transpose(0, 3, 4, 1, 2)[places].reshape(count, -1, 7, 3)  # [P, W, 7, 3]
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
    most = np.array([_GAIN, np.inf, _SHIFT * side, _ZOOM * side, _SHIFT * side, _ZOOM * side], products.dtype)
    ridge = np.diag(np.array([2, 0.01, 0.1, 0.1, 0.1, 0.1], products.dtype)) * 3 * side**2
    change = np.linalg.solve(products[:, :6, :6] + ridge, products[:, :6, 6:])[..., 0].clip(-most, most)
    change[:, 1] += (products[:, 1, 6] - (products[:, 1, :6] * change).sum(1)) / products[:, 1, 1]
    return np.concatenate([-change, np.ones_like(change[:, :1])], 1)


def _worst_window(error: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Picture, row and column ``[P, size, size]`` of the places of the window with the largest error ``[P, S, S]``."""
    sums = sliding_window_view(sliding_window_view(error, size, 1).sum(-1), size, 2).sum(-1)
    top, left = np.unravel_index(sums.reshape(len(sums), -1).argmax(1), sums.shape[1:])
    steps = np.arange(size)
    places = np.broadcast_arrays(np.arange(len(error))[:, None, None], top[:, None, None] + steps[:, None],
                                 left[:, None, None] + steps)
    return places[0], places[1], places[2]
