"""Benchmarks, which compare speeds within one run: ``python -m covergen.bench WHAT``."""

from __future__ import annotations

import importlib
import sys

from shard_tools import cli

BENCHMARKS = {
    "step": "whole training steps, eager and compiled, against the thesis's notebook",
    "train": "whole training runs, eager against compiled",
    "pack": "packing of covers and vectors against tar -cf over the same files",
    "cost": "what a run costs on 1 to 512 GPUs, and what limits it there",
    "reduce": "an all-reduce among processes of this machine",
    "loader": "loading of covers and vectors against torchvision's ImageFolder",
    "index": "opening an index of ten million rows: seconds and memory",
}


def main() -> None:
    """Hands over to the benchmark that is named first."""
    listed = "".join(f"  {name:10} {about}\n" for name, about in BENCHMARKS.items())
    usage = f"usage: python -m covergen.bench WHAT [options]     (see WHAT --help)\n\n{listed}"
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what in ("", "-h", "--help"):
        print(usage, end="")
        sys.exit(0 if what else 2)
    cli.guarded(lambda: cli.run(load(what).run, sys.argv[2:], name=f"{cli.command_name()} {what}"))


def load(what: str):
    """The module of a benchmark; ValueError with the nearest name."""
    if what not in BENCHMARKS:
        raise ValueError(f"{what}: no such benchmark, {cli.nearest(what, BENCHMARKS)}")
    return importlib.import_module(f"covergen.benchmarks.{what}")


if __name__ == "__main__":
    main()
