"""What conditional models share: audio embeddings and their noise, FiLM, losses over scores and pairs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from covergen.nn.layers import EMBEDDING, AudioEncoder, Modulation, ResidualMlp, audio_noise
from covergen.nn.losses import info_nce, relativistic_loss, squared_gradient_norms


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def encoder() -> AudioEncoder:
    torch.manual_seed(0)
    return AudioEncoder(20)


def test_an_embedding_has_mean_zero_and_variance_one_whatever_the_others_are(encoder: AudioEncoder) -> None:
    audio = 3 * torch.randn(6, 20, generator=source())
    found = encoder(audio)
    assert found.shape == (6, EMBEDDING) and found.mean(1).abs().max() < 1e-5
    torch.testing.assert_close(found.var(1, unbiased=False), torch.ones(6), rtol=1e-3, atol=0)
    torch.testing.assert_close(encoder(audio[:2]), found[:2])
    assert (found[0] - found[1]).abs().max() > 0.1


def test_noise_drops_features_scales_the_others_and_is_added_to_embeddings(encoder: AudioEncoder) -> None:
    noise = audio_noise(2000, 20, source(), embedding_noise=0.3, audio_dropout=0.2)
    assert noise["dropout_mask"].unique().tolist() == [0.0, 1.25] and abs(noise["dropout_mask"].mean() - 1) < 0.01
    assert noise["embedding_noise"].shape == (2000, EMBEDDING) and abs(noise["embedding_noise"].std() - 0.3) < 0.01
    audio = torch.randn(2000, 20, generator=source(1))
    torch.testing.assert_close(encoder(audio, noise), encoder(audio * noise["dropout_mask"]) + noise["embedding_noise"])
    again = audio_noise(2000, 20, source(), embedding_noise=0.3, audio_dropout=0.2)
    assert all(torch.equal(noise[name], again[name]) for name in noise)
    silent = audio_noise(2000, 20, source(), embedding_noise=0.0, audio_dropout=0.0)
    assert torch.equal(encoder(audio, silent), encoder(audio))


def test_modulation_starts_as_the_identity_and_then_scales_and_shifts() -> None:
    torch.manual_seed(0)
    film, maps, condition = Modulation(5, 4), torch.randn(3, 4, 2, 2), torch.randn(3, 5)
    assert torch.equal(film(maps, condition), maps)
    nn.init.normal_(film.head.weight)
    scale, shift = film.head(condition).chunk(2, 1)
    expected = torch.stack([maps[i] * (1 + scale[i, :, None, None]) + shift[i, :, None, None] for i in range(3)])
    torch.testing.assert_close(film(maps, condition), expected)


def test_a_residual_layer_adds_to_its_input() -> None:
    layer, features = ResidualMlp(6), torch.randn(3, 6)
    assert not torch.allclose(layer(features), features)
    nn.init.zeros_(layer.layers[-1].weight)
    nn.init.zeros_(layer.layers[-1].bias)
    assert torch.equal(layer(features), features)


def test_relativistic_loss_is_log_two_for_equals_and_small_where_the_better_scores_above() -> None:
    better, worse = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0])
    assert relativistic_loss(better, better).item() == pytest.approx(0.693147)
    expected = (torch.log1p(torch.exp(torch.tensor(-2.0))) + torch.log1p(torch.exp(torch.tensor(2.0)))) / 2
    torch.testing.assert_close(relativistic_loss(better, worse), expected)
    assert relativistic_loss(better + 9, worse) < 1e-3


def test_gradient_norms_and_their_gradients_are_those_of_double_backward() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.SiLU(), nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0))
    images = torch.randn(5, 3, 8, 8)
    ours = squared_gradient_norms(network, images)
    ours.mean().backward()
    found = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    network.zero_grad()
    inputs = images.clone().requires_grad_(True)
    slope = torch.autograd.grad(network(inputs).sum(), inputs, create_graph=True)[0]
    expected = slope.flatten(1).square().sum(1)
    expected.mean().backward()
    torch.testing.assert_close(ours, expected)
    theirs = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    for mine, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    direction = torch.randn(3 * 8 * 8)
    torch.testing.assert_close(squared_gradient_norms(lambda x: x.flatten(1) @ direction, images),
                               direction.square().sum().expand(5))


def loop(audio: torch.Tensor, images: torch.Tensor, scale: float, same: list[list[bool]]) -> float:
    """The same as ``info_nce``, from its definition."""
    logits = [[scale * sum(a * b for a, b in zip(one, other, strict=True)) for other in images.tolist()]
              for one in audio.tolist()]
    def side(rows: list[list[float]], positive: list[list[bool]]) -> float:
        total = 0.0
        for row, good in zip(rows, positive, strict=True):
            whole = torch.tensor(row, dtype=torch.float64).logsumexp(0).item()
            known = [value - whole for value, is_good in zip(row, good, strict=True) if is_good]
            total -= sum(known) / len(known)
        return total / len(rows)
    return (side(logits, same) + side(list(zip(*logits, strict=True)), list(zip(*same, strict=True)))) / 2


def test_info_nce_is_its_definition_with_one_and_with_several_positives() -> None:
    audio, images = (F.normalize(torch.randn(size, 6, generator=source(size)), dim=1) for size in (5, 4))
    groups = torch.tensor([7, 7, 8, 9, 9]), torch.tensor([9, 8, 7, 7])
    same = groups[0][:, None] == groups[1]
    assert same.sum(1).tolist() == [2, 2, 1, 1, 1]
    found = info_nce(audio, images, torch.tensor(4.0), same)
    assert found.item() == pytest.approx(loop(audio, images, 4.0, same.tolist()), rel=1e-5)
    each = torch.arange(4)
    logits = 4 * audio[:4] @ images.T
    torch.testing.assert_close(info_nce(audio[:4], images, torch.tensor(4.0), torch.eye(4, dtype=torch.bool)),
                               (F.cross_entropy(logits, each) + F.cross_entropy(logits.T, each)) / 2)


def test_info_nce_is_small_for_the_right_pairs_and_tracks_of_an_album_do_not_repel_each_other() -> None:
    vectors, groups = torch.eye(6), torch.tensor([0, 0, 1, 1, 2, 2])
    same, scale = groups[:, None] == groups, torch.tensor(50.0)
    albums = vectors[groups]
    assert info_nce(albums, albums, scale, same).item() == pytest.approx(0.693147)  # which of the two can't be known
    assert info_nce(albums, albums.roll(2, 0), scale, same) > 20
    assert info_nce(vectors, vectors, scale, torch.eye(6, dtype=torch.bool)) < 1e-6
