"""The demo's truth travels with its shards and has of every row what its cover shows."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from covergen.data.dataset import ShardDataset
from covergen.evaluation.demo_truth import read_truth
from shard_tools.dataset.demo_truth import read_columns
from shard_tools.inspect import inspect
from shard_tools.pack import pack
from shard_tools.shards.tar import read_sample
from shard_tools.verify import verify
from tests.support import raw_data

TRUTH = "attributes.npz"
SPLITS = ("train", "val", "test")


def opened(root: Path, split: str) -> ShardDataset:
    return ShardDataset(root, split, audio_scale="raw")


@pytest.fixture
def own(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards that a test may spoil."""
    return Path(shutil.copytree(shards, tmp_path / "own"))


def test_packing_copies_the_truth_and_changes_nothing_else(world: Path, shards: Path, tmp_path: Path):
    assert (shards / TRUTH).read_bytes() == (world / TRUTH).read_bytes()
    bare = shutil.copytree(world, tmp_path / "bare", ignore=shutil.ignore_patterns("demo.json"))
    assert pack(str(bare), str(tmp_path / "out"), samples_per_shard=64, workers=1) == 0
    with_it, without = raw_data.hashes(shards), raw_data.hashes(tmp_path / "out")
    assert with_it.pop(TRUTH) and with_it == without


def test_packing_again_adds_or_mends_it(world: Path, own: Path, capsys):
    before = raw_data.hashes(own)
    for spoil in (Path.unlink, lambda path: path.write_bytes(b"cut")):
        spoil(own / TRUTH)
        assert pack(str(world), str(own), samples_per_shard=64, workers=1) == 0
        assert f"already packed; {TRUTH} was added" in capsys.readouterr().out
        assert raw_data.hashes(own) == before
    assert pack(str(world), str(own), samples_per_shard=64, workers=1) == 0
    assert "added" not in capsys.readouterr().out


def test_a_zip_with_a_folder_around_the_demo_has_it_too(world: Path, shards: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "demo.zip", "w") as archive:
        for path in world.rglob("*"):
            archive.write(path, f"some/demo/{path.relative_to(world)}")
    assert pack(str(tmp_path / "demo.zip"), str(tmp_path / "out"), samples_per_shard=64, workers=1) == 0
    assert raw_data.hashes(tmp_path / "out") == raw_data.hashes(shards)


def test_a_damaged_truth_is_warned_of_and_left_out(world: Path, shards: Path, tmp_path: Path, capsys):
    source = shutil.copytree(world, tmp_path / "source")
    (source / TRUTH).write_bytes((world / TRUTH).read_bytes()[:-1000])
    assert pack(str(source), str(tmp_path / "out"), samples_per_shard=64, workers=1) == 0
    assert "warning" in (said := capsys.readouterr().out) and "packing without it" in said
    assert raw_data.hashes(tmp_path / "out") == {k: v for k, v in raw_data.hashes(shards).items() if k != TRUTH}


def test_overwriting_with_what_is_no_demo_removes_it(own: Path, tmp_path: Path):
    source = raw_data.valid_pairs(tmp_path / "source", 12)
    assert pack(str(source), str(own), workers=1, overwrite=True) == 0
    assert not (own / TRUTH).exists() and verify(str(own), workers=1) == 0


def test_verify_and_inspect_know_it(own: Path, capsys):
    assert verify(str(own), full=True, workers=1) == 0 and inspect(str(own)) == 0
    assert f"truth   {TRUTH}" in capsys.readouterr().out
    data = bytearray((own / TRUTH).read_bytes())
    for place in range(1000, len(data) - 1000, len(data) // 7):
        data[place] ^= 4
        (own / TRUTH).write_bytes(data)
        assert verify(str(own), workers=1) == 1
        assert capsys.readouterr().out.startswith(f"{TRUTH} is no truth of a demo")
        data[place] ^= 4
    buffer = io.BytesIO()
    np.savez(buffer, stems=np.array([{"a": 1}], object))
    (own / TRUTH).write_bytes(buffer.getvalue())
    assert verify(str(own), workers=1) == 1 and "pickle" in capsys.readouterr().out
    (own / TRUTH).unlink()
    assert verify(str(own), workers=1) == 0


def test_every_row_is_found_and_is_its_own(world: Path, shards: Path):
    truth, columns = read_truth(shards), read_columns(world / TRUTH)
    stems = {stem: row for row, stem in enumerate(columns["stems"].tolist())}
    assert truth.names == tuple(columns["attribute_names"]) and len(truth.names) == 8
    total = 0
    for split in SPLITS:
        part = opened(shards, split)
        rows = np.random.default_rng(0).permutation(len(part.index.rows))
        values, found = truth.find(part, rows)
        assert found.all() and values.dtype == np.float32
        for row, value in zip(part.index.rows[rows], values, strict=True):
            with open(part.shards[row["shard"]], "rb") as file:
                place = stems[read_sample(file, row)[0]]
            assert (columns["split"][place], columns["genre"][place]) == (split, part.metadata["genres"][row["genre"]])
            np.testing.assert_allclose(value * truth.std + truth.mean, columns["drawn"][place], rtol=1e-4, atol=1e-4)
        total += len(rows)
    assert total == len(stems)
    training = truth.find(part := opened(shards, "train"), np.arange(len(part.index.rows)))[0]
    np.testing.assert_allclose(training.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(training.std(0), 1, atol=1e-5)


def test_stems_that_are_no_keys_and_stems_that_recur_are_found(tmp_path: Path):
    names = [("metal", "odd.name~ö"), ("r&b", "odd.name~ö"), ("metal", "x" * 120), ("r&b", "plain")]
    for number, (genre, stem) in enumerate(names):
        raw_data.add(tmp_path / "source", f"train/{genre}", stem, raw_data.jpeg(number),
                     raw_data.npy(raw_data.vector(number)))
    raw_data.add_truth(tmp_path / "source", names)
    assert pack(str(tmp_path / "source"), str(tmp_path / "out"), workers=1) == 0
    part, truth = opened(tmp_path / "out", "train"), read_truth(tmp_path / "out")
    values, found = truth.find(part, np.arange(4))
    covers = {hash(raw_data.jpeg(number)): number for number in range(4)}
    expected = []
    for row in part.index.rows:
        with open(part.shards[row["shard"]], "rb") as file:
            expected.append(covers[hash(read_sample(file, row)[1])])
    assert found.all() and np.round(values[:, 0] * truth.std + truth.mean).tolist() == expected


def test_no_truth_another_demos_and_a_damaged_one(world: Path, own: Path, tmp_path: Path):
    raw_data.valid_pairs(tmp_path / "source", 12)
    pack(str(tmp_path / "source"), str(tmp_path / "out"), workers=1)
    assert read_truth(tmp_path / "out") is None
    shutil.copy(world / TRUTH, tmp_path / "out")
    values, found = read_truth(tmp_path / "out").find(opened(tmp_path / "out", "train"), np.arange(6))
    assert values.shape == (6, 8) and not values.any() and not found.any()
    (own / TRUTH).write_bytes(b"PK")
    with pytest.raises(ValueError, match="no truth of a demo"):
        read_truth(own)


def test_a_shard_that_is_not_what_its_index_says_is_told(own: Path):
    part = opened(own, "train")
    with open(part.shards[0], "r+b") as file:
        file.seek(int(part.index.rows[0]["cover_offset"]) - 512)
        file.write(b"another.jpg")
    with pytest.raises(ValueError, match=r"no header of a \.jpg"):
        read_truth(own).find(part, np.arange(1))


def test_the_demo_of_training_gets_a_truth_that_it_lacks(tmp_path: Path, monkeypatch):
    from covergen.training.setup import demo_shards
    from shard_tools import demo
    made = demo.make
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "make", lambda out, tier: made(out, tier, albums=12))
    root = Path(demo_shards(print))
    before = raw_data.hashes(root)
    assert tmp_path in root.parents and TRUTH in before
    for folders_too in (False, True):
        (root / TRUTH).unlink()
        if folders_too:
            shutil.rmtree(root.parent / "folders")
        assert Path(demo_shards(print)) == root and raw_data.hashes(root) == before
