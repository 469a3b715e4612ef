"""Finds, copies and reads the truth of demo data, ``attributes.npz``, of which packing puts a copy beside the shards.

No index knows of it, so that shards and indexes are the same with it and without.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

from shard_tools.core.errors import BadFileError
from shard_tools.core.files import read_bounded, write_atomically
from shard_tools.dataset.layout import Listing
from shard_tools.dataset.source import Entry, read_entry, upwards

TRUTH, DEMO = "attributes.npz", "demo.json"
FILE_BYTES, UNPACKED_BYTES = 2**28, 2**29  # a demo of 20,000 albums has 6 MB, and 30 unpacked


def find_truth(listing: Listing) -> Entry | None:
    """The demo's truth where the layout of a source begins, or in a folder above; None in what is no demo."""
    for folder in upwards(listing.top):
        files = {entry.name: entry for entry in listing.source.list(folder)[1]}
        if TRUTH in files and DEMO in files:
            return files[TRUTH]
    return None


def read_truth(source: Path, entry: Entry) -> bytes:
    """The bytes of the truth in a folder or zip; ValueError if they can't be read."""
    try:
        return read_entry(source, entry, FILE_BYTES)
    except BadFileError as error:
        raise ValueError(f"{source}/{entry.path} can't be read ({error})") from None


def copy_truth(source: Path, listing: Listing, root: Path) -> bool:
    """Copies the truth of a demo to the folder of its shards; returns whether it was missing there.

    A damaged one is left out, with a warning, for the covers are good without it.
    """
    if (entry := find_truth(listing)) is None:
        return False
    try:
        data = read_truth(source, entry)
        read_columns(data, f"{source}/{entry.path}")
    except ValueError as error:
        print(f"warning: {error}; packing without it")
        return False
    if (root / TRUTH).is_file() and (root / TRUTH).read_bytes() == data:
        return False
    write_atomically(root / TRUTH, data)
    return True


def read_columns(source: Path | bytes, name: str = "") -> dict[str, np.ndarray]:
    """All arrays of an ``attributes.npz`` (a path, or its bytes and a name for messages), see ``shard_tools.demo``.

    ValueError where it is damaged, or without the columns that name rows and what their covers show; nothing in it is
    ever unpickled.
    """
    try:
        file = io.BytesIO(read_bounded(source, FILE_BYTES) if isinstance(source, Path) else source)
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > UNPACKED_BYTES:
                raise ValueError("it would unpack to more than any demo holds")
        with np.load(file, allow_pickle=False) as parts:
            columns = {key: parts[key] for key in parts.files}  # reads, and so checks, all of them
        rows = len(columns["stems"])
        for key, kind in (("stems", "U"), ("split", "U"), ("genre", "U"), ("album", "i"), ("drawn", "f")):
            if columns[key].dtype.kind != kind or len(columns[key]) != rows:
                raise ValueError(f"its column {key!r} is not what shard_tools.demo writes")
        if columns["drawn"].shape != (rows, len(columns["attribute_names"])) or not np.isfinite(columns["drawn"]).all():
            raise ValueError("its column 'drawn' is not what shard_tools.demo writes")
    except Exception as error:  # zipfile, zlib and numpy have a dozen kinds for damaged bytes
        what = str(error) or type(error).__name__
        raise ValueError(f"{name or source} is no truth of a demo ({what})") from None
    return columns
