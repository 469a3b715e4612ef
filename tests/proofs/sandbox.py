"""A command under watch: words in; its status, output, time, memory, and what it wrote or ran that it must not, out.

It runs in a process of its own, forked from one that has the libraries (``warm``), without a network where the kernel
lets us, with bounds on time and on the size of files.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import resource
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support import warm

# Seconds of computing, and without any; bytes of memory above the beginning, and of one written file.
SECONDS, STILL, MEMORY, FILE = 60.0, 30.0, 10**9, 2**32
_CREATES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# events of the interpreter: the places of the path that is changed, and of the folder (a handle) that it is below
_CHANGES = {"os.mkdir": (0, 2), "os.remove": (0, 1), "os.rmdir": (0, 1), "os.rename": (1, 3), "os.symlink": (1, 2),
            "os.link": (1, 3), "os.truncate": (0, None), "os.chmod": (0, 2)}
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.spawn")
_NETWORK = 0x40000000  # CLONE_NEWNET


class Outcome(NamedTuple):
    """status None: it had to be stopped; seconds: of computing; memory: bytes above the beginning, at most; strays:
    what it must not do."""

    status: int | None
    said: str
    seconds: float
    memory: int
    strays: list[str]


def watched(module: str, flags: Sequence[str], folder: Path, env: Mapping[str, str], allowed: Sequence[Path],
            seconds: float = SECONDS) -> Outcome:
    """Runs ``python -m module flags`` in ``folder``; ``allowed`` are the folders that it may write to."""
    with tempfile.NamedTemporaryFile(prefix="said-") as said, tempfile.NamedTemporaryFile(prefix="strays-") as strays:
        process = warm._context.Process(target=_be, args=(module, list(flags), str(folder), dict(env), said.name,
                                                          strays.name, [str(path) for path in allowed]))
        process.start()  # returns when the server, which first imports the libraries, has forked it
        began = time.monotonic()
        first, most, status, used, moved = None, 0, None, 0.0, began
        while True:
            process.join(0.01 if time.monotonic() - began < 1 else 0.03)
            if process.exitcode is not None:
                status = process.exitcode
                break
            now = _resident(process.pid)
            first = now if first is None and now else first
            most = max(most, now - (first or now))
            if (busy := _busy(process.pid)) > used + 0.01:
                used, moved = busy, time.monotonic()
            if used > seconds or time.monotonic() - moved > min(STILL, seconds) or most > 1.5 * MEMORY:
                break
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started goes with it
        process.join()
        return Outcome(status, Path(said.name).read_text(errors="replace"), used, most,
                       sorted(set(Path(strays.name).read_text(errors="replace").splitlines())))


def _busy(pid: int) -> float:
    """Seconds of computing of a process, which a busy machine does not lengthen."""
    try:
        parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _be(module: str, flags: list[str], folder: str, env: dict[str, str], said: str, strays: str,
        allowed: list[str]) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS) + 5, int(SECONDS) + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).unshare(_NETWORK)
    file = os.open(strays, os.O_WRONLY | os.O_APPEND)
    allowed = [*map(os.path.realpath, allowed), "/dev/null", "/dev/shm", "/proc/self", "/dev/tty", said]

    def stray(words: str) -> None:
        os.write(file, (words.replace("\n", " ")[:500] + "\n").encode("utf-8", "replace"))

    def look(event: str, args: tuple) -> None:
        below = ""
        if event == "open":
            path, _, mode = args
            if not isinstance(mode, int) or not mode & _CREATES:
                return
        elif event in _CHANGES:
            place, handle = _CHANGES[event]
            path = args[place]
            below = f"/proc/self/fd/{args[handle]}" if handle is not None and args[handle] >= 0 else ""
        elif event in _RUNS:
            stray(f"ran {args!r}")
            return
        else:
            return
        if isinstance(path, int):
            return
        parent, name = os.path.split(os.path.join(below, os.fsdecode(path)))
        where = os.path.join(os.path.realpath(parent), name)
        where = os.path.realpath(where) if event == "open" else where
        if not any(where == one or where.startswith(one + "/") for one in allowed):
            stray(f"{event} {where}")

    tempfile.tempdir = None  # the server's own is remembered otherwise
    sys.addaudithook(look)
    warm._be(module, flags, folder, env, said)


def snapshot(root: Path) -> dict[str, tuple]:
    """Every path below ``root``: what it is, its size and time, and a hash of a file's bytes."""
    found: dict[str, tuple] = {}
    stack = [str(root)]
    while stack:
        with os.scandir(stack.pop()) as items:
            for item in items:
                metadata = item.stat(follow_symlinks=False)
                digest = ""
                if stat.S_ISDIR(metadata.st_mode):
                    stack.append(item.path)
                    found[item.path] = ("folder",)
                    continue
                if stat.S_ISREG(metadata.st_mode) and metadata.st_size < 2**28:
                    with open(item.path, "rb") as file:
                        digest = hashlib.file_digest(file, "blake2b").hexdigest()
                found[item.path] = (stat.S_IFMT(metadata.st_mode), metadata.st_size, metadata.st_mtime_ns, digest)
    return found
