"""The command ``features``: what it writes for tracks, tables, dumps and vectors, and how it goes on and refuses."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from shard_tools.dataset.schema import read_schema
from shard_tools.extractors import load
from shard_tools.extractors.acousticbrainz import NAMES, NAMES_559
from shard_tools.extractors.essentia import NAMES as ESSENTIA
from shard_tools.extractors.inputs import archive_inputs
from shard_tools.features import features
from shard_tools.pack import pack
from shard_tools.shards.index import open_index
from tests.shard_tools.extractors.test_extractors import SHARED, document_of, noise, real, walk, wav
from tests.support import raw_data
from tests.support.runs import ROOT, environment
from tests.support.waiting import wait_for


def put_json(folder: Path, names: list[str], of: tuple[str, ...] = NAMES) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(document_of(of, seed)))
    return folder


def quarantine(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == sorted(line["path"] for line in lines)
    return {line["path"]: line["reason"] for line in lines}


def vectors(out: Path) -> dict[str, np.ndarray]:
    return {str(path.relative_to(out)): np.load(path) for path in sorted(out.rglob("*.npy"))}


def brainz(source: Path, out: Path, **options) -> int:
    return features(str(out), str(source), **{"extractor": "acousticbrainz", "workers": 1, **options})


@real
def test_the_real_acousticbrainz_files_give_580_and_559_numbers(tmp_path):
    for name, size in (("acousticbrainz", 580), ("acousticbrainz-559", 559)):
        assert brainz(SHARED / "acousticbrainz", tmp_path / name, extractor=name) == 0
        found = vectors(tmp_path / name)
        assert len(found) == 2 and all(vector.shape == (size,) for vector in found.values())
        for path, vector in found.items():
            document = json.loads((SHARED / "acousticbrainz" / path).with_suffix(".json").read_bytes())
            if size == 580:
                expected = walk({key: document[key] for key in ("lowlevel", "rhythm", "tonal")})
                np.testing.assert_allclose(vector, expected, rtol=1e-6)
            else:
                np.testing.assert_array_equal(vector, vectors(tmp_path / "acousticbrainz")[path][
                    [NAMES.index(name) for name in NAMES_559]])


def test_a_folder_keeps_its_folders_and_says_what_its_numbers_are(tmp_path):
    names = ["a.json", "rock/a.b.json", "rock/Ünï & \"x\".JSON", "rock/deep/er/c.json"]
    source = put_json(tmp_path / "in", names)
    (source / "._a.json").write_text("x")
    (source / ".hidden").mkdir()
    (source / "rock/loop").symlink_to(source)
    assert brainz(source, tmp_path / "out") == 0
    found = vectors(tmp_path / "out")
    assert sorted(found) == sorted(f"{name[:-5]}.npy" for name in names)
    for name in names:
        expected = load("acousticbrainz").of_json((source / name).read_bytes())
        assert found[f"{name[:-5]}.npy"].dtype == np.float32
        np.testing.assert_array_equal(found[f"{name[:-5]}.npy"], expected)
    assert read_schema(tmp_path / "out") == load("acousticbrainz").schema
    assert (tmp_path / "out/quarantine.jsonl").read_bytes() == b""
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.npy", "rock", "features.json",
                                                                    "quarantine.jsonl"}


def test_bad_files_are_named_and_too_many_of_them_fail(tmp_path, capsys):
    source = put_json(tmp_path / "in", [f"{i}.json" for i in range(20)])
    (source / "cut.json").write_bytes((source / "1.json").read_bytes()[:500])
    assert brainz(source, tmp_path / "out") == 0  # 1 of 21
    assert quarantine(tmp_path / "out") == {"cut.json": "truncated JSON"}
    (source / "old.json").write_text(json.dumps(document_of(ESSENTIA)))
    os.mkfifo(source / "pipe.json")
    (source / "gone.json").symlink_to("/nowhere")
    assert brainz(source, tmp_path / "out") == 1
    assert quarantine(tmp_path / "out") == {
        "cut.json": "truncated JSON", "old.json": "missing feature", "pipe.json": "unreadable",
        "gone.json": "unreadable"}
    said = capsys.readouterr()
    assert "4 bad files to 20 vectors are 16.7%, more than --max_failure_rate 5.0%" in said.err
    assert "20 of them from before; 0 in" in said.out
    assert brainz(source, tmp_path / "out", max_failure_rate=0.2) == 0


def test_any_number_of_workers_writes_the_same_bytes(tmp_path):
    source = put_json(tmp_path / "in", [f"{i % 3}/{i}.json" for i in range(50)])
    (source / "cut.json").write_text("{")
    for workers in (1, 2):
        assert brainz(source, tmp_path / f"{workers}", workers=workers) == 0
    assert raw_data.hashes(tmp_path / "1") == raw_data.hashes(tmp_path / "2")


def test_killed_and_run_again_it_goes_on_and_ends_with_the_same_bytes(tmp_path):
    source = put_json(tmp_path / "in", [f"{i}.json" for i in range(400)])
    (source / "cut.json").write_text("{")
    flags = ["--source", str(source), "--extractor", "acousticbrainz", "--out"]
    process = subprocess.Popen([sys.executable, "-m", "shard_tools.features", *flags, str(tmp_path / "killed")],
                               cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: len(list((tmp_path / "killed").rglob("*.npy"))) >= 40, "40 vectors", by=[process], pause=0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.npy")}
    assert 40 <= len(there) < 400
    (tmp_path / "killed/7.npy").write_bytes(b"\x93NUMPY")  # what a crash of the machine may leave
    for out in ("killed", "whole"):
        assert brainz(source, tmp_path / out) == 0
    assert raw_data.hashes(tmp_path / "killed") == raw_data.hashes(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == when for path, when in there.items() if path.name != "7.npy")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    source = put_json(tmp_path / "in", ["a.json"])
    put_json(tmp_path / "in2", ["a.json"], ESSENTIA)
    assert brainz(source, tmp_path / "out") == 0
    before = raw_data.hashes(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds vectors of acousticbrainz 1 .*these would be of essentia 1 "):
        brainz(tmp_path / "in2", tmp_path / "out", extractor="essentia")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"mine is not empty \(found a.npy\)"):
        brainz(source, tmp_path / "mine")
    with pytest.raises(ValueError, match="lies in --source"):
        brainz(source, source / "out")
    with pytest.raises(ValueError, match="holds nothing that"):
        brainz(tmp_path / "mine", tmp_path / "new")
    assert raw_data.hashes(tmp_path / "out") == before and not (tmp_path / "out/.features").exists()
    assert not (tmp_path / "new").exists() and list((tmp_path / "mine").iterdir()) == [tmp_path / "mine/a.npy"]


@pytest.mark.parametrize(("options", "said"), [
    ({"extractor": "clasp", "source": "in"}, "did you mean 'clap'"), ({}, "either --source or --pairs"),
    ({"source": "in", "pairs": "in"}, "either --source or --pairs"), ({"source": "nowhere"}, "does not exist"),
    ({"source": "in", "extractor": "acousticbrainz", "model": "x"}, "--model is an option of --extractor clap"),
    ({"source": "in", "keep_json": True, "extractor": "acousticbrainz"}, "--keep_json is an option of"),
    ({"source": "in", "components": 5}, "--components is an option of --extractor pca"),
    ({"source": "in", "excerpts": 3}, "needs the length of one: --excerpt 30"),
    ({"source": "in", "excerpt": 2.0}, "--excerpt 2.0: expected 3 to 3,600"),
    ({"source": "in", "extractor": "acousticbrainz"}, "holds nothing that acousticbrainz reads: .json"),
    ({"source": "in/a.txt"}, r"is nothing that essentia reads: .mp3, .*\.tar\.zst"),
    ({"source": "in/a.tar", "extractor": "acousticbrainz"}, "is neither a file nor a folder"),
    ({"source": "in", "extractor": "pca"}, "holds no vectors"),
    ({"source": "in/a.txt", "extractor": "pca"}, "is not a folder"),
    ({"pairs": "in/a.txt"}, "can't be read .its columns are none.; expected a CSV with the columns audio and cover"),
])
def test_options_that_do_not_fit_are_refused(tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("")
    os.mkfifo(tmp_path / "in/a.tar")
    with pytest.raises(ValueError, match=said):
        features("out", **options)


def test_a_dump_is_read_as_the_folder_that_was_packed_into_it(tmp_path):
    names = [f"dump/{i % 3}/{i}.json" for i in range(40)]
    source = put_json(tmp_path / "in", names)
    for kind, mode in ((".tar", "w"), (".tar.bz2", "w:bz2")):
        with tarfile.open(tmp_path / f"a{kind}", mode) as tar:
            tar.add(source / "dump", "dump")
            for name in ("/tmp/x.json", "../x.json", "dump/0/0.json", "dump/0/0.npy/x.json", "n" * 252 + ".json"):
                data = (source / names[1]).read_bytes()
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
        for workers in (1, 2):
            out = tmp_path / f"{kind}{workers}"
            assert brainz(tmp_path / f"a{kind}", out, workers=workers, max_failure_rate=0.2) == 0
            assert quarantine(out) == {
                "/tmp/x.json": "unsafe name", "../x.json": "unsafe name", "dump/0/0.json": "duplicate stem",
                "dump/0/0.npy/x.json": "unwritable name", "n" * 252 + ".json": "unwritable name"}
    assert brainz(source, tmp_path / "folder") == 0
    expected = {name: value for name, value in raw_data.hashes(tmp_path / "folder").items() if "quarantine" not in name}
    for out in (".tar1", ".tar2", ".tar.bz21"):
        assert expected == {name: value for name, value in raw_data.hashes(tmp_path / out).items()
                            if "quarantine" not in name}


@pytest.mark.parametrize("names", [("a.json", "a.npy/b.json"), ("a.npy/b.json", "a.json")])
def test_of_a_file_and_a_folder_that_need_the_same_name_the_first_in_the_dump_counts(tmp_path, names):
    put_json(tmp_path / "in", names)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            tar.add(tmp_path / "in" / name, name)
    found = list(archive_inputs(tmp_path / "a.tar"))
    assert found[0].name == names[0].removesuffix(".json") and found[1].error.reason == "unwritable name"


def test_of_a_dump_that_is_cut_all_before_the_cut_is_done_and_the_status_is_1(tmp_path, capsys):
    source = put_json(tmp_path / "in", [f"{i}.json" for i in range(30)])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(30):
            tar.add(source / f"{i}.json", f"{i}.json")
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:len(data) // 2])
    assert brainz(tmp_path / "a.tar", tmp_path / "out") == 1
    assert 10 < len(vectors(tmp_path / "out")) < 16
    assert quarantine(tmp_path / "out") == {"a.tar": "damaged archive"}
    assert "a.tar: it can't be read beyond byte" in capsys.readouterr().err


def make_pairs(folder: Path) -> tuple[Path, list[str]]:
    """A table of 12 tracks on 4 albums, and three lines that can't be used."""
    stems = [raw_data.stem(i, 0, i // 3) for i in range(12)]
    put_json(folder / "json", [f"{stem}.json" for stem in stems])
    for album in range(4):
        (folder / f"cover {album}.JPG").write_bytes(raw_data.jpeg(album))
    with open(folder / "pairs.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["audio", "cover", "label", "artist"])
        rows.writerows([f"json/{stem}.json", f"cover {i // 3}.JPG", ("New Age", "R&B")[i % 2], "a, b"]
                       for i, stem in enumerate(stems))
        rows.writerow([f"json/../json/{stems[0]}.json", "cover 1.JPG", "new_age", ""])
        rows.writerow([f"json/{stems[1]}.json", "nowhere.jpg", "Pop", ""])
        rows.writerow(["json/nowhere.json", "cover 1.JPG", "Pop", ""])
    return folder / "pairs.csv", stems


def test_a_table_of_pairs_becomes_a_data_set_that_pack_reads(tmp_path):
    table, stems = make_pairs(tmp_path)
    out = tmp_path / "out"
    assert features(str(out), pairs=str(table), extractor="acousticbrainz", workers=1) == 1
    assert quarantine(out) == {f"json/../json/{stems[0]}.json": "duplicate stem", f"json/{stems[1]}.json": "unreadable",
                               "json/nowhere.json": "unreadable"}
    assert features(str(out), pairs=str(table), extractor="acousticbrainz", workers=2, max_failure_rate=0.3) == 0
    genres = ["new_age", "r&b"]
    assert sorted(vectors(out)) == sorted(f"audio/{genres[i % 2]}/{stem}.npy" for i, stem in enumerate(stems))
    for i, stem in enumerate(stems):
        assert (out / f"cover/{genres[i % 2]}/{stem}.jpg").samefile(tmp_path / f"cover {i // 3}.JPG")
    assert read_schema(out / "audio") == load("acousticbrainz").schema
    assert pack(str(out), str(tmp_path / "shards"), workers=1) == 0
    index = open_index(tmp_path / "shards", "train")
    assert index.metadata["samples"] == 12 and index.metadata["groups"] == 4 and index.metadata["genres"] == genres
    assert not index.metadata["drops"] and index.metadata["audio"]["dimension"] == 580


def test_songs_are_heard_and_what_cannot_be_is_named(tmp_path, capfd):
    pytest.importorskip("essentia")
    source = tmp_path / "in"
    (source / "a").mkdir(parents=True)
    wav(source / "a/1.wav", noise(4))
    wav(source / "a/1.WAV", noise(4, seed=1))
    wav(source / "short.wav", noise(2))
    wav(source / "silent.wav", np.zeros(44100 * 4))
    (source / "b.mp3").write_bytes(b"ID3 nothing else")
    (source / "notes.txt").write_text("x")
    out = tmp_path / "out"
    assert features(str(out), str(source), keep_json=True, workers=1) == 1
    assert quarantine(out) == {"a/1.wav": "duplicate stem", "short.wav": "too short", "silent.wav": "silent audio",
                               "b.mp3": "unreadable"}
    found = vectors(out)
    assert list(found) == ["a/1.npy"]
    np.testing.assert_array_equal(found["a/1.npy"], load("essentia").of_audio(source / "a/1.WAV", 0.0, None))
    again = tmp_path / "again"
    assert features(str(again), str(out), workers=1) == 0  # of the JSON that was kept
    assert raw_data.hashes(again)["a/1.npy"] == raw_data.hashes(out)["a/1.npy"]
    assert "INFO" not in "".join(capfd.readouterr())


def test_excerpts_have_numbers_and_a_folder_has_one_kind_of_them(tmp_path):
    pytest.importorskip("essentia")
    album = raw_data.stem(0, 0)
    (tmp_path / "in").mkdir()
    wav(tmp_path / "in/song.wav", np.concatenate([noise(4), np.zeros(4 * 44100), noise(4, seed=1)]))
    wav(tmp_path / f"in/{album}.wav", noise(3.5))
    options = {"source": str(tmp_path / "in"), "workers": 1}
    assert features(str(tmp_path / "many"), excerpt=4, excerpts=5, **options) == 0
    assert sorted(vectors(tmp_path / "many")) == sorted([f"{album}.npy", "song-0.npy", "song-2.npy"])  # 1 is silent
    assert read_schema(tmp_path / "many").excerpt == {"seconds": 4.0, "count": 5}
    hear = load("essentia").of_audio
    np.testing.assert_array_equal(vectors(tmp_path / "many")["song-2.npy"], hear(tmp_path / "in/song.wav", 8.0, 4.0))
    with pytest.raises(ValueError, match=r"of \{'seconds': 4.0, 'count': 5\}, not of whole tracks"):
        features(str(tmp_path / "many"), **options)
    (tmp_path / "in/song.wav").unlink()
    assert features(str(tmp_path / "one"), excerpt=4.0, **options) == 0
    assert list(vectors(tmp_path / "one")) == [f"{album}.npy"]
