"""The evaluation of a run from the command line: figures, baselines, judges, ranks, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from covergen.data.dataset import ShardDataset
from covergen.evaluation import scores
from covergen.evaluation.songs import Songs, choose_songs, mismatched_pairing
from shard_tools.demo import make
from shard_tools.pack import pack
from tests.support.runs import command, environment, train
from tests.support.runs import run_command as start
from tests.support.waiting import LIMIT, wait_for

FLOW = ["--model", "flow", "--width", "32", "--channel_mult", "1,1", "--blocks", "1", "--attention_levels", "0",
        "--sampling_steps", "2"]


def run_command(folder: Path, module: str, *flags: str, **how: object) -> subprocess.CompletedProcess:
    """Any command, with caches of its own."""
    return start(folder, module, *flags, XDG_CACHE_HOME=str(folder / "cache"), **how)


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge, a flow and a GAN of a few steps."""
    folder = tmp_path_factory.mktemp("evaluated")
    common = ["--shards", str(shards), "--batch_size", "12", "--tracker", "none", "--sample_every", "0", "--log_every",
              "5"]
    train(folder, *common, "--model", "contrast", "--album_subset", "judge", "--steps", "30", "--width", "8", "--name",
          "judge")
    train(folder, *common, *FLOW, "--steps", "2", "--name", "flow")
    train(folder, *common, "--model", "r3gan", "--width", "8", "--group_size", "0", "--steps", "2", "--name", "r3gan")
    return folder


def evaluated(folder: Path, shards: Path, *flags: str, name: str, ranks: int = 1) -> dict:
    flags = flags if "--split" in flags else ("--split", "train", *flags)
    run_command(folder, "covergen.evaluate", "--shards", str(shards), "--judge", "runs/judge", "--num_songs", "40",
                "--out", f"{name}.json", *flags, ranks=ranks)
    return json.loads((folder / f"{name}.json").read_text())


def test_one_and_two_ranks_give_the_same_numbers(runs: Path, shards: Path) -> None:
    one, two = (evaluated(runs, shards, "--run", "runs/flow", "--samples_per_song", "4", name=f"ranks{ranks}",
                          ranks=ranks) for ranks in (1, 2))
    assert one["num_songs"] == 40 and one["table"].keys() == set(table_columns())
    for column, row in one["table"].items():
        assert row.keys() == two["table"][column].keys()
        for metric, figure in row.items():
            for part, value in figure.items():
                # The gaps of a flow of two steps are near rounding, which a p of theirs shows.
                close = pytest.approx(value, rel=1e-3, abs=0.02 if part == "p" else 1e-4)
                assert two["table"][column][metric][part] == close, (column, metric, part)
    found = one["table"]["run"]
    assert {"dependence", "within_genre", "r@10 of 40", "median_rank of 40", "icc", "fid_40", "kid_40", "precision_40",
            "coverage_40", "attribute_score", "attribute_within_genre", "genre_accuracy", "denoising_gap",
            "denoising_gap_within"} <= found.keys()
    assert "copied_40" not in found  # songs of the training split are copies of themselves
    assert {"value", "low", "high", "p"} == found["dependence"].keys()
    assert found["dependence"]["low"] <= found["dependence"]["value"] <= found["dependence"]["high"]


def table_columns() -> list[str]:
    return ["run", "real", "shuffled", "genre_mean", "unconditional", "copy"]


def test_the_baselines_score_as_they_must(runs: Path, shards: Path) -> None:
    found = evaluated(runs, shards, "--run", "runs/r3gan", "--split", "test", name="baselines")["table"]
    assert found["copy"]["copied_14"]["value"] == 1.0  # every one of them is a training cover
    assert found["real"]["copied_14"]["value"] == 0.5
    assert abs(found["shuffled"]["dependence"]["value"]) < found["real"]["dependence"]["value"]


def test_without_a_judge_one_is_trained_once(runs: Path, shards: Path) -> None:
    flags = ["--run", "runs/r3gan", "--shards", str(shards), "--num_songs", "8", "--samples_per_song", "2", "--out",
             "own.json"]
    first, second = (run_command(runs, "covergen.evaluate", *flags).stdout for _ in range(2))
    assert "no --judge: training one" in first and "no --judge" not in second
    judge = Path(json.loads((runs / "own.json").read_text())["judge"])
    assert "album_subset: judge" in (judge / "config.yaml").read_text() and (judge / "finished").is_file()


def test_a_model_without_audio_is_evaluated_and_follows_nothing(runs: Path, shards: Path) -> None:
    train(runs, "--shards", str(shards), "--model", "wgan_gp", "--width", "4", "--batch_size", "12", "--steps", "1",
          "--tracker", "none", "--sample_every", "0", "--name", "plain")
    found = evaluated(runs, shards, "--run", "runs/plain", name="plain")["table"]["run"]
    assert found["dependence"]["p"] > 0.001 and found["fid_40"]["value"] > 0


def test_guidance_of_an_evaluation_is_in_its_name_and_metadata(runs: Path, shards: Path) -> None:
    done = run_command(runs, "covergen.evaluate", "--run", "runs/flow", "--shards", str(shards), "--judge",
                       "runs/judge", "--split", "train", "--num_songs", "8", "--samples_per_song", "2", "--guidance",
                       "2")
    path = runs / "runs/flow/evaluations/step_00000002_train_guidance_2.json"
    assert json.loads(path.read_text())["guidance"] == 2.0
    lines = done.stdout.splitlines()
    assert any(line.startswith("dependence ") for line in lines) and any("chance" in line for line in lines)


@pytest.mark.parametrize(("flags", "says"), [
    ([], "--run"),
    (["--run", "runs/nothing"], "not a run folder"),
    (["--run", "runs/judge"], "makes no covers"),
    (["--run", "runs/r3gan", "--judge", "runs/r3gan"], "expected a run of --model contrast"),
    (["--run", "runs/r3gan", "--num_songs", "2"], "--num_songs 2"),
    (["--run", "runs/r3gan", "--split", "nosplit"], "no nosplit split"),
    (["--run", "runs/r3gan", "--guidance", "2"], "--guidance"),
    (["--run", "runs/r3gan", "--judgment", "x"], "judge"),
])
def test_wrong_arguments_say_what_is_wrong(runs: Path, flags: list[str], says: str) -> None:
    done = run_command(runs, "covergen.evaluate", *flags, ok=False)
    assert done.returncode and says in done.stdout and "Traceback" not in done.stdout


def test_a_judge_that_saw_the_generators_albums_is_refused(runs: Path, shards: Path) -> None:
    train(runs, "--shards", str(shards), "--model", "contrast", "--batch_size", "12", "--steps", "1", "--width", "8",
          "--tracker", "none", "--name", "condition")
    done = run_command(runs, "covergen.evaluate", "--run", "runs/r3gan", "--judge", "runs/condition", ok=False)
    assert done.returncode and "--album_subset judge" in done.stdout
    flags = ["--shards", str(shards), "--model", "r3gan", "--width", "8", "--batch_size", "12", "--steps", "1",
             "--tracker", "none", "--sample_every", "0"]
    wrong = train(runs, *flags, "--name", "conditional", "--condition", "runs/judge", ok=False)
    assert wrong.returncode and "is a judge" in wrong.stdout
    train(runs, *flags, "--name", "conditional", "--condition", "runs/condition")
    mixed = train(runs, "--shards", str(shards), "--model", "contrast", "--width", "8", "--album_subset", "judge",
                  "--condition", "runs/condition", "--steps", "1", "--tracker", "none", ok=False)
    assert mixed.returncode and "trained for generator albums" in mixed.stdout


def test_a_condition_s_audio_encoder_is_where_a_generator_starts(runs: Path, shards: Path) -> None:
    train(runs, "--shards", str(shards), "--model", "contrast", "--batch_size", "12", "--steps", "2", "--width", "8",
          "--tracker", "none", "--name", "encoder")
    train(runs, "--shards", str(shards), *FLOW, "--batch_size", "12", "--steps", "1", "--lr", "1e-9", "--tracker",
          "none", "--sample_every", "0", "--name", "starts", "--condition", "runs/encoder")
    known = load_file(runs / "runs/encoder/checkpoints/step_00000002/contrast_ema.safetensors")
    for name in ("flow", "flow_ema"):
        found = load_file(runs / f"runs/starts/checkpoints/step_00000001/{name}.safetensors")
        for key, value in known.items():
            if key.startswith("audio."):
                torch.testing.assert_close(found[key], value)


def test_a_judge_of_other_shards_is_refused(runs: Path, tmp_path: Path) -> None:
    make(tmp_path / "other", tier="toy", albums=60, seed=1)
    assert pack(str(tmp_path / "other"), str(tmp_path / "shards"), workers=1) == 0
    done = run_command(runs, "covergen.evaluate", "--run", "runs/r3gan", "--judge", "runs/judge", "--shards",
                       str(tmp_path / "shards"), ok=False)
    assert done.returncode and "trained on other shards" in done.stdout and "Traceback" not in done.stdout


@pytest.mark.parametrize(("flags", "says"), [
    (["--model", "contrast", "--eval_every", "2"], "needs a model that makes covers"),
    (["--model", "r3gan", "--audio_scale", "raw"], "--audio_scale standard"),
    (["--model", "r3gan", "--judge", "runs/judge"], "--eval_every"),
])
def test_training_refuses_what_can_not_be_evaluated(runs: Path, shards: Path, flags: list[str], says: str) -> None:
    done = train(runs, "--shards", str(shards), *flags, "--name", "refused", ok=False)
    assert done.returncode and says in done.stdout and not (runs / "runs/refused").exists()


def test_a_stop_signal_ends_an_evaluation_and_writes_nothing(runs: Path, shards: Path) -> None:
    words = command("--run", "runs/flow", "--shards", str(shards), "--judge", "runs/judge", "--split", "train",
                    "--sampling_steps", "20", "--samples_per_song", "20", "--out", "never.json",
                    script=("-m", "covergen.evaluate"))
    said = runs / "said.txt"
    with open(said, "w") as file:
        process = subprocess.Popen(words, cwd=runs, env=environment(XDG_CACHE_HOME=str(runs / "cache")), stdout=file,
                                   stderr=subprocess.STDOUT)
    wait_for(lambda: "run:" in said.read_text(), "the bar of the run's covers", by=[process])
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) and "SIGTERM" in said.read_text() and not (runs / "never.json").exists()


def test_training_can_evaluate_itself_quickly(runs: Path, shards: Path) -> None:
    train(runs, "--shards", str(shards), *FLOW, "--batch_size", "12", "--steps", "4", "--eval_every", "2", "--judge",
          "runs/judge", "--tracker", "none", "--sample_every", "0", "--name", "quick", ranks=2)
    rows = [json.loads(line) for line in (runs / "runs/quick/log.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval/denoising_gap" in row]
    assert [row["step"] for row in evaluations] == [2, 4]
    assert {"eval/dependence", "eval/dependence_p", "eval/denoising_gap_p", "eval/r10"} <= evaluations[0].keys()


def test_songs_are_one_track_of_each_album_and_others_are_of_another(shards: Path) -> None:
    split = ShardDataset(shards, "train", audio_scale="raw")
    rows = choose_songs(split, 1000, 0)
    groups, genres = split.index.rows["group"][rows], split.index.rows["genre"][rows]
    assert len(set(groups.tolist())) == len(groups) == split.metadata["groups"]
    assert (choose_songs(split, 1000, 0) == rows).all() and (choose_songs(split, 1000, 1)[:20] != rows[:20]).any()
    wrong = mismatched_pairing(groups, 0)
    assert (groups[wrong] != groups).all()
    within = mismatched_pairing(groups, 0, genres)
    assert (genres[within[within >= 0]] == genres[within >= 0]).all() and (groups[within] != groups)[within >= 0].all()


def test_covers_that_show_the_audio_are_told_from_those_that_do_not() -> None:
    rng = np.random.default_rng(0)
    audio = rng.standard_normal((200, 16))
    audio /= np.linalg.norm(audio, axis=1, keepdims=True)
    songs = Songs(np.arange(200), None, torch.empty(0), np.repeat(np.arange(4), 50), np.arange(200))
    follow = np.repeat(audio[:, None], 4, 1) + 0.1 * rng.standard_normal((200, 4, 16))
    found = scores.dependence(follow, audio, songs, 0)
    assert found["dependence"].value > 0.8 and found["dependence"].p == found["within_genre"].p == 1e-4
    assert found["r@1"].value > 0.95 and found["median_rank"].value == 1 and found["icc"].value > 0.5
    blind = scores.dependence(rng.standard_normal((200, 4, 16)), audio, songs, 0)
    assert blind["dependence"].p > 0.01 and blind["r@10"].value < 0.12 and abs(blind["icc"].value) < 0.05
