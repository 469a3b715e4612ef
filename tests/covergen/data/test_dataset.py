"""Batches: what is in them, what damaged or foreign shards do, and how they reach training."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from covergen.data.audio import AudioNormalizer
from covergen.data.batch import downscale
from covergen.data.dataset import ShardDataset
from covergen.data.loader import Loader
from covergen.data.stream import open_stream
from shard_tools.pack import pack
from shard_tools.shards.index import open_index
from tests.support import raw_data

CPU = torch.device("cpu")


def source_of(world: Path) -> dict[bytes, np.ndarray]:
    """Vector bytes -> pixels of the cover, of every training pair of the folders."""
    pairs = {}
    for cover in world.glob("audio-cover_dataset/cover/train/*/*.jpg"):
        vector = np.load(str(cover).replace("/cover/", "/audio/").replace(".jpg", ".npy"))
        pairs[vector.astype("<f4").tobytes()] = np.asarray(Image.open(cover).convert("RGB"))
    return pairs


def test_a_batch_holds_the_pairs_of_the_folders(world: Path, shards: Path) -> None:
    stream, pairs = open_stream(shards, "train", batch_size=16), source_of(world)
    audio, rows = stream.metadata["audio"], stream.rows(2)
    batch = stream.batch(2)
    assert batch.cover.shape == (16, 3, 32, 32) and batch.cover.dtype == torch.uint8
    assert batch.audio.shape == (16, 1160 + 2) and batch.audio.dtype == torch.float32
    assert batch.genre.dtype == batch.group.dtype == torch.int64
    scale, found = AudioNormalizer(audio), {key: value for key, value in pairs.items()}
    standard = {scale(np.frombuffer(key, "<f4")[None]).tobytes(): pixels for key, pixels in found.items()}
    for cover, vector, genre, row in zip(batch.cover, batch.audio, batch.genre, rows, strict=True):
        pixels = standard[vector.numpy().tobytes()]
        assert np.abs(cover.permute(1, 2, 0).numpy().astype(int) - pixels).max() <= 3  # two decoders
        assert genre == stream.dataset.index.rows["genre"][row]


def test_covers_without_vectors_are_read_too(tmp_path: Path) -> None:
    for number in range(12):
        raw_data.add(tmp_path / "raw", "train/pop", f"{number}", raw_data.jpeg(number), None)
    assert pack(str(tmp_path / "raw/audio-cover_dataset/cover"), str(tmp_path / "shards"), workers=1) == 0
    stream = open_stream(tmp_path / "shards", "train", batch_size=4)
    batch = stream.batch(0)
    assert batch.audio is None and batch.cover.float().std() > 10


def test_audio_is_standardised_clipped_and_says_what_is_absent() -> None:
    scale = AudioNormalizer({"dimension": 4, "blocks": [[0, 2], [2, 4]], "mean": [1, 0, 5, 0], "std": [2, 0, 1e-3, 1]})
    out = scale(np.array([[3, 7, 0, 0], [0, 0, 9, -9]], np.float32))
    np.testing.assert_allclose(out, [[1, 5, 0, 0, 1, 0], [0, 0, 5, -5, 0, 1]])


def test_training_columns_have_mean_zero_and_deviation_one(shards: Path) -> None:
    stream = open_stream(shards, "train", batch_size=4)
    rows = np.arange(stream.metadata["samples"])
    audio = stream.dataset.read(rows).audio.numpy()
    present = audio[:, 1160] == 1
    assert abs(audio[present, :580].mean()) < 0.05 and abs(audio[present, :580].std() - 1) < 0.1
    assert (audio[~present, :580] == 0).all()


def test_the_loader_gives_the_stream_from_any_place(shards: Path) -> None:
    stream = open_stream(shards, "train", batch_size=8)
    for start in (0, 57):
        loader = Loader(stream, start, device=CPU, resolution=32, threads=2)
        for number in range(start, start + 5):
            assert torch.equal(next(loader).cover, stream.batch(number).cover)
        loader.close()


def test_a_smaller_resolution_averages_areas(shards: Path) -> None:
    loader = Loader(open_stream(shards, "train", batch_size=8), 0, device=CPU, resolution=16, threads=1)
    assert next(loader).cover.shape == (8, 3, 16, 16)
    loader.close()
    cover = torch.tensor([[[[0, 2], [4, 6]]]], dtype=torch.uint8)
    assert downscale(cover, 1).item() == 3 and downscale(cover, 2) is cover


def test_missing_folders_splits_and_shards_are_named(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_stream(str(tmp_path / "none"), "train", batch_size=2)
    with pytest.raises(FileNotFoundError, match="no shards"):
        open_stream(str(tmp_path), "train", batch_size=2)
    with pytest.raises(FileNotFoundError, match="found: train, val, test"):
        open_stream(str(shards), "valid", batch_size=2)
    for path in shards.iterdir():
        if path.is_file() and "00001-of" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"1 shards of the index are missing.*train-00001-of-00003\.tar"):
        open_stream(str(tmp_path), "train", batch_size=2)


def test_a_damaged_sample_is_named(shards: Path, tmp_path: Path) -> None:
    for path in shards.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    row = open_index(shards, "train").rows[5]
    shard = tmp_path / f"train-{row['shard']:05d}-of-00003.tar"
    data = bytearray(shard.read_bytes())
    data[int(row["cover_offset"]):int(row["cover_offset"]) + 100] = bytes(100)
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{shard.name}: damaged sample at byte {row['cover_offset']}"):
        ShardDataset(tmp_path, "train").read(np.array([5]))
    shard.write_bytes(data[: int(row["cover_offset"]) + 10])
    with pytest.raises(ValueError, match="ends before byte"):
        ShardDataset(tmp_path, "train").read(np.array([5]))


def write_foreign(path: Path, samples: list[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for kind, data in sample.items():
                member = tarfile.TarInfo(f"{number:04d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def foreign_sample(number: int, kind: str = "JPEG") -> dict[str, bytes]:
    picture, vector = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (40, 36), (4 * number, 100, 50)).save(picture, kind)
    np.save(vector, np.full(6, float(number)))
    return {{"JPEG": "jpg", "PNG": "png"}[kind]: picture.getvalue(), "npy": vector.getvalue(),
            "json": json.dumps({"genre": ["jazz", "rock"][number % 2]}).encode()}


def test_foreign_shards_stream_without_an_index(tmp_path: Path) -> None:
    write_foreign(tmp_path / "a.tar", [foreign_sample(n, "PNG" if n % 5 == 0 else "JPEG") for n in range(30)])
    write_foreign(tmp_path / "b.tar", [foreign_sample(n) for n in range(30, 60)])
    stream = open_stream(str(tmp_path), "train", batch_size=8, seed=1)
    assert "epochs are approximate" in stream.notice
    assert stream.resolution == 32 and stream.metadata["genres"] == ["jazz", "rock"]
    batch = stream.batch(0)
    assert batch.cover.shape == (8, 3, 32, 32) and batch.audio.shape == (8, 7)
    numbers = (batch.cover[:, 0].float().mean((1, 2)) / 4).round().long()
    assert torch.equal(batch.genre, numbers % 2)
    assert len(set(numbers.tolist())) > 3
    again = open_stream(str(tmp_path), "train", batch_size=8, seed=1)
    assert torch.equal(again.batch(0).cover, batch.cover)
    other = open_stream(str(tmp_path), "train", batch_size=8, seed=1, rank=1, ranks=2)
    assert other.batch(0).cover.shape[0] == 4


def test_hostile_foreign_members_are_left_out_and_run_nothing(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    pickled = io.BytesIO()
    np.save(pickled, np.array([Trap(str(trap))], dtype=object), allow_pickle=True)
    bad = {**foreign_sample(1), "npy": pickled.getvalue()}
    write_foreign(tmp_path / "a.tar", [bad, {**foreign_sample(2), "jpg": b"no picture", "pkl": b"x"},
                                       *(foreign_sample(n) for n in range(3, 20))])
    with pytest.warns(UserWarning, match=r"left out .*pickled vector"):
        stream = open_stream(str(tmp_path), "train", batch_size=8)
    assert stream.metadata["samples"] == 17 and stream.batch(0).cover.shape[0] == 8
    assert not trap.exists()


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))
