"""Bytes of shards: a file's place in, bytes and pixels out, from many threads at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

RGB = 3  # torchvision.io.ImageReadMode.RGB


@cache
def _fast() -> Callable[..., np.ndarray] | None:
    """A decoder that writes where it is told to and refuses what is cut or bent, where it is installed."""
    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        return None
    return decode_jpeg


@cache
def _general() -> Callable[[Any, int], Any]:
    """What torchvision.io.decode_jpeg calls, without the ten microseconds that its checks take of the interpreter lock.

    torchvision takes two seconds to import, which nobody who only generates covers needs to wait for.
    """
    import torch
    import torchvision.io  # noqa: F401  (registers the operator)
    return torch.ops.image.decode_jpeg.default


def decode(jpeg: bytearray | memoryview, out: np.ndarray | None = None) -> np.ndarray:
    """The bytes of a JPEG as pixels, uint8 ``[H, W, 3]``, in ``out`` where that is given; from many threads at once.

    Both decoders are libjpeg-turbo and give the same pixels of what packing writes; torchvision's decides about what
    the fast one refuses.

    Raises:
        RuntimeError: it can't be decoded.
        ValueError: it is not of the size of ``out``.
    """
    if fast := _fast():
        try:
            pixels = fast(jpeg, buffer=out)
            if out is None or pixels.shape == out.shape:
                return pixels
        except ValueError:
            pass
    import torch
    pixels = _general()(torch.frombuffer(jpeg, dtype=torch.uint8), RGB).permute(1, 2, 0).numpy()
    if out is None:
        return pixels
    if pixels.shape != out.shape:
        raise ValueError(f"a cover of {pixels.shape[1]} x {pixels.shape[0]}, expected {out.shape[1]} x {out.shape[0]}")
    out[:] = pixels
    return out


@lru_cache(maxsize=256)
def _opened(path: Path) -> Any:
    return open(path, "rb", buffering=0)


def read_at(path: Path, offset: int, size: int) -> bytearray:
    """``size`` bytes of a file from ``offset``; safe from many threads.

    Raises:
        ValueError: the file ends before.
    """
    return read_from(_opened(path), offset, size, path)


def read_from(file: Any, offset: int, size: int, name: object) -> bytearray:
    """The same of an opened file, which is held here: one that its cache drops must not close before this read."""
    data = bytearray(size)
    if os.preadv(file.fileno(), [data], offset) != size:
        raise ValueError(f"{name} ends before byte {offset + size}; it is damaged (shard_tools.verify tells more)")
    return data
