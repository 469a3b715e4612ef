"""Autoencoders of covers whose decoders grow by resizing (``ae_resize``) or by unpooling (``ae_transpose``).

The transposed convolutions of ``ae_transpose`` leave checkerboards. Both reconstruct and encode; there is nothing to
sample from. Source: J. Bustos 2020, "Towards album artwork generation based on audio"; each 260,867 parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covergen.models.base import InputSpec, Model, ModelSpec, Phase, option, to_zero_one
from covergen.nn.autoencoders import Decoder, Encoder
from covergen.nn.layers import check_resolution
from covergen.nn.losses import psnr


@dataclass(frozen=True)
class Options:
    """Options of both models; the defaults are the thesis's."""

    width: int = option(32, "channels of the first layer; the others have 2, 2 and 4 times as many", gt=0)


class Resize(nn.Module):
    """Encodes images ``[B, 3, R, R]`` to ``[B, 4 * width, R/8, R/8]`` and decodes them to images in [0, 1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(width, norm_last=False), Decoder(width, norm_last=False)

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def forward(self, images: Tensor) -> Tensor:
        return torch.sigmoid(self.decoder(self.encoder(images)).float())


class Transpose(nn.Module):
    """The same by max-pooling; the decoder gets the positions of the maxima as well."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [3, width, 2 * width, 2 * width, 4 * width]
        self.convs = nn.ModuleList(nn.Conv2d(size, out, 3, 1, 1) for size, out in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes[1:4])
        back = [*sizes[:0:-1], 3]
        self.back = nn.ModuleList(nn.ConvTranspose2d(size, out, 3, 1, 1) for size, out in pairwise(back))
        self.back_norms = nn.ModuleList(nn.BatchNorm2d(size) for size in back[1:4])

    def encode_with_indices(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The latents, and the positions of the maxima of each pooling."""
        maps, indices = images, []
        for conv, norm in zip(self.convs[:-1], self.norms, strict=True):
            maps, maxima = F.max_pool2d(conv(maps), 2, return_indices=True)
            maps = F.leaky_relu(norm(maps))
            indices.append(maxima)
        return F.leaky_relu(self.convs[-1](maps)), indices

    def encode(self, images: Tensor) -> Tensor:
        return self.encode_with_indices(images)[0]

    def forward(self, images: Tensor) -> Tensor:
        maps, indices = self.encode_with_indices(images)
        for conv, norm, maxima in zip(self.back[:-1], self.back_norms, reversed(indices), strict=True):
            maps = F.leaky_relu(norm(F.max_unpool2d(conv(maps), maxima, 2)))
        return torch.sigmoid(self.back[-1](maps).float())


class ReconstructionPhase(Phase):
    """Trains an autoencoder by the mean squared error of an image's values, averaged over images."""

    name = "autoencoder"

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images = to_zero_one(batch.cover)
        errors = (self.autoencoder(images) - images).square().flatten(1).mean(1)
        loss = errors.mean()
        return loss, {"mse": loss.detach(), "psnr": psnr(errors.detach()).mean()}


def assemble(autoencoder: nn.Module, inputs: InputSpec) -> Model:
    """One network with one phase, whose loss also validates it."""
    check_resolution(inputs.resolution)
    phase = ReconstructionPhase(autoencoder)
    return Model(
        {"autoencoder": autoencoder}, [phase], validation_phase=phase,
        reconstruct=lambda networks, batch: networks["autoencoder"](to_zero_one(batch.cover)),
        encode=lambda networks, batch: networks["autoencoder"].encode(to_zero_one(batch.cover)).flatten(1).float())


# The thesis trained both for 20 epochs and stopped after 4 without a better validation loss.
PRESET = {"batch_size": 32, "lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 1e-5, "ema": 0.0, "epochs": 20,
          "patience": 4}
DEMO = {"epochs": 10}

RESIZE = ModelSpec("autoencoder that resizes and convolves (thesis)", Options,
                   lambda options, inputs: assemble(Resize(options.width), inputs), preset=PRESET, demo=DEMO)

TRANSPOSE = ModelSpec("autoencoder with unpooling and transposed convolutions (thesis)", Options,
                      lambda options, inputs: assemble(Transpose(options.width), inputs), preset=PRESET, demo=DEMO)
