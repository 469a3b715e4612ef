"""A bounded folder of this machine with copies of files behind URLs.

A copy's name is its hash. Who downloads holds an exclusive lock on the unfinished file, whose full size is reserved
beforehand, so that the folder never grows beyond its bound; who reads holds a shared lock on the copy; and copies that
nobody holds go when space is needed, the least recently used first. Locks end with their process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from platformdirs import user_cache_path

from shard_tools.core.files import file_sha256, write_atomically
from shard_tools.core.locks import lock
from shard_tools.remote.filesystem import Remote
from shard_tools.shards.index import SHARD_NAME

GIGABYTE = 10**9
DEFAULT_GB = 50.0
SHARDS, INDEXES, BOUND = "shards", "indexes", "bound"  # names in the folder
COPY, PART = ".tar", ".part"
POLL = 0.05  # seconds between looks at what another process downloads


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL: its name there, size in bytes and SHA-256."""

    name: str
    bytes: int
    sha256: str


def shard_file(shard: dict[str, Any], url: str) -> RemoteFile:
    """A shard as an index names it; ValueError for what no index of ours says, for it becomes the name of a file."""
    name, size, sha256 = (shard.get(key) for key in ("name", "bytes", "sha256"))
    if not (SHARD_NAME.fullmatch(str(name)) and isinstance(size, int) and 0 < size < 2**50
            and re.fullmatch("[0-9a-f]{64}", str(sha256))):
        raise ValueError(f"{url}: its index names a shard {str(name)[:80]!r} of {str(size)[:20]} bytes with SHA-256 "
                         f"{str(sha256)[:70]!r}, which packing does not write; pack again")
    return RemoteFile(name, size, sha256)


class BusyError(Exception):
    """Not now: another process downloads it, or there is no space for it."""


class FullError(BusyError):
    """There is no space: what lies in the cache is in use or protected."""


class Cache:
    """A bounded folder of copies, shared by all processes of a machine."""

    def __init__(self, folder: str | Path | None = None, gigabytes: float | None = None) -> None:
        """Without a folder it is in the user's cache folder; a bound holds from now on and for all who use it."""
        self.folder = Path(folder).expanduser().absolute() if folder else user_cache_path("covergen") / "shards"
        self.shards = self.folder / SHARDS
        self.shards.mkdir(parents=True, exist_ok=True)
        if gigabytes is not None and int(gigabytes * GIGABYTE) != self.bound():
            with lock(self.folder / ".lock"):
                write_atomically(self.folder / BOUND, str(int(gigabytes * GIGABYTE)).encode())
        self._verified: set[str] = set()  # hashes of copies that this process has checked

    def bound(self) -> int:
        """Bytes that the folder may hold."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / BOUND).read_text())
        return int(DEFAULT_GB * GIGABYTE)

    def used(self, *folders: str) -> int:
        """Bytes that it holds, with what is reserved, in all or some of its folders; no index is ever pushed out."""
        return sum(info.st_size for folder in folders or (SHARDS, INDEXES)
                   for info in _files(self.folder / folder).values())

    def open(self, remote: Remote, wanted: RemoteFile, *, protected: Callable[[], Collection[str]] = tuple,
             wait: bool = True) -> BinaryIO:
        """The copy, opened, downloaded first where need be; it stays in the cache for as long as it is open.

        No copy whose hash is ``protected`` goes for it. BusyError where another process downloads it and ``wait`` is
        false, FullError where there is no space; else see ``Remote.fetch``.
        """
        copy = self._path(wanted)
        path = copy.with_suffix(PART)
        while True:
            if file := self.open_copy(wanted):
                return file
            with open(path, "a+b") as part:
                try:
                    fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not wait:
                        raise BusyError(wanted.name) from None
                    time.sleep(POLL)  # not in the lock: what is waited for becomes the copy, which readers lock
                    continue
                if not _is(part, path):  # somebody was faster
                    continue
                if copy.exists():
                    path.unlink()
                    continue
                try:
                    self.reserve(part, wanted.bytes, protected)
                    with open(path, "r+b") as file:
                        remote.fetch(wanted.name, wanted.bytes, wanted.sha256, file)
                    with lock(self.folder / ".lock"):  # whoever counts counts it once
                        os.replace(path, copy)
                except BaseException:
                    path.unlink(missing_ok=True)
                    raise
                self._verified.add(wanted.sha256)

    def _path(self, wanted: RemoteFile) -> Path:
        return self.shards / f"{wanted.sha256}{COPY}"

    def open_copy(self, wanted: RemoteFile) -> BinaryIO | None:
        """The opened copy under a shared lock; None where there is no valid one, and a damaged one is removed."""
        path = self._path(wanted)
        try:
            file = open(path, "rb", buffering=0)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is(file, path):  # else it was removed before it was locked
            valid = os.fstat(file.fileno()).st_size == wanted.bytes
            if valid and (wanted.sha256 in self._verified or file_sha256(path) == wanted.sha256):
                self._verified.add(wanted.sha256)
                os.utime(file.fileno())
                return file
            path.unlink(missing_ok=True)
        file.close()
        return None

    def reserve(self, part: BinaryIO, size: int, protected: Callable[[], Collection[str]] = tuple) -> None:
        """Makes space for a file, and takes it at once by its own length; FullError if too little may go."""
        with lock(self.folder / ".lock"):
            missing = self.used() - os.fstat(part.fileno()).st_size + size - self.bound()
            if missing > 0:
                stay, files = {*protected(), Path(part.name).stem}, _files(self.shards)
                for path in sorted(files, key=lambda path: files[path].st_mtime_ns):
                    if missing > 0 and path.stem not in stay:
                        missing -= _remove_idle(path)
            if missing > 0:
                raise FullError(f"{self.folder} holds {self.used() / GIGABYTE:.3g} GB of {self.bound() / GIGABYTE:.3g}")
            os.ftruncate(part.fileno(), 0)
            os.ftruncate(part.fileno(), size)


def _files(folder: Path) -> dict[Path, os.stat_result]:
    """The files in and below a folder, which others may remove meanwhile."""
    found = {}
    for top, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found[Path(top, name)] = os.stat(os.path.join(top, name))
    return found


def _remove_idle(path: Path) -> int:
    """Removes a file that nobody holds; the bytes that this gave."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError), open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is(file, path):
            os.unlink(path)
            return os.fstat(file.fileno()).st_size
    return 0


def _is(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False
