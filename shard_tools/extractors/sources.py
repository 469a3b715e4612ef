"""Where ``features`` finds its tracks: a folder, a file, a dump, a table or folders of vectors in; ``Item`` out.

Each comes with a position: how far the source has been read with it. What can't be an item is one all the same, with
what is wrong in the place of its bytes.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from shard_tools.extractors.archive import members, safe_name
from shard_tools.extractors.audio import SUFFIXES
from shard_tools.extractors.work import Item, Options, Task
from shard_tools.formats import schema
from shard_tools.formats.acousticbrainz import JSON_BYTES
from shard_tools.formats.genres import to_folder
from shard_tools.formats.index import read_bounded
from shard_tools.formats.source import BadFileError

Found = Iterator[tuple[Item, int]]
_CHUNK, _CHUNK_BYTES = 32, 4 * 2**20  # JSON files of a task; an audio file is a task of its own


def walk(root: Path, suffixes: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yields (path relative to ``root``, None) of the files with these suffixes, folder by folder in order, and
    (folder, error) where one can't be listed. What has a dot in front is passed over, and so is ``features.json``;
    links to folders are followed."""
    errors: list[OSError] = []
    seen = set()
    for top, folders, files in os.walk(root, onerror=errors.append, followlinks=True):
        facts = os.stat(top)
        if (facts.st_dev, facts.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith(".") and name != schema.FILE:
                yield os.path.relpath(os.path.join(top, name), root), None
    for error in errors:
        yield os.path.relpath(error.filename, root), error.strerror or str(error)


def of_folder(root: Path, suffixes: Sequence[str]) -> Found:
    """The files below a folder; of files in one folder that differ by suffix only the first counts."""
    place, stems = None, {}
    for count, (path, error) in enumerate(walk(root, suffixes), 1):
        folder, name = os.path.split(path)
        if folder != place:
            place, stems = folder, {}
        stem = os.path.splitext(path)[0]
        first = stems.setdefault(stem, name)
        if error:
            yield Item("", path, data=BadFileError("unreadable", error)), count
        elif first != name:
            yield _twice(path, first), count
        else:
            yield Item(stem, path, (root / path,)), count


def of_archive(path: Path) -> Found:
    """The JSON files of a dump archive, with how many bytes of it were read."""
    seen = set()  # of hashes, 8 bytes and their place in the set, where names would be ten times that
    try:
        for name, data, position in members(path, ".json", JSON_BYTES):
            try:
                stem = os.path.splitext(safe_name(name))[0]
            except BadFileError as error:
                yield Item("", name, data=error), position
                continue
            if hash(stem) in seen:
                yield _twice(name, "a file of that name"), position
            else:
                seen.add(hash(stem))
                yield Item(stem, name, data=data), position
    except BadFileError as error:
        yield Item("", path.name, data=error), path.stat().st_size


def of_pairs(table: Path, suffixes: Sequence[str]) -> Found:
    """The rows of a CSV with the columns ``audio`` and ``cover`` (paths relative to it) and, perhaps, ``genre`` or
    ``label``; each goes to ``<genre>/<stem of the audio>``.

    Raises:
        ValueError: it is no such table.
    """
    try:
        rows = csv.DictReader(io.StringIO(read_bounded(table).decode("utf-8-sig"), newline=""))
        if not {"audio", "cover"} <= set(rows.fieldnames or ()):
            raise ValueError(f"its columns are {', '.join(rows.fieldnames or ()) or 'none'}")
        rows = list(rows)
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"--pairs {table} can't be read ({error}); expected a CSV with the columns audio and cover, "
                         "and genre or label if you like") from None
    taken: dict[str, str] = {}
    for count, row in enumerate(rows, 1):
        path = row["audio"] or ""
        stem, suffix = os.path.splitext(os.path.basename(path))
        name = f"{to_folder(row.get('genre') or row.get('label') or '')}/{stem}"
        if suffix.lower() not in suffixes or not row["cover"]:
            said = f"expected {', '.join(suffixes)}" if row["cover"] else "it has no cover"
            yield Item("", path, data=BadFileError("not a pair", f"line {count + 1}: {said}")), count
        elif name in taken:
            yield _twice(path, taken[name]), count
        else:
            taken[name] = path
            yield Item(name, path, (table.parent / path,), cover=table.parent / row["cover"]), count


def of_vectors(roots: Sequence[Path]) -> Found:
    """The vectors below several folders, joined by their path there."""
    found: dict[str, list[Path | None]] = {}
    for number, root in enumerate(roots):
        for path, error in walk(root, (".npy",)):
            if error:
                raise ValueError(f"--source {root / path} can't be read: {error}")
            found.setdefault(path, [None] * len(roots))[number] = root / path
    for count, path in enumerate(sorted(found), 1):
        yield Item(os.path.splitext(path)[0], path, tuple(found[path])), count


def tasks(found: Iterable[tuple[Item, int]], options: Options) -> Iterator[Task]:
    """Items gathered to tasks that are worth sending to another process, and small enough to wait there."""
    waiting: list[Item] = []
    size = 0
    for item, position in found:
        waiting.append(item)
        size += len(item.data) if isinstance(item.data, bytes) else 0
        is_audio = bool(item.files) and item.files[0] is not None and item.files[0].suffix.lower() in SUFFIXES
        if is_audio or len(waiting) == _CHUNK or size >= _CHUNK_BYTES:
            yield Task(waiting, options, position)
            waiting, size = [], 0
    if waiting:
        yield Task(waiting, options, position)


def _twice(path: str, first: str) -> Item:
    return Item("", path, data=BadFileError("duplicate stem", f"{first} came first"))
