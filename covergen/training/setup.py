"""Before a run begins: its options, model and data in, what the run folder will know of them, or an error, out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from platformdirs import user_cache_path
from tqdm import tqdm

from covergen.data.audio import AudioNormalizer
from covergen.distributed.environment import processes
from covergen.inference.trained_model import open_model
from covergen.models.base import Model
from covergen.nn.layers import AudioEncoder
from covergen.runs.config import Training
from shard_tools.core.locks import lock_folder
from shard_tools.shards.index import splits_in


def demo_shards(say: Callable[[str], None], tier: str = "toy") -> str:
    """The packed demo world of a tier in the user's cache folder, made there once.

    Every process calls this: the first one of a machine makes it, the others wait for it.
    """
    from shard_tools.demo import TIERS, VERSION, make
    from shard_tools.pack import pack
    root = user_cache_path("covergen") / f"demo-{tier}-{VERSION}"
    with lock_folder(root, patience=3600):
        packed = (root / "shards" / "train.index.json").is_file()
        if not packed:
            say(f"No --shards given: making the {tier} demo world ({TIERS[tier]['resolution']} px, known audio -> "
                f"cover attributes) in {root}")
        if not packed or not (root / "shards" / "attributes.npz").is_file():  # packed before it came with the shards
            make(root / "folders", tier=tier)
            with contextlib.redirect_stdout(None):  # its report is about a command that nobody typed
                pack(str(root / "folders"), str(root / "shards"))
    return str(root / "shards")


def load_pretrained_audio_encoder(model: Model, folder: str, scale: AudioNormalizer | None, albums: str) -> None:
    """Gives the audio encoders of a new model the weights of a contrast run's.

    Args: model; folder: of the run; scale: of the audio that the model hears; albums: that it is trained for.

    Raises:
        ValueError: not a contrast run, a judge, other albums, other audio, or a model without such encoders.
    """
    found = open_model(folder, device=torch.device("cpu"))
    encoders = [module for network in found.networks.values() for module in network.modules()
                if isinstance(module, AudioEncoder)]
    if found.model.embed_audio is None or not encoders:
        raise ValueError(f"--condition {folder} is a {found.config.model}: expected a run of --model contrast")
    if found.config.training.album_subset == "judge":
        raise ValueError(f"--condition {folder} is a judge, which no generator may learn from; train another with "
                         "--model contrast --album_subset generator")
    if albums not in ("all", found.config.training.album_subset):
        raise ValueError(f"--condition {folder} was trained for {found.config.training.album_subset} albums, this run is "
                         f"for {albums} albums; train another with --model contrast --album_subset {albums}")
    known = found.metadata["audio"]
    if scale is None or not np.array_equal(getattr(scale, "mean", None), known["mean"]):
        raise ValueError(f"--condition {folder} was trained on other audio ({known['dimension']} numbers) than these "
                         "shards hold; train a contrast run on them")
    own = [module for network in model.networks.values() for module in network.modules()
           if isinstance(module, AudioEncoder)]
    if not own:
        raise ValueError("--condition: this model has no audio encoder of that kind; r3gan and flow have")
    for module in own:
        module.load_state_dict(encoders[0].state_dict())


def log_main(text: str) -> None:
    """A line for the person who watches, from the main process only, beside a progress bar."""
    if processes()[0] == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def check(model: Model, training: Training, shards: Path) -> None:
    """Raises ValueError for options that don't fit the model or the data, before anything is written."""
    hears = any(isinstance(part, AudioEncoder) for network in model.networks.values() for part in network.modules())
    if hears and training.audio_scale == "raw":
        raise ValueError("--audio_scale raw: the audio encoder of this model needs standardised audio, for raw numbers "
                         "reach 1e13; give --audio_scale standard")
    if training.eval_every and (model.sample is None or "val" not in splits_in(shards)):
        raise ValueError(f"--eval_every {training.eval_every} needs a model that makes covers, and shards with a val "
                         "split and an index")
    if training.judge and not training.eval_every:
        raise ValueError("--judge is for --eval_every N, which is 0")
