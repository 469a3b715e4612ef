"""A model of a few lines, made as anybody would add one: it learns one picture, the mean of all covers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from covergen.models.base import InputSpec, Model, ModelSpec, Phase, normal_latents, option, to_minus_one_one


@dataclass(frozen=True)
class Options:
    brightness: float = option(0.5, "value of every pixel at the start")


class Picture(nn.Module):
    def __init__(self, resolution: int, brightness: float) -> None:
        super().__init__()
        self.pixels = nn.Parameter(torch.full((3, resolution, resolution), brightness))


class PicturePhase(Phase):
    name = "picture"

    def __init__(self, picture: Picture) -> None:
        super().__init__()
        self.picture = picture

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (self.picture.pixels - to_minus_one_one(batch.cover)).square().mean()
        return loss, {"distance": loss.detach()}


def build(options: Options, inputs: InputSpec) -> Model:
    picture = Picture(inputs.resolution, options.brightness)
    return Model({"picture": picture}, [PicturePhase(picture)], ema_networks=("picture",), latents=normal_latents(1),
                 sample=lambda networks, latents, audio: networks["picture"].pixels.expand(len(latents), -1, -1, -1))


TOY = ModelSpec("the mean of all covers", Options, build, preset={"lr": 0.01})

if __name__ == "__main__":
    from covergen import models, train
    from shard_tools import cli
    models.MODELS["toy"] = "toy_model:TOY"  # the one line of the table
    cli.guarded(train.main)
