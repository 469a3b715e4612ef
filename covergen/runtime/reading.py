"""Bytes of shards: a file's place in, bytes and pixels out, from many threads at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RGB = 3  # torchvision.io.ImageReadMode.RGB


@cache
def _decoder() -> Callable[[Tensor, int], Tensor]:
    """What torchvision.io.decode_jpeg calls, without the ten microseconds that its checks take of the interpreter lock.

    torchvision takes two seconds to import, which nobody who only generates covers needs to wait for.
    """
    import torchvision.io  # noqa: F401  (registers the operator)
    return torch.ops.image.decode_jpeg.default


def decode(jpeg: Tensor) -> Tensor:
    """The bytes of a JPEG, uint8 ``[n]``, as pixels, uint8 ``[3, H, W]``."""
    return _decoder()(jpeg, RGB)


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
