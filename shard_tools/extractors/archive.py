"""Dump archives of JSON: a ``.tar``, ``.tar.gz``, ``.tar.bz2`` or ``.tar.zst`` in; its files out, as a stream.

Nothing is unpacked and nothing kept: memory does not grow with the archive. Whoever made it is not trusted: names are
checked, sizes and headers capped, links and devices passed over, and an end that is missing is noticed.
"""

from __future__ import annotations

import bz2
import gzip
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shard_tools.formats.source import BadFileError

KINDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.zst")
_HEADER_BYTES = 2**20  # most bytes of a header that holds a long name or other facts of a file
_READ_AT_ONCE = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
                 tarfile.SOLARIS_XHDTYPE)
_ARCHIVE_BYTES = 2**42  # a size beyond it is a lie, which tarfile would follow for years
_WINDOW_BYTES = 2**27  # most memory that a .zst may ask for, as of the tool zstd without --long


class Member(NamedTuple):
    """One file: its ``name`` as written, its bytes or what is wrong with it, and how far into the archive it lies."""

    name: str
    data: bytes | BadFileError
    position: int


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(KINDS)


def members(path: Path, suffix: str, limit: int) -> Iterator[Member]:
    """Yields the regular files called ``*suffix``, of at most ``limit`` bytes, in the order of the archive.

    Raises:
        BadFileError: ``damaged archive``, after what could be read.
        ValueError: ``.tar.zst``, and the package zstandard is not installed.
    """
    with open(path, "rb") as raw, _decompressed(raw, path.name.lower()) as stream:
        try:
            tar = tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header, encoding="utf-8", bufsize=2**18)
            while (header := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep every header
                if header.size > _ARCHIVE_BYTES:
                    raise tarfile.ReadError(f"a file of {header.size:,} bytes")
                leaf = header.name.rpartition("/")[2]
                if header.isreg() and leaf.lower().endswith(suffix) and not leaf.startswith("."):
                    data = BadFileError("too many bytes", f"{header.size:,} bytes, the limit is {limit:,}") \
                        if header.size > limit else tar.extractfile(header).read()
                    yield Member(header.name, data or BadFileError("empty file", "0 bytes"), raw.tell())
        except Exception as error:  # the boundary to tarfile and to three decompressors
            where = f"it can't be read beyond byte {raw.tell():,} of {os.path.getsize(path):,}"
            raise BadFileError("damaged archive", f"{where}: {error or type(error).__name__}") from None


def safe_name(name: str) -> str:
    """A member's name as a path below a folder, ``./`` and doubled slashes left out.

    Raises:
        BadFileError: ``unsafe name``: it is absolute, leads upwards or has a zero byte.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise BadFileError("unsafe name", "it leads out of the folder that it is written to")
    return "/".join(parts)


class _Header(tarfile.TarInfo):
    """A header that is refused where tarfile would take the archive for finished, or read without a limit."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, where a file or the end of the archive should be") from None

    def _proc_member(self, tar):  # tarfile's hook for subclasses
        if self.type in _READ_AT_ONCE and self.size > _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(tar)

    def _refuse(self, *_):
        raise tarfile.ReadError("a sparse file")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse


def _decompressed(raw: BinaryIO, name: str) -> BinaryIO:
    if name.endswith((".gz", ".tgz")):
        return gzip.open(raw)
    if name.endswith(".bz2"):
        return bz2.open(raw)
    if name.endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"reading {name} needs the zstandard package: pip install zstandard") from None
        return zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).stream_reader(
            raw, read_across_frames=True, closefd=False)
    return open(os.dup(raw.fileno()), "rb")
