"""What a model is to everything else: networks, turns that train them, and a way to sample.

A step of training goes through the model's turns in order. A turn is a module whose forward computes everything it
needs from a batch and from noise and returns its loss, so one wrapped forward and one backward is all that distributed
training ever sees of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Turn(nn.Module):
    """One optimiser's share of a step.

    The networks it trains are its registered submodules. A network it only reads is kept in a tuple, unregistered, and
    called through ``frozen``: so neither the optimiser nor the gradient reduction knows it.

    Attributes:
        name: under which losses and gradient norms are logged.
        repeats: how often the turn is taken in one step; every repeat has a fresh real batch and fresh noise.
    """

    name: str = "turn"
    repeats: int = 1

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Noise for ``count`` images, each entry ``[count, ...]``, from the generator alone and on its device."""
        return {}

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (scalar, mean over the images given) and detached scalars to log."""
        raise NotImplementedError


@dataclass(frozen=True)
class Model:
    """A built model.

    Attributes:
        networks: name -> network; the names of its files in a checkpoint.
        turns: in the order they are taken.
        averaged: the networks of which an exponential moving average is kept.
        latents: ``(count, generator, truncation or None) -> [count, ...]`` inputs for ``sample``.
        sample: ``(networks, latents) -> [count, 3, R, R]`` in [-1, 1].
        truncation: the bound on ``|z|`` that this model's truncated samples use.
    """

    networks: dict[str, nn.Module]
    turns: list[Turn]
    averaged: tuple[str, ...]
    latents: Callable[[int, torch.Generator, float | None], Tensor]
    sample: Callable[[dict[str, nn.Module], Tensor], Tensor]
    truncation: float = 2.0


def frozen(network: nn.Module, *inputs: Tensor) -> Tensor:
    """Calls a network whose parameters get no gradient, while gradients still flow to the inputs."""
    return torch.func.functional_call(network, {name: p.detach() for name, p in network.named_parameters()}, inputs)
