"""Work on the machines of a Ray cluster: the same bytes as processes make, whatever machine dies meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shard_tools.core import parallel
from shard_tools.core.parallel import run_tasks
from tests.support import music, raw_data
from tests.support.paths import ROOT
from tests.support.waiting import LIMIT, wait_for

pytest.importorskip("ray")
PORT = 24_000 + os.getpid() % 8_000
OWN = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": f"127.0.0.1:{PORT}", "OMP_NUM_THREADS": "1",
       "RAY_USAGE_STATS_ENABLED": "0"}


def start(*options: str) -> subprocess.Popen:
    """A machine of one core of a cluster, as a session of processes of its own."""
    environment = {key: value for key, value in OWN.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--num-cpus", "1", "--block",
         "--object-store-memory", "100000000", "--disable-usage-stats", "--node-ip-address", "127.0.0.1"],
        env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def stop(machine: subprocess.Popen) -> None:
    """Kills a machine as pulling its plug would."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[3]) == machine.pid:
                os.kill(int(path.parent.name), signal.SIGKILL)
        except OSError:
            continue
    machine.wait()


@pytest.fixture
def machines():
    found = [start("--head", "--port", str(PORT), "--include-dashboard", "false"),
             start("--address", f"127.0.0.1:{PORT}")]
    code = "import ray, sys; ray.init(log_to_driver=False); sys.exit(ray.cluster_resources()['CPU'] != 2)"
    wait_for(lambda: not subprocess.run([sys.executable, "-c", code], env=OWN, capture_output=True).returncode,
             "the cluster", by=found)
    yield found
    for machine in found:
        stop(machine)


def command(name: str, *options: object) -> list[str]:
    return [sys.executable, "-m", f"shard_tools.{name}", *map(str, options)]


@pytest.mark.slow
def test_two_machines_pack_the_same_bytes_and_finish_though_one_dies_and_the_driver_is_killed(tmp_path, machines):
    source = raw_data.valid_pairs(tmp_path / "source", 1500)
    raw_data.messy_pairs(source)
    options = ["--source", source, "--samples_per_shard", 10, "--max_failure_rate", 1]
    subprocess.run(command("pack", *options, "--out", tmp_path / "whole"), env=OWN, check=True, capture_output=True)
    ours = command("pack", *options, "--out", tmp_path / "out", "--distributor", "ray")
    driver = subprocess.Popen(ours, env=OWN, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: results(tmp_path / "out", 5), "5 results", by=[driver])
    driver.kill()
    driver.wait()
    driver = subprocess.Popen(ours, env=OWN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(lambda: results(tmp_path / "out", 30), "30 results", by=[driver])
    stop(machines[1])
    said = driver.communicate(timeout=4 * LIMIT)[0].decode()
    assert driver.returncode == 0, said
    assert raw_data.hashes(tmp_path / "out") == raw_data.hashes(tmp_path / "whole")


def results(out: Path, count: int) -> bool:
    return len(list(out.glob(".pack/written-*"))) >= count or bool(list(out.glob("*.index.json")))


@pytest.mark.slow
def test_two_machines_hear_and_compute_what_one_process_does(tmp_path, machines):
    pytest.importorskip("essentia")
    songs = music.library(tmp_path / "songs")
    for name in ("collect", "features"):
        ours = command(name, "--source", songs, "--max_failure_rate", 1, "--excerpt", 5)
        for out, options in (("processes", ["--workers", 1]), ("ray", ["--distributor", "ray"])):
            subprocess.run([*ours, "--out", str(tmp_path / name / out), *map(str, options)], env=OWN, check=True,
                           capture_output=True)
        one, other = (visible(tmp_path / name / out) for out in ("processes", "ray"))
        assert one == other and sum(path.endswith(".npy") for path in one) > 3


def visible(folder: Path) -> dict[str, str]:
    return {path: sha256 for path, sha256 in raw_data.hashes(folder).items() if not path.startswith(".")}


def test_a_machine_that_does_not_see_the_folders_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"{os.uname().nodename} of the Ray cluster does not see {tmp_path}/gone"):
        parallel._call(len, [], [str(tmp_path), f"{tmp_path}/gone"])


def test_without_ray_the_option_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install -e \.\[ray\]"):
        list(run_tasks(len, [[]], 2, "ray"))
