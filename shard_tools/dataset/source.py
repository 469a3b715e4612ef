"""Lists and reads the files of raw data, in a folder or a zip; every read is bounded and checked.

Any process can read a member of a zip in place, knowing only its record.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from shard_tools.core.errors import BadFileError
from shard_tools.core.files import read_bounded

_UTF8 = 0x800  # the flag of a member whose name is UTF-8


class Entry(NamedTuple):
    """One file: path relative to the source, size (-1: unknown), and what else differs between versions of it.

    ``member`` is empty in a folder; in a zip it is (header offset, packed size, method, flags).
    """

    path: str
    size: int
    stamp: int
    member: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Folder:
    """A directory tree."""

    root: Path

    def list(self, folder: str) -> tuple[list[str], list[Entry]]:
        """The names of the folders, and the files (or what bears a file's name) of one folder, sorted; or OSError."""
        folders, files = [], []
        with os.scandir(self.root / folder) as found:
            for item in found:
                path = f"{folder}/{item.name}" if folder else item.name
                try:
                    info = item.stat()
                except OSError:  # a dangling link: reading it will name it
                    files.append(Entry(path, -1, 0))
                    continue
                if stat.S_ISDIR(info.st_mode):
                    folders.append(item.name)
                else:
                    files.append(Entry(path, info.st_size, info.st_mtime_ns))
        return sorted(folders), sorted(files)

    def names(self, folder: str) -> Iterator[str]:
        """The names of what is in a folder, in any order and at little cost; OSError as of ``list``."""
        with os.scandir(self.root / folder) as found:
            yield from (item.name for item in found)


@dataclass
class Zip:
    """A zip archive: ``{folder: {file name: record}}``; of members with the same path the last counts."""

    path: Path
    tree: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    folders: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self):
        self._add_folder("")
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()  # reads the directory to its end, whatever its count of 16 bits says
        except OSError:
            raise
        except Exception as error:  # the boundary to zipfile, which raises half a dozen kinds on damaged directories
            raise ValueError(f"{self.path} is not a folder, and not a whole .zip either ({error}); copy or download it "
                             "again") from None
        for info in members:
            name = info.orig_filename
            if not info.flag_bits & _UTF8:  # Linux zippers write UTF-8 without saying so; zipfile takes it for cp437
                with contextlib.suppress(UnicodeDecodeError):
                    name = name.encode("cp437").decode("utf-8")
            *steps, leaf = name.replace("\\", "/").split("/")  # only now: a byte of 0x5C may be half of a letter
            parent = "/".join(step for step in steps if step not in ("", "."))
            self._add_folder(parent)
            if leaf:
                self.tree.setdefault(parent, {})[leaf] = (info.file_size, info.CRC, info.header_offset,
                                                          info.compress_size, info.compress_type, info.flag_bits)

    def _add_folder(self, path: str) -> None:
        known = path in self.folders
        self.folders.setdefault(path, set())
        while path and not known:
            path, _, leaf = path.rpartition("/")
            known = path in self.folders
            self.folders.setdefault(path, set()).add(leaf)

    def list(self, folder: str) -> tuple[list[str], list[Entry]]:
        """As ``Folder.list``."""
        prefix = f"{folder}/" if folder else ""
        files = [Entry(prefix + name, size, crc, tuple(member))
                 for name, (size, crc, *member) in self.tree.get(folder, {}).items()]
        return sorted(self.folders.get(folder, ())), sorted(files)

    def names(self, folder: str) -> Iterator[str]:
        """As ``Folder.names``."""
        yield from self.tree.get(folder, ())


def open_source(path: str | Path) -> Folder | Zip:
    """Opens a folder or a zip for listing; ValueError where it is neither, or the zip's directory is damaged."""
    path = Path(path)
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise ValueError(f"--source {path} does not exist; expected a folder or a .zip")
    if not path.is_file():
        raise ValueError(f"--source {path} is neither a folder nor a .zip")
    return Zip(path)


def read_entry(source: Path, entry: Entry, limit: int) -> bytes:
    """The bytes of one file of a source, never more than ``limit``, never from anything but a regular file.

    Else BadFileError: ``unreadable``, ``empty file`` or ``too many bytes``.
    """
    if entry.size > limit:
        raise BadFileError("too many bytes", f"{entry.size:,} bytes, the limit is {limit:,}")
    try:
        if entry.member:
            data = _read_member(source, entry, limit)
        else:
            data = _read_known(source, entry) or read_bounded(source / entry.path, limit)
    except (OSError, ValueError, zlib.error, struct.error, OverflowError) as error:
        if isinstance(error, BadFileError):
            raise
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadFileError("unreadable", text) from None
    if not data:
        raise BadFileError("empty file", "0 bytes")
    return data


def read_path(path: Path, limit: int) -> bytes:
    """As ``read_entry``, of a file that was not listed."""
    return read_entry(path.parent, Entry(path.name, -1, 0), limit)


def _read_known(source: Path, entry: Entry) -> bytes:
    """The bytes of a file that was listed with a size, at the least cost; b"" where it is not of that size any more."""
    if entry.size <= 0:
        return b""
    # Only regular files have sizes; should a FIFO be there by now, opening it doesn't wait.
    handle = os.open(f"{source}/{entry.path}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        data = os.read(handle, entry.size + 1)
    finally:
        os.close(handle)
    return data if len(data) == entry.size else b""


def _read_member(archive: Path, entry: Entry, limit: int) -> bytes:
    offset, packed, method, flags = entry.member
    if flags & 1:
        raise ValueError("encrypted zip member")
    if method not in (0, 8):
        raise ValueError(f"zip compression method {method}; only stored and deflated members can be read")
    if packed > limit + 65536:  # deflate grows what it can't shrink by a few bytes a block only
        raise BadFileError("too many bytes", f"{packed:,} packed bytes, the limit is {limit:,}")
    with open(archive, "rb") as file:
        file.seek(offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise ValueError("damaged zip: no member where its directory says")
        file.seek(sum(struct.unpack_from("<HH", header, 26)), os.SEEK_CUR)
        data = file.read(packed)
    if len(data) != packed:
        raise ValueError("truncated zip member")
    if method == 8:
        data = zlib.decompressobj(-15).decompress(data, entry.size + 1)
    if len(data) != entry.size or zlib.crc32(data) != entry.stamp:
        raise ValueError("zip member does not have the size and checksum that its directory says")
    return data


def read_sidecar(source: Folder | Zip, folder: str, name: str, limit: int) -> bytes | None:
    """The bytes of a file of a source's folder, None where it is not; ValueError where it can't be read."""
    if name not in source.names(folder):  # which is quicker than to list all the files of a large folder
        return None
    entry = next((entry for entry in source.list(folder)[1] if entry.name == name), None)
    if entry is None:
        return None
    try:
        return read_entry(source.path if isinstance(source, Zip) else source.root, entry, limit)
    except BadFileError as error:
        raise ValueError(f"{entry.path} of --source can't be read ({error})") from None


def upwards(folder: str, top: str = "") -> Iterator[str]:
    """A folder of a source and those that it lies in, up to the top."""
    yield folder
    while folder not in ("", top):
        folder = folder.rpartition("/")[0]
        yield folder
