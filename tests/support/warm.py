"""Commands as processes of their own, forked from one that has torch and its company imported already.

A command spends its first seconds importing libraries; the suite starts a hundred and more of them.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.waiting import LIMIT

LIBRARIES = ["torch", "torch._dynamo", "torchvision", "accelerate", "diffusers.models.unets.unet_2d", "wandb", "yaml",
             "matplotlib.pyplot", "sklearn.linear_model", "torchmetrics.image.fid", "safetensors.torch"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LIBRARIES)


def run(module: str, flags: list[str], folder: Path, env: Mapping[str, str], limit: float = 4 * LIMIT,
        ) -> subprocess.CompletedProcess:
    """What ``python -m module flags`` does in ``folder``; both its outputs, in the order they came, as ``stdout``."""
    with tempfile.NamedTemporaryFile(prefix="said-") as said:
        process = _context.Process(target=_be, args=(module, flags, str(folder), dict(env), said.name))
        process.start()
        process.join(limit)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired([module, *flags], limit, Path(said.name).read_bytes())
        words = [sys.executable, "-m", module, *flags]
        return subprocess.CompletedProcess(words, process.exitcode, Path(said.name).read_text(errors="replace"))


def _be(module: str, flags: list[str], folder: str, env: dict[str, str], said: str) -> None:
    file = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = [folder, str(ROOT), *(path for path in sys.path if path not in (str(ROOT), ""))]
    sys.argv[:] = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
