"""Losses as pure functions of tensors, without knowledge of networks, ranks, precision settings or logging."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def wasserstein_critic(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's loss E[D(fake)] - E[D(real)] from scores ``[B]``; its negative estimates the Wasserstein-1 distance.

    Source: Arjovsky et al. 2017, "Wasserstein GAN", eq. 2.
    """
    return fake.float().mean() - real.float().mean()


def squared_gradient_norms(critic: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Squared norms ``[B]`` of the scores' gradients with respect to their images.

    Their mean is R1 on real images and R2 on generated ones (Mescheder et al. 2018, "Which Training Methods for GANs do
    actually Converge?", eq. 9 and 10). The gradient is ``torch.func.grad`` inside the forward, so the whole phase stays
    one graph. Scores are multiplied by the square root of the number of input values first, which keeps the gradients
    of a critic with norm 1 near unit size per value (in fp16 they would underflow otherwise); the norm is in fp32.
    The critic gives images ``[B, 3, R, R]`` scores ``[B]`` and must not mix the images of a batch.
    """
    scale = images[0].numel() ** 0.5
    gradient = torch.func.grad(lambda inputs: critic(inputs).float().sum() * scale)(images)
    return (gradient.float() / scale).flatten(1).square().sum(1)


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor,
                     mix: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of (norm - 1)^2 and the detached mean norm of a critic's gradients between real and fake images.

    ``mix`` are interpolation weights in [0, 1], ``[B, 1, 1, 1]``.
    Source: Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", algorithm 1 (per image, not per pixel).
    """
    norm = (squared_gradient_norms(critic, torch.lerp(fake, real, mix)) + 1e-12).sqrt()
    return (norm - 1).square().mean(), norm.detach().mean()


def relativistic_loss(better: Tensor, worse: Tensor) -> Tensor:
    """E[softplus(worse - better)] from scores ``[B]`` of pairs: small where each better one scores above its partner.

    With (real, generated) it is a discriminator's loss, with (generated, real) the generator's.

    Source: Jolicoeur-Martineau 2019, "The relativistic discriminator", RpGAN; Huang et al. 2024, "The GAN is dead; long
    live the GAN!", eq. 2.
    """
    return F.softplus(worse.float() - better.float()).mean()


def info_nce(audio: Tensor, images: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Symmetric InfoNCE between embeddings of audio and of images, with several positives.

    Audio ``[B, D]`` and images ``[N, D]`` are unit vectors, ``scale`` the inverse temperature. The positives of a row
    are all of the other kind from its album (``same``, bool ``[B, N]``; every row and column needs a True); its loss is
    minus the mean of their log probabilities.

    Source: Radford et al. 2021, "CLIP", figure 3; Khosla et al. 2020, "Supervised Contrastive Learning", eq. 2.
    """
    logits, same = scale * audio.float() @ images.float().T, same.float()
    rows = -(logits.log_softmax(1) * same).sum(1) / same.sum(1)
    columns = -(logits.log_softmax(0) * same).sum(0) / same.sum(0)
    return (rows.mean() + columns.mean()) / 2


def least_squares(scores: Tensor, label: float) -> Tensor:
    """0.5 E[(D - label)^2] from scores ``[B]``. Source: Mao et al. 2017, "Least Squares GANs", eq. 2."""
    return 0.5 * (scores.float() - label).square().mean()


def binary_cross_entropy(scores: Tensor, label: float) -> Tensor:
    """Cross entropy of sigmoid(scores) with a label in [0, 1], from scores ``[B]``. Source: Goodfellow et al. 2014."""
    return F.binary_cross_entropy_with_logits(scores.float(), torch.full_like(scores, label, dtype=torch.float32))


def bernoulli_and_kl(logits: Tensor, images: Tensor, mean: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of a VAE's negative evidence lower bound (ELBO), in nats per image, as means over the batch.

    They are the cross entropy summed over an image's values (logits and images in [0, 1], ``[B, 3, R, R]``), and
    KL(q(z|x) || N(0, 1)) from the mean and log variance ``[B, L]`` of q(z|x).
    Source: Kingma and Welling 2014, "Auto-Encoding Variational Bayes", appendices B and C.1.
    """
    entropy = F.binary_cross_entropy_with_logits(logits.float(), images, reduction="sum") / len(images)
    mean, log_variance = mean.float(), log_variance.float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    return entropy, divergence


def psnr(mse: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB from mean squared errors of values in [0, 1], any shape."""
    return -10 * torch.log10(mse.float().clamp(min=1e-10))
