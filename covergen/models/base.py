"""What a model is to everything else: networks, turns that train them, and ways to sample and to reconstruct.

A step of training goes through the model's turns in order. A turn is a module whose forward computes everything it
needs from a batch and from noise and returns its loss, so one wrapped forward and one backward is all that distributed
training ever sees of it. The turns that several GANs have in common are here too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Phase(nn.Module):
    """One optimiser's share of a step.

    The networks it trains are its registered submodules. A network it only reads is kept in a tuple, unregistered, and
    called through ``frozen``: so neither the optimiser nor the gradient reduction knows it.

    Attributes:
        name: under which losses and gradient norms are logged.
        repeats: how often the turn is taken in one step; every repeat has a fresh real batch and fresh noise.
        every: it is taken in steps whose number (from 1) is a multiple of this only.
    """

    name: str = "turn"
    repeats: int = 1
    interval: int = 1

    def begin(self, number: int, images: int) -> None:
        """Called before step ``number`` (from 1), when so many images are seen with it: the place for schedules."""

    def sample_noise(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Noise for ``count`` images, each entry ``[count, ...]``, from the generator alone and on its device."""
        return {}

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (scalar, mean over the images given) and detached scalars to log (likewise means)."""
        raise NotImplementedError


# (count, generator, truncation or None) -> latents [count, L], on the generator's device
Latents = Callable[[int, torch.Generator, float | None], Tensor]


class InputSpec(NamedTuple):
    """What a model is built for: side of the covers in pixels, numbers in an audio vector (0: there are none)."""

    resolution: int
    audio: int = 0


@dataclass(frozen=True)
class Model:
    """A built model. What it can't do (sample, reconstruct) is None.

    A batch, wherever one is asked for, needs ``cover`` (uint8 ``[N, 3, R, R]``) and, for conditional models, ``audio``
    (float32 ``[N, A]``).

    Attributes:
        networks: name -> network; the names of its files in a checkpoint.
        turns: in the order they are taken.
        averaged: the networks of which an exponential moving average is kept.
        latents: inputs for ``sample``.
        sample: ``(networks, latents, audio or None) -> [count, 3, R, R]`` as the network gives them, from ``pixel_min`` to 1.
        low: the value of black in samples: -1 after a tanh, 0 after a sigmoid.
        truncation: the bound on ``|z|`` that this model's truncated samples use, None if they make no sense.
        conditional: whether samples and reconstructions follow an audio vector.
        reconstruct: ``(networks, batch) -> [N, 3, R, R]`` in [0, 1].
        encode: ``(networks, batch) -> [N, L]``, what the model makes of a cover (a VAE: the means).
        hear: ``(networks, audio) -> [N, L]`` in the same space, of a model that compares audio with covers.
        global_loss: whether its loss compares all covers of a global batch, so that ranks need even parts of it.
        validated: the turn whose loss over the validation split says how good the model is.
        denoising_loss: ``(networks, batch, noise) -> [N]``, the loss of each cover with its audio at the noise that the
            (one) turn draws; what wrong audio adds to it says how much the model knows of the pairing.
        mismatched: whether its turns need ``batch.mismatched``, audio of other albums.
    """

    networks: dict[str, nn.Module]
    phases: list[Phase]
    ema_networks: tuple[str, ...] = ()
    latents: Latents | None = None
    sample: Callable[[dict[str, nn.Module], Tensor, Tensor | None], Tensor] | None = None
    pixel_min: float = -1.0
    truncation: float | None = 2.0
    conditional: bool = False
    reconstruct: Callable[[dict[str, nn.Module], Any], Tensor] | None = None
    encode: Callable[[dict[str, nn.Module], Any], Tensor] | None = None
    embed_audio: Callable[[dict[str, nn.Module], Tensor], Tensor] | None = None
    validation_phase: Phase | None = None
    needs_mismatched_audio: bool = False
    needs_whole_batch: bool = False
    denoising_loss: Callable[[dict[str, nn.Module], Any, dict[str, Tensor]], Tensor] | None = None

    def sizes(self) -> str:
        """The networks with their numbers of parameters, for people."""
        return ", ".join(f"{name} {sum(parameter.numel() for parameter in network.parameters()):,}"
                         for name, network in self.networks.items())


@dataclass(frozen=True)
class ModelSpec:
    """A model before it is built: what a line in the table of models names.

    Attributes:
        about: one line for people: what it is and where it comes from.
        options: a frozen dataclass of what can be set about the model; every field has a ``help`` in its metadata.
        build: ``(options, sizes) -> Model``; raises ValueError for sizes that it can't be built for.
        preset: its values for options of training, as the source of the model used them.
        demo: what else differs on the small demo world, where a run is to take minutes on two CPU cores.
    """

    about: str
    options: type
    build: Callable[[Any, InputSpec], Model]
    preset: dict[str, Any] = field(default_factory=dict)
    demo: dict[str, Any] = field(default_factory=dict)


def frozen(network: nn.Module, *inputs: Tensor) -> Tensor:
    """Calls a network whose parameters get no gradient, while gradients still flow to the inputs."""
    return torch.func.functional_call(network, {name: p.detach() for name, p in network.named_parameters()}, inputs)


def normal_latents(size: int, mean: float = 0.0, std: float = 1.0) -> Latents:
    """Latents of ``size`` numbers from N(mean, std^2), within ``truncation`` standard deviations if that is given."""
    def draw(count: int, generator: torch.Generator, truncation: float | None) -> Tensor:
        device = generator.device
        if truncation is None:
            latents = torch.randn(count, size, generator=generator, device=device)
        else:
            latents = nn.init.trunc_normal_(torch.empty(count, size, device=device), 0.0, 1.0, -truncation, truncation,
                                            generator=generator)
        return latents * std + mean
    return draw


def to_zero_one(covers: Tensor) -> Tensor:
    """uint8 covers as float32 in [0, 1], the range of models that end in a sigmoid."""
    return covers.float() / 255


def to_minus_one_one(covers: Tensor) -> Tensor:
    """uint8 covers as float32 in [-1, 1], the range of models that end in a tanh."""
    return covers.float() / 127.5 - 1


# -- GANs ---


class DiscriminatorPhase(Phase):
    """Trains a discriminator: a label for real covers, 0 for generated ones.

    Real and fake go through it one after the other, each with its own batch statistics (Radford et al. 2016).
    """

    name = "discriminator"

    def __init__(self, generator: nn.Module, discriminator: nn.Module, loss: Callable[[Tensor, float], Tensor], *,
                 latents: Latents, real_label: float, interval: int = 1) -> None:
        """Args:
            generator: latents ``[B, L]`` and audio -> images; only read.
            discriminator: images -> scores ``[B]``.
            loss: scores and the label they should have -> scalar.
            latents: how they are drawn.
            real_label: of real covers; below 1 is one-sided smoothing (Salimans et al. 2016, section 3.4).
            every: see ``Phase``.
        """
        super().__init__()
        self.discriminator, self.reads, self.loss = discriminator, (generator,), loss
        self.latents, self.real_label, self.interval = latents, real_label, interval

    def sample_noise(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"latents": self.latents(count, generator, None)}

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            fake = self.reads[0](noise["latents"], batch.audio).float()
        on_real, on_fake = (self.discriminator(images).float() for images in (to_minus_one_one(batch.cover), fake))
        loss = self.loss(on_real, self.real_label) + self.loss(on_fake, 0.0)
        return loss, {"discriminator": loss.detach(), "score_real": on_real.detach().mean(),
                      "score_fake": on_fake.detach().mean()}


class GeneratorPhase(Phase):
    """Trains a generator: a critic or discriminator, which it only reads, should score its images as ``loss`` wants."""

    name = "generator"

    def __init__(self, generator: nn.Module, critic: nn.Module, loss: Callable[[Tensor], Tensor], *,
                 latents: Latents, hears: bool = False) -> None:
        """Args: generator, critic, latents: as above; loss: scores ``[B]`` -> scalar; hears: does the critic?"""
        super().__init__()
        self.hears = hears
        self.generator, self.reads, self.loss, self.latents = generator, (critic,), loss, latents

    def sample_noise(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"latents": self.latents(count, generator, None)}

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        audio = (batch.audio,) if self.hears else ()
        loss = self.loss(frozen(self.reads[0], self.generator(noise["latents"], batch.audio), *audio).float())
        return loss, {"generator": loss.detach()}


def adversarial(networks: dict[str, nn.Module], turns: list[Phase], latents: Latents, **more: Any) -> Model:
    """The Model of a GAN whose network ``generator`` takes latents ``[N, L]`` and audio; it alone is averaged."""
    return Model(
        networks, turns, ema_networks=("generator",), latents=latents,
        sample=lambda networks, latents, audio: networks["generator"](latents, audio),
        **more,
    )
