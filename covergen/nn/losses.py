"""Losses as pure functions of tensors: they know nothing of networks' names, ranks, precision settings or logging."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def wasserstein_critic(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's loss E[D(fake)] - E[D(real)] from scores ``[B]``; its negative estimates the Wasserstein-1 distance.

    Source: Arjovsky et al. 2017, "Wasserstein GAN", eq. 2.
    """
    return fake.float().mean() - real.float().mean()


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix: Tensor
) -> tuple[Tensor, Tensor]:
    """How far the critic's slope between real and fake images is from 1, and that slope.

    The gradient is ``torch.func.grad`` inside the forward, so the whole turn stays one graph. It is taken of the scores
    times the square root of the number of input values, which keeps the gradients of a critic with slope 1 near unit
    size per value (in fp16 they would underflow otherwise), and the norm is taken in fp32.

    Args:
        critic: images ``[B, 3, R, R]`` -> scores ``[B]``; must not mix the images of a batch.
        real: images ``[B, 3, R, R]``.
        fake: images ``[B, 3, R, R]``, without gradient.
        mix: one interpolation weight per image in [0, 1], ``[B, 1, 1, 1]``.

    Returns:
        mean of (norm - 1)^2 and the detached mean norm, scalars.

    Source: Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", algorithm 1 (per image, not per pixel).
    """
    between = torch.lerp(fake, real, mix)
    scale = between[0].numel() ** 0.5
    slope = torch.func.grad(lambda images: critic(images).float().sum() * scale)(between)
    norm = ((slope.float() / scale).flatten(1).square().sum(1) + 1e-12).sqrt()
    return (norm - 1).square().mean(), norm.detach().mean()
