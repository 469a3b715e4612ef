"""How good and how new covers are: features of real and of generated covers in, distances and shares out."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from prdc import compute_prdc
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.kid import KernelInceptionDistance

from covergen import metrics

SUBSET = 1000  # features in each of the 100 subsets of the kernel distance, at most
INCEPTION_BATCH = 64


def frechet(real: Tensor, fake: Tensor) -> float:
    """The Fréchet distance of features ``[N, D]`` and ``[M, D]``, in float64; lower is better.

    It falls with the number of samples, so only equal numbers compare: see ``named``.

    Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
    equation 6.
    """
    return _compared(FrechetInceptionDistance(_features(real), sync_on_compute=False), real, fake).item()


def kernel(real: Tensor, fake: Tensor, seed: int) -> tuple[float, float]:
    """The kernel distance (squared MMD, polynomial of degree 3) of features ``[N, D]`` and ``[M, D]``, in float64.

    Source: Binkowski et al. 2018, "Demystifying MMD GANs" (KID).

    Args:
        real, fake: features.
        seed: of the subsets.

    Returns:
        mean, near 0 for the same distribution, and standard deviation over 100 subsets of 1000, or as many as there
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
    """Precision, recall, density and coverage of features ``[N, D]`` and ``[M, D]``, N and M above k + 1.

    Source: Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models".

    Args:
        real, fake: features.
        k: neighbours that make the radius of a sample.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the counts
        found = compute_prdc(real.cpu().double().numpy(), fake.cpu().double().numpy(), nearest_k=k)
    return {name: float(value) for name, value in found.items()}


def copied(fake: Tensor, held_out: Tensor, training: Tensor, *, groups: tuple[Tensor, Tensor] | None = None) -> float:
    """The share of generated covers nearer to a training cover than the median held-out cover is.

    See ``metrics.share_nearer``: 1 for copies, near 0.5 for fresh samples of the same distribution.

    Args:
        fake, held_out, training: ``[M, D]``, ``[H, D]``, ``[N, D]``, compared by Euclidean distance.
        groups: of the held-out ``[H]`` and of the training covers ``[N]``; two of the same are never neighbours.
    """
    fake, held_out, training = fake.cpu(), held_out.cpu(), training.cpu()
    near, _ = metrics.nearest(fake, training, 1)
    far, _ = metrics.nearest(held_out, training, 1, groups=groups)
    return metrics.share_nearer(near[:, 0], far[:, 0])


@torch.no_grad()
def inception_features(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """The features that published Fréchet distances are of: Inception's last pooling, float32 ``[N, 2048]`` on the CPU.

    Covers are resized to 299 px as TensorFlow 1 did it, which the published numbers contain.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture"; weights as converted by torch-fidelity.

    Args:
        images: uint8 ``[N, 3, R, R]``.
        device: where to compute.

    Raises:
        ValueError: torch-fidelity is not installed, or its weights are neither in the cache nor to be downloaded.
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


def named(metric: str, count: int) -> str:
    """The name of a metric with the number of samples: ``fid_400``, ``fid_1.5k``, ``fid_2k``."""
    return f"{metric}_{count}" if count < 1000 else f"{metric}_{count / 1000:g}k"


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
