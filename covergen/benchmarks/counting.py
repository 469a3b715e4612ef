"""What a step of a model is made of, counted on the built model: a model in, operations and bytes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from covergen.data.batch import Batch
from covergen.models.base import Model
from covergen.runs.config import Config

FLOAT = 4  # bytes; gradients, weights and Adam's moments are fp32 under autocast as well


class Operations(TorchDispatchMode):
    """Sums the floating point operations of matrix products and convolutions, those of gradients included.

    ``FlopCounterMode`` itself hooks into modules, which gradients inside a forward do not allow.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        count = flop_registry.get(function._overloadpacket)
        if count:
            self.total += count(*args, **kwargs, out_val=result)
        return result


@dataclass(frozen=True)
class Step:
    """One step of training.

    Attributes:
        repeats: name of a turn -> how often it is taken in a step (below 1: not in every one).
        gradients: name of a turn -> bytes that are reduced each time.
        operations: floating point operations for one image of a batch, over the whole step.
        batches: global batches that a step reads.
        checkpoint: bytes of networks, averages and Adam's moments.
    """

    repeats: dict[str, float]
    gradients: dict[str, int]
    operations: float
    batches: int
    checkpoint: int


def random_batch(resolution: int, audio: int, count: int, mismatched: bool = False) -> Batch:
    """Noise in the form of covers and vectors; with ``mismatched`` those of other albums as well."""
    numbers = torch.Generator().manual_seed(0)
    heard = torch.randn(count, audio, generator=numbers) if audio else None
    album = torch.arange(count)
    covers = torch.randint(0, 256, (count, 3, resolution, resolution), generator=numbers, dtype=torch.uint8)
    return Batch(covers, heard, torch.zeros_like(album), album, heard.flip(0) if mismatched else None)


def run_phases_once(model: Model, batch: Batch) -> None:
    """The forwards and backwards of a step, without its updates."""
    noise = torch.Generator().manual_seed(0)
    for turn in model.phases:
        turn.begin(turn.interval, len(batch.cover))
        for _ in range(turn.repeats):
            loss, _ = turn(batch, turn.sample_noise(len(batch.cover), noise))
            loss.backward()


def count(run: Config, model: Model, resolution: int, audio: int, images: int = 2) -> Step:
    """Counts one step of a model on the CPU, with a batch of so many images."""
    batch, operations = random_batch(resolution, audio, images, model.needs_mismatched_audio), 0.0
    noise = torch.Generator().manual_seed(0)
    repeats = {turn.name: turn.repeats / turn.interval for turn in model.phases}
    period = getattr(run.options, "penalty_every", 1)  # a penalty in some of the steps only makes those longer
    for turn in model.phases:
        with Operations() as counted:
            for number in range(1, period + 1):
                turn.begin(number * turn.interval, images)
                loss, _ = turn(batch, turn.sample_noise(images, noise))
                loss.backward()
        operations += repeats[turn.name] * counted.total / period / images
    for turn in model.phases:
        turn.zero_grad(set_to_none=True)
    trained = {turn.name: FLOAT * sum(p.numel() for p in turn.parameters() if p.requires_grad) for turn in model.phases}
    averaged = model.ema_networks if run.training.ema else ()
    kept = [*model.networks.values(), *(model.networks[name] for name in averaged)]
    states = sum(value.numel() * value.element_size() for network in kept for value in network.state_dict().values())
    accumulation = run.training.grad_accum
    return Step(repeats, trained, operations * accumulation, max(t.repeats for t in model.phases) * accumulation,
                states + 2 * sum(trained.values()))
