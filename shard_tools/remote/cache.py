"""Copies of files from elsewhere, on this machine: a file's name, size and hash in; the opened copy of it out.

All processes of a machine share a cache without talking to each other. A copy's name is its hash. Who downloads holds
an exclusive lock on the unfinished file, whose full size is set aside beforehand, so that the folder never grows beyond
its bound; who reads holds a shared lock on the copy; and what nobody holds goes when room is needed, the least recently
used first. Locks end with their process, so a killed one leaves nothing that has to be cleaned up by hand.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from platformdirs import user_cache_path

from shard_tools.core.files import file_sha256, write_atomically
from shard_tools.remote.filesystem import Remote
from shard_tools.shards.index import SHARD_NAME

GIGABYTE = 10**9
DEFAULT_GB = 50.0
SHARDS, INDEXES, BOUND = "shards", "indexes", "bound"
WHOLE, PART = ".tar", ".part"
POLL = 0.05  # seconds between looks at a lock or for room


@dataclass(frozen=True)
class Stored:
    """A file elsewhere: its name there, size in bytes and SHA-256."""

    name: str
    bytes: int
    sha256: str


def stored_shard(shard: dict[str, Any], url: str) -> Stored:
    """A shard as an index names it; ValueError for what no index of ours says, for it becomes the name of a file."""
    name, size, sha256 = (shard.get(key) for key in ("name", "bytes", "sha256"))
    if not (SHARD_NAME.fullmatch(str(name)) and isinstance(size, int) and 0 < size < 2**50
            and re.fullmatch("[0-9a-f]{64}", str(sha256))):
        raise ValueError(f"{url}: its index names a shard {str(name)[:80]!r} of {str(size)[:20]} bytes with SHA-256 "
                         f"{str(sha256)[:70]!r}, which packing does not write; pack again")
    return Stored(name, size, sha256)


class BusyError(Exception):
    """Not now: another process downloads it, or there is no room for it."""


class FullError(BusyError):
    """There is no room: what lies in the cache is in use or spared."""


class Cache:
    """A bounded folder of copies.

    Args:
        folder: shared by all processes of a machine; default: in the user's cache folder.
        gigabytes: its bound, from now on and for all who use the folder; None = as it was set before.
    """

    def __init__(self, folder: str | Path | None = None, gigabytes: float | None = None) -> None:
        self.folder = Path(folder).expanduser().absolute() if folder else user_cache_path("covergen") / "shards"
        self.shards = self.folder / SHARDS
        self.shards.mkdir(parents=True, exist_ok=True)
        if gigabytes is not None and int(gigabytes * GIGABYTE) != self.bound():
            with locked(self.folder / ".lock"):
                write_atomically(self.folder / BOUND, str(int(gigabytes * GIGABYTE)).encode())
        self._sound: set[str] = set()  # copies that this process has seen whole

    def bound(self) -> int:
        """Bytes that the folder may hold."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / BOUND).read_text())
        return int(DEFAULT_GB * GIGABYTE)

    def used(self) -> int:
        """Bytes that it holds, with what is set aside."""
        return sum(_size(entry) for part in (self.shards, self.folder / INDEXES) for entry in _files(part))

    def used_by_indexes(self) -> int:
        """Bytes of them that are indexes, which nothing pushes out."""
        return sum(map(_size, _files(self.folder / INDEXES)))

    def open(self, remote: Remote, stored: Stored, *, spare: Callable[[], Collection[str]] = tuple,
             wait: bool = True) -> BinaryIO:
        """The copy, opened, downloaded first where need be; it stays in the cache for as long as it is open.

        Args:
            remote: where the file is.
            stored: which.
            spare: gives the hashes of copies that must not go for it.
            wait: for another process that downloads it.

        Raises:
            BusyError: another process downloads it and ``wait`` is false; FullError: there is no room.
            ValueError, OSError: it can't be had, see ``Remote.fetch``.
        """
        whole = self._place(stored)
        while True:
            if file := self.copy(stored):
                return file
            part = open(whole.with_suffix(PART), "a+b")
            try:
                try:
                    fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not wait:
                        raise BusyError(stored.name) from None
                    time.sleep(POLL)  # not in the lock: what is waited for becomes the copy, which readers hold
                    continue
                if not _is(part, whole.with_suffix(PART)):  # somebody was faster
                    continue
                if whole.exists():
                    os.unlink(part.name)
                    continue
                try:
                    self.set_aside(part, stored.bytes, spare)
                    with open(part.name, "r+b") as file:
                        remote.fetch(stored.name, stored.bytes, stored.sha256, file)
                    with locked(self.folder / ".lock"):  # whoever counts sees it once
                        os.replace(part.name, whole)
                except BaseException:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(part.name)
                    raise
                self._sound.add(stored.sha256)
            finally:
                part.close()

    def _place(self, stored: Stored) -> Path:
        return self.shards / f"{stored.sha256}{WHOLE}"

    def copy(self, stored: Stored) -> BinaryIO | None:
        """The opened copy under a shared lock; None where there is no sound one, and a damaged one is removed."""
        whole = self._place(stored)
        try:
            file = open(whole, "rb", buffering=0)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if not _is(file, whole):  # removed before it was locked
            file.close()
            return None
        sound = os.fstat(file.fileno()).st_size == stored.bytes
        if sound and stored.sha256 not in self._sound:
            sound = file_sha256(whole) == stored.sha256
        if not sound:
            with contextlib.suppress(FileNotFoundError):
                whole.unlink()
            file.close()
            return None
        self._sound.add(stored.sha256)
        os.utime(file.fileno())
        return file

    def set_aside(self, part: BinaryIO, size: int, spare: Callable[[], Collection[str]] = tuple) -> None:
        """Makes room for a file, and takes it at once by the file's own length."""
        with locked(self.folder / ".lock"):
            missing = self.used() - os.fstat(part.fileno()).st_size + size - self.bound()
            if missing > 0:
                held = {f"{name}{ending}" for name in spare() for ending in (WHOLE, PART)}
                idle = [entry for entry in _files(self.shards) if entry.name not in held]
                for entry in sorted(idle, key=_last_used):
                    if entry.path != part.name:
                        missing -= _drop(entry)
                    if missing <= 0:
                        break
            if missing > 0:
                raise FullError(f"{self.folder} holds {self.used() / GIGABYTE:.3g} GB of {self.bound() / GIGABYTE:.3g}")
            os.ftruncate(part.fileno(), 0)
            os.ftruncate(part.fileno(), size)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """This process, and this thread of it, alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def wait_a_little(since: float, patience: float, why: object) -> None:
    """Sleeps for a moment; ValueError when ``patience`` seconds have passed since."""
    if time.monotonic() - since > patience:
        raise ValueError(f"{why}, all of it in use for {patience:.0f} s; give a larger --shard_cache_gb, or another "
                         "--shard_cache_dir than the other processes")
    time.sleep(POLL)


def _files(folder: Path) -> Iterator[os.DirEntry]:
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path))
            else:
                yield entry


def _size(entry: os.DirEntry) -> int:
    with contextlib.suppress(FileNotFoundError):
        return os.stat(entry.path).st_size
    return 0


def _last_used(entry: os.DirEntry) -> int:
    with contextlib.suppress(FileNotFoundError):
        return os.stat(entry.path).st_mtime_ns
    return 0


def _drop(entry: os.DirEntry) -> int:
    """Removes a file that nobody holds; the bytes that this gave."""
    try:
        with open(entry.path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is(file, Path(entry.path)):
                return 0
            os.unlink(entry.path)
            return os.fstat(file.fileno()).st_size
    except (FileNotFoundError, BlockingIOError):
        return 0


def _is(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
