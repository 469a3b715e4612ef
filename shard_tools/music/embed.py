"""Writes covers into the tags of audio files."""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from shard_tools.core.files import atomic_path
from shard_tools.dataset.images import QUALITY
from shard_tools.dataset.layout import AUDIO_SUFFIXES
from shard_tools.music.tags import FRONT


def targets(sources: Sequence[Path], folder: Path, in_place: bool) -> dict[Path, Path]:
    """Checks audio files; for each, in their order, the file that is to carry the cover: itself, or
    ``<stem>.covergen<suffix>`` in ``folder``, where a copy of before is overwritten.

    Raises:
        ValueError: names the file: missing, of another kind, damaged, not writable, or two would become one.
    """
    if not sources:
        raise ValueError("--embed: expected the paths of audio files, separated by commas")
    found: dict[Path, Path] = {}
    for source in sources:
        if source.suffix.lower() not in AUDIO_SUFFIXES:
            raise ValueError(f"--embed {source}: expected an audio file of a kind that has tags: "
                             f"{', '.join(AUDIO_SUFFIXES)}")
        if not source.is_file():
            raise ValueError(f"--embed {source}: no such file")
        # The file that a link leads to: replacing the link would leave that one as it was.
        target = source.resolve() if in_place else folder / f"{source.stem}.covergen{source.suffix}"
        if target.is_dir() or (target.exists() and not os.access(target, os.W_OK)):
            raise ValueError(f"--embed {source}: {target} can't be written")
        if any(target.resolve() == other.resolve() for other in [*found.values(), *([] if in_place else sources)]):
            raise ValueError(f"--embed {source}: {target} would be written over another of these files; embed them one "
                             "by one, or copies in another folder (--out)")
        _opened(source, source)  # a damaged one is known before any work
        found[source] = target
    return found


def embed(source: Path, target: Path, picture: Image.Image) -> None:
    """Writes ``source`` with a picture as its only front cover to ``target``, whole or not at all.

    All else stays: the audio, the other tags and the pictures of other kinds. Both paths may be the same.
    """
    jpeg = io.BytesIO()
    picture.save(jpeg, format="JPEG", quality=QUALITY)
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
        audio = _opened(temporary, source)
        try:
            if audio.tags is None:
                audio.add_tags()
            _put(audio, jpeg.getvalue(), picture.size)
        except Exception as error:  # see _opened
            raise ValueError(f"--embed {source}: its tags can't be written: "
                             f"{str(error) or type(error).__name__}") from None
        if target.exists() and target.samefile(source):  # the copy of a read-only file is written again another time
            shutil.copymode(source, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # it may replace the only copy of a song


def _opened(path: Path, source: Path) -> Any:
    """The mutagen file at ``path``, a file of the kind of ``source``, which errors name."""
    try:
        from mutagen import flac, mp3, mp4, oggopus, oggvorbis, wave
    except ImportError as error:
        raise ValueError(f"--embed needs the mutagen package ({error}): pip install mutagen") from None
    kinds = {".mp3": [mp3.MP3], ".flac": [flac.FLAC], ".ogg": [oggvorbis.OggVorbis, oggopus.OggOpus],
             ".opus": [oggopus.OggOpus], ".wav": [wave.WAVE], ".m4a": [mp4.MP4]}[source.suffix.lower()]
    # ID3 tags as they are in the file: what a translation to another version has no name for would be lost.
    options = {"translate": False} if source.suffix.lower() in (".mp3", ".wav") else {}
    reasons = []
    for kind in kinds:
        try:
            return kind(path, **options)
        except Exception as error:  # mutagen has many kinds, and damaged files find more
            reasons.append(str(error) or type(error).__name__)
    raise ValueError(f"--embed {source} can't be read, it is damaged or no {source.suffix.lower()}: {reasons[0]}")


def _put(audio: Any, jpeg: bytes, size: tuple[int, int]) -> None:
    """Puts the front cover where the kind of file has it, before the pictures that stay, and saves the file."""
    from mutagen import flac, id3, mp4
    if isinstance(audio.tags, id3.ID3):
        tags = audio.tags
        others = [picture for picture in tags.getall("APIC") if picture.type != FRONT]
        name = "front cover"
        while any(picture.HashKey.startswith(f"APIC:{name}") for picture in others):  # one picture to a description
            name += " "
        tags.setall("APIC", [id3.APIC(encoding=0, mime="image/jpeg", type=FRONT, desc=name, data=jpeg), *others])
        if tags.version < (2, 3):  # which mutagen doesn't write
            tags.update_to_v24()
        audio.save(v2_version=3 if tags.version[:2] == (2, 3) else 4, v23_sep=None)
        return
    if isinstance(audio, mp4.MP4):  # its pictures have no kinds; the first is the one that is shown
        audio["covr"] = [mp4.MP4Cover(jpeg, mp4.MP4Cover.FORMAT_JPEG), *audio.get("covr", [])[1:]]
        audio.save()
        return
    cover = flac.Picture()
    cover.type, cover.mime, cover.data, cover.depth = FRONT, "image/jpeg", jpeg, 24
    cover.width, cover.height = size
    if isinstance(audio, flac.FLAC):
        others = [picture for picture in audio.pictures if picture.type != FRONT]
        audio.clear_pictures()
        for picture in [cover, *others]:
            audio.add_picture(picture)
    else:
        others = [text for text in audio.get("metadata_block_picture", []) if _kind(text) != FRONT]
        audio["metadata_block_picture"] = [base64.b64encode(cover.write()).decode(), *others]
    audio.save()


def _kind(text: str) -> int | None:
    """The kind of a picture as Ogg has it, base64 of FLAC's block; None if it isn't one."""
    from mutagen import flac
    try:
        return flac.Picture(base64.b64decode(text)).type
    except Exception:  # whatever it is, it is not ours to remove
        return None
