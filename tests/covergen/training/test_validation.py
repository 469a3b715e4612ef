"""Validation: every sample of the split exactly once on any number of ranks, early stopping, the best checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from covergen.data.dataset import ShardDataset
from covergen.inference.trained_model import open_model
from covergen.runs.checkpoint import checkpoints, step_of
from covergen.runs.state import EarlyStopping, TrainState
from tests.support.runs import log_of, train

SMALL = ["--model", "ae_resize", "--width", "4", "--batch_size", "12", "--tracker", "none", "--sample_every", "0"]


def test_patience_stops_after_so_many_epochs_without_a_better_loss() -> None:
    early, better = EarlyStopping(), []
    for epoch, loss in enumerate([5.0, 4.0, 4.5, 3.0, 3.0, 3.5, 9.0, 1.0], 1):
        better.append(early.update(10 * epoch, loss))
        if early.should_stop(3):
            break
    assert better == [True, True, False, True, False, False, False]  # an equal loss is not a better one
    assert (early.best, early.best_step, early.waited) == (3.0, 40, 3)
    again = TrainState.from_state_dict(TrainState(70, early).state_dict())
    assert again == TrainState(70, early) and not again.early_stopping.should_stop(4)
    early.update(75, 8.0, epoch=False)  # the last step of a run need not end an epoch
    assert not early.should_stop(4) and early.should_stop(3) and not early.should_stop(0)


def test_validation_agrees_on_1_2_and_3_ranks_and_with_a_plain_loop(shards: Path, tmp_path: Path) -> None:
    found = {}
    for ranks in (1, 2, 3):
        train(tmp_path, *SMALL, "--shards", str(shards), "--model", "vae", "--latent", "8", "--steps", "1", "--lr",
              "1e-9", "--name", f"r{ranks}", ranks=ranks)
        found[ranks] = {key: value for key, value in log_of(tmp_path / f"runs/r{ranks}")[-1].items() if "val/" in key}
    assert found[1].keys() == {"val/loss", "val/neg_elbo", "val/bce", "val/kl"}
    # Running statistics of batch norm differ after a step on other batches, by a few percent of a few percent.
    assert all(found[ranks][key] == pytest.approx(found[1][key], rel=0.02) for ranks in (2, 3) for key in found[1])
    run = open_model(tmp_path / "runs/r1")
    held_out = ShardDataset(shards, "val")
    batch = held_out.read(np.arange(held_out.metadata["samples"]))
    noise = {"latents": torch.zeros(len(batch.cover), 8)}
    with torch.no_grad():
        mean, log_variance = run.model.networks["vae"].encode(batch.cover.float() / 255)
        scalars = run.model.phases[0](batch, noise)[1]
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
    assert found[1]["val/kl"] == pytest.approx(divergence.item(), rel=1e-4)
    assert found[1]["val/kl"] == pytest.approx(scalars["kl"].item(), rel=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_stops_early_reports_its_best_and_stays_stopped(shards: Path, tmp_path: Path, ranks: int) -> None:
    # At this learning rate the loss soon gets worse than it has been.
    flags = [*SMALL, "--shards", str(shards), "--lr", "0.3", "--patience", "2", "--epochs", "60", "--name", "early"]
    done = train(tmp_path, *flags, ranks=ranks)
    folder = tmp_path / "runs/early"
    curve = [(row["step"], row["val/loss"]) for row in log_of(folder) if "val/loss" in row]
    best_step, best = min(curve, key=lambda pair: (pair[1], pair[0]))
    assert "after 2 epochs without a better validation loss" in done.stdout
    assert [step for step, _ in curve].index(best_step) == len(curve) - 3 and len(curve) < 60
    assert [step_of(path) for path in checkpoints(folder, "best")] == [best_step]
    assert re.search(rf"best validation loss, {best:.6g}, was at step {best_step}: .*best_{best_step:08d}", done.stdout)
    assert step_of(open_model(folder).checkpoint) == best_step
    assert step_of(open_model(folder, which="last").checkpoint) == curve[-1][0]
    again = train(tmp_path, *flags, ranks=ranks)
    assert f"the run stopped early at step {curve[-1][0]}" in again.stdout and "--patience 4" in again.stdout
    train(tmp_path, *flags, "--patience", "3", ranks=ranks)
    assert log_of(folder)[-1]["step"] > curve[-1][0]


def test_validation_is_after_every_epoch_and_epochs_end_a_run(shards: Path, tmp_path: Path) -> None:
    samples = ShardDataset(shards, "train").samples
    done = train(tmp_path, *SMALL, "--shards", str(shards), "--epochs", "3", "--name", "e")
    steps = [row["step"] for row in log_of(tmp_path / "runs/e") if "val/loss" in row]
    assert steps == [-(-samples * epoch // 12) for epoch in (1, 2, 3)]
    assert f"done: {steps[-1]} steps" in done.stdout
    again = train(tmp_path, *SMALL, "--shards", str(shards), "--epochs", "3", "--name", "e")
    assert "the run is complete" in again.stdout and "--epochs 6 would go on" in again.stdout


def test_without_a_val_split_it_says_so_and_trains(world: Path, tmp_path: Path) -> None:
    from shard_tools.pack import pack
    pack(str(world / "audio-cover_dataset/cover/train"), str(tmp_path / "only"), workers=1)
    done = train(tmp_path, *SMALL, "--shards", "only", "--steps", "3", "--name", "n")
    assert "has no val split: there is no validation loss" in done.stdout
    assert not any("val/loss" in row for row in log_of(tmp_path / "runs/n"))
    assert (tmp_path / "runs/n/grids/step_00000003_reconstructions.png").is_file()


def test_a_model_without_averages_refuses_an_average(shards: Path, tmp_path: Path) -> None:
    done = train(tmp_path, *SMALL, "--shards", str(shards), "--ema", "0.9", "--name", "x", ok=False)
    assert done.returncode == 2 and "this model has no averaged networks" in done.stdout
