"""Least-squares GAN, from noise alone (``lsgan``) or conditioned on audio as in the thesis (``cond_lsgan``).

Sources: Mao et al. 2017, "Least Squares Generative Adversarial Networks"; layer table and hyper-parameters from
J. Bustos 2020, "Towards album artwork generation based on audio". The conditional one is the thesis's baseline: its
discriminator does not get the audio, so nothing makes covers follow it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from covergen.models.base import InputSpec, Model, ModelSpec, label_gan, normal_latents, option
from covergen.nn.layers import ConvDiscriminator, FilmUpsampler, Upsampler, check_audio, check_resolution, trunk_widths
from covergen.nn.losses import least_squares


@dataclass(frozen=True)
class Options:
    """Options of both models; the defaults are the thesis's."""

    width: int = option(64, "channels of the generator at 64 px; all other widths keep their ratio to it", gt=0)
    critic_width: int = option(32, "channels of the discriminator at 64 px", gt=0)
    latent: int = option(1024, "size of the noise vector", gt=0)
    real_label: float = option(0.9, "score that real covers should have; that of generated covers is 0", gt=0)


@dataclass(frozen=True)
class ConditionalOptions(Options):
    """Options of the conditional one."""

    critic_width: int = option(64, "channels of the discriminator at 64 px", gt=0)
    critic_every: int = option(2, "steps between updates of the discriminator", gt=0)


def build(options: Options, inputs: InputSpec) -> Model:
    """Without audio; generator 12,204,099, discriminator 957,121 parameters at 128 px."""
    check_resolution(inputs.resolution)
    generator = Upsampler(options.latent, trunk_widths(inputs.resolution, options.width))
    discriminator = ConvDiscriminator(inputs.resolution, options.critic_width, nn.BatchNorm2d)
    return label_gan(generator, discriminator, least_squares, normal_latents(options.latent), options.real_label,
                     truncation=1.5)


def build_conditional(options: ConditionalOptions, inputs: InputSpec) -> Model:
    """With audio, FiLM at every norm of the generator."""
    check_resolution(inputs.resolution)
    check_audio(inputs.audio)
    generator = FilmUpsampler(options.latent, inputs.audio, trunk_widths(inputs.resolution, options.width))
    discriminator = ConvDiscriminator(inputs.resolution, options.critic_width, nn.BatchNorm2d)
    return label_gan(generator, discriminator, least_squares, normal_latents(options.latent), options.real_label,
                     options.critic_every, conditional=True)


LSGAN = ModelSpec(
    "least-squares GAN (thesis; Mao et al. 2017)", Options, build,
    preset={"batch_size": 128, "lr": 2e-4, "betas": (0.5, 0.999)},
    demo={"steps": 5000, "width": 16, "critic_width": 8, "latent": 128, "batch_size": 32, "lr": 5e-4})

COND_LSGAN = ModelSpec(
    "the thesis's conditional LSGAN: FiLM from audio, a discriminator without audio", ConditionalOptions,
    build_conditional,
    preset={"batch_size": 64, "lr": 2e-4, "betas": (0.5, 0.999), "audio_scale": "raw"},
    demo={"steps": 2500, "width": 16, "critic_width": 32, "latent": 128, "batch_size": 32, "lr": 5e-4})
