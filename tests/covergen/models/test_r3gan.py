"""R3GAN: blocks that start as the identity, scores of covers with audio, penalties every few steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from covergen.data.batch import Batch
from covergen.models.base import InputSpec, Model, to_minus_one_one
from covergen.models.r3gan import Block, Discriminator, Options, build, score
from covergen.nn.losses import relativistic_loss
from tests.support.runs import largest_difference

AUDIO = 20
TINY = {"width": 4, "blocks": 1, "group_size": 0, "latent": 8, "patch_size": 2, "penalty_every": 1}


def made(audio: int = AUDIO, resolution: int = 32, **options: Any) -> Model:
    """A model whose blocks are no longer the identity."""
    torch.manual_seed(0)
    model = build(Options(**{**TINY, **options}), InputSpec(resolution, audio))
    for network in model.networks.values():
        for module in network.modules():
            if isinstance(module, Block):
                nn.init.normal_(module.layers[-1].weight, std=0.1)
                if module.modulation:
                    nn.init.normal_(module.modulation.head.weight, std=0.1)
    return model


def batch_of(size: int = 6) -> Batch:
    source = torch.Generator().manual_seed(1)
    cover = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=source)
    audio, wrong = torch.randn(2, size, AUDIO, generator=source)
    return Batch(cover, audio, torch.arange(size), torch.arange(size), wrong)


def losses(model: Model, batch: Batch, number: int = 1, images: int = 0) -> tuple[torch.Tensor, dict]:
    """Of the discriminator's phase in a step of a given number."""
    phase = model.phases[0]
    phase.begin(number, images)
    return phase(batch, phase.sample_noise(len(batch.cover), torch.Generator().manual_seed(2)))


@pytest.mark.parametrize(("group", "condition"), [(0, 0), (4, 0), (0, 5), (4, 5)])
def test_a_block_starts_as_the_identity(group: int, condition: int) -> None:
    block, maps = Block(8, group, 4, condition), torch.randn(2, 8, 4, 4)
    given = torch.randn(2, condition) if condition else None
    assert torch.equal(block(maps, given), maps)
    assert block.layers[2].groups == (2 if group else 1)
    nn.init.ones_(block.layers[-1].weight)
    assert (block(maps, given) - maps).abs().max() > 1e-3


def test_both_networks_are_linear_at_the_start_and_their_blocks_the_identity() -> None:
    torch.manual_seed(0)
    model = build(Options(**{**TINY, "blocks": 2}), InputSpec(32, AUDIO))
    blocks = [module for network in model.networks.values() for module in network.modules()
              if isinstance(module, Block)]
    assert len(blocks) == 2 * 2 * 3  # two networks, two blocks at 4, 8 and 16
    embed, (one, other) = model.networks["discriminator"].embed_image, torch.randn(2, 3, 3, 32, 32)
    torch.testing.assert_close(embed(one) + embed(other), embed(one + other) + embed(torch.zeros_like(one)))
    audio, (one, other) = torch.randn(3, AUDIO), torch.randn(2, 3, 8)
    make = model.networks["generator"]
    torch.testing.assert_close(make(one, audio) + make(other, audio), make(one + other, audio) + make(0 * one, audio))


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("resolution", [32, 64])
def test_covers_have_their_size_with_any_patch_size(patch_size: int, resolution: int) -> None:
    model = made(resolution=resolution, patch_size=patch_size)
    images = model.sample(model.networks, model.latents(2, torch.Generator(), None), torch.randn(2, AUDIO))
    assert images.shape == (2, 3, resolution, resolution)
    assert model.networks["discriminator"].embed_image(images).shape == (2, 128)


def test_other_patch_sizes_and_augmentations_are_refused() -> None:
    with pytest.raises(ValueError, match="--patch_size 3: expected 1, 2 or 4"):
        made(patch_size=3)
    with pytest.raises(ValueError, match="--augment: 'colour'"):
        made(augment=("colour",))


def test_a_score_is_of_a_cover_with_its_audio_and_images_do_not_mix() -> None:
    discriminator, batch = made().networks["discriminator"], batch_of()
    images, embedding = to_minus_one_one(batch.cover), discriminator.embed_audio(batch.audio, None)
    scores = discriminator(images, embedding)
    assert scores.shape == (6,)
    assert (scores - discriminator(images, discriminator.embed_audio(batch.mismatched, None))).abs().max() > 1e-2
    torch.testing.assert_close(discriminator(images[:2], embedding[:2]), scores[:2])
    twos, threes = torch.full((1, 128), 2.0), torch.full((1, 128), 3.0)
    torch.testing.assert_close(score(twos, threes), torch.tensor([6 * 128**0.5]))


def test_without_audio_there_is_one_direction_and_nothing_conditional() -> None:
    model, batch = made(audio=0), batch_of()._replace(audio=None, mismatched=None)
    discriminator = model.networks["discriminator"]
    assert isinstance(discriminator, Discriminator) and not model.conditional and not model.needs_mismatched_audio
    embedding = discriminator.embed_audio(None, None)
    assert embedding.shape == (1, 128) and torch.equal(embedding[0], discriminator.direction)
    features = discriminator.embed_image(to_minus_one_one(batch.cover))
    scores = discriminator(to_minus_one_one(batch.cover), embedding)
    torch.testing.assert_close(scores, features @ embedding[0] / 128**0.5)
    for phase in model.phases:
        loss, _ = phase(batch, phase.sample_noise(6, torch.Generator().manual_seed(0)))
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in phase.parameters())


def test_with_audio_mismatched_pairs_are_asked_for_unless_they_weigh_nothing() -> None:
    assert made().conditional and made().needs_mismatched_audio
    assert made(mismatch_weight=0.0).conditional and not made(mismatch_weight=0.0).needs_mismatched_audio


def test_the_penalty_is_taken_every_k_steps_with_k_times_the_weight() -> None:
    model, batch = made(penalty=0.5, penalty_every=4, penalty_last=0.1), batch_of()
    bare, scalars = losses(model, batch, 3)
    assert "penalty" not in scalars
    full, scalars = losses(model, batch, 4)
    torch.testing.assert_close(full - bare, 4 * 0.5 * scalars["penalty"])
    assert scalars["penalty"] > 0
    each = made(penalty=0.5)
    for number in (3, 4):
        full, scalars = losses(each, batch, number)
        torch.testing.assert_close(full - bare, 0.5 * scalars["penalty"])


def test_the_penalty_s_weight_falls_over_its_images() -> None:
    phase = made(penalty=2.0, penalty_last=0.5, penalty_images=1000, penalty_every=3).phases[0]
    for images, weight in ((0, 6.0), (500, 3.75), (1000, 1.5), (9000, 1.5)):
        phase.begin(3, images)
        assert phase.weight.item() == pytest.approx(weight)


def test_a_penalty_of_zero_leaves_the_loss_alone() -> None:
    model, batch = made(penalty=0.0), batch_of()
    loss, scalars = losses(model, batch)
    torch.testing.assert_close(loss.detach(), scalars["discriminator"] + scalars["mismatch"])
    loss.backward()


def test_the_penalty_is_half_gamma_for_real_and_for_generated_covers_and_bends_the_audio_s_encoder_too() -> None:
    model, batch = made(penalty=0.7, mismatch_weight=0.0, augment=("none",)), batch_of()
    loss, _ = losses(model, batch)
    loss.backward()
    discriminator, phase = model.networks["discriminator"], model.phases[0]
    found = {name: parameter.grad.clone() for name, parameter in discriminator.named_parameters()}
    discriminator.zero_grad()
    noise = phase.sample_noise(6, torch.Generator().manual_seed(2))
    embedding = discriminator.embed_audio(batch.audio, noise)
    images = [to_minus_one_one(batch.cover), model.networks["generator"](noise["latents"], batch.audio, noise).detach()]
    real, fake = (discriminator(side.requires_grad_(True), embedding) for side in images)
    slopes = [torch.autograd.grad(scores.sum(), side, create_graph=True)[0].flatten(1).square().sum(1).mean()
              for scores, side in zip((real, fake), images, strict=True)]
    expected = relativistic_loss(real, fake) + 0.7 / 2 * sum(slopes)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in discriminator.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_mismatched_pairs_count_by_their_weight_and_the_very_same_audio_is_worth_log_two() -> None:
    batch = batch_of()
    losses_of = {weight: losses(made(mismatch_weight=weight, penalty=0.0), batch) for weight in (0.0, 1.0, 2.5)}
    assert "mismatch" not in losses_of[0.0][1]
    mismatch = losses_of[1.0][1]["mismatch"]
    for weight in (1.0, 2.5):
        torch.testing.assert_close(losses_of[weight][0], losses_of[0.0][0] + weight * mismatch)
    same = losses(made(), batch._replace(mismatched=batch.audio))[1]["mismatch"]
    assert same.item() == pytest.approx(0.693147) and (mismatch - same).abs() > 1e-3


@pytest.mark.parametrize("kinds", [("translation", "cutout"), ("color", "translation", "cutout"), ("none",)])
def test_real_and_generated_covers_are_changed_alike_in_both_phases(kinds: tuple[str, ...]) -> None:
    model, batch = made(augment=kinds), batch_of()
    copies = nn.Module()
    copies.forward = lambda latents, audio, noise: to_minus_one_one(batch.cover)  # "generates" the real covers
    model.phases[0].frozen_networks, model.phases[1].trained = (copies,), copies
    assert losses(model, batch)[1]["score_gap"] == 0
    phase = model.phases[1]
    loss, _ = phase(batch, phase.sample_noise(6, torch.Generator().manual_seed(0)))
    assert loss.item() == pytest.approx(0.693147)


@pytest.mark.parametrize(("kinds", "changes"), [(("none",), False), (("translation",), True), (("color",), True)])
def test_augmentation_follows_its_draws_and_none_has_none(kinds: tuple[str, ...], changes: bool) -> None:
    model, batch = made(augment=kinds), batch_of()
    for phase in model.phases:
        noise = phase.sample_noise(6, torch.Generator().manual_seed(2))
        one = phase(batch, noise)[0]
        other = phase(batch, {**noise, "augmentation": -noise["augmentation"]})[0]
        assert torch.equal(one, other) != changes


def test_a_generator_wants_its_covers_above_the_real_ones() -> None:
    model, batch = made(), batch_of()
    generator = model.phases[1]
    noise = generator.sample_noise(6, torch.Generator().manual_seed(2))
    gap = losses(model, batch)[1]["score_gap"]
    for _ in range(5):
        before = generator(batch, noise)[0]
        before.backward()
        with torch.no_grad():
            for parameter in generator.parameters():
                parameter -= 0.01 * parameter.grad
        generator.zero_grad()
    assert generator(batch, noise)[0] < before and losses(model, batch)[1]["score_gap"] < gap


def trained(parts: int, audio: int, **options: Any) -> dict[str, torch.Tensor]:
    """All weights after some steps whose gradients are means over so many parts of each batch."""
    torch.manual_seed(0)
    model = build(Options(**{**TINY, **options}), InputSpec(32, audio))
    optimizers = [torch.optim.Adam(phase.parameters(), 5e-4, betas=(0.0, 0.99)) for phase in model.phases]
    cover, audio_batch, genre, group, wrong = batch_of(12)
    whole = Batch(cover, audio_batch if audio else None, genre, group, wrong if model.needs_mismatched_audio else None)
    for number in range(1, 13):
        for phase, optimizer in zip(model.phases, optimizers, strict=True):
            phase.begin(number, 12 * number)
            noise = phase.sample_noise(12, torch.Generator().manual_seed(number))
            for part in range(parts):
                mine = slice(part * 12 // parts, (part + 1) * 12 // parts)
                batch = Batch(*(None if value is None else value[mine] for value in whole))
                (phase(batch, {name: value[mine] for name, value in noise.items()})[0] / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {f"{name}.{key}": value for name, network in model.networks.items()
            for key, value in network.state_dict().items()}


@pytest.mark.parametrize(("audio", "mismatch"), [(0, 1.0), (AUDIO, 0.0), (AUDIO, 1.0)])
def test_a_batch_may_be_split_over_processes_with_and_without_audio_and_mismatched_pairs(audio: int, mismatch: float
                                                                                         ) -> None:
    one, two = (trained(parts, audio, mismatch_weight=mismatch) for parts in (1, 2))
    assert largest_difference(one, two) < (1e-4 if audio and mismatch else 1e-3)  # of biases that were 0
