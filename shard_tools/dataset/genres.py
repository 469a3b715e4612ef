"""Which genre a track counts for: its genre tag in, the name of a folder out, by the map of the thesis or one's own."""

from __future__ import annotations

import csv
import re
import unicodedata
from pathlib import Path

from shard_tools.core.files import read_bounded
from shard_tools.dataset.layout import ALIASES, SPLITS, UNKNOWN

# The sixteen genres of the thesis, and what it counted for them; every tag with "metal" in it besides.
THESIS = {name: name for name in ("blues", "country", "electronic", "folk", "indie", "jazz", "latin", "metal", "pop",
                                  "punk", "r&b", "rap", "reggae", "rock", "world")} | {
    "hip hop": "rap", "rap & hip hop": "rap", "electronica": "electronic", "indie rock": "indie", "indie pop": "indie",
    "new age": "new_age"}
_LONGEST = 60  # bytes of a folder's name
_COLUMNS = ["tag", "genre"]


def to_genre(tag: str, own: dict[str, str] | None = None) -> str:
    """The genre of a tag: by ``own`` map, else the thesis's, else the tag itself as a folder's name, else ``unknown``.

    A tag that names several (``Rock; Pop``, ``R&B/Soul``) counts for the first, unless ``own`` knows it as a whole.
    """
    own = own or {}
    first = next((part for part in re.split(r"[;,/|\\]", tag) if part.strip()), "")
    for name in (_plain(tag), _plain(first)):
        if name in own:
            return own[name]
    name = _plain(first)
    return THESIS.get(name) or ("metal" if "metal" in name else to_folder(first))


def to_folder(text: str) -> str:
    """A text as a folder's name that no layout takes for anything but a genre: letters, digits, ``_`` and ``&``."""
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFKC", text).casefold())
    text = re.sub(r"[^\w&]+|_+", "_", text).strip("_").encode()[:_LONGEST].decode("utf-8", "ignore").strip("_")
    if text in SPLITS or text in ALIASES:
        return f"{text}_music"
    return text or UNKNOWN


def read_map(path: Path) -> dict[str, str]:
    """A table ``tag,genre`` (the first line may say so) as ``{tag: genre}``, for ``to_genre``; ValueError for others.
    """
    found: dict[str, str] = {}
    try:
        rows = csv.reader(read_bounded(path).decode("utf-8-sig").splitlines())
        for number, row in enumerate(rows):
            if not row or (number == 0 and [cell.strip().lower() for cell in row] == _COLUMNS):
                continue
            if len(row) != 2 or not row[0].strip() or to_folder(row[1]) == UNKNOWN != row[1].strip().lower():
                raise ValueError(f"line {rows.line_num} is {','.join(row)!r}")
            tag, genre = _plain(row[0]), to_folder(row[1])
            if found.setdefault(tag, genre) != genre:
                raise ValueError(f"line {rows.line_num}: {row[0].strip()!r} is {found[tag]!r} further up")
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"--genre_map {path}: {error}; expected lines of a tag and a genre: Hard Rock,rock") from None
    return found


def _plain(tag: str) -> str:
    """A tag as it is looked up: ``Hip-Hop``, ``hip hop`` and ``HIP_HOP`` alike, and ``R & B`` as ``r&b``."""
    text = re.sub(r"[\s_\-]+", " ", unicodedata.normalize("NFKC", tag).casefold()).strip()
    return "r&b" if text.replace(" ", "") == "r&b" else text
