"""Configuration: what overrides what, and what is refused before anything happens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from covergen.models.wgan_gp import WGAN_GP
from covergen.runs.config import DEMO, differences, resolve
from tests.support.runs import ROOT, environment
from tests.support.waiting import LIMIT


def run(*flags: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "covergen.train", *flags], cwd=cwd, env=environment(),
                          capture_output=True, text=True, timeout=LIMIT)


def test_flags_override_the_file_and_the_file_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("lr: 0.002\nwidth: 32\nbetas: [0.5, 0.9]\nshards: somewhere\n")
    config = resolve({"config": str(file), "width": "16", "batch_size": "8"})
    assert (config.training.lr, config.options.width, config.training.batch_size) == (0.002, 16, 8)
    assert config.training.betas == (0.5, 0.9) and config.training.name == "wgan_gp"
    plain = resolve({"shards": "x"})
    assert (plain.training.batch_size, plain.training.betas, plain.options.latent) == (64, (0.0, 0.999), 100)


def test_lists_have_any_length_and_none_is_a_word() -> None:
    assert resolve({"model": "flow", "channel_mult": "1,2,2,4"}).options.channel_mult == (1, 2, 2, 4)
    options = resolve({"model": "r3gan", "augment": "none", "penalty": "0", "mismatch_weight": "0"}).options
    assert (options.augment, options.penalty, options.mismatch_weight) == (("none",), 0.0, 0.0)
    assert resolve({"model": "r3gan", "augment": "color,cutout"}).options.augment == ("color", "cutout")


def test_without_shards_the_demo_s_preset_holds_and_flags_still_win() -> None:
    config = resolve({"steps": "7"})
    assert config.training.steps == 7 and config.options.width == WGAN_GP.demo["width"]
    assert config.training.minutes == DEMO["minutes"]
    assert config.training.name == "wgan_gp-demo"


@pytest.mark.parametrize(("flags", "message"), [
    ({"stepz": "3"}, "unknown option --stepz, did you mean 'steps'"),
    ({"model": "wgan"}, "--model wgan: no such model, did you mean 'wgan_gp'"),
    ({"steps": "many"}, "--steps: expected a whole number, found 'many'"),
    ({"steps": "1.5"}, "--steps: expected a whole number"),
    ({"steps": "0"}, "--steps 0: expected above 0"),
    ({"lr": "True"}, "--lr: expected a number, found nothing"),
    ({"ema": "1.5"}, "--ema 1.5"),
    ({"norm": "layer"}, "--norm: 'layer' is not a choice"),
    ({"mixed_precision": "fp8"}, "--mixed_precision: 'fp8' is not a choice"),
    ({"betas": "0.5"}, "--betas: expected 2 values"),
    ({"name": "../x"}, "--name ../x: one folder name"),
    ({"config": "/nowhere.yaml"}, "nowhere.yaml"),
    ({"album_subset": "jugde"}, "--album_subset: 'jugde' is not a choice, did you mean 'judge'"),
    ({"lr_warmup": "-1"}, "--lr_warmup -1: expected 0 or more"),
    ({"model": "r3gan", "penalty_every": "0"}, "--penalty_every 0: expected above 0"),
    ({"model": "r3gan", "audio_dropout": "1"}, "--audio_dropout 1.0: expected 0 to below 1"),
    ({"model": "flow", "channel_mult": "1,x"}, "--channel_mult: expected a whole number, found 'x'"),
])
def test_wrong_options_are_refused_with_the_way_out(flags: dict, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message.replace("(", r"\(")):
        resolve({"shards": "x", **flags})


def test_a_file_with_a_misspelt_name_or_no_mapping_is_refused(tmp_path: Path) -> None:
    for text, message in (("widht: 3", "did you mean 'width'"), ("- 1", "expected lines"), ("a: [", "not YAML")):
        file = tmp_path / "c.yaml"
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            resolve({"config": str(file)})


def test_dry_run_prints_what_would_be_saved_and_touches_nothing(tmp_path: Path) -> None:
    done = run("--dry_run", "--shards", "x", "--name", "2020_01", "--seed", "9", cwd=tmp_path)
    assert done.returncode == 0 and list(tmp_path.iterdir()) == []
    values = yaml.safe_load(done.stdout)
    assert values["seed"] == 9 and values["name"] == "2020_01" and values["penalty"] == 10.0
    assert differences(values, resolve({"shards": "y", "seed": "9"}).flat()) == []


def test_a_misspelt_flag_fails_before_anything_happens(tmp_path: Path) -> None:
    done = run("--sample_evry", "5", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean 'sample_every'" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert run("word").returncode == 2


def test_help_names_every_option_with_its_default() -> None:
    done = run("--help")
    assert done.returncode == 0
    for name in ("model", "shards", "norm", "critic_steps", "mixed_precision", "resume", "dry_run", "config"):
        assert f"--{name} " in done.stdout
    assert "[default: 0.0001]" in done.stdout
