"""Generating covers: what may be asked of a run, what is written, and that it needs nothing but the run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from covergen import generate
from covergen.inference.trained_model import open_model
from shard_tools import cli
from shard_tools.extractors import acousticbrainz
from tests.support.runs import TINY, environment, run_command, train
from tests.support.waiting import LIMIT


@pytest.fixture(scope="session")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of three small runs: unconditional, conditional, and one that can't sample."""
    folder = tmp_path_factory.mktemp("generate")
    for model, more in (("wgan_gp", TINY), ("cond_wgan_gp", TINY), ("ae_resize", ["--width", "4", "--batch_size", "12",
                                                                                 "--tracker", "none"])):
        train(folder, *more, "--model", model, "--shards", str(shards), "--steps", "2", "--name", model)
    return folder / "runs"


def test_a_grid_an_array_and_single_files_are_the_same_covers(runs: Path, tmp_path: Path) -> None:
    run = str(runs / "wgan_gp")
    for out in ("x.npy", "x.png", "x/"):
        assert generate.main(run, f"{tmp_path}/{out}", n=10, seed=3) == 0
    array = np.load(tmp_path / "x.npy")
    assert array.shape == (10, 3, 32, 32) and array.dtype == np.float32 and array.min() < 0
    opened = open_model(run)
    latents = opened.model.latents(10, torch.Generator().manual_seed(3), None)
    np.testing.assert_allclose(array, opened.sample(latents).numpy(), atol=1e-6)
    pixels = np.clip((array + 1) / 2 * 255, 0, 255).round()
    files = sorted((tmp_path / "x").iterdir())
    assert [file.name for file in files] == [f"{n:05d}.png" for n in range(10)]
    for file, expected in zip(files, pixels, strict=True):
        assert np.abs(np.asarray(Image.open(file)).transpose(2, 0, 1) - expected).max() <= 1
    grid = Image.open(tmp_path / "x.png")
    assert grid.size == (8 * 66 + 2, 2 * 66 + 2)
    assert grid.getpixel((66 + 2, 2)) == Image.open(files[1]).getpixel((0, 0))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_seed_truncation_averages_and_checkpoints_change_the_covers(runs: Path, tmp_path: Path) -> None:
    run, arrays = str(runs / "wgan_gp"), {}
    for name, options in {"plain": {}, "again": {}, "seed": {"seed": 1}, "cut": {"truncation": 0.1},
                          "live": {"ema": False}, "step": {"checkpoint": "2"}}.items():
        generate.main(run, f"{tmp_path}/{name}.npy", n=4, **options)
        arrays[name] = np.load(tmp_path / f"{name}.npy")
    same = {name for name, array in arrays.items() if np.array_equal(array, arrays["plain"])}
    assert same == {"plain", "again", "step"}
    assert arrays["cut"].std(0).mean() < arrays["plain"].std(0).mean()


def test_latents_from_a_file_are_what_the_network_gets(runs: Path, tmp_path: Path) -> None:
    run = str(runs / "wgan_gp")
    latents = np.random.default_rng(0).normal(size=(70, 100))  # more than go through the network at once
    np.save(tmp_path / "z.npy", latents)
    generate.main(run, f"{tmp_path}/z_out.npy", latents=str(tmp_path / "z.npy"))
    opened = open_model(run)
    with torch.no_grad():
        expected = opened.networks["generator"](torch.from_numpy(latents).float().to(opened.device)).cpu()
    np.testing.assert_allclose(np.load(tmp_path / "z_out.npy"), expected, atol=1e-5)
    for wrong, message in ((latents[:, :9], r"shape \[N, 100\], found \[70, 9\]"), (latents * np.nan, "not finite"),
                           (np.array([object()]), "can't be read")):
        np.save(tmp_path / "w.npy", wrong, allow_pickle=True)
        with pytest.raises(ValueError, match=message):
            generate.main(run, f"{tmp_path}/w_out.npy", latents=str(tmp_path / "w.npy"))
    with pytest.raises(ValueError, match="holds 70, --n says 3"):
        generate.main(run, f"{tmp_path}/w_out.npy", latents=str(tmp_path / "z.npy"), n=3)
    assert not (tmp_path / "w_out.npy").exists()


def test_a_conditional_model_makes_a_row_for_each_audio_and_columns_share_noise(
        runs: Path, shards: Path, tmp_path: Path) -> None:
    run, vectors = str(runs / "cond_wgan_gp"), np.random.default_rng(0).normal(size=(2, 1160)).astype(np.float32)
    for name, vector in zip("ab", vectors, strict=True):
        np.save(tmp_path / f"{name}.npy", vector)
    out = str(tmp_path / "out.npy")
    generate.main(run, out, audio=f"{tmp_path}/a.npy,{tmp_path}/b.npy", n=3)
    opened = open_model(run)
    latents = opened.model.latents(3, torch.Generator().manual_seed(0), None).repeat(2, 1)
    np.testing.assert_allclose(np.load(out), opened.sample(latents, vectors.repeat(3, 0)).numpy(), atol=1e-5)
    generate.main(run, f"{tmp_path}/d/", audio=str(tmp_path / "a.npy"), n=2)
    assert sorted(os.listdir(tmp_path / "d")) == ["0000_a_00.png", "0000_a_01.png"]
    generate.main(run, f"{tmp_path}/s.npy", from_shards=str(shards), n=2, rows=3)
    assert np.load(tmp_path / "s.npy").shape == (6, 3, 32, 32)
    generate.main(run, f"{tmp_path}/all.npy", from_shards=str(shards), split="val", n=1, rows=0)
    assert len(np.load(tmp_path / "all.npy")) == 40
    generate.main(run, f"{tmp_path}/s.png", from_shards=str(shards), n=2, rows=3)
    assert Image.open(tmp_path / "s.png").height == 3 * 66 + 2


def test_an_acousticbrainz_file_fills_the_block_of_its_size(runs: Path, tmp_path: Path) -> None:
    from tests.shard_tools.extractors.test_acousticbrainz import as_bytes, low_level
    (tmp_path / "t.json").write_bytes(as_bytes(low_level()))
    expected = np.zeros((1, 1160), np.float32)
    expected[0, :580] = acousticbrainz.read((tmp_path / "t.json").read_bytes())
    run = str(runs / "cond_wgan_gp")
    generate.main(run, f"{tmp_path}/j.npy", audio=str(tmp_path / "t.json"), n=2)
    opened = open_model(run)
    latents = opened.model.latents(2, torch.Generator().manual_seed(0), None)
    np.testing.assert_allclose(np.load(tmp_path / "j.npy"), opened.sample(latents, expected.repeat(2, 0)), atol=1e-5)


@pytest.mark.parametrize(("run", "words", "message"), [
    ("wgan_gp", ["--audio", "x.npy"], "takes no audio"),
    ("cond_wgan_gp", [], "give it --audio FILE or --from_shards DIR"),
    ("cond_wgan_gp", ["--audio", "missing.npy"], "missing.npy: no such file"),
    ("cond_wgan_gp", ["--audio", "song.txt"], "expected a song (.mp3"),
    ("cond_wgan_gp", ["--audio", "song.MP3"], "song.MP3: the run was trained on 1160 numbers (blocks of 580 + 580) of "
     "descriptors without a name, which can't be computed from audio files; give a .npy vector of that track, or"),
    ("cond_wgan_gp", ["--audio", "short.npy"], "a vector of 7 numbers; the run was trained on 1160"),
    ("cond_wgan_gp", ["--audio", "pickled.npy"], "pickled"),
    ("cond_wgan_gp", ["--audio", "bad.json"], "bad.json: truncated JSON"),
    ("ae_resize", [], "an ae_resize: it reconstructs covers"),
    ("wgan_gp", ["--out", "x.jpg"], "--out x.jpg: expected .png"),
    ("wgan_gp", ["--n", "0"], "--n 0: expected 1 or more"),
    ("cond_wgan_gp", ["--rows", "-1"], "--rows -1: expected 0 or more"),
    ("wgan_gp", ["--latents", "cut.npy"], "cut.npy can't be read"),
    ("wgan_gp", ["--truncation", "-1"], "expected above 0"),
    ("wgan_gp", ["--guidance", "2"], "--guidance: the run is a wgan_gp, which has no such option"),
    ("wgan_gp", ["--sampling_steps", "4"], "--sampling_steps: the run is a wgan_gp, which has no such option"),
    ("wgan_gp", ["--guidance", "-1"], "--guidance -1.0: expected 0 to below inf"),
    ("wgan_gp", ["--guidance", "nan"], "--guidance nan: expected 0 to below inf"),
    ("wgan_gp", ["--sampling_steps", "0"], "--sampling_steps 0: expected 1 or more"),
    ("wgan_gp", ["--size", "31"], "--size 31: expected 32 to 4,096"),
    ("wgan_gp", ["--size", "64", "--out", "x.npy"], "--size 64: an array has the covers as the network gave them"),
    ("wgan_gp", ["--size", "4096"], "one picture of 64 covers would have 1073 million pixels"),
    ("wgan_gp", ["--checkpoint", "7"], "has auto, last and the steps 2"),
    ("nothing", [], "is not a run folder"),
])
def test_what_can_t_be_done_is_refused_with_the_way_out(
        runs: Path, tmp_path: Path, monkeypatch, run: str, words: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "short.npy", np.ones(7, np.float32))
    np.save(tmp_path / "pickled.npy", np.array([object()]), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes(b"PK\x03\x04 cut")
    (tmp_path / "bad.json").write_text("{")
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=re.escape(message)):
        generate.main(**cli.bind(generate.main, *cli.read_words(["--run", str(runs / run), *words])))
    assert set(tmp_path.iterdir()) == before


def test_a_misspelt_flag_and_a_wrong_run_are_one_line_and_exit_status_2(runs: Path, tmp_path: Path) -> None:
    for words, message in ((["--sead", "7"], "did you mean 'seed'"), (["--audio", "x.npy"], "takes no audio")):
        done = run_command(tmp_path, "covergen.generate", "--run", str(runs / "wgan_gp"), *map(str, words), ok=False)
        assert done.returncode == 2 and message in done.stdout and "Traceback" not in done.stdout


def test_it_needs_neither_accelerate_nor_wandb_webdataset_torchvision_or_mutagen(runs: Path, tmp_path: Path) -> None:
    code = ("import sys, runpy\n"
            "for name in ('accelerate', 'wandb', 'webdataset', 'torchvision', 'mutagen'): sys.modules[name] = None\n"
            "sys.argv = ['generate', '--run', sys.argv[1], '--out', 'x.png']\n"
            "runpy.run_module('covergen.generate', run_name='__main__')\n")
    done = subprocess.run([sys.executable, "-c", code, str(runs / "wgan_gp")], cwd=tmp_path, env=environment(),
                          text=True, capture_output=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert "64 covers of 32 px" in done.stdout and Image.open(tmp_path / "x.png").size == (530, 530)


def test_a_damaged_or_half_trained_run_is_named(runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs / "wgan_gp", copy)
    weights = copy / "checkpoints/step_00000002/generator_ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"generator_ema\.safetensors can't be loaded"):
        generate.main(str(copy), str(tmp_path / "x.png"))
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        generate.main(str(copy), str(tmp_path / "x.png"))
