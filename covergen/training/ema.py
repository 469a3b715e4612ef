"""Exponential moving averages (EMA) of networks."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """Averaged copies of networks, the same on every rank.

    Where an update is given no decay, the decay grows as min(decay, (1 + n) / (10 + n)) over n updates, so that early
    averages forget the initial weights. Buffers (running statistics) are copied, not averaged.
    """

    def __init__(self, networks: dict[str, nn.Module], decay: float) -> None:
        self.live = networks
        self.networks = {name: copy.deepcopy(network).requires_grad_(False) for name, network in networks.items()}
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, decay: float | None = None) -> None:
        self.updates += 1
        if decay is None:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, network in self.networks.items():
            live = self.live[name]
            torch._foreach_lerp_(list(network.parameters()), list(live.parameters()), 1 - decay)
            if buffers := list(network.buffers()):
                torch._foreach_copy_(buffers, list(live.buffers()))
