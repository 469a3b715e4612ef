"""What happens when a loss or a gradient is not finite: ``--on_nan stop`` or ``--on_nan skip N``.

Nothing here waits for the device in a step; what was found is read when metrics are collected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from covergen.distributed.collectives import Ranks

NEVER = 2**62  # "no step": larger than any step number


class StopAtFirst:
    """Ends the run at the first loss that is not finite."""

    skips = False  # whether updates are left out, for which ``update`` needs the gradient norm

    def __init__(self, phases: list[str], device: torch.device, ranks: Ranks) -> None:
        """``phases`` are their names, in order."""
        self.phases, self.ranks = phases, ranks
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # updates left out since the run began
        self._first_bad = torch.full((len(phases),), NEVER, dtype=torch.int64, device=device)

    def begin(self) -> None:
        """An update begins: its forward may change running statistics."""

    def update(self, optimizer: Any, norm: Tensor | None) -> None:
        """Takes the optimiser's step, given the norm of all gradients (over all ranks)."""
        optimizer.step()

    def note(self, phase: int, step: int, loss: Tensor) -> None:
        """Takes in the loss of an update of a phase, by its number."""
        first = self._first_bad[phase].clamp(max=step)
        self._first_bad[phase] = torch.where(torch.isfinite(loss), self._first_bad[phase], first)

    def check(self) -> dict[str, float]:
        """Metrics to log, by all ranks; FloatingPointError that names phase and first step of a loss not finite."""
        first = self.ranks.min(self._first_bad).tolist()
        if min(first) < NEVER:
            name = self.phases[first.index(min(first))]
            raise FloatingPointError(f"the loss of the {name} phase was not finite at step {min(first)}")
        return {}


class SkipUpdates(StopAtFirst):
    """Leaves out updates whose gradients are not finite, and ends the run after more than ``limit`` of them.

    Gradients are summed over the ranks, so all of them decide alike.
    """

    skips = True

    def __init__(self, phases: list[str], device: torch.device, ranks: Ranks, limit: int,
                 networks: dict[str, nn.Module], scaler: torch.amp.GradScaler | None) -> None:
        """The networks' running statistics are put back; there is a loss scaler with fp16."""
        super().__init__(phases, device, ranks)
        self.limit, self.scaler = limit, scaler
        self._buffers = [buffer for network in networks.values() for buffer in network.buffers()]
        self._before: list[Tensor] = []

    def begin(self) -> None:
        self._before = [buffer.clone() for buffer in self._buffers]

    def update(self, optimizer: Any, norm: Tensor | None) -> None:
        finite = norm.isfinite()
        self.skipped += ~finite
        inner = optimizer.optimizer
        if self.scaler is None and inner.defaults.get("fused"):
            inner.grad_scale, inner.found_inf = None, (~finite).float()  # as a loss scaler does with fused optimisers
            optimizer.step()
        elif self.scaler or finite:  # the scaler checks for itself; a CPU has nothing to wait for
            optimizer.step()
        for buffer, old in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(finite, buffer, old))

    def note(self, phase: int, step: int, loss: Tensor) -> None:
        pass

    def check(self) -> dict[str, float]:
        """Metrics to log; FloatingPointError after more skipped updates than are allowed."""
        skipped = int(self.skipped)
        if skipped > self.limit:
            raise FloatingPointError(f"{skipped} updates had losses or gradients that are not finite, "
                                     f"--on_nan allows {self.limit}")
        return {"optim/skipped": float(skipped)}
