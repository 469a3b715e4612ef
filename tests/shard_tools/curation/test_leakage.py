"""The leak check: what is in two splits is found, in folders and in shards, and named; what only seems so is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import raw_data
from tests.support.runs import environment

pytest.importorskip("imagehash")

from shard_tools.curation.fingerprints import FINGERPRINT_DTYPE, DistinctCovers, fingerprint_files
from shard_tools.curation.leakage import MAX_DISTANCE, find_leaks, near_duplicates
from shard_tools.dataset.groups import write_groups
from shard_tools.dataset.layout import SPLITS, open_layout
from shard_tools.dataset.source import open_source
from shard_tools.pack import pack
from shard_tools.shards.index import open_index
from shard_tools.split import split
from shard_tools.verify import verify

SIDE = 96


def picture(number: int) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def altered(number: int) -> bytes:
    """The same picture as others would have stored it: smaller or lighter, and with fewer bytes."""
    image = picture(number)
    if number % 2:
        image = image.resize((SIDE - 8, SIDE - 8), Image.Resampling.LANCZOS).resize((SIDE, SIDE))
    return raw_data.encoded(image.point(lambda value: min(255, value + 8)), quality=50)


def flat(number: int) -> bytes:
    """A plain black picture with a small spot of its own."""
    image = Image.new("RGB", (SIDE, SIDE))
    rng = np.random.default_rng(number)
    x, y = (int(value) for value in rng.integers(4, SIDE - 16, 2))
    image.paste(tuple(int(value) for value in rng.integers(90, 256, 3)), (x, y, x + 9, y + 9))
    return raw_data.encoded(image, quality=92)


def put(root: Path, place: str, number: int, album: int, data: bytes) -> str:
    path = root / place / f"{raw_data.stem(number, 0, album)}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path.stem


def leaky(root: Path) -> Path:
    """A split by file: an album, a cover and, twice, a picture are in two splits."""
    for i in range(30):
        put(root, f"{SPLITS[i % 3]}/rock", i, i, raw_data.encoded(picture(i)))
    put(root, "train/rock", 50, 100, raw_data.encoded(picture(50)))
    put(root, "test/rock", 51, 100, raw_data.encoded(picture(51)))
    put(root, "train/rock", 60, 200, raw_data.encoded(picture(60)))
    put(root, "val/rock", 61, 201, raw_data.encoded(picture(60)))
    for i in (70, 71):
        put(root, "train/rock", i, 300 + i, raw_data.encoded(picture(i)))
        put(root, "test/rock", 100 + i, 400 + i, altered(i))
        put(root, "test/rock", 200 + i, 500 + i, raw_data.encoded(picture(200 + i)))
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return leaky(tmp_path_factory.mktemp("leaks") / "source")


def test_every_kind_of_leak_is_found_in_shards_and_named(source, tmp_path, capsys):
    assert pack(str(source), str(tmp_path / "shards"), samples_per_shard=7, workers=1) == 0
    assert verify(str(tmp_path / "shards"), workers=1) == 0
    capsys.readouterr()
    assert verify(str(tmp_path / "shards"), leaks=True, workers=1) == 1
    said = capsys.readouterr().out
    for line in ("1 groups in more", "1 identical covers in more", "2 similar covers in more"):
        assert f"leak check: {line}" in said
    for one, other in (((50, 100, "train"), (51, 100, "test")), ((60, 200, "train"), (61, 201, "val")),
                       ((70, 370, "train"), (170, 470, "test")), ((71, 371, "train"), (171, 471, "test"))):
        names = [f"{name}/rock/{raw_data.stem(number, 0, album)}" for number, album, name in (one, other)]
        assert f"    {names[0]}  and  {names[1]}" in said
    assert verify(str(tmp_path / "shards"), leaks=True, workers=2) == 1
    assert capsys.readouterr().out == said


def test_after_split_nothing_leaks_in_folders_nor_in_shards(source, tmp_path, capsys):
    assert split(str(source), str(tmp_path / "out"), workers=1) == 0
    assert pack(str(tmp_path / "out"), str(tmp_path / "shards"), workers=1) == 0
    capsys.readouterr()
    assert verify(str(tmp_path / "shards"), leaks=True, workers=1) == 0
    said = capsys.readouterr().out
    assert all(f"leak check: 0 {what}" in said for what in ("groups", "identical covers", "similar covers"))
    assert sum(open_index(tmp_path / "shards", name).metadata["samples"] for name in SPLITS) == 40


def test_without_near_covers_that_look_alike_leak_and_the_status_says_so(tmp_path, capsys):
    for i in range(120):
        put(tmp_path / "source", "rock", 2 * i, 2 * i, raw_data.encoded(picture(i)))
        put(tmp_path / "source", "rock", 2 * i + 1, 2 * i + 1, altered(i))
    assert split(str(tmp_path / "source"), str(tmp_path / "out"), near=False, remember=False, workers=1) == 1
    assert "leak check: 0 similar" not in capsys.readouterr().out
    assert split(str(tmp_path / "source"), str(tmp_path / "joined"), remember=False, workers=1) == 0
    write_groups(tmp_path / "source", {("rock", raw_data.stem(2 * i + k, 0, 2 * i + k)): f"g{i}"
                                       for i in range(120) for k in range(2)})  # as dedup --apply group does
    assert split(str(tmp_path / "source"), str(tmp_path / "marked"), near=False, remember=False, workers=1) == 0


def test_a_split_by_file_leaks_much(source, tmp_path):
    entries = [item.cover for item in open_layout(open_source(source))]
    covers, errors = fingerprint_files(source, entries, 1)
    duplicates, collisions = near_duplicates(covers, MAX_DISTANCE)
    assert not errors and len(duplicates) == 2 and len(covers.fingerprints) == len(entries) - 1
    rng = np.random.default_rng(0)
    leaks = find_leaks(rng.permutation(len(entries)) % 3, np.arange(len(entries)), covers, duplicates, collisions)
    assert len(leaks.covers) + len(leaks.near) > 0 and not len(leaks.groups)


def test_flat_covers_are_no_leaks_only_because_their_dhashes_are_close(tmp_path, capsys):
    for i in range(60):
        put(tmp_path / "source", "rock", i, i, flat(i))
    assert split(str(tmp_path / "source"), str(tmp_path / "out"), workers=1) == 0
    said = capsys.readouterr().out
    assert "leak check: 0 similar covers" in said
    assert {name: len(list((tmp_path / "out" / name).rglob("*.jpg"))) for name in SPLITS} == {
        "train": 48, "val": 6, "test": 6}


def test_old_groups_that_a_new_cover_binds_are_joined_and_named(tmp_path, capsys):
    for i in range(30):
        put(tmp_path / "source", "rock", i, i, raw_data.encoded(picture(i)))
    assert split(str(tmp_path / "source"), str(tmp_path / "one"), workers=1) == 0
    here = {path.stem: path.relative_to(tmp_path / "one").parts[0] for path in (tmp_path / "one").rglob("*.jpg")}
    train, test = (next(i for i in range(30) if here[raw_data.stem(i, 0, i)] == name) for name in ("train", "test"))
    for number, data in ((100, altered(train)), (101, altered(test))):
        put(tmp_path / "source", "rock", number, 999, data)
    capsys.readouterr()
    assert split(str(tmp_path / "source"), str(tmp_path / "two"), workers=1) == 0
    said = capsys.readouterr().out
    assert "warning: 1 old group" in said and "leak check: 0 similar covers" in said
    after = {path.stem: path.relative_to(tmp_path / "two").parts[0] for path in (tmp_path / "two").rglob("*.jpg")}
    assert sum(here[stem] != after[stem] for stem in here) == 1


def test_each_cover_in_two_splits_is_one_leak_however_many_samples_have_it():
    splits, groups = np.array([0, 0, 1, 1, 2, 0]), np.array([0, 1, 1, 2, 2, 3])
    covers = DistinctCovers(np.array([0, 0, 0, 1, 1, 2]), np.zeros(3, FINGERPRINT_DTYPE))
    leaks = find_leaks(splits, groups, covers, np.array([[0, 2], [1, 2]]), np.zeros((0, 2), np.int64))
    assert leaks.groups.tolist() == [[1, 2], [3, 4]]
    assert leaks.covers.tolist() == [[0, 2], [3, 4]]
    assert leaks.near.tolist() == [[2, 5], [3, 5]] and not len(leaks.collisions)


def test_damaged_shards_are_told_of_before_leaks(source, tmp_path, capsys):
    assert pack(str(source), str(tmp_path / "shards"), workers=1) == 0
    shard = next((tmp_path / "shards").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    capsys.readouterr()
    assert verify(str(tmp_path / "shards"), leaks=True, workers=1) == 1
    assert "leaks were not searched for" in capsys.readouterr().out


def test_the_command_ends_with_status_1(source, tmp_path):
    assert pack(str(source), str(tmp_path / "shards"), workers=1) == 0
    words = [sys.executable, "-m", "shard_tools.verify", "shards", "--leaks", "--workers", "1"]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "1 identical covers in more than one split" in done.stdout


def test_without_imagehash_only_looking_for_leaks_is_refused(source, tmp_path, monkeypatch):
    assert pack(str(source), str(tmp_path / "shards"), workers=1) == 0
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[dedup\]'"):
        verify(str(tmp_path / "shards"), leaks=True, workers=1)
    assert verify(str(tmp_path / "shards"), workers=1) == 0
