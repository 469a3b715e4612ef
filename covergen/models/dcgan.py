"""DCGAN: covers from noise, by transposed convolutions that start from a single pixel.

Sources: Radford et al. 2016, "Unsupervised Representation Learning with DCGAN"; layer table and hyper-parameters from
J. Bustos 2020, "Towards album artwork generation based on audio". The thesis's code subtracts 0.5 from N(0, 1) and
doubles the result, which is N(-1, 2^2); with that noise the generator collapses to few pictures on the demo world, so
ours is N(0, 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from covergen.models.base import InputSpec, Model, ModelSpec, label_gan, normal_latents, option
from covergen.nn.layers import check_resolution, init_gan_weights
from covergen.nn.losses import binary_cross_entropy


@dataclass(frozen=True)
class Options:
    """Options of the model; the defaults are the thesis's."""

    width: int = option(64, "channels of the generator next to the image; deeper layers have up to 8 times as many",
                        gt=0)
    critic_width: int = option(64, "channels of the discriminator next to the image", gt=0)
    latent: int = option(100, "size of the noise vector", gt=0)
    latent_mean: float = option(0.0, "mean of the noise; -1 for the thesis's weights")
    latent_std: float = option(1.0, "standard deviation of the noise; 2 for the thesis's weights")
    real_label: float = option(0.9, "label of real covers; that of generated covers is 0", gt=0)


def widths(resolution: int, width: int) -> list[int]:
    """Channels at 4, 8, ... resolution / 2 pixels: 8, 4, 2, 1, 1, 1 times ``width``."""
    return [width * max(1, 8 // 2**level) for level in range((resolution // 4).bit_length() - 1)]


class Generator(nn.Module):
    """Turns latents ``[B, latent]`` into images ``[B, 3, R, R]`` in [-1, 1]; 3,642,368 parameters at 128 px."""

    def __init__(self, resolution: int, width: int, latent: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = latent
        for level, out in enumerate(widths(resolution, width)):
            stride, padding = (2, 1) if level else (1, 0)
            layers += [nn.ConvTranspose2d(channels, out, 4, stride, padding, bias=False), nn.BatchNorm2d(out),
                       nn.ReLU()]
            channels = out
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(channels, 3, 4, 2, 1, bias=False), nn.Tanh())
        init_gan_weights(self)

    def forward(self, latents: Tensor, audio: Tensor | None = None) -> Tensor:
        return self.main(latents[..., None, None])


class Discriminator(nn.Module):
    """Scores images ``[B, 3, R, R]`` by logits ``[B]``; 2,831,232 parameters at 128 px.

    As in the thesis the first convolution has no norm and the second no activation.
    """

    def __init__(self, resolution: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for level, out in enumerate(reversed(widths(resolution, width))):
            layers += [nn.Conv2d(channels, out, 4, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(out)] if level > 0 else []
            layers += [nn.LeakyReLU(0.2)] if level != 1 else []
            channels = out
        self.main = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, 1, 0, bias=False))
        init_gan_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images).flatten()


def build(options: Options, inputs: InputSpec) -> Model:
    """Builds the model; it ignores audio."""
    check_resolution(inputs.resolution)
    generator = Generator(inputs.resolution, options.width, options.latent)
    discriminator = Discriminator(inputs.resolution, options.critic_width)
    latents = normal_latents(options.latent, options.latent_mean, options.latent_std)
    return label_gan(generator, discriminator, binary_cross_entropy, latents, options.real_label)


DCGAN = ModelSpec(
    "DCGAN (thesis; Radford et al. 2016)", Options, build,
    preset={"batch_size": 128, "lr": 2e-4, "betas": (0.5, 0.99)},
    demo={"steps": 5000, "width": 16, "critic_width": 8, "batch_size": 32, "lr": 5e-4})
