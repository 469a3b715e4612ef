"""Variational autoencoders of covers: without audio (``vae``), or with it as in the thesis's figure (``cond_vae``).

Sources: Kingma and Welling 2014, "Auto-Encoding Variational Bayes"; layer table and hyper-parameters from J. Bustos
2020, "Towards album artwork generation based on audio".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from covergen.models.base import InputSpec, Latents, Model, ModelSpec, Phase, normal_latents, option, to_zero_one
from covergen.nn.autoencoders import Decoder, Encoder
from covergen.nn.layers import AudioTrunk, Film, check_audio, check_resolution, init_film
from covergen.nn.losses import bernoulli_and_kl

AUDIO_FEATURES = 1000  # numbers that audio becomes before it modulates the decoder, in the thesis's figure


@dataclass(frozen=True)
class Options:
    """Options of both models; the defaults are the thesis's."""

    width: int = option(32, "channels of the first layer; the others have 2, 2 and 4 times as many", gt=0)
    latent: int = option(500, "size of the latent vector", gt=0)


class Autoencoder(nn.Module):
    """Encodes images ``[B, 3, R, R]`` in [0, 1] to latents ``[B, latent]`` and decodes them.

    With audio ``[B, A]`` FiLM modulates the maps of the decoder's convolutions. 49,446,635 parameters at 128 px.
    """

    def __init__(self, options: Options, inputs: InputSpec, conditional: bool) -> None:
        super().__init__()
        self.maps = (4 * options.width, inputs.resolution // 8, inputs.resolution // 8)
        values = self.maps[0] * self.maps[1] * self.maps[2]
        self.encoder, self.decoder = Encoder(options.width, norm_last=True), Decoder(options.width, norm_last=True)
        self.mean, self.log_variance = nn.Linear(values, options.latent), nn.Linear(values, options.latent)
        self.project = nn.Linear(options.latent, values)
        if conditional:
            self.audio = AudioTrunk(inputs.audio, AUDIO_FEATURES)
            self.films = nn.ModuleList(Film(AUDIO_FEATURES, times * options.width) for times in (2, 2, 1))
            init_film(self)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z|x), float32 ``[B, latent]`` each."""
        values = self.encoder(images).flatten(1)
        return self.mean(values).float(), self.log_variance(values).float()

    def decode(self, latents: Tensor, audio: Tensor | None) -> Tensor:
        """Logits of images, float32 ``[B, 3, R, R]``."""
        films = None
        if hasattr(self, "audio"):
            features = self.audio(audio)
            films = [lambda maps, film=film: film(maps, features) for film in self.films]
        return self.decoder(self.project(latents).unflatten(1, self.maps), films).float()


class ElboPhase(Phase):
    """Trains a VAE: cross entropy summed over an image's values plus KL, in nats per image."""

    name = "vae"

    def __init__(self, vae: Autoencoder, latents: Latents) -> None:
        super().__init__()
        self.vae, self.latents = vae, latents

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images = to_zero_one(batch.cover)
        mean, log_variance = self.vae.encode(images)
        logits = self.vae.decode(mean + (0.5 * log_variance).exp() * noise["latents"], batch.audio)
        entropy, divergence = bernoulli_and_kl(logits, images, mean, log_variance)
        loss = entropy + divergence
        return loss, {"neg_elbo": loss.detach(), "bce": entropy.detach(), "kl": divergence.detach()}


def build(options: Options, inputs: InputSpec, conditional: bool = False) -> Model:
    """Builds the model; reconstructions and embeddings are from the means of q(z|x)."""
    check_resolution(inputs.resolution)
    if conditional:
        check_audio(inputs.audio)
    vae = Autoencoder(options, inputs, conditional)
    latents = normal_latents(options.latent)
    phase = ElboPhase(vae, latents)

    def encode(networks: dict[str, nn.Module], batch: Any) -> Tensor:
        return networks["vae"].encode(to_zero_one(batch.cover))[0]

    def sample(networks: dict[str, nn.Module], latents: Tensor, audio: Tensor | None) -> Tensor:
        return torch.sigmoid(networks["vae"].decode(latents, audio))

    return Model(
        {"vae": vae}, [phase], pixel_min=0.0, conditional=conditional, validation_phase=phase, latents=latents,
        sample=sample, encode=encode,
        reconstruct=lambda networks, batch: sample(networks, encode(networks, batch), batch.audio))


PRESET = {"batch_size": 128, "lr": 1e-4, "betas": (0.9, 0.999), "ema": 0.0, "patience": 5}

VAE = ModelSpec("variational autoencoder (thesis; Kingma and Welling 2014)", Options, build, preset=PRESET,
                demo={"batch_size": 32, "lr": 5e-4, "steps": 3000})

COND_VAE = ModelSpec("the thesis's conditional VAE, after its figure: audio modulates the decoder", Options,
                     partial(build, conditional=True), preset={**PRESET, "audio_scale": "raw"},
                     demo={"batch_size": 32, "lr": 5e-4, "steps": 2000})
