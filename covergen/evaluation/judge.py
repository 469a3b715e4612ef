"""The judge of how well covers fit audio: a contrast run trained on albums that no generator is trained on."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from platformdirs import user_cache_path
from torch import Tensor
from torch.nn import functional as F

from covergen.data.batch import Batch, downscale
from covergen.data.dataset import ShardDataset
from covergen.inference.trained_model import TrainedModel, open_model
from shard_tools.core.locks import lock_folder

BATCH, RESIZED = 64, 512  # songs that are embedded together, covers that are resized together
VERSION = 1  # of the training of default judges: raise it when contrast or its preset changes
MINUTES = 5.0  # that a judge is trained where none is given
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "OMP_")


def open_judge(folder: str | Path) -> TrainedModel:
    """A run that may judge; ValueError if not of contrast, or trained on albums that generators are trained on."""
    judge = open_model(folder)
    if judge.model.embed_audio is None:
        raise ValueError(f"--judge {folder} is a {judge.config.model}: expected a run of --model contrast")
    if judge.config.training.album_subset != "judge":
        raise ValueError(f"--judge {folder} was trained with --album_subset {judge.config.training.album_subset}, on "
                         "albums that generators are trained on; train one with --model contrast --album_subset judge")
    return judge


def default_judge(shards: str, identity: str, resolution: int, check_interrupt: Callable[[], None]) -> Path:
    """The judge of these training shards in the user's cache folder, trained there the first time (minutes).

    ``check_interrupt`` is called each second meanwhile. ValueError, which says how to see why, if training fails.
    """
    root = user_cache_path("covergen") / "judges"
    name = f"{identity[:16]}-{resolution}-v{VERSION}"
    finished = root / name / "finished"
    command = [sys.executable, "-m", "covergen.train", "--model", "contrast", "--album_subset", "judge", "--shards",
               shards, "--out", str(root), "--name", name, "--resolution", str(resolution), "--minutes", str(MINUTES),
               "--tracker", "none"]
    with lock_folder(root / "locks" / name, patience=120 * MINUTES):
        if finished.is_file():
            return root / name
        print(f"no --judge: training one for these shards in {root / name}, {MINUTES:g} minutes at most; the next "
              "evaluation finds it there", flush=True)
        alone = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHED)}
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=alone, start_new_session=True)
            try:
                while process.poll() is None:
                    check_interrupt()
                    time.sleep(1)
            finally:
                process.terminate()
                process.wait()
            if process.returncode:
                log.seek(0)
                last = next((line for line in reversed(log.read().splitlines()) if line.strip()), "no message")
                raise ValueError(f"no judge could be trained: {last}; for the whole log: {' '.join(command[1:])}")
        finished.touch()
    return root / name


def check_audio(judge: TrainedModel, train: ShardDataset) -> None:
    """Raises ValueError unless a judge was trained on the audio of these very shards."""
    own, given = judge.metadata["audio"], train.metadata["audio"]
    if not given or own["dimension"] != given["dimension"] or own["mean"] != given["mean"]:
        raise ValueError(f"--judge {judge.folder} was trained on other shards ({judge.metadata['shards']}) than "
                         f"{train.index.root}; leave --judge away, or train one with --model contrast --album_subset "
                         f"judge --shards {train.index.root}")


def embed_covers(judge: TrainedModel, covers: Tensor) -> Tensor:
    """Unit vectors float32 ``[N, 128]`` of uint8 covers ``[N, 3, S, S]`` of any side."""
    def resize(part: Tensor) -> Tensor:
        if part.shape[-1] >= judge.resolution:
            return downscale(part, judge.resolution)
        return F.interpolate(part.float(), size=(judge.resolution,) * 2, mode="bilinear").round().byte()

    return torch.cat([judge.encode(Batch(resize(part), None, None, None)) for part in covers.split(RESIZED)])


@torch.no_grad()
def embed_audio(judge: TrainedModel, raw: np.ndarray) -> Tensor:
    """Unit vectors float32 ``[N, 128]`` of raw audio ``[N, D]``."""
    audio = torch.from_numpy(judge.normalizer(raw)).to(judge.device)
    return torch.cat([judge.model.embed_audio(judge.networks, part).float().cpu() for part in audio.split(BATCH)])
