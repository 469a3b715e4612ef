"""What goes wrong in long runs: damaged checkpoints, full disks, NaN, dead processes, stops at bad moments."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn

from covergen.data.batch import Batch
from covergen.distributed.collectives import Ranks
from covergen.runs import checkpoint
from covergen.runs.config import Training
from covergen.runs.state import TrainState
from covergen.training.batch_split import BatchSplit
from tests.proofs import chaos
from tests.support.paths import ROOT
from tests.support.runs import (
    TINY,
    command,
    environment,
    largest_difference,
    log_of,
    run_command,
    same_bits,
    train,
    train_script,
    weights,
)
from tests.support.waiting import LIMIT, wait_for

SCRIPT = """
import sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {tests!r})
from covergen import train
from shard_tools import cli
{body}
if __name__ == "__main__":
    cli.guarded(train.main)
"""


def script(folder: Path, body: str) -> Path:
    """A file that trains after some lines that make things go wrong."""
    path = folder / "script.py"
    path.write_text(SCRIPT.format(tests=str(ROOT), body=body))
    return path


@pytest.mark.parametrize("harm", ["flip", "cut", "missing", "manifest", "fifo"])
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_goes_on(shards: Path, tmp_path: Path, harm: str) -> None:
    flags = [*TINY, "--shards", str(shards), "--name", "run"]
    train(tmp_path, *flags, "--steps", "8")
    whole = weights(tmp_path / "runs/run", 8)
    name = {"flip": "generator.safetensors", "cut": "trainer.pt", "missing": "critic.safetensors"}
    file = tmp_path / "runs/run/checkpoints/step_00000008" / name.get(harm, "manifest.json")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.unlink()  # not written over: what was read of it is mapped
    if harm == "fifo":
        os.mkfifo(file)
    elif harm != "missing":
        file.write_bytes({"flip": data, "cut": data[:-9], "manifest": b"{}"}[harm])
    (tmp_path / "runs/run/grids/step_00000008_noise.png").unlink()
    made = run_command(tmp_path, "covergen.generate", "--run", "runs/run", "--n", "1", "--out", "x.png")
    assert (file.name in made.stdout and "step_00000004" in made.stdout) == (harm != "cut")  # says what it uses instead
    done = train(tmp_path, *flags, "--steps", "8")
    assert f"warning: runs/run/checkpoints/step_00000008/{file.name}" in done.stdout
    assert "going on from runs/run/checkpoints/step_00000004" in done.stdout
    assert (tmp_path / "runs/run/checkpoints/corrupt_00000008").is_dir()
    assert same_bits(weights(tmp_path / "runs/run", 8), whole)


def test_a_run_without_a_sound_checkpoint_is_not_begun_again(shards: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--shards", str(shards), "--name", "run", "--steps", "8"]
    train(tmp_path, *flags)
    for path in (tmp_path / "runs/run/checkpoints").glob("*/trainer.pt"):
        path.write_bytes(b"")
    before = sorted((tmp_path / "runs/run").rglob("*"))
    done = train(tmp_path, *flags, ok=False)
    assert done.returncode == 2 and "no checkpoint of runs/run is valid" in done.stdout
    assert done.stdout.count("trainer.pt can't be loaded") == 2
    assert sorted((tmp_path / "runs/run").rglob("*")) == before
    run_command(tmp_path, "covergen.generate", "--run", "runs/run", "--out", "x.png")  # which needs the networks alone


def test_a_full_disk_keeps_the_old_checkpoint_and_stops_cleanly(shards: Path, tmp_path: Path) -> None:
    full = script(tmp_path, """
import errno, os
from covergen.runs import checkpoint
fill = checkpoint._fill
def fails(temporary, taken):
    if taken.step == 8 and Path("full").exists():
        (temporary / "generator.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
    fill(temporary, taken)
checkpoint._fill = fails
""")
    flags = [*TINY, "--shards", str(shards), "--steps", "24", "--name"]
    (tmp_path / "full").touch()
    done = subprocess.run(command(*flags, "run", script=[str(full)]), cwd=tmp_path, env=environment(), text=True,
                          capture_output=True, timeout=LIMIT)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "No space left on device" in done.stdout
    assert "last good checkpoint is runs/run/checkpoints/step_00000004" in done.stdout
    assert [path.name for path in (tmp_path / "runs/run/checkpoints").iterdir()] == ["step_00000004"]
    assert len(log_of(tmp_path / "runs/run")) < 12  # it did not go on to the end
    (tmp_path / "full").unlink()
    train(tmp_path, *flags, "run")
    train(tmp_path, *flags, "calm")
    assert same_bits(weights(tmp_path / "runs/run", 24), weights(tmp_path / "runs/calm", 24))


def test_a_save_is_written_beside_training_and_the_next_one_waits_for_it(tmp_path: Path, monkeypatch) -> None:
    gate, written = threading.Event(), []

    def slow(folder: Path, taken: checkpoint.Snapshot, keep: int, kind: str) -> None:
        gate.wait(LIMIT)
        written.append((taken.step, kind, taken.networks["net"]["weight"].clone()))
    monkeypatch.setattr(checkpoint, "write", slow)
    net, writer = nn.Linear(2, 2), checkpoint.Checkpoints(tmp_path, 1)
    engine = SimpleNamespace(ranks=Ranks(), networks={"net": net}, state_dict=dict)
    before = net.weight.detach().clone()
    writer.save(TrainState(1), engine, ["best", "step"])
    net.weight.data.zero_()  # training goes on
    assert written == [] and writer.blocked_seconds < 5
    gate.set()
    writer.save(TrainState(2), engine, ["step"])
    assert [(step, kind) for step, kind, _ in written[:2]] == [(1, "best"), (1, "step")]
    assert torch.equal(written[0][2], before)
    writer.wait()
    assert torch.equal(written[2][2], torch.zeros(2, 2))


POISON = """
from covergen import models
from tests.support import toy_model
toy_model.PicturePhase.count = 0
forward = toy_model.PicturePhase.forward
def poisoned(self, batch, noise):
    loss, scalars = forward(self, batch, noise)
    if self.number in (3, 6):
        loss = loss * float("nan")
    return loss, {"distance": loss.detach()}
def begin(self, number, images):
    self.number = number
toy_model.PicturePhase.forward, toy_model.PicturePhase.begin = poisoned, begin
models.MODELS["toy"] = "tests.support.toy_model:TOY"
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_updates_that_are_not_finite_are_left_out_and_counted(shards: Path, tmp_path: Path, ranks: int) -> None:
    path = script(tmp_path, POISON)
    flags = ["--model", "toy", "--shards", str(shards), "--batch_size", "8", "--sample_every", "0", "--log_every", "1",
             "--save_every", "1", "--keep", "9", "--tracker", "none"]
    done = train_script(tmp_path, path, *flags, "--steps", "8", "--name", "a", "--on_nan", "skip", "2", ranks=ranks)
    rows = log_of(tmp_path / "runs/a")
    assert [row["optim/skipped"] for row in rows] == [0, 0, 1, 1, 1, 2, 2, 2], done.stdout
    assert [row["step"] for row in rows if row["loss/distance"] is None] == [3, 6]
    pixels = [weights(tmp_path / "runs/a", step)["picture.pixels"] for step in range(1, 9)]
    unchanged = [torch.equal(now, before) for before, now in itertools.pairwise(pixels)]
    assert unchanged == [False, True, False, False, True, False, False]
    if ranks == 1:
        done = subprocess.run(command(*flags, "--steps", "8", "--name", "b", "--on_nan", "skip 1",
                                      script=[str(path)]), cwd=tmp_path, env=environment(), text=True,
                              capture_output=True, timeout=LIMIT)
        assert done.returncode == 1 and "2 updates had losses or gradients that are not finite" in done.stdout
        done = train(tmp_path, "--on_nan", "maybe", ok=False)
        assert done.returncode == 2 and "such as --on_nan skip 10" in done.stdout


@pytest.mark.parametrize(("size", "ranks", "most"), [(12, 1, 5), (13, 3, 0), (13, 3, 2), (2, 4, 0), (12, 4, 3)])
def test_shares_and_pieces_cover_a_batch_and_weigh_it_right(size: int, ranks: int, most: int) -> None:
    batch = torch.arange(size)
    seen, total = [], 0.0
    for rank in range(ranks):
        share = BatchSplit(Training(batch_size=size, micro_batch=most), rank, ranks, needs_whole_batch=False)
        mine = batch[share.part]
        pieces = share.split(Batch(mine, None, mine, mine))
        noise = share.split_noise({"n": batch * 2})
        for piece, part, weight in zip(pieces, noise, share.weights, strict=True):
            assert torch.equal(piece.cover * 2, part["n"]) and piece.audio is None
            assert not most or len(piece.cover) <= most
            total += weight / ranks * piece.cover.float().mean().item()
            seen += piece.cover.tolist() if weight else []
    assert sorted(seen) == list(range(size)) and total == pytest.approx(batch.float().mean().item())


def test_a_run_goes_on_with_any_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--shards", str(shards), "--norm", "group", "--batch_size", "10"]
    train(tmp_path, *flags, "--steps", "12", "--name", "one")
    for steps, ranks, more in ((4, 2, ()), (8, 3, ()), (12, 1, ("--micro_batch", "4"))):
        done = train(tmp_path, *flags, *more, "--steps", str(steps), "--name", "many", ranks=ranks)
        assert ("3 to 4 each; their gradients are accumulated by weight" in done.stdout) == (ranks == 3)
        assert ("over pieces of at most 4 covers" in done.stdout) == bool(more)
    one, many = (tmp_path / "runs" / name for name in ("one", "many"))
    assert largest_difference(weights(one, 12), weights(many, 12)) < 1e-4
    for a, b in zip(log_of(one), log_of(many), strict=True):
        assert a["step"] == b["step"] and a["loss/critic"] == pytest.approx(b["loss/critic"], abs=1e-4)
    done = train(tmp_path, "--model", "contrast", "--shards", str(shards), "--batch_size", "11", "--steps", "1",
                 "--width", "16", "--tracker", "none", ok=False, ranks=2)
    assert done.returncode and "nearest for 2: --batch_size 12" in done.stdout


def start(folder: Path, *flags: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """Two ranks in the middle of training, and their processes by rank."""
    process = subprocess.Popen(command(*flags, ranks=2), cwd=folder, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(lambda: any(path.stat().st_size for path in folder.glob("runs/*/log.jsonl")), "the first steps",
             by=[process])
    found = {int(child.environ()["RANK"]): child for child in psutil.Process(process.pid).children(recursive=True)
             if "RANK" in child.environ()}
    return process, [found[rank] for rank in sorted(found)]


LONG = [*TINY, "--steps", "100000", "--save_every", "100000", "--sample_every", "0"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_all_ranks(shards: Path, tmp_path: Path, victim: int) -> None:
    process, ranks = start(tmp_path, *LONG, "--shards", str(shards))
    ranks[victim].kill()
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode
    assert not any(rank.is_running() and rank.status() != "zombie" for rank in ranks)
    assert said.count("Traceback") == 1 and "error: another process has ended" in said  # the launcher's, and ours
    assert "exitcode: -9" in said.partition("Traceback")[0]


@pytest.mark.slow
def test_a_rank_that_says_nothing_any_more_ends_all_ranks(shards: Path, tmp_path: Path) -> None:
    process, ranks = start(tmp_path, *LONG, "--shards", str(shards))
    ranks[1].send_signal(signal.SIGSTOP)  # as a machine that lost its network: connections stay, nothing comes
    try:
        said, _ = process.communicate(timeout=LIMIT)
    finally:
        _ = ranks[1].is_running() and ranks[1].kill()
    assert process.returncode
    assert "process 1 has sent no heartbeat for 30 s" in said


def test_the_reason_of_a_rank_comes_before_what_the_others_say(shards: Path, tmp_path: Path) -> None:
    path = script(tmp_path, """
import os
from covergen.training.engine import Engine
step = Engine.step
def fails(self, number, *others, **more):
    if number == 4 and os.environ.get("RANK") == "1":
        raise ValueError("the dog ate it")
    return step(self, number, *others, **more)
Engine.step = fails
""")
    done = subprocess.run(command(*TINY, "--shards", str(shards), "--steps", "40", ranks=2, script=[str(path)]),
                          cwd=tmp_path, env=environment(), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=LIMIT)
    assert done.returncode
    first = next(line for line in done.stdout.splitlines() if "error:" in line.lower() or "Traceback" in line)
    assert first.endswith("error: the dog ate it"), done.stdout
    assert "process 1 died: the dog ate it" in done.stdout  # as a rank on another machine would hear it


def test_a_stop_during_validation_is_heard_and_nothing_is_lost(shards: Path, tmp_path: Path) -> None:
    path = script(tmp_path, """
from covergen.training import validation
once, validate = Path("stop"), validation.validate
def stopped(phase, engine, batches, resolution, seed, stop):
    if once.exists():
        once.unlink()
        stop.reason = "SIGTERM received"
    return validate(phase, engine, batches, resolution, seed, stop)
validation.validate = stopped
""")
    flags = ["--model", "ae_resize", "--width", "4", "--batch_size", "12", "--sample_every", "0", "--save_every", "50",
             "--log_every", "5", "--tracker", "none", "--shards", str(shards), "--epochs", "3", "--name"]
    train(tmp_path, *flags, "calm")
    (tmp_path / "stop").touch()
    done = train_script(tmp_path, path, *flags, "cut")
    assert "stopped after step" in done.stdout and "SIGTERM received" in done.stdout
    calm, cut = tmp_path / "runs/calm", tmp_path / "runs/cut"
    assert len(log_of(cut)) < len(log_of(calm))
    done = train_script(tmp_path, path, *flags, "cut")
    last = log_of(calm)[-1]["step"]
    assert same_bits(weights(calm, last), weights(cut, last))
    found = [{row["step"]: row["val/loss"] for row in log_of(run) if "val/loss" in row} for run in (calm, cut)]
    assert found[0] == found[1] and [row["step"] for row in log_of(calm)] == [row["step"] for row in log_of(cut)]
    names = [sorted(path.name for path in (run / "checkpoints").glob("best_*")) for run in (calm, cut)]
    assert names[0] == names[1]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[2], [1, 2, 4]], ids=["two ranks", "1, 2 and 4 ranks"])
def test_a_run_that_is_killed_again_and_again_sees_every_batch_once(tmp_path: Path, ranks: list[int]) -> None:
    print(chaos.disturb(tmp_path, 30, ranks, seed=len(ranks)))
