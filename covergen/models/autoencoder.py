"""Autoencoders of covers that differ in how they grow back: by resizing (``ae_resize``) or by unpooling
(``ae_transpose``, whose transposed convolutions leave checkerboards).

Source: J. Bustos 2020, "Towards album artwork generation based on audio"; each 260,867 parameters. They reconstruct and
encode; there is nothing to sample from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covergen.models.base import InputSpec, Model, ModelSpec, Phase, to_zero_one
from covergen.nn.autoencoders import Decoder, Encoder
from covergen.nn.layers import check_resolution
from covergen.nn.losses import psnr


@dataclass(frozen=True)
class Options:
    """What can be set about the model; the defaults are the thesis's."""

    width: int = field(default=32, metadata={"help": "channels of the first layer; the others have 2, 2 and 4 times"})


class Resize(nn.Module):
    """Images ``[B, 3, R, R]`` -> latents ``[B, 4 * width, R/8, R/8]`` -> images in [0, 1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(width, norm_last=False), Decoder(width, norm_last=False)

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def forward(self, images: Tensor) -> Tensor:
        return torch.sigmoid(self.decoder(self.encoder(images)).float())


class Transpose(nn.Module):
    """Images ``[B, 3, R, R]`` -> latents ``[B, 4 * width, R/8, R/8]`` and places of maxima -> images in [0, 1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [3, width, 2 * width, 2 * width, 4 * width]
        self.convs = nn.ModuleList(nn.Conv2d(size, out, 3, 1, 1) for size, out in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes[1:4])
        back = [*sizes[:0:-1], 3]
        self.back = nn.ModuleList(nn.ConvTranspose2d(size, out, 3, 1, 1) for size, out in pairwise(back))
        self.back_norms = nn.ModuleList(nn.BatchNorm2d(size) for size in back[1:4])

    def pooled(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The latents, and for each pooling where its maxima were."""
        maps, places = images, []
        for conv, norm in zip(self.convs[:-1], self.norms, strict=True):
            maps, place = F.max_pool2d(conv(maps), 2, return_indices=True)
            maps = F.leaky_relu(norm(maps))
            places.append(place)
        return F.leaky_relu(self.convs[-1](maps)), places

    def encode(self, images: Tensor) -> Tensor:
        return self.pooled(images)[0]

    def forward(self, images: Tensor) -> Tensor:
        maps, places = self.pooled(images)
        for conv, norm, place in zip(self.back[:-1], self.back_norms, reversed(places), strict=True):
            maps = F.leaky_relu(norm(F.max_unpool2d(conv(maps), place, 2)))
        return torch.sigmoid(self.back[-1](maps).float())


class ReconstructionPhase(Phase):
    """Trains an autoencoder: the mean squared error of an image's values, averaged over images."""

    name = "autoencoder"

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images = to_zero_one(batch.cover)
        errors = (self.autoencoder(images) - images).square().flatten(1).mean(1)
        loss = errors.mean()
        return loss, {"mse": loss.detach(), "psnr": psnr(errors.detach()).mean()}


def assemble(autoencoder: nn.Module, sizes: InputSpec) -> Model:
    """One network, one turn; validated by that turn's loss."""
    check_resolution(sizes.resolution)
    turn = ReconstructionPhase(autoencoder)
    return Model(
        {"autoencoder": autoencoder}, [turn], validation_phase=turn,
        reconstruct=lambda networks, batch: networks["autoencoder"](to_zero_one(batch.cover)),
        encode=lambda networks, batch: networks["autoencoder"].encode(to_zero_one(batch.cover)).flatten(1).float())


# The thesis trained both for 20 epochs and stopped after 4 without a better validation loss.
PRESET = {"batch_size": 32, "lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 1e-5, "ema": 0.0, "epochs": 20,
          "patience": 4}
DEMO = {"epochs": 10}

RESIZE = ModelSpec("autoencoder that resizes and convolves (thesis)", Options,
                lambda options, sizes: assemble(Resize(options.width), sizes), preset=PRESET, demo=DEMO)

TRANSPOSE = ModelSpec("autoencoder with unpooling and transposed convolutions (thesis)", Options,
                   lambda options, sizes: assemble(Transpose(options.width), sizes), preset=PRESET, demo=DEMO)
