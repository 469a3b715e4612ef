"""The two halves of an autoencoder: images to maps of an eighth of the side, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F


class Encoder(nn.Module):
    """Encodes images ``[B, 3, R, R]`` to maps ``[B, 4 * width, R/8, R/8]``: three halvings and a convolution."""

    def __init__(self, width: int, norm_last: bool) -> None:
        """Args: width: channels after the first halving; norm_last: batch norm after LeakyReLU, not before."""
        super().__init__()
        sizes = [3, width, 2 * width, 2 * width, 4 * width]
        self.convs = nn.ModuleList(
            nn.Conv2d(size, out, 3, 2 if layer < 3 else 1, 1) for layer, (size, out) in enumerate(pairwise(sizes)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes[1:4])
        self.norm_last = norm_last

    def forward(self, images: Tensor) -> Tensor:
        maps = images
        for conv, norm in zip(self.convs[:-1], self.norms, strict=True):
            maps = norm_and_leak(conv(maps), norm, self.norm_last)
        return F.leaky_relu(self.convs[-1](maps))


class Decoder(nn.Module):
    """Decodes maps ``[B, 4 * width, R/8, R/8]`` to logits of images by nearest doublings and 3x3 convolutions.

    Source of resizing before convolving: Odena et al. 2016, "Deconvolution and Checkerboard Artifacts".
    """

    def __init__(self, width: int, norm_last: bool) -> None:
        super().__init__()
        sizes = [4 * width, 2 * width, 2 * width, width, 3]
        self.convs = nn.ModuleList(
            nn.Conv2d(size, out, 3, 1, int(layer == 3)) for layer, (size, out) in enumerate(pairwise(sizes)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes[1:4])
        self.norm_last = norm_last

    def forward(self, maps: Tensor, films: Sequence[Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """Args: films: of each convolution's maps, before norm and activation."""
        for layer, (conv, norm) in enumerate(zip(self.convs[:-1], self.norms, strict=True)):
            maps = conv(F.pad(F.interpolate(maps, scale_factor=2.0, mode="nearest"), (1, 1, 1, 1), mode="reflect"))
            maps = norm_and_leak(films[layer](maps) if films else maps, norm, self.norm_last)
        return self.convs[-1](maps)


def norm_and_leak(maps: Tensor, norm: nn.Module, norm_last: bool) -> Tensor:
    """Norm, then LeakyReLU(0.01), or the other way round."""
    return norm(F.leaky_relu(maps)) if norm_last else F.leaky_relu(norm(maps))
