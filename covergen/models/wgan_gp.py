"""WGAN with gradient penalty, from noise alone (``wgan_gp``) or conditioned on audio (``cond_wgan_gp``).

Sources: Gulrajani et al. 2017, "Improved Training of Wasserstein GANs"; layer table and hyper-parameters from
J. Bustos 2020, "Towards album artwork generation based on audio". The conditional one is the thesis's baseline: its
critic does not get the audio, so nothing makes covers follow it (``--projection_critic`` changes that).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from covergen.models.base import (
    GeneratorPhase,
    InputSpec,
    Latents,
    Model,
    ModelSpec,
    Phase,
    adversarial,
    normal_latents,
    option,
    to_minus_one_one,
)
from covergen.nn import layers, losses


@dataclass(frozen=True)
class Options:
    """Options of both models; the defaults are the thesis's."""

    width: int = option(64, "channels at 64 px; all other widths keep their ratio to it", gt=0)
    latent: int = option(100, "size of the noise vector", gt=0)
    critic_steps: int = option(5, "critic updates per generator update, each on fresh covers", gt=0)
    penalty: float = option(10.0, "weight of the gradient penalty", ge=0)


@dataclass(frozen=True)
class PlainOptions(Options):
    """Options of the one without audio."""

    norm: Literal["batch", "group"] = option(
        "batch", "batch: the thesis's, mixes the images of a batch in the generator; group: group norm and SiLU, so "
                 "that a run does not depend on how batches are split over processes")


@dataclass(frozen=True)
class ConditionalOptions(Options):
    """Options of the one with audio."""

    projection_critic: bool = option(
        False, "unlike in the thesis, the critic scores covers together with their audio, and covers with the audio "
               "of other albums count as generated")


class Critic(layers.ConvDiscriminator):
    """Scores images ``[B, 3, R, R]`` by numbers ``[B]``; norms are per image; 3,814,785 parameters at 128 px."""

    def __init__(self, resolution: int, width: int, norm: str) -> None:
        # Instance norm: GroupNorm's kernel and its double backward are faster than those of InstanceNorm2d.
        super().__init__(resolution, width, lambda channels: nn.GroupNorm(channels, channels), norm)
        layers.zero_gradient(self.score.bias)  # it cancels in a difference of scores

    def forward(self, images: Tensor, audio: Tensor | None = None) -> Tensor:
        return super().forward(images)


class ProjectionCritic(Critic):
    """Scores images with audio ``[B, A]``: adds the inner product of image features and an audio embedding.

    Source: Miyato and Koyama 2018, "cGANs with Projection Discriminator", eq. 3.
    """

    def __init__(self, resolution: int, width: int, audio: int) -> None:
        super().__init__(resolution, width, "batch")
        self.audio = layers.AudioEncoder(audio)
        self.features = nn.Linear(self.score.in_features, layers.EMBEDDING, bias=False)

    def forward(self, images: Tensor, audio: Tensor | None = None) -> Tensor:
        maps = self.blocks(images).flatten(1)
        projection = (self.features(maps).float() * self.audio(audio)).sum(1) * layers.EMBEDDING**-0.5
        return self.score(maps).squeeze(1).float() + projection


class CriticPhase(Phase):
    """Trains the critic by the Wasserstein loss and the gradient penalty."""

    name = "critic"

    def __init__(self, generator: nn.Module, critic: Critic, options: Options, latents: Latents) -> None:
        super().__init__()
        self.critic, self.frozen_networks = critic, (generator,)
        self.repeats, self.latents, self.penalty = options.critic_steps, latents, options.penalty

    def sample_noise(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {**super().sample_noise(count, generator),
                "mix": torch.rand(count, 1, 1, 1, generator=generator, device=generator.device)}

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        real, audio = to_minus_one_one(batch.cover), batch.audio
        with torch.no_grad():
            fake = self.frozen_networks[0](noise["latents"], audio).float()
        scores = self.critic(torch.cat([real, fake]), None if audio is None else torch.cat([audio, audio]))
        on_real, on_fake = scores.chunk(2)
        if batch.mismatched is not None:
            on_fake = (on_fake + self.critic(real, batch.mismatched)) / 2
        wasserstein = losses.wasserstein_critic(on_real, on_fake)
        penalty, grad_norm = losses.gradient_penalty(lambda images: self.critic(images, audio), real, fake,
                                                     noise["mix"])
        loss = wasserstein + self.penalty * penalty
        return loss, {"critic": loss.detach(), "wasserstein": -wasserstein.detach(), "penalty": penalty.detach(),
                      "critic_grad_norm": grad_norm}


def assemble(generator: nn.Module, critic: Critic, options: Options, conditional: bool) -> Model:
    """Both networks with their phases, critic first."""
    latents, projection = normal_latents(options.latent), isinstance(critic, ProjectionCritic)
    phases = [CriticPhase(generator, critic, options, latents),
              GeneratorPhase(generator, critic, lambda scores: -scores.mean(), latents, projection)]
    return adversarial({"generator": generator, "critic": critic}, phases, latents, conditional=conditional,
                       needs_mismatched_audio=projection)


def build(options: PlainOptions, inputs: InputSpec) -> Model:
    """Without audio; the generator has 4,353,091 parameters at 128 px."""
    layers.check_resolution(inputs.resolution)
    widths = layers.trunk_widths(inputs.resolution, options.width)
    widths[0] = layers.level_width(4, options.width)
    generator = layers.Upsampler(options.latent, widths, options.norm, refined=2)
    return assemble(generator, Critic(inputs.resolution, options.width, options.norm), options, conditional=False)


def build_conditional(options: ConditionalOptions, inputs: InputSpec) -> Model:
    """With audio; the generator has 9,782,043 parameters at 128 px with vectors of 1160 numbers."""
    layers.check_resolution(inputs.resolution)
    layers.check_audio(inputs.audio)
    generator = layers.FilmUpsampler(options.latent, inputs.audio,
                                     layers.trunk_widths(inputs.resolution, options.width))
    critic = (ProjectionCritic(inputs.resolution, options.width, inputs.audio) if options.projection_critic
              else Critic(inputs.resolution, options.width, "batch"))
    return assemble(generator, critic, options, conditional=True)


WGAN_GP = ModelSpec(
    "WGAN with gradient penalty (thesis; Gulrajani et al. 2017)", PlainOptions, build,
    preset={"batch_size": 64, "lr": 1e-4, "betas": (0.0, 0.999)},
    demo={"steps": 600, "width": 16, "batch_size": 32, "lr": 7e-4})

COND_WGAN_GP = ModelSpec(
    "the thesis's conditional WGAN-GP: FiLM from audio, a critic without audio", ConditionalOptions, build_conditional,
    preset={"batch_size": 64, "lr": 5e-6, "betas": (0.5, 0.999), "audio_scale": "raw"},
    demo={"steps": 600, "width": 16, "batch_size": 32, "lr": 7e-4})
