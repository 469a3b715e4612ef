"""Differentiable augmentation: images and the draws of an augmentation in, augmented images out.

The draws are made apart from their use, so that real and generated images are changed alike, and so that the number of
processes changes nothing. Source: Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training".
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("color", "translation", "cutout")
SHIFT = 1 / 8  # largest translation, as a share of the side
HOLE = 1 / 4  # side of the square that cutout clears; the paper's 1/2 hides too much of a cover


def check_kinds(kinds: tuple[str, ...]) -> None:
    """Raises ValueError for a kind that there isn't; ``none`` alone stands for none of them."""
    for kind in kinds:
        if kind not in KINDS and kinds != ("none",):
            raise ValueError(f"--augment: {kind!r} is not a choice, expected some of {', '.join(KINDS)}, or none")


def draw_augmentation(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What ``augment`` needs for ``count`` images: ``augmentation`` ``[count, 7]``, uniform in [-1, 1]."""
    return {"augmentation": torch.rand(count, 7, generator=generator, device=generator.device) * 2 - 1}


def augment(images: Tensor, kinds: tuple[str, ...], draws: Tensor) -> Tensor:
    """Images ``[B, 3, R, R]`` changed as their draws ``[B, 7]`` say, in the kinds that are named."""
    if "color" in kinds:
        images = recolor(images, *draws[:, :3].T[..., None, None, None])
    if "translation" in kinds:
        images = translate(images, draws[:, 3], draws[:, 4])
    if "cutout" in kinds:
        images = images * outside_hole(images.shape[-1], draws[:, 5], draws[:, 6])
    return images


def recolor(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Images lighter by up to 0.5, with up to twice the saturation, and 0.5 to 1.5 times the contrast."""
    images = images + brightness / 2
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (1 + saturation)
    middle = images.mean((1, 2, 3), keepdim=True)
    return middle + (images - middle) * (1 + contrast / 2)


def translate(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Images moved by up to ``SHIFT`` of their side (draws ``[B]`` in [-1, 1]), with 0 where nothing is left."""
    side = images.shape[-1]
    for axis, draw in ((2, down), (3, right)):
        shift = (draw * SHIFT * side).round().long()
        places = torch.arange(side, device=images.device) - shift[:, None]
        inside = (places >= 0) & (places < side)
        shape = [len(images), 1, 1, 1]
        shape[axis] = side
        images = images.gather(axis, places.clamp(0, side - 1).view(shape).expand_as(images)) * inside.view(shape)
    return images


def outside_hole(side: int, down: Tensor, right: Tensor) -> Tensor:
    """0 in a square of ``HOLE`` of the side around a place (draws ``[B]`` in [-1, 1]), else 1, ``[B, 1, R, R]``."""
    at = (torch.arange(side, device=down.device) + 0.5) * 2 / side - 1
    rows, columns = ((at - draw[:, None]).abs() < HOLE for draw in (down, right))
    return 1 - (rows[:, None, :, None] & columns[:, None, None, :]).float()
