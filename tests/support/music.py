"""Small real music files for the tests: a folder and tags in; mp3, flac, ogg, opus, m4a and wav files out."""

from __future__ import annotations

import base64
import io
import os
import struct
import wave
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RATE = 22050
CODECS = {".mp3": "libmp3lame", ".flac": "flac", ".ogg": "vorbis", ".opus": "libopus", ".m4a": "aac"}
ID3 = {"artist": "TPE1", "albumartist": "TPE2", "album": "TALB", "title": "TIT2", "date": "TDRC", "genre": "TCON",
       "compilation": "TCMP", "tracknumber": "TRCK", "discnumber": "TPOS"}
MP4 = {"artist": "\xa9ART", "albumartist": "aART", "album": "\xa9alb", "title": "\xa9nam", "date": "\xa9day",
       "genre": "\xa9gen"}
RELEASE, RECORDING = "e52a5405-eec0-4f2a-9f3c-0f800e1164e3", "478ff859-34eb-457e-b9d2-dc74b5a372e9"
LONG = "one long name " * 14 + "....mp3"  # 203 characters
ODD = 'It\'s "odd" & <dotted>, v1.0...'
FREE = {"musicbrainz_albumid": "MusicBrainz Album Id", "musicbrainz_albumtype": "MusicBrainz Album Type",
        "musicbrainz_releasetrackid": "MusicBrainz Release Track Id"}  # Picard's names in ID3 and MP4


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    """A chord with a beat, float32 ``[N]``."""
    time = np.arange(int(seconds * RATE)) / RATE
    notes = 220 * 2 ** (np.random.default_rng(seed).integers(0, 24, 3) / 12)
    return (sum(np.sin(2 * np.pi * note * time) for note in notes) * np.exp(-4 * (time % 0.5)) / 4).astype(np.float32)


@cache
def encoded(kind: str, seconds: float, seed: int = 0) -> bytes:
    """The bytes of a music file without tags."""
    samples = (sound(seconds, seed) * 32767).astype("<i2")
    file = io.BytesIO()
    if kind == ".wav":
        with wave.open(file, "wb") as out:
            out.setparams((1, 2, RATE, 0, "NONE", ""))
            out.writeframes(samples.tobytes())
        return file.getvalue()
    import av
    form = {".m4a": "ipod", ".opus": "opus"}.get(kind, kind[1:])
    with av.open(file, "w", format=form) as out:
        stream = out.add_stream(CODECS[kind], rate=48000 if kind == ".opus" else RATE,
                                layout="stereo" if kind == ".ogg" else "mono", options={"strict": "experimental"})
        stream.open()
        frame = av.AudioFrame.from_ndarray(samples[None], "s16", "mono")
        frame.sample_rate, frame.pts = RATE, 0
        resampler = av.AudioResampler(stream.format, stream.layout, stream.rate, stream.frame_size or None)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))
    return file.getvalue()


def picture(seed: int, size: tuple[int, int] = (64, 64), kind: str = "JPEG", mode: str = "RGB", **options: Any,
            ) -> bytes:
    """A smooth random picture as a file's bytes."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, len(mode) if mode != "L" else 1), dtype=np.uint8)
    image = Image.fromarray(noise.squeeze(), mode).resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb() -> bytes:
    """A small PNG that says it has 2,500 megapixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def song(path: Path, seconds: float = 3.2, seed: int = 0, front: bytes | None = None,
         pictures: dict[int, bytes] | None = None, **tags: str) -> Path:
    """Writes a music file of the kind of its suffix, with Picard's Vorbis names for the tags.

    Args:
        path: of the file; folders are made.
        seconds, seed: of the sound.
        front: bytes of its front cover.
        pictures: others, by their kind in ID3.
        tags: ``artist``, ``albumartist``, ``musicbrainz_albumid``, ``musicbrainz_trackid`` (recording) ...
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(path.suffix.lower(), seconds, seed))
    import mutagen
    audio = mutagen.File(path)
    pictures = {**({} if front is None else {3: front}), **(pictures or {})}
    if tags or pictures:
        if audio.tags is None:
            audio.add_tags()
        {".mp3": _tag_id3, ".wav": _tag_id3, ".m4a": _tag_mp4}.get(path.suffix.lower(), _tag_vorbis)(
            audio, tags, pictures)
        audio.save()
    return path


def _tag_id3(audio: Any, tags: dict[str, str], pictures: dict[int, bytes]) -> None:
    from mutagen import id3
    for name, value in tags.items():
        if name == "musicbrainz_trackid":
            audio.tags.add(id3.UFID(owner="http://musicbrainz.org", data=value.encode()))
        elif name in ID3:
            audio.tags.add(getattr(id3, ID3[name])(encoding=3, text=value))
        else:
            audio.tags.add(id3.TXXX(encoding=3, desc=FREE.get(name, name), text=value))
    for kind, data in pictures.items():
        audio.tags.add(id3.APIC(encoding=0, mime="image/jpeg", type=kind, desc=str(kind), data=data))


def _tag_mp4(audio: Any, tags: dict[str, str], pictures: dict[int, bytes]) -> None:
    from mutagen import mp4
    for name, value in tags.items():
        if name == "compilation":
            audio["cpil"] = value == "1"
        elif name in ("tracknumber", "discnumber"):
            audio[{"tracknumber": "trkn", "discnumber": "disk"}[name]] = [(int(value), 0)]
        elif name in MP4:
            audio[MP4[name]] = value
        else:
            names = {**FREE, "musicbrainz_trackid": "MusicBrainz Track Id"}
            audio[f"----:com.apple.iTunes:{names.get(name, name)}"] = value.encode()
    if pictures:
        audio["covr"] = [mp4.MP4Cover(data) for _, data in sorted(pictures.items())]


def _tag_vorbis(audio: Any, tags: dict[str, str], pictures: dict[int, bytes]) -> None:
    from mutagen import flac
    for name, value in tags.items():
        audio[name] = value
    for kind, data in pictures.items():
        block = flac.Picture()
        block.type, block.mime, block.data = kind, "image/jpeg", data
        if isinstance(audio, flac.FLAC):
            audio.add_picture(block)
        else:
            audio["metadata_block_picture"] = [*audio.get("metadata_block_picture", []),
                                               base64.b64encode(block.write()).decode()]


def fragile(path: Path) -> tuple[float, list[tuple]]:
    """Extracts by a decoder that some files kill."""
    if "deadly" in path.name:
        os._exit(139)
    return 1.0, [(0, 0.0, 1.0, np.zeros(1, np.float32))]


def library(root: Path) -> Path:
    """Real files of every kind: three albums by tags, one by release, one by folder, and what can't be used."""
    one, two = picture(1), picture(2)
    song(root / "Band/01.mp3", front=one, albumartist="The Band", album="First", title="a", genre="Rock")
    song(root / f"{ODD}/{ODD}.flac", seed=1, artist=ODD, albumartist="the  BAND", album="FIRST ", title="b",
               genre="Indie Rock; Pop")
    song(root / f"Band/{LONG}", seed=2, artist="A, B\nC", albumartist="The Band", album="First", title="c")
    song(root / "x/1.ogg", seed=3, album="X", genre="Rap & Hip-Hop", musicbrainz_albumid=RELEASE,
               musicbrainz_trackid=RECORDING)
    song(root / "y/2.m4a", seed=4, front=two, album="Y", genre="Шансон", musicbrainz_albumid=RELEASE)
    song(root / "Дом/CD1/песня ☃.opus", seed=5, artist="Дом", album="Дом", genre="Death Metal")
    song(root / "Дом/CD2/2.wav", seed=6, artist="Дом", album="Дом", genre="test")
    (root / "Дом/Cover.PNG").write_bytes(picture(3, (90, 60), "PNG", "RGBA"))
    huge = picture(4, (6500, 6200), quality=60)  # 40 megapixels
    song(root / "hits/1.mp3", seed=7, front=huge, albumartist="Various Artists", album="Hits", genre="Pop")
    song(root / "heap/short.wav", 1.0, front=one)
    song(root / "heap/bomb.mp3", front=bomb(), title="bomb")
    song(root / "heap/bare.flac")
    (root / "heap/corrupt.mp3").write_bytes(np.random.default_rng(0).bytes(5000))
    (root / "heap/empty.ogg").touch()
    cut = song(root / "cut/cut.flac", front=one).read_bytes()
    (root / "cut/cut.flac").write_bytes(cut[:len(cut) // 3])
    song(Path(os.fsdecode(bytes(root) + b"/latin/caf\xe9.mp3")), seed=8)
    (root / "latin/folder.jpg").write_bytes(two)
    (root / "notes.txt").write_text("no music")
    (root / "loop").symlink_to(root)
    (root / "Band/again").symlink_to(root / "x")
    return root
