"""Pictures of runs: they open, hold what they should, say the right numbers, and refuse what makes no sense."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from covergen import analyze
from covergen.analyses import interpolate, matrix, neighbours, reconstruct
from covergen.data.audio import AudioNormalizer
from covergen.data.dataset import ShardDataset
from covergen.inference.cover_inputs import DatasetCovers, FolderCovers
from covergen.inference.trained_model import TrainedModel, open_model
from covergen.models.base import to_zero_one
from covergen.training import tracking
from shard_tools import cli
from tests.support.runs import TINY, environment, train
from tests.support.waiting import LIMIT

SMALL = ["--width", "4", "--batch_size", "16", "--steps", "4", "--tracker", "none", "--sample_every", "0"]
MODELS = {"ae": ["--model", "ae_resize", *SMALL], "vae": ["--model", "vae", "--latent", "12", *SMALL],
          "gan": ["--model", "cond_wgan_gp", *TINY, "--steps", "4"]}


@pytest.fixture(scope="session")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three runs: ae, vae and gan, which takes audio."""
    folder = tmp_path_factory.mktemp("analysed")
    for name, flags in MODELS.items():
        train(folder, *flags, "--shards", str(shards), "--name", name, "--threads", "1")
    return folder / "runs"


@pytest.fixture(scope="session")
def gan(trained: Path) -> TrainedModel:
    return open_model(trained / "gan")


def draw(what: str, run: Path | str, out: Path | str, *more: str | Path) -> None:
    """The command as it is typed."""
    words = [what, "--run", run, "--out", out, *more]
    assert analyze.main(**cli.bind(analyze.main, *cli.read_words(list(map(str, words))))) == 0


def refusal(*words: str | Path) -> str:
    """What the command says when it refuses."""
    with pytest.raises((ValueError, OSError)) as found:
        draw(*words)
    return str(found.value)


def with_sample(run: TrainedModel, sample) -> TrainedModel:
    """A run that samples with another function."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, sample=sample))


@pytest.mark.parametrize(("words", "says"), [
    ("reconstruct ae,vae", "vae: mean PSNR"),
    ("latent vae --n 60 --split train,val", "60 covers of train and val, 12 latent numbers"),
    ("matrix gan --truncation 1", "between rows (audio)"),
    ("interpolate gan --frames 4 --n 3", "by audio"),
    ("interpolate vae --frames 3", "by noise"),
    ("curves ae,vae,gan", "best val/loss"),
    ("neighbours gan --n 2 --compare 10", "share of 10 generated covers"),
])
def test_every_picture_opens_and_is_wide_enough(trained: Path, tmp_path: Path, capsys, words: str, says: str) -> None:
    what, runs, *more = words.split()
    draw(what, ",".join(f"{trained}/{name}" for name in runs.split(",")), tmp_path / "new" / "x.png", *more)
    assert says in (said := capsys.readouterr().out) and said.endswith("x.png\n")
    with Image.open(tmp_path / "new" / "x.png") as picture:
        picture.load()
    assert picture.width >= 1000 and picture.height > 200
    assert np.asarray(picture.convert("L")).std() > 5
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.png"]


def save_pictures(folder: Path, sizes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """Pictures of random pixels by name and (width, height); returns their pixels."""
    folder.mkdir()
    draws, made = np.random.default_rng(0), {}
    for name, (width, height) in sizes.items():
        made[name] = draws.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(made[name]).save(folder / name)
    return made


def test_pictures_reach_the_network_as_they_are_in_the_order_of_their_names(trained: Path, tmp_path: Path) -> None:
    names = ("a10.png", "a9.PNG", "b.png", "c.bmp")
    made = save_pictures(tmp_path / "in", dict.fromkeys(reversed(names), (32, 32)))
    (tmp_path / "in" / "notes.txt").write_text("not a picture")
    draw("reconstruct", trained / "ae", tmp_path / "x.npy", "--images", tmp_path / "in")
    found = np.load(tmp_path / "x.npy")
    assert found.shape == (4, 3, 32, 32) and found.dtype == np.float32 and found.min() >= 0 and found.max() <= 1
    run = open_model(trained / "ae")
    pixels = torch.from_numpy(np.stack([made[name] for name in names]))
    expected = run.networks["autoencoder"](to_zero_one(pixels.permute(0, 3, 1, 2))).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    draw("reconstruct", trained / "ae", tmp_path / "x.npy", "--images", tmp_path / "in", "--n", "2")
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected[:2], atol=1e-6)


def test_pictures_of_other_sizes_are_cropped_to_their_centre(trained: Path, tmp_path: Path) -> None:
    made = save_pictures(tmp_path / "in", {"tall.png": (32, 50), "wide.png": (100, 64)})
    covers = FolderCovers(open_model(trained / "ae"), str(tmp_path / "in")).covers
    assert np.array_equal(covers[0].permute(1, 2, 0).numpy(), made["tall.png"][9:41])
    halved = np.array(Image.fromarray(made["wide.png"][:, 18:82]).resize((32, 32), Image.Resampling.LANCZOS))
    assert np.array_equal(covers[1].permute(1, 2, 0).numpy()[:, 3:-3], halved[:, 3:-3])  # edges see what is beyond


def test_pictures_that_can_not_be_read_are_named_and_nothing_is_written(trained: Path, tmp_path: Path) -> None:
    save_pictures(tmp_path / "in", {"a.png": (32, 32)})
    (tmp_path / "in" / "b.jpg").write_bytes(b"<html>404</html>")
    (tmp_path / "in" / "c.png").write_bytes((tmp_path / "in" / "a.png").read_bytes()[:300])
    said = refusal("reconstruct", trained / "ae", tmp_path / "x.npy", "--images", tmp_path / "in")
    assert "2 of 3 pictures can't be read: b.jpg (not an image), c.png (truncated image)" in said
    assert not (tmp_path / "x.npy").exists()


def test_a_model_that_takes_audio_needs_shards_to_reconstruct(trained: Path, tmp_path: Path) -> None:
    run = open_model(trained / "vae")
    conditional = dataclasses.replace(run, model=dataclasses.replace(run.model, conditional=True))
    options = {"shards": None, "split": None, "n": 3}
    with pytest.raises(ValueError, match="use --shards instead of --images"):
        reconstruct.draw([conditional], tmp_path / "x.png", images=str(tmp_path), **options)
    assert reconstruct.draw([conditional], tmp_path / "x.png", images=None, **options)  # it is given its audio there
    assert reconstruct.errors(torch.zeros(2, 3, 4, 4).byte(), torch.full((2, 3, 4, 4), 0.5)).tolist() == [0.25, 0.25]


def test_an_array_of_shards_is_in_the_order_of_the_index(trained: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npy"
    draw("reconstruct", trained / "vae", out, "--n", "0")
    samples = ShardDataset(shards, "val")
    found, run = np.load(out), open_model(trained / "vae")
    assert len(found) == len(samples.index.rows)
    np.testing.assert_allclose(found, run.reconstruct(samples.read(np.arange(len(found)))).numpy(), atol=1e-6)
    draw("reconstruct", trained / "vae", out, "--n", "3", "--split", "test")
    assert len(np.load(out)) == 3


def test_a_failure_while_writing_leaves_no_file(trained: Path, tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")
    monkeypatch.setattr(reconstruct, "errors", fail)
    assert refusal("reconstruct", trained / "ae", tmp_path / "x.npy") == "disk full"
    assert not list(tmp_path.iterdir())


def test_a_run_takes_audio_on_its_own_scale(gan: TrainedModel, shards: Path) -> None:
    raw = ShardDataset(shards, "test", audio_scale="raw").read(np.arange(5)).audio.numpy()
    metadata = {**gan.metadata["audio"], "mean": [1.0] * 1160, "std": [2.0] * 1160}
    other = dataclasses.replace(gan, normalizer=AudioNormalizer(metadata, "standard"))
    assert np.array_equal(DatasetCovers(other, str(shards), "test").read(range(5)).audio, other.normalizer(raw))
    other = dataclasses.replace(gan, metadata={**gan.metadata, "audio": {**metadata, "dimension": 12}})
    with pytest.raises(ValueError, match=r"vectors of 1160 numbers; .* trained on 12 numbers"):
        DatasetCovers(other, str(shards), "test")


def test_the_matrix_shares_noise_in_columns_and_audio_in_rows(gan: TrainedModel, tmp_path: Path) -> None:
    calls = []

    def sample(networks, latents, audio):
        calls.append((latents, audio))
        return latents[:, :1, None, None].expand(-1, 3, 32, 32) / 9  # of the noise alone

    options = {"shards": None, "split": None, "n": 4, "genres": ("rock", "pop"), "seed": 1, "truncation": None}
    report = matrix.draw(with_sample(gan, sample), tmp_path / "x.png", **options)
    latents, audio = (part.unflatten(0, (2, 4)) for part in calls[0])
    assert torch.equal(latents[0], latents[1]) and not torch.equal(latents[0, 0], latents[0, 1])
    assert torch.equal(audio[:, 0], audio[:, 3]) and not torch.equal(audio[0, 0], audio[1, 0])
    assert "difference 0 between rows" in report and "ratio 0," in report


def test_a_moving_picture_walks_noise_then_audio_there_and_back(gan: TrainedModel, tmp_path: Path) -> None:
    calls = []

    def sample(networks, latents, audio):
        calls.append((latents, audio))
        return gan.model.sample(networks, latents, audio)

    interpolate.draw(with_sample(gan, sample), tmp_path / "x.gif", shards=None, split=None, n=4, frames=5, seed=0,
                     truncation=None)
    latents, audio = (part.unflatten(0, (4, 5)) for part in calls[0])
    moved = [not torch.equal(part, part[:, :1].expand_as(part)) for part in (*latents.split(2), *audio.split(2))]
    assert moved == [True, False, False, True]
    with Image.open(tmp_path / "x.gif") as picture:
        assert (picture.n_frames, picture.info["loop"], picture.width) == (8, 0, 1000)
        shown = [np.asarray(picture.convert("RGB")) for place in range(8) if picture.seek(place) is None]
    assert all(np.array_equal(shown[place], shown[8 - place]) for place in range(1, 4))
    assert not np.array_equal(shown[0], shown[4])


def test_neighbours_finds_planted_copies_and_passes_held_out_covers(gan: TrainedModel, shards: Path,
                                                                    tmp_path: Path) -> None:
    options = {"shards": None, "split": None, "n": 2, "compare": 20, "seed": 0, "truncation": None}

    def planted(split: str, count: int) -> TrainedModel:
        source = DatasetCovers(gan, str(shards), split)
        covers = source.read(source.distinct()[:count]).cover.float() / 127.5 - 1
        return with_sample(gan, lambda networks, latents, audio: covers)

    report = neighbours.draw(planted("train", 20), tmp_path / "x.png", **options)
    assert report.count("100% (0,") == 4
    options["compare"] = all_held_out = len(DatasetCovers(gan, str(shards), "test").distinct())
    report = neighbours.draw(planted("test", all_held_out), tmp_path / "x.png", **options)
    assert report.count(f"{all_held_out // 2 / all_held_out:.0%} ") == 4  # the same covers on both sides


@pytest.mark.parametrize(("words", "says"), [
    ("latent gan x.png", "latent needs a model that encodes covers; {runs}/gan is a cond_wgan_gp"),
    ("matrix vae x.png", "matrix needs a model that makes covers from audio"),
    ("interpolate ae x.png", "interpolate needs a model that makes covers from noise"),
    ("reconstruct gan x.png", "reconstruct needs a model that reconstructs covers"),
    ("latent vae x.jpg", "latent writes .png"),
    ("interpolate gan x.npy", "interpolate writes .png or .gif"),
    ("reconstruct ae,vae x.npy", "takes one run folder"),
    ("latent ae,vae x.png", "takes one run folder"),
    ("curves ae,ae x.png", "named twice"),
    ("matrix gan x.png --frames 3", "--frames is not for matrix, only for interpolate"),
    ("curves ae x.png --checkpoint 2", "--checkpoint is not for curves"),
    ("matrix gan x.png --genres rok", "no 'rok', did you mean 'rock'?"),
    ("latent vae x.png --split dev", "has no dev split; it has train, val, test"),
    ("latent vae x.png --n 5", "too few for a t-SNE"),
    ("latent vae x.png --checkpoint 3", "has auto, last and the steps"),
    ("matrix gan x.png --shards nowhere", "no shards with an index there"),
    ("matrix gan x.png --n 0", "--n 0: expected 1 to 64"),
    ("matrix gan x.png --n 1", "two genres and --n 2 or more"),
    ("matrix gan x.png --genres pop", "found 1 genres"),
    ("matrix gan x.png --n 65", "expected 1 to 64"),
    ("interpolate gan x.png --frames 1", "--frames 1: expected 2 to 64"),
    ("interpolate gan x.png --truncation 0", "--truncation 0.0: expected above 0"),
    ("reconstruct ae x.png --images in --split val", "exclude each other"),
    ("reconstruct ae x.png --images nowhere", "no such folder"),
    ("reconstruct ae x.npy --wandb", "not a .npy"),
    ("reconstruct ae in/x.png", "a folder that can be written"),
    ("reconstruct nowhere x.png", "is not a run folder"),
])
def test_what_makes_no_sense_is_refused(trained: Path, tmp_path: Path, monkeypatch, words: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_text("a file")
    what, runs, out, *more = words.split()
    runs = ",".join(f"{trained}/{name}" for name in runs.split(","))
    assert says.format(runs=trained) in refusal(what, runs, out, *more)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_shards_that_went_away_must_be_named(trained: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "moved"
    shutil.copytree(trained / "ae", run)
    (run / "data.json").write_text(json.dumps({**json.loads((run / "data.json").read_text()), "shards": "/nowhere"}))
    said = refusal("reconstruct", run, tmp_path / "x.png")
    assert "(/nowhere) are not here; say where covers are with --shards DIR" in said
    draw("reconstruct", run, tmp_path / "x.png", "--shards", shards, "--n", "2")


def test_wandb_gets_the_picture_of_every_run(trained: Path, tmp_path: Path, monkeypatch) -> None:
    shown = []
    monkeypatch.setattr(tracking, "show", lambda folder, name, _: shown.append((folder, name)))
    draw("curves", f"{trained}/ae,{trained}/vae", tmp_path / "x.png", "--wandb")
    assert shown == [(trained / "ae", "curves"), (trained / "vae", "curves")]


def test_the_command_fails_in_one_line(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "covergen.analyze", "curves", tmp_path, "x.png"]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "no log.jsonl" in done.stderr and done.stderr.count("\n") == 1
