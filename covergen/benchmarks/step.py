"""Whole training steps of WGAN-GP against a plain loop written as the thesis's notebook has it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from covergen.benchmarks import report, take_turns
from covergen.models import wgan_gp
from covergen.nn.turn import Model, Sizes
from covergen.runtime import data
from covergen.runtime.machine import keep_memory, use_threads


def run(resolution: int = 128, batch_size: int = 32, width: int = 64, rounds: int = 3, threads: int = 0) -> int:
    """Times whole training steps of WGAN-GP against the thesis's notebook's loop.

    Args:
        resolution: side of the covers in pixels.
        batch_size: covers in a batch.
        width: of the networks.
        rounds: how often every contender takes its turn.
        threads: that compute; 0: the machine's cores.
    """
    use_threads(threads)
    times = time_steps(resolution, batch_size, width, rounds)
    report("step", times, unit="s/step", base="notebook fp32", faster_is="less",
           about={"resolution": resolution, "batch_size": batch_size, "width": width})
    return 0


def time_steps(resolution: int, batch_size: int, width: int, rounds: int) -> dict[str, list[float]]:
    """Seconds for one whole step (five critic updates, one generator update) of every contender."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    options, sizes = wgan_gp.PlainOptions(width=width), Sizes(resolution)
    noise = torch.Generator(device).manual_seed(0)
    covers = torch.randint(0, 256, (batch_size, 3, resolution, resolution), generator=noise, device=device).byte()
    batch = data.Batch(covers, None, None, None)
    torch.manual_seed(0)
    start = {name: network.state_dict() for name, network in wgan_gp.build(options, sizes).networks.items()}
    contenders, losses = {}, {}

    def add(name: str, make: Callable[[Model], Callable[[], Tensor]]) -> None:
        model = wgan_gp.build(options, sizes)
        for network in model.networks:
            model.networks[network].load_state_dict(start[network])
            model.networks[network].to(device)
        step = make(model)

        def timed() -> float:
            keep_memory(not name.startswith("notebook"))  # a notebook has the allocator's defaults
            began = time.perf_counter()
            loss = float(step())  # waits for the device
            losses.setdefault(name, loss)
            return time.perf_counter() - began

        contenders[name] = timed

    add("notebook fp32", lambda model: notebook_loop(model, batch, options))
    add("covergen fp32", lambda model: turns_loop(model, batch, noise, contextlib.nullcontext))
    add("covergen bf16", lambda model: turns_loop(model, batch, noise,
                                                  lambda: torch.autocast(device.type, torch.bfloat16)))
    measured = take_turns(contenders, rounds)
    print("critic loss after the first step: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
    return measured


def turns_loop(model: Model, batch: data.Batch, noise: torch.Generator, precision: Callable) -> Callable[[], Tensor]:
    """The project's step: the turns as training takes them, without Accelerate's wrapping around them."""
    optimizers = [torch.optim.Adam(turn.parameters(), lr=1e-4, betas=(0.0, 0.999)) for turn in model.turns]

    def step() -> Tensor:
        noise.manual_seed(1)
        last = torch.zeros(())
        for turn, optimizer in zip(model.turns, optimizers, strict=True):
            for _ in range(turn.repeats):
                with precision():
                    loss, scalars = turn(batch, turn.draw(len(batch.cover), noise))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                last = scalars.get("critic", last)
        return last

    return step


def notebook_loop(model: Model, batch: data.Batch, options: wgan_gp.Options) -> Callable[[], Tensor]:
    """The same numbers as a plain notebook has them: instance norm layers, one backward per loss term, no autocast."""
    generator, critic = model.networks["generator"], model.networks["critic"]
    for i, layer in enumerate(critic.blocks):
        if isinstance(layer, nn.GroupNorm):
            norm = nn.InstanceNorm2d(layer.num_channels, affine=True).to(layer.weight.device)
            norm.load_state_dict(layer.state_dict())
            critic.blocks[i] = norm
    adam = {net: torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.0, 0.999)) for net in (generator, critic)}
    noise = torch.Generator(batch.cover.device)

    def step() -> Tensor:
        noise.manual_seed(1)
        count = len(batch.cover)

        def normal() -> Tensor:
            return torch.randn(count, options.latent, generator=noise, device=noise.device)

        for _ in range(options.critic_steps):
            critic.zero_grad()
            real = batch.cover.float() / 127.5 - 1
            real_loss = -critic(real).mean()
            real_loss.backward()
            fake = generator(normal())
            fake_loss = critic(fake.detach()).mean()
            fake_loss.backward()
            mix = torch.rand(count, 1, 1, 1, generator=noise, device=noise.device)
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
