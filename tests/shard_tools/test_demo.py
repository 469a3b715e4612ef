"""The demo world is deterministic, honest about its truth, safe to rerun, and readable from its covers."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from shard_tools import demo
from shard_tools.dataset import demo_world as worlds

UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
MSD = r"TR[A-Z0-9]{16}"
ALBUMS = 240


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    demo.make(out := tmp_path_factory.mktemp("demo") / "world", albums=ALBUMS)
    return out


@pytest.fixture(scope="module")
def truth(made: Path) -> dict[str, np.ndarray]:
    with np.load(made / "attributes.npz", allow_pickle=False) as file:
        return dict(file)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "shard_tools.demo", *words], capture_output=True, text=True)


def test_bytes_depend_on_the_seed_and_the_album_alone(made, tmp_path):
    whole = contents(made)
    demo.make(tmp_path / "again", albums=ALBUMS)
    assert contents(tmp_path / "again") == whole
    demo.make(tmp_path / "fewer", albums=30)
    assert all(whole[name] == data for name, data in contents(tmp_path / "fewer").items() if "/" in name)
    demo.make(tmp_path / "other", albums=20, seed=1)
    assert set(contents(tmp_path / "other")) & set(whole) == {"attributes.npz", "demo.json"}


def test_the_truth_names_every_file_and_agrees_with_it(made, truth):
    sound = made / "audio-cover_dataset"
    named = ["/".join(row) for row in zip(truth["split"], truth["genre"], truth["stems"], strict=True)]
    for kind, ending in (("cover", ".jpg"), ("audio", ".npy")):
        found = {str(path.relative_to(sound / kind))[:-4] for path in (sound / kind).rglob(f"*{ending}")}
        assert found == set(named)
    alone = {path.stem: path.read_bytes() for path in (made / "cover_dataset").rglob("*.jpg")}
    firsts = truth["stems"][np.unique(truth["album"], return_index=True)[1]]
    assert set(alone) == set(firsts) and len(firsts) == ALBUMS
    for place, album in zip(named, truth["album"], strict=True):
        cover = (sound / "cover" / f"{place}.jpg").read_bytes()
        assert cover == alone[firsts[album]]
    image = Image.open(io.BytesIO(cover))
    assert (image.size, image.mode) == ((32, 32), "RGB")
    assert {layer[1:3] for layer in image.layer} == {(1, 1)}  # no chroma subsampling


def test_the_truth_of_a_cover_is_its_albums(truth):
    assert list(truth["attribute_names"]) == list(worlds.RANGES)
    same = np.diff(truth["album"]) == 0
    for name in ("attributes", "drawn", "album_latent", "shape", "genre", "split"):
        assert (truth[name][1:][same] == truth[name][:-1][same]).all()
    low, high = truth["attribute_ranges"].T
    assert (truth["drawn"] >= low - 1e-6).all() and (truth["drawn"] <= high + 1e-6).all()
    assert set(truth["drawn"][:, 7]) == {1, 2, 3, 4, 5}
    order = np.argsort(truth["attributes"], axis=0)
    assert (np.diff(np.take_along_axis(truth["drawn"], order, 0), axis=0) >= 0).all()  # monotone in the attribute


def test_splits_are_by_album_and_80_10_10_in_every_genre(truth):
    albums = np.unique(truth["album"], return_index=True)[1]
    for genre in worlds.GENRES:
        count = Counter(truth["split"][albums][truth["genre"][albums] == genre])
        assert all(abs(count[split] - count.total() / 10) < 1 <= count[split] for split in ("val", "test"))
        assert set(count) == {"train", "val", "test"}


def test_genres_and_tracks_have_the_shares_they_should(truth):
    count, expected = np.bincount(worlds.genres_of(0, 20_000)), np.arange(1, 17) ** -0.7
    assert np.abs(count / count.sum() - expected / expected.sum()).max() < 0.01
    assert sorted(worlds.GENRES) == worlds.LABELS == list(truth["genre_names"])
    tracks = np.bincount(truth["album"])
    assert tracks.min() == 1 and abs(tracks.mean() - 2.39) < 0.3


def test_stems_are_of_three_kinds_by_the_blocks_a_track_has(truth):
    kinds = {(True, False): f"{UUID}-0__({UUID})", (False, True): MSD, (True, True): f"{MSD}__{UUID}-0__({UUID})"}
    ids = set()
    for album, stem, presence in zip(truth["album"], truth["stems"], truth["presence"].tolist(), strict=True):
        match = re.fullmatch(kinds[tuple(presence)], stem)
        assert match, (stem, presence)
        ids |= {(album, found) for found in match.groups()}
    assert len({album for album, _ in ids}) == len({found for _, found in ids}) == len(ids)
    assert len(set(truth["stems"])) == len(truth["stems"])
    for presence, share in zip(worlds.PRESENCE, worlds.PRESENCE_SHARES, strict=True):
        assert abs((truth["presence"] == presence).all(1).mean() - share) < 0.07


@pytest.fixture(scope="module")
def vectors(made, truth) -> np.ndarray:
    rows = zip(truth["split"], truth["genre"], truth["stems"], strict=True)
    return np.stack([np.load(made / "audio-cover_dataset/audio" / s / g / f"{stem}.npy") for s, g, stem in rows])


def test_vectors_are_finite_float32_with_absent_blocks_zero(vectors, truth):
    assert vectors.dtype == np.float32 and vectors.shape[1] == 1160 and np.isfinite(vectors).all()
    assert np.array_equal((vectors.reshape(-1, 2, 580) != 0).any(2), truth["presence"])


def test_columns_above_a_thousand_know_nothing_of_the_music(vectors, truth):
    scale, nuisance = truth["column_scale"], truth["column_nuisance"]
    assert scale[:580].min() == 1e-4 and scale[:580].max() == 1e12 and (scale[580:] == 1).all()
    assert nuisance[scale > 1e3].all() and (scale > 1e3).sum() > 300
    assert nuisance[:580].mean() == nuisance[580:].mean() == 0.6
    assert set(truth["column_unit"]) == {"identity", "exp", "signed_square", "tanh"}
    # The vectors themselves say so too: how much of each column's rank order the latents explain.
    there = truth["presence"].all(1)
    latents = np.c_[truth["track_latent"], np.ones(len(vectors))][there]
    ranks = vectors[there].argsort(0).argsort(0) / there.sum()
    explained = 1 - (ranks - latents @ np.linalg.lstsq(latents, ranks, rcond=None)[0]).var(0) / ranks.var(0)
    assert explained[nuisance].mean() < 0.09 and np.median(explained[~nuisance]) > 0.5


@pytest.mark.parametrize(("tier", "noise"), [("std", 1), ("hard", 2)])
def test_attributes_are_standardised_and_hard_is_twice_as_noisy(tier, noise):
    world = worlds.make_world(3, demo.options_of(tier)["noise"])
    albums = [worlds.make_album(world, *pair) for pair in enumerate(worlds.genres_of(3, 1500).tolist())]
    attributes = np.stack([album.attributes for album in albums])
    assert np.abs(attributes.mean(0)).max() < 0.12 and np.abs(attributes.std(0) - 1).max() < 0.1
    rotated = np.stack([album.latent for album in albums]) @ world.rotation.T
    left = attributes * world.attribute_std + world.attribute_mean - rotated
    spread = np.concatenate([album.track_latents - album.latent for album in albums])
    assert abs(left.std() - 0.4 * noise) < 0.02 * noise and abs(spread.std() - 0.5 * noise) < 0.02 * noise


@pytest.mark.parametrize("resolution", [16, 50, 256])
def test_any_resolution_shows_the_same_picture(resolution, tmp_path):
    demo.make(tmp_path / "world", resolution=resolution, albums=6)
    demo.make(tmp_path / "toy", albums=6)
    for path in (tmp_path / "world" / "cover_dataset").rglob("*.jpg"):
        both = Image.open(path), Image.open(tmp_path / "toy" / path.relative_to(tmp_path / "world"))
        assert both[0].size == (resolution, resolution)
        small = [np.asarray(image.resize((8, 8), Image.BOX), float) for image in both]
        assert np.abs(small[0] - small[1]).mean() < 12


def test_shapes_do_not_hide_each_other():
    rng = np.random.default_rng(0)
    for _ in range(300):
        radius = rng.uniform(0.08, 0.16)
        centres = worlds._centres(rng, 5, radius, title_on_top=True)
        assert (np.linalg.norm(centres[:, None] - centres, axis=-1) + np.eye(5)).min() > 2.05 * radius


def test_a_finished_demo_is_kept_and_other_options_are_refused(made):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    done = command("--out", str(made), "--albums", str(ALBUMS))
    assert done.returncode == 0 and "already" in done.stdout and "shard_tools.pack" in done.stdout
    with pytest.raises(ValueError, match="seed 0 instead of 1"):
        demo.make(made, albums=ALBUMS, seed=1)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_a_folder_that_holds_something_else_is_refused_untouched(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"photo\.jpg"):
        demo.make(tmp_path, albums=3)
    assert contents(tmp_path) == {"photo.jpg": b"mine"}
    with pytest.raises(ValueError, match="is a file"):
        demo.make(tmp_path / "photo.jpg", albums=3)


def test_an_interrupted_demo_is_redone_with_the_same_options_only(tmp_path, monkeypatch):
    pictures = iter(range(10))
    monkeypatch.setattr(worlds, "encode", lambda cover: bytes(next(pictures)))  # runs out at the eleventh
    with pytest.raises(StopIteration):
        demo.make(tmp_path / "cut", albums=20)
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "demo.json").exists()
    with pytest.raises(ValueError, match="albums 20 instead of 21"):
        demo.make(tmp_path / "cut", albums=21)
    demo.make(tmp_path / "cut", albums=20)
    demo.make(tmp_path / "whole", albums=20)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_the_command_reports_what_it_made_and_comes_next(tmp_path):
    out = tmp_path / "world"
    done = command("--out", str(out), "--tier", "hard", "--albums", "12", "--resolution", "16")
    metadata = json.loads((out / "demo.json").read_text())
    assert metadata["options"] == demo.options_of("hard", resolution=16, albums=12)
    assert f"12 albums, {sum(metadata['tracks'].values())} tracks" in done.stdout and "covers/s" in done.stdout
    assert f"python -m shard_tools.pack --source {out} --out SHARDS" in done.stdout


@pytest.mark.parametrize(("words", "message"), [
    (["--tear", "toy"], "did you mean 'tier'"), (["--tier", "tyo"], "did you mean 'toy'"),
    (["--resolution", "8"], "--resolution 8: expected 16 to 256"), (["--albums", "0"], "--albums"),
    (["--seed", "-1"], "--seed"),
])
def test_wrong_options_are_one_line_that_says_what_to_do(words, message, tmp_path):
    done = command("--out", str(tmp_path / "world"), *words)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "world").exists()


class Reader(nn.Module):
    """A small network from covers ``[B, 3, R, R]`` uint8, R = 32 or 64, to the eight drawn values, standardised."""

    def __init__(self, resolution: int, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

        def block(wide: int, out: int, size: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(wide, out, size, stride, size // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

        self.trunk = nn.Sequential(
            *block(3, 48, 5, 1 if resolution <= 32 else 2), *block(48, 96, 3, 2), *block(96, 128, 3, 1),
            *block(128, 192, 3, 2), *block(192, 256, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 8),
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, covers: Tensor) -> Tensor:
        pixels = covers.to(memory_format=torch.channels_last).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            return self.trunk(pixels).float()

    @torch.no_grad()
    def read(self, covers: Tensor) -> Tensor:
        """The drawn values ``[N, 8]``, in the units of ``worlds.RANGES``."""
        return torch.cat([self.eval()(part) for part in covers.split(500)]) * self.std + self.mean


def train_reader(covers: Tensor, drawn: Tensor, epochs: int, batch: int = 64, seed: int = 0) -> Reader:
    """A reader trained on covers ``[N, 3, R, R]`` uint8 and their drawn values ``[N, 8]``."""
    torch.manual_seed(seed)
    reader = Reader(covers.shape[-1], drawn.mean(0), drawn.std(0))
    targets = (drawn - reader.mean) / reader.std
    optimizer = torch.optim.AdamW(reader.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * (len(covers) // batch), pct_start=0.2)
    angle = torch.ones(8)
    angle[worlds.ATTRIBUTES.index("stripe_angle")] = -1  # a mirrored cover is a cover with the opposite angle
    reader.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(covers)).split(batch)[: len(covers) // batch]:
            some, wanted = covers[rows], targets[rows]
            if torch.rand(()) < 0.5:
                some, wanted = some.flip(3), wanted * angle
            if torch.rand(()) < 0.5:
                some, wanted = some.flip(2), wanted * angle
            loss = nn.functional.mse_loss(reader(some), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return reader


def load_covers(root: Path, split: str) -> tuple[Tensor, Tensor]:
    """A demo's covers of a split ``[N, 3, R, R]`` uint8 and what they show ``[N, 8]``."""
    with np.load(root / "attributes.npz", allow_pickle=False) as truth:
        drawn = dict(zip(truth["stems"].tolist(), truth["drawn"], strict=True))
    paths = sorted((root / "cover_dataset" / split).rglob("*.jpg"))
    covers = np.stack([np.asarray(Image.open(path)) for path in paths])
    return torch.from_numpy(covers).permute(0, 3, 1, 2), torch.from_numpy(np.stack([drawn[p.stem] for p in paths]))


@pytest.mark.slow
@pytest.mark.parametrize("resolution", [32, 64])
def test_every_attribute_can_be_read_from_real_covers(resolution, tmp_path):
    """R2 >= 0.9 on test covers, after about 4 minutes on 2 cores and the 16,000 training covers."""
    demo.make(tmp_path / "world", "std", resolution)
    train, (covers, drawn) = (load_covers(tmp_path / "world", split) for split in ("train", "test"))
    began = time.perf_counter()
    reader = train_reader(*train, epochs=6)
    minutes = (time.perf_counter() - began) / 60
    r2 = 1 - (reader.read(covers) - drawn).square().mean(0) / drawn.var(0, correction=0)
    report = f"R2 at {resolution} px on {len(covers)} covers, reader trained for {minutes:.1f} minutes: " + ", ".join(
        f"{name} {value:.3f}" for name, value in zip(worlds.ATTRIBUTES, r2.tolist(), strict=True))
    print(report)
    assert r2.min() >= 0.9, report
