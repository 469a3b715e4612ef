"""Duplicates: what is found among planted copies, what is said of them, and what is done about them."""

from __future__ import annotations

import csv
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shard_tools.curation import removal
from shard_tools.dataset.groups import find_groups, write_groups
from shard_tools.dataset.layout import album_of, open_layout
from shard_tools.dataset.source import open_source
from shard_tools.dedup import COLUMNS, dedup
from tests.proofs import planted
from tests.support import raw_data
from tests.support.runs import run_command

PLACE = "audio-cover_dataset/{part}/train/{genre}/{stem}.{kind}"


def add(root: Path, number: int, album: int, cover: bytes, genre: str = "pop", kind: int = 0) -> str:
    """A track with its vector; returns its stem."""
    stem = raw_data.stem(number, kind, album)
    for part, ending, data in (("cover", "jpg", cover), ("audio", "npy", raw_data.npy(raw_data.vector(number)))):
        path = root / PLACE.format(part=part, genre=genre, stem=stem, kind=ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return stem


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Twelve albums: 0, 1 and 2 show one picture (1 the largest, 2 the same bytes as 0), 3 and 4 another; 5 has three
    tracks with one cover; the file 20 tells no album and has the cover of 6."""
    root = tmp_path / "library"
    pictures = [planted.cover(21, number) for number in range(12)]
    for number, picture in enumerate(pictures):
        add(root, number, number, planted.jpeg(picture), ("pop", "rock")[number % 2])
    add(root, 1, 1, planted.plant("larger", pictures[0], planted.rng_of(1)), "rock")
    add(root, 2, 2, planted.jpeg(pictures[0]))
    add(root, 4, 4, planted.plant("crop", pictures[3], planted.rng_of(4)))
    for number in (12, 13):
        add(root, number, 5, planted.jpeg(pictures[5]), "rock")
    add(root, 20, 20, planted.plant("q40", pictures[6], planted.rng_of(6)), "jazz", kind=1)
    return root


def table(root: Path) -> list[dict[str, str]]:
    with open(root / "clusters.csv", newline="") as file:
        return list(csv.DictReader(file))


def albums(rows: list[dict[str, str]]) -> list[set[int]]:
    """Cluster by cluster the numbers of the albums (of the file, where it tells none)."""
    found: dict[str, set[int]] = {}
    for row in rows:
        album = album_of(row["stem"])
        found.setdefault(row["cluster"], set()).add(int(album[-12:], 16) if album else int(row["stem"][2:]))
    return list(found.values())


def test_the_report_tells_what_is_where_and_why_and_changes_nothing(library, capsys) -> None:
    before = raw_data.hashes(library)
    assert dedup(str(library), workers=1) == 0
    assert raw_data.hashes(library) == before and not (library.parent / "library.dropped").exists()
    out = library.parent / "library.dedup"
    rows = table(out)
    assert tuple(rows[0]) == COLUMNS
    assert albums(rows) == [{0, 1, 2}, {6, 20}, {3, 4}]  # the largest first, then by path
    first = [row for row in rows if row["cluster"] == "1"]
    assert [(row["why"], row["keep"]) for row in first] == [("same", "yes"), ("exact", "no"), ("exact", "no")]
    assert first[0]["genre"] == "rock" and (library / first[0]["path"]).is_file()
    assert [row["distance"] for row in first[1:]] == ["0", "0"]
    assert {row["why"] for row in rows if row["cluster"] != "1"} <= {"same", "near"}
    with Image.open(out / "clusters.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 1000 and np.asarray(sheet).std() > 20
    assert (out / "quarantine.jsonl").read_bytes() == b""
    said = capsys.readouterr().out
    assert "3 clusters hold 7 covers of 7 of these: exact 2, same" in said and "--apply group" in said


def test_the_report_is_the_same_on_any_number_of_workers_and_again(library, tmp_path) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        dedup(str(library), out=str(tmp_path / name), workers=workers)
    one, two = (raw_data.hashes(tmp_path / name) for name in ("one", "two"))
    assert one == two and len([name for name in one if not name.startswith(".fingerprints")]) == 3
    dedup(str(library), out=str(tmp_path / "one"), workers=1)  # from its cache
    assert raw_data.hashes(tmp_path / "one") == one


def test_covers_that_cannot_be_read_are_named_and_stop_nothing(library, tmp_path) -> None:
    add(library, 30, 30, raw_data.jpeg(1)[:400])
    add(library, 31, 31, b"")
    dedup(str(library), out=str(tmp_path / "out"), workers=1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(line["reason"] for line in lines) == ["empty file", "truncated image"]
    assert len(albums(table(tmp_path / "out"))) == 3


def test_group_gives_every_cluster_one_name_that_pack_and_split_read(library, tmp_path) -> None:
    before = raw_data.hashes(library)
    dedup(str(library), apply="group", workers=1)
    path = library / "groups.csv"
    assert {name: value for name, value in raw_data.hashes(library).items() if name != "groups.csv"} == before
    groups = find_groups(open_source(library), '')
    assert len(groups) == 7 and len(set(groups.values())) == 3
    of = {candidate.cover.name: candidate.album for candidate in open_layout(open_source(library))}
    names = [of[Path(row["path"]).name] for row in table(library.parent / "library.dedup")]
    assert len(set(names)) == 3 and all(names)
    written = path.read_bytes()
    dedup(str(library), apply="group", workers=1)
    assert path.read_bytes() == written


def test_group_merges_with_the_groups_that_are_there(library) -> None:
    """A box set of albums 2 and 7 and a group of album 8 only: 0, 1, 2 and 7 become one, 8 stays."""
    stems = {number: raw_data.stem(number, 0, number) for number in (2, 7, 8)}
    known = {("pop", stems[2]): "box", ("rock", stems[7]): "box", ("pop", stems[8]): "mine",
             ("gone", "a file that is no more"): "box"}
    write_groups(library, known)
    dedup(str(library), apply="group", workers=1)
    groups = find_groups(open_source(library), '')
    assert known.items() <= groups.items()
    assert [groups["pop", raw_data.stem(0, 0, 0)], groups["rock", raw_data.stem(1, 0, 1)]] == ["box", "box"]
    written = (library / "groups.csv").read_bytes()
    dedup(str(library), apply="group", workers=1)
    assert (library / "groups.csv").read_bytes() == written


def test_two_clusters_of_one_album_become_one_group(tmp_path) -> None:
    """Album 0 has two covers; album 1 has the one, album 2 the other: none of the three may be torn from the others."""
    covers = [planted.jpeg(planted.cover(21, number)) for number in range(3)]
    for number, (album, cover) in enumerate([(0, 0), (0, 1), (1, 0), (2, 1), (3, 2)]):
        add(tmp_path / "s", number, album, covers[cover])
    dedup(str(tmp_path / "s"), apply="group", workers=1)
    assert albums(table(tmp_path / "s.dedup")) == [{0, 1}, {0, 2}]
    groups = find_groups(open_source(tmp_path / "s"), '')
    assert len(groups) == 4 and len(set(groups.values())) == 1


def test_keep_one_moves_the_others_with_their_vectors_and_deletes_nothing(library, capsys) -> None:
    before = raw_data.hashes(library)
    dedup(str(library), apply="keep-one", workers=1)
    away = library.parent / "library.dropped"
    left, moved = raw_data.hashes(library), raw_data.hashes(away)
    listed = moved.pop("dropped.csv")
    assert listed and {**left, **moved} == before and not left.keys() & moved.keys()
    assert len(moved) == 8  # four covers and their vectors: of 0, 2, one of 3 and 4, one of 6 and 20
    assert not any(raw_data.stem(1, 0, 1) in name for name in moved)  # the largest of its cluster
    assert "nothing was deleted" in capsys.readouterr().out
    with open(away / "dropped.csv", newline="") as file:
        assert {row["path"] for row in csv.DictReader(file)} == set(moved)
    dedup(str(library), apply="keep-one", workers=1)
    assert "nothing to drop" in capsys.readouterr().out and raw_data.hashes(library) == left
    assert table(library.parent / "library.dedup") == []


@pytest.mark.parametrize("after", [0, 1, 5])
def test_keep_one_that_was_killed_is_finished_by_the_next_run(library, monkeypatch, after: int) -> None:
    calm = library.parent / "calm"
    shutil.copytree(library, calm)
    dedup(str(calm), apply="keep-one", workers=1)
    rename, done = removal.os.rename, []

    def killed(*paths: Path) -> None:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(rename(*paths))

    monkeypatch.setattr(removal.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        dedup(str(library), apply="keep-one", workers=1)
    monkeypatch.undo()
    dedup(str(library), apply="keep-one", workers=1)
    for end in ("", ".dropped"):
        assert raw_data.hashes(library.with_name(library.name + end)) == raw_data.hashes(calm.with_name("calm" + end))
    reports = [(library.parent / f"{name}.dedup" / "clusters.csv").read_bytes() for name in ("library", "calm")]
    assert reports[0] == reports[1]


def test_the_group_that_stays_has_the_largest_picture_then_the_most_tracks(tmp_path) -> None:
    picture = planted.cover(21, 4)
    for number, (album, name) in enumerate([(0, "q40"), (1, "brighter"), (1, "brighter"), (2, "smaller")]):
        add(tmp_path / "s", number, album, planted.plant(name, picture, planted.rng_of(1)))
    dedup(str(tmp_path / "s"), apply="keep-one", workers=1)
    rows = table(tmp_path / "s.dedup")
    assert [(album_of(row["stem"])[-1], row["keep"]) for row in rows] == [
        ("1", "yes"), ("1", "yes"), ("0", "no"), ("2", "no")]
    left = [item.album[-1] for item in open_layout(open_source(tmp_path / "s"))]
    assert left == ["1", "1"]


def test_a_file_dropped_before_is_never_overwritten(library) -> None:
    again = shutil.copytree(library, library.parent / "copy")
    dedup(str(library), apply="keep-one", workers=1)
    shutil.copytree(again, library, dirs_exist_ok=True)
    before = raw_data.hashes(library), raw_data.hashes(library.parent / "library.dropped")
    with pytest.raises(ValueError, match="dropped by an earlier run"):
        dedup(str(library), apply="keep-one", workers=1)
    assert before == (raw_data.hashes(library), raw_data.hashes(library.parent / "library.dropped"))


def test_a_zip_is_read_in_place_but_nothing_is_applied_to_it(library, tmp_path) -> None:
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(library.rglob("*.*")):
            file.write(path, path.relative_to(library))
    dedup(str(library), out=str(tmp_path / "a"), workers=1)
    dedup(str(archive), out=str(tmp_path / "b"), workers=1)
    assert (tmp_path / "a/clusters.csv").read_bytes() == (tmp_path / "b/clusters.csv").read_bytes()
    with pytest.raises(ValueError, match="is no folder"):
        dedup(str(archive), apply="group")


def test_odd_names_come_through(tmp_path) -> None:
    picture = planted.cover(21, 2)
    for number, name in enumerate(['a "quoted", one', "dots.and & more", "künstler\nzwei", "c\udcff raw byte"]):
        path = tmp_path / "s" / "r&b" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(planted.plant(list(planted.PLANTS)[number], picture, planted.rng_of(number)))
    dedup(str(tmp_path / "s"), apply="group", workers=1)
    assert set(find_groups(open_source(tmp_path / "s"), '').values()) == {'r&b/a "quoted", one'}
    dedup(str(tmp_path / "s"), apply="keep-one", workers=1)
    assert len(list((tmp_path / "s" / "r&b").iterdir())) == 1
    assert len(list((tmp_path / "s.dropped" / "r&b").iterdir())) == 3


def test_wrong_use_is_explained(library, tmp_path) -> None:
    with pytest.raises(ValueError, match="--distance 40"):
        dedup(str(library), distance=40)
    with pytest.raises(ValueError, match="would become input"):
        dedup(str(library), out=str(library / "report"))
    (tmp_path / "bad" / "pop").mkdir(parents=True)
    (tmp_path / "bad" / "pop" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no cover that can be read"):
        dedup(str(tmp_path / "bad"), workers=1)


def test_the_command_runs_as_a_person_starts_it(library, tmp_path) -> None:
    done = run_command(tmp_path, "shard_tools.dedup", "--source", str(library), "--out", "report", "--apply", "group")
    assert "3 clusters" in done.stdout and (tmp_path / "report" / "clusters.png").is_file()
    refused = run_command(tmp_path, "shard_tools.dedup", "--source", str(library), "--apply", "keepone", ok=False)
    assert refused.returncode == 2 and "did you mean 'keep-one'" in refused.stdout


def test_planted_copies_are_found_and_distinct_covers_are_not_joined() -> None:
    shares, wrong = planted.measure(seed=5, count=600, every=6)
    assert np.mean(list(shares.values())) >= 0.95 and min(shares.values()) >= 0.85, shares
    assert wrong <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("seed", [5, 6])
def test_planted_copies_among_5_000_covers(seed: int) -> None:
    shares, wrong = planted.measure(seed, count=5_000, every=5)
    assert min(shares.values()) >= 0.95, shares
    assert wrong <= 0.01


@pytest.mark.skipif(not planted.REAL.is_file(), reason="the shared data are not here")
def test_planted_copies_of_real_pictures_are_found() -> None:
    with tarfile.open(planted.REAL) as archive:
        pictures = [Image.open(archive.extractfile(member)).convert("RGB") for member in archive
                    if "covers/" in member.name and member.name.endswith(".jpg")]
    for picture in pictures:
        picture.thumbnail((320, 320))
    assert len(pictures) == 162
    shares, wrong = planted.measure(7, len(pictures), 4, pictures)
    assert np.mean(list(shares.values())) >= 0.95, shares
    assert wrong <= 2 / 162  # two that show a pumpkin, once with its eyes open
