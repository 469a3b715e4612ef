"""Batches of covers and audio."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Batch(NamedTuple):
    """One rank's part of a global batch."""

    cover: Tensor  # uint8 [B, 3, R, R]
    audio: Tensor | None  # float32 [B, A] as AudioNormalizer gives it
    genre: Tensor  # int64 [B], number in the sorted list of genres
    group: Tensor  # int64 [B], album
    mismatched: Tensor | None = None  # [B, A], of a track of another album for each, where the model asked for it


def downscale(cover: Tensor, resolution: int) -> Tensor:
    """uint8 covers ``[B, 3, S, S]`` at a smaller side length, by averaging areas."""
    if cover.shape[-1] == resolution:
        return cover
    return F.interpolate(cover.float(), size=(resolution, resolution), mode="area").round_().to(torch.uint8)
