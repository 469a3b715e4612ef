"""Grids of a run: what rows and columns show, from fixed inputs, for models of every kind."""

from __future__ import annotations

import pytest
import torch

from covergen import models
from covergen.data.batch import Batch
from covergen.models.base import InputSpec, Model
from covergen.training.sample_grids import Grid, SampleGrids

GENRES = ["blues", "folk", "jazz"]


def examples(count: int) -> Batch:
    source = torch.Generator().manual_seed(0)
    return Batch(torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=source),
                 torch.randn(count, 20, generator=source), torch.arange(count) % 3, torch.arange(count))


def drawn(grids: SampleGrids, model: Model) -> list[Grid]:
    with torch.no_grad():
        return list(grids.draw(model.networks))


def sample_grids(name: str, count: int, **options: object) -> tuple[SampleGrids, Model]:
    recipe = models.load(name)
    model = recipe.build(recipe.options(**{"width": 8, **options}), InputSpec(32, 20))

    for network in model.networks.values():
        network.eval()
    return SampleGrids(model, examples(count), GENRES, 32, torch.device("cpu"), seed=0), model


@pytest.mark.parametrize("count", [5, 8, 20])
def test_originals_stand_above_their_reconstructions(count: int) -> None:
    shown, model = sample_grids("ae_resize", count)
    grid, = drawn(shown, model)
    rows = max(8, count // 8 * 8) // 8
    assert grid.name == "reconstructions" and grid.labels == ["original", "model"] * rows
    assert grid.covers.shape == (16 * rows, 3, 32, 32) and grid.covers.min() >= 0 and grid.covers.max() <= 1
    originals = shown.examples.cover
    assert torch.equal(grid.covers[:8], originals[:8].float() / 255)
    made = model.reconstruct(model.networks, shown.examples).detach()
    torch.testing.assert_close(grid.covers[8:16], made[:8])


def test_a_conditional_model_has_a_row_for_each_track_and_columns_share_noise() -> None:
    shown, model = sample_grids("cond_lsgan", 20)
    noise, truncated = drawn(shown, model)
    assert (noise.name, truncated.name) == ("noise", "truncated") and noise.covers.shape == (64, 3, 32, 32)
    assert noise.labels == ["blues", "folk", "jazz", "blues", "folk", "jazz", "blues", "folk"]
    latents = shown.latents["noise"]
    assert torch.equal(latents[:8], latents[8:16]) and not torch.equal(latents[0], latents[1])
    assert torch.equal(shown.audio[0], shown.audio[7]) and not torch.equal(shown.audio[0], shown.audio[8])
    assert shown.latents["truncated"].abs().max() <= model.truncation


def test_grids_are_the_same_from_the_same_weights() -> None:
    shown, model = sample_grids("vae", 9)
    first, again = drawn(shown, model), drawn(shown, model)
    assert [grid.name for grid in first] == ["noise", "truncated", "reconstructions"]
    assert all(torch.equal(one.covers, other.covers) for one, other in zip(first, again, strict=True))


def test_a_flow_has_no_truncated_grid_and_a_model_without_covers_has_none() -> None:
    shown, model = sample_grids("flow", 9, channel_mult=(1,), blocks=1, attention_levels=0, patch_size=4,
                                sampling_steps=1)
    grid, = drawn(shown, model)
    assert grid.name == "noise" and grid.covers.shape == (64, 3, 32, 32) and grid.labels[:2] == ["blues", "folk"]
    assert not drawn(*sample_grids("contrast", 9))
