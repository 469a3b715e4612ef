"""Packing: what goes into the shards, what into quarantine, and that bytes depend on nothing else."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from shard_tools.dataset.layout import read_key
from shard_tools.pack import pack
from shard_tools.shards.index import open_index, splits_in
from shard_tools.shards.tar import read_sample
from tests.support import raw_data
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return raw_data.valid_pairs(tmp_path_factory.mktemp("raw") / "source", 60)


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    assert pack(str(source), str(out), samples_per_shard=8, workers=1) == 0
    return out


def quarantine(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


def test_stock_webdataset_reads_every_pair_byte_for_byte(source, packed):
    shards = sorted(str(path) for path in packed.glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len(samples) == 60
    covers = {path.name.split(".")[0]: path for path in source.glob("*/cover/*/*/*")}
    for sample in samples:
        stem = read_key(sample["__key__"])
        assert set(sample) - {"__key__", "__url__", "__local_path__"} == {"jpg", "npy"}
        assert sample["jpg"] == covers[stem].read_bytes()
        audio = str(covers[stem].parent / f"{stem}.npy").replace("/cover/", "/audio/")
        np.testing.assert_array_equal(np.load(audio), np.frombuffer(sample["npy"][-4 * raw_data.DIMENSION:], "<f4"))


def test_index_finds_every_sample_and_counts_agree(packed):
    assert list(splits_in(packed)) == ["train", "val", "test"]
    for split, expected in (("train", 30), ("val", 15), ("test", 15)):
        index = open_index(packed, split)
        metadata = index.metadata
        assert len(index.rows) == metadata["samples"] == expected == sum(metadata["genre_counts"].values())
        assert metadata["genres"] == ["metal", "new_age", "r&b"] and metadata["resolution"] == 32
        sizes = [shard["samples"] for shard in metadata["shards"]]
        assert max(sizes) <= 8 and max(sizes) - min(sizes) <= 1
        assert [path.name for path in index.shards] == sorted(p.name for p in packed.glob(f"{split}-*.tar"))
        for row in index.rows:
            with open(index.shards[row["shard"]], "rb") as file:
                key, cover, audio = read_sample(file, row)
            assert cover[:2] == b"\xff\xd8" and audio[:6] == b"\x93NUMPY"
            assert key.isascii() and "." not in key
            assert row["audio_offset"] == row["cover_offset"] + -(-len(cover) // 512) * 512 + 512  # one read gets both


def test_groups_are_albums_and_covers_of_unknown_album_join_the_album_with_the_same_cover(packed):
    groups = {}
    for split in splits_in(packed):
        index = open_index(packed, split)
        for row in index.rows:
            with open(index.shards[row["shard"]], "rb") as file:
                groups[read_key(read_sample(file, row)[0])] = (row["group"], row["cover_hash"])
    name = {i: next(s for s in groups if s == raw_data.stem(i, i % 3, i - (i % 5 == 1))) for i in range(60)}
    assert groups[name[5]][0] == groups[name[6]][0]  # both of album 5, kinds 2 and 0
    assert groups[name[15]][0] == groups[name[16]][0]  # 16 is an MSD stem: its cover tells
    assert groups[name[2]][0] != groups[name[3]][0]
    assert all(group >= 0 for group, _ in groups.values())


def test_statistics_are_of_train_and_of_present_blocks_only(source, packed):
    audio = open_index(packed, "val").metadata["audio"]
    assert audio["blocks"] == [[0, 30], [30, 60]] and audio["dimension"] == 60
    vectors = np.stack([np.load(path) for path in source.glob("*/audio/train/*/*.npy")]).astype(np.float64)
    for start, end in audio["blocks"]:
        values = vectors[(vectors[:, start:end] != 0).any(1), start:end]
        np.testing.assert_allclose(audio["mean"][start:end], values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(audio["std"][start:end], values.std(0), rtol=1e-9)
    assert audio["block_counts"] == [20, 20] and "present" in audio["presence_rule"]


def test_messy_folder_packs_all_valid_pairs_and_names_every_bad_file(tmp_path):
    trace = Path("/tmp/covergen_was_executed")
    trace.unlink(missing_ok=True)
    source = raw_data.valid_pairs(tmp_path / "source", 20)
    expected = raw_data.messy_pairs(source)
    assert pack(str(source), str(tmp_path / "out"), workers=2) == 1  # 21 bad files of 42: above 5%
    found = quarantine(tmp_path / "out")
    assert {line["path"]: line["reason"] for line in found} == expected
    assert [line["path"] for line in found] == sorted(expected)
    assert all(set(line) == {"path", "stage", "reason", "detail"} for line in found)
    metadata = open_index(tmp_path / "out", "train").metadata
    assert metadata["drops"] == dict(Counter(expected.values())) and metadata["ignored_files"] == 2
    assert sum(open_index(tmp_path / "out", split).metadata["samples"] for split in metadata["splits"]) == 21
    assert not trace.exists()
    assert pack(str(source), str(tmp_path / "out"), max_failure_rate=0.6, workers=1) == 0  # already packed


@pytest.mark.parametrize("data", [
    raw_data.encoded(raw_data.picture(1), "PNG"), raw_data.encoded(raw_data.picture(1), "WEBP"),
    raw_data.encoded(raw_data.picture(1, mode="L")), raw_data.encoded(raw_data.picture(1, mode="CMYK")),
    raw_data.jpeg(1, progressive=True), raw_data.encoded(raw_data.picture(1, mode="P"), "PNG"),
    raw_data.encoded(raw_data.picture(1, (50, 32))), raw_data.encoded(raw_data.picture(1, (999, 999))),
], ids=["png", "webp", "grey", "cmyk", "progressive", "palette", "wide", "large"])
def test_other_kinds_of_covers_become_baseline_rgb_of_the_asked_resolution(tmp_path, data):
    place = tmp_path / "source/train/pop"
    place.mkdir(parents=True)
    (place / "a.jpg").write_bytes(data)
    (place / "b.jpg").write_bytes(raw_data.jpeg(2))
    pack(str(tmp_path / "source"), str(tmp_path / "out"), resolution=32, workers=1)
    members = {s["__key__"]: s["jpg"] for s in webdataset.WebDataset(
        str(tmp_path / "out/train-00000-of-00001.tar"), shardshuffle=False)}
    assert members["b"] == raw_data.jpeg(2)
    (tmp_path / "a.jpg").write_bytes(members["a"])
    image = Image.open(tmp_path / "a.jpg")
    assert (image.format, image.mode, image.size, "progressive" in image.info) == ("JPEG", "RGB", (32, 32), False)


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_do_not_depend_on_the_number_of_workers(source, packed, tmp_path, workers):
    pack(str(source), str(tmp_path / "out"), samples_per_shard=8, workers=workers)
    assert raw_data.hashes(tmp_path / "out") == raw_data.hashes(packed)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_is_read_in_place_to_the_same_bytes(source, packed, tmp_path, method):
    with zipfile.ZipFile(tmp_path / "multimodal_dataset.zip", "w", method) as archive:
        for path in sorted(source.rglob("*"), reverse=True):
            archive.write(path, f"multimodal_dataset/{path.relative_to(source)}")
    pack(str(tmp_path / "multimodal_dataset.zip"), str(tmp_path / "out"), samples_per_shard=8, workers=2)
    assert raw_data.hashes(tmp_path / "out") == raw_data.hashes(packed)


def test_covers_only_have_no_audio(source, tmp_path):
    shutil.copytree(source / "audio-cover_dataset/cover", tmp_path / "source/cover_dataset")
    pack(str(tmp_path / "source"), str(tmp_path / "out"), workers=1)
    index = open_index(tmp_path / "out", "train")
    assert index.metadata["audio"] is None and not index.rows["audio_bytes"].any() and not index.metadata["drops"]


def test_seed_changes_the_order_and_nothing_else(source, packed, tmp_path):
    pack(str(source), str(tmp_path / "out"), samples_per_shard=8, seed=1, workers=1)
    one, other = open_index(packed, "train").rows, open_index(tmp_path / "out", "train").rows
    assert sorted(one["cover_hash"]) == sorted(other["cover_hash"])
    assert one["cover_hash"].tolist() != other["cover_hash"].tolist()


def test_finished_output_is_kept_and_other_options_are_refused(source, packed, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    assert pack(str(source), str(out), samples_per_shard=8, workers=1) == 0
    assert "already packed" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"samples_per_shard 8, not 9.*--overwrite"):
        pack(str(source), str(out), samples_per_shard=9, workers=1)
    assert raw_data.hashes(out) == raw_data.hashes(packed)
    assert pack(str(source), str(out), samples_per_shard=20, workers=1, overwrite=True) == 0
    assert len(list(out.glob("*.tar"))) == 4
    next(out.glob("*.tar")).unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        pack(str(source), str(out), samples_per_shard=20, workers=1)


def test_changed_source_is_noticed(source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    pack(str(tmp_path / "source"), str(tmp_path / "out"), workers=1)
    next((tmp_path / "source").glob("*/cover/*/*/*")).unlink()
    with pytest.raises(ValueError, match=r"not what .* was packed from"):
        pack(str(tmp_path / "source"), str(tmp_path / "out"), workers=1)


def test_folders_of_others_and_nonsense_are_refused(source, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"not empty .*thesis\.tex"):
        pack(str(source), str(tmp_path), workers=1)
    with pytest.raises(ValueError, match="not empty"):
        pack(str(source), str(tmp_path), workers=1, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()
    with pytest.raises(ValueError, match="lies in --source"):
        pack(str(source), str(source / "shards"), workers=1)
    with pytest.raises(ValueError, match="does not exist"):
        pack(str(tmp_path / "no"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="no layout"):
        pack(str(tmp_path), str(tmp_path.parent / "out"))
    with pytest.raises(ValueError, match=r"not a folder, and not a whole \.zip"):
        pack(str(tmp_path / "thesis.tex"), str(tmp_path / "out"))


def test_damaged_index_can_be_overwritten(source, packed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    (out / "val.index.json").write_text("{}")
    with pytest.raises(ValueError, match="not a shard index"):
        pack(str(source), str(out), samples_per_shard=8, workers=1)
    pack(str(source), str(out), samples_per_shard=8, workers=1, overwrite=True)
    assert raw_data.hashes(out) == raw_data.hashes(packed)


def test_nothing_sound_is_an_error_that_names_the_reasons(tmp_path, capsys):
    source = tmp_path / "source"
    raw_data.add(source, "train/pop", "a", raw_data.jpeg(1), None)
    raw_data.add(source, "train/pop", "b", None, raw_data.npy(raw_data.vector(1)))
    with pytest.raises(ValueError, match=r"nothing to pack.*quarantine\.jsonl"):
        pack(str(source), str(tmp_path / "out"), workers=1)
    assert [line["reason"] for line in quarantine(tmp_path / "out")] == ["orphan audio", "orphan cover"]
    assert "orphan cover" in capsys.readouterr().out
    raw_data.add(source, "train/pop", "b", raw_data.jpeg(2), None)  # mended: the same command now packs
    assert pack(str(source), str(tmp_path / "out"), workers=1, max_failure_rate=0.5) == 0


def test_minorities_of_size_are_dropped_with_the_remedy_and_resolution_mends_them(tmp_path):
    source = raw_data.valid_pairs(tmp_path / "source", 12)
    wide = raw_data.encoded(raw_data.picture(5, (40, 32)))
    raw_data.add(source, "val/metal", "wide", wide, raw_data.npy(raw_data.vector(5)))
    assert pack(str(source), str(tmp_path / "a"), workers=1) == 1
    line, = quarantine(tmp_path / "a")
    assert line["reason"] == "wrong cover size" and "40 x 32" in line["detail"] and "--resolution 32" in line["detail"]
    assert pack(str(source), str(tmp_path / "b"), workers=1, resolution=32) == 0 and not quarantine(tmp_path / "b")


def test_a_second_process_in_the_same_folder_is_refused(source, tmp_path):
    from shard_tools.core.locks import lock_output

    (tmp_path / "out").mkdir()
    with lock_output(tmp_path / "out"), pytest.raises(ValueError, match="in use by process"):
        pack(str(source), str(tmp_path / "out"), workers=1)


def test_names_that_are_no_text_survive(tmp_path):
    folder = os.fsencode(tmp_path) + b"/source/train/caf\xe9"
    os.makedirs(folder)
    for name, data in ((b"bj\xf6rk. 1!.jpg", raw_data.jpeg(1)), (b"\xff\xfe.jpg", b"broken"),
                       (b"a~b%2E.jpg", raw_data.jpeg(2))):
        with open(folder + b"/" + name, "wb") as file:
            file.write(data)
    assert pack(str(tmp_path / "source"), str(tmp_path / "out"), workers=2) == 1
    assert os.fsencode(quarantine(tmp_path / "out")[0]["path"]) == b"train/caf\xe9/\xff\xfe.jpg"
    index = open_index(tmp_path / "out", "train")
    with open(index.shards[0], "rb") as file:
        stems = {os.fsencode(read_key(read_sample(file, row)[0])) for row in index.rows}
    assert stems == {b"bj\xf6rk. 1!", b"a~b%2E"}
    done = subprocess.run([sys.executable, "-m", "shard_tools.inspect", tmp_path / "out"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert "caf\\udce9" in done.stdout


def test_command_line_reports_and_exits_as_promised(source, tmp_path):
    command = [sys.executable, "-m", "shard_tools.pack", "--source", source, "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "60 samples in" in done.stdout and "accelerate launch -m covergen.train" in done.stdout
    done = subprocess.run([*command, "--resolutoin", "64"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'resolution'" in done.stderr


def test_nothing_heavy_is_imported():
    code = "import sys, shard_tools.pack, shard_tools.verify, shard_tools.inspect; print(sorted(set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "webdataset", "covergen", "fire"} & set(eval(done.stdout))
