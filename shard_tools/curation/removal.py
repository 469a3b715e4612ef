"""Files taken out of a data set: their paths in; the same files in a folder beside it, and a list of them, out.

What is to be moved is written down first (``.moving.csv``) and renamed to ``dropped.csv`` when all is moved, so that a
killed run can be finished: the duplicates of a file are no longer found once it is gone.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path

from shard_tools.core.files import GROUPS_BYTES, read_bounded, write_atomically

DONE, BEGUN = "dropped.csv", ".moving.csv"
COLUMNS = ("path", "stays")


def drop_files(source: Path, dropped: Path, files: Iterable[tuple[str, str]]) -> int:
    """Moves files below ``source`` to the same places below ``dropped``; returns how many.

    Args:
        source: the data set.
        dropped: on the same disk; new, or left by an earlier run.
        files: (path of the file, path of the cover that stays in its stead), both below ``source``.

    Raises:
        ValueError: a file is there already.
    """
    files = list(files)
    if not files:
        return 0
    for path, _ in files:
        if os.path.lexists(dropped / path):
            raise ValueError(f"{dropped / path} was dropped by an earlier run, and SOURCE has it again; move {dropped} "
                             "elsewhere, and run the same command again")
    before = _read(dropped / DONE) if (dropped / DONE).is_file() else []
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([COLUMNS, *before, *files])
    dropped.mkdir(exist_ok=True)
    write_atomically(dropped / BEGUN, text.getvalue().encode("utf-8", "surrogateescape"))
    finish(source, dropped)
    return len(files)


def is_unfinished(dropped: Path) -> bool:
    return (dropped / BEGUN).is_file()


def finish(source: Path, dropped: Path) -> None:
    """Moves what a killed run has left of its list."""
    for path, _ in _read(dropped / BEGUN):
        target = dropped / path
        if os.path.lexists(source / path) and not os.path.lexists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(source / path, target)
    os.replace(dropped / BEGUN, dropped / DONE)


def _read(path: Path) -> list[tuple[str, str]]:
    text = read_bounded(path, GROUPS_BYTES).decode("utf-8", "surrogateescape")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    if not rows or tuple(rows[0]) != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
        raise ValueError(f"{path} can't be read: expected the columns {', '.join(COLUMNS)}; put it right, or move it "
                         "away")
    return [(row[0], row[1]) for row in rows[1:]]
