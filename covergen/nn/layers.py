"""Blocks that more than one model is built from: norms by name, initial weights, latents, widths by level."""

from __future__ import annotations

import torch
from torch import Tensor, nn

RESOLUTIONS = (32, 64, 128, 256)


def check_resolution(resolution: int) -> None:
    """Raises ValueError unless the models can be built for this side length in pixels."""
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution {resolution}: models are built for a side of {RESOLUTIONS} pixels; train at one "
                         "of them with --resolution (covers are shrunk to it), or pack the covers again with one")


def feature_norm(kind: str, channels: int) -> nn.Module:
    """A norm over feature maps ``[B, C, H, W]``: ``batch`` mixes the images of a batch, ``group`` does not."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(max(1, channels // 16), channels)


def activation(norm: str, slope: float = 0.0) -> nn.Module:
    """ReLU (LeakyReLU with a slope) beside batch norm; SiLU beside group norm, where a batch's split shall not matter.

    A unit within rounding of a kink falls to one side or the other depending on how a sum was split over processes, and
    each such unit changes an Adam update by tenths of a percent: after 100 updates the weights differ by 0.2%. Without
    kinks the same rounding stays at 1e-7 (measured with WGAN-GP at 32 px, 1 process against 2).
    """
    if norm == "group":
        return nn.SiLU()
    return nn.LeakyReLU(slope) if slope else nn.ReLU()


def init_gan_weights(network: nn.Module) -> None:
    """Convolutions from N(0, 0.02), norm scales from N(1, 0.02), norm shifts 0; linear layers keep torch's default.

    Source: Radford et al. 2016, "Unsupervised Representation Learning with DCGAN", section 3.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)


def normal_latents(count: int, size: int, generator: torch.Generator, truncation: float | None = None) -> Tensor:
    """Latents ``[count, size]`` from N(0, 1), or from N(0, 1) cut off at ``|z| <= truncation``."""
    device = generator.device
    if truncation is None:
        return torch.randn(count, size, generator=generator, device=device)
    latents = torch.empty(count, size, device=device)
    return nn.init.trunc_normal_(latents, 0.0, 1.0, -truncation, truncation, generator=generator)
