"""Verifying and inspecting: any flipped bit is found, hostile folders harm nobody, and unpacking inverts packing."""

import io
import os
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shard_tools.inspect import inspect
from shard_tools.pack import pack
from shard_tools.shards.index import open_index, write_index
from shard_tools.verify import verify
from tests.support import raw_data


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    source = raw_data.valid_pairs(root / "source", 60)
    raw_data.add(source, "train/metal", "odd.name~", raw_data.jpeg(900), raw_data.npy(raw_data.vector(900)))
    raw_data.add(source, "train/r&b", "odd.name~", raw_data.jpeg(901), raw_data.npy(raw_data.vector(901)))
    raw_data.add(source, "train/r&b", "alone", raw_data.jpeg(902), None)
    assert pack(str(source), str(root / "out"), samples_per_shard=8, workers=1) == 0
    return root / "out"


@pytest.fixture
def folder(packed, tmp_path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "shards"))


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def rewritten(folder: Path, split: str = "train", rows=None, **changes) -> None:
    """Writes an index again, with changes and right checksums, as an enemy would."""
    index = open_index(folder, split)
    rows = np.array(index.rows) if rows is None else rows
    metadata = {k: v for k, v in index.metadata.items() if k not in ("schema", "split", "rows_sha256", "self_sha256")}
    write_index(folder, split, metadata | changes, len(rows), [rows])


def test_a_sound_folder_has_no_problems(packed, capsys):
    assert verify(str(packed), workers=2) == 0 and verify(str(packed), full=True, workers=1) == 0
    assert "no problem(s) in 62 samples, 8 shards" in capsys.readouterr().out


def test_one_flipped_bit_in_any_file_is_found_and_the_file_named(folder, capsys):
    chance = random.Random(0)
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size * 8
        bits = [0, size - 1, *(chance.randrange(size) for _ in range(6 if path.suffix == ".tar" else 25))]
        for bit in bits:
            flip(path, bit)
            assert verify(str(folder), workers=1) == 1, (path.name, bit)
            problem = capsys.readouterr().out.splitlines()[0]
            assert problem.startswith(path.name.removesuffix(".json").removesuffix(".npy")), problem
            flip(path, bit)
    assert verify(str(folder), workers=1) == 0


def test_a_flipped_case_of_an_exponent_is_found_too(folder):
    path = folder / "train.index.json"
    at = path.read_bytes().index(b"e-") * 8
    flip(path, at + 5)
    open_index(folder, "train")  # the JSON means what it meant
    assert verify(str(folder), workers=1) == 1


def test_full_names_the_bad_sample(folder, capsys):
    index = open_index(folder, "train")
    row = index.rows[11]
    with tarfile.open(index.shards[row["shard"]]) as tar:
        key = next(m.name for m in tar if m.offset_data == row["cover_offset"]).removesuffix(".jpg")
    for offset in (row["cover_offset"] + 300, row["audio_offset"] + 200, row["cover_offset"] - 500):
        bit = int(offset) * 8 + 3
        flip(index.shards[row["shard"]], bit)
        assert verify(str(folder), full=True, workers=1) == 1
        out = capsys.readouterr().out
        assert "SHA-256" in out and len([line for line in out.splitlines() if "sample" in line]) == 2
        assert key[:4] in out or offset < row["cover_offset"]
        flip(index.shards[row["shard"]], bit)


def test_full_finds_what_honest_checksums_hide(folder, capsys):
    rows = np.array(open_index(folder, "train").rows)
    for name, value in (("cover_offset", 7), ("cover_bytes", 2**32 - 1), ("crc", 1), ("audio_offset", 2**63)):
        changed = rows.copy()
        changed[name][3] = value
        rewritten(folder, rows=changed)
        assert verify(str(folder), full=True, workers=1) == 1, name
        assert "sample 3" in capsys.readouterr().out
    for name, value in (("genre", -1), ("genre", 99), ("shard", 4), ("audio_bytes", 0)):
        changed = rows.copy()
        changed[name][3] = value
        rewritten(folder, rows=changed)
        assert verify(str(folder), workers=1) == 1, name


def test_missing_surplus_and_unfinished_are_told(folder, capsys):
    (folder / "train-00001-of-00004.tar").rename(folder / "extra-00001-of-00004.tar")
    (folder / ".pack").mkdir()
    (folder / "val.index.json").unlink()
    assert verify(str(folder), workers=1) == 1
    out = capsys.readouterr().out
    for problem in ("train-00001-of-00004.tar: missing", "extra-00001-of-00004.tar: belongs to no index",
                    ".pack: unfinished", "val.index.json: missing", "val.index.npy: belongs to no index"):
        assert problem in out


def test_files_that_are_none_are_told_and_not_waited_for(folder, capsys):
    for name in ("val.index.json", "train.index.npy", "train-00001-of-00004.tar", "quarantine.jsonl"):
        (folder / name).rename(folder / "aside")
        os.mkfifo(folder / name)
        assert verify(str(folder), full=True, workers=1) == 1
        assert name[:5] in capsys.readouterr().out
        (folder / "aside").rename(folder / name)


def test_a_folder_that_is_no_folder_of_shards_is_told(tmp_path):
    assert verify(str(tmp_path), workers=1) == 1
    with pytest.raises(ValueError, match="not a folder"):
        verify(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no"):
        inspect(str(tmp_path))


@pytest.mark.parametrize("changes", [
    {"shards": [{"name": "../../secret.tar", "samples": 32, "bytes": 1, "sha256": ""}]}, {"shards": 3},
    {"genres": [1, 2]}, {"genres": ["..", "new_age", "r&b"]}, {"genres": ["../../x", "new_age", "r&b"]},
    {"splits": ["../x"]}, {"audio": []}, {"audio": {"dimension": 1, "mean": ["a"], "std": [0.0]}},
    {"samples": None}, {"resolution": "big"},
])
def test_hostile_facts_are_refused_by_both(folder, tmp_path, changes):
    try:
        rewritten(folder, **changes)
    except TypeError:
        pytest.skip("can't be written")
    assert verify(str(folder), full=True, workers=1) == 1
    with pytest.raises(ValueError):
        inspect(str(folder), unpack=str(tmp_path / "a/b/c"))
    assert not (tmp_path / "a").exists()


def test_hostile_keys_never_lead_out_of_the_folder(folder, tmp_path):
    path = folder / "train-00000-of-00004.tar"
    rows = np.array(open_index(folder, "train").rows)
    with tarfile.open(path) as tar:
        key = tar.getnames()[0].removesuffix(".jpg")
    for hostile in ("%2E%2E%2F%2E%2E%2Fpwned", "%00", "%2Fetc%2Fpwned", "%2E%2E"):
        output = io.BytesIO()
        with tarfile.open(path) as old, tarfile.open(fileobj=output, mode="w", format=tarfile.USTAR_FORMAT) as new:
            for member in old:
                data = old.extractfile(member)
                member.name = member.name.replace(key, hostile)
                new.addfile(member, data)
        other = shutil.copytree(folder, tmp_path / f"hostile{len(hostile)}{hostile[-1]}")
        (other / path.name).write_bytes(output.getvalue())
        rewritten(other, rows=rows)
        out = tmp_path / f"deep/deep/out{len(hostile)}{hostile[-1]}"
        inspect(str(other), unpack=str(out), split="train")
        assert (out / "train").is_dir() and len(list(out.rglob("*.jpg"))) == 32
        assert not list(tmp_path.glob("**/pwned*")) and (other / path.name).exists()


def test_inspect_tells_counts_groups_and_drops(packed, capsys):
    assert inspect(str(packed)) == 0
    out = capsys.readouterr().out
    for words in ("train           32", "[0, 30) present in", "orphan cover", "samples a group (train)", "r&b", "####"):
        assert words in out


def test_preview_shows_genres_and_is_the_same_every_time(packed, tmp_path):
    inspect(str(packed), preview=str(tmp_path / "a.png"))
    inspect(str(packed), preview=str(tmp_path / "b.png"))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    image = Image.open(tmp_path / "a.png")
    assert image.format == "PNG" and image.width > 1000 and len(image.getcolors(1 << 20)) > 1000


def test_unpacked_folders_pack_to_the_same_shards(packed, tmp_path):
    inspect(str(packed), unpack=str(tmp_path / "folders"))
    assert len(list((tmp_path / "folders/train/r&b").glob("*.jpg"))) > 5
    assert (tmp_path / "folders/train/metal/odd.name~.npy").exists()
    pack(str(tmp_path / "folders"), str(tmp_path / "again"), samples_per_shard=8, workers=1)
    covers = [sorted(open_index(root, "train").rows["cover_hash"].tolist()) for root in (packed, tmp_path / "again")]
    assert covers[0] == covers[1]
    one, other = (raw_data.hashes(root) for root in (packed, tmp_path / "again"))
    assert one["val-00000-of-00002.tar"] == other["val-00000-of-00002.tar"]
    with pytest.raises(ValueError, match="not empty"):
        inspect(str(packed), unpack=str(tmp_path / "folders"))
