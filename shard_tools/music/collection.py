"""What ``collect`` leaves: tracks, covers and vectors in; ``{cover,audio}/<genre>/``, tables and a memory of it out.

Everything is built below ``OUT/.collect`` and moved into place at the end, ``tracks.csv`` last: with it, OUT is whole.
``OUT/.collect/excerpts`` stays, for the next run.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from shard_tools.core.files import write_atomically
from shard_tools.core.locks import OUTPUT_LOCK
from shard_tools.dataset.genres import to_genre
from shard_tools.dataset.schema import Schema, read_schema, write_schema
from shard_tools.dataset.vectors import write_vector
from shard_tools.music.albums import Track
from shard_tools.music.excerpt_cache import Excerpt, load

FOLDER, TRACKS = ".collect", "tracks.csv"
COLUMNS = ("genre", "stem", "path", "artist", "album_artist", "album", "title", "date", "genre_tag",
           "musicbrainz_albumid", "group", "cover", "cover_path", "seconds", "excerpt_start", "excerpt_seconds")


class CollectedTrack(NamedTuple):
    """A track of a collection: ``image`` is the file of its cover, None = it has none; ``cover`` and ``cover_path`` say
    where that comes from."""

    track: Track
    image: Path | None
    cover: str
    cover_path: str


def begin(root: Path, schema: Schema) -> Path:
    """Opens an empty folder, or one that ``collect`` made or began; returns the folder to work in.

    Raises:
        ValueError: it is of others, or holds vectors of another schema.
    """
    found = sorted(path.name for path in root.iterdir() if path.name != OUTPUT_LOCK)
    if found and FOLDER not in found:
        raise ValueError(f"{root} is not empty (found {', '.join(found[:3])}), and collect has not left it so; choose "
                         "another --out")
    there = read_schema(root / "audio")
    if there is not None and there.sha256 != schema.sha256:
        raise ValueError(f"{root} holds vectors of {there}; these would be of {schema}: choose another --out")
    work = root / FOLDER
    (work / "excerpts").mkdir(parents=True, exist_ok=True)
    (work / "covers").mkdir(exist_ok=True)
    return work


def write_collection(root: Path, samples: Iterable[tuple[CollectedTrack, Path]], own: dict[str, str], schema: Schema,
                     ) -> list[list[str]]:
    """Writes a collection, in place of an older one in the same folder; returns the rows of ``tracks.csv``.

    Args:
        root: opened by ``begin``.
        samples: each with the file of the memory of it.
        own: map of genres that goes before the built-in one.
        schema: of the vectors.
    """
    work, rows = root / FOLDER, []
    build = work / "build"
    _remove(build, work / "old")
    for part in ("cover", "audio"):
        (build / part).mkdir(parents=True)
    for sample, memory in samples:
        seconds, parts = load(memory)
        genre = to_genre(sample.track.tags.genre, own)
        for folder in ("audio", "cover") if sample.image else ("audio",):
            (build / folder / genre).mkdir(exist_ok=True)
        for part in parts:
            stem = sample.track.stem(part.number)
            (build / "audio" / genre / f"{stem}.npy").write_bytes(write_vector(part.vector))
            if sample.image:
                _link(sample.image, build / "cover" / genre / f"{stem}.jpg")
            rows.append([genre, stem, *_row(sample, seconds, part)])
    write_schema(build / "audio", schema)
    os.sync()  # all of it is on the disk before any of it is in place
    (root / TRACKS).unlink(missing_ok=True)
    (work / "old").mkdir()
    for part in ("cover", "audio"):
        if (root / part).exists():
            os.replace(root / part, work / "old" / part)
        os.replace(build / part, root / part)
    rows.sort()
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    write_atomically(root / TRACKS, text.getvalue().encode("utf-8", "backslashreplace"))  # always UTF-8, for any reader
    os.replace(work / "covers", work / "old" / "covers")  # at once: covers and notes belong together
    _remove(build, work / "old")
    for path in (work / "excerpts").glob("*/*"):
        if path.suffix != ".json":  # left by a killed run
            path.unlink()
    return rows


def _row(sample: CollectedTrack, seconds: float, part: Excerpt) -> list[str]:
    track, tags = sample.track, sample.track.tags
    return [track.path, tags.artist, tags.album_artist, tags.album, tags.title, tags.date, tags.genre, tags.release_id,
            track.album.id, sample.cover, sample.cover_path,
            *(f"{number:.3f}" for number in (seconds, part.start, part.seconds))]


def _link(image: Path, place: Path) -> None:
    """One cover for all tracks of an album takes the room of one, where the file system can link."""
    try:
        os.link(image, place)
    except OSError:
        shutil.copyfile(image, place)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
