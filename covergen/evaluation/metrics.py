"""Metrics of covers and latents: distances between distributions, nearest neighbours, accuracies."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from prdc import compute_prdc
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.kid import KernelInceptionDistance

SUBSET = 1000  # features in each of the 100 subsets of the kernel distance, at most
INCEPTION_BATCH = 64
BLOCK_VALUES = 2**25  # float32 numbers in a block of features: 128 MiB
SPARE = 6  # candidates beside the k wanted that are measured exactly: the fast formula cancels digits


def frechet(real: Tensor, fake: Tensor) -> float:
    """The Fréchet distance of features ``[N, D]`` and ``[M, D]``, in float64; lower is better.

    It falls with the number of samples: see ``with_count``.

    Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", equation 6.
    """
    return _compared(FrechetInceptionDistance(_features(real), sync_on_compute=False), real, fake).item()


def kernel(real: Tensor, fake: Tensor, seed: int) -> tuple[float, float]:
    """The kernel distance (squared MMD, polynomial of degree 3) of features ``[N, D]`` and ``[M, D]``, in float64.

    Source: Binkowski et al. 2018, "Demystifying MMD GANs" (KID).

    Returns mean, near 0 for the same distribution, and standard deviation over 100 subsets of 1000, or as many as there
    are. A subset that is everything does not vary: then the deviation is 0 and says nothing.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save")
        torch.default_generator.manual_seed(seed)  # it draws from the global generator
        metric = KernelInceptionDistance(_features(real), subset_size=min(SUBSET, len(real), len(fake)),
                                         sync_on_compute=False)
        mean, deviation = _compared(metric, real, fake)
    return mean.item(), deviation.item()


def prdc_of(real: Tensor, fake: Tensor, *, k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage of features ``[N, D]`` and ``[M, D]``, N and M above k + 1: of k
    neighbours, which make the radius of a sample.

    Source: Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models".
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the counts
        found = compute_prdc(real.cpu().double().numpy(), fake.cpu().double().numpy(), nearest_k=k)
    return {name: float(value) for name, value in found.items()}


def _features(features: Tensor) -> nn.Module:
    """What torchmetrics takes for the network of features that are computed already."""
    identity = nn.Identity()
    identity.num_features = features.shape[1]
    return identity


def _compared(metric: Metric, real: Tensor, fake: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """A metric of torchmetrics, in float64: in float32 differences of large sums cancel."""
    metric = metric.set_dtype(torch.float64).to(real.device)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return metric.compute()


@torch.no_grad()
def inception_features(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """The features that published Fréchet distances are of: Inception's last pooling, float32 ``[N, 2048]`` on the CPU.

    uint8 covers ``[N, 3, R, R]`` are resized to 299 px as TensorFlow 1 did it, which the published numbers contain.
    ValueError without torch-fidelity or the weights.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture"; weights as converted by torch-fidelity.
    """
    try:
        network = _inception(NoTrainInceptionV3, torch.device(device))
    except ModuleNotFoundError as error:
        raise ValueError("Inception's features need a package more: pip install torch-fidelity") from error
    except OSError as error:
        raise ValueError(
            f"the weights of Inception can't be downloaded ({error}): run it once where github.com can be reached, or "
            "put weights-inception-2015-12-05-6726825d.pth of the release v0.2.0 of github.com/toshas/torch-fidelity "
            f"into {torch.hub.get_dir()}/checkpoints/") from error
    return torch.cat([network(part.to(device)).float().cpu() for part in images.split(INCEPTION_BATCH)])


@lru_cache(maxsize=1)
def _inception(kind: Callable[..., nn.Module], device: torch.device) -> nn.Module:
    """The network, loaded once for all the covers of an evaluation."""
    return kind(name="inception-v3-compat", features_list=["2048"], antialias=False).to(device)


def with_count(metric: str, count: int) -> str:
    """The name of a metric with the number of samples: ``fid_400``, ``fid_1.5k``, ``fid_2k``."""
    return f"{metric}_{count}" if count < 1000 else f"{metric}_{count / 1000:g}k"


def thumbnails(covers: Tensor) -> Tensor:
    """Covers ``[N, 3, S, S]`` with values 0..255 as means of 4 x 4 areas, float32 ``[N, 48]``. Source: J. Bustos 2020,
    who compared covers so, by the sum of absolute differences, to find near duplicates."""
    return F.interpolate(covers.float(), size=(4, 4), mode="area").flatten(1)


def nearest(queries: Tensor, base: Tensor, k: int, *, order: int = 2,
            groups: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest of a base ``[N, D]`` to each query ``[Q, D]``, nearest first, in blocks of bounded memory.

    By Euclidean distance, or for ``order`` 1 by the sum of absolute differences. Two of the same group (of the queries
    ``[Q]`` and of the base ``[N]``) are never neighbours.

    Returns distances float32 ``[Q, k]`` and rows of the base int64 ``[Q, k]``; where fewer than k were left, distances
    are infinite and rows mean nothing.
    """
    candidates = k + SPARE
    size = max(1, BLOCK_VALUES // queries.shape[1])
    center = sum(part.float().sum(0) for part in base.split(size)) / len(base)
    found = []
    for start in range(0, len(queries), min(size, 1024)):
        query = queries[start:start + min(size, 1024)].float() - center
        scores = torch.full((len(query), candidates), torch.inf)
        rows = torch.zeros((len(query), candidates), dtype=torch.int64)
        for first in range(0, len(base), min(size, 8192)):
            part = base[first:first + min(size, 8192)].float() - center
            # Squared distances up to the query's own square, which changes no order.
            score = (torch.addmm(part.square().sum(1)[None], query, part.T, alpha=-2) if order == 2
                     else torch.cdist(query, part, p=order))
            if groups:
                own = groups[0][start:start + len(query), None] == groups[1][None, first:first + len(part)]
                score.masked_fill_(own, torch.inf)
            best = score.topk(min(candidates, len(part)), largest=False)
            scores, chosen = torch.cat([scores, best.values], 1).topk(candidates, largest=False)
            rows = torch.cat([rows, best.indices + first], 1).gather(1, chosen)
        exact = torch.stack([torch.linalg.vector_norm(query + center - base[rows[:, rank]].float(), order, dim=1)
                             for rank in range(candidates)], 1)
        exact, ranks = exact.masked_fill_(scores.isinf(), torch.inf).sort(dim=1, stable=True)
        found.append((exact[:, :k], rows.gather(1, ranks[:, :k])))
    distances, rows = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(rows)


def copied(fake: Tensor, held_out: Tensor, training: Tensor, *, groups: tuple[Tensor, Tensor] | None = None) -> float:
    """The share of generated covers ``[M, D]`` nearer to a training cover ``[N, D]`` than the median held-out cover
    ``[H, D]`` is, by Euclidean distance; see ``nearest`` for groups ``[H]`` and ``[N]`` and ``share_nearer``."""
    fake, held_out, training = fake.cpu(), held_out.cpu(), training.cpu()
    return share_nearer(nearest(fake, training, 1)[0][:, 0], nearest(held_out, training, 1, groups=groups)[0][:, 0])


def share_nearer(generated: Tensor, held_out: Tensor) -> float:
    """The share of distances ``[Q]`` below the median of others ``[H]``.

    Of distances to the nearest training cover it says whether a model copies: near 0.5 where generated covers are as
    far as real covers that were held out, near 1 for copies. Source: Meehan et al. 2020, "A Non-Parametric Test to
    Detect Data-Copying in Generative Models", after its idea.
    """
    return (generated < held_out.double().quantile(0.5)).double().mean().item()


def vote(labels: Tensor, distances: Tensor, rows: Tensor) -> Tensor:
    """The commonest label int64 ``[Q]``, of labels ``[N]`` from 0, among neighbours ``[Q, k]`` as of ``nearest``; of
    equally common ones the nearest one's; -1 for none."""
    # A vote each, and less than one altogether for being nearer: it decides ties only.
    weights = (1 + 0.5 ** torch.arange(1, rows.shape[1] + 1, dtype=torch.float64)).expand(rows.shape)
    votes = torch.zeros(len(rows), int(labels.max()) + 1, dtype=torch.float64)
    votes.scatter_add_(1, labels[rows], weights.masked_fill(distances.isinf(), 0.0))
    return votes.argmax(1).masked_fill(distances[:, 0].isinf(), -1)


def balanced_accuracy(truth: Tensor, predicted: Tensor) -> float:
    """The mean over the labels in ``truth`` ``[N]`` of the share of theirs that ``predicted`` ``[N]`` hits."""
    labels = truth.unique()
    return sum((predicted[truth == label] == label).double().mean().item() for label in labels) / len(labels)


class Separation(NamedTuple):
    """How well neighbours predict a label."""

    accuracy: float  # balanced over the labels
    chance: float  # one over the number of labels
    permuted: float  # mean and standard deviation of the accuracy where labels were permuted
    spread: float


def knn_separation(features: Tensor, labels: Tensor, groups: Tensor, *, k: int = 10, permutations: int = 20,
                   seed: int = 0) -> Separation:
    """Whether the k nearest neighbours of a sample ``[N, D]``, those of its own group ``[N]`` (as albums) left out,
    have its label ``[N]``; permuted labels are the control."""
    classes, labels = labels.unique(return_inverse=True)
    neighbours = nearest(features, features, k, groups=(groups, groups))
    generator = torch.Generator().manual_seed(seed)
    permuted = [labels[torch.randperm(len(labels), generator=generator)] for _ in range(permutations)]
    control = torch.tensor([balanced_accuracy(mixed, vote(mixed, *neighbours)) for mixed in permuted],
                           dtype=torch.float64)
    return Separation(balanced_accuracy(labels, vote(labels, *neighbours)), 1 / len(classes), control.mean().item(),
                      control.std().item())


def variation(images: Tensor) -> tuple[float, float]:
    """Mean squared differences in a table of images ``[G, K, ...]``, both at least 2: over all pairs of different rows
    in one column, and of different columns in one row."""
    flat = images.double().flatten(2)
    return 2 * flat.var(0).mean().item(), 2 * flat.var(1).mean().item()
