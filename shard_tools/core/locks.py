"""Locks among processes of one or several machines: each ends with the process that holds it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_PATIENCE, POLL = 60.0, 0.02
OUTPUT_LOCK = ".lock"


@contextlib.contextmanager
def lock(path: Path, what: str = "", remedy: str = "", patience: float = -1) -> Iterator[None]:
    """Holds a lock file, alone among processes and threads. Where there can be no locks, goes on without.

    ``what`` it protects ("" = nobody asks who holds it) and a ``remedy`` are for the ValueError where another process
    still holds it after ``patience`` seconds (-1 = waits as long as it takes).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(path, thread_local=False)
    try:
        if what and patience > 0:
            with contextlib.suppress(Timeout):
                held.acquire(timeout=0)
            if not held.is_locked:
                print(f"waiting for process {_holder(path)}, which writes in {what}", flush=True)
        if not held.is_locked:
            held.acquire(timeout=patience, poll_interval=POLL)
        if what and _holder(path) != str(os.getpid()):  # a lock that filelock emulates has it already
            path.write_text(str(os.getpid()))
    except Timeout:
        raise ValueError(f"{what} is in use by process {_holder(path)}; {remedy}") from None
    except OSError:
        pass  # a network file system without locks: alone as nearly always; or nothing can be written here at all
    try:
        yield
    finally:
        held.release()


def lock_folder(folder: Path, patience: float = LOCK_PATIENCE) -> contextlib.AbstractContextManager[None]:
    """Makes this process the only writer of a run's folder, else ValueError; a predecessor may still be saving."""
    return lock(folder / ".lock", str(folder), "stop that one, or give this run another --name", patience)


@contextlib.contextmanager
def lock_output(root: Path) -> Iterator[None]:
    """Keeps a second process from writing into the same ``--out`` (ValueError there), by a lock file of that time."""
    path = root / OUTPUT_LOCK
    with lock(path, str(root), "wait for it, or choose another --out", patience=0):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # under the lock: who waits for a lock file that is gone makes a new one


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError, IndexError):
        return path.read_text().split()[0]
    return "?"
