"""Writes the data set that ``collect`` makes: ``{cover,audio}/<genre>/`` and ``tracks.csv``.

Everything is built below ``OUT/.collect`` and moved into place at the end, ``tracks.csv`` last: with it, OUT is whole.
``OUT/.collect/excerpts`` is the cache of excerpts for the next run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from shard_tools.core.files import write_atomically
from shard_tools.core.locks import OUTPUT_LOCK
from shard_tools.core.tables import table_bytes
from shard_tools.dataset.genres import to_genre
from shard_tools.dataset.schema import Schema, read_schema, write_schema
from shard_tools.dataset.vectors import write_vector
from shard_tools.music.albums import Track
from shard_tools.music.excerpt_cache import load

FOLDER, TRACKS = ".collect", "tracks.csv"
COLUMNS = ("genre", "stem", "path", "artist", "album_artist", "album", "title", "date", "genre_tag",
           "musicbrainz_albumid", "group", "cover", "cover_path", "seconds", "excerpt_start", "excerpt_seconds")


class CollectedTrack(NamedTuple):
    """A track of the library, the file of its excerpts, that of its cover if there is one, and where it comes from."""

    track: Track
    cache: Path
    image: Path | None = None
    cover: str = ""
    cover_path: str = ""


def begin(root: Path, schema: Schema) -> Path:
    """Opens an empty folder, or one that ``collect`` made or began with this schema; returns the folder to work in."""
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


def write_collection(root: Path, tracks: Iterable[CollectedTrack], own: dict[str, str],
                     schema: Schema) -> list[list[str]]:
    """Writes a collection, in place of an older one in the same folder; returns the rows of ``tracks.csv``.

    ``root`` was opened by ``begin``, and ``own`` is a map of genres that goes before the built-in one.
    """
    work, rows = root / FOLDER, []
    build = work / "build"
    for folder in (build, work / "old"):
        shutil.rmtree(folder, ignore_errors=True)
    for part in ("cover", "audio"):
        (build / part).mkdir(parents=True)
    for track in tracks:
        seconds, excerpts = load(track.cache)
        tags = track.track.tags
        genre = to_genre(tags.genre, own)
        for folder in ("audio", "cover") if track.image else ("audio",):
            (build / folder / genre).mkdir(exist_ok=True)
        for excerpt in excerpts:
            stem = track.track.stem(excerpt.number)
            (build / "audio" / genre / f"{stem}.npy").write_bytes(write_vector(excerpt.vector))
            if track.image:  # all tracks of an album share one file, where the file system can link
                target = build / "cover" / genre / f"{stem}.jpg"
                try:
                    os.link(track.image, target)
                except OSError:
                    shutil.copyfile(track.image, target)
            rows.append([genre, stem, track.track.path, tags.artist, tags.album_artist, tags.album, tags.title,
                         tags.date, tags.genre, tags.release_id, track.track.album.id, track.cover, track.cover_path,
                         *(f"{number:.3f}" for number in (seconds, excerpt.start, excerpt.seconds))])
    write_schema(build / "audio", schema)
    os.sync()  # all of it is on the disk before any of it is in place
    (root / TRACKS).unlink(missing_ok=True)
    (work / "old").mkdir()
    for part in ("cover", "audio"):
        if (root / part).exists():
            os.replace(root / part, work / "old" / part)
        os.replace(build / part, root / part)
    rows.sort()
    escaped = ([str(value).encode("utf-8", "backslashreplace").decode() for value in row] for row in rows)
    write_atomically(root / TRACKS, table_bytes(COLUMNS, escaped))  # always UTF-8, for any reader
    os.replace(work / "covers", work / "old" / "covers")  # at once: covers and their records belong together
    for folder in (build, work / "old"):
        shutil.rmtree(folder, ignore_errors=True)
    for path in (work / "excerpts").glob("*/*"):
        if path.suffix != ".json":  # left by a killed run
            path.unlink()
    return rows
