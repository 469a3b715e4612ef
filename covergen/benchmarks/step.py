"""Whole training steps of a model, eager and compiled; those of WGAN-GP against a plain loop as the thesis had it."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covergen import models
from covergen.benchmarks import alternate, report
from covergen.data.batch import Batch
from covergen.distributed.environment import keep_memory, use_threads
from covergen.models.base import InputSpec, Model
from covergen.runs.config import Training
from covergen.training.compilation import Compiling, optimizer_of

AUDIO = 1162  # numbers in a vector of the demo world with its presence bits
BATCHES = 20  # of covers, which the steps go through again and again


def run(model: Literal["wgan_gp", "r3gan", "flow"] = "wgan_gp", resolution: int = 0, batch_size: int = 0,
        width: int = 0, rounds: int = 3, threads: int = 0, curve: int = 0, compile: bool = True) -> int:
    """Times whole training steps: fp32, bf16 and compiled bf16, and of wgan_gp the thesis's notebook's loop.

    Args:
        model: whose steps.
        resolution: side of the covers in pixels; 0: 128 for wgan_gp, 32 for the others.
        batch_size: covers in a batch; 0: 32 for wgan_gp, 64 for the others.
        width: of the networks; 0: the preset's.
        rounds: how often every contender is measured.
        threads: that compute; 0: the machine's cores.
        curve: steps of every contender on the same covers before that, whose losses are compared; 0: none.
        compile: also time the compiled steps.
    """
    use_threads(threads)
    thesis = model == "wgan_gp"
    bench = Bench(model, {"width": width} if width else {}, batch_size or (32 if thesis else 64),
                  InputSpec(resolution or (128 if thesis else 32), 0 if thesis else AUDIO))
    contenders = bench.contenders(compile)
    losses = {name: one.losses(max(curve, bench.period)) for name, one in contenders.items()}
    print("loss of the first step: " + ", ".join(f"{name} {some[0]:.3f}" for name, some in losses.items()))
    times = alternate({name: one.seconds for name, one in contenders.items()}, rounds)
    about = {"model": model, "resolution": bench.inputs.resolution, "batch_size": bench.batch_size,
             "width": bench.options.width}
    for name, one in contenders.items():
        if one.compiling:
            print(f"{name}: {one.compiling.text()}")
            about |= {cost.removeprefix("speed/"): round(value, 1) for cost, value in one.compiling.costs().items()}
    if curve:
        about["curve"] = {}
        for name, values in losses.items():
            late = values[-max(2, len(values) // 4):]
            # Neighbouring steps resemble each other: the error is that of means of ten of them.
            size = max(1, min(10, len(late) // 2))
            means = [statistics.mean(late[i:i + size]) for i in range(0, len(late) - size + 1, size)]
            mean, error = statistics.mean(means), statistics.stdev(means) / len(means)**0.5
            about["curve"][name] = [mean, error]
            print(f"{name:32} loss of the last {len(late)} of {len(values)} steps: {mean:.4f} +- {error:.4f}")
    report("step", times, unit="s/step", base=next(iter(contenders)), faster_is="less", about=about)
    return 0


@dataclass
class Contender:
    """One way to train: ``step`` takes a step and returns its loss, on the device."""

    step: Callable[[], Tensor]
    period: int  # steps after which all kinds of steps were taken once
    ours: bool = True  # our settings of the allocator, not the defaults, which a notebook has
    compiling: Compiling | None = None

    def losses(self, steps: int) -> list[float]:
        keep_memory(self.ours)
        return torch.stack([self.step() for _ in range(steps)]).tolist()

    def seconds(self) -> float:
        """Of a step: the mean over a period."""
        began = time.perf_counter()
        self.losses(self.period)  # waits for the device
        return (time.perf_counter() - began) / self.period


class Bench:
    """A model with the weights, covers and noise that all contenders begin with."""

    def __init__(self, model: str, options: dict[str, Any], batch_size: int, inputs: InputSpec) -> None:
        self.device = (torch.accelerator.current_accelerator() if torch.accelerator.is_available()
                       else torch.device("cpu"))
        self.name, self.spec, self.inputs, self.batch_size = model, models.load(model), inputs, batch_size
        self.options = self.spec.options(**options)
        torch.manual_seed(0)
        first = self.spec.build(self.options, inputs)
        self.weights = {name: network.state_dict() for name, network in first.networks.items()}
        self.period = max(getattr(self.options, "penalty_every", 1), *(phase.interval for phase in first.phases))
        self.batches = [self.make_batch(number, first.needs_mismatched_audio) for number in range(BATCHES)]

    def make_batch(self, number: int, mismatched: bool) -> Batch:
        """Covers with structure, blobs of colour, and audio vectors that follow from them."""
        noise, side = torch.Generator().manual_seed(number), self.inputs.resolution
        coarse = torch.rand(self.batch_size, 3, 4, 4, generator=noise)
        covers = F.interpolate(coarse, (side, side), mode="bilinear")
        covers = (covers + 0.05 * torch.randn(covers.shape, generator=noise)).clamp(0, 1).mul(255).byte()
        audio = None
        if self.inputs.audio:
            mixing = torch.randn(48, self.inputs.audio, generator=torch.Generator().manual_seed(0))
            audio = (coarse.flatten(1) - 0.5) @ mixing
        albums = torch.arange(self.batch_size)
        return Batch(*(None if part is None else part.to(self.device) for part in (
            covers, audio, albums, albums, audio.roll(1, 0) if mismatched else None)))

    def contenders(self, compile: bool) -> dict[str, Contender]:
        """By name, each with networks of its own; the first is what the others are compared with."""
        autocast, found = partial(torch.autocast, self.device.type, torch.bfloat16), {}
        if self.name == "wgan_gp":
            found["notebook fp32"] = Contender(notebook_loop(self.model(), self.batches, self.options), 1, ours=False)
        for name, precision in (("fp32", contextlib.nullcontext), ("bf16", autocast)):
            found[f"covergen {name}"] = Contender(self.phases_loop(self.model(), precision), self.period)
        if compile:
            model = self.model()
            compiling = Compiling(model.phases, Training(compile=True), self.device)
            found["covergen bf16 compiled"] = Contender(self.phases_loop(model, autocast), self.period,
                                                        compiling=compiling)
        return found

    def model(self) -> Model:
        model = self.spec.build(self.options, self.inputs)
        for name, network in model.networks.items():
            network.load_state_dict(self.weights[name])
            network.to(self.device)
        return model

    def phases_loop(self, model: Model, precision: Callable) -> Callable[[], Tensor]:
        """The project's step: the phases as training takes them, without Accelerate's wrapping around them."""
        training = Training(**{name: self.spec.preset[name] for name in ("lr", "betas")})
        optimizers = [optimizer_of(phase, training, "bf16") for phase in model.phases]
        noise, count = torch.Generator(self.device).manual_seed(1), 0

        def step() -> Tensor:
            nonlocal count
            count += 1
            losses = []
            for phase, optimizer in zip(model.phases, optimizers, strict=True):
                if count % phase.interval:
                    continue
                phase.begin(count, count * self.batch_size)
                for repeat in range(phase.repeats):
                    batch = self.batches[(count * phase.repeats + repeat) % BATCHES]
                    with precision():
                        loss, _ = phase(batch, phase.sample_noise(self.batch_size, noise))
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                losses.append(loss.detach())
            return losses[0]

        return step


def notebook_loop(model: Model, batches: list[Batch], options: Any) -> Callable[[], Tensor]:
    """The same numbers as a plain notebook has them: instance norm layers, one backward per loss term, no autocast."""
    generator, critic = model.networks["generator"], model.networks["critic"]
    for i, layer in enumerate(critic.blocks):
        if isinstance(layer, nn.GroupNorm):
            norm = nn.InstanceNorm2d(layer.num_channels, affine=True).to(layer.weight.device)
            norm.load_state_dict(layer.state_dict())
            critic.blocks[i] = norm
    adam = {net: torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.0, 0.999)) for net in (generator, critic)}
    noise, number = torch.Generator(batches[0].cover.device).manual_seed(1), 0

    def normal() -> Tensor:
        return torch.randn(len(batches[0].cover), options.latent, generator=noise, device=noise.device)

    def step() -> Tensor:
        nonlocal number
        number += 1
        for repeat in range(options.critic_steps):
            critic.zero_grad()
            real = batches[(number * options.critic_steps + repeat) % len(batches)].cover.float() / 127.5 - 1
            real_loss = -critic(real).mean()
            real_loss.backward()
            fake = generator(normal())
            fake_loss = critic(fake.detach()).mean()
            fake_loss.backward()
            mix = torch.rand(len(real), 1, 1, 1, generator=noise, device=noise.device)
            between = (mix * real + (1 - mix) * fake.detach()).requires_grad_(True)
            scores = critic(between)
            slope = torch.autograd.grad(scores, between, torch.ones_like(scores), create_graph=True)[0]
            penalty = options.penalty * ((slope.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
            penalty.backward()
            adam[critic].step()
            loss = (real_loss + fake_loss + penalty).detach()
        generator.zero_grad()
        (-critic(generator(normal())).mean()).backward()
        adam[generator].step()
        return loss

    return step
