"""The run folder: checkpoints whole or absent, one writer, one identity, a log without gaps, a W&B that may fail."""

from __future__ import annotations

import json
import multiprocessing
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from covergen.inference import images as pictures
from covergen.runs import checkpoint
from covergen.runs.log import cut_log
from covergen.runs.state import TrainState
from covergen.training import tracking
from covergen.training.ema import EMA
from shard_tools.core.locks import lock_folder
from tests.support.runs import TINY, log_of, train
from tests.support.waiting import LIMIT


def save(folder: Path, step: int, keep: int = 2, kind: str = "step") -> Path:
    taken = checkpoint.snapshot(TrainState(step), {"net": nn.Linear(2, 2)}, {})
    return checkpoint.write(folder, taken, keep, kind)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9_999_999):
        save(tmp_path, step)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [10, 9_999_999]


def test_only_the_best_that_was_saved_last_is_kept(tmp_path: Path) -> None:
    for step in (30, 20):  # a course that was killed had found its best later than the one that went on
        save(tmp_path, step, keep=1, kind="best")
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path, "best")] == [20]


def test_a_failed_save_leaves_the_old_checkpoints_and_no_half_one(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 1, keep=1)
    for culprit in ("torch.save", "os.replace"):
        def fail(*_: object) -> None:
            raise OSError("disk full")
        with monkeypatch.context() as patch:
            patch.setattr(culprit, fail)
            with pytest.raises(OSError, match="disk full"):
                save(tmp_path, 2, keep=1)
        assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step_00000001"]
    save(tmp_path, 3, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


def test_a_damaged_or_foreign_checkpoint_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)

    def load(size: int = 2) -> TrainState:
        engine = SimpleNamespace(networks={"net": nn.Linear(size, 2)}, load_state_dict=lambda state: None)
        return checkpoint.Checkpoints(tmp_path, 1, path).load_latest(engine)
    assert load() == TrainState(1)
    with pytest.raises(ValueError, match=r"net\.safetensors can't be loaded"):
        load(3)
    (path / "trainer.pt").write_bytes(b"\x80\x04nonsense")
    with pytest.raises(ValueError, match=r"trainer\.pt can't be loaded"):
        load()
    (path / "net.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"net\.safetensors can't be loaded"):
        load()


def hold(folder: str, ready: multiprocessing.Event, leave: multiprocessing.Event) -> None:
    with lock_folder(Path(folder)):
        ready.set()
        leave.wait()


def test_a_run_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    other = context.Process(target=hold, args=(str(tmp_path), ready, leave))
    other.start()
    assert ready.wait(LIMIT)
    with pytest.raises(ValueError, match=f"in use by process {other.pid}"):
        lock_folder(tmp_path, patience=0.1).__enter__()
    leave.set()
    with lock_folder(tmp_path, patience=LIMIT):
        pass
    other.join()


def test_the_log_is_cut_where_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6, 8)) + '{"step": 10, "lo')
    assert cut_log(path, 5) == 8
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]


class FakeRun:
    def __init__(self, fails: bool = False) -> None:
        self.steps, self.fails = [], fails

    def log(self, row: dict, step: int) -> None:
        if self.fails:
            raise ConnectionError("network is down")
        self.steps.append(step)

    def finish(self) -> None:
        pass


def tracker(folder: Path, run: FakeRun, step: int, monkeypatch) -> tracking.Tracker:
    monkeypatch.setattr(tracking, "_open_wandb", lambda *_: run)
    return tracking.Tracker(folder, {"tracker": "wandb"}, step)


def test_the_steps_sent_to_wandb_never_go_back(tmp_path: Path, monkeypatch) -> None:
    run = FakeRun()
    first = tracker(tmp_path, run, 0, monkeypatch)
    for step in (2, 4, 6):
        first.log(step, 10 * step, {"loss/a": 1.0})
    again = tracker(tmp_path, run, 2, monkeypatch)  # killed, and resumed from step 2
    for step in (4, 6, 8):
        again.log(step, 10 * step, {"loss/a": 1.0, "optim/n": float("inf")})
    assert log_of(tmp_path)[-1] == {"step": 8, "images": 80, "loss/a": 1.0, "optim/n": None}
    assert run.steps == [2, 4, 6, 8]
    assert [row["step"] for row in log_of(tmp_path)] == [2, 4, 6, 8]


def test_a_failing_wandb_warns_once_and_training_goes_on(tmp_path: Path, monkeypatch) -> None:
    record = tracker(tmp_path, FakeRun(fails=True), 0, monkeypatch)
    with pytest.warns(UserWarning, match="network is down.*going on without"):
        record.log(1, 1, {"loss/a": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record.log(2, 2, {"loss/a": 1.0})
        record.grid(2, 2, "noise", torch.zeros(8, 3, 4, 4))
        record.finish()
    assert len(log_of(tmp_path)) == 2


def test_the_grid_of_a_conditional_model_names_the_genres_of_its_rows(tmp_path: Path, monkeypatch) -> None:
    rows = []
    run = FakeRun()
    run.log = lambda row, step: rows.append(row)
    record = tracker(tmp_path, run, 0, monkeypatch)
    record.grid(2, 2, "noise", torch.zeros(16, 3, 4, 4), ["blues", "r&b"])
    record.grid(2, 2, "plain", torch.zeros(8, 3, 4, 4))
    assert rows[0]["samples/noise"]._caption == "step 2, rows: blues, r&b"
    assert rows[1]["samples/plain"]._caption == "step 2"
    assert {path.name for path in (tmp_path / "grids").iterdir()} == {
        "step_00000002_noise.png", "step_00000002_plain.png"}


def test_a_grid_is_a_picture_with_eight_covers_a_row(tmp_path: Path) -> None:
    covers = torch.stack([torch.full((3, 4, 4), n / 16) for n in range(16)])
    pictures.save(tmp_path / "g.png", pictures.grid(covers))
    picture = Image.open(tmp_path / "g.png")
    assert picture.size == (8 * 66 + 2, 2 * 66 + 2)  # covers of 4 px, each pixel 16 by 16
    assert picture.getpixel((3, 3)) == (0, 0, 0) and picture.getpixel((66 + 3, 3)) == (16, 16, 16)
    assert picture.getpixel((66 + 3, 66 + 3)) == (143, 143, 143)
    labelled = pictures.grid(covers, labels=["real", "generated"])
    assert labelled.height == picture.height and labelled.width > picture.width + 40
    assert torch.equal(pictures.to_unit(torch.tensor([-1.0, 0.0, 3.0]), -1.0), torch.tensor([0.0, 0.5, 1.0]))


def test_the_average_follows_the_weights_and_copies_the_buffers() -> None:
    live = nn.BatchNorm1d(3)
    average = EMA({"n": live}, decay=0.9)
    with torch.no_grad():
        live.weight.fill_(2.0)
        live.running_mean.fill_(7.0)
    average.update()
    copy = average.networks["n"]
    assert torch.allclose(copy.weight, torch.tensor(1 + (1 - 2 / 11)))  # the first decay is 2 / 11
    assert torch.equal(copy.running_mean, live.running_mean) and not copy.weight.requires_grad
    for _ in range(200):
        average.update()
    assert torch.allclose(copy.weight, live.weight)


def test_a_run_goes_on_only_as_the_run_it_is(shards: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--shards", str(shards), "--name", "r"]
    train(tmp_path, *flags, "--steps", "4")
    done = train(tmp_path, *flags, "--steps", "8", "--lr", "0.5", ok=False)
    assert done.returncode == 2 and "--lr: 0.0001 in the run, 0.5 now" in done.stdout
    done = train(tmp_path, *flags, "--steps", "8", "--resume", "never", ok=False)
    assert done.returncode == 2 and "already holds step 4" in done.stdout
    assert "the run is complete at step 4" in train(tmp_path, *flags, "--steps", "4").stdout
    done = train(tmp_path, *flags, "--name", "s", "--steps", "6", "--resume", "runs/r")
    assert "going on from runs/r/checkpoints/step_00000004" in done.stdout
    done = train(tmp_path, *flags, "--name", "s", "--steps", "8", "--resume", "runs/r")  # the same command again
    assert "going on from runs/s/checkpoints/step_00000006" in done.stdout
    old = "runs/s/checkpoints/step_00000006"
    done = train(tmp_path, *flags, "--name", "s", "--steps", "12", "--resume", old, ok=False)
    assert done.returncode == 2 and "already went on to step 8" in done.stdout
    assert sorted(os.listdir(tmp_path / "runs/s/checkpoints")) == ["step_00000006", "step_00000008"]
    assert set(os.listdir(tmp_path / "runs/s")) >= {"config.yaml", "data.json", "log.jsonl", "grids", "checkpoints"}
    metadata = json.loads((tmp_path / "runs/s/data.json").read_text())
    assert len(metadata["audio"]["mean"]) == 1160 and metadata["resolution"] == 32 and len(metadata["genres"]) > 1
