"""Grids of samples and reconstructions, from the same noise, audio and covers all through a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from covergen.data.batch import Batch, downscale
from covergen.data.sampling import seed_of
from covergen.inference.images import to_unit
from covergen.models.base import Model

COLUMNS = 8
EXAMPLES = 32  # covers that grids of reconstructions show


class Grid(NamedTuple):
    """Covers ``[N, 3, R, R]`` in [0, 1], eight a row, and what each row shows (or nothing)."""

    name: str
    covers: Tensor
    labels: list[str]


class SampleGrids:
    """Draws the grids of a model; a private generator makes their noise."""

    def __init__(self, model: Model, examples: Batch, genres: list[str], resolution: int, device: torch.device,
                 seed: int) -> None:
        """The examples are reconstructed; the audio of the first eight makes the rows of a conditional model."""
        self.model = model
        count = len(examples.cover)
        whole = torch.arange(max(COLUMNS, count // COLUMNS * COLUMNS)) % count  # rows are full, if by repetition
        batch = Batch(*(None if part is None else part[whole].to(device) for part in examples))
        self.examples = batch._replace(cover=downscale(batch.cover, resolution))
        self.latents, self.audio, self.labels = {}, None, []
        rows = COLUMNS
        if model.conditional:
            rows = min(COLUMNS, count)
            self.audio = self.examples.audio[:rows].repeat_interleave(COLUMNS, 0)
            self.labels = [genres[genre] if genre >= 0 else "unknown" for genre in examples.genre[:rows].tolist()]
        if model.sample:
            noise = torch.Generator().manual_seed(seed_of(seed, "grid"))
            for name, truncation in [("noise", None), ("truncated", model.truncation)][:1 + bool(model.truncation)]:
                drawn = model.latents(COLUMNS * (1 if model.conditional else rows), noise, truncation)
                self.latents[name] = (drawn.repeat(rows, 1) if model.conditional else drawn).to(device)

    def draw(self, networks: dict[str, nn.Module]) -> Iterator[Grid]:
        """The grids of networks: samples (columns of a conditional model share noise), then reconstructions."""
        for name, latents in self.latents.items():
            images = self.model.sample(networks, latents, self.audio)
            yield Grid(name, to_unit(images, self.model.pixel_min), self.labels)
        if self.model.reconstruct:
            images = self.model.reconstruct(networks, self.examples)
            rows = [part for pair in zip(self.examples.cover.split(COLUMNS), images.split(COLUMNS), strict=True)
                    for part in (pair[0].float().cpu() / 255, to_unit(pair[1], 0.0))]
            yield Grid("reconstructions", torch.cat(rows), ["original", "model"] * (len(rows) // 2))
