"""Whole training runs as processes, eager against compiled."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

from covergen import models
from covergen.benchmarks import report
from covergen.runs.config import check_model
from covergen.runs.log import read_log
from covergen.training.setup import demo_shards
from shard_tools.cli import Range, checked

WARM = 4  # the first of so many parts of a run is not measured


@checked
def run(model: str = "r3gan", steps: Annotated[int, Range(2 * WARM)] = 400, rounds: int = 1, shards: str | None = None,
        mixed_precision: str = "bf16", threads: int = 0, width: int = 0, resolution: int = 0,
        batch_size: int = 0) -> int:
    """Times whole training runs of a model with and without --compile, as processes of their own.

    Speed is that of the run's log after its first quarter, in which all is compiled; what compiling costs is apart.

    Args:
        model: that is trained.
        steps: of every run.
        rounds: how many runs of either kind, in alternation.
        shards: folder of shards; default: the demo world.
        mixed_precision: no, bf16 or fp16.
        threads: that compute; 0: the machine's cores.
        width: of the networks; 0: the preset's.
        resolution: side of the covers in pixels; 0: the shards'.
        batch_size: covers in a batch; 0: the preset's.
    """
    check_model(model)
    demo = {} if shards else models.load(model).demo
    shards = shards or demo_shards(print)
    flags = {"model": model, "shards": shards, "steps": steps, "mixed_precision": mixed_precision, "threads": threads,
             "width": width or demo.get("width"), "resolution": resolution or None,
             "batch_size": batch_size or demo.get("batch_size"), "log_every": max(1, steps // (5 * WARM)),
             "sample_every": 0, "save_every": steps, "tracker": "none", "minutes": 0}
    rates, walls, cost = {"eager": [], "compiled": []}, {"eager": [], "compiled": []}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for kind in rates:
                began = time.perf_counter()
                rows = trained(Path(folder), f"{kind}{number}", {**flags, "compile": kind == "compiled"})
                walls[kind].append(round(time.perf_counter() - began, 1))
                late = [(row["images"] - before["images"], row["speed/images_per_second"])
                        for before, row in itertools.pairwise(rows) if before["step"] >= steps // WARM]
                rates[kind].append(sum(images for images, _ in late) / sum(images / speed for images, speed in late))
                cost |= {name.removeprefix("speed/"): value for row in rows for name, value in row.items()
                         if name in ("speed/compile_seconds", "speed/graph_breaks", "speed/recompiles")}
                print(f"{kind}: {rates[kind][-1]:.1f} images/s, whole run {walls[kind][-1]} s", flush=True)
    print(f"compiling took {cost['compile_seconds']:.1f} s, {cost['graph_breaks']:.0f} graph breaks, "
          f"{cost['recompiles']:.0f} recompiles")
    report("train", rates, unit="images/s", base="eager", faster_is="more",
           about={"model": model, "steps": steps, "mixed_precision": mixed_precision, **cost, "whole_seconds": walls})
    return 0


def trained(folder: Path, name: str, flags: dict[str, Any]) -> list[dict[str, float]]:
    """The log of a run that was trained to its end; ValueError with the end of what it said if it failed."""
    words = [word for flag, value in flags.items() if value is not None for word in (f"--{flag}", str(value))]
    done = subprocess.run([sys.executable, "-m", "covergen.train", *words, "--out", str(folder), "--name", name],
                          env={**os.environ, "ACCELERATE_MIXED_PRECISION": "no"}, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    if done.returncode:
        raise ValueError(f"training failed: {done.stdout[-2000:]}")
    return read_log(folder / name)
