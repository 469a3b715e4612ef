"""Locks: one holder, who is named; they end with their process, and need no file system that knows them."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from shard_tools.core.locks import OUTPUT_LOCK, lock, lock_folder, lock_output

HOLD = "import sys, time, pathlib\nfrom shard_tools.core.locks import *\nwith {0}(pathlib.Path(sys.argv[1])):\n" \
       "    print('held', flush=True)\n    time.sleep(60)"


@pytest.mark.parametrize("kind", [lock_output, lock_folder])
def test_who_holds_a_lock_is_named_and_its_death_gives_it_free(kind, tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD.format(kind.__name__), str(tmp_path)],
                          stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        more = {"patience": 0.1} if kind is lock_folder else {}
        with pytest.raises(ValueError, match=f"{tmp_path} is in use by process {holder.pid}; "), kind(tmp_path, **more):
            pass
        holder.kill()
    with kind(tmp_path):
        assert (tmp_path / OUTPUT_LOCK).exists()
    assert (tmp_path / OUTPUT_LOCK).exists() == (kind is lock_folder)


def test_a_folder_that_cannot_be_written_to_needs_no_lock(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("os.open", refuse)
    with lock_output(tmp_path):
        pass


def test_without_locks_of_the_file_system_work_goes_on(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    for kind in (lock_output, lock_folder):
        with kind(tmp_path):
            pass
    with lock(tmp_path / "other"):
        pass
