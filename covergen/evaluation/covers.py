"""Real covers that a reader learns from and is tested on: shards in; pixels, genres, attributes and variations out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from covergen.evaluation.predictor import known
from covergen.runtime.data import IndexedShards, shrink
from covergen.runtime.truth import Truth

SIDE = 64  # pixels: larger covers are averaged down to it
AT_ONCE = 256  # covers that are read together
SHIFT, GRAIN = 1 / 16, 0.1  # how far training covers are shifted, as a share of the side, and the noise on them
MIRRORED = "stripe_angle"  # the attribute that changes its sign in a mirrored cover


@dataclass(frozen=True)
class Covers:
    """Different covers: pixels uint8 ``[N, 3, S, S]``; genres ``[N]``, -1 for unknown; attributes ``[N, A]`` or None;
    albums ``[N]``."""

    pixels: Tensor
    genres: Tensor
    values: Tensor | None
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def part(self, places: np.ndarray) -> Covers:
        """Those at some places."""
        values = None if self.values is None else self.values[places]
        return Covers(self.pixels[places], self.genres[places], values, self.groups[places])


def read_covers(shards: IndexedShards, resolution: int, truth: Truth | None, count: int, seed: int) -> Covers:
    """At most ``count`` covers, drawn at random, of the rows that the shards were opened for.

    Raises:
        ValueError: the shards' covers are smaller than ``resolution``, or the truth does not know them.
    """
    if resolution > shards.resolution:
        raise ValueError(f"{shards.index.root} has covers of {shards.resolution} px, {resolution} px are needed")
    index = shards.index.rows
    rows = shards.chosen[np.unique(index["cover_hash"][shards.chosen], return_index=True)[1]]
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:count])
    side = min(resolution, SIDE)
    pixels = [shrink(shrink(shards.read(rows[start:start + AT_ONCE]).cover, resolution), side)
              for start in range(0, len(rows), AT_ONCE)]
    values = None if truth is None else torch.from_numpy(known(truth, shards, rows))
    return Covers(torch.cat(pixels), torch.from_numpy(shards.genres(rows)), values, index["group"][rows])


def changed(images: Tensor, values: Tensor | None, truth: Truth | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Training images ``[B, 3, S, S]`` shifted, mirrored and with noise, their attributes ``[B, A]``, and which are
    fit to learn genres from, bool ``[B]``."""
    count, side, device = len(images), images.shape[-1], images.device
    across, down = torch.rand(2, count) < 0.5
    plain = torch.ones(count, dtype=torch.bool)
    if truth is None:
        down = torch.zeros_like(down)
    elif MIRRORED in truth.names:
        place = truth.names.index(MIRRORED)
        values, plain = values.clone(), across == down  # both are half a turn, which changes no attribute
        offset = 2 * float(truth.mean[place] / truth.std[place])
        values[:, place] = torch.where(plain, values[:, place], -values[:, place] - offset)
    else:
        across, down = torch.zeros_like(across), torch.zeros_like(down)
    for which, axis in ((across, 3), (down, 2)):
        images = torch.where(which.to(device)[:, None, None, None], images.flip(axis), images)
    room = max(1, round(SHIFT * side))
    left, top = torch.randint(2 * room + 1, (2,)).tolist()
    images = F.pad(images, (room,) * 4, mode="reflect")[:, :, top:top + side, left:left + side]
    images = images + GRAIN * torch.rand(count, 1, 1, 1).to(device) * torch.randn(images.shape).to(device)
    return images, values, plain
