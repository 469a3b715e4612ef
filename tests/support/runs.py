"""Training as a person starts it, in processes of its own, for the tests that need it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support import warm
from tests.support.paths import ROOT
from tests.support.waiting import LIMIT

# Small enough for a second of training, odd enough to show mistakes in sharing a batch.
TINY = ["--width", "4", "--batch_size", "12", "--critic_steps", "2", "--sample_every", "4", "--save_every", "4",
        "--log_every", "2", "--tracker", "none"]

# The conditional models with an audio encoder, as small; ``test_ranks`` has their runs.
CONDITIONAL = {
    "r3gan": ["--width", "4", "--blocks", "1", "--group_size", "4", "--patch_size", "2", "--latent", "8",
              "--penalty_every", "2"],
    "flow": ["--width", "32", "--channel_mult", "1,1", "--blocks", "1", "--patch_size", "4", "--sampling_steps", "2",
             "--lr_warmup", "120"],
    "contrast": ["--width", "16"],
}


def environment(**extra: str) -> dict[str, str]:
    """The environment of a test's process: this checkout, no W&B account, no launcher's variables."""
    clean = {key: value for key, value in os.environ.items()
             if not key.startswith(("ACCELERATE_", "WANDB_", "OMP_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_"))}
    clean["PYTHONPATH"] = str(ROOT)
    return {**clean, "WANDB_MODE": "offline", **extra}


def command(*flags: str, ranks: int = 1, script: Sequence[str] = ("-m", "covergen.train")) -> list[str]:
    """The command line that trains on one process, or on several with torchrun."""
    start = [] if ranks == 1 else [
        "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0", "--rdzv_backend", "c10d",
        "--rdzv_endpoint", "localhost:0"]
    return [sys.executable, *start, *script, *flags]


def train(folder: Path, *flags: str, ranks: int = 1, ok: bool = True, **extra: str) -> subprocess.CompletedProcess:
    """Trains to the end in ``folder``; with ``ok`` a failure shows the output."""
    return run_command(folder, "covergen.train", *flags, ranks=ranks, ok=ok, **extra)


def train_script(folder: Path, script: Path, *flags: str, ranks: int = 1) -> subprocess.CompletedProcess:
    """The same with a script that calls covergen.train."""
    return _finished(folder, command(*flags, ranks=ranks, script=[str(script)]))


def run_command(folder: Path, module: str, *flags: str, ranks: int = 1, ok: bool = True, **extra: str,
                ) -> subprocess.CompletedProcess:
    """Any command as a person starts it, to its end; both outputs as one."""
    if ranks == 1:
        done = warm.run(module, list(flags), folder, environment(**extra))
    else:  # torchrun would take --run for the beginning of a flag of its own
        done = _finished(folder, command("--", *flags, ranks=ranks, script=("-m", module)), ok=False, **extra)
    assert not ok or done.returncode == 0, done.stdout
    return done


def _finished(folder: Path, words: list[str], ok: bool = True, **extra: str) -> subprocess.CompletedProcess:
    done = subprocess.run(words, cwd=folder, env=environment(**extra), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=4 * LIMIT)
    assert not ok or done.returncode == 0, done.stdout
    return done


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint by file and name."""
    files = sorted((run / "checkpoints" / f"step_{step:08d}").glob("*.safetensors"))
    assert files
    return {f"{file.stem}.{name}": value for file in files for name, value in load_file(file).items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of any tensor, relative to its norm."""
    return max(((one[name] - other[name]).norm() / one[name].norm().clamp(min=1e-12)).item() for name in one)
