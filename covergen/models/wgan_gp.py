"""WGAN with gradient penalty, from noise alone (``wgan_gp``) or with audio as in the thesis (``cond_wgan_gp``).

Sources: Gulrajani et al. 2017, "Improved Training of Wasserstein GANs"; layer table and hyper-parameters from
J. Bustos 2020, "Towards album artwork generation based on audio". The conditional one is the thesis's baseline as it
was: its critic never hears the audio, so nothing makes covers follow it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
    to_minus_one_one,
)
from covergen.nn import losses
from covergen.nn.layers import (
    EMBEDDING,
    AudioEncoder,
    ConvDiscriminator,
    FilmUpsampler,
    Upsampler,
    check_audio,
    check_resolution,
    instance_norm,
    level_width,
    trunk_widths,
    zero_gradient,
)


@dataclass(frozen=True)
class Options:
    """What can be set about both models; the defaults are the thesis's."""

    width: int = field(default=64, metadata={"help": "channels at 64 px; all other widths keep their ratio to it"})
    latent: int = field(default=100, metadata={"help": "size of the noise vector"})
    critic_steps: int = field(default=5, metadata={"help": "critic updates per generator update, each on fresh covers"})
    penalty: float = field(default=10.0, metadata={"help": "weight of the gradient penalty"})


@dataclass(frozen=True)
class PlainOptions(Options):
    """And about the one without audio."""

    norm: Literal["batch", "group"] = field(default="batch", metadata={
        "help": "batch: the thesis's, mixes the images of a batch in the generator; group: group norm and SiLU, so "
                "that a run does not depend on how batches are split over processes"})


@dataclass(frozen=True)
class ConditionalOptions(Options):
    """And about the one with audio."""

    projection_critic: bool = field(default=False, metadata={
        "help": "unlike in the thesis, the critic's score is of covers with their audio, and covers with other albums' "
                "audio count as generated"})


class Critic(ConvDiscriminator):
    """Images ``[B, 3, R, R]`` -> scores ``[B]``; norms are per image; 3,814,785 parameters at 128 px."""

    def __init__(self, resolution: int, width: int, norm: str) -> None:
        super().__init__(resolution, width, instance_norm, norm)
        zero_gradient(self.score.bias)  # it cancels in a difference of scores

    def forward(self, images: Tensor, audio: Tensor | None = None) -> Tensor:
        return super().forward(images)


class ProjectionCritic(Critic):
    """Images and audio ``[B, A]`` -> scores ``[B]``: to the plain score comes an inner product with an embedding.

    Source: Miyato and Koyama 2018, "cGANs with Projection Discriminator", eq. 3.
    """

    def __init__(self, resolution: int, width: int, audio: int) -> None:
        super().__init__(resolution, width, "batch")
        self.audio = AudioEncoder(audio)
        self.features = nn.Linear(self.score.in_features, EMBEDDING, bias=False)

    def forward(self, images: Tensor, audio: Tensor | None = None) -> Tensor:
        maps = self.blocks(images).flatten(1)
        fit = (self.features(maps).float() * self.audio(audio)).sum(1) * EMBEDDING**-0.5
        return self.score(maps).squeeze(1).float() + fit


class CriticPhase(Phase):
    """Trains the critic: Wasserstein loss and gradient penalty, real and fake in one call."""

    name = "critic"

    def __init__(self, generator: nn.Module, critic: Critic, options: Options, latents: Latents) -> None:
        super().__init__()
        self.critic = critic
        self.reads = (generator,)
        self.repeats, self.latents, self.penalty = options.critic_steps, latents, options.penalty

    def sample_noise(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"latents": self.latents(count, generator, None),
                "mix": torch.rand(count, 1, 1, 1, generator=generator, device=generator.device)}

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        real = to_minus_one_one(batch.cover)
        with torch.no_grad():
            fake = self.reads[0](noise["latents"], batch.audio).float()
        audio = batch.audio
        scores = self.critic(torch.cat([real, fake]), None if audio is None else torch.cat([audio, audio]))
        on_real, worse = scores.chunk(2)
        if batch.mismatched is not None:
            worse = (worse + self.critic(real, batch.mismatched)) / 2
        wasserstein = losses.wasserstein_critic(on_real, worse)
        penalty, slope = losses.gradient_penalty(lambda images: self.critic(images, audio), real, fake, noise["mix"])
        loss = wasserstein + self.penalty * penalty
        return loss, {"critic": loss.detach(), "wasserstein": -wasserstein.detach(), "penalty": penalty.detach(),
                      "critic_grad_norm": slope}


def assemble(generator: nn.Module, critic: Critic, options: Options, conditional: bool) -> Model:
    """Both networks with their turns, critic first."""
    latents, hears = normal_latents(options.latent), isinstance(critic, ProjectionCritic)
    turns = [CriticPhase(generator, critic, options, latents),
             GeneratorPhase(generator, critic, lambda scores: -scores.mean(), latents=latents, hears=hears)]
    return adversarial({"generator": generator, "critic": critic}, turns, latents, conditional=conditional,
                       needs_mismatched_audio=hears)


def build(options: PlainOptions, sizes: InputSpec) -> Model:
    """Without audio; the generator has 4,353,091 parameters at 128 px."""
    check_resolution(sizes.resolution)
    widths = trunk_widths(sizes.resolution, options.width)
    generator = Upsampler(options.latent, [level_width(4, options.width), *widths[1:]], options.norm, refined=2)
    return assemble(generator, Critic(sizes.resolution, options.width, options.norm), options, conditional=False)


def build_conditional(options: ConditionalOptions, sizes: InputSpec) -> Model:
    """With audio; the generator has 9,782,043 parameters at 128 px with vectors of 1160 numbers."""
    check_resolution(sizes.resolution)
    check_audio(sizes.audio)
    generator = FilmUpsampler(options.latent, sizes.audio, trunk_widths(sizes.resolution, options.width))
    critic = (ProjectionCritic(sizes.resolution, options.width, sizes.audio) if options.projection_critic
              else Critic(sizes.resolution, options.width, "batch"))
    return assemble(generator, critic, options, conditional=True)


WGAN_GP = ModelSpec(
    "WGAN with gradient penalty (thesis; Gulrajani et al. 2017)", PlainOptions, build,
    preset={"batch_size": 64, "lr": 1e-4, "betas": (0.0, 0.999)},
    demo={"steps": 600, "width": 16, "batch_size": 32, "lr": 7e-4})

COND_WGAN_GP = ModelSpec(
    "the thesis's conditional WGAN-GP: FiLM from audio, a critic that never hears it", ConditionalOptions,
    build_conditional,
    preset={"batch_size": 64, "lr": 5e-6, "betas": (0.5, 0.999), "audio_scale": "raw"},
    demo={"steps": 600, "width": 16, "batch_size": 32, "lr": 7e-4})
