"""What lies beside the files of a data set and speaks of them: an opened source in; its groups and schema out."""

from __future__ import annotations

from collections.abc import Iterator

from shard_tools.formats import groups, schema
from shard_tools.formats.index import GROUPS_BYTES
from shard_tools.formats.source import BadFileError, Folder, Zip, read_entry


def read_beside(source: Folder | Zip, folder: str, name: str, limit: int) -> bytes | None:
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


def find_groups(source: Folder | Zip, top: str) -> dict[tuple[str, str], str]:
    """What ``groups.csv`` at the top of a layout says, ``{(genre, stem): group}``; nothing without one.

    Raises:
        ValueError: it is damaged.
    """
    data = read_beside(source, top, groups.FILE, GROUPS_BYTES)
    return groups.parse_groups(data, f"{groups.FILE} of --source") if data is not None else {}


def find_schema(source: Folder | Zip, top: str, folders: list[str]) -> schema.Schema | None:
    """The one schema of all ``features.json`` in the folders of vectors or above them, up to the top.

    Raises:
        ValueError: one is damaged, or two differ, or a folder has one and another has none.
    """
    found = {folder: next(_upwards(source, top, folder), None) for folder in folders}
    first = next(((folder, known) for folder, known in found.items() if known), None)
    for folder, known in found.items():
        if first and (known is None or known.sha256 != first[1].sha256):
            raise ValueError(f"--source mixes vectors: {first[0] or '.'}/ has those of {first[1]}, {folder or '.'}/ "
                             + (f"those of {known}" if known else f"has no {schema.FILE} that tells what they are")
                             + "; numbers of different kinds can't be trained on together: pack them one by one")
    return first[1] if first else None


def _upwards(source: Folder | Zip, top: str, folder: str) -> Iterator[schema.Schema]:
    while True:
        data = read_beside(source, folder, schema.FILE, schema.LARGEST)
        if data is not None:
            yield schema.parse_schema(data, f"{folder}/{schema.FILE}".lstrip("/"))
        if folder == top or not folder:
            return
        folder = folder.rpartition("/")[0]
