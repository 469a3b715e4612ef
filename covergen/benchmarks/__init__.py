"""Speed as ratios within one run, a file with a ``run`` for each thing that is measured: contenders alternate for
several rounds and the median counts, so that a busy machine slows all of them alike."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def report(what: str, measured: dict[str, list[float]], unit: str, base: str, faster_is: str,
           about: dict[str, Any]) -> None:
    """Prints the medians with their ratios to the base, as a table and as one line of JSON."""
    median = {name: statistics.median(values) for name, values in measured.items()}
    ratio = {name: median[base] / value if faster_is == "less" else value / median[base]
             for name, value in median.items()}
    print(f"{'':32}{unit:>14}{'x ' + base:>32}   spread")
    for name, values in measured.items():
        print(f"{name:32}{median[name]:>14.3f}{ratio[name]:>32.2f}   {min(values):.3f} .. {max(values):.3f}")
    print(json.dumps({"bench": what, **about, "compute_threads": torch.get_num_threads(), "torch": torch.__version__,
                      "unit": unit, "median": median, f"ratio_to_{base}": ratio}))


def alternate(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """One unmeasured call of each, then ``rounds`` measured ones in alternation."""
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            value = run()
            if number:
                measured[name].append(value)
    return measured


def median_seconds(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """The median time of five calls, after one that is not measured."""
    times = []
    for _ in range(6):
        began = clock()
        call()
        times.append(clock() - began)
    return statistics.median(times[1:])


def make_demo_shards(folder: Path, resolution: int, albums: int) -> Path:
    """A demo world with covers of this side as ``folder/shards``, packed from ``folder/raw``."""
    from shard_tools.demo import make
    from shard_tools.pack import pack
    make(folder / "raw", tier="toy", resolution=resolution, albums=albums)
    with contextlib.redirect_stdout(None):
        pack(str(folder / "raw"), str(folder / "shards"))
    return folder / "shards"
