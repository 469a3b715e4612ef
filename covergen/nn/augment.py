"""Differentiable augmentation of images.

Random draws are separate from their use, so that real and generated images change alike and the number of processes
changes nothing. Source: Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training".
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("color", "translation", "cutout")
SHIFT = 1 / 8  # largest translation, as a share of the side
HOLE = 1 / 4  # side of the square that cutout clears; the paper's 1/2 hides too much of a cover


def check_kinds(kinds: tuple[str, ...]) -> None:
    """Raises ValueError for an unknown kind; ``none`` alone means no augmentation."""
    for kind in kinds:
        if kind not in KINDS and kinds != ("none",):
            raise ValueError(f"--augment: {kind!r} is not a choice, expected some of {', '.join(KINDS)}, or none")


def draw_augmentation(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws the noise of ``augment`` for ``count`` images: ``augmentation`` ``[count, 7]``, uniform in [-1, 1]."""
    return {"augmentation": torch.rand(count, 7, generator=generator, device=generator.device) * 2 - 1}


def augment(images: Tensor, kinds: tuple[str, ...], draws: Tensor) -> Tensor:
    """Augments images ``[B, 3, R, R]`` by their draws ``[B, 7]``, in the kinds that are named."""
    if "color" in kinds:
        images = recolor(images, *draws[:, :3].T[..., None, None, None])
    if "translation" in kinds:
        images = translate(images, draws[:, 3], draws[:, 4])
    if "cutout" in kinds:
        side = images.shape[-1]
        centres = (torch.arange(side, device=draws.device) + 0.5) * 2 / side - 1
        rows, columns = ((centres - draw[:, None]).abs() < HOLE for draw in (draws[:, 5], draws[:, 6]))
        images = images * (1 - (rows[:, None, :, None] & columns[:, None, None, :]).float())
    return images


def recolor(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Changes brightness by up to 0.5, saturation by 0 to 2 times, contrast by 0.5 to 1.5 times."""
    images = images + brightness / 2
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (1 + saturation)
    middle = images.mean((1, 2, 3), keepdim=True)
    return middle + (images - middle) * (1 + contrast / 2)


def translate(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Shifts images by up to ``SHIFT`` of their side (draws ``[B]`` in [-1, 1]) and fills with 0."""
    side = images.shape[-1]
    for axis, draw in ((2, down), (3, right)):
        shift = (draw * SHIFT * side).round().long()
        source = torch.arange(side, device=images.device) - shift[:, None]
        inside = (source >= 0) & (source < side)
        shape = [len(images), 1, 1, 1]
        shape[axis] = side
        images = images.gather(axis, source.clamp(0, side - 1).view(shape).expand_as(images)) * inside.view(shape)
    return images
