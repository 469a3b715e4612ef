"""WGAN-GP: a penalty per image, the same gradients as double backward."""

from __future__ import annotations

import torch

from covergen.models.wgan_gp import Critic
from covergen.nn.losses import gradient_penalty


def test_penalty_and_its_gradients_are_those_of_double_backward_per_image() -> None:
    critic = Critic(32, 4, "batch")
    real, fake = torch.randn(2, 4, 3, 32, 32).unbind(0)
    mix = torch.rand(4, 1, 1, 1)
    ours, slope = gradient_penalty(critic, real, fake, mix)
    ours.backward()
    found = [p.grad.clone() for p in critic.parameters() if p.grad is not None]
    critic.zero_grad()
    between = (fake + mix * (real - fake)).requires_grad_(True)
    grad = torch.autograd.grad(critic(between).sum(), between, create_graph=True)[0]
    norm = grad.flatten(1).norm(dim=1)
    expected = ((norm - 1) ** 2).mean()
    expected.backward()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(slope, norm.mean())
    for mine, theirs in zip(found, [p.grad for p in critic.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_penalty_of_a_critic_with_slope_one_is_zero_and_of_a_flat_one_is_one() -> None:
    real, fake, mix = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8), torch.rand(3, 1, 1, 1)
    unit = torch.randn(3 * 8 * 8)
    unit /= unit.norm()
    assert gradient_penalty(lambda x: x.flatten(1) @ unit, real, fake, mix)[0] < 1e-10
    flat, slope = gradient_penalty(lambda x: 0 * x.flatten(1).sum(1), real, fake, mix)
    assert abs(flat - 1) < 1e-5 and slope < 1e-5
