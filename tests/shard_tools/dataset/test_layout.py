"""Layouts, names, keys and zips: how folders become candidates."""

import struct
import zipfile
from pathlib import Path

import pytest

from shard_tools.core.errors import BadFileError
from shard_tools.core.quarantine import Drop
from shard_tools.dataset.layout import Candidate, album_of, make_key, open_layout, read_key, read_name
from shard_tools.dataset.source import Zip, open_source, read_entry
from tests.support import raw_data

UUID = "478ff859-34eb-457e-b9d2-dc74b5a372e9"
TRACK = "e52a5405-eec0-4f2a-9f3c-0f800e1164e3"


def tree(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    return root


def listed(root: Path, dataset: str = "auto") -> tuple[list[str], list[str]]:
    items = list(open_layout(open_source(root), dataset))
    candidates = [item for item in items if isinstance(item, Candidate)]
    return (sorted(f"{c.split}/{c.genre}/{c.key}" + ("+" if c.audio else "") for c in candidates),
            sorted(f"{d.reason}: {d.path}" for d in items if isinstance(d, Drop)))


@pytest.mark.parametrize("paths, dataset, expected", [
    (["audio-cover_dataset/cover/train/r&b/a.jpg", "audio-cover_dataset/audio/train/r&b/a.npy",
      "cover_dataset/val/pop/b.jpg"], "auto", ["train/r&b/a+"]),
    (["audio-cover_dataset/cover/train/r&b/a.jpg", "audio-cover_dataset/audio/train/r&b/a.npy",
      "cover_dataset/val/pop/b.jpg"], "cover", ["val/pop/b"]),
    (["cover_dataset/train/pop/a.jpg"], "auto", ["train/pop/a"]),
    (["cover/train/pop/a.jpg", "audio/train/pop/a.npy"], "auto", ["train/pop/a+"]),
    (["cover/train/pop/a.jpg", "audio/train/pop/a.npy"], "cover", ["train/pop/a"]),
    (["train/pop/a.jpg", "valid/pop/b.jpg", "eval/new_age/c.png"], "auto",
     ["test/new_age/c", "train/pop/a", "val/pop/b"]),
    (["train/pop/a.jpg", "train/pop/a.npy"], "auto", ["train/pop/a+"]),
    (["train/a.jpg"], "auto", ["train/unknown/a"]),
    (["pop/a.jpg", "rock/b.webp"], "auto", ["train/pop/a", "train/rock/b"]),
    (["a.jpg", "b.JPEG", "notes.txt"], "auto", ["train/unknown/a", "train/unknown/b"]),
])
@pytest.mark.parametrize("wrapper", ["", "multimodal_dataset/"])
def test_every_layout_is_recognised_bare_and_one_folder_down_and_zipped(tmp_path, paths, dataset, expected, wrapper):
    if wrapper and "/" not in paths[0]:
        expected = [name.replace("unknown", wrapper[:-1]) for name in expected]  # one folder of covers is a genre
    root = tree(tmp_path / "source", *(wrapper + path for path in paths))
    assert listed(root, dataset) == (expected, [])
    with zipfile.ZipFile(tmp_path / "source.zip", "w") as archive:
        archive.writestr("__MACOSX/._x.jpg", b"")
        for path in paths:
            archive.write(root / wrapper / path, wrapper + path)
    assert listed(tmp_path / "source.zip", dataset) == (expected, [])


def test_pairs_join_by_stem_and_orphans_are_named_both_ways(tmp_path):
    root = tree(tmp_path, "cover/train/pop/a.jpg__0.jpg", "audio/train/pop/a.npy", "cover/train/pop/b.jpg",
                "audio/train/pop/c.npy", "audio/val/jazz/a.npy", "cover/train/pop/a.png")
    assert listed(root) == (["train/pop/a+"], [
        "duplicate stem: cover/train/pop/a.png", "orphan audio: audio/train/pop/c.npy",
        "orphan audio: audio/val/jazz/a.npy", "orphan cover: cover/train/pop/b.jpg"])


def test_equal_stems_of_two_genres_get_different_keys_in_a_fixed_order(tmp_path):
    root = tree(tmp_path, "train/pop/a.jpg", "train/rock/a.jpg", "val/rock/a.jpg")
    candidates, _ = listed(root)
    assert candidates[0] == "train/pop/a" and candidates[2] == "val/rock/a"
    assert candidates[1].startswith("train/rock/a~")
    assert listed(root)[0] == candidates


@pytest.mark.parametrize("name, stem, kind", [
    ("a.jpg", "a", "jpg"), ("a.jpg__0.jpg", "a", "jpg"), ("a.jpg__0.jpg__12.JPG", "a", "jpg"),
    ("a.b.png", "a.b", "png"), ("a__0.jpg", "a__0", "jpg"),
    (f"{TRACK}-0__{UUID}.jpg__0.jpg", f"{TRACK}-0__{UUID}", "jpg"), ("a", "a", ""),
    (".jpg", ".jpg", ""), ("._a.jpg", "._a.jpg", ""), ("a\n.jpg", "a\n", "jpg"),
])
def test_names_are_read_as_stem_and_kind(name, stem, kind):
    assert read_name(name) == (stem, kind)


@pytest.mark.parametrize("stem, album", [
    (f"{TRACK}-0__{UUID}", UUID), (f"{TRACK.upper()}-12__{UUID.upper()}", UUID), ("TRGGZMN12903CB9D8C", ""),
    (f"TRGGZMN12903CB9D8C__{TRACK}-0__{UUID}", UUID), (UUID, ""), (f"x{TRACK}-0__{UUID}", ""), ("anything", ""),
])
def test_albums_are_found_in_all_stem_kinds(stem, album):
    assert album_of(stem) == album


@pytest.mark.parametrize("stem", ["a.b", "r&b ~ 100%", "Björk", "\udcff\udcfe", "a/b", f"{TRACK}-0"])
def test_keys_are_ascii_without_dots_and_reversible(stem):
    key = make_key(stem)
    assert key.isascii() and "." not in key and "/" not in key and len(key) <= 96 and read_key(key) == stem
    assert make_key(stem, "rock/" + stem) != key


def test_the_longest_stem_kind_stays_as_it_is_and_longer_ones_are_cut_but_stay_different():
    longest = f"TR{'A' * 16}__{TRACK}-0__{UUID}"
    assert make_key(longest) == longest and len(longest) == 96
    keys = {make_key("é" * 100 + str(i)) for i in range(100)}
    assert len(keys) == 100 and all(len(key) <= 96 for key in keys)


def test_unrecognisable_and_contradictory_sources_are_explained(tmp_path):
    for i, (paths, message) in enumerate([
            (["notes.txt"], r"found notes.txt; expected .*<split>/<genre>"), (["a/b/c/d/e.jpg"], "no layout"),
            (["audio-cover_dataset/cover/train/pop/a.jpg"], "must hold cover/ and audio/"),
            (["val/pop/a.jpg", "valid/pop/a.jpg"], "two folders for val"),
            (["train/a.jpg", "train/unknown/b.jpg"], "without a genre")]):
        with pytest.raises(ValueError, match=message):
            listed(tree(tmp_path / str(i), *paths))
    with pytest.raises(ValueError, match="covers only"):
        listed(tree(tmp_path / "c", "cover_dataset/train/pop/a.jpg"), "audio-cover")


def zipped(path: Path, data: bytes, method: int = zipfile.ZIP_DEFLATED) -> Zip:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("train/pop/a.jpg", data)
    return Zip(path)


def reason(archive: Zip, limit: int = 1 << 20) -> str:
    with pytest.raises(BadFileError) as caught:
        read_entry(archive.path, archive.list("train/pop")[1][0], limit)
    return str(caught.value)


def test_zip_members_are_bounded_and_checked(tmp_path):
    path = tmp_path / "a.zip"
    archive = zipped(path, b"data" * 100)
    assert read_entry(path, archive.list("train/pop")[1][0], 400) == b"data" * 100
    assert "too many bytes" in reason(archive, 399)
    assert "compression method 14" in reason(zipped(path, b"x", zipfile.ZIP_LZMA))
    bomb = zipped(path, bytes(5_000_000))
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\1\2")
    struct.pack_into("<L", raw, at + 24, 1000)  # the directory claims 1,000 bytes
    path.write_bytes(raw)
    bomb = Zip(path)
    assert "size and checksum" in reason(bomb)
    archive = zipped(path, b"data" * 100, zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"datadata")] ^= 1
    path.write_bytes(raw)
    assert "size and checksum" in reason(Zip(path))
    struct.pack_into("<H", raw, raw.rindex(b"PK\1\2") + 8, 1)
    path.write_bytes(raw)
    assert "encrypted" in reason(Zip(path))


def test_zip_with_something_in_front_and_zip64_are_read(tmp_path):
    zipped(tmp_path / "a.zip", b"data")
    (tmp_path / "b.zip").write_bytes(b"#!/bin/sh\n" * 100 + (tmp_path / "a.zip").read_bytes())
    archive = Zip(tmp_path / "b.zip")
    assert read_entry(archive.path, archive.list("train/pop")[1][0], 100) == b"data"
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as big:
        with big.open("train/pop/a.jpg", "w", force_zip64=True) as member:
            member.write(b"data")
        big.writestr("train/rock/a.jpg", b"")
        big.writestr("train/rock/b.jpg", b"")
        limit = zipfile.ZIP_FILECOUNT_LIMIT
        try:
            zipfile.ZIP_FILECOUNT_LIMIT = 2  # as if these were more than 65,535
            big.close()
        finally:
            zipfile.ZIP_FILECOUNT_LIMIT = limit
    archive = Zip(tmp_path / "c.zip")
    assert b"PK\6\6" in (tmp_path / "c.zip").read_bytes() and len(archive.list("train/rock")[1]) == 2
    assert read_entry(archive.path, archive.list("train/pop")[1][0], 100) == b"data"


def test_cut_zips_are_refused(tmp_path):
    zipped(tmp_path / "a.zip", raw_data.jpeg(1))
    whole = (tmp_path / "a.zip").read_bytes()
    for cut in (0, 3, 40, len(whole) - 30, len(whole) - 1):
        (tmp_path / "b.zip").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="zip"):
            Zip(tmp_path / "b.zip")


def test_a_zip_whose_count_has_wrapped_is_read_to_the_end_of_its_directory(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("a", "b", "c"):
            archive.writestr(f"train/rock/{name}.jpg", name)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    end = data.rfind(b"PK\5\6")
    data[end + 8:end + 12] = (1).to_bytes(2, "little") * 2  # as of 65,537 members
    (tmp_path / "a.zip").write_bytes(data)
    assert [entry.name for entry in Zip(tmp_path / "a.zip").list("train/rock")[1]] == ["a.jpg", "b.jpg", "c.jpg"]


def test_names_that_no_flag_calls_utf8_are_utf8_or_else_cp437(tmp_path):
    names = {b"train/rock/caf\xc3\xa9.jpg": "caf\u00e9.jpg", b"train/rock/caf\x82.jpg": "caf\u00e9.jpg",
             b"train\\rock\\b.jpg": "b.jpg", b"./train//rock/./c.jpg": "c.jpg"}
    for number, (raw, name) in enumerate(names.items()):
        path = tmp_path / f"{number}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x" * len(raw), b"data")
        path.write_bytes(path.read_bytes().replace(b"x" * len(raw), raw))
        archive = Zip(path)
        entry, = archive.list("train/rock")[1]
        assert entry.name == name and read_entry(path, entry, 10) == b"data"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_members_with_one_path_the_last_counts(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in (("a.jpg", b"old"), ("a.npy", b"old"), ("a.jpg", b"new"), ("./a.npy", b"new")):
            archive.writestr(f"train/rock/{name}" if name[0] == "a" else "train/./rock/a.npy", data)
    entries = Zip(tmp_path / "a.zip").list("train/rock")[1]
    assert [(e.name, read_entry(tmp_path / "a.zip", e, 10)) for e in entries] == [("a.jpg", b"new"), ("a.npy", b"new")]
