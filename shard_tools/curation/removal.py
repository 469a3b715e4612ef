"""Files taken out of a data set, into a folder beside it, with a table of them.

What is to be moved is written down first (``.moving.csv``) and renamed to ``dropped.csv`` when all is moved, so that a
killed run can be finished: the duplicates of a file are no longer found once it is gone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from shard_tools.core.files import GROUPS_BYTES, read_bounded, write_atomically
from shard_tools.core.tables import parse_table, table_bytes

DONE, BEGUN = "dropped.csv", ".moving.csv"
COLUMNS = ("path", "stays")


def drop_files(source: Path, dropped: Path, files: Sequence[tuple[str, str]]) -> None:
    """Moves files below ``source`` to the same paths below ``dropped``, on the same disk.

    ``files`` are (path of the file, path of the cover that stays in its stead), both below ``source``.
    """
    for path, _ in files:
        if os.path.lexists(dropped / path):
            raise ValueError(f"{dropped / path} was dropped by an earlier run, and SOURCE has it again; move {dropped} "
                             "somewhere else, and run the same command again")
    before = _read(dropped / DONE) if (dropped / DONE).is_file() else []
    dropped.mkdir(exist_ok=True)
    write_atomically(dropped / BEGUN, table_bytes(COLUMNS, [*before, *files]))
    finish(source, dropped)


def finish(source: Path, dropped: Path) -> bool:
    """Moves what a killed run has left of its table; returns whether there was one."""
    if not (dropped / BEGUN).is_file():
        return False
    for path, _ in _read(dropped / BEGUN):
        target = dropped / path
        if os.path.lexists(source / path) and not os.path.lexists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(source / path, target)
    os.replace(dropped / BEGUN, dropped / DONE)
    return True


def _read(path: Path) -> list[list[str]]:
    try:
        return parse_table(read_bounded(path, GROUPS_BYTES), COLUMNS)
    except ValueError as error:
        raise ValueError(f"{path} can't be read ({error}); put it right, or move it away") from None
