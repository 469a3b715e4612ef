"""Files that are whole or absent, hashes and bounded reads."""

from __future__ import annotations

import errno
import filecmp
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from shard_tools.core.errors import BadFileError

GROUPS_BYTES = 2**30  # of a table of samples or groups; a line is 60 bytes or so
METADATA_BYTES = 2**27  # most bytes of a JSON that are read; 100,000 shards have 20 million


def hash64(data: bytes) -> int:
    """The first 64 bits of SHA-256, little endian."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a regular file; OSError as of ``open_regular``."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: str | Path, buffering: int = -1) -> BinaryIO:
    """Opens a regular file for reading; OSError for a FIFO, which would be waited for, or a device."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(path, "rb", buffering=buffering)


def read_bounded(path: str | Path, limit: int = METADATA_BYTES) -> bytes:
    """The bytes of a regular file; OSError as ``open_regular``, BadFileError for ``too many bytes``."""
    with open_regular(path, buffering=0) as file:
        parts, left = [], limit + 1
        while left and (part := file.read(min(left, max(os.fstat(file.fileno()).st_size, 2**16)))):
            parts.append(part)
            left -= len(part)
    if not left:
        raise BadFileError("too many bytes", f"more than {limit:,} bytes")
    return b"".join(parts)


def sync(path: Path) -> None:
    """Returns when what was written to a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name to write a file under; synced and renamed to ``path`` when that went well, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file by ``atomic_path``: it is whole or absent."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


Way = Literal["hard", "soft", "copy"]
WAYS: tuple[Way, ...] = ("hard", "soft", "copy")
TEMPORARY = ".link.tmp"


def place_link(source: Path, target: Path, way: Way) -> Way:
    """Makes ``target`` the same file as ``source``, and returns how: as asked, or the next of ``WAYS`` that the disks
    allow. What lies there is replaced, unless it is right already; OSError where not even a copy can be made."""
    source = source.resolve()  # links go to the file itself, not to a link to it
    if target.exists():
        is_same, is_link = target.samefile(source), target.is_symlink()
        if is_same and way != "copy":
            return "soft" if is_link else "hard"
        if way == "copy" and not is_same and not is_link and filecmp.cmp(source, target, shallow=False):
            return "copy"
    temporary = target.with_name(TEMPORARY)
    for attempt in WAYS[WAYS.index(way):]:
        temporary.unlink(missing_ok=True)
        try:
            {"hard": os.link, "soft": os.symlink, "copy": shutil.copyfile}[attempt](source, temporary)
        except OSError:
            if attempt == "copy":
                raise
        else:
            os.replace(temporary, target)
            return attempt
    raise AssertionError("a copy is made, or raises")


def place_bytes(data: bytes, target: Path) -> None:
    """Makes ``target`` a file of these bytes, unless it is one."""
    if target.is_file() and not target.is_symlink() and target.read_bytes() == data:
        return
    write_atomically(target, data)
