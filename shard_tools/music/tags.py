"""Reads the tags and embedded pictures of audio files.

ID3 (mp3, wav), Vorbis comments (flac, ogg, opus) and MP4 atoms (m4a) name the same things differently: all are brought
under Picard's Vorbis names, letters and digits only (``musicbrainzalbumid``), before anything is read from them.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shard_tools.core.errors import BadFileError
from shard_tools.core.text import fold

FRONT, OTHER = 3, 0  # kinds of pictures by their numbers in ID3, which FLAC and Ogg have taken over
_ICONS = (1, 2)
_MAX_LENGTH = 500  # characters of a tag, at most
_VARIOUS = ("various artists", "89ad4ac3-39f7-470e-963a-56509c546377")  # the name, and MusicBrainz's id of it
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
_ID3 = {"TPE1": "artist", "TPE2": "albumartist", "TALB": "album", "TIT2": "title", "TDRC": "date",
        "TCMP": "compilation", "TRCK": "tracknumber", "TPOS": "discnumber"}
_MP4 = {"\xa9ART": "artist", "aART": "albumartist", "\xa9alb": "album", "\xa9nam": "title", "\xa9day": "date",
        "\xa9gen": "genre", "cpil": "compilation", "trkn": "tracknumber", "disk": "discnumber"}


class Picture(NamedTuple):
    """An embedded picture: what it shows (kind of ID3; MP4, which has none, counts as ``FRONT``) and its hash."""

    kind: int
    sha256: str


class Tags(NamedTuple):
    """What a file says of itself; "" = not said. Where a tag has several values, the first.

    ``release_id`` and ``track_id`` are MusicBrainz's (of the recording, else of the track on the release).
    """

    artist: str = ""
    album_artist: str = ""
    album: str = ""
    title: str = ""
    date: str = ""
    genre: str = ""
    disc: str = ""
    number: str = ""
    release_id: str = ""
    track_id: str = ""
    compilation: bool = False
    pictures: tuple[Picture, ...] = ()


def read_tags(path: Path) -> Tags:
    """Reads the tags of an audio file, and hashes its pictures; BadFileError is ``unreadable`` or ``empty file``."""
    found: dict[str, list[str]] = {}
    with _opened(path) as audio:
        for name, value in _fields(audio):
            if text := _clean(value):
                found.setdefault(re.sub(r"[^a-z0-9]", "", name.lower()), []).append(text)
        pictures = tuple(Picture(kind, hashlib.sha256(data).hexdigest()) for kind, data in _pictures(audio))
    first = {name: values[0] for name, values in found.items()}
    kinds = [*found.get("releasetype", ()), *found.get("musicbrainzalbumtype", ())]
    artists = [first.get("albumartist", ""), *found.get("musicbrainzalbumartistid", ())]
    return Tags(
        first.get("artist", ""), first.get("albumartist", ""), first.get("album", ""), first.get("title", ""),
        first.get("date", "") or first.get("year", ""), first.get("genre", ""),
        _number(first.get("discnumber", "")), _number(first.get("tracknumber", "")),
        _id(first.get("musicbrainzalbumid", "")),
        _id(first.get("musicbrainztrackid", "")) or _id(first.get("musicbrainzreleasetrackid", "")),
        first.get("compilation", "").lower() in ("1", "true", "yes")
        or any("compilation" in kind.lower() for kind in kinds)
        or any(fold(artist) in _VARIOUS for artist in artists),
        pictures)


def read_many(source: Path, paths: Sequence[str]) -> list[Tags | BadFileError]:
    """The tags of some files below a folder, or what is wrong with them."""
    found: list[Tags | BadFileError] = []
    for path in paths:
        try:
            found.append(read_tags(source / path))
        except BadFileError as error:
            found.append(error)
    return found


def read_picture(path: Path, sha256: str) -> bytes:
    """The bytes of the embedded picture with that hash; BadFileError also where it is no longer there."""
    with _opened(path) as audio:
        for _, data in _pictures(audio):
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
    raise BadFileError("unreadable", "its picture changed while it was read")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The mutagen file at ``path``, of the kind of its beginning and suffix; errors inside become ``BadFileError``."""
    try:
        import mutagen
        from mutagen import flac, mp3, mp4, oggflac, oggopus, oggvorbis, wave
    except ImportError as error:
        raise ValueError(f"reading tags needs the mutagen package ({error}): pip install mutagen") from None
    kinds = [mp3.MP3, flac.FLAC, oggvorbis.OggVorbis, oggopus.OggOpus, oggflac.OggFLAC, mp4.MP4, wave.WAVE]
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # opening a FIFO would wait for ever
            raise BadFileError("unreadable", "not a regular file")
        if not info.st_size:
            raise BadFileError("empty file", "0 bytes")
        audio = mutagen.File(path, options=kinds)
        if audio is None:
            raise BadFileError("unreadable", "it begins as no kind of audio file that is known")
        yield audio
    except BadFileError:
        raise
    except Exception as error:  # mutagen has many kinds, and damaged files find more
        # Messages may name the file, and would differ after the library is moved.
        text = str(error).replace(repr(str(path)), "it").replace(str(path), "it") or type(error).__name__
        text = getattr(error, "strerror", None) or text
        raise BadFileError("unreadable", text[:300]) from None


def _fields(audio: Any) -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of the tags, each value of a tag by itself, under Vorbis names."""
    from mutagen import id3, mp4
    tags = audio.tags
    if isinstance(tags, id3.ID3):
        for frame in tags.values():
            if frame.FrameID == "TCON":
                yield from (("genre", value) for value in frame.genres)
            elif frame.FrameID == "UFID" and frame.owner == "http://musicbrainz.org":
                yield "musicbrainztrackid", frame.data.decode("ascii", "replace")
            elif frame.FrameID in _ID3 or frame.FrameID == "TXXX":
                name = _ID3.get(frame.FrameID) or frame.desc
                yield from ((name, str(value)) for value in frame.text)
    elif isinstance(tags, mp4.MP4Tags):
        for key, values in tags.items():
            name = _MP4.get(key) or (key.rpartition(":")[2] if key.startswith("----:") else "")
            for value in values if name and isinstance(values, list) else [values] if name else ():
                yield name, value[0] if isinstance(value, tuple) else value
    else:
        yield from tags or ()


def _pictures(audio: Any) -> Iterator[tuple[int, bytes]]:
    """Yields (kind, bytes) of the embedded pictures but icons; what is damaged is left out."""
    from mutagen import flac, id3, mp4
    if isinstance(audio.tags, id3.ID3):
        found = [(int(frame.type), frame.data) for frame in audio.tags.getall("APIC")]
    elif isinstance(audio, mp4.MP4):
        found = [(FRONT, bytes(data)) for data in (audio.tags or {}).get("covr", ())]
    else:
        blocks = list(getattr(audio, "pictures", ()))
        for text in (audio.tags or {}).get("metadata_block_picture", ()):
            try:
                blocks.append(flac.Picture(base64.b64decode(text)))
            except Exception:  # whatever it is, the other pictures are none the worse
                continue
        found = [(block.type, block.data) for block in blocks]
    yield from ((kind, data) for kind, data in found if data and kind not in _ICONS)


def _clean(value: Any) -> str:
    """A tag's value as a line of printable text."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    text = unicodedata.normalize("NFC", text)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_MAX_LENGTH]


def _number(text: str) -> str:
    """``03/12`` as ``3``."""
    match = re.match(r"\d+", text)
    return str(int(match[0])) if match and len(match[0]) < 10 else ""


def _id(text: str) -> str:
    return text.lower() if _UUID.fullmatch(text.lower()) else ""
