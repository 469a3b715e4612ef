"""A relativistic GAN with R1 and R2 penalties and a conditional discriminator, so that covers have to fit the audio.

Source: Huang et al. 2024, "The GAN is dead; long live the GAN! A Modern GAN Baseline" (loss, penalties on real and on
generated images, residual networks without norms, schedules). What we changed: the discriminator's score is an inner
product of image features and an audio embedding (Miyato and Koyama 2018, "cGANs with Projection Discriminator"), real
covers with another album's audio are further negatives (Reed et al. 2016, "Generative Adversarial Text to Image
Synthesis"), the penalties are taken every few steps (Karras et al. 2020, "StyleGAN2", section 3.1), and SiLU takes the
place of LeakyReLU, whose kinks make a run depend on the number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covergen.models.base import (
    InputSpec,
    Model,
    ModelSpec,
    Phase,
    adversarial,
    frozen,
    normal_latents,
    option,
    to_minus_one_one,
)
from covergen.nn.augment import augment, check_kinds, draw_augmentation
from covergen.nn.layers import EMBEDDING, AudioEncoder, Modulation, audio_noise, check_resolution, zero_gradient
from covergen.nn.losses import relativistic_loss, squared_gradient_norms
from covergen.nn.schedules import half_cosine


@dataclass(frozen=True)
class Options:
    """Options of the model."""

    width: int = option(32, "channels at the largest side; doubled at each halving, up to 8 times", gt=0)
    blocks: int = option(1, "residual blocks at each side length", gt=0)
    group_size: int = option(0, "channels in a group of the 3x3 convolutions, as in the paper; 0: no groups, which is "
                                "faster on CPUs", ge=0)
    latent: int = option(64, "size of the noise vector", gt=0)
    patch_size: int = option(2, "side of the pixel patches that the networks treat as one position: 2 makes them work "
                                "at 16x16 for 32 px, 1 is the paper's")
    penalty: float = option(1.0, "weight of R1 and R2 at the start (the paper's gamma)", ge=0)
    penalty_last: float = option(0.1, "and after --penalty_images", ge=0)
    penalty_images: int = option(0, "images over which it falls; 0: it stays as it is", ge=0)
    penalty_every: int = option(4, "steps between penalties, each with so many times the weight", gt=0)
    mismatch_weight: float = option(1.0, "weight of covers with another album's audio as negatives", ge=0)
    augment: tuple[str, ...] = option(
        ("translation", "cutout"), "augmentation of real and generated covers: some of color, translation, cutout, or "
                                   "none; color hides from the discriminator whether colours fit the audio")
    embedding_noise: float = option(0.1, "standard deviation of the noise added to audio embeddings", ge=0)
    audio_dropout: float = option(0.1, "share of an audio vector's numbers set to 0 in training", ge=0, lt=1)


class Block(nn.Module):
    """Adds three convolutions of maps ``[B, width, H, W]`` to them; with a condition, modulates their input.

    Starts as the identity. Source: Zhang et al. 2019, "Fixup Initialization", section 3, for the first layers' scale.
    """

    def __init__(self, width: int, group_size: int, depth: int, condition: int = 0) -> None:
        """Args: group_size: channels in a group of the 3x3; depth: blocks of the network; condition: its size."""
        super().__init__()
        self.modulation = Modulation(condition, width) if condition else None
        groups = width // group_size if group_size and width % group_size == 0 else 1
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 1), nn.SiLU(), nn.Conv2d(width, width, 3, 1, 1, groups=groups), nn.SiLU(),
            nn.Conv2d(width, width, 1, bias=False))
        for layer in (self.layers[0], self.layers[2]):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            layer.weight.data *= depth**-0.25  # L^(-1/(2m-2)) with m = 3 layers a block
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.layers[4].weight)

    def forward(self, maps: Tensor, condition: Tensor | None = None) -> Tensor:
        return maps + self.layers(self.modulation(maps, condition) if self.modulation else maps)


def level_widths(side: int, width: int) -> list[int]:
    """Channels at 4, 8, ... ``side``: ``width`` at the largest, doubled downwards, up to 8 times."""
    return [width * min(8, side // (4 * 2**level)) for level in range((side // 4).bit_length())]


def make_levels(widths: list[int], options: Options, condition: int = 0) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Blocks for every level, and between levels 1x1 convolutions where the number of channels changes."""
    levels = nn.ModuleList(
        nn.ModuleList(Block(width, options.group_size, options.blocks * len(widths), condition)
                      for _ in range(options.blocks)) for width in widths)
    mixers = nn.ModuleList(nn.Conv2d(channels, out, 1, bias=False) if channels != out else nn.Identity()
                           for channels, out in pairwise(widths))
    return levels, mixers


class Generator(nn.Module):
    """Turns latents ``[B, latent]`` and audio ``[B, A]`` (or None) into unbounded images ``[B, 3, R, R]``."""

    def __init__(self, options: Options, inputs: InputSpec) -> None:
        super().__init__()
        widths = level_widths(inputs.resolution // options.patch_size, options.width)
        self.audio = AudioEncoder(inputs.audio) if inputs.audio else None
        condition = options.latent + (EMBEDDING if inputs.audio else 0)
        self.project = nn.Linear(condition, widths[0] * 4 * 4)
        self.levels, self.mixers = make_levels(widths, options, condition)
        self.to_rgb = nn.Conv2d(widths[-1], 3 * options.patch_size**2, 3, 1, 1)
        self.patch_size = options.patch_size

    def forward(self, latents: Tensor, audio: Tensor | None, noise: dict[str, Tensor] | None = None) -> Tensor:
        condition = torch.cat([latents, self.audio(audio, noise)], 1) if self.audio else latents
        maps = self.project(condition).unflatten(1, (-1, 4, 4))
        for level, blocks in enumerate(self.levels):
            if level:
                maps = F.interpolate(self.mixers[level - 1](maps), scale_factor=2.0, mode="bilinear")
            for block in blocks:
                maps = block(maps, condition)
        return F.pixel_shuffle(self.to_rgb(maps), self.patch_size)


class Discriminator(nn.Module):
    """Scores images by the inner product of their features and an embedding of audio, both ``[B, 128]``.

    Without audio the embedding is one learned vector.
    """

    def __init__(self, options: Options, inputs: InputSpec) -> None:
        super().__init__()
        widths = level_widths(inputs.resolution // options.patch_size, options.width)[::-1]
        self.from_rgb = nn.Conv2d(3 * options.patch_size**2, widths[0], 3, 1, 1)
        self.levels, self.mixers = make_levels(widths, options)
        self.features = nn.Linear(widths[-1] * 4 * 4, EMBEDDING)
        self.audio = AudioEncoder(inputs.audio) if inputs.audio else None
        self.direction = nn.Parameter(torch.randn(EMBEDDING))
        if not (inputs.audio and options.mismatch_weight):
            for layer in (self.from_rgb, self.features):
                zero_gradient(layer.bias)  # it cancels in real minus generated, the first while blocks are the identity
        self.patch_size = options.patch_size

    def embed_image(self, images: Tensor) -> Tensor:
        """Features of images ``[B, 3, R, R]``, float32 ``[B, 128]``."""
        maps = self.from_rgb(F.pixel_unshuffle(images, self.patch_size))
        for level, blocks in enumerate(self.levels):
            if level:
                maps = self.mixers[level - 1](F.avg_pool2d(maps, 2))
            for block in blocks:
                maps = block(maps)
        return self.features(maps.flatten(1)).float()

    def embed_audio(self, audio: Tensor | None, noise: dict[str, Tensor] | None) -> Tensor:
        """Embeddings of audio ``[B, A]``, float32 ``[B, 128]``; without audio ``[1, 128]``."""
        direction = self.direction[None]
        return direction if self.audio is None else direction + self.audio(audio, noise)

    def forward(self, images: Tensor, embedding: Tensor) -> Tensor:
        """Scores ``[B]`` of images with embeddings of audio."""
        return score(self.embed_image(images), embedding)


def score(features: Tensor, embedding: Tensor) -> Tensor:
    """The scaled inner product of ``[B, 128]`` and ``[B, 128]``."""
    return (features * embedding).sum(1) * EMBEDDING**-0.5


class RelativisticPhase(Phase):
    """The networks and the noise of both phases: latents, augmentation and, with audio, the noise on audio."""

    def __init__(self, trained: nn.Module, frozen_network: nn.Module, options: Options, audio: int) -> None:
        """Args: trained, frozen_network: generator and discriminator, or the other way round; audio: its numbers."""
        super().__init__()
        self.trained, self.frozen_networks, self.options, self.audio = trained, (frozen_network,), options, audio
        self.latents = normal_latents(options.latent)

    def sample_noise(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        noise = {**super().sample_noise(count, generator), **draw_augmentation(count, generator)}
        if self.audio:
            noise |= audio_noise(count, self.audio, generator, self.options.embedding_noise, self.options.audio_dropout)
        return noise


class DiscriminatorPhase(RelativisticPhase):
    """Trains the discriminator: real above generated, matched above mismatched, with R1 and R2 every few steps."""

    name = "discriminator"

    def __init__(self, trained: Discriminator, frozen_network: Generator, options: Options, audio: int) -> None:
        super().__init__(trained, frozen_network, options, audio)
        self.penalised = True
        self.register_buffer("weight", torch.tensor(options.penalty), persistent=False)

    def begin(self, step: int, images: int) -> None:
        options = self.options
        self.penalised = step % options.penalty_every == 0
        self.weight.fill_(options.penalty_every * half_cosine(images, options.penalty, options.penalty_last,
                                                              options.penalty_images))

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        kinds, draws, options, discriminator = self.options.augment, noise["augmentation"], self.options, self.trained
        with torch.no_grad():
            fake = self.frozen_networks[0](noise["latents"], batch.audio, noise).float()
        real, fake = (augment(images, kinds, draws) for images in (to_minus_one_one(batch.cover), fake))
        embedding = discriminator.embed_audio(batch.audio, noise)
        real_features, fake_features = discriminator.embed_image(torch.cat([real, fake])).chunk(2)
        real_scores, fake_scores = score(real_features, embedding), score(fake_features, embedding)
        loss = relativistic_loss(real_scores, fake_scores)
        scalars = {"discriminator": loss.detach(), "score_gap": (real_scores - fake_scores).detach().mean()}
        if batch.mismatched is not None and self.audio and options.mismatch_weight:
            mismatched = score(real_features, discriminator.embed_audio(batch.mismatched, noise))
            mismatch = relativistic_loss(real_scores, mismatched)
            loss = loss + options.mismatch_weight * mismatch
            scalars["mismatch"] = mismatch.detach()
        if self.penalised:
            twice = embedding.expand(len(real), -1).repeat(2, 1)
            images = torch.cat([real, fake])
            penalty = squared_gradient_norms(lambda inputs: discriminator(inputs, twice), images).mean()
            loss = loss + self.weight * penalty  # gamma / 2 for each of the halves that the mean is over
            scalars["penalty"] = penalty.detach()
        return loss, scalars


class GeneratorPhase(RelativisticPhase):
    """Trains the generator: generated covers above their real partners."""

    name = "generator"

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        kinds, draws, (discriminator,) = self.options.augment, noise["augmentation"], self.frozen_networks
        fake = self.trained(noise["latents"], batch.audio, noise).float()
        with torch.no_grad():
            embedding = discriminator.embed_audio(batch.audio, noise)
            real_scores = discriminator(augment(to_minus_one_one(batch.cover), kinds, draws), embedding)
        fake_scores = frozen(discriminator, augment(fake, kinds, draws), embedding)
        loss = relativistic_loss(fake_scores, real_scores)
        return loss, {"generator": loss.detach()}


def build(options: Options, inputs: InputSpec) -> Model:
    """Conditional where there is audio, else unconditional."""
    check_resolution(inputs.resolution)
    check_kinds(options.augment)
    if options.patch_size not in (1, 2, 4):
        raise ValueError(f"--patch_size {options.patch_size}: expected 1, 2 or 4")
    generator, discriminator = Generator(options, inputs), Discriminator(options, inputs)
    phases = [DiscriminatorPhase(discriminator, generator, options, inputs.audio),
              GeneratorPhase(generator, discriminator, options, inputs.audio)]
    return adversarial({"generator": generator, "discriminator": discriminator}, phases, phases[0].latents,
                       conditional=bool(inputs.audio),
                       needs_mismatched_audio=bool(inputs.audio and options.mismatch_weight))


R3GAN = ModelSpec(
    "relativistic GAN with R1 and R2 and a conditional discriminator (after Huang et al. 2024)", Options, build,
    preset={"batch_size": 64, "lr": 5e-4, "betas": (0.0, 0.99), "order": "group", "album_subset": "generator",
            "steps": 100_000, "ema_halflife": 50_000.0},
    demo={"mixed_precision": "bf16", "minutes": 20.0, "sample_every": 500, "save_every": 500})
