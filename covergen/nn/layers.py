"""Blocks that several models are built from: norms by name, initial weights, trunks of GANs, conditioning on audio.

Covers of another side than 128 px get blocks added or dropped nearest the image; every level keeps its width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RESOLUTIONS = (32, 64, 128, 256)
EMBEDDING = 128  # numbers in an audio embedding


def check_resolution(resolution: int) -> None:
    """Raises ValueError unless the models can be built for this side length in pixels."""
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution {resolution}: models are built for a side of {RESOLUTIONS} pixels; train at one "
                         "of them with --resolution (covers are shrunk to it), or pack the covers again with one")


def check_audio(audio: int) -> None:
    """Raises ValueError unless there are audio vectors for a conditional model."""
    if not audio:
        raise ValueError("this model is conditional and the shards hold no audio vectors; pack covers with vectors, or "
                         "train an unconditional model")


def level_width(level: int, width: int) -> int:
    """Channels at a side length of ``level`` pixels: 4, 4, 4, 2, 1, 1/2 times ``width`` at 4, 8, 16, 32, 64, 128."""
    return max(8, width * 64 // max(16, level))


def trunk_widths(resolution: int, width: int) -> list[int]:
    """Channels at 4, 8, ... resolution / 2 pixels: those of ``level_width``, doubled at 4."""
    levels = [4 * 2**i for i in range((resolution // 4).bit_length() - 1)]
    return [level_width(level, width) * (2 if level == 4 else 1) for level in levels]


def feature_norm(kind: str, channels: int) -> nn.Module:
    """A norm over feature maps ``[B, C, H, W]``: ``batch`` mixes the images of a batch, ``group`` does not."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(max(1, channels // 16), channels)


def activation(norm: str, slope: float = 0.0) -> nn.Module:
    """ReLU (LeakyReLU with a slope) beside batch norm; SiLU beside group norm, where a batch's split must not matter.

    A unit within rounding of a kink falls to one side or the other depending on how a sum was split over processes, and
    each such unit changes an Adam update by tenths of a percent: after 100 updates the weights differ by 0.2%. Without
    kinks the same rounding stays at 1e-7 (measured with WGAN-GP at 32 px, 1 process against 2).
    """
    if norm == "group":
        return nn.SiLU()
    return nn.LeakyReLU(slope) if slope else nn.ReLU()


def init_gan_weights(network: nn.Module) -> None:
    """Convolutions from N(0, 0.02), their norms' scales from N(1, 0.02), shifts 0; the rest keeps torch's default.

    Source: Radford et al. 2016, "Unsupervised Representation Learning with DCGAN", section 3.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)


def zero_gradient(parameter: nn.Parameter) -> None:
    """Sets to 0 the gradient of a parameter whose true gradient is 0, so that Adam does not blow rounding up.

    A compiled phase that only reads the parameter's network passes None.
    """
    parameter.register_hook(lambda gradient: None if gradient is None else torch.zeros_like(gradient))


# -- GANs ---


class Upsampler(nn.Module):
    """Turns latents ``[B, latent]`` into images ``[B, 3, R, R]`` in [-1, 1]: linear to 4x4, then doublings."""

    def __init__(self, latent: int, widths: Sequence[int], norm: str = "batch", refined: int = 0) -> None:
        """Widths are channels at 4, 8, ... R/2 pixels; a 3x3 convolution follows the first ``refined`` doublings."""
        super().__init__()
        self.project = nn.Linear(latent, widths[0] * 4 * 4)
        self.project_norm = feature_norm(norm, widths[0])
        layers: list[nn.Module] = []
        for level, (channels, out) in enumerate(pairwise(widths)):
            layers += [nn.ConvTranspose2d(channels, out, 4, 2, 1), feature_norm(norm, out), activation(norm)]
            if level < refined:
                layers += [nn.ConvTranspose2d(out, out, 3, 1, 1), feature_norm(norm, out), activation(norm)]
        self.blocks = nn.Sequential(*layers)
        self.to_rgb = nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1)
        init_gan_weights(self)

    def forward(self, latents: Tensor, audio: Tensor | None = None) -> Tensor:
        features = self.project_norm(self.project(latents).unflatten(1, (-1, 4, 4)))
        return torch.tanh(self.to_rgb(self.blocks(features)))


class ConvDiscriminator(nn.Module):
    """Scores images ``[B, 3, R, R]``: halvings down to 4x4, a norm and LeakyReLU(0.2) after each; linear."""

    def __init__(self, resolution: int, width: int, norm: Callable[[int], nn.Module], kind: str = "batch") -> None:
        """Args: width: see ``trunk_widths``; norm: channels -> layer; kind: see ``activation``."""
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out in reversed(trunk_widths(resolution, width)):
            layers += [nn.Conv2d(channels, out, 4, 2, 1, bias=False), norm(out), activation(kind, 0.2)]
            channels = out
        self.blocks = nn.Sequential(*layers)
        self.score = nn.Linear(channels * 4 * 4, 1)
        init_gan_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.score(self.blocks(images).flatten(1)).squeeze(1)


# -- conditioning of the thesis ---


def audio_layers(sizes: Sequence[int]) -> list[nn.Module]:
    """Linear layers of these sizes, each with batch norm, and LeakyReLU(0.2) between them."""
    layers: list[nn.Module] = []
    for size, out in pairwise(sizes):
        layers += [nn.Linear(size, out), nn.BatchNorm1d(out), nn.LeakyReLU(0.2)]
    return layers[:-1]


class AudioTrunk(nn.Sequential):
    """Turns audio ``[B, A]`` into features ``[B, out]`` in three equal steps of size (thesis: 1160, 944, 728, 512)."""

    def __init__(self, audio: int, out: int) -> None:
        super().__init__(*audio_layers([audio + (out - audio) * i // 3 for i in range(4)]))

    def forward(self, audio: Tensor) -> Tensor:
        """Computes in fp32 at any precision of the rest, for raw descriptors reach 1e13."""
        if self.training and len(audio) < 2:
            raise ValueError("--batch_size: the batch norm over audio needs at least 2 covers in every process")
        with torch.autocast(audio.device.type, enabled=False):
            return super().forward(audio.float())


class Film(nn.Module):
    """Scales and shifts the channels of maps ``[B, width, H, W]`` by functions of audio features ``[B, size]``.

    As in the thesis each head ends in batch norm, which fixes the variance of its outputs; see ``init_film``.
    Source of FiLM: Perez et al. 2018, "FiLM: Visual Reasoning with a General Conditioning Layer", eq. 2.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Sequential(*audio_layers([size, (size + width) // 2, width])) for _ in range(2))

    def forward(self, maps: Tensor, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            scale, shift = (head(features)[..., None, None] for head in (self.scale, self.shift))
        return maps * scale.to(maps.dtype) + shift.to(maps.dtype)


def init_film(network: nn.Module) -> None:
    """Initialises audio layers as the thesis did.

    Norms over audio have scales and shifts from N(0, 1), but the scales of the heads' last norms are from N(0, 0.02)
    where they multiply and from N(1, 0.02) where they add.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    for film in network.modules():
        if isinstance(film, Film):
            nn.init.normal_(film.scale[-1].weight, 0.0, 0.02)
            nn.init.normal_(film.shift[-1].weight, 1.0, 0.02)


class FilmUpsampler(nn.Module):
    """Turns latents ``[B, latent]`` and audio ``[B, A]`` into images in [-1, 1], with FiLM at every norm."""

    def __init__(self, latent: int, audio: int, widths: Sequence[int], features: int = 512) -> None:
        super().__init__()
        self.project = nn.Linear(latent, widths[0] * 4 * 4)
        self.doublings = nn.ModuleList(nn.ConvTranspose2d(size, out, 4, 2, 1) for size, out in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, affine=False) for width in widths)
        self.audio = AudioTrunk(audio, features)
        self.films = nn.ModuleList(Film(features, width) for width in widths)
        self.to_rgb = nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1)
        init_gan_weights(self)
        init_film(self)

    def forward(self, latents: Tensor, audio: Tensor) -> Tensor:
        features = self.audio(audio)
        maps = self.project(latents).unflatten(1, (-1, 4, 4))
        for level, (norm, film) in enumerate(zip(self.norms, self.films, strict=True)):
            maps = self.doublings[level - 1](maps) if level else maps
            maps = F.relu(film(norm(maps), features))
        return torch.tanh(self.to_rgb(maps))


# -- conditioning of the other models ---


class ResidualMlp(nn.Module):
    """Adds LayerNorm, linear, GELU, linear of features ``[B, size]`` to them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size), nn.GELU(), nn.Linear(size, size))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.layers(features)


class AudioEncoder(nn.Module):
    """Embeds standardised audio with its presence bits ``[B, A]`` as ``[B, size]``, each of mean 0 and variance 1.

    No layer mixes the tracks of a batch. 1,714,816 parameters for 1,162 numbers.
    """

    def __init__(self, audio: int, size: int = EMBEDDING, hidden: int = 512) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(audio, hidden), ResidualMlp(hidden), ResidualMlp(hidden),
                                    nn.LayerNorm(hidden), nn.Linear(hidden, size))

    def forward(self, audio: Tensor, noise: dict[str, Tensor] | None = None) -> Tensor:
        """Embeddings; in training with the dropout and the noise that ``audio_noise`` draws."""
        embedding = self.layers(audio * noise["dropout_mask"] if noise else audio)
        embedding = F.layer_norm(embedding.float(), embedding.shape[1:])
        return embedding + noise["embedding_noise"] if noise else embedding


def audio_noise(count: int, audio: int, generator: torch.Generator, embedding_noise: float,
                audio_dropout: float) -> dict[str, Tensor]:
    """The noise that keeps ``AudioEncoder`` from memorising tracks: ``dropout_mask`` and ``embedding_noise``.

    For ``count`` tracks of ``audio`` numbers: a standard deviation of what is added to an embedding, and a share of the
    numbers that are set to 0; the others are scaled up.
    """
    device = generator.device
    mask = torch.rand(count, audio, generator=generator, device=device) >= audio_dropout
    normal = torch.randn(count, EMBEDDING, generator=generator, device=device)
    return {"dropout_mask": mask.float() / (1 - audio_dropout), "embedding_noise": embedding_noise * normal}


class Modulation(nn.Module):
    """Multiplies maps ``[B, width, H, W]`` by 1 + scale and adds a shift, both linear in a condition ``[B, size]``.

    Starts as the identity. Source: Perez et al. 2018, "FiLM", section 7.2, which finds 1 + scale the better form.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(size, 2 * width)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, maps: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.head(condition).to(maps.dtype)[..., None, None].chunk(2, 1)
        return maps * (1 + scale) + shift
