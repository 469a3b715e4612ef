"""Before a run begins: its data and its model, opened and checked, or an error before anything is written."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from platformdirs import user_cache_path
from tqdm import tqdm

from covergen import models
from covergen.data.sampling import seed_of
from covergen.data.stream import Stream, open_stream
from covergen.distributed.environment import processes
from covergen.inference.trained_model import open_model
from covergen.models.base import InputSpec, Model
from covergen.nn.layers import AudioEncoder
from covergen.runs.checkpoint import checkpoints
from covergen.runs.config import Config, Training
from shard_tools.core.locks import lock_folder
from shard_tools.remote.index_cache import resolve
from shard_tools.shards.index import splits_in


def log_main(text: str) -> None:
    """Prints a line for the person who watches, from the main process only, beside a progress bar."""
    if processes()[0] == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def demo_shards(log: Callable[[str], None], tier: str = "toy") -> str:
    """The packed demo world of a tier in the user's cache folder: a machine's first process makes it, others wait."""
    from shard_tools.demo import TIERS, VERSION, make
    from shard_tools.pack import pack
    root = user_cache_path("covergen") / f"demo-{tier}-{VERSION}"
    with lock_folder(root, patience=3600):
        if not all((root / "shards" / name).is_file() for name in ("train.index.json", "attributes.npz")):
            log(f"No --shards given: making the {tier} demo world ({TIERS[tier]['resolution']} px, known audio -> "
                f"cover attributes) in {root}")
            make(root / "folders", tier=tier)
            with contextlib.redirect_stdout(None):  # its report is about a command that nobody typed
                pack(str(root / "folders"), str(root / "shards"))
    return str(root / "shards")


@dataclass(frozen=True)
class TrainingData:
    """What a run is trained on."""

    shards: str  # as given
    root: Path  # their folder, of a URL that of the index
    stream: Stream
    resolution: int  # side of the covers that are trained on


def open_training_data(training: Training) -> TrainingData:
    """Opens the shards of a run, or of the demo world; ValueError or OSError for what can't be trained on."""
    shards = training.shards or demo_shards(log_main)
    root = resolve(shards, training.shard_cache_dir, training.shard_cache_gb)
    rank, ranks, _ = processes()
    stream = open_stream(root, "train", audio_scale=training.audio_scale, album_subset=training.album_subset,
                         batch_size=training.batch_size, seed=training.seed, order=training.order,
                         window=training.shard_window, rank=rank, ranks=ranks, max_corrupt=training.max_corrupt)
    resolution = training.resolution or stream.resolution
    if resolution > stream.resolution:
        raise ValueError(f"--resolution {resolution} is above the {stream.resolution} px of {shards}; train at that or "
                         "less, or pack the covers again with a larger --resolution")
    return TrainingData(shards, root, stream, resolution)


def build_model(config: Config, data: TrainingData) -> Model:
    """The run's model with its initial weights, which are a function of the seed; ValueError for what does not fit."""
    training, normalizer = config.training, data.stream.normalizer
    torch.manual_seed(seed_of(training.seed, "weights"))
    sizes = InputSpec(data.resolution, normalizer.size if normalizer else 0)
    model = models.load(config.model).build(config.options, sizes)
    if model.needs_mismatched_audio:
        data.stream.mismatch()
    if audio_encoders(model) and training.audio_scale == "raw":
        raise ValueError("--audio_scale raw: the audio encoder of this model needs standardised audio, for raw numbers "
                         "reach 1e13; give --audio_scale standard")
    if training.eval_every and (model.sample is None or "val" not in splits_in(data.root)):
        raise ValueError(f"--eval_every {training.eval_every} needs a model that makes covers, and shards with a val "
                         "split and an index")
    if training.judge and not training.eval_every:
        raise ValueError("--judge is for --eval_every N, which is 0")
    if training.condition and not checkpoints(config.folder):
        load_pretrained_audio_encoder(model, training, data)
    return model


def audio_encoders(model: Model) -> list[AudioEncoder]:
    """The audio encoders in the networks of a model."""
    return [module for network in model.networks.values() for module in network.modules()
            if isinstance(module, AudioEncoder)]


def load_pretrained_audio_encoder(model: Model, training: Training, data: TrainingData) -> None:
    """Gives the audio encoders of a new model the weights of the contrast run that ``--condition`` names."""
    folder, albums, normalizer = training.condition, training.album_subset, data.stream.normalizer
    found = open_model(folder, device=torch.device("cpu"))
    encoders, trained_for = audio_encoders(found.model), found.config.training.album_subset
    if found.model.embed_audio is None or not encoders:
        raise ValueError(f"--condition {folder} is a {found.config.model}: expected a run of --model contrast")
    if trained_for == "judge":
        raise ValueError(f"--condition {folder} is a judge, which no generator may learn from; train another with "
                         "--model contrast --album_subset generator")
    if albums not in ("all", trained_for):
        raise ValueError(f"--condition {folder} was trained for {trained_for} albums, this run is "
                         f"for {albums} albums; train another with --model contrast --album_subset {albums}")
    known = found.metadata["audio"]
    if normalizer is None or not np.array_equal(getattr(normalizer, "mean", None), known["mean"]):
        raise ValueError(f"--condition {folder} was trained on other audio ({known['dimension']} numbers) than these "
                         "shards hold; train a contrast run on them")
    if not audio_encoders(model):
        raise ValueError("--condition: this model has no audio encoder of that kind; r3gan and flow have")
    for module in audio_encoders(model):
        module.load_state_dict(encoders[0].state_dict())
