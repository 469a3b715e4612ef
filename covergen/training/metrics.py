"""Metrics of the steps between two lines of the log: collected on the device, reduced once over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from covergen.distributed.collectives import Ranks


class MetricAccumulator:
    """Collects scalars of updates without waiting for the device."""

    def __init__(self, ranks: Ranks, ignore_nan: bool) -> None:
        """Means are over the ranks; with ``ignore_nan`` they leave out values that are not finite."""
        self.ranks, self.ignore_nan = ranks, ignore_nan
        self.values: dict[str, list[Tensor]] = {}

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Takes in the scalars of an update: this rank's part of a mean."""
        for name, value in scalars.items():
            self.values.setdefault(f"loss/{name}", []).append(value.float())

    def collect(self) -> dict[str, float]:
        """Means over all ranks and all updates since the last call; the host waits for the device here."""
        names, values = sorted(self.values), []
        for name in names:
            value = torch.stack(self.values[name])
            values.append(torch.where(value.isfinite(), value, torch.nan).nanmean() if self.ignore_nan
                          else value.mean())
        self.values = {}
        means = self.ranks.sum(torch.stack(values)) / self.ranks.ranks
        return dict(zip(names, means.tolist(), strict=True))
