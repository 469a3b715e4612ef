"""Flow matching: paths, times, Heun's steps, guidance, and losses that say whether audio is right."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from covergen.data.batch import Batch
from covergen.models.base import InputSpec, Model, to_minus_one_one
from covergen.models.flow import Options, build, heun, velocity_errors

AUDIO = 20
TINY = {"width": 32, "channel_mult": (1,), "blocks": 1, "attention_levels": 0, "patch_size": 4, "sampling_steps": 1}


def made(audio: int = AUDIO, **options: Any) -> Model:
    """A tiny model whose audio already matters."""
    torch.manual_seed(0)
    model = build(Options(**{**TINY, **options}), InputSpec(32, audio))
    if audio:
        nn.init.normal_(model.networks["flow"].head.weight, std=0.3)
    return model


def batch_of(size: int = 4) -> Batch:
    source = torch.Generator().manual_seed(1)
    cover = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=source)
    return Batch(cover, torch.randn(size, AUDIO, generator=source), torch.arange(size), torch.arange(size))


def noise_of(model: Model, size: int = 4) -> dict[str, torch.Tensor]:
    return model.phases[0].sample_noise(size, torch.Generator().manual_seed(2))


def test_heun_integrates_a_constant_field_exactly_with_two_evaluations_a_step_but_one() -> None:
    start, field, times = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), []

    def velocity(images: torch.Tensor, time: float) -> torch.Tensor:
        times.append(time)
        return field

    for steps in (1, 3, 16):
        times.clear()
        torch.testing.assert_close(heun(velocity, start, steps), start - field)
        assert len(times) == 2 * steps - 1 and times[0] == 1 and min(times) == pytest.approx(1 / steps)


def test_heun_is_of_second_order_on_a_linear_field_and_on_one_that_depends_on_time() -> None:
    start = torch.ones(1, dtype=torch.float64)
    for velocity, exact in ((lambda x, t: 2 * x, math.exp(-2)), (lambda x, t: t, 0.5)):
        wrong = [abs(heun(velocity, start, steps).item() - exact) for steps in (20, 40, 80)]
        assert wrong[0] < 0.01 and all(3.3 < one / other < 4.7 for one, other in pairwise(wrong))


@torch.no_grad()
def test_guidance_mixes_the_model_with_and_without_audio() -> None:
    model, audio = made(), torch.randn(4, AUDIO)
    flow, latents = model.networks["flow"], model.latents(4, torch.Generator().manual_seed(0), None)
    images, times = latents.view(4, 3, 32, 32), torch.ones(4)
    condition = flow.embed_audio(audio)
    conditional, unconditional = (images - flow(images, times, c) for c in (condition, torch.zeros_like(condition)))
    assert (conditional - unconditional).abs().max() > 1e-2
    for guidance, expected in ((1.0, conditional), (0.0, unconditional), (0.5, (conditional + unconditional) / 2),
                               (3.0, unconditional + 3 * (conditional - unconditional))):
        found = made(guidance=guidance).sample(model.networks, latents, audio)  # one step of Euler's
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_training_regresses_the_velocity_on_the_straight_path() -> None:
    model, batch = made(), batch_of()
    noise, covers, flow = noise_of(model), to_minus_one_one(batch.cover), model.networks["flow"]
    time = noise["times"].view(4, 1, 1, 1)
    calls = []
    nothing = nn.Module()  # says where it was asked, and that nothing moves
    nothing.forward = lambda images, times, condition: calls.append((images, times, condition)) or images * 0
    found = velocity_errors(nothing, covers, noise, None)
    torch.testing.assert_close(found, (noise["eps"] - covers).square().mean((1, 2, 3)))
    torch.testing.assert_close(calls[0][0], (1 - time) * covers + time * noise["eps"])
    assert torch.equal(calls[0][1], noise["times"])
    loss, scalars = model.phases[0](batch, noise)
    condition = flow.embed_audio(batch.audio, noise) * noise["condition_mask"]
    torch.testing.assert_close(loss, velocity_errors(flow, covers, noise, condition).mean())
    assert torch.equal(loss.detach(), scalars["flow"])


def test_times_are_logit_normal_and_a_share_of_the_audio_is_left_out() -> None:
    noise = noise_of(made(condition_dropout=0.25), 500)
    logits = torch.logit(noise["times"])
    assert abs(logits.mean()) < 0.15 and abs(logits.std() - 1) < 0.1
    assert noise["condition_mask"].unique().tolist() == [0.0, 1.0] and abs(noise["condition_mask"].mean() - 0.75) < 0.06
    assert noise_of(made(condition_dropout=0.0), 500)["condition_mask"].all()


def test_audio_that_is_left_out_changes_nothing() -> None:
    model, batch = made(), batch_of()
    other = batch._replace(audio=-batch.audio)
    noise = noise_of(model)
    for mask, same in ((0.0, True), (1.0, False)):
        noise["condition_mask"] = torch.full((4, 1), mask)
        one, two = (model.phases[0](some, noise)[0] for some in (batch, other))
        assert torch.equal(one, two) == same


def test_the_denoising_loss_is_each_cover_s_with_all_its_audio() -> None:
    model, batch, flow = made(), batch_of(), made().networks["flow"]
    noise = noise_of(model)
    found = model.denoising_loss(model.networks, batch, noise)
    expected = velocity_errors(flow, to_minus_one_one(batch.cover), noise, flow.embed_audio(batch.audio))
    assert found.shape == (4,)
    torch.testing.assert_close(found, expected)
    names = ("dropout_mask", "embedding_noise", "condition_mask")
    without = {**noise, **{name: torch.zeros_like(noise[name]) for name in names}}
    assert torch.equal(model.denoising_loss(model.networks, batch, without), found)
    part = Batch(*(None if value is None else value[1:2] for value in batch))
    one = model.denoising_loss(model.networks, part, {name: value[1:2] for name, value in noise.items()})
    torch.testing.assert_close(one, found[1:2])
    wrong = model.denoising_loss(model.networks, batch._replace(audio=-batch.audio), noise)
    assert (wrong - found).abs().min() > 1e-5


def test_biases_of_attention_s_keys_which_change_nothing_stay_where_rounding_would_move_them() -> None:
    model = made(attention_levels=1)
    model.phases[0](batch_of(), noise_of(model))[0].backward()
    found = {name: parameter.grad for name, parameter in model.networks["flow"].named_parameters()}
    keys = [name for name in found if name.endswith("to_k.bias")]
    assert len(keys) == 4 and not any(found[name].any() for name in keys)
    assert all(found[name.replace("to_k", "to_q")].any() for name in keys)


def test_audio_does_not_matter_at_the_start() -> None:
    torch.manual_seed(0)
    model, batch = build(Options(**TINY), InputSpec(32, AUDIO)), batch_of()
    assert not model.networks["flow"].embed_audio(batch.audio).any()


def test_without_audio_it_is_unconditional() -> None:
    model, batch = made(audio=0), batch_of()._replace(audio=None)
    assert not model.conditional and model.denoising_loss is None and set(noise_of(model)) == {"eps", "times"}
    loss, _ = model.phases[0](batch, noise_of(model))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.phases[0].parameters())
    with torch.no_grad():
        assert model.sample(model.networks, noise_of(model)["eps"].flatten(1), None).shape == (4, 3, 32, 32)


@pytest.mark.parametrize("options", [
    {"patch_size": 1}, {"patch_size": 2, "channel_mult": (1, 2), "attention_levels": 1},
    {"patch_size": 4, "channel_mult": (1, 1), "attention_levels": 2}])
def test_patch_sizes_sides_and_attention_can_be_chosen(options: dict[str, Any]) -> None:
    model = made(**options)
    unet = model.networks["flow"].unet
    attends = [hasattr(block, "attentions") for block in unet.down_blocks]
    plain = len(attends) - options.get("attention_levels", 0)
    assert attends == [False] * plain + [True] * (len(attends) - plain)
    assert attends == [hasattr(block, "attentions") for block in unet.up_blocks][::-1]
    with torch.no_grad():
        images = model.sample(model.networks, model.latents(1, torch.Generator(), None), torch.randn(1, AUDIO))
    assert images.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("options", [
    {"width": 20}, {"width": 8, "attention_levels": 1}, {"attention_levels": 2}, {"patch_size": 3},
    {"width": 4, "channel_mult": (2, 3)}])
def test_sizes_that_can_not_be_are_refused_in_the_words_of_the_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"--width \d+ --channel_mult .* --attention_levels \d+ --patch_size \d: "
                                         r"expected channels that 8 divides \(32 where there is attention\)"):
        made(**options)


def test_without_diffusers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"--model flow needs the diffusers package .*pip install -e \.\[flow\]"):
        made()
