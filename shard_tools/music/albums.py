"""Groups the files of a music library to albums by their tags, and names them.

Names are UUIDs, MusicBrainz's where the tags have them, else made (version 5) of what does not change when a library
is moved: tags, and paths relative to the library.
"""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from typing import NamedTuple

from shard_tools.core.text import fold
from shard_tools.music.library import album_folder
from shard_tools.music.tags import Tags

_UNKNOWN = {"unknown", "<unknown>", "unknown album", "unknown artist"}  # what rippers write
_NAMESPACE = uuid.UUID("8f9d6ec1-3c0b-5a55-9a4c-0f5c0f7a3d11")


class Album(NamedTuple):
    """An album: its UUID and what it is known ``by``: ``release`` (MusicBrainz), ``tags``, or only ``folder``."""

    id: str
    by: str


class Track(NamedTuple):
    """A file of the library: its path, tags and album, and a UUID that no other file has in this album."""

    path: str
    tags: Tags
    album: Album
    id: str

    def stem(self, excerpt: int) -> str:
        return f"{self.id}-{excerpt}__{self.album.id}"


def make_tracks(found: dict[str, Tags]) -> list[Track]:
    """Groups the files ``{path: tags}``: by release id, else album artist and album, else folder; sorted by path.

    Files without an album artist count by their artist if all of this album and folder have the same, else the folder
    and the album's title are the group: an album of many artists stays whole. A folder of ``CD1``, ``CD2`` is one.
    """
    artists = defaultdict(set)
    for path, tags in found.items():
        artists[album_folder(path), _known(tags.album)].add(_known(tags.album_artist) or _known(tags.artist))
    tracks: list[Track] = []
    taken: set[tuple[str, str]] = set()
    for path, tags in sorted(found.items()):
        album = _album(path, tags, alone=len(artists[album_folder(path), _known(tags.album)]) == 1)
        name = tags.track_id or (
            _uuid("track", album.id, tags.disc, tags.number, fold(tags.artist), fold(tags.title)) if tags.title
            else _uuid("file", album.id, path.rpartition("/")[2]))
        if (name, album.id) in taken:  # the same recording twice, in two formats perhaps
            name = _uuid("copy", name, path)
        taken.add((name, album.id))
        tracks.append(Track(path, tags, album, name))
    return tracks


def _album(path: str, tags: Tags, alone: bool) -> Album:
    if tags.release_id:
        return Album(tags.release_id, "release")
    title, artist = _known(tags.album), _known(tags.album_artist)
    if not artist and alone:
        artist = _known(tags.artist)
    if title and artist:
        return Album(_uuid("album", artist, title), "tags")
    return Album(_uuid("folder", album_folder(path), title), "folder")


def _known(text: str) -> str:
    text = fold(text)
    return "" if text in _UNKNOWN else text


def _uuid(*parts: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, json.dumps(parts)))  # JSON: names that are no UTF-8 become escapes
