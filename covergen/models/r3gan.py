"""A relativistic GAN with zero-centred penalties whose discriminator hears the audio: covers have to fit it.

Source: Huang et al. 2024, "The GAN is dead; long live the GAN! A Modern GAN Baseline" (loss, penalties on real and on
generated images, residual networks without norms, schedules). Ours beside it: the discriminator's score is an inner
product of image features and an audio embedding (Miyato and Koyama 2018, "cGANs with Projection Discriminator"), real
covers with another album's audio are further negatives (Reed et al. 2016, "Generative Adversarial Text to Image
Synthesis"), the penalties are taken every few steps (Karras et al. 2020, "StyleGAN2", section 3.1), and SiLU takes the
place of LeakyReLU, whose kinks make a run depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covergen.models.base import (
    InputSpec,
    Latents,
    Model,
    ModelSpec,
    Phase,
    adversarial,
    frozen,
    normal_latents,
    to_minus_one_one,
)
from covergen.nn.augment import augment, check_kinds, draw_augmentation
from covergen.nn.layers import EMBEDDING, AudioEncoder, Modulation, audio_noise, check_resolution, zero_gradient
from covergen.nn.losses import r1_r2_penalty, relativistic_loss
from covergen.nn.schedules import half_cosine


@dataclass(frozen=True)
class Options:
    """What can be set about the model."""

    width: int = field(default=32, metadata={
        "help": "channels at the largest side; doubled at each halving, up to 8 times"})
    blocks: int = field(default=1, metadata={"help": "residual blocks at each side length"})
    group: int = field(default=0, metadata={"help": "channels in a group of the 3x3 convolutions, as in the paper; "
                                                    "0: all in one, which CPUs prefer"})
    latent: int = field(default=64, metadata={"help": "size of the noise vector"})
    stem: int = field(default=2, metadata={"help": "side of the patches that networks see as one place: 2 at 32 px "
                                                   "makes them work at 16x16, 1 is the paper's"})
    penalty: float = field(default=1.0, metadata={"help": "weight of R1 and R2 at the start (the paper's gamma)"})
    penalty_last: float = field(default=0.1, metadata={"help": "and after --penalty_images"})
    penalty_images: int = field(default=0, metadata={"help": "images over which it falls; 0: it stays as it is"})
    penalty_every: int = field(default=4, metadata={"help": "steps between penalties, each with so many times the "
                                                            "weight"})
    mismatch: float = field(default=1.0, metadata={"help": "weight of mismatched pairs as negatives"})
    augment: tuple[str, ...] = field(default=("translation", "cutout"), metadata={
        "help": "augmentation of real and generated covers: some of color, translation, cutout, or none; color hides "
                "from the discriminator whether colours fit the audio"})
    embedding_noise: float = field(default=0.1, metadata={"help": "standard deviation of the noise on audio embeddings"})
    audio_dropout: float = field(default=0.1, metadata={"help": "share of an audio vector's numbers set to 0"})


class Block(nn.Module):
    """Maps ``[B, width, H, W]`` plus what three convolutions make of them; with a condition, modulated before them.

    Starts as the identity. Source: Zhang et al. 2019, "Fixup Initialization", section 3, for the first layers' scale.
    """

    def __init__(self, width: int, group: int, depth: int, condition: int = 0) -> None:
        """Args: width: channels; group: of the 3x3 one; depth: blocks of the whole network; condition: its size."""
        super().__init__()
        self.modulation = Modulation(condition, width) if condition else None
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 1), nn.SiLU(),
            nn.Conv2d(width, width, 3, 1, 1, groups=width // group if group and width % group == 0 else 1), nn.SiLU(),
            nn.Conv2d(width, width, 1, bias=False))
        for layer in (self.layers[0], self.layers[2]):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            layer.weight.data *= depth**-0.25  # L^(-1/(2m-2)) with m = 3 layers a block
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.layers[4].weight)

    def forward(self, maps: Tensor, condition: Tensor | None = None) -> Tensor:
        return maps + self.layers(self.modulation(maps, condition) if self.modulation else maps)


def widths_of(side: int, width: int) -> list[int]:
    """Channels at 4, 8, ... ``side``: ``width`` at the largest, doubled downwards, up to 8 times."""
    return [width * min(8, side // (4 * 2**place)) for place in range((side // 4).bit_length())]


def mixer(channels: int, out: int) -> nn.Module:
    """A convolution of 1x1 where the number of channels changes."""
    return nn.Conv2d(channels, out, 1, bias=False) if channels != out else nn.Identity()


class Generator(nn.Module):
    """Latents ``[B, latent]`` and audio ``[B, A]`` (or None) -> images ``[B, 3, R, R]``, unbounded around [-1, 1]."""

    def __init__(self, options: Options, sizes: InputSpec) -> None:
        super().__init__()
        widths = widths_of(sizes.resolution // options.stem, options.width)
        depth = options.blocks * len(widths)
        self.audio = AudioEncoder(sizes.audio) if sizes.audio else None
        condition = options.latent + (EMBEDDING if sizes.audio else 0)
        self.project = nn.Linear(condition, widths[0] * 4 * 4)
        self.levels = nn.ModuleList(
            nn.ModuleList(Block(width, options.group, depth, condition) for _ in range(options.blocks))
            for width in widths)
        self.mixers = nn.ModuleList(mixer(*pair) for pair in pairwise(widths))
        self.to_rgb = nn.Conv2d(widths[-1], 3 * options.stem**2, 3, 1, 1)
        self.stem = options.stem

    def forward(self, latents: Tensor, audio: Tensor | None, noise: dict[str, Tensor] | None = None) -> Tensor:
        condition = torch.cat([latents, self.audio(audio, noise)], 1) if self.audio else latents
        maps = self.project(condition).unflatten(1, (-1, 4, 4))
        for place, blocks in enumerate(self.levels):
            if place:
                maps = F.interpolate(self.mixers[place - 1](maps), scale_factor=2.0, mode="bilinear")
            for block in blocks:
                maps = block(maps, condition)
        return F.pixel_shuffle(self.to_rgb(maps), self.stem)


class Discriminator(nn.Module):
    """Images ``[B, 3, R, R]`` -> features ``[B, 128]``, and audio ``[B, A]`` -> embeddings of that size.

    A score is their inner product; without audio the embedding is one learned vector.
    """

    def __init__(self, options: Options, sizes: InputSpec) -> None:
        super().__init__()
        widths = widths_of(sizes.resolution // options.stem, options.width)[::-1]
        depth = options.blocks * len(widths)
        self.from_rgb = nn.Conv2d(3 * options.stem**2, widths[0], 3, 1, 1)
        self.levels = nn.ModuleList(
            nn.ModuleList(Block(width, options.group, depth) for _ in range(options.blocks)) for width in widths)
        self.mixers = nn.ModuleList(mixer(*pair) for pair in pairwise(widths))
        self.features = nn.Linear(widths[-1] * 4 * 4, EMBEDDING)
        self.audio = AudioEncoder(sizes.audio) if sizes.audio else None
        self.direction = nn.Parameter(torch.randn(EMBEDDING))
        if not (sizes.audio and options.mismatch):
            for layer in (self.from_rgb, self.features):
                zero_gradient(layer.bias)  # it cancels in real minus generated, the first while blocks are nothing
        self.stem = options.stem

    def embed_image(self, images: Tensor) -> Tensor:
        """Features of images, float32 ``[B, 128]``."""
        maps = self.from_rgb(F.pixel_unshuffle(images, self.stem))
        for place, blocks in enumerate(self.levels):
            if place:
                maps = self.mixers[place - 1](F.avg_pool2d(maps, 2))
            for block in blocks:
                maps = block(maps)
        return self.features(maps.flatten(1)).float()

    def embed_audio(self, audio: Tensor | None, noise: dict[str, Tensor] | None) -> Tensor:
        """Embeddings of audio, float32 ``[B, 128]``; of none ``[1, 128]``."""
        direction = self.direction[None]
        return direction if self.audio is None else direction + self.audio(audio, noise)

    def forward(self, images: Tensor, heard: Tensor) -> Tensor:
        """Scores ``[B]`` of images for embeddings of audio."""
        return score(self.embed_image(images), heard)


def score(features: Tensor, heard: Tensor) -> Tensor:
    """The scaled inner product of ``[B, 128]`` and ``[B, 128]``."""
    return (features * heard).sum(1) * EMBEDDING**-0.5


class RelativisticPhase(Phase):
    """What both turns are made with, and the noise that they draw alike."""

    def __init__(self, options: Options, latents: Latents, audio: int) -> None:
        """Args: options; latents: how they are drawn; audio: numbers in a vector, 0 without."""
        super().__init__()
        self.options, self.latents, self.audio = options, latents, audio

    def sample_noise(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Latents, augmentation and, with audio, its noise."""
        drawn = {"latents": self.latents(count, generator, None), **draw_augmentation(count, generator)}
        if self.audio:
            drawn |= audio_noise(count, self.audio, generator, self.options.embedding_noise, self.options.audio_dropout)
        return drawn


class DiscriminatorPhase(RelativisticPhase):
    """Trains the discriminator: real above generated, matched above mismatched, with R1 and R2 every few steps."""

    name = "discriminator"

    def __init__(self, generator: Generator, discriminator: Discriminator, options: Options, latents: Latents,
                 audio: int) -> None:
        super().__init__(options, latents, audio)
        self.discriminator, self.reads, self.penalised = discriminator, (generator,), True
        self.register_buffer("weight", torch.tensor(options.penalty), persistent=False)

    def begin(self, number: int, images: int) -> None:
        options = self.options
        self.penalised = number % options.penalty_every == 0
        self.weight.fill_(options.penalty_every * half_cosine(images, options.penalty, options.penalty_last,
                                                              options.penalty_images))

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        kinds, draws, options = self.options.augment, noise["augmentation"], self.options
        with torch.no_grad():
            fake = self.reads[0](noise["latents"], batch.audio, noise).float()
        real, fake = (augment(images, kinds, draws) for images in (to_minus_one_one(batch.cover), fake))
        heard = self.discriminator.embed_audio(batch.audio, noise)
        on_real, on_fake = self.discriminator.embed_image(torch.cat([real, fake])).chunk(2)
        real_scores = score(on_real, heard)
        fake_scores = score(on_fake, heard)
        loss = relativistic_loss(real_scores, fake_scores)
        scalars = {"discriminator": loss.detach(), "score_gap": (real_scores - fake_scores).detach().mean()}
        if batch.mismatched is not None and self.audio and options.mismatch:
            wrong = score(on_real, self.discriminator.embed_audio(batch.mismatched, noise))
            mismatch = relativistic_loss(real_scores, wrong)
            loss = loss + options.mismatch * mismatch
            scalars["mismatch"] = mismatch.detach()
        if self.penalised:
            twice = heard.expand(len(real), -1).repeat(2, 1)
            penalty = r1_r2_penalty(lambda images: self.discriminator(images, twice),
                                           torch.cat([real, fake])).mean()
            loss = loss + self.weight * penalty  # gamma / 2 for each of the halves that the mean is over
            scalars["penalty"] = penalty.detach()
        return loss, scalars


class GeneratorPhase(RelativisticPhase):
    """Trains the generator: generated covers above their real partners."""

    name = "generator"

    def __init__(self, generator: Generator, discriminator: Discriminator, options: Options, latents: Latents,
                 audio: int) -> None:
        super().__init__(options, latents, audio)
        self.generator, self.reads = generator, (discriminator,)

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        kinds, draws = self.options.augment, noise["augmentation"]
        fake = self.generator(noise["latents"], batch.audio, noise).float()
        with torch.no_grad():
            heard = self.reads[0].embed_audio(batch.audio, noise)
            real_scores = self.reads[0](augment(to_minus_one_one(batch.cover), kinds, draws), heard)
        fake_scores = frozen(self.reads[0], augment(fake, kinds, draws), heard)
        loss = relativistic_loss(fake_scores, real_scores)
        return loss, {"generator": loss.detach()}


def build(options: Options, sizes: InputSpec) -> Model:
    """With audio where there is some, else without."""
    check_resolution(sizes.resolution)
    check_kinds(options.augment)
    if options.stem not in (1, 2, 4):
        raise ValueError(f"--stem {options.stem}: expected 1, 2 or 4")
    generator, discriminator = Generator(options, sizes), Discriminator(options, sizes)
    latents = normal_latents(options.latent)
    turns: Sequence[Phase] = [kind(generator, discriminator, options, latents, sizes.audio)
                             for kind in (DiscriminatorPhase, GeneratorPhase)]
    return adversarial({"generator": generator, "discriminator": discriminator}, list(turns), latents,
                       conditional=bool(sizes.audio), needs_mismatched_audio=bool(sizes.audio and options.mismatch))


R3GAN = ModelSpec(
    "relativistic GAN with R1 and R2 whose discriminator hears the audio (after Huang et al. 2024)", Options, build,
    preset={"batch_size": 64, "lr": 5e-4, "betas": (0.0, 0.99), "order": "group", "album_subset": "generator",
            "steps": 100_000, "ema_halflife": 50_000.0},
    demo={"mixed_precision": "bf16", "minutes": 20.0, "sample_every": 500, "save_every": 500})
