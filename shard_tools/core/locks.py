"""Locks that processes of one or several machines hold on a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LOCK_PATIENCE = 60.0


def lock(folder: Path, patience: float = LOCK_PATIENCE) -> IO[str]:
    """Makes this process the only writer of a folder until it closes the file returned or ends, however it ends.

    Waits up to ``patience`` seconds, for a predecessor may still be saving.

    Raises:
        ValueError: another process keeps writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+")
    began, waiting = time.monotonic(), False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if not waiting:
                file.seek(0)
                print(f"waiting for process {file.read().strip() or '?'}, which writes in {folder}", flush=True)
                waiting = True
            if time.monotonic() - began > patience:
                file.seek(0)
                raise ValueError(f"{folder} is in use by process {file.read().strip() or '?'}; stop that one, "
                                 "or give this run another --name") from None
            time.sleep(0.5)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


@contextlib.contextmanager
def _alone(path: Path, url: str) -> Iterator[None]:
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is packing to {url}; wait for it, or choose another --out") from None
        yield


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keeps a second process from packing into the same folder.

    Raises:
        ValueError: one is at it.
    """
    handle = os.open(root, os.O_RDONLY)  # the folder itself: a lock file would have to be deleted under its lock
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"another process is writing into {root}; wait for it, or choose another --out") from None
    except OSError:
        pass  # a network file system without locks: go on, alone as nearly always
    try:
        yield
    finally:
        os.close(handle)
