"""What is logged of some steps: losses and scalars that stay on the device in, one row of means over all ranks out."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

NEVER = 2**62  # "no step": larger than any step number


class MetricAccumulator:
    """Collects what turns say between two lines of the log, without waiting for the device."""

    def __init__(self, phases: list[str], device: torch.device, ranks: int, forgiving: bool) -> None:
        """Args: turns: their names; device: of the losses; ranks: processes; forgiving: losses may be NaN."""
        self.phases, self.device, self.ranks, self.forgiving = phases, device, ranks, forgiving
        self._open()

    def _open(self) -> None:
        self.values: dict[str, list[Tensor]] = {}
        self.bad = torch.full((len(self.phases),), NEVER, dtype=torch.int64, device=self.device)

    def note(self, place: int, number: int, loss: Tensor, scalars: dict[str, Tensor]) -> None:
        """Takes in the loss and the scalars of an update of a turn in step ``number``: this rank's part of a mean."""
        for name, value in scalars.items():
            self.values.setdefault(f"loss/{name}", []).append(value.float())
        first = self.bad[place].clamp(max=number)
        self.bad[place] = torch.where(torch.isfinite(loss), self.bad[place], first)

    def norm(self, place: int, norm: Tensor) -> None:
        """Takes in the gradient norm of a turn; the last one counts."""
        self.values[f"optim/{self.phases[place]}_grad_norm"] = [norm.float()]

    def close(self) -> dict[str, float]:
        """Means over all ranks and all updates since the last call: the only place where the host waits for the device.

        Raises:
            FloatingPointError: a loss was NaN or infinite and may not be; names the turn and the first such step.
        """
        names = sorted(self.values)
        values = [torch.stack(self.values[name]) for name in names]
        if self.forgiving:
            values = [torch.where(value.isfinite(), value, torch.nan) for value in values]
        means = torch.stack([value.nanmean() if self.forgiving else value.mean() for value in values])
        if self.ranks > 1:
            dist.all_reduce(means)
            means /= self.ranks
            dist.all_reduce(self.bad, dist.ReduceOp.MIN)
        first = self.bad.tolist()
        row = dict(zip(names, means.tolist(), strict=True))
        self._open()
        if min(first) < NEVER and not self.forgiving:
            turn = self.phases[first.index(min(first))]
            raise FloatingPointError(f"the loss of the {turn} turn was not finite at step {min(first)}")
        return row
