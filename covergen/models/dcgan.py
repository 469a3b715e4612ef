"""DCGAN: noise in, covers out, by transposed convolutions from a single pixel on.

Sources: Radford et al. 2016, "Unsupervised Representation Learning with DCGAN"; layer table and hyper-parameters from
J. Bustos 2020, "Towards album artwork generation based on audio". Its code takes 0.5 off N(0, 1) and halves the
unit, which makes N(-1, 2^2); with that noise the generator falls to few pictures on the demo world: hence our N(0, 1).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from covergen.models.base import (
    DiscriminatorPhase,
    GeneratorPhase,
    InputSpec,
    Model,
    ModelSpec,
    adversarial,
    normal_latents,
)
from covergen.nn.layers import check_resolution, init_gan_weights
from covergen.nn.losses import binary_cross_entropy


@dataclass(frozen=True)
class Options:
    """What can be set about the model; the defaults are the thesis's."""

    width: int = field(default=64, metadata={"help": "channels nearest the image; deeper layers have up to 8 times"})
    critic_width: int = field(default=64, metadata={"help": "the same of the discriminator"})
    latent: int = field(default=100, metadata={"help": "size of the noise vector"})
    latent_mean: float = field(default=0.0, metadata={"help": "mean of the noise; the thesis's weights want -1"})
    latent_std: float = field(default=1.0, metadata={"help": "its standard deviation; the thesis's weights want 2"})
    real_label: float = field(default=0.9, metadata={"help": "label of real covers, generated ones have 0"})


def widths(resolution: int, width: int) -> list[int]:
    """Channels at 4, 8, ... resolution / 2 pixels: 8, 4, 2, 1, 1, 1 times ``width``."""
    return [width * max(1, 32 // 4 // 2**place) for place in range((resolution // 4).bit_length() - 1)]


class Generator(nn.Module):
    """Latents ``[B, latent]`` -> images ``[B, 3, R, R]`` in [-1, 1]; 3,642,368 parameters at 128 px."""

    def __init__(self, resolution: int, width: int, latent: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        size = latent
        for place, out in enumerate(widths(resolution, width)):
            steps = (2, 1) if place else (1, 0)
            layers += [nn.ConvTranspose2d(size, out, 4, *steps, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            size = out
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(size, 3, 4, 2, 1, bias=False), nn.Tanh())
        init_gan_weights(self)

    def forward(self, latents: Tensor, audio: Tensor | None = None) -> Tensor:
        return self.main(latents[..., None, None])


class Discriminator(nn.Module):
    """Images ``[B, 3, R, R]`` -> scores ``[B]`` whose sigmoid is D; 2,831,232 parameters at 128 px.

    As in the thesis the first convolution has no norm and the second no activation.
    """

    def __init__(self, resolution: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        size = 3
        for place, out in enumerate(reversed(widths(resolution, width))):
            layers += [nn.Conv2d(size, out, 4, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(out)] if place > 0 else []
            layers += [nn.LeakyReLU(0.2)] if place != 1 else []
            size = out
        self.main = nn.Sequential(*layers, nn.Conv2d(size, 1, 4, 1, 0, bias=False))
        init_gan_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images).flatten()


def build(options: Options, sizes: InputSpec) -> Model:
    """Both networks with their turns, discriminator first."""
    check_resolution(sizes.resolution)
    generator = Generator(sizes.resolution, options.width, options.latent)
    discriminator = Discriminator(sizes.resolution, options.critic_width)
    latents = normal_latents(options.latent, options.latent_mean, options.latent_std)
    turns = [
        DiscriminatorPhase(generator, discriminator, binary_cross_entropy, latents=latents,
                          real_label=options.real_label),
        GeneratorPhase(generator, discriminator, lambda scores: binary_cross_entropy(scores, options.real_label),
                      latents=latents),
    ]
    return adversarial({"generator": generator, "discriminator": discriminator}, turns, latents)


DCGAN = ModelSpec(
    "DCGAN (thesis; Radford et al. 2016)", Options, build,
    preset={"batch_size": 128, "lr": 2e-4, "betas": (0.5, 0.99)},
    demo={"steps": 5000, "width": 16, "critic_width": 8, "batch_size": 32, "lr": 5e-4})
