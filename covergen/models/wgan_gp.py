"""WGAN with gradient penalty: noise in, covers out; the thesis's networks at 128 px, blocks added or dropped elsewhere.

Sources: Gulrajani et al. 2017, "Improved Training of Wasserstein GANs"; layer table and hyper-parameters from
J. Bustos 2020, "Towards album artwork generation based on audio". Every level (side length) keeps its width at every
resolution, so a smaller cover drops the blocks nearest the image and a larger one adds them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from covergen.nn import losses
from covergen.nn.layers import activation, check_resolution, feature_norm, init_gan_weights, normal_latents
from covergen.nn.turn import Model, Turn, frozen


@dataclass(frozen=True)
class Options:
    """What can be set about the model; the defaults are the thesis's."""

    width: int = field(default=64, metadata={"help": "channels at 64 px; all other widths keep their ratio to it"})
    latent: int = field(default=100, metadata={"help": "size of the noise vector"})
    norm: Literal["batch", "group"] = field(default="batch", metadata={
        "help": "batch: the thesis's, mixes the images of a batch in the generator; group: group norm and SiLU, so "
                "that a run does not depend on how batches are split over processes"})
    critic_steps: int = field(default=5, metadata={"help": "critic updates per generator update, each on fresh covers"})
    penalty: float = field(default=10.0, metadata={"help": "weight of the gradient penalty"})


PRESET = {"batch_size": 64, "lr": 1e-4, "betas": (0.0, 0.999), "steps": 50_000}


def level_width(level: int, width: int) -> int:
    """Channels at a side length of ``level`` pixels: 4, 4, 4, 2, 1, 1/2 times ``width`` at 4, 8, 16, 32, 64, 128."""
    return max(8, width * 64 // max(16, level))


class Generator(nn.Module):
    """Latents ``[B, latent]`` -> images ``[B, 3, R, R]`` in [-1, 1]; 4,353,091 parameters at 128 px."""

    def __init__(self, resolution: int, width: int, latent: int, norm: str) -> None:
        super().__init__()
        self.base = level_width(4, width)
        self.project = nn.Linear(latent, self.base * 4 * 4)
        self.project_norm = feature_norm(norm, self.base)
        layers: list[nn.Module] = []
        channels, level = self.base, 8
        while level < resolution:
            out = level_width(level, width)
            layers += [nn.ConvTranspose2d(channels, out, 4, 2, 1), feature_norm(norm, out), activation(norm)]
            if level <= 16:
                layers += [nn.ConvTranspose2d(out, out, 3, 1, 1), feature_norm(norm, out), activation(norm)]
            channels, level = out, level * 2
        self.blocks = nn.Sequential(*layers)
        self.to_rgb = nn.ConvTranspose2d(channels, 3, 4, 2, 1)
        init_gan_weights(self)

    def forward(self, latents: Tensor) -> Tensor:
        features = self.project_norm(self.project(latents).unflatten(1, (self.base, 4, 4)))
        return torch.tanh(self.to_rgb(self.blocks(features)))


class Critic(nn.Module):
    """Images ``[B, 3, R, R]`` -> scores ``[B]``; norms are per image; 3,814,785 parameters at 128 px."""

    def __init__(self, resolution: int, width: int, norm: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, level = 3, resolution // 2
        while level >= 4:
            out = level_width(level, width) * (2 if level == 4 else 1)
            # One group per channel is instance norm; GroupNorm's kernel and its double backward are the faster ones.
            layers += [nn.Conv2d(channels, out, 4, 2, 1, bias=False), nn.GroupNorm(out, out), activation(norm, 0.2)]
            channels, level = out, level // 2
        self.blocks = nn.Sequential(*layers)
        self.score = nn.Linear(channels * 4 * 4, 1)
        # It cancels in a difference of scores; what is left of its gradient is rounding, which Adam would blow up.
        self.score.bias.register_hook(torch.zeros_like)
        init_gan_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.score(self.blocks(images).flatten(1)).squeeze(1)


class CriticTurn(Turn):
    """Trains the critic: Wasserstein loss and gradient penalty, real and fake in one call."""

    name = "critic"

    def __init__(self, generator: Generator, critic: Critic, options: Options) -> None:
        super().__init__()
        self.critic = critic
        self.reads = (generator,)
        self.repeats, self.latent, self.penalty = options.critic_steps, options.latent, options.penalty

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"latents": normal_latents(count, self.latent, generator),
                "mix": torch.rand(count, 1, 1, 1, generator=generator, device=generator.device)}

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        real = batch.cover.float() / 127.5 - 1
        with torch.no_grad():
            fake = self.reads[0](noise["latents"]).float()
        scores = self.critic(torch.cat([real, fake]))
        wasserstein = losses.wasserstein_critic(*scores.chunk(2))
        penalty, slope = losses.gradient_penalty(self.critic, real, fake, noise["mix"])
        loss = wasserstein + self.penalty * penalty
        return loss, {"critic": loss.detach(), "wasserstein": -wasserstein.detach(), "penalty": penalty.detach(),
                      "slope": slope}


class GeneratorTurn(Turn):
    """Trains the generator: its images should score high."""

    name = "generator"

    def __init__(self, generator: Generator, critic: Critic, options: Options) -> None:
        super().__init__()
        self.generator = generator
        self.reads = (critic,)
        self.latent = options.latent

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"latents": normal_latents(count, self.latent, generator)}

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss = -frozen(self.reads[0], self.generator(noise["latents"])).float().mean()
        return loss, {"generator": loss.detach()}


def build(options: Options, resolution: int) -> Model:
    """Both networks with their turns, critic first.

    Raises:
        ValueError: a resolution other than 32, 64, 128 or 256.
    """
    check_resolution(resolution)
    generator = Generator(resolution, options.width, options.latent, options.norm)
    critic = Critic(resolution, options.width, options.norm)
    return Model(
        networks={"generator": generator, "critic": critic},
        turns=[CriticTurn(generator, critic, options), GeneratorTurn(generator, critic, options)],
        averaged=("generator",),
        latents=lambda count, source, truncation: normal_latents(count, options.latent, source, truncation),
        sample=lambda networks, latents: networks["generator"](latents),
    )
