"""Opens a run folder as a model that is ready to use, without its shards, accelerate, webdataset or wandb."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from covergen import models
from covergen.data.audio import AudioNormalizer
from covergen.data.batch import Batch, downscale
from covergen.models.base import InputSpec, Model
from covergen.runs import checkpoint, config
from covergen.runs.folder import read_data
from covergen.runs.sync import fetched_run
from shard_tools import cli

AT_ONCE = 64  # covers that go through a network together


@dataclass(frozen=True)
class TrainedModel:
    """An opened run."""

    folder: Path
    config: config.Config  # what it was trained with, but for the model's options that it was opened with
    metadata: dict[str, Any]  # of its data: resolution, genres, audio
    model: Model  # with its plain networks, not those of ``networks``
    networks: dict[str, nn.Module]  # to use, in evaluation mode: averaged where the run has an average
    checkpoint: Path  # the folder that they are from
    device: torch.device
    normalizer: AudioNormalizer | None  # None without audio

    @property
    def resolution(self) -> int:
        """Side of the covers in pixels."""
        return self.metadata["resolution"]

    def sample(self, latents: Tensor, audio: np.ndarray | None = None) -> Tensor:
        """Images ``[N, 3, R, R]`` as the network gives them (from ``model.low`` to 1), on the host.

        From latents ``[N, L]`` and, of conditional models, audio ``[N, A]`` (``normalizer`` of raw vectors).
        """
        condition = None if audio is None else torch.from_numpy(audio)
        return self._through(lambda *parts: self.model.sample(self.networks, *parts), latents, condition)

    def reconstruct(self, batch: Batch) -> Tensor:
        """The model's version of covers (uint8, of any side from the model's up), ``[N, 3, R, R]`` in [0, 1]."""
        return self._through_batch(self.model.reconstruct, batch)

    def encode(self, batch: Batch) -> Tensor:
        """What the model makes of covers, ``[N, L]``; of a VAE the means."""
        return self._through_batch(self.model.encode, batch)

    def _through_batch(self, call: Callable[..., Tensor], batch: Batch) -> Tensor:
        return self._through(lambda cover, audio: call(self.networks, Batch(downscale(cover, self.resolution), audio,
                                                                            None, None)), batch.cover, batch.audio)

    @torch.no_grad()
    def _through(self, call: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        parts = []
        for start in range(0, len(inputs[0]), AT_ONCE):
            some = [None if part is None else part[start:start + AT_ONCE].to(self.device) for part in inputs]
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the same to 1e-5 wherever it is made
                parts.append(call(*some).float().cpu())
        return torch.cat(parts)


def open_model(folder: str | Path, *, which: str = "auto", averaged: bool = True,
             options: dict[str, Any] | None = None, device: torch.device | None = None) -> TrainedModel:
    """Opens a run; ValueError where it is none, is damaged, or lacks that checkpoint or option.

    Args:
        folder: of the run, or its URL.
        which: ``auto`` is the best checkpoint by validation where there is one, else the newest; ``last`` is the
            newest; else the number of a step.
        averaged: use averaged weights where the run has them.
        options: of the model, by name, instead of the run's; for those that say how it samples, not what it is.
        device: default: the GPU where there is one.
    """
    folder = fetched_run(folder)
    run, options = config.read_run(folder), options or {}
    for name, value in options.items():
        if name not in (field.name for field in dataclasses.fields(run.options)):
            raise ValueError(f"--{name}: the run is a {run.model}, which has no such option; leave it away")
        cli.check_range(name, value, config.options_of(run.model)[name].range)
    run = dataclasses.replace(run, options=dataclasses.replace(run.options, **options))
    metadata = read_data(folder)
    chosen = _choose(folder, which)
    scale = AudioNormalizer(metadata["audio"], run.training.audio_scale) if metadata["audio"] else None
    model = _build(folder, chosen, run, InputSpec(metadata["resolution"], scale.size if scale else 0))
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    names = {name: f"{name}_ema" if averaged and name in model.ema_networks and run.training.ema else name
             for name in model.networks}
    checkpoint.load_networks(chosen, {names[name]: network for name, network in model.networks.items()})
    networks = {name: network.to(device).eval() for name, network in model.networks.items()}
    return TrainedModel(folder, run, metadata, model, networks, chosen, device, scale)


def _build(folder: Path, chosen: Path, run: config.Config, sizes: InputSpec) -> Model:
    """The run's model, of which a first one without memory shows whether it is as large as its checkpoint."""
    recipe = models.load(run.model)
    try:
        with torch.device("meta"):
            networks = recipe.build(run.options, sizes).networks.values()
        needed = sum(part.numel() * part.element_size() for network in networks for part in network.parameters())
    except (RuntimeError, OverflowError, TypeError, MemoryError) as error:  # torch's of sizes beyond any tensor
        raise ValueError(f"{folder}/config.yaml describes networks that can't be: {str(error)[:200]}") from None
    there = sum(file.stat().st_size for file in chosen.glob("*.safetensors") if file.is_file())
    if needed > 2 * there + 2**24:
        raise ValueError(f"{folder}/config.yaml describes networks of {needed:,} bytes, {chosen} holds {there:,}: they "
                         "are not of one run, or damaged")
    return recipe.build(run.options, sizes)


def _choose(folder: Path, which: str) -> Path:
    best, steps = checkpoint.checkpoints(folder, "best"), checkpoint.checkpoints(folder)
    if not best and not steps:
        raise ValueError(f"{folder} has no checkpoint yet; train on, it saves every --save_every steps")
    if which in ("auto", "last"):
        wanted = [*steps, *best] if which == "auto" or not steps else steps
        newest, problems = checkpoint.latest_valid(wanted, training=False)
        if newest is None:
            raise ValueError("\n  ".join([f"no checkpoint of {folder} is whole:", *problems]))
        for problem in problems:
            warnings.warn(f"{problem}; using {newest}", stacklevel=3)
        return newest
    found = {str(checkpoint.step_of(path)): path for path in [*best, *steps]}
    if which not in found:
        steps = ", ".join(sorted(found, key=int))
        raise ValueError(f"--checkpoint {which}: {folder} has auto, last and the steps {steps}")
    checkpoint.check(found[which], training=False)
    return found[which]
