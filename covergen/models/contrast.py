"""Audio and covers in one space: a judge of how well they fit, or what a generator's hearing starts from.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), with all
tracks of an album as positives. It sees covers slightly moved and cropped, never recoloured: colour is what music says
first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covergen.models.base import InputSpec, Model, ModelSpec, Phase, to_minus_one_one
from covergen.nn.augment import augment, draw_augmentation
from covergen.nn.layers import EMBEDDING, AudioEncoder, audio_noise, check_audio, check_resolution
from covergen.nn.losses import info_nce

HOTTEST = 100.0  # largest inverse temperature, as in CLIP
GROUPS = 8  # of every norm: with more channels than that, a picture's colour survives it


@dataclass(frozen=True)
class Options:
    """What can be set about the model."""

    width: int = field(default=24, metadata={"help": "channels at half the covers' side; doubled at each halving, "
                                                     "up to 8x"})
    embedding_noise: float = field(default=0.3, metadata={"help": "standard deviation of the noise on audio embeddings"})
    audio_dropout: float = field(default=0.5, metadata={"help": "share of an audio vector's numbers set to 0"})


class ImageEncoder(nn.Module):
    """Images ``[B, 3, R, R]`` in [-1, 1] -> embeddings ``[B, 128]``: halvings down to 4x4 with GroupNorm and SiLU."""

    def __init__(self, options: Options, resolution: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, out, side = 3, options.width, resolution
        while side > 4:
            layers += [nn.Conv2d(channels, out, 4, 2, 1), nn.GroupNorm(GROUPS, out), nn.SiLU(),
                       nn.Conv2d(out, out, 3, 1, 1), nn.GroupNorm(GROUPS, out), nn.SiLU()]
            channels, out, side = out, min(2 * out, 8 * options.width), side // 2
        self.blocks = nn.Sequential(*layers)
        self.project = nn.Linear(channels * 4 * 4, EMBEDDING)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(self.blocks(images).flatten(1)).float()


class Pair(nn.Module):
    """Both encoders and the temperature of their cosines."""

    def __init__(self, options: Options, sizes: InputSpec) -> None:
        super().__init__()
        self.audio, self.image = AudioEncoder(sizes.audio), ImageEncoder(options, sizes.resolution)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, audio: Tensor, noise: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Unit vectors ``[B, 128]`` of images and of audio."""
        return F.normalize(self.image(images), dim=1), F.normalize(self.audio(audio, noise), dim=1)


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
        images, audio = self.pair(covers, batch.audio, noise)
        images, audio, group = everyone(images), everyone(audio), everyone(batch.group)
        scale = self.pair.scale.exp().clamp(max=HOTTEST)
        with torch.autocast(images.device.type, enabled=False):  # cosines times up to 100 need fp32
            loss = info_nce(audio, images, scale, group[:, None] == group)
            hits = group[(audio @ images.T).argmax(1)] == group
        return loss, {"contrast": loss.detach(), "top1": hits.float().mean(), "temperature": 1 / scale.detach()}


def everyone(part: Tensor) -> Tensor:
    """The parts of all processes ``[B, ...]`` one after the other, through which gradients flow."""
    if not torch.distributed.is_initialized():
        return part
    ranks = torch.distributed.get_world_size()
    parts = [torch.empty_like(part) for _ in range(ranks)]
    torch.distributed.all_gather(parts, part.detach().contiguous())
    if part.requires_grad:  # of this process's part only, times the processes over whom gradients will be averaged
        parts[torch.distributed.get_rank()] = part + (ranks - 1) * (part - part.detach())
    return torch.cat(parts)


def build(options: Options, sizes: InputSpec) -> Model:
    """Needs audio."""
    check_resolution(sizes.resolution)
    check_audio(sizes.audio)
    if options.width % GROUPS:
        raise ValueError(f"--width {options.width}: expected a multiple of {GROUPS}")
    pair = Pair(options, sizes)

    def encode(networks: dict[str, nn.Module], batch: Any) -> Tensor:
        return F.normalize(networks["contrast"].image(to_minus_one_one(batch.cover)), dim=1)

    def hear(networks: dict[str, nn.Module], audio: Tensor) -> Tensor:
        return F.normalize(networks["contrast"].audio(audio), dim=1)

    return Model({"contrast": pair}, [ContrastivePhase(pair, options, sizes.audio)], ema_networks=("contrast",), conditional=True,
                 encode=encode, embed_audio=hear, needs_whole_batch=True)


CONTRAST = ModelSpec(
    "audio and covers in one space (after CLIP): a judge (--album_subset judge), or where generators start to hear from",
    Options, build,
    # Passes over the albums are what it overfits by: 50 of them were best on held-out albums of the demo's quarter.
    preset={"batch_size": 128, "lr": 1e-3, "betas": (0.9, 0.99), "order": "group", "album_subset": "generator",
            "steps": 20_000, "epochs": 50, "ema_halflife": 20_000.0},
    demo={"mixed_precision": "bf16", "minutes": 10.0})
