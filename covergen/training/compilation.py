"""Compiled phases and fused optimisers. Dynamo counts for the whole process, and so does this: one run a process."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from covergen.models.base import Phase
from covergen.runs.config import Training


class Compiling:
    """Compiles phases, each as one graph and in place, and knows what that has cost so far."""

    def __init__(self, phases: Iterable[Phase], training: Training, device: torch.device) -> None:
        """Raises ValueError where CUDA graphs can't be had."""
        self.phases = list(phases) if training.compile or training.cuda_graphs else []
        self._reported: dict[str, float] = {}
        if training.cuda_graphs and device.type != "cuda":
            raise ValueError(f"--cuda_graphs needs a CUDA GPU, and this process computes on {device.type}; "
                             "--compile alone works everywhere")
        if training.cuda_graphs and training.grad_accum > 1:
            # A replay writes its gradients where those of the one before lie: their sum would be wrong.
            raise ValueError(f"--cuda_graphs with --grad_accum {training.grad_accum}: gradients of replayed graphs "
                             "can't be accumulated; leave one of them away")
        # diffusers asks for torch's version in its forward, through a cache: nothing that a user could mend
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        for phase in self.phases:
            compile_phase(phase, training.cuda_graphs)

    @property
    def seconds(self) -> float:
        """Seconds that this process has spent compiling forwards and backwards."""
        if not self.phases:
            return 0.0
        from torch._dynamo.utils import calculate_time_spent  # torch 2.3 and later
        return calculate_time_spent()["total_wall_time"]

    def costs(self) -> dict[str, float]:
        """``compile_seconds``, ``graph_breaks`` and ``recompiles`` as they go into the log; empty if nothing compiles.

        A phase is one graph. What is beyond that is a break, or a graph for another case: batches of another size, or
        ``r3gan``'s steps with and without penalties.
        """
        if not self.phases:
            return {}
        from torch._dynamo.utils import counters
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        return {"speed/compile_seconds": self.seconds, "speed/graph_breaks": float(breaks),
                "speed/recompiles": float(max(0, graphs - breaks - len(self.phases)))}

    def new_stats(self) -> dict[str, float]:
        """``costs`` if they have changed since the last call, else nothing."""
        now, before = self.costs(), self._reported
        self._reported = now
        return now if now != before else {}

    def text(self) -> str:
        """The costs for people."""
        seconds, breaks, recompiles = self.costs().values()
        return (f"compiled {len(self.phases)} phase{'s' if len(self.phases) > 1 else ''} in {seconds:.1f} s, "
                f"{breaks:.0f} graph breaks, {recompiles:.0f} recompiles")


def compile_phase(phase: Phase, cuda_graphs: bool = False) -> None:
    """Compiles a phase in place: names in checkpoints stay. Shapes are static, so that kernels know them."""
    if not cuda_graphs:
        phase.compile(dynamic=False)
        return
    replayed = torch.compile(phase.forward, dynamic=False, mode="reduce-overhead")

    def forward(batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        torch.compiler.cudagraph_mark_step_begin()
        loss, scalars = replayed(batch, noise)
        return loss, {name: value.clone() for name, value in scalars.items()}  # the next replay overwrites them
    phase.forward = forward


def optimizer_of(phase: Phase, training: Training, precision: str) -> torch.optim.Adam:
    """Adam over a phase's parameters in one kernel; with fp16 in several, since the one would hide skipped steps."""
    return torch.optim.Adam(phase.parameters(), lr=training.lr, betas=training.betas,
                            weight_decay=training.weight_decay, fused=precision != "fp16" or None)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes over an optimiser's saved state, but not which kernels it was computed with."""
    now = optimizer.param_groups[0]
    groups = [{**group, "fused": now["fused"], "foreach": now["foreach"]} for group in state["param_groups"]]
    optimizer.load_state_dict({**state, "param_groups": groups})
