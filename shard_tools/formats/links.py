"""One file in two places: a path in; a hard link, a soft link or a copy of it out, whole or not there."""

from __future__ import annotations

import filecmp
import os
import shutil
from pathlib import Path
from typing import Literal

Way = Literal["hard", "soft", "copy"]
WAYS: tuple[Way, ...] = ("hard", "soft", "copy")
TEMPORARY = ".link.tmp"


def place(source: Path, target: Path, way: Way) -> Way:
    """Makes ``target`` the same file as ``source``, and returns how: as asked, or the next of ``WAYS`` that the disks
    allow. Hard links don't reach across devices, and some file systems have neither kind.

    What lies at ``target`` is replaced, unless it is right already. Links go to the file itself, not to a link to it.

    Raises:
        OSError: not even a copy can be made.
    """
    source = source.resolve()
    if (there := _way_of(source, target)) and (there == "copy") == (way == "copy"):
        return there
    temporary = target.with_name(TEMPORARY)
    for attempt in WAYS[WAYS.index(way):]:
        temporary.unlink(missing_ok=True)
        try:
            {"hard": os.link, "soft": os.symlink, "copy": shutil.copyfile}[attempt](source, temporary)
        except OSError:
            if attempt == "copy":
                raise
        else:
            os.replace(temporary, target)
            return attempt
    raise AssertionError("a copy is made, or raises")


def _way_of(source: Path, target: Path) -> Way | None:
    """How a target is the source already; None: it is not."""
    if not target.exists():
        return None
    if target.samefile(source):
        return "soft" if target.is_symlink() else "hard"
    return "copy" if not target.is_symlink() and filecmp.cmp(source, target, shallow=False) else None


def place_bytes(data: bytes, target: Path) -> None:
    """Makes ``target`` a file of these bytes, unless it is one."""
    if target.is_file() and not target.is_symlink() and target.read_bytes() == data:
        return
    temporary = target.with_name(TEMPORARY)
    temporary.write_bytes(data)
    os.replace(temporary, target)
