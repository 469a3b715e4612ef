"""The launch files: Accelerate understands them, and what they start is the run that was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.runs import ROOT, TINY, environment, log_of
from tests.support.servers import free_port
from tests.support.waiting import LIMIT

LAUNCH = ROOT / "launch"


def accelerate(*words: str) -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", *words]


def train_with_cpu_config(folder: Path, shards: Path, **extra: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        accelerate("--config_file", str(LAUNCH / "cpu.yaml"), "-m", "covergen.train", *TINY, "--shards", str(shards),
                   "--steps", "2"), cwd=folder, env=environment(**extra), text=True, capture_output=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("name", ["cpu", "single_gpu", "multi_gpu", "multi_node"])
def test_accelerate_reads_every_config(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    path = LAUNCH / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1 and config.mixed_precision in ("no", "bf16")
    assert yaml.safe_load(path.read_text())["compute_environment"] == "LOCAL_MACHINE"


def test_the_cpu_config_trains_with_the_cores_of_the_machine(shards: Path, tmp_path: Path) -> None:
    done = train_with_cpu_config(tmp_path, shards)
    cores = len(os.sched_getaffinity(0))
    assert f"1 process on cpu, precision no, {cores} thread" in done.stdout


def test_threads_that_the_user_set_are_kept(shards: Path, tmp_path: Path) -> None:
    assert "1 thread each (OMP_NUM_THREADS)" in train_with_cpu_config(tmp_path, shards, OMP_NUM_THREADS="1").stdout


def test_two_machines_meet_and_train_one_run(shards: Path, tmp_path: Path) -> None:
    """The multi-node file with two launchers on this machine in the place of two machines, on the CPU."""
    flags = [*TINY, "--shards", str(shards), "--steps", "6", "--name", "nodes"]
    port = str(free_port())
    nodes = [subprocess.Popen(accelerate(
        "--config_file", str(LAUNCH / "multi_node.yaml"), "--multi_gpu", "--num_machines", "2", "--num_processes", "2",
        "--machine_rank", str(node), "--main_process_ip", "127.0.0.1", "--main_process_port", port,
        "--mixed_precision", "no", "-m", "covergen.train", *flags), cwd=tmp_path, text=True,
        env=environment(ACCELERATE_USE_CPU="true"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for node in range(2)]
    outputs = [node.communicate(timeout=LIMIT)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert "2 processes on cpu" in "".join(outputs)
    assert [row["step"] for row in log_of(tmp_path / "runs/nodes")] == [2, 4, 6]
