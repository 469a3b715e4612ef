"""Runs of the conditional models: two ranks train what one process does, and so does a resumed run; bf16 is stable."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from covergen.nn.schedules import decay_of_average, learning_rate
from covergen.runs.config import resolve
from tests.support.runs import CONDITIONAL, largest_difference, log_of, same_bits, train, weights

STEPS, BATCH = 20, 12


@pytest.mark.parametrize("model", CONDITIONAL)
def test_two_ranks_train_what_one_process_does_and_a_resumed_run_too(shards: Path, tmp_path: Path, model: str) -> None:
    flags = ["--model", model, *CONDITIONAL[model], "--batch_size", str(BATCH), "--shards", str(shards), "--steps",
             str(STEPS), "--log_every", "1", "--sample_every", "20", "--tracker", "none", "--mixed_precision", "no"]
    config = resolve({"model": model, "shards": "x"}).training
    assert (config.order, config.album_subset) == ("group", "generator")
    train(tmp_path, *flags, "--save_every", "10", "--name", "one")
    done = train(tmp_path, *flags, "--save_every", "20", "--name", "two", ranks=2)
    assert "2 processes on" in done.stdout
    one, two, again = (tmp_path / "runs" / name for name in ("one", "two", "again"))
    assert largest_difference(weights(one, STEPS), weights(two, STEPS)) < 1e-4

    shutil.copytree(one, again)
    shutil.rmtree(again / "checkpoints/step_00000020")
    shutil.rmtree(again / "grids", ignore_errors=True)
    done = train(tmp_path, *flags, "--save_every", "19", "--name", "again")
    assert "going on from runs/again/checkpoints/step_00000010" in done.stdout
    assert same_bits(weights(one, STEPS), weights(again, STEPS))
    rows = [[{key: value for key, value in row.items() if key.startswith(("loss", "optim"))} for row in log_of(run)]
            for run in (one, again)]
    assert rows[0] == rows[1] and len(rows[0]) == STEPS
    grids = [sorted(path.name.split("_", 2)[2] for path in (run / "grids").glob("*")) for run in (one, two, again)]
    assert grids == [{"r3gan": ["noise.png", "truncated.png"], "flow": ["noise.png"], "contrast": []}[model]] * 3

    given = resolve({"model": model, "shards": "x", **dict(zip([flag[2:] for flag in CONDITIONAL[model][::2]],
                                                               CONDITIONAL[model][1::2], strict=True))}).training
    rates = [learning_rate(BATCH * step, given.lr, given.lr_warmup, given.lr_last, given.lr_images)
             for step in range(1, STEPS + 1)]
    assert [row["optim/lr"] for row in rows[0]] == rates and (rates[0] < rates[9]) == (model == "flow")
    assert [step for step, row in enumerate(rows[0], 1) if "loss/penalty" in row] == (
        list(range(2, STEPS + 1, 2)) if model == "r3gan" else [])
    before, after = weights(again, 19), weights(again, STEPS)
    decay = decay_of_average(BATCH * STEPS, BATCH, given.ema_halflife)
    averaged = [name for name in after if "_ema." in name]
    assert averaged and decay == pytest.approx(0.5)
    for name in averaged:
        live = after[name.replace("_ema.", ".")]
        torch.testing.assert_close(after[name], torch.lerp(before[name], live, 1 - decay), msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["r3gan", "flow"])
def test_bf16_is_stable_for_2000_steps(shards: Path, tmp_path: Path, model: str) -> None:
    train(tmp_path, "--model", model, *CONDITIONAL[model], "--batch_size", "16", "--shards", str(shards), "--steps",
          "2000", "--sample_every", "0", "--save_every", "2000", "--log_every", "50", "--tracker", "none",
          "--mixed_precision", "bf16", "--name", "b", "--lr", "1e-3")
    rows = log_of(tmp_path / "runs/b")
    assert rows[-1]["step"] == 2000
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(value.isfinite().all() for value in weights(tmp_path / "runs/b", 2000).values())
    if model == "flow":
        late = sum(row["loss/flow"] for row in rows[-10:]) / 10
        assert late < 0.6 * rows[0]["loss/flow"]
    else:
        assert all(abs(row["loss/score_gap"]) < 50 and row["loss/penalty"] < 50 and row["loss/generator"] < 20
                   for row in rows)


@pytest.mark.slow
def test_a_compiled_run_trains_what_a_plain_one_does(shards: Path, tmp_path: Path) -> None:
    flags = ["--model", "r3gan", *CONDITIONAL["r3gan"], "--batch_size", "12", "--shards", str(shards), "--steps", "6",
             "--sample_every", "0", "--tracker", "none", "--mixed_precision", "no"]
    train(tmp_path, *flags, "--name", "plain")
    train(tmp_path, *flags, "--compile", "true", "--name", "compiled")
    assert largest_difference(weights(tmp_path / "runs/plain", 6), weights(tmp_path / "runs/compiled", 6)) < 1e-4
