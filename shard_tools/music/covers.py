"""The cover of an album: pictures in its tracks and beside them in; the first sound one as a JPEG out."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from shard_tools.core.errors import BadFileError
from shard_tools.core.files import write_atomically
from shard_tools.dataset.images import COVER_BYTES, QUALITY, probe_cover, read_cover
from shard_tools.dataset.source import Entry, read_entry
from shard_tools.music.albums import Track
from shard_tools.music.library import Library, home
from shard_tools.music.tags import FRONT, OTHER, read_picture

_MOST = 8  # pictures that are tried
_EMBEDDED = {FRONT: 0, OTHER: 1}  # ranks; pictures of other kinds (artists, booklets) come after those beside the track
_BESIDE, _ABOVE, _LAST, _BORROWED = 2, 3, 4, 10


class Choice(NamedTuple):
    """A picture that may become the cover: a file, or with ``sha256`` the one with that hash in an audio file."""

    entry: Entry
    sha256: str = ""


@dataclass(frozen=True)
class CoverTask:
    """One cover: the pictures to try in their order, and the folder to write to."""

    source: Path
    folder: Path
    choices: tuple[Choice, ...]
    side: int
    max_pixels: int

    @property
    def path(self) -> Path:
        parts = json.dumps([self.choices, self.side, self.max_pixels])
        return self.folder / f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.jpg"


class Cover(NamedTuple):
    """What became of a ``CoverTask``: the number of the picture taken, -1 = none, and what was wrong with others."""

    choice: int
    detail: str


def choices(tracks: Sequence[Track], entries: dict[str, Entry], library: Library) -> dict[str, tuple[Choice, ...]]:
    """For the tracks of one album ``{path: its pictures, the best first}``.

    An album has one cover: the commonest front among its tracks, then a file beside them. Where only the folder is
    known, a track's own picture goes first; it borrows none if the tracks show different ones, as a mere heap does.
    """
    found: dict[tuple[int, str], Choice] = {}  # by rank and hash, each in the first track that has it
    counts: Counter[tuple[int, str]] = Counter()
    for track in tracks:
        for place in _places(track):
            found.setdefault(place, Choice(entries[track.path], place[1]))
            counts[place] += 1
    embedded = sorted((place[0], -counts[place], choice) for place, choice in found.items())
    files = [(rank, number, Choice(entry))
             for rank, folders in ((_BESIDE, {track.path.rpartition("/")[0] for track in tracks}),
                                   (_ABOVE, {home(track.path) for track in tracks}))
             for folder in folders for number, entry in enumerate(library.covers.get(folder, ()))]
    if tracks[0].album.by != "folder":
        shared = _first(embedded + files)
        return {track.path: shared for track in tracks}
    is_heap = len({sha256 for _, sha256 in found}) > 1
    borrowed = [] if is_heap else [(rank + _BORROWED, *rest) for rank, *rest in embedded]
    return {track.path: _first([(place[0], 0, found[place]) for place in _places(track)] + files + borrowed)
            for track in tracks}


def _places(track: Track) -> list[tuple[int, str]]:
    """The ranks and hashes of a track's own pictures."""
    return [(_EMBEDDED.get(picture.kind, _LAST), picture.sha256) for picture in track.tags.pictures]


def _first(ranked: list[tuple[int, int, Choice]]) -> tuple[Choice, ...]:
    """The best few, each picture once."""
    once: dict[str | Entry, Choice] = {}
    for _, _, choice in sorted(ranked):
        once.setdefault(choice.sha256 or choice.entry, choice)
    return tuple(once.values())[:_MOST]


def origin(track: Track, choice: Choice) -> str:
    """Where a track's cover comes from: ``embedded`` in it, its ``album`` (in another track), or a ``file``."""
    if not choice.sha256:
        return "file"
    return "embedded" if choice.sha256 in [picture.sha256 for picture in track.tags.pictures] else "album"


def make_cover(task: CoverTask) -> Cover:
    """Writes the first sound picture as a JPEG to ``task.path``, unless that was done."""
    note = task.path.with_suffix(".json")
    if note.is_file():
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # a damaged one is made again
            chosen, problems = json.loads(note.read_bytes())
            if -1 <= chosen < len(task.choices):
                return Cover(chosen, problems)
    chosen, problems = -1, []
    for number, choice in enumerate(task.choices):
        try:
            data = read_picture(task.source / choice.entry.path, choice.sha256) if choice.sha256 else read_entry(
                task.source, choice.entry, COVER_BYTES)
            write_atomically(task.path, shrink_cover(data, task.side, task.max_pixels))
        except BadFileError as error:
            problems.append(f"{'picture in ' if choice.sha256 else ''}{choice.entry.path}: {error}")
            continue
        chosen = number
        break
    write_atomically(note, json.dumps([chosen, "; ".join(problems)]).encode())
    return Cover(chosen, "; ".join(problems))


def shrink_cover(data: bytes, side: int, max_pixels: int) -> bytes:
    """A cover as a baseline RGB JPEG, no side longer than ``side``: the same bytes when it is one already, otherwise
    upright, over white, made smaller if need be (its shape stays) and encoded with quality 95 and full colour.

    Raises:
        BadFileError: not an image, damaged, of too many bytes or pixels.
    """
    if len(data) > COVER_BYTES:
        raise BadFileError("too many bytes", f"{len(data):,} bytes, the limit is {COVER_BYTES:,}")
    metadata = probe_cover(data, max_pixels)
    if metadata.plain and max(metadata.width, metadata.height) <= side:
        return data
    image = Image.fromarray(read_cover(data, max_pixels))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    output = io.BytesIO()
    image.save(output, "JPEG", quality=QUALITY, subsampling=0)
    return output.getvalue()
