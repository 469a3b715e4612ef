"""Lists a music library: every audio file once, and the covers that lie beside them.

Links are followed, after everything that is not one: a file or folder that two paths lead to counts for the plain one.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from shard_tools.core.quarantine import Drop
from shard_tools.dataset.source import Entry, Folder

_NAMES, _KINDS = ("cover", "folder", "front"), (".jpg", ".jpeg", ".png")
_DISC = re.compile(r"(?:cd|dis[ck])[\s_.#-]*\d{1,2}(?!\d).*", re.IGNORECASE)


class Library(NamedTuple):
    """``songs`` sorted by path; ``covers`` by folder, the likeliest first; ``drops``: what could not be listed."""

    songs: list[Entry]
    covers: dict[str, list[Entry]]
    drops: list[Drop]


def walk(root: Path, suffixes: Collection[str]) -> Library:
    """Lists a library; files and folders with a dot in front are passed over."""
    source, top = Folder(root), os.path.realpath(root)
    folders, links, seen = deque([("", top)]), deque(), set()
    songs, covers, drops = [], {}, []
    while folders or links:
        folder, real = folders.popleft() if folders else links.popleft()
        if real in seen:
            continue
        seen.add(real)
        try:
            names, files = source.list(folder)
        except OSError as error:
            drops.append(Drop(folder or ".", "list", "unreadable", error.strerror or str(error)))
            continue
        for name in names:
            path = f"{folder}/{name}".lstrip("/")
            if name.startswith("."):
                continue
            if not os.path.islink(root / path):
                folders.append((path, os.path.join(real, name)))
            elif os.path.commonpath([target := os.path.realpath(root / path), top]) != target:  # a link, not upwards
                links.append((path, target))
        files = [entry for entry in files if not entry.name.startswith(".")]
        for entry in files:
            if os.path.splitext(entry.name)[1].lower() in suffixes:
                is_link = os.path.islink(root / entry.path)
                target = os.path.realpath(root / entry.path) if is_link else os.path.join(real, entry.name)
                songs.append((is_link, entry.path, target, entry))
        if found := sorted((entry for entry in files if _rank(entry) is not None), key=_rank):
            covers[folder] = found
    once = {}
    for _, _, target, entry in sorted(songs, key=lambda song: song[:2]):
        once.setdefault(target, entry)
    return Library(sorted(once.values()), covers, drops)


def album_folder(path: str) -> str:
    """The folder that an album's files have in common: of ``Album/CD1/a.mp3`` it is ``Album``."""
    folder = path.rpartition("/")[0]
    parent, _, name = folder.rpartition("/")
    return parent if _DISC.fullmatch(name) else folder


def _rank(entry: Entry) -> tuple[int, int, str] | None:
    stem, kind = os.path.splitext(entry.name.lower())
    return (_NAMES.index(stem), _KINDS.index(kind), entry.name) if stem in _NAMES and kind in _KINDS else None
