"""What a music library says of itself: tags, genres, albums and covers of real files, each format alike."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shard_tools.core.errors import BadFileError
from shard_tools.core.parallel import Pool
from shard_tools.dataset.genres import read_map, to_folder, to_genre
from shard_tools.dataset.layout import UNKNOWN, album_of, open_layout
from shard_tools.dataset.source import Entry, open_source
from shard_tools.music.albums import make_tracks
from shard_tools.music.covers import CoverTask, cover_candidates, cover_source, make_cover, shrink_cover
from shard_tools.music.excerpt_cache import ExtractTask, cache_path, extract_all
from shard_tools.music.library import walk
from shard_tools.music.tags import Tags, read_picture, read_tags
from tests.support import music

pytest.importorskip("mutagen")
pytest.importorskip("av")

KINDS = (".mp3", ".flac", ".ogg", ".opus", ".m4a", ".wav")
RELEASE, RECORDING = music.RELEASE, music.RECORDING
LIMIT = 64_000_000


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_says_the_same(tmp_path, kind):
    front, back = music.picture(1), music.picture(2)
    path = music.song(tmp_path / f"song{kind}", pictures={4: back, 3: front} if kind != ".m4a" else {3: front},
                      artist="Sigur\n Rós", albumartist="V", album="Ágætis", title="Svefn", date="1999",
                      genre="Post-Rock", tracknumber="02", discnumber="1", musicbrainz_albumid=RELEASE.upper(),
                      musicbrainz_trackid=RECORDING, musicbrainz_albumtype="album; Compilation")
    tags = read_tags(path)
    assert tags._replace(pictures=()) == Tags(
        "Sigur Rós", "V", "Ágætis", "Svefn", "1999", "Post-Rock", "1", "2", RELEASE, RECORDING, compilation=True)
    hashes = {picture.kind: picture.sha256 for picture in tags.pictures}
    assert read_picture(path, hashes[3]) == front
    if kind != ".m4a":
        assert read_picture(path, hashes[4]) == back


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("said", [{"compilation": "1"}, {"albumartist": "various  artists"},
                                  {"releasetype": "album;compilation"}])
def test_compilations_are_known_by_flag_type_and_artist(tmp_path, kind, said):
    assert read_tags(music.song(tmp_path / f"a{kind}", 0.1, **said)).compilation
    assert not read_tags(music.song(tmp_path / f"b{kind}", 0.1, compilation="0", albumartist="Various")).compilation


def test_files_that_cannot_be_read_say_why_and_not_where(tmp_path):
    (tmp_path / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "text.flac").write_bytes(b"no music")
    (tmp_path / "empty.ogg").touch()
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.m4a")
    for name, reason in (("noise.mp3", "unreadable"), ("text.flac", "unreadable"), ("empty.ogg", "empty file"),
                         ("folder.wav", "unreadable"), ("pipe.m4a", "unreadable"), ("none.mp3", "unreadable")):
        with pytest.raises(BadFileError) as caught:
            read_tags(tmp_path / name)
        assert caught.value.reason == reason
        assert caught.value.detail and str(tmp_path) not in caught.value.detail


@pytest.mark.parametrize(("tag", "genre"), [
    ("Rap", "rap"), ("hip hop", "rap"), ("Rap & Hip-Hop", "rap"), ("Electronica", "electronic"), ("NU METAL", "metal"),
    ("Indie Pop", "indie"), ("R&B/Soul", "r&b"), ("New Age", "new_age"), ("Rock; Jazz", "rock"), (" JAZZ ", "jazz"),
    ("Post-Punk", "post_punk"), ("Drum & Bass", "drum_&_bass"), ("Шансон", "шансон"), ("", UNKNOWN), ("../..", UNKNOWN),
    ("Test", "test_music"), ("dev", "dev_music"), ("cover.jpg", "cover_jpg"), (".hidden", "hidden"), ("a\x00b", "a_b")])
def test_the_thesis_map_then_the_tag_itself(tag, genre):
    assert to_genre(tag) == genre


def test_an_own_map_goes_first_and_must_be_a_table(tmp_path):
    path = tmp_path / "map.csv"
    path.write_text("\ufefftag,genre\nSinger/Songwriter,Folk\n\nRock,Loud Music\n", encoding="utf-8")
    own = read_map(path)
    assert [to_genre(tag, own) for tag in ("singer/songwriter", "Rock", "rock/pop", "Jazz")] == [
        "folk", "loud_music", "loud_music", "jazz"]
    for text in ("rock", "rock,a,b", "rock,...", ",rock", "rock,a\nROCK,b"):
        path.write_text(text)
        with pytest.raises(ValueError, match="--genre_map"):
            read_map(path)


def test_a_genre_is_a_folder_that_the_layout_reads_as_a_genre(tmp_path):
    tags = ("train", "Valid", "x" * 300, "日" * 100, "__MACOSX", "con.npy", "cover", "audio", "a/b")
    names = {to_folder(tag) for tag in tags}
    assert len(names) == len(tags)
    for name in names:
        for part in ("cover", "audio"):
            (tmp_path / part / name).mkdir(parents=True)
        (tmp_path / "cover" / name / "s.jpg").write_bytes(b"")
        (tmp_path / "audio" / name / "s.npy").write_bytes(b"")
    assert {item.genre for item in open_layout(open_source(tmp_path))} == names


def albums(**found: Tags) -> dict[str, str]:
    """The album of each path, as the first path that has it."""
    first: dict[str, str] = {}
    return {track.path: first.setdefault(track.album.id, track.path) for track in make_tracks(
        {name.replace("__", "/"): tags for name, tags in found.items()})}


def test_albums_are_known_by_release_then_by_artist_and_title_then_by_folder():
    assert albums(
        a__1=Tags(album="A", release_id=RELEASE), b__1=Tags(album="B", release_id=RELEASE),
        c__1=Tags(album_artist="The Band", album="One"), d__1=Tags(artist="x", album_artist="the  BAND", album="ONE "),
        e__1=Tags(artist="The Band", album="One"), e__2=Tags(artist="Others", album="Two"),
        f__1=Tags(artist="P", album="Hits"), f__2=Tags(artist="Q", album="Hits"), g__1=Tags(artist="P", album="Hits"),
        h__1=Tags(artist="P", album="Unknown Album"), h__2=Tags(title="no album"), i__CD1__1=Tags(),
        i__CD2__1=Tags(), i__live__1=Tags(),
    ) == {"a/1": "a/1", "b/1": "a/1", "c/1": "c/1", "d/1": "c/1", "e/1": "c/1", "e/2": "e/2", "f/1": "f/1",
          "f/2": "f/1", "g/1": "g/1", "h/1": "h/1", "h/2": "h/1", "i/CD1/1": "i/CD1/1", "i/CD2/1": "i/CD1/1",
          "i/live/1": "i/live/1"}


def test_stems_are_the_ids_where_there_are_any_and_never_shared():
    both = Tags(release_id=RELEASE, track_id=RECORDING, title="t")
    named = both._replace(track_id="")
    tracks = make_tracks({"a.mp3": both, "a.flac": both, "b.mp3": named, "b.flac": named, "caf\udce9.mp3": Tags(),
                          "x/1.mp3": Tags(), "x/2.mp3": Tags(), "x/2.ogg": Tags()})
    stems = {track.path: track.stem(0) for track in tracks}
    assert stems["a.flac"] == f"{RECORDING}-0__{RELEASE}"
    assert len(set(stems.values())) == len(stems)
    assert all(album_of(track.stem(7)) == track.album.id for track in tracks)


def picked(root: Path) -> dict[str, tuple[str, str]]:
    """For each song of a library the file that its cover is taken from, and what kind of place that is."""
    library = walk(root, KINDS)
    tracks = make_tracks({entry.path: read_tags(root / entry.path) for entry in library.songs})
    entries = {entry.path: entry for entry in library.songs}
    (root.parent / "covers").mkdir(exist_ok=True)
    found = {}
    for album in {track.album for track in tracks}:
        members = [track for track in tracks if track.album == album]
        for path, options in cover_candidates(members, entries, library).items():
            task = CoverTask(root, root.parent / "covers", options, 1024, LIMIT)
            number, _ = make_cover(task)
            track = next(track for track in members if track.path == path)
            source = cover_source(track, options[number]) if number >= 0 else ""
            found[path] = (options[number].entry.path if number >= 0 else "", source)
    return found


def test_the_front_cover_of_an_album_then_a_file_then_other_pictures(tmp_path):
    root, one, two = tmp_path / "music", music.picture(1), music.picture(2)
    known = {"albumartist": "A", "album": "B"}
    for number, front in enumerate((two, one, one, None)):  # the commonest, for all
        music.song(root / f"a/{number}.mp3", 0.1, front=front, **known)
    (root / "a/cover.jpg").write_bytes(two)
    music.song(root / "b/CD1/1.flac", 0.1, pictures={4: one}, albumartist="A", album="C")
    music.song(root / "b/Disc 2/1.ogg", 0.1, albumartist="A", album="C")
    (root / "b/FRONT.PNG").write_bytes(music.picture(3, kind="PNG"))
    (root / "b/folder.jpg").write_bytes(one[:-300])  # the likeliest, but cut
    music.song(root / "c/1.m4a", 0.1, front=b"no picture", pictures={4: b"\xff\xd8\xff"}, albumartist="A", album="D")
    music.song(root / "c/2.opus", 0.1, pictures={8: two}, albumartist="A", album="D")
    for number, front in enumerate((one, two, None)):  # a heap of singles
        music.song(root / f"d/{number}.wav", 0.1, front=front)
    for number, front in enumerate((one, one, None)):  # an album without tags
        music.song(root / f"e/{number}.wav", 0.1, front=front)
    assert picked(root) == {
        "a/0.mp3": ("a/1.mp3", "album"), "a/1.mp3": ("a/1.mp3", "embedded"), "a/2.mp3": ("a/1.mp3", "embedded"),
        "a/3.mp3": ("a/1.mp3", "album"), "b/CD1/1.flac": ("b/FRONT.PNG", "file"),
        "b/Disc 2/1.ogg": ("b/FRONT.PNG", "file"),
        "c/1.m4a": ("c/2.opus", "album"), "c/2.opus": ("c/2.opus", "embedded"),
        "d/0.wav": ("d/0.wav", "embedded"), "d/1.wav": ("d/1.wav", "embedded"), "d/2.wav": ("", ""),
        "e/0.wav": ("e/0.wav", "embedded"), "e/1.wav": ("e/0.wav", "embedded"), "e/2.wav": ("e/0.wav", "album")}


def test_a_sound_jpeg_stays_as_it_is_and_all_else_becomes_one():
    plain = music.picture(1, (100, 80))
    assert shrink_cover(plain, 100, LIMIT) == plain

    def size(data: bytes, side: int = 100) -> tuple[int, int]:
        image = Image.open(io.BytesIO(shrink_cover(data, side, LIMIT)))
        assert (image.format, image.mode) == ("JPEG", "RGB") and not image.getexif()
        return image.size

    exif = Image.Exif()
    exif[0x0112] = 6
    assert size(plain, 50) == (50, 40)
    assert size(music.picture(1, (100, 80), exif=exif.tobytes())) == (80, 100)
    assert size(music.picture(1, (100, 80), "PNG", "L")) == (100, 80)
    assert size(music.picture(1, (6500, 6200), quality=70), 1024) == (1024, 977)  # 40 megapixels
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    file = io.BytesIO()
    clear.save(file, "PNG")
    assert np.asarray(Image.open(io.BytesIO(shrink_cover(file.getvalue(), 100, LIMIT)))).min() == 255
    with pytest.raises(BadFileError, match="too many pixels"):
        shrink_cover(music.bomb(), 100, LIMIT)


def test_a_library_is_walked_once_whatever_links_there_are(tmp_path):
    root, outside = tmp_path / "music", tmp_path / "outside"
    for path in (root / "z/1.mp3", root / "2.FLAC", root / ".hidden/3.mp3", root / "._2.mp3", outside / "4.ogg",
                 outside / "5.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    for link, target in (("a", root / "z"), ("up", ".."), ("self", "."), ("b", outside), ("c", outside),
                         ("z/back", root), ("same.mp3", root / "z/1.mp3"), ("other.ogg", outside / "4.ogg"),
                         ("gone.mp3", "nowhere")):
        (root / link).symlink_to(target)
    assert [entry.path for entry in walk(root, KINDS).songs] == ["2.FLAC", "b/4.ogg", "gone.mp3", "z/1.mp3"]


def test_a_file_that_kills_the_process_is_left_out(tmp_path):
    names = [f"{number}-{'deadly' if number in (1, 4) else 'fine'}" for number in range(7)]
    (tmp_path / "cache").mkdir()
    tasks = [ExtractTask(tmp_path, name, music.fragile, cache_path(tmp_path / "cache", Entry(name, 1, 0)))
             for name in names]
    found = {task.path: error and error.reason for task, error in extract_all(tasks, Pool(2))}
    assert found == {name: "crashes the decoder" if "deadly" in name else None for name in names}
    assert [task.cache.exists() for task in tasks] == ["fine" in name for name in names]
    assert not list(tmp_path.glob("cache/*/*.begun"))
