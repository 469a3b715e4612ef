"""Reads and writes ``groups.csv`` at the top of a data set, which overrules what file names say of albums."""

from __future__ import annotations

from pathlib import Path

from shard_tools.core.files import GROUPS_BYTES, write_atomically
from shard_tools.core.tables import parse_table, table_bytes
from shard_tools.dataset.source import Folder, Zip, read_sidecar

FILE = "groups.csv"
COLUMNS = ("genre", "stem", "group")


def find_groups(source: Folder | Zip, top: str) -> dict[tuple[str, str], str]:
    """What ``groups.csv`` at the top of a layout says, ``{(genre, stem): group}``; nothing without one."""
    data = read_sidecar(source, top, FILE, GROUPS_BYTES)
    if data is None:
        return {}
    found: dict[tuple[str, str], str] = {}
    try:
        for genre, stem, group in parse_table(data, COLUMNS):
            if not group or found.setdefault((genre, stem), group) != group:
                raise ValueError(f"{stem} of {genre} has no group, or two")
    except ValueError as error:
        raise ValueError(f"{FILE} of --source can't be read ({error}); make it again with shard_tools.dedup") from None
    return found


def write_groups(folder: Path, groups: dict[tuple[str, str], str]) -> None:
    """Writes ``{(genre, stem): group}`` whole or not at all."""
    rows = [[*sample, group] for sample, group in sorted(groups.items())]
    write_atomically(folder / FILE, table_bytes(COLUMNS, rows))
