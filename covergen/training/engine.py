"""The engine of training, the only file that knows Accelerate: correct optimiser steps on any number of processes.

Every phase is wrapped on its own (one wrapped forward and one backward per update and piece of a batch, so every
gradient is reduced), has its own optimiser, and draws its noise for the whole global batch before taking this rank's
slice, so that the number of processes changes nothing.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import accelerate
import torch
from torch import Tensor, nn

from covergen.data.batch import Batch
from covergen.data.sampling import seed_of
from covergen.distributed.collectives import TIMEOUT, Ranks, WatchedRanks
from covergen.distributed.environment import processes
from covergen.models.base import Model, Phase
from covergen.nn.schedules import decay_of_average, learning_rate
from covergen.runs.config import Training
from covergen.training.batch_split import BatchSplit
from covergen.training.compilation import Compiling, load_optimizer, optimizer_of
from covergen.training.ema import EMA
from covergen.training.nonfinite import SkipUpdates, StopAtFirst


@dataclass
class PhaseState:
    """A phase of the model and what trains it."""

    number: int  # its position among the phases, which seeds its noise
    phase: Phase
    module: nn.Module  # the phase wrapped for several processes
    optimizer: Any  # Accelerate's
    parameters: list[nn.Parameter]  # that it updates


class Engine:
    """Trains a model, and knows all of its state.

    ``networks`` are all, by the names of their files: ``<net>``, and its moving average ``<net>_ema``.
    """

    def __init__(self, model: Model, training: Training) -> None:
        """Starts the process group, moves the networks to the device, compiles and wraps the phases.

        ValueError for options that the device or the model does not offer.
        """
        self._accelerator = _start_accelerator(training)
        self._model, self._training = model, training
        self.device = torch.device("cpu") if self._accelerator.device.type == "cpu" else self._accelerator.device
        self.ranks = WatchedRanks(self._accelerator.process_index, self._accelerator.num_processes)
        self._split = BatchSplit(training, self.ranks.rank, self.ranks.ranks, model.needs_whole_batch)
        if training.sync_bn and self.device.type != "cuda":
            raise ValueError("--sync_bn needs GPUs: torch's SyncBatchNorm does not run on CPUs")
        for network in model.networks.values():
            if training.sync_bn:  # replaces norms inside the networks; they themselves stay the same objects
                nn.SyncBatchNorm.convert_sync_batchnorm(network)
            network.to(self.device)
        averaged = {name: model.networks[name] for name in model.ema_networks}
        if training.ema and not averaged:
            raise ValueError(f"--ema {training.ema:g}: this model has no averaged networks; leave it at 0")
        self._ema = EMA(averaged if training.ema else {}, training.ema)
        self.networks = {**model.networks, **{f"{name}_ema": one for name, one in self._ema.networks.items()}}
        self.compiling = Compiling(model.phases, training, self.device)
        self._phases = [self._prepare(number, phase) for number, phase in enumerate(model.phases)]
        self._generator = torch.Generator(self.device)
        names, on_nan = [phase.name for phase in model.phases], training.on_nan
        self._nonfinite = (StopAtFirst(names, self.device, self.ranks) if on_nan == "stop" else SkipUpdates(
            names, self.device, self.ranks, int(on_nan[len("skip "):]), model.networks, self._accelerator.scaler))
        self._metrics = MetricAccumulator(self.ranks, ignore_nan=self._nonfinite.skips)
        self._learning_rate = 0.0

    def _prepare(self, number: int, phase: Phase) -> PhaseState:
        optimizer = optimizer_of(phase, self._training, self._accelerator.mixed_precision)
        with warnings.catch_warnings():  # torch 2.15 renamed broadcast_buffers, which Accelerate still passes
            warnings.simplefilter("ignore", FutureWarning)
            module, optimizer = self._accelerator.prepare(phase, optimizer)
        return PhaseState(number, phase, module, optimizer, list(phase.parameters()))

    def describe(self) -> str:
        """Processes, device and precision, for people."""
        return (f"{self.ranks.ranks} process{'es' if self.ranks.ranks > 1 else ''} on {self.device.type}, "
                f"precision {self._accelerator.mixed_precision}")

    @property
    def batches_per_step(self) -> int:
        """Global batches that one step reads: one for each repeat of the phase with most, times the accumulation."""
        return max(phase.repeats for phase in self._model.phases) * self._training.grad_accum

    @property
    def images_per_step(self) -> int:
        """Covers that one step reads."""
        return self.batches_per_step * self._training.batch_size

    def step(self, step: int, batches: list[Batch], measure: bool = False) -> None:
        """Goes through every phase of a step (numbered from 1), then updates the moving average.

        Repeat r of a phase reads the r-th part of the step's ``batches_per_step`` batches. ``measure``: note the
        gradient norm of every phase (one that is not in every step always notes it).
        """
        given, skipped = self._training, False
        # Layers that draw from the global generator (dropout) are a function of the step as well.
        torch.manual_seed(seed_of(given.seed, "layers", step, self.ranks.rank))
        images, accumulation = self.images_per_step * step, given.grad_accum
        self._learning_rate = learning_rate(images, given.lr, given.lr_warmup, given.lr_last, given.lr_images)
        for state in self._phases:
            if step % state.phase.interval:
                continue
            state.phase.begin(step, images)
            for group in state.optimizer.param_groups:
                group["lr"] = self._learning_rate
            for repeat in range(state.phase.repeats):
                some = batches[repeat * accumulation : (repeat + 1) * accumulation]
                self._update(state, step, some, self._noise(state, step, repeat), measure or state.phase.interval > 1)
                skipped |= state.optimizer.step_was_skipped  # by the loss scaler
        if self._ema.networks and not skipped:
            half_life = given.ema_halflife
            self._ema.update(decay_of_average(images, self.images_per_step, half_life) if half_life else None)

    def _update(self, state: PhaseState, step: int, batches: list[Batch], noise: list[dict[str, Tensor]], measure: bool,
                ) -> None:
        """One update of a phase, from as many batches as are accumulated and the noise of their pieces."""
        self._nonfinite.begin()
        pieces = [piece for batch in batches for piece in self._split.split(batch)]
        weights, sums = self._split.weights * len(batches), {}
        for number, (piece, drawn, weight) in enumerate(zip(pieces, noise, weights, strict=True), 1):
            last = number == len(pieces)
            # What is not reduced covers the forward, too.
            with contextlib.nullcontext() if last else self._accelerator.no_sync(state.module):
                loss, scalars = state.module(piece, drawn)
                self._accelerator.backward(loss * weight / len(batches))
            for name, value in {"": loss.detach(), **scalars}.items():
                sums[name] = sums.get(name, 0.0) + value * weight / len(batches)
        self._nonfinite.note(state.number, step, sums.pop(""))
        self._metrics.add(sums)
        clip, norm = self._training.grad_clip, None
        if measure or clip or self._nonfinite.skips:
            self._accelerator.unscale_gradients(state.optimizer)
            norm = (nn.utils.clip_grad_norm_(state.parameters, clip) if clip else
                    nn.utils.get_total_norm([parameter.grad for parameter in state.parameters]))
        self._nonfinite.update(state.optimizer, norm)
        if measure:
            self._metrics.values[f"optim/{state.phase.name}_grad_norm"] = [norm.float()]  # the last one counts
        state.optimizer.zero_grad(set_to_none=True)

    def _noise(self, state: PhaseState, step: int, repeat: int) -> list[dict[str, Tensor]]:
        """This rank's part of the noise of an update, by piece; drawn alike on every rank for all of them.

        So the noise of a cover depends on its position in the global batch, and not on the number of ranks.
        """
        self._generator.manual_seed(seed_of(self._training.seed, "noise", step, state.number, repeat))
        count = self._training.grad_accum
        drawn = state.phase.sample_noise(self._training.batch_size * count, self._generator)
        return [piece for number in range(count) for piece in self._split.split_noise(
            {name: values.chunk(count)[number] for name, values in drawn.items()})]

    def collect_metrics(self) -> dict[str, float]:
        """What is logged of the steps since the last call; here alone the host waits for the device.

        FloatingPointError where a loss was not finite, or more updates than are allowed had such gradients.
        """
        return self._metrics.collect() | self._nonfinite.check() | {"optim/lr": self._learning_rate}

    @contextlib.contextmanager
    def eval_networks(self) -> Iterator[dict[str, nn.Module]]:
        """The networks as they work after training, the averages of those that have one; for this process alone."""
        networks = {**self._model.networks, **self._ema.networks}
        for network in networks.values():
            network.eval()
        try:
            with torch.no_grad(), self._accelerator.autocast():
                yield networks
        finally:
            for network in self._model.networks.values():
                network.train()

    def state_dict(self) -> dict[str, Any]:
        """The state beside the networks: tensors and plain values only."""
        scaler = self._accelerator.scaler
        return {"optimizers": {state.phase.name: state.optimizer.state_dict() for state in self._phases},
                "scaler": scaler.state_dict() if scaler else None,
                "ema_updates": self._ema.updates, "skipped": int(self._nonfinite.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what ``state_dict`` gave; the networks are loaded by who loads files."""
        for one in self._phases:
            load_optimizer(one.optimizer, state["optimizers"][one.phase.name])
        if self._accelerator.scaler and state["scaler"]:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        self._ema.updates = state["ema_updates"]
        self._nonfinite.skipped.fill_(state["skipped"])


class MetricAccumulator:
    """Collects scalars of updates on the device, without waiting for it, until a line of the log needs their means."""

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


def _start_accelerator(training: Training) -> accelerate.Accelerator:
    """Starts the process group; ValueError for a precision that the device does not offer."""
    torch._dynamo.config.optimize_ddp = False
    precision = training.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    # Without a GPU Accelerate needs to know, or it starts every process as a run of its own.
    cpu = not torch.accelerator.is_available()
    state = accelerate.PartialState(cpu=cpu, timeout=TIMEOUT)
    assert state.num_processes == processes()[1], (state.num_processes, processes())
    if precision == "fp16" and state.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU: CPUs compute fp16 slower than fp32, and the loss "
                         "scaling that it needs is not offered there; use bf16 (fast with AMX) or no")
    if precision == "bf16" and state.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError("--mixed_precision bf16: this GPU has no bf16; use fp16 or no")
    if state.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    handlers = [accelerate.DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=False)]
    return accelerate.Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=handlers)
