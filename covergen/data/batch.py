"""Batches of covers and audio, and what training reads them from."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from covergen.data.audio import AudioNormalizer
from covergen.data.corruption import CorruptionLog


class Batch(NamedTuple):
    """One rank's part of a global batch.

    cover: uint8 ``[B, 3, R, R]``; audio: float32 ``[B, A]`` as ``AudioNormalizer`` gives it, or None; genre:
    int64 ``[B]``, position in the sorted list of genres; group: int64 ``[B]``, album; mismatched: audio of a track of
    another album for each, float32 ``[B, A]``, where the model asked for it.
    """

    cover: Tensor
    audio: Tensor | None
    genre: Tensor
    group: Tensor
    mismatched: Tensor | None = None


class Stream(Protocol):
    """What training reads: ``batch(k)`` is this rank's part of the k-th global batch of the endless stream.

    resolution: side of the covers; samples: that are read; epoch: samples in an epoch, 0 if unknown; scale: of the
    audio, None without it; metadata: as in an index (samples, genres, audio); identity: the same for the same samples;
    pure: whether batches may be asked for in any order and from several threads; notice: what people should know of it,
    or None; damage: samples that were replaced because they can't be read.
    """

    resolution: int
    samples: int
    epoch: int
    scale: AudioNormalizer | None
    metadata: dict[str, Any]
    identity: str
    pure: bool
    notice: str | None
    corruption: CorruptionLog

    def batch(self, number: int) -> Batch: ...

    def mismatch(self) -> None:
        """From now on batches hold mismatched audio; ValueError where that can't be."""

    def ends(self, position: int) -> None:
        """No sample of the stream from this position on will be read."""


def downscale(cover: Tensor, resolution: int) -> Tensor:
    """uint8 covers ``[B, 3, S, S]`` at a smaller side length, by averaging areas."""
    if cover.shape[-1] == resolution:
        return cover
    return F.interpolate(cover.float(), size=(resolution, resolution), mode="area").round_().to(torch.uint8)
