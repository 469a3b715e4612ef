"""Covers in audio files: the sound, the other tags and pictures stay, and a file is written whole or is as before."""

from __future__ import annotations

import base64
import io
import os
import struct
import sys
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shard_tools.dataset.layout import AUDIO_SUFFIXES
from shard_tools.music.embed import embed, targets
from tests.support.paths import SHARED

mutagen = pytest.importorskip("mutagen")
from mutagen import flac, id3, mp4, ogg, oggopus, oggvorbis  # noqa: E402

CLIPS = sorted((SHARED / "clips").glob("*.ogg"))
SOUND = bytes(range(1, 200))  # stands for coded audio, which nothing here decodes
MP3 = 8 * (bytes.fromhex("fffb9064") + bytes(413))  # eight silent frames: MPEG 1, layer 3, 128 kbit/s, 44.1 kHz
RAMP = np.linspace(0, 255, 500)
COVER = Image.fromarray(np.stack([np.tile(RAMP, (500, 1)), np.tile(RAMP[:, None], 500), np.full((500, 500), 90)],
                                 axis=-1).astype(np.uint8))


def atom(name: str, *inside: bytes) -> bytes:
    data = b"".join(inside)
    return struct.pack(">I4s", 8 + len(data), name.encode()) + data


def m4a() -> bytes:
    """The atoms that place and describe the sound; its offset in the file is in ``stco``."""
    def movie(offset: int) -> bytes:
        table = atom("stbl", atom("stco", struct.pack(">3I", 0, 1, offset)))
        media = atom("mdia", atom("mdhd", struct.pack(">6I", 0, 0, 0, 44100, 44100, 0)),
                     atom("hdlr", bytes(8), b"soun", bytes(13)), atom("minf", table))
        return atom("ftyp", b"M4A ", bytes(4), b"M4A mp42") + atom("moov", atom("trak", media))
    return movie(len(movie(0)) + 8) + atom("mdat", SOUND)


def pages(*packets: bytes) -> bytes:
    """An Ogg stream with a page for each packet."""
    found = ogg.OggPage.from_packets([packets[0]])
    for packet in packets[1:]:
        found += ogg.OggPage.from_packets([packet], sequence=len(found))
    found[0].first, found[-1].last = True, True
    for page in found:
        page.serial, page.position = 7, 48000
    return b"".join(page.write() for page in found)


def audio(kind: str) -> bytes:
    """A second of sound, or what stands for it, in a file without tags."""
    if kind == ".wav":
        file = io.BytesIO()
        with wave.open(file, "wb") as sound:
            sound.setparams((1, 2, 8000, 0, "NONE", ""))
            sound.writeframes(bytes(16000))
        return file.getvalue()
    if kind == ".flac":  # 4096 samples a block, 44.1 kHz, 16 bit, mono, 44100 samples
        stream = struct.pack(">HH6xQ16x", 4096, 4096, 44100 << 44 | 15 << 36 | 44100)
        return b"fLaC" + struct.pack(">I", 0x80 << 24 | len(stream)) + stream + b"\xff\xf8" + SOUND
    comment = struct.pack("<I4sI", 4, b"test", 0)
    if kind == ".ogg":
        return pages(b"\x01vorbis" + struct.pack("<IBI3iBB", 0, 1, 48000, 0, 96000, 0, 0xb8, 1),
                     b"\x03vorbis" + comment + b"\x01", b"\x05vorbis" + bytes(50), SOUND)
    if kind == ".opus":
        return pages(b"OpusHead" + struct.pack("<BBHIHB", 1, 1, 0, 48000, 0, 0), b"OpusTags" + comment, SOUND)
    return m4a() if kind == ".m4a" else MP3


def song(folder: Path, kind: str, name: str = "song") -> Path:
    path = folder / f"{name}{kind}"
    path.write_bytes(audio(kind))
    return path


def sound(path: Path) -> bytes | list[bytes]:
    """What a player would decode."""
    kind, data = path.suffix, path.read_bytes()
    if kind == ".wav":
        with wave.open(str(path)) as file:
            return file.readframes(file.getnframes())
    if kind in (".ogg", ".opus"):
        file, found = io.BytesIO(data), []
        while file.tell() < len(data):
            found.append(ogg.OggPage(file))
        packets = ogg.OggPage.to_packets(found)
        return [packets[0], *packets[2:]]
    if kind == ".m4a":
        start = struct.unpack(">I", data[data.index(b"stco") + 12:][:4])[0]
        return data[start:start + len(SOUND)]
    if kind == ".flac":
        return data[data.index(b"\xff\xf8" + SOUND):]
    return data[id3.ID3(path).size:] if data.startswith(b"ID3") else data


def found(path: Path) -> list[tuple[int, bytes]]:
    """The pictures in a file's tags as (kind, bytes); the first of an .m4a counts as the front cover."""
    tags = mutagen.File(path)
    if isinstance(tags, mp4.MP4):
        return [(3 if number == 0 else 4, bytes(data)) for number, data in enumerate(tags.get("covr", []))]
    if isinstance(tags, flac.FLAC):
        return [(picture.type, picture.data) for picture in tags.pictures]
    if isinstance(tags.tags, id3.ID3):
        return [(int(picture.type), picture.data) for picture in tags.tags.getall("APIC")]
    blocks = [flac.Picture(base64.b64decode(text)) for text in tags.get("metadata_block_picture", [])]
    return [(picture.type, picture.data) for picture in blocks]


def tag(path: Path) -> None:
    """A title, an old front cover and a back cover of one description."""
    tags = mutagen.File(path)
    if tags.tags is None:
        tags.add_tags()
    pictures = []
    for kind, data in ((3, b"old front"), (4, b"back")):
        picture = flac.Picture()
        picture.type, picture.data, picture.mime, picture.desc = kind, data, "image/png", "front cover"
        pictures.append(picture)
    if isinstance(tags, mp4.MP4):
        tags["\xa9nam"], tags["covr"] = "Sōran", [mp4.MP4Cover(picture.data) for picture in pictures]
    elif isinstance(tags.tags, id3.ID3):
        tags.tags.add(id3.TIT2(encoding=3, text="Sōran"))
        for picture in pictures:
            frame = id3.APIC(encoding=3, mime="image/png", type=picture.type, desc="front cover", data=picture.data)
            frame.salt = str(picture.type)
            tags.tags.add(frame)
    else:
        tags["title"] = "Sōran"
        if isinstance(tags, flac.FLAC):
            for picture in pictures:
                tags.add_picture(picture)
        else:
            tags["metadata_block_picture"] = [*(base64.b64encode(picture.write()).decode() for picture in pictures)]
    tags.save()


def title(path: Path) -> str:
    tags = mutagen.File(path)
    return str(tags["\xa9nam" if isinstance(tags, mp4.MP4) else "TIT2" if isinstance(tags.tags, id3.ID3) else "title"])


@pytest.mark.parametrize("kind", AUDIO_SUFFIXES)
def test_a_cover_becomes_the_only_front_cover_and_all_else_stays(tmp_path: Path, kind: str) -> None:
    bare = song(tmp_path, kind)
    before, length = bare.read_bytes(), mutagen.File(bare).info.length
    [(source, copy)] = targets([bare], tmp_path / "out", in_place=False).items()
    assert source == bare and copy == tmp_path / "out" / f"song.covergen{kind}"
    os.chmod(bare, 0o440)
    embed(bare, copy, COVER)
    assert bare.read_bytes() == before and os.stat(copy).st_mode & 0o600 == 0o600
    os.chmod(bare, 0o640)
    assert sound(copy) == sound(bare) and mutagen.File(copy).info.length == pytest.approx(length, abs=0.01)
    [(front, data)] = found(copy)
    picture = Image.open(io.BytesIO(data))
    assert front == 3 and picture.format == "JPEG" and picture.size == (500, 500)
    assert np.abs(np.asarray(picture, int) - np.asarray(COVER, int)).mean() < 2

    tag(bare)
    assert [kind for kind, _ in found(bare)] == [3, 4]
    for _ in range(2):  # the second time it replaces its own
        embed(bare, bare, COVER)
        assert found(bare) == [(3, data), (4, b"back")]
    assert "Sōran" in title(bare) and sound(bare) == sound(copy) and os.stat(bare).st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["out", f"song{kind}"]


def test_id3_tags_keep_their_version_and_frames_that_another_has_no_name_for(tmp_path: Path) -> None:
    def frames(*named: tuple[str, bytes]) -> bytes:
        data = b"".join(struct.pack(">4sIH", name.encode(), len(text), 0) + text for name, text in named)
        return b"ID3\x03\0\0" + bytes([0, 0, len(data) >> 7, len(data) & 127]) + data
    path = tmp_path / "x.mp3"
    path.write_bytes(frames(("TYER", b"\x001999"), ("TSIZ", b"\x0012"), ("TSOP", b"\0Kidjo, A"), ("XYZW", b"own"))
                     + MP3)
    embed(path, path, COVER)
    tags = id3.ID3(path, translate=False)
    assert tags.version == (2, 3, 0) and tags["TYER"] == "1999" and tags["TSIZ"] == "12" and tags["TSOP"] == "Kidjo, A"
    assert any(b"own" in frame for frame in tags.unknown_frames) and [kind for kind, _ in found(path)] == [3]
    old = b"TT2\0\0\x06\0Soran"
    path.write_bytes(b"ID3\x02\0\0" + bytes([0, 0, 0, len(old)]) + old + MP3)
    embed(path, path, COVER)
    assert id3.ID3(path).version == (2, 4, 0) and id3.ID3(path)["TIT2"] == "Soran"
    path.write_bytes(MP3 + b"TAG" + b"Soran".ljust(30, b"\0") + bytes(95))
    embed(path, path, COVER)
    assert id3.ID3(path)["TIT2"] == "Soran" and path.read_bytes()[-128:-120] == b"TAGSoran"


def test_an_ogg_file_keeps_picture_blocks_that_can_t_be_read(tmp_path: Path) -> None:
    path = song(tmp_path, ".ogg")
    tags = oggvorbis.OggVorbis(path)
    tags["metadata_block_picture"] = ["%%", base64.b64encode(b"short").decode()]
    tags.save()
    embed(path, path, COVER)
    assert oggvorbis.OggVorbis(path)["metadata_block_picture"][1:] == ["%%", base64.b64encode(b"short").decode()]


def test_opus_in_a_file_called_ogg_is_known(tmp_path: Path) -> None:
    path = tmp_path / "x.ogg"
    path.write_bytes(audio(".opus"))
    embed(path, path, COVER)
    assert isinstance(mutagen.File(path), oggopus.OggOpus) and [kind for kind, _ in found(path)] == [3]


@pytest.mark.skipif(not CLIPS, reason="needs ../shared/data/clips")
def test_a_real_ogg_file_keeps_every_packet_of_sound(tmp_path: Path) -> None:
    copy = tmp_path / "copy.ogg"
    embed(CLIPS[0], copy, COVER.resize((1500, 1500)))
    assert sound(copy) == sound(CLIPS[0]) and [kind for kind, _ in found(copy)] == [3]
    before, after = oggvorbis.OggVorbis(CLIPS[0]), oggvorbis.OggVorbis(copy)
    assert after.info.length == before.info.length and set(before.tags).issubset(after.tags)


@pytest.mark.parametrize("kind", AUDIO_SUFFIXES)
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:20], lambda data: bytes(2000)],
                         ids=["empty", "cut", "zeros"])
def test_a_damaged_file_is_refused_before_anything_is_written(
        tmp_path: Path, kind: str, damage: Callable[[bytes], bytes]) -> None:
    path = song(tmp_path, kind)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"song{kind} can't be read, it is damaged or no {kind}"):
        targets([path], tmp_path, in_place=True)
    with pytest.raises(ValueError, match="damaged"):
        embed(path, tmp_path / "copy", COVER)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(("names", "in_place", "message"), [
    ([], False, "expected the paths of audio files"),
    (["x.txt"], False, "expected an audio file of a kind that has tags: .mp3, .flac, .ogg, .opus, .wav, .m4a"),
    (["missing.mp3"], True, "missing.mp3: no such file"),
    (["a.mp3", "b/a.mp3"], False, "written over another of these files"),
    (["a.mp3", "a.mp3"], True, "written over another of these files"),
    (["a.mp3", "link.mp3"], True, "written over another of these files"),
    (["a.mp3", "a.covergen.mp3"], False, "written over another of these files"),
    (["folder.mp3"], False, "folder.covergen.mp3 can't be written"),
])
def test_files_that_can_t_be_embedded_in_are_refused(
        tmp_path: Path, names: list[str], in_place: bool, message: str) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "folder.covergen.mp3").mkdir()
    for name in ("a", "b/a", "a.covergen", "folder"):
        song(tmp_path, ".mp3", name)
    os.symlink("a.mp3", tmp_path / "link.mp3")
    with pytest.raises(ValueError, match=message):
        targets([tmp_path / name for name in names], tmp_path, in_place)


def test_a_link_is_followed_and_a_failure_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch) -> None:
    path, link = song(tmp_path, ".flac"), tmp_path / "link.flac"
    os.symlink(path, link)
    assert targets([link], tmp_path, in_place=True) == {link: path}
    before = path.read_bytes()

    def full(self: flac.FLAC) -> None:
        raise mutagen.MutagenError("no space left")
    monkeypatch.setattr(flac.FLAC, "save", full)
    with pytest.raises(ValueError, match=r"song\.flac: its tags can't be written: no space left"):
        embed(path, path, COVER)
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["link.flac", "song.flac"]


def test_without_mutagen_the_message_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mutagen", None)
    with pytest.raises(ValueError, match="pip install mutagen"):
        targets([song(tmp_path, ".wav")], tmp_path, in_place=False)
