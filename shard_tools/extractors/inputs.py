"""What ``features`` reads: the tracks of a folder, an archive or a table, or the vectors of several folders.

What can't be used is an input all the same, with what is wrong with it.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from shard_tools.core.errors import BadFileError
from shard_tools.core.files import read_bounded
from shard_tools.dataset import schema
from shard_tools.dataset.genres import to_folder
from shard_tools.dataset.layout import AUDIO_SUFFIXES
from shard_tools.extractors.acousticbrainz import JSON_BYTES
from shard_tools.extractors.compute import Input

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.zst")
_CHUNK, _CHUNK_BYTES = 32, 4 * 2**20  # JSON files of a task; an audio file is a task of its own
_HEADER_BYTES = 2**20  # most bytes of a header that holds a long name or other metadata of a file
_READ_AT_ONCE = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
                 tarfile.SOLARIS_XHDTYPE)
_ARCHIVE_BYTES = 2**42  # a size beyond it is a lie, which tarfile would follow for years
_WINDOW_BYTES = 2**27  # most memory that a .zst may ask for, as of the tool zstd without --long


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVES)


def read_archive(path: Path, suffix: str, limit: int) -> Iterator[tuple[str, bytes | BadFileError, int]]:
    """Yields the regular files called ``*suffix``, of at most ``limit`` bytes, in the order of the archive.

    Of each its name as written, its bytes or what is wrong with it, and how far the archive has been read with it;
    raises BadFileError ``damaged archive`` after what could be read.
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
                    yield header.name, data or BadFileError("empty file", "0 bytes"), raw.tell()
        except Exception as error:  # the boundary to tarfile and to three decompressors
            where = f"it can't be read beyond byte {raw.tell():,} of {os.path.getsize(path):,}"
            raise BadFileError("damaged archive", f"{where}: {error or type(error).__name__}") from None


def safe_name(name: str) -> str:
    """A member's name as a path below a folder, ``./`` and doubled slashes left out; BadFileError ``unsafe name``."""
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


def walk(root: Path, suffixes: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yields (path relative to ``root``, None) of the files with these suffixes, folder by folder in order, and
    (folder, error) where one can't be listed. What has a dot in front is passed over, and so is ``features.json``;
    links to folders are followed."""
    errors: list[OSError] = []
    seen = set()
    for top, folders, files in os.walk(root, onerror=errors.append, followlinks=True):
        info = os.stat(top)
        if (info.st_dev, info.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((info.st_dev, info.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith(".") and name != schema.FILE:
                yield os.path.relpath(os.path.join(top, name), root), None
    for error in errors:
        yield os.path.relpath(error.filename, root), error.strerror or str(error)


def folder_inputs(root: Path, suffixes: Sequence[str]) -> Iterator[Input]:
    """The files below a folder; of files in one folder that differ by suffix only the first counts."""
    current, stems = None, {}
    for path, error in walk(root, suffixes):
        folder, name = os.path.split(path)
        if folder != current:
            current, stems = folder, {}
        stem = os.path.splitext(path)[0]
        first = stems.setdefault(stem, name)
        if error:
            yield Input("", path, error=BadFileError("unreadable", error))
        elif first != name:
            yield _duplicate(path, first)
        else:
            yield Input(stem, path, (root / path,))


def archive_inputs(path: Path) -> Iterator[Input]:
    """The JSON files of a dump archive."""
    seen = set[int]()  # of hashes, 8 bytes and their slot in the set, where names would be ten times that
    folders = set[int]()  # likewise: of the stems whose vector can't be written where a folder has its name
    try:
        for name, data, position in read_archive(path, ".json", JSON_BYTES):
            try:
                stem = os.path.splitext(safe_name(name))[0]
            except BadFileError as error:
                yield Input("", name, error=error, position=position)
                continue
            needed = {hash(str(folder.with_suffix(""))) for folder in PurePosixPath(stem).parents
                      if folder.suffix in (".npy", ".json")}
            if hash(stem) in seen:
                yield _duplicate(name, "a file of that name")._replace(position=position)
            elif hash(stem) in folders or needed & seen:  # decided here: of two workers, either may come first
                error = BadFileError("unwritable name", "a file and a folder would have the same name")
                yield Input("", name, error=error, position=position)
            else:
                seen.add(hash(stem))
                folders |= needed
                given = {"error" if isinstance(data, BadFileError) else "data": data}
                yield Input(stem, name, **given, position=position)
    except BadFileError as error:
        yield Input("", path.name, error=error, position=path.stat().st_size)


def table_inputs(table: Path, suffixes: Sequence[str]) -> Iterator[Input]:
    """The rows of a CSV with the columns ``audio`` and ``cover`` (paths relative to it) and, perhaps, ``genre`` or
    ``label``; each goes to ``<genre>/<stem of the audio>``."""
    try:
        rows = csv.DictReader(io.StringIO(read_bounded(table).decode("utf-8-sig"), newline=""))
        if not {"audio", "cover"} <= set(rows.fieldnames or ()):
            raise ValueError(f"its columns are {', '.join(rows.fieldnames or ()) or 'none'}")
        rows = list(rows)
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"--pairs {table} can't be read ({error}); expected a CSV with the columns audio and cover, "
                         "and genre or label if you like") from None
    taken: dict[str, str] = {}
    for line, row in enumerate(rows, 2):
        path = row["audio"] or ""
        stem, suffix = os.path.splitext(os.path.basename(path))
        name = f"{to_folder(row.get('genre') or row.get('label') or '')}/{stem}"
        if suffix.lower() not in suffixes or not row["cover"]:
            problem = f"expected {', '.join(suffixes)}" if row["cover"] else "it has no cover"
            yield Input("", path, error=BadFileError("not a pair", f"line {line}: {problem}"))
        elif name in taken:
            yield _duplicate(path, taken[name])
        else:
            taken[name] = path
            yield Input(name, path, (table.parent / path,), cover=table.parent / row["cover"])


def vector_inputs(roots: Sequence[Path]) -> Iterator[Input]:
    """The vectors below several folders, joined by their path there."""
    found: dict[str, list[Path | None]] = {}
    for number, root in enumerate(roots):
        for path, error in walk(root, (".npy",)):
            if error:
                raise ValueError(f"--source {root / path} can't be read: {error}")
            found.setdefault(path, [None] * len(roots))[number] = root / path
    for path in sorted(found):
        yield Input(os.path.splitext(path)[0], path, tuple(found[path]))


def make_tasks(inputs: Iterable[Input]) -> Iterator[tuple[list[Input], int]]:
    """Inputs gathered to tasks of ``compute`` that are worth a process, and small enough to wait there.

    With each, how far the source has been read: bytes of an archive, else inputs.
    """
    waiting: list[Input] = []
    size = 0
    for count, item in enumerate(inputs, 1):
        waiting.append(item)
        size += len(item.data or b"")
        is_audio = bool(item.files and item.files[0]) and item.files[0].suffix.lower() in AUDIO_SUFFIXES
        if is_audio or len(waiting) == _CHUNK or size >= _CHUNK_BYTES:
            yield waiting, item.position or count
            waiting, size = [], 0
    if waiting:
        yield waiting, item.position or count


def _duplicate(path: str, first: str) -> Input:
    return Input("", path, error=BadFileError("duplicate stem", f"{first} came first"))
