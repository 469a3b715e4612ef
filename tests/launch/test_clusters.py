"""The files for many machines: what the tools of each cluster read, all of them start the one definition of a run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from covergen.runs import config
from tests.support.runs import ROOT, environment, log_of
from tests.support.servers import free_port
from tests.support.waiting import LIMIT, wait_for

LAUNCH = ROOT / "launch"
WAYS = ["slurm.sbatch", "kubernetes.yaml", "pytorchjob.yaml", "torchrun.sh", "skypilot.yaml"]
TINY = {"model": "wgan_gp", "norm": "group", "width": 4, "batch_size": 12, "critic_steps": 2, "sample_every": 0,
        "log_every": 1, "tracker": "none", "threads": 1, "mixed_precision": "no"}

# docs.skypilot.co/en/latest/reference/yaml-spec.html
SKY = {"name", "num_nodes", "resources", "workdir", "envs", "secrets", "file_mounts", "setup", "run", "volumes",
       "config"}
SKY_RESOURCES = {"accelerators", "use_spot", "disk_size", "job_recovery", "infra", "instance_type", "cpus", "memory",
                 "image_id", "network_tier", "any_of", "ordered"}
# kubeflow.org/docs/components/trainer/legacy-v1/reference
ELASTIC = {"rdzvBackend", "rdzvPort", "rdzvHost", "rdzvId", "rdzvConf", "minReplicas", "maxReplicas", "maxRestarts",
           "nProcPerNode", "standalone", "metrics"}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def shell_of(name: str) -> str:
    """The part of a file that bash reads."""
    found = documents(name) if name.endswith(".yaml") else []
    if name == "kubernetes.yaml":
        return found[1]["spec"]["template"]["spec"]["containers"][0]["args"][0]
    if name == "pytorchjob.yaml":
        return worker(found[0])["template"]["spec"]["containers"][0]["args"][0]
    return found[0]["setup"] + found[0]["run"] if found else (LAUNCH / name).read_text()


def worker(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["pytorchReplicaSpecs"]["Worker"]


@pytest.mark.parametrize("name", [*WAYS, "run.yaml"])
def test_lines_to_fill_in_are_marked_alike_and_the_page_names_the_file(name: str) -> None:
    text = (LAUNCH / name).read_text()
    assert text.count("FILL") - text.count("Lines with FILL") == text.count("# <-- FILL") > 0
    assert f"launch/{name}" in (LAUNCH / "README.md").read_text()


@pytest.mark.parametrize("name", WAYS)
def test_every_way_starts_the_one_definition_with_a_launcher_that_begins_again(name: str) -> None:
    text = " ".join(shell_of(name).split())
    assert "torchrun " in text and "-m covergen.train --config" in text
    assert "run.yaml" in (LAUNCH / name).read_text()
    assert "--max_restarts" in text or "maxRestarts" in (LAUNCH / name).read_text()
    assert subprocess.run(["bash", "-n"], input=shell_of(name), text=True, capture_output=True).stderr == ""


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("name", WAYS)
def test_shellcheck_finds_nothing(name: str) -> None:
    known = ["-e", "SC2086,SC1090"] if name == "skypilot.yaml" else []  # $FLAGS is several words; ~/venv
    done = subprocess.run(["shellcheck", "-s", "bash", *known, "-"], input=shell_of(name), text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout


def test_the_definition_is_one_that_training_reads() -> None:
    run = config.resolve({"config": str(LAUNCH / "run.yaml")})
    assert run.training.batch_size % (64 * 8) == 0  # any usual number of GPUs shares it


def test_kubernetes_accepts_the_job_and_its_service_and_the_numbers_agree() -> None:
    service, job = documents("kubernetes.yaml")
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    assert int(values["NODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(values["GPUS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert f"{job['metadata']['name']}-0.{pod['subdomain']}:29500" in shell_of("kubernetes.yaml")
    assert int(values["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in (service, job):
        kubernetes_validate.validate(document, "1.28", strict=True)


def test_the_elastic_job_has_the_fields_of_the_operator_and_a_pod_of_kubernetes() -> None:
    (job,) = documents("pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job["spec"]) == {"elasticPolicy", "runPolicy", "pytorchReplicaSpecs"}
    policy = job["spec"]["elasticPolicy"]
    assert set(policy) <= ELASTIC
    assert policy["minReplicas"] <= worker(job)["replicas"] <= policy["maxReplicas"]
    assert worker(job)["template"]["spec"]["containers"][0]["name"] == "pytorch"
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    template = {**worker(job)["template"], "spec": {**worker(job)["template"]["spec"], "restartPolicy": "OnFailure"}}
    kubernetes_validate.validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "pod"},
                                  "spec": {"template": template}}, "1.28", strict=True)


def test_the_task_of_skypilot_has_documented_fields_only() -> None:
    (task,) = documents("skypilot.yaml")
    assert set(task) <= SKY and set(task["resources"]) <= SKY_RESOURCES
    run = yaml.safe_load((LAUNCH / "run.yaml").read_text())
    assert set(task["file_mounts"]) == {run["out"], run["shards"]}
    assert task["file_mounts"][run["out"]]["mode"] == "MOUNT_CACHED"  # logs are appended to, checkpoints renamed


def test_skypilot_reads_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))
    assert task.num_nodes == documents("skypilot.yaml")[0]["num_nodes"]


@pytest.mark.skipif(not shutil.which("sbatch"), reason="Slurm is not installed")
def test_slurm_accepts_the_job(tmp_path: Path) -> None:
    if subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no Slurm controller answers")
    lines = [line for line in (LAUNCH / "slurm.sbatch").read_text().splitlines(keepends=True)
            if not line.startswith(("#SBATCH --gpus", "#SBATCH --cpus", "#SBATCH --part", "#SBATCH --nodes"))]
    (tmp_path / "filled.sbatch").write_text("".join(lines))
    done = subprocess.run(["sbatch", "--test-only", "filled.sbatch"], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def with_definition(folder: Path, shards: Path, **changes: Any) -> dict[str, str]:
    """The environment in which a script finds a tiny definition and this project."""
    (folder / "run.yaml").write_text(yaml.safe_dump({**TINY, "shards": str(shards), "name": "one", **changes}))
    return environment(CONFIG="run.yaml", HEAD="127.0.0.1", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1",
                       PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.slow
def test_the_elastic_script_trains(shards: Path, tmp_path: Path) -> None:
    env = with_definition(tmp_path, shards, steps=4) | {"NODES": "1:2", "GPUS": "2", "PORT": str(free_port()),
                                                        "ADDRESS": "127.0.0.1"}
    done = subprocess.run([LAUNCH / "torchrun.sh", "--steps", "3"], cwd=tmp_path, env=env, text=True,
                          capture_output=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert "2 processes on cpu" in done.stdout
    assert [row["step"] for row in log_of(tmp_path / "runs/one")] == [1, 2, 3]


# What the script asks of Slurm, for one machine: names, a step that runs here, a signal to it, the queue.
STAND_INS = {
    "scontrol": 'if [[ $1 == requeue ]]; then echo "$2" >> requeued; else echo 127.0.0.1; fi',
    "srun": 'shift 2; export SLURM_NODEID=0; setsid "$@" & echo $! > step; wait $!',
    "scancel": 'kill -TERM -- "-$(cat step)"'}


@pytest.mark.slow
def test_a_job_of_slurm_that_is_told_to_stop_queues_again_and_one_that_is_complete_does_not(
        shards: Path, tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands, but real training."""
    for name, body in STAND_INS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/activate").touch()
    env = with_definition(tmp_path, shards, steps=3000, save_every=3000)
    env |= {"PATH": f"{tmp_path / 'bin'}:{env['PATH']}", "VENV": str(tmp_path / "venv"), "SLURM_JOB_ID": "9655",
            "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1"}
    log = tmp_path / "runs/one/log.jsonl"
    with open(tmp_path / "said.txt", "w") as said:
        job = subprocess.Popen([LAUNCH / "slurm.sbatch"], cwd=tmp_path, env=env, stdout=said, stderr=subprocess.STDOUT)

        def trains() -> bool:
            assert job.poll() is None, (tmp_path / "said.txt").read_text()
            return log.is_file() and len(log.read_text().splitlines()) > 5
        wait_for(trains, "the first steps")
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=LIMIT) == 75
    assert (tmp_path / "requeued").read_text() == "9655\n"
    (checkpoint,) = (tmp_path / "runs/one/checkpoints").iterdir()
    begun = int(checkpoint.name.removeprefix("step_"))
    assert 5 < begun < 3000
    done = subprocess.run([LAUNCH / "slurm.sbatch", "--steps", str(begun + 5)], cwd=tmp_path, env=env, text=True,
                          capture_output=True, timeout=LIMIT)
    assert done.returncode == 0 and f"going on from runs/one/checkpoints/{checkpoint.name}" in done.stdout, done.stderr
    assert (tmp_path / "requeued").read_text() == "9655\n"
