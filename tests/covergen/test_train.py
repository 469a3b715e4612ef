"""Whole runs as people start them: on several processes, killed, stopped, misled."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from covergen import models
from tests.support.runs import (
    CONDITIONAL,
    TINY,
    command,
    environment,
    largest_difference,
    log_of,
    same_bits,
    train,
    weights,
)
from tests.support.waiting import LIMIT, wait_for

ALIKE = ("ae_transpose", "cond_vae", "cond_lsgan")  # to others that are tried every time; each takes 20 s


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_train_what_one_process_does(shards: Path, tmp_path: Path, ranks: int) -> None:
    flags = [*TINY, "--shards", str(shards), "--norm", "group", "--steps", "20", "--save_every", "20", "--width", "8"]
    train(tmp_path, *flags, "--name", "one")
    done = train(tmp_path, *flags, "--name", "many", ranks=ranks)
    assert f"{ranks} processes on" in done.stdout
    assert largest_difference(weights(tmp_path / "runs/one", 20), weights(tmp_path / "runs/many", 20)) < 1e-4


def test_batch_norm_statistics_are_the_mean_over_the_ranks(shards: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--shards", str(shards), "--steps", "1", "--critic_steps", "1"]
    train(tmp_path, *flags, "--name", "two", ranks=2)
    found = weights(tmp_path / "runs/two", 1)
    # The first norm sees the linear layer's output of each rank's latents, twice: in the critic's and its own phase.
    from covergen.data.sampling import seed_of
    from covergen.models.base import InputSpec
    from covergen.models.wgan_gp import PlainOptions, build
    torch.manual_seed(seed_of(0, "weights"))
    model = build(PlainOptions(width=4, critic_steps=1), InputSpec(32))
    means, generator, source = [], model.networks["generator"], torch.Generator()
    for rank in range(2):
        running = torch.zeros_like(generator.project_norm.running_mean)
        for number, phase in enumerate(model.phases):
            source.manual_seed(seed_of(0, "noise", 1, number, 0))
            latents = phase.sample_noise(12, source)["latents"].chunk(2)[rank]
            features = generator.project(latents).unflatten(1, (-1, 4, 4))
            running = 0.9 * running + 0.1 * features.mean((0, 2, 3))
        means.append(running)
    assert (means[0] - means[1]).abs().max() > 1e-4  # ranks did differ
    torch.testing.assert_close(found["generator.project_norm.running_mean"], sum(means) / 2)


def test_accumulated_batches_are_one_larger_batch(shards: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--shards", str(shards), "--norm", "group", "--steps", "4"]
    train(tmp_path, *flags, "--name", "whole", "--batch_size", "12")
    train(tmp_path, *flags, "--name", "parts", "--batch_size", "3", "--grad_accum", "4")
    assert largest_difference(weights(tmp_path / "runs/whole", 4), weights(tmp_path / "runs/parts", 4)) < 1e-5


def undisturbed(tmp_path: Path, flags: list[str], ranks: int) -> dict[str, torch.Tensor]:
    train(tmp_path, *flags, "--name", "calm", ranks=ranks)
    return weights(tmp_path / "runs/calm", 24)


def kill_after(tmp_path: Path, flags: list[str], ranks: int, after: int) -> None:
    """Starts training and kills launcher and ranks with SIGKILL once ``after`` steps are in the log."""
    process = subprocess.Popen(command(*flags, ranks=ranks), cwd=tmp_path, env=environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "runs/killed/log.jsonl"
    wait_for(lambda: process.poll() is not None or (log.is_file() and log.read_text().count("\n") * 2 >= after),
             f"{after} steps", pause=0.01)
    time.sleep(random.random() * 0.1)  # in any moment of the next steps
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
    process.wait()


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_after_kill_gives_the_same_weights(shards: Path, tmp_path: Path, ranks: int) -> None:
    flags = [*TINY, "--shards", str(shards), "--steps", "24", "--tracker", "wandb"]
    calm = undisturbed(tmp_path, flags, ranks)
    for after in (2, 10):
        kill_after(tmp_path, [*flags, "--name", "killed"], ranks, after)
    train(tmp_path, *flags, "--name", "killed", ranks=ranks)
    killed = tmp_path / "runs/killed"
    assert same_bits(weights(killed, 24), calm)
    assert [row["step"] for row in log_of(killed)] == list(range(2, 25, 2))
    rows = [[value for key, value in sorted(row.items()) if key.startswith(("loss", "optim"))]
            for run in ("killed", "calm") for row in log_of(tmp_path / "runs" / run)]
    assert rows[:12] == rows[12:]
    grids = sorted(path.name for path in (killed / "grids").iterdir())
    assert grids == sorted(f"step_{step:08d}_{kind}.png" for step in range(4, 25, 4) for kind in ("noise", "truncated"))
    assert grids == sorted(path.name for path in (tmp_path / "runs/calm/grids").iterdir())
    ids = {path.name.rsplit("-", 1)[1] for path in (killed / "wandb").glob("offline-run-*")}
    assert ids == {(killed / "wandb/run_id").read_text()}
    assert len(list((killed / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize("model", [
    pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in models.MODELS
    if name not in {"wgan_gp", *CONDITIONAL}])
def test_every_model_trains_on_two_ranks_and_resumes_bitwise(shards: Path, tmp_path: Path, model: str) -> None:
    flags = ["--model", model, "--width", "4", "--batch_size", "12", "--shards", str(shards), "--steps", "24",
             "--save_every", "4", "--log_every", "2", "--sample_every", "12", "--tracker", "none"]
    calm = undisturbed(tmp_path, flags, 2)
    kill_after(tmp_path, [*flags, "--name", "killed"], 2, 6)
    train(tmp_path, *flags, "--name", "killed", ranks=2)
    assert same_bits(weights(tmp_path / "runs/killed", 24), calm)
    logs = [[{key: value for key, value in row.items() if key.startswith(("loss", "val", "optim"))}
             for row in log_of(tmp_path / "runs" / run)] for run in ("killed", "calm")]
    assert logs[0] == logs[1] and len(logs[0]) >= 12
    grids = {path.name.split("_", 2)[2] for path in (tmp_path / "runs/killed/grids").iterdir()}
    assert grids == ({"reconstructions.png"} if model.startswith("ae_") else {"noise.png", "truncated.png"} | (
        {"reconstructions.png"} if "vae" in model else set()))
    best = [sorted(path.name for path in (tmp_path / "runs" / run / "checkpoints").glob("best_*"))
            for run in ("killed", "calm")]
    assert best[0] == best[1] and len(best[0]) == ("ae" in model)


def test_a_stop_signal_saves_and_says_how_to_go_on(shards: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--shards", str(shards), "--steps", "100000", "--save_every", "100000", "--name", "stopped"]
    process = subprocess.Popen(command(*flags), cwd=tmp_path, env=environment(), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    log = tmp_path / "runs/stopped/log.jsonl"
    wait_for(lambda: log.is_file() and log.stat().st_size, "the first steps", by=[process])
    process.terminate()
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0 and "SIGTERM received" in output and "same command goes on" in output
    saved = list((tmp_path / "runs/stopped/checkpoints").iterdir())
    assert len(saved) == 1
    step = int(saved[0].name.removeprefix("step_"))
    done = train(tmp_path, *flags, "--steps", str(step + 2))
    assert f"going on from runs/stopped/checkpoints/{saved[0].name}" in done.stdout
    assert log_of(tmp_path / "runs/stopped")[-1]["step"] == step + 2


def test_without_shards_the_demo_world_is_made_once(tmp_path: Path) -> None:
    flags = [*TINY, "--save_every", "100", "--sample_every", "0"]
    done = train(tmp_path, *flags, "--steps", "1", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert "making the toy demo world" in done.stdout and "on 7,582 samples" in done.stdout
    done = train(tmp_path, *flags, "--steps", "2", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert "making the toy demo world" not in done.stdout
    assert "going on from runs/wgan_gp-demo/checkpoints/step_00000001" in done.stdout


def test_a_time_limit_stops_two_ranks_together(shards: Path, tmp_path: Path) -> None:
    done = train(tmp_path, *TINY, "--shards", str(shards), "--steps", "100000", "--minutes", "0.03", "--name", "timed",
                 "--save_every", "100000", ranks=2)
    assert "0.03 minutes are over" in done.stdout
    assert any((tmp_path / "runs/timed/grids").iterdir())
    assert len(list((tmp_path / "runs/timed/checkpoints").iterdir())) == 1


def test_a_loss_that_is_not_finite_stops_with_turn_and_step(shards: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--shards", str(shards), "--steps", "40", "--name", "blown"]
    train(tmp_path, *flags, "--steps", "4")
    done = train(tmp_path, *flags, "--lr", "1e30", "--name", "hot", ok=False)
    assert done.returncode == 1 and "the loss of the critic phase was not finite at step" in done.stdout
    assert not (tmp_path / "runs/hot/checkpoints").exists()
    checkpoint = tmp_path / "runs/blown/checkpoints/step_00000004"
    poisoned = load_file(checkpoint / "generator.safetensors")
    from safetensors.torch import save_file
    save_file({name: value * float("nan") if name == "to_rgb.bias" else value for name, value in poisoned.items()},
              checkpoint / "generator.safetensors")
    (checkpoint / "manifest.json").unlink()  # it would tell
    done = train(tmp_path, *flags, ok=False)
    assert done.returncode == 1 and "the critic phase was not finite at step 5" in done.stdout
    assert "last good checkpoint is runs/blown/checkpoints/step_00000004" in done.stdout


def test_bf16_trains_and_fp16_is_refused_on_a_cpu(shards: Path, tmp_path: Path) -> None:
    train(tmp_path, *TINY, "--shards", str(shards), "--steps", "30", "--mixed_precision", "bf16", "--name", "b")
    assert all(abs(value) < 1e4 for row in log_of(tmp_path / "runs/b") for key, value in row.items() if "loss/" in key)
    if not torch.cuda.is_available():
        done = train(tmp_path, *TINY, "--shards", str(shards), "--mixed_precision", "fp16", "--name", "h", ok=False)
        assert done.returncode == 2 and "fp16 needs a GPU" in done.stdout
        assert not (tmp_path / "runs/h").exists()
