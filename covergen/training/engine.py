"""The only room that knows Accelerate: a model's turns in, correct optimiser steps on any number of processes out.

Every turn is wrapped on its own (one wrapped forward and one backward per update and micro-batch, so every gradient is
reduced), has its own optimiser, and draws its noise for the whole global batch before taking this rank's slice, so that
the number of processes changes nothing.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from torch import Tensor, nn

from covergen.data.batch import Batch
from covergen.data.sampling import seed_of
from covergen.distributed.collectives import DelayedAny, check_weights, is_peer_failure, mean_buffers
from covergen.distributed.environment import processes
from covergen.distributed.heartbeat import Heartbeat
from covergen.models.base import Model
from covergen.nn.schedules import decay_of_average, learning_rate
from covergen.runs.checkpoint import with_averages
from covergen.runs.config import Training
from covergen.training.batch_split import BatchSplit
from covergen.training.compilation import Compiling, load_optimizer, optimizer_of
from covergen.training.ema import Average
from covergen.training.metrics import MetricAccumulator

# Between two meetings one rank may evaluate for long; who is dead is found by the heartbeat, much earlier.
MEETING = timedelta(hours=2)


class Engine:
    """Wraps a model for training.

    Attributes:
        model: the model; its networks are the plain modules, on ``device``.
        average: the averaged copies of the networks that the model names, or None.
        device: where this process computes.
        rank: this process among ``ranks``; rank 0 is the one that writes.
    """

    def __init__(self, model: Model, training: Training) -> None:
        """Raises ValueError for a precision that the device does not offer."""
        torch._dynamo.config.optimize_ddp = False
        handlers = [accelerate.DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=False)]
        precision = training.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        # Without a GPU Accelerate must be told so, or it starts every process as a run of its own.
        cpu = not torch.accelerator.is_available()
        state = accelerate.PartialState(cpu=cpu, timeout=MEETING)
        assert state.num_processes == processes()[1], (state.num_processes, processes())
        if precision == "fp16" and state.device.type == "cpu":
            raise ValueError("--mixed_precision fp16 needs a GPU: CPUs compute fp16 slower than fp32, and the loss "
                             "scaling that it needs is not offered there; use bf16 (fast with AMX) or no")
        if precision == "bf16" and state.device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ValueError("--mixed_precision bf16: this GPU has no bf16; use fp16 or no")
        self.accelerator = accelerate.Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=handlers)
        self.precision, self.training, self.model = precision, training, model
        self.device = torch.device("cpu") if state.device.type == "cpu" else state.device
        self.rank, self.ranks = state.process_index, state.num_processes
        self.share = BatchSplit(training, self.rank, self.ranks, model.needs_whole_batch)
        if training.sync_bn and self.device.type != "cuda":
            raise ValueError("--sync_bn needs GPUs: torch's SyncBatchNorm does not run on CPUs")
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        if training.sync_bn:  # replaces norms inside the networks; they themselves stay the same objects
            for network in model.networks.values():
                nn.SyncBatchNorm.convert_sync_batchnorm(network)
        for network in model.networks.values():
            network.to(self.device)
        averaged = {name: model.networks[name] for name in model.ema_networks}
        if training.ema and not averaged:
            raise ValueError(f"--ema {training.ema:g}: this model has no averaged networks; leave it at 0")
        self.average = Average(averaged, training.ema) if training.ema else None
        self.phases, self.optimizers = [], []
        self.compiling = Compiling(model.phases, training, self.device)
        for turn in model.phases:
            optimizer = optimizer_of(turn, training, precision)
            with warnings.catch_warnings():  # torch 2.15 renamed broadcast_buffers, which Accelerate still passes
                warnings.simplefilter("ignore", FutureWarning)
                turn, optimizer = self.accelerator.prepare(turn, optimizer)
            self.phases.append(turn)
            self.optimizers.append(optimizer)
        self.generator = torch.Generator(self.device)
        self.agree = DelayedAny(self.ranks)
        self.heartbeat = Heartbeat(self.rank, self.ranks, self.agree.group) if self.ranks > 1 else None
        self.max_skipped_updates = training.max_skipped_updates
        self.window = MetricAccumulator([turn.name for turn in model.phases], self.device, self.ranks, self.max_skipped_updates is not None)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def batches_per_step(self) -> int:
        """Global batches that one step reads: one for each repeat of the most repeated turn, times the accumulation."""
        return max(turn.repeats for turn in self.model.phases) * self.training.grad_accum

    @property
    def images_per_step(self) -> int:
        """Covers that one step reads."""
        return self.batches_per_step * self.training.batch_size

    def learning_rate(self, number: int) -> float:
        """Of all turns in step ``number``."""
        given = self.training
        return learning_rate(self.images_per_step * number, given.lr, given.lr_warmup, given.lr_last, given.lr_images)

    @property
    def ema_networks(self) -> dict[str, nn.Module]:
        """Averaged networks by name, empty without an average."""
        return self.average.networks if self.average else {}

    # -- a step ---

    def step(self, number: int, batches: list[Batch], measure: bool = False) -> None:
        """Takes every turn of step ``number`` (counted from 1).

        Args:
            number: of the step; noise is a function of it.
            batches: the ``batches_per_step`` batches of the step; repeat r of a turn reads its accumulation's worth of
                them from place r on.
            measure: also note the gradient norm of every turn (one that is not taken in every step always notes it).
        """
        # Layers that draw from the global generator (dropout) are a function of the step as well.
        torch.manual_seed(seed_of(self.training.seed, "layers", number, self.rank))
        accumulation, skipped = self.training.grad_accum, False
        images, rate = self.images_per_step * number, self.learning_rate(number)
        for place, turn in enumerate(self.model.phases):
            if number % turn.interval:
                continue
            turn.begin(number, images)
            for group in self.optimizers[place].param_groups:
                group["lr"] = rate
            for repeat in range(turn.repeats):
                share = batches[repeat * accumulation : (repeat + 1) * accumulation]
                skipped |= self._update(place, number, repeat, share, measure or turn.interval > 1)
        if self.average and not skipped:
            life = self.training.ema_halflife
            self.average.update(decay_of_average(images, self.images_per_step, life) if life else None)

    def _update(self, place: int, number: int, repeat: int, batches: list[Batch], measure: bool) -> bool:
        """One update of one turn; True when the loss scaler skipped it."""
        turn, wrapped, optimizer = self.model.phases[place], self.phases[place], self.optimizers[place]
        parameters = list(turn.parameters())
        noise = self._noise(place, number, repeat, len(batches))
        before = self._buffers() if self.max_skipped_updates is not None else []
        for micro, batch in enumerate(batches):
            parts, means = self.share.split(batch), []
            for piece, (part, weight) in enumerate(zip(parts, self.share.weights, strict=True)):
                last = (micro, piece) == (len(batches) - 1, len(parts) - 1)
                with contextlib.nullcontext() if last else self.accelerator.no_sync(wrapped):  # covers the forward too
                    loss, scalars = wrapped(part, noise[micro][piece])
                    self.accelerator.backward(loss * weight / len(batches))
                means.append({name: value * weight for name, value in {"": loss.detach(), **scalars}.items()})
            scalars = {name: sum(part[name] for part in means) for name in means[0]}
            self.window.note(place, number, scalars.pop(""), scalars)
        if self.training.grad_clip:
            self.accelerator.unscale_gradients(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, self.training.grad_clip)
        elif self.max_skipped_updates is not None:
            norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if self.max_skipped_updates is None:
            optimizer.step()
        else:
            self._step_if(norm.isfinite(), optimizer, before)
        if measure:  # after the step, where gradients are unscaled at any precision
            norm = norm if self.training.grad_clip else nn.utils.get_total_norm([p.grad for p in parameters])
            self.window.norm(place, norm)
        optimizer.zero_grad(set_to_none=True)
        return optimizer.step_was_skipped

    def _step_if(self, sound: Tensor, optimizer: Any, before: list[Tensor]) -> None:
        """An optimiser's step that does nothing where ``sound`` is false; running statistics are put back then.

        Gradients are summed over the ranks, so all of them see the same. The device is not waited for.
        """
        self.skipped += ~sound
        inner = optimizer.optimizer
        if self.accelerator.scaler is None and inner.defaults.get("fused"):
            inner.grad_scale, inner.found_inf = None, (~sound).float()  # as a loss scaler tells fused optimisers
            optimizer.step()
        elif self.accelerator.scaler or sound:  # the scaler sees for itself; a CPU has nothing to wait for
            optimizer.step()
        for buffer, old in zip(self._buffers(copied=False), before, strict=True):
            buffer.copy_(torch.where(sound, buffer, old))

    def _buffers(self, copied: bool = True) -> list[Tensor]:
        return [buffer.clone() if copied else buffer
                for network in self.model.networks.values() for buffer in network.buffers()]

    def _noise(self, place: int, number: int, repeat: int, micros: int) -> list[list[dict[str, Tensor]]]:
        """This rank's part of the step's noise, by micro-batch and piece; drawn alike on every rank for all of them.

        So the noise of a cover depends on its place in the global batch, and not on the number of ranks.
        """
        self.generator.manual_seed(seed_of(self.training.seed, "noise", number, place, repeat))
        drawn = self.model.phases[place].sample_noise(self.training.batch_size * micros, self.generator)
        return [self.share.split_noise({name: values.chunk(micros)[micro] for name, values in drawn.items()})
                for micro in range(micros)]

    def collect_metrics(self) -> dict[str, float]:
        """What is logged of the steps since the last call; here alone the host waits for the device.

        Raises:
            FloatingPointError: a loss was NaN or infinite, or more updates than are forgiven had such gradients.
        """
        row = self.window.close()
        if self.max_skipped_updates is not None:
            row["optim/skipped"] = float(self.skipped)
            if row["optim/skipped"] > self.max_skipped_updates:
                raise FloatingPointError(f"{int(self.skipped)} updates had losses or gradients that are not finite, "
                                         f"--on_nan allows {self.max_skipped_updates}")
        return row

    # -- what all ranks do together ---

    @torch.no_grad()
    def mean_buffers(self) -> None:
        """Sets running statistics to their mean over the ranks, on all of them, before they are used or saved."""
        if self.ranks > 1:
            mean_buffers([*self.model.networks.values(), *self.ema_networks.values()], self.ranks)

    def check_weights(self) -> None:
        """Compares the bits of all weights over the ranks; RuntimeError, FloatingPointError: see there."""
        check_weights(with_averages(self.model.networks, self.ema_networks), self.ranks)

    def state(self, step: int) -> dict[str, Any]:
        """What ``trainer.pt`` holds beside the networks: tensors and plain values only."""
        scaler = self.accelerator.scaler
        return {
            "step": step,
            "optimizers": {t.name: o.state_dict() for t, o in zip(self.model.phases, self.optimizers, strict=True)},
            "scaler": scaler.state_dict() if scaler else None,
            "average_updates": self.average.updates if self.average else 0,
            "skipped": int(self.skipped),
        }

    def restore(self, state: dict[str, Any]) -> int:
        """Takes over what ``state`` gave; returns its step. The networks are loaded already."""
        for turn, optimizer in zip(self.model.phases, self.optimizers, strict=True):
            load_optimizer(optimizer, state["optimizers"][turn.name])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.updates = state["average_updates"]
        self.skipped.fill_(state.get("skipped", 0))
        return state["step"]

    def main_first(self) -> contextlib.AbstractContextManager:
        """Rank 0 goes through the block before the others do."""
        return self.accelerator.main_process_first()

    def wait(self) -> None:
        """Waits until every rank is here."""
        self.accelerator.wait_for_everyone()

    def report_failure(self, error: Exception) -> None:
        """Lets the other ranks know why this one is about to die, unless it is because they have."""
        if self.heartbeat and not is_peer_failure(error):
            self.heartbeat.fail(str(error) or type(error).__name__)

    def close(self) -> None:
        """Leaves the process group."""
        self.agree.close()
        if self.heartbeat:
            self.heartbeat.close()
        self.accelerator.end_training()

    @torch.no_grad()
    def infer(self, call: Callable[[dict[str, nn.Module]], Any]) -> Any:
        """What a call makes of the averaged networks (the live ones without an average), as they work after training.

        It concerns this process alone.
        """
        networks = {**self.model.networks, **self.ema_networks}
        for network in networks.values():
            network.eval()
        with self.accelerator.autocast():
            result = call(networks)
        for network in self.model.networks.values():
            network.train()
        return result

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on all of them."""
        values = values.to(self.device)
        if self.ranks > 1:
            dist.all_reduce(values)
        return values
