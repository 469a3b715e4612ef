"""WGAN-GP: the thesis's sizes, a penalty per image, and turns that train only what is theirs."""

from __future__ import annotations

import pytest
import torch

from covergen import models
from covergen.models.wgan_gp import Options, build
from covergen.nn.layers import normal_latents
from covergen.nn.losses import gradient_penalty
from covergen.runtime.data import Batch


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameters_are_the_thesis_s_at_128_px() -> None:
    networks = build(Options(), 128).networks
    assert count(networks["generator"]) == 4_353_091
    assert count(networks["critic"]) == 3_814_785


@pytest.mark.parametrize("resolution", [32, 64, 128, 256])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_resolution_trains_and_samples(resolution: int, norm: str) -> None:
    model = build(Options(width=8, norm=norm), resolution)
    batch = Batch(torch.randint(0, 256, (2, 3, resolution, resolution), dtype=torch.uint8), None, None, None)
    for turn in model.turns:
        loss, scalars = turn(batch, turn.draw(2, torch.Generator().manual_seed(0)))
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in turn.parameters())
        assert all(not value.requires_grad for value in scalars.values())
    images = model.sample(model.networks, model.latents(3, torch.Generator(), None))
    assert images.shape == (3, 3, resolution, resolution) and images.abs().max() <= 1


def test_other_resolutions_are_refused() -> None:
    with pytest.raises(ValueError, match="resolution 48"):
        build(Options(), 48)


def test_a_turn_trains_its_own_network_only() -> None:
    model = build(Options(width=4), 32)
    batch = Batch(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), None, None, None)
    for turn, own, other in zip(model.turns, ("critic", "generator"), ("generator", "critic"), strict=True):
        assert {id(p) for p in turn.parameters()} == {id(p) for p in model.networks[own].parameters()}
        turn(batch, turn.draw(2, torch.Generator().manual_seed(0)))[0].backward()
        assert all(p.grad is None for p in model.networks[other].parameters())
        turn.zero_grad()


def test_penalty_and_its_gradients_are_those_of_double_backward_per_image() -> None:
    critic = build(Options(width=4), 32).networks["critic"]
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


def test_truncated_latents_stay_inside_their_bound() -> None:
    latents = normal_latents(1000, 10, torch.Generator().manual_seed(0), truncation=1.5)
    assert latents.abs().max() <= 1.5 and latents.std() > 0.5


def test_the_table_of_models_is_whole() -> None:
    for name in models.MODELS:
        module = models.load(name)
        assert module.Options and module.PRESET and module.build
