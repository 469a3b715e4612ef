"""Embeds audio and covers in one space: to judge how well they fit, or to pretrain a generator's audio encoder.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), with all
tracks of an album as positives. Training moves and crops covers slightly and never recolours them, for colour is what
music says first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covergen.models.base import InputSpec, Model, ModelSpec, Phase, option, to_minus_one_one
from covergen.nn.augment import augment, draw_augmentation
from covergen.nn.layers import EMBEDDING, AudioEncoder, audio_noise, check_audio, check_resolution
from covergen.nn.losses import info_nce

MAX_SCALE = 100.0  # largest inverse temperature, as in CLIP
NORM_GROUPS = 8  # groups of every norm: with more channels than that, a picture's colour survives it


@dataclass(frozen=True)
class Options:
    """Options of the model."""

    width: int = option(24, "channels at half the covers' side; doubled at each halving, up to 8 times", gt=0)
    embedding_noise: float = option(0.3, "standard deviation of the noise added to audio embeddings", ge=0)
    audio_dropout: float = option(0.5, "share of an audio vector's numbers set to 0 in training", ge=0, lt=1)


class ImageEncoder(nn.Module):
    """Embeds images ``[B, 3, R, R]`` in [-1, 1] as ``[B, 128]``: halvings down to 4x4 with GroupNorm and SiLU."""

    def __init__(self, options: Options, resolution: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, out, side = 3, options.width, resolution
        while side > 4:
            layers += [nn.Conv2d(channels, out, 4, 2, 1), nn.GroupNorm(NORM_GROUPS, out), nn.SiLU(),
                       nn.Conv2d(out, out, 3, 1, 1), nn.GroupNorm(NORM_GROUPS, out), nn.SiLU()]
            channels, out, side = out, min(2 * out, 8 * options.width), side // 2
        self.blocks = nn.Sequential(*layers)
        self.project = nn.Linear(channels * 4 * 4, EMBEDDING)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(self.blocks(images).flatten(1)).float()


class Pair(nn.Module):
    """Both encoders and the temperature of their cosines."""

    def __init__(self, options: Options, inputs: InputSpec) -> None:
        super().__init__()
        self.audio, self.image = AudioEncoder(inputs.audio), ImageEncoder(options, inputs.resolution)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_image(self, images: Tensor) -> Tensor:
        """Unit vectors ``[B, 128]``."""
        return F.normalize(self.image(images), dim=1)

    def embed_audio(self, audio: Tensor, noise: dict[str, Tensor] | None = None) -> Tensor:
        """Unit vectors ``[B, 128]``."""
        return F.normalize(self.audio(audio, noise), dim=1)

    def forward(self, images: Tensor, audio: Tensor, noise: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.embed_image(images), self.embed_audio(audio, noise)


class ContrastivePhase(Phase):
    """Trains both encoders by symmetric InfoNCE over the global batch."""

    name = "contrast"

    def __init__(self, pair: Pair, options: Options, audio: int) -> None:
        super().__init__()
        self.pair, self.options, self.audio = pair, options, audio

    def sample_noise(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {**draw_augmentation(count, generator),
                **audio_noise(count, self.audio, generator, self.options.embedding_noise, self.options.audio_dropout)}

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        covers = augment(to_minus_one_one(batch.cover), ("translation", "cutout"), noise["augmentation"])
        images, audio, group = map(gather_with_grad, (*self.pair(covers, batch.audio, noise), batch.group))
        scale = self.pair.scale.exp().clamp(max=MAX_SCALE)
        with torch.autocast(images.device.type, enabled=False):  # cosines times up to 100 need fp32
            loss = info_nce(audio, images, scale, group[:, None] == group)
            hits = group[(audio @ images.T).argmax(1)] == group
        return loss, {"contrast": loss.detach(), "top1": hits.float().mean(), "temperature": 1 / scale.detach()}


def gather_with_grad(part: Tensor) -> Tensor:
    """Concatenates the parts ``[B, ...]`` of all processes; gradients flow to this process's part."""
    if not torch.distributed.is_initialized():
        return part
    ranks = torch.distributed.get_world_size()
    parts = [torch.empty_like(part) for _ in range(ranks)]
    torch.distributed.all_gather(parts, part.detach().contiguous())
    if part.requires_grad:  # times the processes over which gradients will be averaged
        parts[torch.distributed.get_rank()] = part + (ranks - 1) * (part - part.detach())
    return torch.cat(parts)


def build(options: Options, inputs: InputSpec) -> Model:
    """Builds the model; it needs audio."""
    check_resolution(inputs.resolution)
    check_audio(inputs.audio)
    if options.width % NORM_GROUPS:
        raise ValueError(f"--width {options.width}: expected a multiple of {NORM_GROUPS}")
    pair = Pair(options, inputs)
    return Model(
        {"contrast": pair}, [ContrastivePhase(pair, options, inputs.audio)], ema_networks=("contrast",),
        conditional=True, needs_whole_batch=True,
        encode=lambda networks, batch: networks["contrast"].embed_image(to_minus_one_one(batch.cover)),
        embed_audio=lambda networks, audio: networks["contrast"].embed_audio(audio))


CONTRAST = ModelSpec(
    "audio and covers in one space (after CLIP): a judge (--album_subset judge), or pretraining for --condition",
    Options, build,
    # Passes over the albums are what it overfits by: 50 of them were best on held-out albums of the demo's quarter.
    preset={"batch_size": 128, "lr": 1e-3, "betas": (0.9, 0.99), "order": "group", "album_subset": "generator",
            "steps": 20_000, "epochs": 50, "ema_halflife": 20_000.0},
    demo={"mixed_precision": "bf16", "minutes": 10.0})
