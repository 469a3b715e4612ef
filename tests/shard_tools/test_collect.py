"""Collecting a music library: what becomes of every file, and that bytes depend on the library and nothing else."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from shard_tools import extractors
from shard_tools.collect import collect
from shard_tools.core.errors import BadFileError
from shard_tools.dataset.schema import Schema, read_schema
from shard_tools.extractors import EXTRACTORS, Extractor, audio
from shard_tools.pack import pack
from shard_tools.shards.index import open_index
from tests.support import music, raw_data
from tests.support.paths import ROOT
from tests.support.waiting import wait_for

pytest.importorskip("mutagen")
pytest.importorskip("av")

RELEASE, LONG, ODD = music.RELEASE, music.LONG, music.ODD
EXTRACTED: list[str] = []  # by ``loudness``


def loudness() -> Extractor:
    """An extractor that takes no time, and fails where a song is beyond its sixth second."""
    def of_audio(path: Path, start: float, seconds: float | None) -> np.ndarray:
        EXTRACTED.append(path.name)
        if start > 6:
            raise BadFileError("silent audio", "after 6 s")
        samples = np.concatenate(list(audio.pieces(path, start, seconds, 8000)))
        return np.array([np.abs(samples).mean(), start], np.float32)
    return Extractor(Schema("loudness", 1, ("loudness", "start")), of_audio=of_audio)


@pytest.fixture
def quick(monkeypatch) -> partial:
    """``collect`` in this process with ``loudness``."""
    monkeypatch.setitem(EXTRACTORS, "loudness", f"{__name__}:loudness")
    monkeypatch.setattr(extractors, "_loaded", {})
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a busy disk takes 20 ms for one
    monkeypatch.setattr(os, "sync", lambda: None)
    return partial(collect, extractor="loudness", workers=1, max_failure_rate=1.0)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return music.library(tmp_path_factory.mktemp("library") / "music")


@pytest.fixture(scope="module")
def collected(library, tmp_path_factory) -> Path:
    """The library with vectors by Essentia."""
    pytest.importorskip("essentia")
    out = tmp_path_factory.mktemp("collected") / "out"
    before = state(library)
    assert collect(str(library), str(out), max_failure_rate=0.5, workers=1) == 0
    assert state(library) == before
    return out


def state(folder: Path) -> dict[str, tuple]:
    """Every file of a library with its hash and time."""
    return {str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path in folder.rglob("*")}


def hashes(folder: Path) -> dict[str, str]:
    """Every file, hidden ones too, by relative path."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


def table(out: Path) -> dict[str, dict[str, str]]:
    """The rows of tracks.csv by path."""
    with open(out / "tracks.csv", encoding="utf-8", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def quarantine(out: Path) -> dict[str, str]:
    lines = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    return {line["path"]: line["reason"] for line in lines}


def test_every_file_of_a_library_is_a_sample_or_has_a_reason(collected):
    rows = table(collected)
    assert {path: (row["genre"], row["cover"]) for path, row in rows.items()} == {
        "Band/01.mp3": ("rock", "embedded"), f"{ODD}/{ODD}.flac": ("indie", "album"),
        f"Band/{LONG}": ("unknown", "album"), "x/1.ogg": ("rap", "album"), "y/2.m4a": ("шансон", "embedded"),
        "Дом/CD1/песня ☃.opus": ("metal", "file"), "Дом/CD2/2.wav": ("test_music", "file"),
        "hits/1.mp3": ("pop", "embedded"), "latin/caf\\udce9.mp3": ("unknown", "file")}
    found = quarantine(collected)
    assert found.pop("cut/cut.flac") in ("too short", "damaged audio")
    assert found == {"heap/short.wav": "too short", "heap/bomb.mp3": "no cover", "heap/bare.flac": "no cover",
                     "heap/corrupt.mp3": "unreadable", "heap/empty.ogg": "empty file"}
    assert sorted(os.listdir(collected)) == [".collect", "audio", "cover", "quarantine.jsonl", "tracks.csv"]


def test_tracks_of_an_album_have_one_group_one_cover_and_their_ids(collected):
    rows, albums, covers = table(collected), {}, {}
    for path, row in rows.items():
        albums.setdefault(row["group"], set()).add(path[0])
        cover = (collected / "cover" / row["genre"] / f"{row['stem']}.jpg").read_bytes()
        assert covers.setdefault(row["group"], cover) == cover
    assert sorted(map(sorted, albums.values())) == [["B", "I"], ["h"], ["l"], ["x", "y"], ["Д"]]
    assert covers[RELEASE] == music.picture(2)  # a sound JPEG, as it was
    assert rows["x/1.ogg"]["stem"] == f"{music.RECORDING}-0__{RELEASE}"
    assert rows[f"Band/{LONG}"]["artist"] == "A, B C"
    assert max(len(data) for data in covers.values()) < 500_000


def test_the_vectors_are_those_of_essentia(library, collected):
    extractor = extractors.load("essentia")
    row = table(collected)["y/2.m4a"]
    vector = np.load(collected / "audio" / row["genre"] / f"{row['stem']}.npy")
    np.testing.assert_array_equal(vector, extractor.of_audio(library / "y/2.m4a", 0.0, float(row["excerpt_seconds"])))
    schema = read_schema(collected / "audio")
    assert (schema.sha256, schema.excerpt) == (extractor.schema.sha256, {"seconds": 30.0, "count": 1})


def test_pack_reads_what_was_collected(collected, tmp_path):
    assert pack(str(collected), str(tmp_path / "shards"), resolution=16, workers=1) == 0
    index = open_index(tmp_path / "shards", "train")
    assert (index.metadata["samples"], index.metadata["groups"], index.metadata["ignored_files"]) == (9, 5, 0)


def test_kill_9_and_rerun_gives_the_same_bytes_and_extracts_nothing_twice(library, collected, tmp_path):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "shard_tools.collect", "--source", library, "--out", out, "--workers", "2",
             "--max_failure_rate", "0.5"]
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(out.glob(".collect/excerpts/*/*.json"))) >= 3, "three songs", by=[process], pause=0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    cached = {path: path.stat().st_mtime_ns for path in out.glob(".collect/excerpts/*/*.json")}
    assert 3 <= len(cached) < 9
    done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    assert hashes(out) == hashes(collected)
    assert {path: path.stat().st_mtime_ns for path in cached} == cached
    assert "next: python -m shard_tools.dedup" in done.stdout
    assert "<" in done.stderr  # the time left


def small(root: Path) -> Path:
    for number in range(3):
        music.song(root / f"a/{number}.wav", 3.0, number, music.picture(1), title="t", albumartist="A", album="B")
    music.song(root / "b/1.wav", 3.0, 3)
    return root


def test_a_kill_before_any_rename_or_deletion_changes_nothing(quick, tmp_path, monkeypatch):
    source = small(tmp_path / "music")
    quick(str(source), str(tmp_path / "whole"))
    expected = hashes(tmp_path / "whole")
    out = tmp_path / "out"
    for step in range(1, 200):
        with monkeypatch.context() as patch:
            raw_data.kill_before(patch, step, ("replace", "unlink", "link", "rmdir", "mkdir"))
            try:
                quick(str(source), str(out))
                break
            except raw_data.Killed:
                pass
        quick(str(source), str(out))
        assert hashes(out) == expected, f"killed at step {step}"
        if step % 2:  # else go on in a finished folder
            shutil.rmtree(out)
    assert step > 30


def test_a_library_that_was_moved_gives_the_same_bytes(quick, tmp_path):
    source = small(tmp_path / "music")
    quick(str(source), str(tmp_path / "out"))
    moved = shutil.copytree(source, tmp_path / "elsewhere/my music", copy_function=shutil.copy2)
    quick(str(moved), str(tmp_path / "moved"))
    assert hashes(tmp_path / "moved") == hashes(tmp_path / "out")


def test_a_library_that_has_grown_costs_the_hearing_of_what_is_new(quick, tmp_path):
    source, own = small(tmp_path / "music"), tmp_path / "map.csv"
    own.write_text("rock,Hard & Heavy")
    quick(str(source), str(tmp_path / "out"))
    music.song(source / "a/9.wav", 3.0, 9, genre="Rock", albumartist="A", album="B")
    (source / "a/0.wav").unlink()
    EXTRACTED.clear()
    quick(str(source), str(tmp_path / "out"), cover_side=32, genre_map=str(own))
    assert EXTRACTED == ["9.wav"]
    quick(str(source), str(tmp_path / "fresh"), cover_side=32, genre_map=str(own))
    visible = [{name: found for name, found in hashes(tmp_path / out).items() if not name.startswith(".collect")}
               for out in ("out", "fresh")]
    assert visible[0] == visible[1]
    assert {row["genre"] for row in table(tmp_path / "out").values()} == {"unknown", "hard_&_heavy"}


def test_excerpts_are_samples_and_one_that_cannot_be_heard_is_left_out(quick, tmp_path):
    music.song(tmp_path / "music/long.wav", 10.0, front=music.picture(1), title="long")
    music.song(tmp_path / "music/short.wav", 3.5, title="short")
    quick(str(tmp_path / "music"), str(tmp_path / "out"), excerpt=3, excerpts=5)
    with open(tmp_path / "out/tracks.csv", newline="") as file:
        rows = sorted((row["path"], row["stem"][36:39], row["seconds"], row["excerpt_start"], row["excerpt_seconds"])
                      for row in csv.DictReader(file))
    assert rows == [("long.wav", "-0_", "10.000", "0.167", "3.000"), ("long.wav", "-1_", "10.000", "3.500", "3.000"),
                    ("short.wav", "-0_", "3.500", "0.250", "3.000")]
    for kind in ("cover/*/*.jpg", "audio/*/*.npy"):
        assert len(list((tmp_path / "out").glob(kind))) == 3
    assert read_schema(tmp_path / "out/audio").excerpt == {"seconds": 3.0, "count": 5}
    quick(str(tmp_path / "music"), str(tmp_path / "all"), excerpt=None)
    assert {row["excerpt_seconds"] for row in table(tmp_path / "all").values()} == {"10.000", "3.500"}
    assert read_schema(tmp_path / "all/audio").excerpt == {}


def test_compilations_go_on_request_and_tracks_without_a_cover_stay_on_request(quick, tmp_path):
    source, out, one = tmp_path / "music", tmp_path / "out", music.picture(1)
    music.song(source / "hits/1.wav", 3.0, front=one, albumartist="K", album="Hits", compilation="1")
    music.song(source / "hits/2.wav", 3.0, front=one, albumartist="K", album="Hits")
    music.song(source / "heap/1.wav", 3.0, front=one, compilation="1")
    music.song(source / "heap/2.wav", 3.0, front=one)
    music.song(source / "bare/1.wav", 3.0, title="bare")
    assert quick(str(source), str(out), no_compilations=True, keep_coverless=True, max_failure_rate=0.0) == 0
    assert {path: row["cover"] for path, row in table(out).items()} == {"heap/2.wav": "embedded", "bare/1.wav": ""}
    assert quarantine(out) == dict.fromkeys(("hits/1.wav", "hits/2.wav", "heap/1.wav"), "compilation")
    assert quick(str(source), str(out), max_failure_rate=0.1) == 1
    assert (len(table(out)), quarantine(out)) == (4, {"bare/1.wav": "no cover"})


def test_what_cannot_be_done_is_said_before_any_work(quick, tmp_path, monkeypatch):
    source = small(tmp_path / "music")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").touch()
    (tmp_path / "empty").mkdir()
    before = state(source)
    for words, options, message in (
            ((source, source / "out"), {}, "lies in --source"), ((source, tmp_path / "full"), {}, "letter.txt"),
            ((source / "a/0.wav", tmp_path / "o"), {}, "not a folder"), ((source, tmp_path / "o"), {"excerpt": 2}, "3"),
            ((source, tmp_path / "o"), {"extractor": "acousticbrainz"}, "does not read audio"),
            ((source, tmp_path / "o"), {"extractor": "esentia"}, "essentia"),
            ((source, tmp_path / "o"), {"model": "x"}, "--extractor clap"),
            ((source, tmp_path / "o"), {"excerpt": None, "excerpts": 2}, "--excerpt 30"),
            ((tmp_path / "empty", tmp_path / "o"), {}, "0 audio files")):
        with pytest.raises(ValueError, match=message):
            quick(*map(str, words), **options)
    quick(str(source), str(tmp_path / "out"))
    other = Extractor(Schema("loudness", 2, ("loudness", "start")), of_audio=loudness().of_audio)
    monkeypatch.setattr(extractors, "load", lambda name: other)
    with pytest.raises(ValueError, match=r"holds vectors of loudness 1 .* would be of loudness 2"):
        quick(str(source), str(tmp_path / "out"))
    assert state(source) == before
