"""Variational autoencoders of covers: without audio (``vae``), or with it as in the thesis's figure (``cond_vae``).

Sources: Kingma and Welling 2014, "Auto-Encoding Variational Bayes"; layer table and hyper-parameters from J. Bustos
2020, "Towards album artwork generation based on audio".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from covergen.models.base import InputSpec, Latents, Model, ModelSpec, Phase, normal_latents, to_zero_one
from covergen.nn.autoencoders import Decoder, Encoder
from covergen.nn.layers import AudioTrunk, Film, check_audio, check_resolution, init_film
from covergen.nn.losses import bernoulli_and_kl

HEARD = 1000  # numbers that audio becomes before it modulates the decoder, in the thesis's figure


@dataclass(frozen=True)
class Options:
    """What can be set about the model; the defaults are the thesis's."""

    width: int = field(default=32, metadata={"help": "channels of the first layer; the others have 2, 2 and 4 times"})
    latent: int = field(default=500, metadata={"help": "size of the latent vector"})


class Autoencoder(nn.Module):
    """Images ``[B, 3, R, R]`` in [0, 1] to latents ``[B, latent]`` and back; 49,446,635 parameters at 128 px.

    With audio ``[B, A]`` the maps of each of the decoder's convolutions are scaled and shifted by it.
    """

    def __init__(self, options: Options, sizes: InputSpec, conditional: bool) -> None:
        super().__init__()
        self.maps = (4 * options.width, sizes.resolution // 8, sizes.resolution // 8)
        values = self.maps[0] * self.maps[1] * self.maps[2]
        self.encoder, self.decoder = Encoder(options.width, norm_last=True), Decoder(options.width, norm_last=True)
        self.mean, self.log_variance = nn.Linear(values, options.latent), nn.Linear(values, options.latent)
        self.project = nn.Linear(options.latent, values)
        if conditional:
            self.audio = AudioTrunk(sizes.audio, HEARD)
            self.films = nn.ModuleList(Film(HEARD, times * options.width) for times in (2, 2, 1))
            init_film(self)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z|x), float32 ``[B, latent]`` each."""
        values = self.encoder(images).flatten(1)
        return self.mean(values).float(), self.log_variance(values).float()

    def decode(self, latents: Tensor, audio: Tensor | None) -> Tensor:
        """Logits of images, float32 ``[B, 3, R, R]``."""
        films = None
        if hasattr(self, "audio"):
            heard = self.audio(audio)
            films = [lambda maps, film=film: film(maps, heard) for film in self.films]
        return self.decoder(self.project(latents).unflatten(1, self.maps), films).float()


class ElboPhase(Phase):
    """Trains a VAE: cross entropy summed over an image's values plus KL, in nats per image."""

    name = "vae"

    def __init__(self, vae: Autoencoder, latents: Latents) -> None:
        super().__init__()
        self.vae, self.latents = vae, latents

    def sample_noise(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"normal": self.latents(count, generator, None)}

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images = to_zero_one(batch.cover)
        mean, log_variance = self.vae.encode(images)
        logits = self.vae.decode(mean + (0.5 * log_variance).exp() * noise["normal"], batch.audio)
        entropy, divergence = bernoulli_and_kl(logits, images, mean, log_variance)
        loss = entropy + divergence
        return loss, {"neg_elbo": loss.detach(), "bce": entropy.detach(), "kl": divergence.detach()}


def build(options: Options, sizes: InputSpec, conditional: bool = False) -> Model:
    """One network, one turn; validated by that turn's loss; reconstructions and encodings are from the means."""
    check_resolution(sizes.resolution)
    vae = Autoencoder(options, sizes, conditional)
    latents = normal_latents(options.latent)
    turn = ElboPhase(vae, latents)

    def encode(networks: dict[str, nn.Module], batch: Any) -> Tensor:
        return networks["vae"].encode(to_zero_one(batch.cover))[0]

    def sample(networks: dict[str, nn.Module], latents: Tensor, audio: Tensor | None) -> Tensor:
        return torch.sigmoid(networks["vae"].decode(latents, audio))

    return Model(
        {"vae": vae}, [turn], pixel_min=0.0, conditional=conditional, validation_phase=turn, latents=latents, sample=sample,
        encode=encode, reconstruct=lambda networks, batch: sample(networks, encode(networks, batch), batch.audio))


def build_conditional(options: Options, sizes: InputSpec) -> Model:
    """The same with audio."""
    check_audio(sizes.audio)
    return build(options, sizes, conditional=True)


PRESET = {"batch_size": 128, "lr": 1e-4, "betas": (0.9, 0.999), "ema": 0.0, "patience": 5}

VAE = ModelSpec("variational autoencoder (thesis; Kingma and Welling 2014)", Options, build, preset=PRESET,
             demo={"batch_size": 32, "lr": 5e-4, "steps": 3000})

COND_VAE = ModelSpec("the thesis's conditional VAE, after its figure: audio modulates the decoder", Options,
                  build_conditional, preset={**PRESET, "audio_scale": "raw"},
                  demo={"batch_size": 32, "lr": 5e-4, "steps": 2000})
