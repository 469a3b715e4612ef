"""What else generate is told and tells: options of the model, sizes, how a picture was made, tags of songs."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from covergen import generate, models
from covergen.data.audio import AudioNormalizer
from covergen.inference import audio_inputs
from covergen.inference.trained_model import open_model
from covergen.models.base import InputSpec
from covergen.runs import checkpoint, config
from covergen.runs.folder import write_run
from covergen.runs.state import TrainState
from shard_tools import __version__, cli, extractors
from shard_tools.dataset.schema import write_schema
from tests.shard_tools.extractors.test_acousticbrainz import as_bytes, low_level

AUDIO = {"dimension": 1160, "blocks": [[0, 580], [580, 1160]], "mean": [0.0] * 1160, "std": [1.0] * 1160}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with random weights, not trained a step: one takes no audio, the others do."""
    folder = tmp_path_factory.mktemp("runs")
    for model, audio in (("wgan_gp", None), ("cond_wgan_gp", AUDIO)):
        begin(folder, model, audio, width=4)
    return folder


@pytest.fixture(scope="module")
def flow(runs: Path) -> str:
    """The same for the flow model, which needs diffusers."""
    pytest.importorskip("diffusers")
    begin(runs, "flow", AUDIO, width=8, channel_mult="1,2", blocks=1, attention_levels=0, sampling_steps=3)
    return str(runs / "flow")


def begin(folder: Path, model: str, audio: dict | None, **options: object) -> None:
    """Writes a run of a model at 32 px with a checkpoint of step 2."""
    written = config.resolve({"model": model, "shards": "-", "out": str(folder), "name": model, **options})
    scale = AudioNormalizer(audio, written.training.audio_scale) if audio else None
    torch.manual_seed(0)
    live, averaged = (models.load(model).build(written.options, InputSpec(32, scale.size if scale else 0))
                      for _ in range(2))
    with torch.no_grad():
        for network in (*live.networks.values(), *averaged.networks.values()):
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn_like(parameter)  # some begin with zeros
    networks = {**live.networks, **{f"{name}_ema": averaged.networks[name] for name in averaged.ema_networks}}
    checkpoint.write(folder / model, checkpoint.snapshot(TrainState(2), networks, {}), keep=1)
    metadata = {"resolution": 32, "genres": [], "shards": "", "audio": audio}
    write_run(folder / model, written, metadata, resuming=False)


@pytest.fixture
def vectors(tmp_path: Path) -> dict[str, Path]:
    """Two files of audio vectors, by the hash of their numbers."""
    found = {}
    for seed, name in enumerate("ab"):
        vector = np.random.default_rng(seed).normal(size=1160).astype(np.float32)
        np.save(tmp_path / f"{name}.npy", vector)
        found[hashlib.sha256(vector.tobytes()).hexdigest()] = tmp_path / f"{name}.npy"
    return found


def told(path: Path) -> dict:
    """What a picture says of itself."""
    return json.loads(Image.open(path).text["covergen"])


def test_songs_may_be_separate_words_as_a_shell_writes_them(runs: Path, vectors: dict[str, Path], tmp_path: Path,
                                                              capsys: pytest.CaptureFixture) -> None:
    one, two = map(str, vectors.values())
    with pytest.raises(SystemExit) as ended:
        cli.run(generate.main, ["--run", str(runs / "cond_wgan_gp"), "--audio", one, two, "--n", "2", "--out",
                                str(tmp_path / "rows.png")], several=("audio", "embed"))
    assert ended.value.code == 0 and "4 covers" in capsys.readouterr().out
    assert [song["name"] for song in told(tmp_path / "rows.png")["audio"]] == ["a", "b"]


def test_a_picture_says_what_it_was_made_of_and_can_be_made_again(
        runs: Path, vectors: dict[str, Path], tmp_path: Path) -> None:
    generate.main(str(runs / "cond_wgan_gp"), f"{tmp_path}/all/", n=3, seed=5, truncation=1.5, ema=False, size=48,
                  audio=",".join(map(str, vectors.values())))
    original = tmp_path / "all/0001_b_02.png"
    about = told(original)
    assert about == {"version": __version__, "run": "cond_wgan_gp", "model": "cond_wgan_gp", "step": 2, "n": 3,
                     "averaged": False, "seed": 5, "truncation": 1.5, "size": 48, "row": 1, "column": 2,
                     "audio": [{"name": "b", "sha256": list(vectors)[1]}]}
    assert Image.open(original).text["Software"] == f"covergen {__version__}"
    generate.main(str(runs / about["run"]), f"{tmp_path}/again/", checkpoint=str(about["step"]), ema=about["averaged"],
                  audio=str(vectors[about["audio"][0]["sha256"]]),
                  **{name: about[name] for name in ("n", "seed", "truncation", "size")})
    again = np.asarray(Image.open(tmp_path / f"again/0000_b_{about['column']:02d}.png"))
    np.testing.assert_array_equal(again, np.asarray(Image.open(original)))


def test_a_grid_says_what_it_was_made_of_too(runs: Path, vectors: dict[str, Path], tmp_path: Path) -> None:
    generate.main(str(runs / "cond_wgan_gp"), f"{tmp_path}/x.png", n=2, audio=",".join(map(str, vectors.values())))
    about = told(tmp_path / "x.png")
    assert [part["sha256"] for part in about["audio"]] == list(vectors) and about["averaged"] and "row" not in about
    np.save(tmp_path / "z.npy", np.zeros((2, 100)))
    generate.main(str(runs / "wgan_gp"), f"{tmp_path}/z.png", latents=f"{tmp_path}/z.npy")
    about = told(tmp_path / "z.png")
    assert about["latents_sha256"] == hashlib.sha256((tmp_path / "z.npy").read_bytes()).hexdigest()
    assert about["n"] == 2 and about["audio"] == [] and "seed" not in about


def test_size_is_a_plain_lanczos_upscale(runs: Path, tmp_path: Path, capsys) -> None:
    run = str(runs / "wgan_gp")
    for name, options in {"own/": {"n": 9}, "big/": {"n": 9, "size": 100}, "x.png": {"n": 9, "size": 100},
                          "one.png": {"n": 1, "size": 1024}}.items():
        generate.main(run, f"{tmp_path}/{name}", **options)
        assert ("a plain Lanczos upscale, which adds no detail" in capsys.readouterr().out) == ("size" in options)
    big = Image.open(tmp_path / "big/00008.png")
    expected = Image.open(tmp_path / "own/00008.png").resize((100, 100), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(np.asarray(big), np.asarray(expected))
    grid = Image.open(tmp_path / "x.png")
    assert grid.size == (8 * 102 + 2, 2 * 102 + 2)
    np.testing.assert_array_equal(np.asarray(grid.crop((2, 104, 102, 204))), np.asarray(big))
    assert Image.open(tmp_path / "one.png").size == (1024, 1024)


def test_guidance_and_sampling_steps_are_those_asked_for(flow: str, vectors: dict[str, Path], tmp_path: Path) -> None:
    audio, arrays = ",".join(map(str, vectors.values())), {}
    for name, options in {"own": {}, "same": {"guidance": 1.5, "sampling_steps": 3}, "more": {"guidance": 4.0},
                          "deaf": {"guidance": 0.0}, "steps": {"sampling_steps": 5}}.items():
        generate.main(flow, f"{tmp_path}/{name}.npy", n=2, audio=audio, **options)
        arrays[name] = np.load(tmp_path / f"{name}.npy")
    assert {name for name, array in arrays.items() if np.array_equal(array, arrays["own"])} == {"own", "same"}
    np.testing.assert_array_equal(arrays["deaf"][:2], arrays["deaf"][2:])  # without audio both rows are one
    assert np.abs(arrays["own"][:2] - arrays["own"][2:]).max() > 0
    generate.main(flow, f"{tmp_path}/x.png", n=2, audio=audio, guidance=4.0)
    assert (told(tmp_path / "x.png")["guidance"], told(tmp_path / "x.png")["sampling_steps"]) == (4.0, 3)
    opened = open_model(flow, options={"sampling_steps": 7})
    assert opened.config.options.sampling_steps == 7 and opened.config.options.width == 8
    with pytest.raises(ValueError, match=r"--guidence: the run is a flow, which has no such option"):
        open_model(flow, options={"guidence": 2.0})


def test_covers_go_into_the_tags_of_copies_or_of_the_files_themselves(
        runs: Path, vectors: dict[str, Path], tmp_path: Path, capsys) -> None:
    from tests.shard_tools.music import test_embed as test_tags
    run, audio = str(runs / "cond_wgan_gp"), ",".join(map(str, vectors.values()))
    songs = [test_tags.song(tmp_path, kind, "Hello") for kind in (".mp3", ".flac")]
    before = [song.read_bytes() for song in songs]
    generate.main(run, f"{tmp_path}/out/", n=2, audio=audio, size=500, embed=",".join(map(str, songs)))
    assert [song.read_bytes() for song in songs] == before
    assert f"cover of 500 px (a plain Lanczos upscale, which adds no detail) in the tags of {tmp_path}/out/Hello" in (
        capsys.readouterr().out)
    for row, (name, song) in enumerate(zip("ab", songs, strict=True)):
        cover = np.asarray(Image.open(tmp_path / f"out/{row:04d}_{name}_00.png"), int)
        [(kind, data)] = test_tags.found(tmp_path / f"out/Hello.covergen{song.suffix}")
        assert kind == 3 and np.abs(np.asarray(Image.open(io.BytesIO(data)), int) - cover).mean() < 3
    one = test_tags.song(tmp_path, ".wav", "one, two")  # a comma in a name
    generate.main(str(runs / "wgan_gp"), f"{tmp_path}/x.npy", n=70, embed=str(one), in_place=True)
    [(_, data)] = test_tags.found(one)
    assert Image.open(io.BytesIO(data)).size == (600, 600) and not list(tmp_path.glob("*.covergen.*"))


def test_a_run_that_does_not_know_its_descriptors_hears_no_songs(tmp_path: Path) -> None:
    (tmp_path / "song.flac").write_bytes(bytes(77))
    with pytest.raises(ValueError, match=r"1160 numbers \(blocks of 580 \+ 580\) of descriptors without a name, which "
                                         "can't be computed from audio"):
        audio_inputs.read_files(str(tmp_path / "song.flac"), AUDIO)


def test_a_run_hears_what_its_own_extractor_makes_and_nothing_else(tmp_path: Path) -> None:
    known = extractors.load("acousticbrainz-559").schema
    metadata = {"dimension": 559, "blocks": [[0, 559]], "features": known.metadata()}
    (tmp_path / "a.json").write_bytes(as_bytes(low_level()))
    vector = audio_inputs.read_files(f"{tmp_path}/a.json", metadata).raw[0]
    (tmp_path / "own/rock").mkdir(parents=True), (tmp_path / "other").mkdir()
    write_schema(tmp_path / "own", known)
    write_schema(tmp_path / "other", extractors.load("acousticbrainz").schema)
    for folder in ("own/rock", "other"):
        np.save(tmp_path / folder / "a.npy", vector)
    assert (audio_inputs.read_files(f"{tmp_path}/own/rock/a.npy", metadata).raw[0] == vector).all()
    with pytest.raises(ValueError, match=r"a vector of acousticbrainz 1 .* trained on 559 numbers \(blocks of 559\) of "
                                         "acousticbrainz-559 1"):
        audio_inputs.read_files(f"{tmp_path}/other/a.npy", metadata)
    with pytest.raises(ValueError, match="acousticbrainz-559 1, which can't be computed from audio files"):
        audio_inputs.read_files(f"{tmp_path}/song.ogg", metadata)
    with pytest.raises(ValueError, match="use the version of the package that made them"):
        other = {**known.metadata(), "sha256": "0" * 64}
        audio_inputs.read_files(f"{tmp_path}/a.json", {**metadata, "features": other})


@pytest.mark.parametrize(("run", "words", "message"), [
    ("wgan_gp", ["--in_place"], "give --embed FILE too"),
    ("wgan_gp", ["--embed="], "--embed: expected audio files, or --audio with songs"),
    ("cond_wgan_gp", ["--embed=", "--audio", "good.npy"], "--embed good.npy: expected an audio file of a kind"),
    ("wgan_gp", ["--embed", ","], "--embed: expected the paths of audio files"),
    ("wgan_gp", ["--embed", "missing.mp3"], "--embed missing.mp3: no such file"),
    ("wgan_gp", ["--embed", "bad.json"], "of a kind that has tags: .mp3, .flac, .ogg, .opus, .wav, .m4a"),
    ("wgan_gp", ["--embed", "bad.wav"], "bad.wav can't be read, it is damaged or no .wav"),
    ("wgan_gp", ["--embed", "a.wav,b.wav"], "--embed names 2 audio files for 1 row of covers"),
    ("cond_wgan_gp", ["--embed", "a.wav", "--audio", "good.npy,good.npy"], "names 1 audio files for 2 rows of covers"),
])
def test_audio_files_that_can_t_get_a_cover_are_refused_before_any_work(
        runs: Path, tmp_path: Path, monkeypatch, run: str, words: list[str], message: str) -> None:
    from tests.shard_tools.music.test_embed import song
    monkeypatch.chdir(tmp_path)
    song(tmp_path, ".wav", "a"), song(tmp_path, ".wav", "b")
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    (tmp_path / "bad.json").write_text("{")
    np.save(tmp_path / "good.npy", np.ones(1160, np.float32))
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=re.escape(message)):
        generate.main(**cli.bind(generate.main, *cli.read_words(["--run", str(runs / run), *words])))
    assert set(tmp_path.iterdir()) == before
