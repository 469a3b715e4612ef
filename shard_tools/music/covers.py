"""The cover of each album, from the pictures in its tracks and beside them, as a JPEG."""

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
from shard_tools.music.library import Library, album_folder
from shard_tools.music.tags import FRONT, OTHER, read_picture

_MAX_TRIED = 8  # pictures
# Ranks, the best first: fronts in a track, its pictures of no kind, files beside it and above it, and all other kinds
# (artists, booklets). Pictures of other tracks, where they are borrowed, come after all of these.
_EMBEDDED = {FRONT: 0, OTHER: 1}
_BESIDE, _ABOVE, _OTHER_KINDS, _BORROWED = 2, 3, 4, 10


class Candidate(NamedTuple):
    """A picture that may become the cover: a file, or with ``sha256`` the one with that hash in an audio file."""

    entry: Entry
    sha256: str = ""


@dataclass(frozen=True)
class CoverTask:
    """One cover: the pictures to try in their order, and the folder to write to."""

    source: Path
    folder: Path
    candidates: tuple[Candidate, ...]
    side: int
    max_pixels: int

    @property
    def path(self) -> Path:
        parts = json.dumps([self.candidates, self.side, self.max_pixels])
        return self.folder / f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.jpg"


class Cover(NamedTuple):
    """What became of a ``CoverTask``: the number of the candidate taken, -1 = none, and what was wrong with others."""

    chosen: int
    problems: str


def cover_candidates(tracks: Sequence[Track], entries: dict[str, Entry],
                     library: Library) -> dict[str, tuple[Candidate, ...]]:
    """For the tracks of one album ``{path: its pictures, the best first}``.

    An album has one cover: the commonest front among its tracks, then a file beside them. Where only the folder is
    known, a track's own picture goes first; it borrows none if the tracks show different ones, as a mere heap does.
    """
    found: dict[tuple[int, str], Candidate] = {}  # by rank and hash, each in the first track that has it
    counts: Counter[tuple[int, str]] = Counter()
    for track in tracks:
        for key in _ranked_pictures(track):
            found.setdefault(key, Candidate(entries[track.path], key[1]))
            counts[key] += 1
    embedded = sorted((key[0], -counts[key], candidate) for key, candidate in found.items())
    files = [(rank, number, Candidate(entry))
             for rank, folders in ((_BESIDE, {track.path.rpartition("/")[0] for track in tracks}),
                                   (_ABOVE, {album_folder(track.path) for track in tracks}))
             for folder in folders for number, entry in enumerate(library.covers.get(folder, ()))]
    if tracks[0].album.by != "folder":
        shared = _best(embedded + files)
        return {track.path: shared for track in tracks}
    is_heap = len({sha256 for _, sha256 in found}) > 1
    borrowed = [] if is_heap else [(rank + _BORROWED, *rest) for rank, *rest in embedded]
    return {track.path: _best([(key[0], 0, found[key]) for key in _ranked_pictures(track)] + files + borrowed)
            for track in tracks}


def _ranked_pictures(track: Track) -> list[tuple[int, str]]:
    """The ranks and hashes of a track's own pictures."""
    return [(_EMBEDDED.get(picture.kind, _OTHER_KINDS), picture.sha256) for picture in track.tags.pictures]


def _best(ranked: list[tuple[int, int, Candidate]]) -> tuple[Candidate, ...]:
    """The best few, each picture once."""
    once: dict[str | Entry, Candidate] = {}
    for _, _, candidate in sorted(ranked):
        once.setdefault(candidate.sha256 or candidate.entry, candidate)
    return tuple(once.values())[:_MAX_TRIED]


def cover_source(track: Track, candidate: Candidate) -> str:
    """Where a track's cover comes from: ``embedded`` in it, its ``album`` (in another track), or a ``file``."""
    if not candidate.sha256:
        return "file"
    return "embedded" if candidate.sha256 in [picture.sha256 for picture in track.tags.pictures] else "album"


def make_cover(task: CoverTask) -> Cover:
    """Writes the first candidate that can be decoded as a JPEG to ``task.path``, unless that was done."""
    record = task.path.with_suffix(".json")
    if record.is_file():
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # a damaged one is made again
            cover = Cover(*json.loads(record.read_bytes()))
            if -1 <= cover.chosen < len(task.candidates):
                return cover
    chosen, problems = -1, []
    for number, (entry, sha256) in enumerate(task.candidates):
        try:
            data = (read_picture(task.source / entry.path, sha256) if sha256
                    else read_entry(task.source, entry, COVER_BYTES))
            write_atomically(task.path, shrink_cover(data, task.side, task.max_pixels))
        except BadFileError as error:
            problems.append(f"{'picture in ' if sha256 else ''}{entry.path}: {error}")
            continue
        chosen = number
        break
    cover = Cover(chosen, "; ".join(problems))
    write_atomically(record, json.dumps(cover).encode())
    return cover


def shrink_cover(data: bytes, side: int, max_pixels: int) -> bytes:
    """A cover as a baseline RGB JPEG, no side longer than ``side``: the same bytes when it is one already, otherwise
    upright, over white, made smaller if need be (its shape stays) and encoded with quality 95 and full colour."""
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
