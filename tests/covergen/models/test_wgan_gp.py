"""WGAN-GP: a penalty per image, the same gradients as double backward, and a critic that may be conditional."""

from __future__ import annotations

import torch

from covergen.data.batch import Batch
from covergen.models.base import InputSpec, Model, to_minus_one_one
from covergen.models.wgan_gp import ConditionalOptions, Critic, build_conditional
from covergen.nn.losses import gradient_penalty, wasserstein_critic


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


def conditional(**options: bool) -> tuple[Model, Batch]:
    torch.manual_seed(0)
    model = build_conditional(ConditionalOptions(width=4, latent=8, **options), InputSpec(32, 20))
    audio, wrong = torch.randn(2, 6, 20)
    return model, Batch(torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), audio, None, None, wrong)


def test_only_the_projection_critic_depends_on_the_audio() -> None:
    for projection in (False, True):
        model, batch = conditional(projection_critic=projection)
        assert model.needs_mismatched_audio == projection and model.phases[1].conditional_critic == projection
        critic, images = model.networks["critic"], to_minus_one_one(batch.cover)
        one, other = critic(images, batch.audio), critic(images, batch.mismatched)
        assert one.shape == (6,) and torch.equal(one, other) != projection
        torch.testing.assert_close(critic(images[:2], batch.audio[:2]), one[:2])  # images and tracks do not mix


def test_a_projection_critic_counts_mismatched_pairs_as_generated_and_its_penalty_uses_the_audio() -> None:
    model, batch = conditional(projection_critic=True)
    phase, critic = model.phases[0], model.networks["critic"]
    noise = phase.sample_noise(6, torch.Generator().manual_seed(0))
    loss, scalars = phase(batch, noise)
    with torch.no_grad():
        fake = model.networks["generator"](noise["latents"], batch.audio)
        real, audio = to_minus_one_one(batch.cover), batch.audio
        worse = (critic(fake, audio) + critic(real, batch.mismatched)) / 2
        expected = wasserstein_critic(critic(real, audio), worse)
    torch.testing.assert_close(scalars["wasserstein"], -expected)
    penalty, slope = gradient_penalty(lambda images: critic(images, audio), real, fake, noise["mix"])
    torch.testing.assert_close(scalars["critic_grad_norm"], slope)
    torch.testing.assert_close(loss, expected + 10 * penalty)


def test_a_generator_wants_a_high_score_with_its_own_audio() -> None:
    model, batch = conditional(projection_critic=True)
    phase = model.phases[1]
    noise = phase.sample_noise(6, torch.Generator().manual_seed(0))
    fake = model.networks["generator"](noise["latents"], batch.audio)
    torch.testing.assert_close(phase(batch, noise)[0], -model.networks["critic"](fake, batch.audio).mean())
