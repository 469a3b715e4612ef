"""WGAN-GP's step as the thesis's notebook has it, in plain torch: the model's networks and covers in, a step out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from covergen.nn.turn import Model
from covergen.runtime import data


def notebook_loop(model: Model, batches: list[data.Batch], options: Any) -> Callable[[], Tensor]:
    """The same numbers as a plain notebook has them: instance norm layers, one backward per loss term, no autocast."""
    generator, critic = model.networks["generator"], model.networks["critic"]
    for i, layer in enumerate(critic.blocks):
        if isinstance(layer, nn.GroupNorm):
            norm = nn.InstanceNorm2d(layer.num_channels, affine=True).to(layer.weight.device)
            norm.load_state_dict(layer.state_dict())
            critic.blocks[i] = norm
    adam = {net: torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.0, 0.999)) for net in (generator, critic)}
    noise, number = torch.Generator(batches[0].cover.device).manual_seed(1), 0

    def step() -> Tensor:
        nonlocal number
        number += 1
        count = len(batches[0].cover)

        def normal() -> Tensor:
            return torch.randn(count, options.latent, generator=noise, device=noise.device)

        for repeat in range(options.critic_steps):
            critic.zero_grad()
            real = batches[(number * options.critic_steps + repeat) % len(batches)].cover.float() / 127.5 - 1
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
