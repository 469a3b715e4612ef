"""The contract of a model: networks, the phases that train them, and functions that sample and reconstruct.

A step of training runs the model's phases in order. A phase is a module whose forward computes everything it needs from
a batch and from noise and returns its loss, so that distributed training sees one wrapped forward and one backward. The
phases that several GANs share are here too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# (count, generator, truncation or None) -> latents [count, L], on the generator's device
Latents = Callable[[int, torch.Generator, float | None], Tensor]


class Phase(nn.Module):
    """The part of a training step that updates with one optimizer.

    The networks that it trains are its registered submodules. Networks that it only reads stay in the tuple
    ``frozen_networks``, unregistered, so that neither the optimizer nor the gradient reduction knows them; where
    gradients flow through one, it is called with ``frozen``.

    Attributes:
        name: the name of its losses and gradient norms in the log.
        repeats: updates in one step, each on a fresh real batch with fresh noise.
        interval: it runs in steps whose number (from 1) is a multiple of this.
        latents: the distribution of the latents that it draws, if it draws any.
    """

    name: str = "phase"
    repeats: int = 1
    interval: int = 1
    latents: Latents | None = None

    def begin(self, step: int, images: int) -> None:
        """Updates schedules before a step (numbered from 1), with which ``images`` images will have been seen."""

    def sample_noise(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Noise for ``count`` images, each entry ``[count, ...]``, from the generator alone and on its device."""
        return {} if self.latents is None else {"latents": self.latents(count, generator, None)}

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (scalar, mean over the images given) and detached scalars to log (means as well)."""
        raise NotImplementedError


class InputSpec(NamedTuple):
    """The data that a model is built for: side of the covers in pixels, numbers in an audio vector (0: no audio)."""

    resolution: int
    audio: int = 0


@dataclass(frozen=True)
class Model:
    """A built model. A function that it does not have (sample, reconstruct, ...) is None.

    A batch needs ``cover`` (uint8 ``[N, 3, R, R]``) and, for conditional models, ``audio`` (float32 ``[N, A]``).

    Attributes:
        networks: name -> network; also the names of their files in a checkpoint.
        phases: in the order in which a step runs them.
        ema_networks: the networks of which an exponential moving average is kept.
        latents: the distribution of the inputs of ``sample``.
        sample: ``(networks, latents, audio or None) -> [count, 3, R, R]``, values from ``pixel_min`` to 1.
        pixel_min: the value of black in samples: -1 after a tanh, 0 after a sigmoid.
        truncation: the bound on ``|z|`` of truncated samples, None if they make no sense for this model.
        conditional: whether samples and reconstructions depend on an audio vector.
        reconstruct: ``(networks, batch) -> [N, 3, R, R]`` in [0, 1].
        encode: ``(networks, batch) -> [N, L]``, embeddings of covers (of a VAE: the means).
        embed_audio: ``(networks, audio) -> [N, L]`` in the same space, of a model that compares audio with covers.
        validation_phase: the phase whose loss over the validation split says how good the model is.
        needs_mismatched_audio: whether its phases read ``batch.mismatched``, audio of other albums.
        needs_whole_batch: whether its loss compares all covers of a global batch, so that ranks need equal parts.
        denoising_loss: ``(networks, batch, noise) -> [N]``, the loss of each cover with its audio, at the noise that
            the (one) phase draws; how much wrong audio adds to it measures what the model knows of the pairing.
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
        """The names of the networks with their numbers of parameters, for messages."""
        return ", ".join(f"{name} {sum(parameter.numel() for parameter in network.parameters()):,}"
                         for name, network in self.networks.items())


@dataclass(frozen=True)
class ModelSpec:
    """How to build a model: what a line in the table of models points to.

    Attributes:
        about: one line for the help: what it is and where it comes from.
        options: a frozen dataclass of the model's options, each made with ``option``.
        build: ``(options, inputs) -> Model``; raises ValueError for inputs that it can't be built for.
        preset: its defaults for options of training, as the source of the model used them.
        demo: further defaults on the small demo world, where a run should take minutes on two CPU cores.
    """

    about: str
    options: type
    build: Callable[[Any, InputSpec], Model]
    preset: dict[str, Any] = field(default_factory=dict)
    demo: dict[str, Any] = field(default_factory=dict)


def option(default: Any, help: str, *, free: bool = False, **limits: float) -> Any:
    """A field of a dataclass of options; ``free``: it may differ when a run is resumed; limits: any of gt, ge, lt."""
    return field(default=default, metadata={"help": help, "free": free, **limits})


def frozen(network: nn.Module, *inputs: Tensor) -> Tensor:
    """Calls a network whose parameters get no gradient, while gradients still flow to the inputs."""
    return torch.func.functional_call(network, {name: p.detach() for name, p in network.named_parameters()}, inputs)


def normal_latents(size: int, mean: float = 0.0, std: float = 1.0) -> Latents:
    """Latents of ``size`` numbers from N(mean, std^2), within ``truncation`` standard deviations if that is given."""
    def sample(count: int, generator: torch.Generator, truncation: float | None) -> Tensor:
        device = generator.device
        if truncation is None:
            latents = torch.randn(count, size, generator=generator, device=device)
        else:
            latents = nn.init.trunc_normal_(torch.empty(count, size, device=device), 0.0, 1.0, -truncation, truncation,
                                            generator=generator)
        return latents * std + mean
    return sample


def to_zero_one(covers: Tensor) -> Tensor:
    """uint8 covers as float32 in [0, 1], the range of models that end in a sigmoid."""
    return covers.float() / 255


def to_minus_one_one(covers: Tensor) -> Tensor:
    """uint8 covers as float32 in [-1, 1], the range of models that end in a tanh."""
    return covers.float() / 127.5 - 1


# -- GANs ---


class DiscriminatorPhase(Phase):
    """Trains a discriminator towards a label for real covers and 0 for generated ones.

    Real and generated covers go through it separately, each with their own batch statistics (Radford et al. 2016).
    """

    name = "discriminator"

    def __init__(self, generator: nn.Module, discriminator: nn.Module, loss: Callable[[Tensor, float], Tensor],
                 latents: Latents, real_label: float) -> None:
        """Args: loss: scores ``[B]`` and their label -> scalar; the others as of ``label_gan``."""
        super().__init__()
        self.discriminator, self.frozen_networks, self.loss = discriminator, (generator,), loss
        self.latents, self.real_label = latents, real_label

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            fake = self.frozen_networks[0](noise["latents"], batch.audio).float()
        on_real, on_fake = (self.discriminator(images).float() for images in (to_minus_one_one(batch.cover), fake))
        loss = self.loss(on_real, self.real_label) + self.loss(on_fake, 0.0)
        return loss, {"discriminator": loss.detach(), "score_real": on_real.detach().mean(),
                      "score_fake": on_fake.detach().mean()}


class GeneratorPhase(Phase):
    """Trains a generator so that a frozen critic or discriminator scores its images as ``loss`` asks."""

    name = "generator"

    def __init__(self, generator: nn.Module, critic: nn.Module, loss: Callable[[Tensor], Tensor], latents: Latents,
                 conditional_critic: bool = False) -> None:
        """Args: loss: scores ``[B]`` -> scalar; conditional_critic: whether the critic also takes the audio."""
        super().__init__()
        self.generator, self.frozen_networks, self.loss, self.latents = generator, (critic,), loss, latents
        self.conditional_critic = conditional_critic

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        fake = self.generator(noise["latents"], batch.audio)
        audio = (batch.audio,) if self.conditional_critic else ()
        loss = self.loss(frozen(self.frozen_networks[0], fake, *audio).float())
        return loss, {"generator": loss.detach()}


def adversarial(networks: dict[str, nn.Module], phases: list[Phase], latents: Latents, **more: Any) -> Model:
    """The Model of a GAN whose network ``generator`` takes latents ``[N, L]`` and audio; it alone is averaged."""
    return Model(networks, phases, ema_networks=("generator",), latents=latents,
                 sample=lambda networks, latents, audio: networks["generator"](latents, audio), **more)


def label_gan(generator: nn.Module, discriminator: nn.Module, loss: Callable[[Tensor, float], Tensor],
              latents: Latents, real_label: float, interval: int = 1, **more: Any) -> Model:
    """The Model of a GAN that compares scores ``[B]`` with labels; ``more`` are its attributes.

    The discriminator is updated every ``interval`` steps. A ``real_label`` below 1 is one-sided label smoothing
    (Salimans et al. 2016, section 3.4).
    """
    phases = [DiscriminatorPhase(generator, discriminator, loss, latents, real_label),
              GeneratorPhase(generator, discriminator, lambda scores: loss(scores, real_label), latents)]
    phases[0].interval = interval
    return adversarial({"generator": generator, "discriminator": discriminator}, phases, latents, **more)
