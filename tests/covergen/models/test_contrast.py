"""Contrast: unit vectors that find each other, one temperature, albums that do not repel their own tracks."""

from __future__ import annotations

import math

import pytest
import torch

from covergen import models
from covergen.data.batch import Batch
from covergen.models.base import InputSpec, Model
from covergen.models.contrast import MAX_SCALE, gather_with_grad
from covergen.nn.losses import info_nce

AUDIO = 20


def made(**options: float) -> Model:
    spec = models.load("contrast")
    torch.manual_seed(0)
    options = {"width": 8, "audio_dropout": 0.2, "embedding_noise": 0.1, **options}
    return spec.build(spec.options(**options), InputSpec(32, AUDIO))


def batch_of(size: int, albums: int) -> Batch:
    """Covers of a colour an album (there are eight), and audio that is its album's but for a little."""
    source = torch.Generator().manual_seed(1)
    group = torch.arange(size) % albums
    colours = torch.cartesian_prod(*[torch.tensor([0, 255], dtype=torch.uint8)] * 3)
    cover = colours[group % 8, :, None, None].expand(-1, -1, 32, 32)
    audio = torch.randn(albums, AUDIO, generator=source)[group] + 0.1 * torch.randn(size, AUDIO, generator=source)
    return Batch(cover, audio, group, group)


def noise_of(model: Model, size: int) -> dict[str, torch.Tensor]:
    return model.phases[0].sample_noise(size, torch.Generator().manual_seed(2))


@torch.no_grad()
def test_covers_and_audio_become_unit_vectors_without_noise() -> None:
    model, batch = made(), batch_of(6, 6)
    covers, tracks = model.encode(model.networks, batch), model.embed_audio(model.networks, batch.audio)
    assert covers.shape == tracks.shape == (6, 128) and model.sample is None and model.reconstruct is None
    for vectors in (covers, tracks):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(6))
        assert (vectors[0] - vectors[1]).abs().max() > 1e-2
    assert torch.equal(model.embed_audio(model.networks, batch.audio), tracks)
    torch.testing.assert_close(model.encode(model.networks, batch._replace(cover=batch.cover[:2])), covers[:2])


def test_it_learns_which_audio_is_of_which_cover() -> None:
    model, batch = made(width=16), batch_of(16, 8)  # norms of several channels, which leave colour in
    phase = model.phases[0]
    optimizer, before = torch.optim.Adam(phase.parameters(), 1e-3), phase(batch, noise_of(model, 16))[1]
    for number in range(30):
        loss, scalars = phase(batch, phase.sample_noise(16, torch.Generator().manual_seed(number)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert scalars["contrast"] < before["contrast"] - 0.8  # it can't fall below log 2 with two tracks an album
    assert before["top1"] < 0.5 and scalars["top1"] > 0.8
    with torch.no_grad():
        found = (model.embed_audio(model.networks, batch.audio) @ model.encode(model.networks, batch).T).argmax(1)
    assert (batch.group[found] == batch.group).float().mean() > 0.8


def test_tracks_of_one_album_are_each_other_s_positives() -> None:
    model = made()
    batch, noise = batch_of(8, 1), noise_of(model, 8)
    scalars = model.phases[0](batch, noise)[1]
    assert scalars["top1"] == 1 and scalars["contrast"] > math.log(8) - 1e-3  # minus the mean of eight log shares
    assert model.phases[0](batch._replace(group=torch.arange(8)), noise)[1]["top1"] < 1


def test_the_temperature_is_clip_s_and_bounded() -> None:
    model, batch = made(), batch_of(4, 4)
    scalars = model.phases[0](batch, noise_of(model, 4))[1]
    assert scalars["temperature"].item() == pytest.approx(0.07)
    model.networks["contrast"].scale.data.fill_(20.0)
    assert model.phases[0](batch, noise_of(model, 4))[1]["temperature"].item() == pytest.approx(1 / MAX_SCALE)


def test_in_bf16_cosines_are_still_compared_in_fp32() -> None:
    model, batch = made(), batch_of(16, 16)
    phase, noise = model.phases[0], noise_of(made(), 16)
    phase.pair.scale.data.fill_(math.log(MAX_SCALE))
    vectors = []
    phase.pair.register_forward_hook(lambda module, inputs, outputs: vectors.extend(outputs))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss, _ = phase(batch, noise)
    expected = info_nce(vectors[1], vectors[0], torch.tensor(MAX_SCALE), torch.eye(16, dtype=torch.bool))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_one_process_gathers_nothing_and_audio_is_needed() -> None:
    part = torch.randn(3, 2)
    assert gather_with_grad(part) is part
    spec = models.load("contrast")
    with pytest.raises(ValueError, match="hold no audio vectors"):
        spec.build(spec.options(), InputSpec(32, 0))
