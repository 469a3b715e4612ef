"""Experiments of several rows: what is run, what is done once, what is promised and what comes out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from covergen import experiment, models
from covergen.experiments.jobs import JobRunner
from covergen.runs import config
from tests.covergen.test_evaluate import FLOW, run_command

TINY = {"batch_size": 12, "steps": 2, "tracker": "none", "sample_every": 0}
PLAN = {
    "about": "two rows of two steps", "shown": ["within_genre", "r@5", "fid"],
    "tiers": {"toy": {"demo": "toy", "jobs": 2, "minutes": 5, "judge_minutes": 5, "train": TINY,
                      "evaluate": {"num_songs": 14, "samples_per_song": 2}}},
    "judge": {"train": {"model": "contrast", "album_subset": "judge", "width": 8}},
    "rows": [{"name": "gan", "title": "a GAN", "train": {"model": "r3gan", "width": 8}},
             {"name": "flow", "title": "a flow, guidance {guidance:g}",
              "train": dict(zip((flag[2:] for flag in FLOW[::2]), FLOW[1::2], strict=True)),
              "evaluations": [{"guidance": 1}, {"guidance": 2}]}],
    "thresholds": {"toy": {"gan": {"within_genre": {"at_least": 5.0}, "within_genre p": {"at_most": 1.0}},
                           "nobody": {"fid": {"at_most": 1.0}}}},
}


def test_an_experiment_trains_evaluates_compares_and_does_nothing_twice(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(PLAN))
    flags = ["two.yaml", "--shards", str(shards), "--out", "two"]
    done = run_command(tmp_path, "covergen.experiment", *flags)
    text = (tmp_path / "two/table.md").read_text()
    assert "| a flow, guidance 2 |" in text and "| real covers |" in text and "r@5 of 14" in text and "fid_14" in text
    assert "gan: within_genre at least 5: " in text and "MISSED" in text and "not evaluated" in text
    assert text in done.stdout
    results = json.loads((tmp_path / "two/results.json").read_text())
    assert set(results["results"]) == {"gan", "flow_guidance_1", "flow_guidance_2"}
    with Image.open(tmp_path / "two/figure.png") as picture:
        assert picture.width > 300 and picture.height > 300
    before = (tmp_path / "two/spent.json").read_text()
    again = run_command(tmp_path, "covergen.experiment", *flags)
    assert "train_" not in again.stdout and (tmp_path / "two/spent.json").read_text() == before
    assert set(json.loads(before)["done"]) == {"train_judge", "train_gan", "train_flow", "evaluate_gan",
                                               "evaluate_flow_guidance_1", "evaluate_flow_guidance_2"}


def test_minutes_count_over_restarts(tmp_path: Path) -> None:
    (tmp_path / "spent.json").write_text(json.dumps({"minutes": {"train_a": 15.0, "train_b": 20.0}, "done": []}))
    runner = JobRunner(tmp_path, 1)
    assert runner.training("a", ["x"], 20.0) == ("train_a", ["x", "--minutes", "5.00"])
    assert runner.training("b", ["x"], 20.0) is None and runner.training("b", ["x"], 0.0) == ("train_b", ["x"])


def test_a_command_that_fails_is_named_with_its_log(tmp_path: Path) -> None:
    runner = JobRunner(tmp_path, 2)
    with pytest.raises(ValueError, match=r"train_bad failed with status 3; see .*train_bad.log"):
        runner.run([("train_bad", [sys.executable, "-c", "print('why'); raise SystemExit(3)"]),
                  ("train_long", [sys.executable, "-c", "import time; time.sleep(60)"])])
    assert (tmp_path / "train_bad.log").read_text() == "why\n" and not runner.running and not runner.done


@pytest.mark.parametrize(("plan", "says"), [
    ({"rows": [{"name": "bad", "title": "bad", "train": {"model": "r3gan", "patch_size": 3}}]},
     "row bad: --patch_size 3"),
    ({"rows": [{"name": "bad", "title": "bad", "train": {"model": "r3gan", "widht": 3}}]}, "did you mean 'width'"),
    ({"rows": [{"name": "bad", "train": {}}]}, "a row has no title"),
    ({"thresholds": {"toy": {"gan": {"fid": {"below": 1}}}}}, "expected at_least or at_most"),
    ({"shown": None, "more": 1}, "expected the parts"),
])
def test_a_plan_is_checked_before_hours_of_work(shards: Path, tmp_path: Path, plan: dict, says: str) -> None:
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(PLAN | plan))
    done = run_command(tmp_path, "covergen.experiment", "bad.yaml", "--shards", str(shards), "--out", "bad", ok=False)
    assert done.returncode and says in done.stdout and not (tmp_path / "bad").exists()


@pytest.mark.parametrize("tier", ["toy", "std"])
def test_every_command_of_the_ablation_is_one_that_training_and_evaluation_understand(tier: str) -> None:
    plan = experiment.read_plan("ablation", tier)
    rows = [row["name"] for row in plan["rows"]]
    assert rows == ["thesis", "standardised", "projection", "r3gan", "flow"]
    for row in [plan["judge"] | {"name": "judge"}, *plan["rows"]]:
        flags = {name: str(value) for name, value in experiment.training_of(plan, row, tier).items()}
        run = config.resolve(flags | {"shards": "x"})
        assert run.model in models.MODELS
        assert run.training.album_subset == ("judge" if row["name"] == "judge" else "generator")
    labels = {label for row in plan["rows"] for label in experiment.evaluations_of(row)}
    assert plan["thresholds"][tier].keys() <= labels


@pytest.mark.parametrize(("flags", "says"), [
    ([], "name"), (["ablatoin"], "did you mean 'ablation'"), (["ablation", "--tier", "huge"], "toy, std"),
    (["ablation", "--rows", "flaw"], "did you mean 'flow'"), (["ablation", "--jobs", "-1"], "--jobs -1"),
])
def test_wrong_arguments_say_what_is_wrong(tmp_path: Path, flags: list[str], says: str) -> None:
    done = run_command(tmp_path, "covergen.experiment", *flags, ok=False)
    assert done.returncode and says in done.stdout and "Traceback" not in done.stdout


def test_a_dry_run_prints_the_commands_only(tmp_path: Path) -> None:
    done = run_command(tmp_path, "covergen.experiment", "ablation", "--dry_run", "--launcher", "accelerate launch")
    lines = done.stdout.splitlines()
    assert len(lines) == 6 + 8 and not (tmp_path / "runs").exists()
    assert lines[0].startswith("accelerate launch -m covergen.train") and "--model contrast" in lines[0]
