"""Least-squares GAN, from noise alone (``lsgan``) or with audio as in the thesis (``cond_lsgan``).

Sources: Mao et al. 2017, "Least Squares Generative Adversarial Networks"; layer table and hyper-parameters from
J. Bustos 2020, "Towards album artwork generation based on audio". The conditional one is the thesis's baseline as it
was: its discriminator never hears the audio, so nothing makes covers follow it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from covergen.models.base import (
    DiscriminatorPhase,
    GeneratorPhase,
    InputSpec,
    Model,
    ModelSpec,
    adversarial,
    normal_latents,
)
from covergen.nn.layers import ConvDiscriminator, FilmUpsampler, Upsampler, check_audio, check_resolution, trunk_widths
from covergen.nn.losses import least_squares


@dataclass(frozen=True)
class Options:
    """What can be set about the model; the defaults are the thesis's."""

    width: int = field(default=64, metadata={"help": "channels of the generator at 64 px; all widths keep their ratio"})
    critic_width: int = field(default=32, metadata={"help": "the same of the discriminator"})
    latent: int = field(default=1024, metadata={"help": "size of the noise vector"})
    real_label: float = field(default=0.9, metadata={"help": "the score that real covers should have, generated 0"})


@dataclass(frozen=True)
class CondOptions(Options):
    """And about the conditional one."""

    critic_width: int = field(default=64, metadata={"help": "the same of the discriminator"})
    critic_every: int = field(default=2, metadata={"help": "steps between updates of the discriminator"})


def assemble(generator: nn.Module, resolution: int, options: Options, interval: int, **more: object) -> Model:
    """A generator with its discriminator (957,121 parameters at 128 px with a width of 32) and turns."""
    discriminator = ConvDiscriminator(resolution, options.critic_width, nn.BatchNorm2d)
    latents = normal_latents(options.latent)
    turns = [
        DiscriminatorPhase(generator, discriminator, least_squares, latents=latents,
                          real_label=options.real_label, interval=interval),
        GeneratorPhase(generator, discriminator, lambda scores: least_squares(scores, options.real_label),
                      latents=latents),
    ]
    return adversarial({"generator": generator, "discriminator": discriminator}, turns, latents, **more)


def build(options: Options, sizes: InputSpec) -> Model:
    """Without audio; the generator has 12,204,099 parameters at 128 px."""
    check_resolution(sizes.resolution)
    generator = Upsampler(options.latent, trunk_widths(sizes.resolution, options.width))
    return assemble(generator, sizes.resolution, options, interval=1, truncation=1.5)


def build_conditional(options: CondOptions, sizes: InputSpec) -> Model:
    """With audio, FiLM at every norm of the generator."""
    check_resolution(sizes.resolution)
    check_audio(sizes.audio)
    generator = FilmUpsampler(options.latent, sizes.audio, trunk_widths(sizes.resolution, options.width))
    return assemble(generator, sizes.resolution, options, interval=options.critic_every, conditional=True)


LSGAN = ModelSpec(
    "least-squares GAN (thesis; Mao et al. 2017)", Options, build,
    preset={"batch_size": 128, "lr": 2e-4, "betas": (0.5, 0.999)},
    demo={"steps": 5000, "width": 16, "critic_width": 8, "latent": 128, "batch_size": 32, "lr": 5e-4})

COND_LSGAN = ModelSpec(
    "the thesis's conditional LSGAN: FiLM from audio, a discriminator that never hears it", CondOptions,
    build_conditional,
    preset={"batch_size": 64, "lr": 2e-4, "betas": (0.5, 0.999), "audio_scale": "raw"},
    demo={"steps": 2500, "width": 16, "critic_width": 32, "latent": 128, "batch_size": 32, "lr": 5e-4})
