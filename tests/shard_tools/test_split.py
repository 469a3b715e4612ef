"""Splitting: groups stay whole and where they were, and nothing is copied, lost or left over."""

from __future__ import annotations

import csv
import os
import shutil
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.support import raw_data
from tests.support.albums import add, albums, cover, make, places, run

pytest.importorskip("imagehash")

from shard_tools.curation.assignment import FILE, read_splits
from shard_tools.dataset.demo_truth import find_truth, read_columns
from shard_tools.dataset.groups import write_groups
from shard_tools.dataset.layout import SPLITS, album_of, open_layout
from shard_tools.dataset.schema import Schema, read_schema, write_schema
from shard_tools.dataset.source import open_source
from shard_tools.pack import pack


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("split") / "source")


@pytest.fixture
def copy(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "source", ignore=shutil.ignore_patterns(FILE)))


def test_a_data_set_is_split_by_whole_albums_and_pack_reads_it(source, tmp_path, capsys):
    assert run(source, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "leak check: 0 groups" in said and "hard links" in said
    found = places(tmp_path / "out")
    assert len(found) == 260
    assert all(len(names) == 1 for names in albums(tmp_path / "out").values())
    counts = Counter((genre, name) for (genre, _), name in found.items())
    assert {counts[genre, "train"] for genre in ("metal", "new_age")} == {2 * 52}
    assert {counts[genre, name] for genre in ("metal", "new_age") for name in ("val", "test")} <= {2 * 6, 2 * 7}
    assert pack(str(tmp_path / "out"), str(tmp_path / "shards"), workers=1) == 0
    assert "more than one split" not in capsys.readouterr().out


def test_the_files_are_those_of_the_source(source, tmp_path, capsys):
    before = raw_data.hashes(source / "cover") | raw_data.hashes(source / "audio")
    for way, same in (("hard", True), ("soft", True), ("copy", False)):
        out = tmp_path / way
        assert run(source, out, link=way) == 0
        for (genre, stem), name in places(out).items():
            for part, ending in (("cover", ".jpg"), ("audio", ".npy")):
                here, there = out / part / name / genre / (stem + ending), source / part / genre / (stem + ending)
                assert here.samefile(there) == same and here.read_bytes() == there.read_bytes()
                assert here.is_symlink() == (way == "soft")
    assert before == raw_data.hashes(source / "cover") | raw_data.hashes(source / "audio")


def test_where_hard_links_are_impossible_soft_ones_are_made(source, tmp_path, monkeypatch, capsys):
    def link(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    assert run(source, tmp_path / "out") == 0
    assert "soft links" in capsys.readouterr().out
    assert all(path.is_symlink() for path in (tmp_path / "out" / "cover").rglob("*.jpg"))


def test_same_seed_same_split_whatever_the_workers(copy, tmp_path):
    assert run(copy, tmp_path / "one", remember=False) == run(copy, tmp_path / "two", remember=False, workers=2) == 0
    assert raw_data.hashes(tmp_path / "one") == raw_data.hashes(tmp_path / "two")
    assert not (copy / FILE).exists()
    assert run(copy, tmp_path / "three", seed=1) == 0
    assert places(tmp_path / "three") != places(tmp_path / "one")


def test_a_killed_split_goes_on_and_ends_the_same(copy, tmp_path):
    assert run(copy, tmp_path / "out", remember=False) == 0
    whole = raw_data.hashes(tmp_path / "out")
    for path in sorted((tmp_path / "out" / "audio").rglob("*.npy"))[10:]:
        path.unlink()
    (tmp_path / "out" / FILE).unlink()
    (tmp_path / "out" / "audio" / "train" / "metal" / ".link.tmp").write_bytes(b"half")
    assert run(copy, tmp_path / "out", remember=False) == 0
    assert raw_data.hashes(tmp_path / "out") == whole
    assert run(copy, tmp_path / "out") == 0 and raw_data.hashes(tmp_path / "out") == whole


def test_new_albums_move_no_old_one(copy, tmp_path):
    assert run(copy, tmp_path / "out") == 0
    before = places(tmp_path / "out")
    make(copy, 130, 134)
    assert run(copy, tmp_path / "out") == 0 and run(copy, tmp_path / "elsewhere") == 0
    after = places(tmp_path / "out")
    assert after == places(tmp_path / "elsewhere") and len(after) == len(before) + 8
    assert {name: after[name] for name in before} == before


def test_memory_of_another_rule_is_not_used(copy, tmp_path, capsys):
    assert run(copy, tmp_path / "one") == 0
    with pytest.raises(ValueError, match=r"seed 0.*this is to be by group, seed 1"):
        run(copy, tmp_path / "two", seed=1, previous=str(tmp_path / "one" / FILE))
    assert run(copy, tmp_path / "two", seed=1) == 0
    assert "does not go on from it" in capsys.readouterr().out
    assert run(copy, tmp_path / "three", previous=str(tmp_path / "one" / FILE)) == 0
    assert places(tmp_path / "three") == places(tmp_path / "one") != places(tmp_path / "two")
    (copy / FILE).write_text("group;split\n")
    with pytest.raises(ValueError, match="can't be read as an earlier split"):
        run(copy, tmp_path / "four")


def test_groups_that_get_another_name_stay(copy, tmp_path, capsys):
    assert run(copy, tmp_path / "one") == 0
    before = places(tmp_path / "one")
    write_groups(copy, {name: f"cluster-{album_of(name[1])}" for name in before if name[0] == "metal"})
    assert run(copy, tmp_path / "two") == 0
    assert places(tmp_path / "two") == before and "moved" not in capsys.readouterr().out
    some = {next(album_of(stem) for (_, stem), split in before.items() if split == name) for name in ("train", "test")}
    write_groups(copy, {name: "a new cluster" for name in before if album_of(name[1]) in some})
    assert run(copy, tmp_path / "three") == 0
    assert "warning: 1 old group(s) moved" in capsys.readouterr().out
    after = places(tmp_path / "three")
    assert len({album_of(name[1]) for name in before if before[name] != after[name]}) == 1


def test_what_groups_csv_says_overrules_the_names_of_files(copy, tmp_path):
    stems = sorted(path.stem for path in (copy / "cover" / "metal").iterdir())
    write_groups(copy, {("metal", stem): f"cluster-{i % 13}" for i, stem in enumerate(stems)})
    assert run(copy, tmp_path / "out") == 0
    found = places(tmp_path / "out")
    for k in range(13):
        assert len({found["metal", stem] for i, stem in enumerate(stems) if i % 13 == k}) == 1
    assert read_splits(tmp_path / "out" / FILE)[0].keys() >= {f"cluster-{k}" for k in range(13)}
    assert (tmp_path / "out" / "groups.csv").read_bytes() == (copy / "groups.csv").read_bytes()


def test_tracks_without_an_album_go_with_their_cover(tmp_path):
    source, ours = make(tmp_path / "source", 0, 30), []
    for i in range(40):  # two of each cover; the first ten pairs have the cover of an album
        ours.append(add(source, "metal", 1000 + i, 0, cover(i // 2 if i < 20 else 1000 + i // 2), kind=1))
    assert run(source, tmp_path / "out") == 0
    found, whole = places(tmp_path / "out"), albums(tmp_path / "out")
    for i in range(0, 40, 2):
        assert found["metal", ours[i]] == found["metal", ours[i + 1]]
        if i < 20:
            assert {found["metal", ours[i]]} == whole[album_of(raw_data.stem(i, 0, i // 2))]
    assert len(read_splits(tmp_path / "out" / FILE)[0]) == 30 + 10


def test_an_album_in_several_genres_goes_to_one_split(tmp_path):
    source = make(tmp_path / "source", 0, 60)
    for album in range(0, 60, 3):
        add(source, "r&b", 1000 + album, album)
    assert run(source, tmp_path / "out") == 0
    assert all(len(names) == 1 for names in albums(tmp_path / "out").values())


def test_no_artist_is_torn_by_artist(copy, tmp_path):
    names = [(path.parent.name, path.stem) for path in sorted((copy / "cover").rglob("*.jpg"))]
    artists = {name: ("Various Artists", "BOTH ", "both")[i % 3] if i < 12 else f"artist {i % 40}"
               for i, name in enumerate(names)}
    with pytest.raises(ValueError, match=r"needs a tracks\.csv"):
        run(copy, tmp_path / "out", by="artist")
    with open(copy / "tracks.csv", "w", newline="") as file:
        rows = [(*name, artist) for name, artist in artists.items()]
        csv.writer(file).writerows([("genre", "stem", "artist"), *rows])
    assert run(copy, tmp_path / "out", by="artist") == 0
    found, splits = places(tmp_path / "out"), defaultdict(set)
    for name, artist in artists.items():
        splits[artist.strip().lower()].add(found[name])
    assert all(len(names) == 1 for artist, names in splits.items() if artist != "various artists")
    assert all(len(names) == 1 for names in albums(tmp_path / "out").values())
    assert set(found.values()) == set(SPLITS)
    assert (tmp_path / "out" / "tracks.csv").read_bytes() == (copy / "tracks.csv").read_bytes()


def test_small_genres_stay_in_train_and_are_named(tmp_path, capsys):
    source = make(tmp_path / "source", 0, 60)
    for i in range(9):
        add(source, "polka", 1000 + i, 1000 + i)
    assert run(source, tmp_path / "out") == 0
    assert {name for (genre, _), name in places(tmp_path / "out").items() if genre == "polka"} == {"train"}
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("polka"))
    assert line.endswith("too small, stays in train")
    assert run(source, tmp_path / "all", min_groups=9) == 0
    assert {name for (genre, _), name in places(tmp_path / "all").items() if genre == "polka"} == {"train"}  # memory
    assert run(source, tmp_path / "anew", min_groups=9, seed=1) == 0
    assert len({name for (genre, _), name in places(tmp_path / "anew").items() if genre == "polka"}) > 1


def test_nothing_but_small_genres_is_told(tmp_path, capsys):
    assert run(make(tmp_path / "source", 0, 6), tmp_path / "out") == 0
    assert "nothing is in val and test; with --min_groups 1" in capsys.readouterr().out


def test_covers_only_zips_and_odd_names(tmp_path):
    source = tmp_path / "source"
    for i in range(24):
        path = source / ("rock", "r&b")[i % 2] / f"it's {i} é.x.jpg__0.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cover(i))
    assert run(source, tmp_path / "out") == 0
    listing = list(open_layout(open_source(tmp_path / "out")))
    assert len(listing) == 24 and all(item.cover.name.endswith(".x.jpg__0.jpg") for item in listing)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*SPLITS, FILE, "quarantine.jsonl"}
    (source / FILE).unlink()
    with zipfile.ZipFile(tmp_path / "source.zip", "w") as archive:
        for path in sorted(source.rglob("*.jpg")):
            archive.write(path, path.relative_to(tmp_path))
    assert run(tmp_path / "source.zip", tmp_path / "unzipped") == 0
    assert raw_data.hashes(tmp_path / "unzipped") == raw_data.hashes(tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "unzipped").rglob("*"))


def test_what_speaks_of_the_samples_comes_along(tmp_path):
    source = tmp_path / "source"
    names = [("rock", add(source, "rock", i, i)) for i in range(30)]
    write_schema(source / "audio", Schema("test", 1, tuple(f"f{i}" for i in range(raw_data.DIMENSION))))
    raw_data.add_truth(source, names)
    assert run(source, tmp_path / "out") == 0
    assert read_schema(tmp_path / "out" / "audio") == read_schema(source / "audio")
    listing = open_layout(open_source(tmp_path / "out"))
    assert find_truth(listing)
    truth, found = read_columns(tmp_path / "out" / "attributes.npz"), places(tmp_path / "out")
    assert truth["split"].tolist() == [found[name] for name in names] and set(truth["split"]) == set(SPLITS)
    assert (truth["drawn"] == read_columns(source / "attributes.npz")["drawn"]).all()


def test_a_data_set_that_was_split_by_file_is_split_anew(tmp_path, capsys):
    source = raw_data.valid_pairs(tmp_path / "source", 60)
    raw_data.add(source, "val/metal", raw_data.stem(0, 0, 0), raw_data.jpeg(0), raw_data.npy(raw_data.vector(0)))
    assert run(source, tmp_path / "out", min_groups=5) == 0
    said = capsys.readouterr().out
    assert "split already" in said and "1  duplicate stem" in said
    assert len(places(tmp_path / "out")) == 60
    assert all(len(names) == 1 for album, names in albums(tmp_path / "out").items() if album)


def test_bad_covers_are_left_to_pack_and_unreadable_ones_out(copy, tmp_path):
    first, second, third = sorted((copy / "cover" / "metal").iterdir())[:3]
    first.write_bytes(b"no picture")
    second.unlink()
    second.symlink_to("/nowhere/at/all")
    third.unlink()
    assert run(copy, tmp_path / "out") == 0
    found = places(tmp_path / "out")
    assert ("metal", first.stem) in found and ("metal", second.stem) not in found
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert '"unreadable"' in lines and '"orphan audio"' in lines and len(lines.splitlines()) == 2


@pytest.mark.parametrize(("options", "message"), [
    ({"ratios": (80.0, 20.0)}, "three numbers"), ({"ratios": (80.0, 10.0, 9.0)}, "add up to 100"),
    ({"ratios": (110.0, -5.0, -5.0)}, "--ratios"), ({"seed": -1}, "--seed"), ({"min_groups": 0}, "--min_groups"),
    ({"distance": 99}, "--distance"), ({"previous": "/nowhere"}, "/nowhere")])
def test_impossible_options_are_refused(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_folders_with_something_else_are_refused(source, copy, tmp_path):
    (tmp_path / "out" / "cover" / "train" / "metal").mkdir(parents=True)
    (tmp_path / "out" / "cover" / "train" / "metal" / "mine.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds cover/train/metal/mine\.jpg"):
        run(source, tmp_path / "out")
    for out in (source / "out", source.parent, source):
        with pytest.raises(ValueError, match="lie in each other"):
            run(source, out)
    assert run(copy, tmp_path / "other") == 0
    with pytest.raises(ValueError, match="which this split would not put there"):
        run(copy, tmp_path / "other", seed=5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no layout"):
        run(tmp_path / "empty", tmp_path / "new")
