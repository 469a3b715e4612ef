"""Who says how well covers fit audio: a contrast run trained on albums that no generator saw."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from covergen.runtime.data import Batch, shrink
from covergen.runtime.run import AT_ONCE, Run, open_run

MINUTES = 5.0  # that a judge is trained where none is given
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "OMP_")


def open_judge(folder: str | Path) -> Run:
    """A run that may judge.

    Raises:
        ValueError: not a contrast run, or trained on albums that generators see.
    """
    judge = open_run(folder)
    if judge.model.hear is None:
        raise ValueError(f"--judge {folder} is a {judge.config.model}: expected a run of --model contrast")
    if judge.config.training.albums_for != "judge":
        raise ValueError(f"--judge {folder} was trained with --albums_for {judge.config.training.albums_for}, on "
                         "albums that generators see; train one with --model contrast --albums_for judge")
    return judge


def default_judge(shards: str, identity: str, resolution: int) -> Path:
    """The judge of these shards in the user's cache folder, trained there the first time (minutes).

    Raises:
        ValueError: it could not be trained (says how to see why).
    """
    from platformdirs import user_cache_path
    root = user_cache_path("covergen") / "judges"
    name = f"{identity[:16]}-{resolution}"
    words = [sys.executable, "-m", "covergen.train", "--model", "contrast", "--albums_for", "judge", "--shards", shards,
             "--out", str(root), "--name", name, "--resolution", str(resolution), "--minutes", str(MINUTES),
             "--tracker", "none"]
    finished = root / name / "finished"
    if not finished.is_file():
        print(f"no --judge: training one for these shards in {root / name}, {MINUTES:g} minutes at most; the next "
              "evaluation finds it there", flush=True)
        alone = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}
        done = subprocess.run(words, capture_output=True, text=True, env=alone)
        if done.returncode:
            raise ValueError(f"no judge could be trained: {done.stderr.strip().splitlines()[-1:]}; "
                             f"see: {' '.join(words[1:])}")
        finished.touch()
    return root / name


def see(judge: Run, covers: Tensor) -> Tensor:
    """Unit vectors float32 ``[N, 128]`` of uint8 covers ``[N, 3, S, S]`` of any side."""
    if covers.shape[-1] < judge.resolution:
        side = (judge.resolution, judge.resolution)
        covers = F.interpolate(covers.float(), size=side, mode="bilinear").round().byte()
    parts = [judge.encode(Batch(shrink(part, judge.resolution), None, None, None)) for part in covers.split(512)]
    return torch.cat(parts)


@torch.no_grad()
def hear(judge: Run, raw: np.ndarray) -> Tensor:
    """Unit vectors float32 ``[N, 128]`` of raw audio ``[N, D]``."""
    heard = torch.from_numpy(judge.scale(raw)).to(judge.device)
    return torch.cat([judge.model.hear(judge.networks, part).float().cpu() for part in heard.split(AT_ONCE)])
