"""The log of a run, ``log.jsonl``: rows of numbers as JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shard_tools.core.files import write_atomically

LINE_BYTES = 2**20  # most bytes of a line that are read at once


def log_path(folder: Path) -> Path:
    return folder / "log.jsonl"


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a log with their ends, none longer than any log has."""
    with open(path, "rb") as file:
        yield from iter(lambda: file.readline(LINE_BYTES), b"")


def log_line(row: dict[str, Any]) -> str:
    """A row as a line; what is not finite is null, since JSON has no infinity."""
    return json.dumps({name: None if isinstance(value, float) and not math.isfinite(value) else value
                       for name, value in row.items()}) + "\n"


def cut_log(path: Path, step: int) -> int:
    """Drops the lines after ``step`` and half-written ones, for that part happens again; returns the last step held."""
    rest, last = [], 0
    for line in _lines(path) if path.is_file() else []:
        try:
            last = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # damaged: the others stay
            continue
        if last <= step and line.endswith(b"\n"):
            rest.append(line)
    write_atomically(path, b"".join(rest))
    return last


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's log up to the first damaged one, such as a last line that was cut; ValueError for none."""
    path, rows = log_path(folder), []
    if not path.is_file():
        raise ValueError(f"{folder} has no log.jsonl: not a run folder, or one that has not been trained")
    for line in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not is_number(row.get("step")):
            break
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty: the run has logged nothing yet")
    return rows


def is_number(value: Any) -> bool:
    """Whether a value of a log says something: null stands for what was not finite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
