"""Where raw data lies: a folder or a zip in; its folders and files out, and the bytes of one file, bounded and checked.

A zip is read in place: its directory is streamed once into compact records, and any process can then read a member
knowing only the record, so no process holds a list of the whole archive but the one that lists it.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shard_tools.core.errors import BadFileError

_CENTRAL = struct.Struct("<4s4B4H3L5H2L")  # one entry of a zip's central directory, without its name
_RECORD = struct.Struct("<QQQLHH")  # what we keep of it: header offset, packed size, size, crc, method, flags


class Entry(NamedTuple):
    """One file: path relative to the source, size (-1: unknown), and what else tells one version of it from another.

    ``place`` is empty in a folder; in a zip it is (header offset, packed size, method, flags).
    """

    path: str
    size: int
    stamp: int
    place: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Folder:
    """A directory tree."""

    root: Path

    def list(self, folder: str) -> tuple[list[str], list[Entry]]:
        """The names of the folders, and the files (or what bears a file's name) of one folder, sorted.

        Raises:
            OSError: the folder can't be listed.
        """
        folders, files = [], []
        with os.scandir(self.root / folder) as found:
            for item in found:
                path = f"{folder}/{item.name}" if folder else item.name
                try:
                    info = item.stat()
                except OSError:  # a dangling link: kept, so that reading it names it
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
    """A zip archive: ``{folder: [packed record + file name]}``, so that 100,000 members cost 15 MB and not 150."""

    path: Path
    tree: dict[str, list[bytes]] = field(default_factory=dict)
    folders: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self):
        for name, record in _read_directory(self.path):
            parent, _, leaf = name.rpartition("/")
            self._add_folder(parent)
            if leaf:
                self.tree.setdefault(parent, []).append(record + leaf.encode("utf-8", "surrogateescape"))

    def _add_folder(self, path: str) -> None:
        while path not in self.folders:
            self.folders[path] = set()
            if not path:
                return
            parent, _, leaf = path.rpartition("/")
            self._add_folder(parent)
            self.folders[parent].add(leaf)

    def list(self, folder: str) -> tuple[list[str], list[Entry]]:
        """As ``Folder.list``."""
        prefix = f"{folder}/" if folder else ""
        files = []
        for record in self.tree.get(folder, ()):
            offset, packed, size, crc, method, flags = _RECORD.unpack_from(record)
            name = record[_RECORD.size:].decode("utf-8", "surrogateescape")
            files.append(Entry(prefix + name, size, crc, (offset, packed, method, flags)))
        return sorted(self.folders.get(folder, ())), sorted(files)


    def names(self, folder: str) -> Iterator[str]:
        """As ``Folder.names``."""
        yield from (record[_RECORD.size:].decode("utf-8", "surrogateescape") for record in self.tree.get(folder, ()))


def open_source(path: str | Path) -> Folder | Zip:
    """Opens a folder or a zip for listing.

    Raises:
        ValueError: neither, or a zip whose directory is damaged.
    """
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

    Raises:
        BadFileError: ``unreadable``, ``empty file`` or ``too many bytes``.
    """
    if entry.size > limit:
        raise BadFileError("too many bytes", f"{entry.size:,} bytes, the limit is {limit:,}")
    try:
        if entry.place:
            data = _read_member(source, entry, limit)
        else:
            data = _read_known(source, entry) or _read_file(source / entry.path, limit)
    except (OSError, ValueError, zlib.error, struct.error, OverflowError) as error:
        if isinstance(error, BadFileError):
            raise
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadFileError("unreadable", text) from None
    if not data:
        raise BadFileError("empty file", "0 bytes")
    return data


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


def _read_file(path: Path, limit: int) -> bytes:
    # Looked at before it is opened: opening a FIFO would wait for ever, and a device may do anything.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise BadFileError("unreadable", "not a regular file")
    with open(path, "rb", buffering=0) as file:
        data = file.read(limit + 1)
        while len(data) <= limit and (more := file.read(limit + 1 - len(data))):
            data += more
    if len(data) > limit:
        raise BadFileError("too many bytes", f"more than {limit:,} bytes")
    return data


def _read_member(archive: Path, entry: Entry, limit: int) -> bytes:
    offset, packed, method, flags = entry.place
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


def _read_directory(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (name, packed record) of every entry of a zip, streaming its central directory."""
    with open(path, "rb") as file:
        start, count, shift = _find_directory(file, path)
        file.seek(start)
        for _ in range(count):
            head = file.read(_CENTRAL.size)
            if len(head) < _CENTRAL.size or head[:4] != b"PK\1\2":
                raise ValueError(f"{path} is a damaged zip: its directory is cut short; copy or download it again")
            parts = _CENTRAL.unpack(head)
            flags, method = parts[5], parts[6]
            crc, packed, size, name_bytes, extra_bytes, comment_bytes = parts[9:15]
            offset = parts[18]
            name = file.read(name_bytes)
            extra = file.read(extra_bytes)
            file.seek(comment_bytes, os.SEEK_CUR)
            size, packed, offset = _widen(extra, size, packed, offset)
            if max(size, packed, offset) >= 2**62:
                raise ValueError(f"{path} is a damaged zip: a member beyond any disk; copy or download it again")
            text = name.decode("utf-8", "surrogateescape") if flags & 0x800 else _legacy_name(name)
            *folders, leaf = text.replace("\\", "/").split("/")
            text = "/".join([*(part for part in folders if part not in ("", ".")), leaf])
            yield text, _RECORD.pack(offset + shift, packed, size, crc, method, flags)


def _legacy_name(name: bytes) -> str:
    # Linux zippers write UTF-8 without saying so; cp437 is what the format means, and always decodes.
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.decode("cp437")


def _widen(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """The real 64-bit values of fields that hold 0xFFFFFFFF."""
    values, at = [size, packed, offset], 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = extra[at + 4:at + 4 + length]
            for i, value in enumerate(values):
                if value == 0xFFFFFFFF and len(wide) >= 8:
                    values[i], wide = struct.unpack_from("<Q", wide)[0], wide[8:]
        at += 4 + length
    return values[0], values[1], values[2]


def _find_directory(file: BinaryIO, path: Path) -> tuple[int, int, int]:
    """(position of the central directory, number of entries, bytes put in front of the zip)."""
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - 65557))
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < 22:
        raise ValueError(f"{path} is not a folder, and not a whole .zip either; copy or download it again")
    end = length - len(tail) + at
    count, size, start = struct.unpack_from("<HLL", tail, at + 10)
    if end >= 20:
        file.seek(end - 20)
        locator = file.read(20)
        if locator[:4] == b"PK\6\7":
            file.seek(min(struct.unpack_from("<Q", locator, 8)[0], length))
            wide = file.read(56)
            if wide[:4] != b"PK\6\6" or len(wide) < 56 or (found := struct.unpack_from("<QQQ", wide, 32))[2] > length:
                raise ValueError(f"{path} is a damaged zip (zip64 end record); copy or download it again")
            count, size, start = found
            return start, count, 0
    shift = end - size - start
    if shift < 0:
        raise ValueError(f"{path} is a damaged zip: its directory does not fit; copy or download it again")
    return start + shift, count, shift


def read_sidecar(source: Folder | Zip, folder: str, name: str, limit: int) -> bytes | None:
    """The bytes of a file of a source's folder, None where it is not.

    Raises:
        ValueError: it can't be read, or is larger than the limit.
    """
    if name not in source.names(folder):  # which is quicker than to list all the files of a large folder
        return None
    entry = next((entry for entry in source.list(folder)[1] if entry.name == name), None)
    if entry is None:
        return None
    try:
        return read_entry(source.path if isinstance(source, Zip) else source.root, entry, limit)
    except BadFileError as error:
        raise ValueError(f"{entry.path} of --source can't be read ({error})") from None
