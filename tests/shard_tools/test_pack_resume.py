"""Packing that is killed: the same command again gives the bytes of an undisturbed run, and nothing is left behind."""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from shard_tools.core.errors import SourceChangedError
from shard_tools.pack import pack
from shard_tools.shards.tasks import SampleFormat
from tests.support import raw_data
from tests.support.paths import ROOT
from tests.support.waiting import wait_for


def test_a_kill_before_any_rename_or_deletion_changes_nothing(tmp_path, monkeypatch):
    source = raw_data.valid_pairs(tmp_path / "source", 24)
    raw_data.messy_pairs(source)
    raw_data.add_truth(source, [("metal", raw_data.stem(0, 0))])
    options = {"samples_per_shard": 5, "workers": 1, "max_failure_rate": 1.0}
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a busy disk takes 20 ms for one
    pack(str(source), str(tmp_path / "whole"), **options)
    expected = raw_data.hashes(tmp_path / "whole")
    assert "attributes.npz" in expected
    for step in range(1, 200):
        out = tmp_path / f"out{step}"
        with monkeypatch.context() as patch:
            raw_data.kill_before(patch, step, ("replace", "unlink", "fsync", "rmdir"))
            try:
                pack(str(source), str(out), **options)
                break
            except raw_data.Killed:
                pass
        pack(str(source), str(out), **options)
        assert raw_data.hashes(out) == expected, f"killed at step {step}"
        assert {path.name for path in out.iterdir()} == set(expected)
    assert step > 40


def kill_and_rerun(tmp_path: Path, pairs: int, kills: int, only_parent: bool = False) -> None:
    source = raw_data.valid_pairs(tmp_path / "source", pairs)
    raw_data.messy_pairs(source)
    command = [sys.executable, "-m", "shard_tools.pack", "--source", source, "--samples_per_shard", "20",
               "--workers", "2", "--max_failure_rate", "1", "--out"]
    subprocess.run([*command, tmp_path / "whole"], cwd=ROOT, check=True, capture_output=True)
    moments, statuses = random.Random(0), []
    for i in range(kills):
        process = subprocess.Popen([*command, tmp_path / "out"], cwd=ROOT, start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        await_results(tmp_path / "out", int(pairs / 20 * (i + moments.random()) / kills), process)
        (os.kill if only_parent else os.killpg)(process.pid, signal.SIGKILL)
        statuses.append(process.wait())
    assert -signal.SIGKILL in statuses
    subprocess.run([*command, tmp_path / "out"], cwd=ROOT, check=True, capture_output=True)
    assert raw_data.hashes(tmp_path / "out") == raw_data.hashes(tmp_path / "whole")


@pytest.mark.parametrize("only_parent", [False, True])
def test_kill_9_and_rerun_gives_the_same_bytes(tmp_path, only_parent):
    kill_and_rerun(tmp_path, 200, 3, only_parent)


@pytest.mark.slow
@pytest.mark.parametrize("only_parent", [False, True])
def test_many_kills_and_reruns_give_the_same_bytes(tmp_path, only_parent):
    kill_and_rerun(tmp_path, 3000, 12, only_parent)


def test_workers_die_with_their_parent(tmp_path):
    source = raw_data.valid_pairs(tmp_path / "source", 600)
    process = subprocess.Popen([sys.executable, "-m", "shard_tools.pack", "--source", source, "--out", tmp_path / "out",
                                "--workers", "2"], cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    wait_for(lambda: list((tmp_path / "out").glob(".pack/*.npz")), "the workers' first results", by=[process])
    process.kill()
    process.wait()
    wait_for(lambda: not session_members(process.pid), "the workers' death")


def await_results(out: Path, count: int, process: subprocess.Popen) -> None:
    """Until packing has written so much, or has ended."""
    wait_for(lambda: process.poll() is not None or len(list(out.glob(".pack/*.npz"))) >= count, f"{count} results",
             pause=0.005)


def session_members(session: int) -> list[int]:
    """Processes of a session that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_unfinished_work_of_other_options_is_done_again(tmp_path, monkeypatch, capsys):
    source = raw_data.valid_pairs(tmp_path / "source", 24)
    with monkeypatch.context() as patch:
        patch.setattr("shard_tools.pack.write_index", lambda *args: (_ for _ in ()).throw(raw_data.Killed))
        with pytest.raises(raw_data.Killed):
            pack(str(source), str(tmp_path / "out"), samples_per_shard=3, workers=1)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 8
    pack(str(source), str(tmp_path / "out"), samples_per_shard=12, workers=1)
    assert "beginning again" in capsys.readouterr().out
    pack(str(source), str(tmp_path / "whole"), samples_per_shard=12, workers=1)
    assert raw_data.hashes(tmp_path / "out") == raw_data.hashes(tmp_path / "whole")


def test_a_file_that_changes_after_it_was_listed_stops_the_run_and_the_next_begins_again(tmp_path, monkeypatch):
    source = raw_data.valid_pairs(tmp_path / "source", 24)
    victim = next(source.glob("*/cover/train/*/*"))

    def meddle(*args):
        victim.write_bytes(victim.read_bytes()[:-2] + b"x\xff\xd9")
        return ((0, 60),)

    with monkeypatch.context() as patch:
        patch.setattr("shard_tools.shards.plan.choose_blocks", meddle)
        with pytest.raises(ValueError, match=r"changed while it was packed"):
            pack(str(source), str(tmp_path / "out"), workers=1)
    assert pack(str(source), str(tmp_path / "out"), workers=1) == 0


def test_every_file_is_opened_once(tmp_path, monkeypatch):
    source, opened, real = raw_data.valid_pairs(tmp_path / "source", 24), Counter(), os.open

    def counted(path, *args, **options):
        opened[str(path)] += 1
        return real(path, *args, **options)

    monkeypatch.setattr("shard_tools.shards.plan.choose_blocks", lambda *args: ((0, 60),))
    monkeypatch.setattr("shard_tools.shards.plan.guess_format", lambda *args: SampleFormat(32, False, 60))
    monkeypatch.setattr(os, "open", counted)
    pack(str(source), str(tmp_path / "out"), workers=1)
    assert [opened[str(path)] for path in source.rglob("*.*")] == [1] * 48


def test_shards_that_a_crash_of_the_machine_emptied_are_made_again(tmp_path, monkeypatch):
    source = raw_data.valid_pairs(tmp_path / "source", 24)
    options = {"samples_per_shard": 3, "workers": 1}
    pack(str(source), str(tmp_path / "whole"), **options)
    with monkeypatch.context() as patch:
        patch.setattr("shard_tools.shards.state.PackState.save", lambda *args: (_ for _ in ()).throw(raw_data.Killed))
        with pytest.raises(raw_data.Killed):
            pack(str(source), str(tmp_path / "out"), **options)
    shards, results = (sorted((tmp_path / "out/.pack").glob(kind)) for kind in ("*.tar", "*.npz"))
    shards[0].write_bytes(bytes(shards[0].stat().st_size))
    results[3].write_bytes(b"")
    results[5].write_bytes(results[5].read_bytes()[:-40])
    pack(str(source), str(tmp_path / "out"), **options)
    assert raw_data.hashes(tmp_path / "out") == raw_data.hashes(tmp_path / "whole")


def test_covers_unlike_the_first_are_packed_after_all_where_most_are_so(tmp_path, monkeypatch):
    source = raw_data.valid_pairs(tmp_path / "source", 12)
    pack(str(source), str(tmp_path / "whole"), workers=1)
    monkeypatch.setattr("shard_tools.shards.plan.guess_format", lambda *args: SampleFormat(64, False, 7))
    pack(str(source), str(tmp_path / "out"), workers=1)
    assert raw_data.hashes(tmp_path / "out") == raw_data.hashes(tmp_path / "whole")


@pytest.mark.parametrize("messy", [False, True], ids=["written", "repartitioned"])
@pytest.mark.parametrize("harm", ["flipped", "emptied", "swapped", "endless"])
def test_whatever_of_unfinished_work_is_damaged_is_made_again(tmp_path, monkeypatch, messy, harm):
    source = raw_data.valid_pairs(tmp_path / "source", 24)
    if messy:
        raw_data.messy_pairs(source)
    options = {"samples_per_shard": 7, "workers": 1, "max_failure_rate": 1.0}
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    pack(str(source), str(tmp_path / "whole"), **options)
    with monkeypatch.context() as patch:
        patch.setattr("shard_tools.pack.write_index", lambda *args: (_ for _ in ()).throw(raw_data.Killed))
        with pytest.raises(raw_data.Killed):
            pack(str(source), str(tmp_path / "half"), **options)
    files = sorted(path.relative_to(tmp_path / "half") for path in (tmp_path / "half").rglob("*")
                   if path.is_file() and path.stat().st_size)
    assert sum(path.suffix == ".npz" for path in files) > 3
    for number, path in enumerate(files):
        out = tmp_path / f"out{number}"
        shutil.copytree(tmp_path / "half", out)
        data, other = bytearray((out / path).read_bytes()), out / files[number - 1]
        data[len(data) // 2] ^= 8
        if harm == "endless":
            (out / path).unlink()
            (out / path).symlink_to("/dev/zero")
        else:
            (out / path).write_bytes({"flipped": data, "emptied": b"", "swapped": other.read_bytes()}[harm])
        if harm == "swapped":
            other.write_bytes((tmp_path / "half" / path).read_bytes())
        try:
            pack(str(source), str(out), **options)
        except SourceChangedError as error:
            assert "run the command again" in str(error)
            pack(str(source), str(out), **options)
        assert raw_data.hashes(out) == raw_data.hashes(tmp_path / "whole"), path
