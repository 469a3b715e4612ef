"""Curves of losses and learning rates over the images seen, from the logs of run folders."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from covergen.analyses import names_of, plots
from covergen.runs.log import is_number, read_log

SHOWN = re.compile(r"loss/.+|val/.+|optim/(.+_)?lr(_.+)?")
SECTIONS = ("loss", "val", "optim")


def draw(folders: Sequence[Path], path: Path) -> str:
    """Writes a panel for each loss, validation value and learning rate, all runs overlaid; reads no weights."""
    logs = [read_log(folder) for folder in folders]
    names = names_of(folders)
    across = "images" if all(is_number(row.get("images")) for rows in logs for row in rows) else "step"
    panels: dict[str, list[plots.Curve]] = {}
    report = []
    for folder, run, rows in zip(folders, names, logs, strict=True):
        found = {name for row in rows for name, value in row.items() if SHOWN.fullmatch(name) and is_number(value)}
        if not found:
            raise ValueError(f"{folder}/log.jsonl holds no loss, validation value or learning rate yet")
        for name in found:
            logged = [(row[across], row[name] if is_number(row[name]) else math.nan) for row in rows if name in row]
            panels.setdefault(name, []).append(plots.Curve(run, *np.array(logged, np.float64).T,
                                                           noisy=not name.startswith("optim/")))
        report.append(sentence(run, rows, found))
    panels = dict(sorted(panels.items(), key=lambda item: (SECTIONS.index(item[0].partition("/")[0]), item[0])))
    title = f"Losses and learning rates of {', '.join(names)}" if len(names) < 4 else f"{len(names)} runs"
    plots.save(plots.curves(panels, names, title=title, across="images seen" if across == "images" else "step"), path)
    return "\n".join(report)


def sentence(run: str, rows: list[dict[str, Any]], names: set[str]) -> str:
    """A run in words: how far it came, its last losses and its best validation."""
    last = {name: next(row[name] for row in reversed(rows) if is_number(row.get(name)))
            for name in sorted(names) if name.startswith("loss/")}
    images = f" ({rows[-1]['images']:,} images)" if is_number(rows[-1].get("images")) else ""
    words = [f"{run}: step {rows[-1]['step']:,}{images}", *(f"{name} {value:.5g}" for name, value in last.items())]
    if "val/loss" in names:
        best = min((row for row in rows if is_number(row.get("val/loss"))), key=lambda row: row["val/loss"])
        words.append(f"best val/loss {best['val/loss']:.5g} at step {best['step']:,}")
    return ", ".join(words)
