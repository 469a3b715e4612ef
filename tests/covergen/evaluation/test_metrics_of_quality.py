"""Quality metrics agree with their formulas, and know copies from fresh samples."""

from __future__ import annotations

from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn

from covergen.evaluation import metrics as quality


def features(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
    assert quality.frechet(real, fake) == pytest.approx(frechet_by_hand(real, fake), rel=1e-3)
    assert abs(quality.frechet(real, real)) < 1e-3 * quality.frechet(real, fake)


def test_kernel_is_the_formula_and_leaves_the_global_generator_alone() -> None:
    real, fake = features(3, 120, 16), features(4, 90, 16) * 1.2
    before = torch.get_rng_state()
    mean, deviation = quality.kernel(real, fake, seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert (mean, deviation) == quality.kernel(real, fake, seed=6) != quality.kernel(real, fake, seed=7)
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
    assert quality.frechet(real, fake) < 0.3 < 1 < quality.frechet(real, fake + 0.5)
    assert abs(quality.kernel(real, fake, seed=0)[0]) < 0.02 < 0.1 < quality.kernel(real, fake + 0.5, seed=0)[0]


def test_prdc_tells_blur_and_collapse_apart_without_printing(capsys) -> None:
    real, fake = features(9, 400, 6), features(10, 400, 6)
    like = quality.prdc_of(real, fake)
    assert set(like) == {"precision", "recall", "density", "coverage"} and min(like.values()) > 0.85
    collapsed = quality.prdc_of(real, fake * 0.2)
    assert collapsed["precision"] > 0.95 and collapsed["recall"] < 0.2 and collapsed["coverage"] < like["coverage"]
    far = quality.prdc_of(real, fake + 20)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    assert capsys.readouterr().out == ""


def test_copied_is_one_for_copies_a_half_for_fresh_samples_and_knows_albums() -> None:
    training, held_out, fresh = features(11, 3000, 8), features(12, 1000, 8), features(13, 1000, 8)
    assert quality.copied(training[:300], held_out, training) == 1
    assert quality.copied(training[:300] + 0.01, held_out, training) == 1
    assert quality.copied(fresh, held_out, training) == pytest.approx(0.5, abs=0.06)
    assert quality.copied(fresh + 9, held_out, training) == 0
    reissued = torch.cat([held_out, training])  # the held-out covers are in the training too, of the same albums
    albums = torch.arange(1000), torch.arange(4000)
    assert quality.copied(fresh, held_out, reissued) == 0
    assert quality.copied(fresh, held_out, reissued, groups=albums) == pytest.approx(0.5, abs=0.06)


def test_inception_features_are_of_all_images_in_order(monkeypatch) -> None:
    class Network(nn.Module):
        def __init__(self, **options) -> None:
            super().__init__()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert images.dtype == torch.uint8 and len(images) <= quality.INCEPTION_BATCH
            return images[:, 0, 0, :2].float()

    monkeypatch.setattr(quality, "NoTrainInceptionV3", Network)
    images = torch.randint(0, 256, (150, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    found = quality.inception_features(images, "cpu")
    assert found.dtype == torch.float32 and torch.equal(found, images[:, 0, 0, :2].float())


@pytest.mark.parametrize(("failure", "says"), [(ModuleNotFoundError("torch_fidelity"), "pip install torch-fidelity"),
                                               (URLError("no route"), "no route.*weights-inception.*checkpoints")])
def test_inception_that_cannot_be_had_says_what_to_do(monkeypatch, failure: Exception, says: str) -> None:
    def fail(**options) -> None:
        raise failure

    monkeypatch.setattr(quality, "NoTrainInceptionV3", fail)
    with pytest.raises(ValueError, match=says):
        quality.inception_features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "cpu")


def test_names_carry_the_number_of_samples() -> None:
    assert [quality.named("fid", count) for count in (400, 1000, 1500, 2000, 50_000)] == [
        "fid_400", "fid_1k", "fid_1.5k", "fid_2k", "fid_50k"]
