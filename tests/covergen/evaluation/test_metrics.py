"""Metrics agree with the plain formulas they stand for, and know copies from fresh samples."""

from __future__ import annotations

import itertools
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn

from covergen.evaluation import metrics


def features(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(queries: torch.Tensor, base: torch.Tensor, order: int, groups=None) -> np.ndarray:
    """All distances in float64, infinite within a group."""
    one, other = queries.double().numpy(), base.double().numpy()
    distances = np.linalg.norm(one[:, None] - other[None], order, axis=2)
    if groups:
        distances[groups[0].numpy()[:, None] == groups[1].numpy()[None]] = np.inf
    return distances


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("values", [2**25, 60])  # in one block; in blocks of a few rows
def test_nearest_is_what_all_distances_say(monkeypatch, order: int, values: int) -> None:
    monkeypatch.setattr(metrics, "BLOCK_VALUES", values)
    queries, base = features(1, 23, 9), features(2, 41, 9) + 100  # far from zero: where fast formulas lose digits
    queries = torch.cat([queries + 100, base[5:8]])
    groups = torch.arange(26) % 6, torch.arange(41) % 6
    for some in (None, groups):
        distances, places = metrics.nearest(queries, base, 7, order=order, groups=some)
        expected = by_hand(queries, base, order, some)
        assert np.array_equal(places.numpy(), np.argsort(expected, 1, kind="stable")[:, :7])
        np.testing.assert_allclose(distances.numpy(), np.sort(expected, 1)[:, :7], rtol=1e-5)
    assert metrics.nearest(queries, base, 1, order=order)[0][23:].abs().max() == 0  # copies are at no distance at all


def test_nearest_takes_bytes_and_says_where_there_are_too_few() -> None:
    base = torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(0)).byte()
    groups = torch.tensor([0, 0, 1, 1, 1])
    distances, places = metrics.nearest(base, base, 4, groups=(groups, groups))
    assert distances.isinf().sum(1).tolist() == [1, 1, 2, 2, 2]
    assert set(places[0, :3].tolist()) == {2, 3, 4} and set(places[4, :2].tolist()) == {0, 1}
    np.testing.assert_allclose(distances[0, :3], np.sort(by_hand(base, base, 2)[0, 2:]), rtol=1e-6)


def test_neighbours_vote_and_the_nearest_decides_ties() -> None:
    labels = torch.tensor([0, 1, 1, 2])
    places = torch.tensor([[0, 1, 2], [3, 0, 1], [1, 0, 3], [0, 1, 2]])
    distances = torch.tensor([[1.0, 2, 3], [1, 2, 3], [1, 2, torch.inf], [torch.inf] * 3])
    assert metrics.vote(labels, distances, places).tolist() == [1, 2, 1, -1]


def test_balanced_accuracy_counts_every_label_alike() -> None:
    truth = torch.tensor([0] * 98 + [1] * 2)
    assert metrics.balanced_accuracy(truth, torch.zeros(100, dtype=torch.int64)) == 0.5
    assert metrics.balanced_accuracy(truth, truth) == 1


def test_knn_accuracy_is_what_counting_says_without_the_own_album() -> None:
    values, draws = features(3, 60, 4), torch.Generator().manual_seed(4)
    labels, groups = torch.randint(0, 3, (60,), generator=draws), torch.randint(0, 25, (60,), generator=draws)
    distances = by_hand(values, values, 2, (groups, groups))
    hits = {label: [] for label in range(3)}
    for place in range(60):
        near = labels.numpy()[np.argsort(distances[place])[:10]].tolist()
        most = max(near.count(label) for label in range(3))
        hits[int(labels[place])].append(labels[place] == next(label for label in near if near.count(label) == most))
    found = metrics.knn_separation(values, labels + 5, groups)
    assert found.accuracy == pytest.approx(np.mean([np.mean(hit) for hit in hits.values()]))
    assert found.chance == pytest.approx(1 / 3)


def test_albums_alone_are_no_structure_and_clusters_are() -> None:
    draws = torch.Generator().manual_seed(5)
    groups = torch.arange(400) // 4
    labels = torch.randint(0, 4, (100,), generator=draws)[groups]  # random, but the same for all of an album
    albums = features(6, 100, 8)[groups] + 0.01 * features(7, 400, 8)
    alone = metrics.knn_separation(albums, labels, torch.arange(400), k=3)
    without = metrics.knn_separation(albums, labels, groups, k=3)
    assert alone.accuracy > 0.95 and abs(without.accuracy - 0.25) < 0.12
    clusters = metrics.knn_separation(albums + 20 * features(8, 4, 8)[labels], labels, groups)
    assert clusters.accuracy == 1 and abs(clusters.permuted - 0.25) < 0.05 and clusters.spread < 0.1


def test_thumbnails_are_means_of_areas() -> None:
    covers = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    expected = covers.double().numpy().reshape(3, 3, 4, 8, 4, 8).mean((3, 5)).reshape(3, 48)
    np.testing.assert_allclose(metrics.thumbnails(covers).numpy(), expected, rtol=1e-5)


def test_variation_is_the_mean_over_all_pairs() -> None:
    images = features(9, 4, 3, 2, 5, 5)
    rows = np.mean([(images[a, k] - images[b, k]).square().mean() for k in range(3)
                    for a, b in itertools.combinations(range(4), 2)])
    columns = np.mean([(images[g, a] - images[g, b]).square().mean() for g in range(4)
                       for a, b in itertools.combinations(range(3), 2)])
    assert metrics.variation(images) == pytest.approx((rows, columns), rel=1e-5)
    assert metrics.variation(images[:1].expand(4, 3, 2, 5, 5))[0] == 0  # rows that are all alike


def test_share_nearer_is_a_half_for_the_like_and_one_for_copies() -> None:
    held_out = torch.arange(100).float()
    assert metrics.share_nearer(held_out, held_out) == 0.5
    assert metrics.share_nearer(torch.zeros(10), held_out) == 1
    assert metrics.share_nearer(held_out + 100, held_out) == 0


# -- distributions ---


def frechet_by_hand(real: torch.Tensor, fake: torch.Tensor) -> float:
    """With the symmetric form of the trace: of the root of ``A^(1/2) B A^(1/2)``."""
    (one, first), (other, second) = ((part.double().mean(0).numpy(), np.cov(part.double().numpy().T))
                                     for part in (real, fake))
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return np.square(one - other).sum() + np.trace(first) + np.trace(second) - 2 * shared


@pytest.mark.parametrize("count", [500, 40])  # more and fewer than there are dimensions
def test_frechet_is_the_formula(count: int) -> None:
    mixing = features(0, 64, 64)
    real, fake = features(1, count, 64) @ mixing + 100, features(2, count + 7, 64) @ (mixing + 0.1) + 100.5
    assert metrics.frechet(real, fake) == pytest.approx(frechet_by_hand(real, fake), rel=1e-3)
    assert abs(metrics.frechet(real, real)) < 1e-3 * metrics.frechet(real, fake)


def test_kernel_is_the_formula_and_leaves_the_global_generator_alone() -> None:
    real, fake = features(3, 120, 16), features(4, 90, 16) * 1.2
    before = torch.get_rng_state()
    mean, deviation = metrics.kernel(real, fake, seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert (mean, deviation) == metrics.kernel(real, fake, seed=6) != metrics.kernel(real, fake, seed=7)
    draws, expected = torch.Generator().manual_seed(6), []
    for _ in range(100):
        x = real[torch.randperm(120, generator=draws)[:90]].double()
        y = fake[torch.randperm(90, generator=draws)].double()
        inner = [(one @ other.T / 16 + 1) ** 3 for one, other in ((x, x), (y, y), (x, y))]
        expected.append(sum((part.sum() - part.trace()) / (90 * 89) for part in inner[:2]) - 2 * inner[2].mean())
    expected = torch.stack(expected)
    assert mean == pytest.approx(expected.mean().item(), rel=1e-6)
    assert deviation == pytest.approx(expected.std(unbiased=False).item(), rel=1e-6)


def test_quality_metrics_are_near_zero_for_the_same_distribution_and_never_talk_to_other_processes(monkeypatch) -> None:
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    monkeypatch.setattr("torchmetrics.metric.gather_all_tensors", lambda *_, **__: pytest.fail("communicates"))
    real, fake = features(7, 400, 8), features(8, 400, 8)
    assert metrics.frechet(real, fake) < 0.3 < 1 < metrics.frechet(real, fake + 0.5)
    assert abs(metrics.kernel(real, fake, seed=0)[0]) < 0.02 < 0.1 < metrics.kernel(real, fake + 0.5, seed=0)[0]


def test_prdc_tells_blur_and_collapse_apart_without_printing(capsys) -> None:
    real, fake = features(9, 400, 6), features(10, 400, 6)
    like = metrics.prdc_of(real, fake)
    assert set(like) == {"precision", "recall", "density", "coverage"} and min(like.values()) > 0.85
    collapsed = metrics.prdc_of(real, fake * 0.2)
    assert collapsed["precision"] > 0.95 and collapsed["recall"] < 0.2 and collapsed["coverage"] < like["coverage"]
    far = metrics.prdc_of(real, fake + 20)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    assert capsys.readouterr().out == ""


def test_copied_is_one_for_copies_a_half_for_fresh_samples_and_knows_albums() -> None:
    training, held_out, fresh = features(11, 3000, 8), features(12, 1000, 8), features(13, 1000, 8)
    assert metrics.copied(training[:300], held_out, training) == 1
    assert metrics.copied(training[:300] + 0.01, held_out, training) == 1
    assert metrics.copied(fresh, held_out, training) == pytest.approx(0.5, abs=0.06)
    assert metrics.copied(fresh + 9, held_out, training) == 0
    reissued = torch.cat([held_out, training])  # the held-out covers are in the training too, of the same albums
    albums = torch.arange(1000), torch.arange(4000)
    assert metrics.copied(fresh, held_out, reissued) == 0
    assert metrics.copied(fresh, held_out, reissued, groups=albums) == pytest.approx(0.5, abs=0.06)


def test_inception_features_are_of_all_images_in_order(monkeypatch) -> None:
    class Network(nn.Module):
        def __init__(self, **options) -> None:
            super().__init__()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert images.dtype == torch.uint8 and len(images) <= metrics.INCEPTION_BATCH
            return images[:, 0, 0, :2].float()

    monkeypatch.setattr(metrics, "NoTrainInceptionV3", Network)
    images = torch.randint(0, 256, (150, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    found = metrics.inception_features(images, "cpu")
    assert found.dtype == torch.float32 and torch.equal(found, images[:, 0, 0, :2].float())


@pytest.mark.parametrize(("failure", "says"), [(ModuleNotFoundError("torch_fidelity"), "pip install torch-fidelity"),
                                               (URLError("no route"), "no route.*weights-inception.*checkpoints")])
def test_inception_that_cannot_be_had_says_what_to_do(monkeypatch, failure: Exception, says: str) -> None:
    def fail(**options) -> None:
        raise failure

    monkeypatch.setattr(metrics, "NoTrainInceptionV3", fail)
    with pytest.raises(ValueError, match=says):
        metrics.inception_features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "cpu")


def test_names_carry_the_number_of_samples() -> None:
    assert [metrics.with_count("fid", count) for count in (400, 1000, 1500, 2000, 50_000)] == [
        "fid_400", "fid_1k", "fid_1.5k", "fid_2k", "fid_50k"]
