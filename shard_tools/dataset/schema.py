"""Reads and writes ``features.json``: what the numbers of a folder of vectors mean.

Two folders of vectors may be mixed if and only if their schemas have the same hash.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shard_tools.core.files import read_bounded, write_atomically
from shard_tools.dataset.source import Folder, Zip, read_sidecar, upwards

FILE = "features.json"
LARGEST = 2**24  # bytes of a schema that are read


def find_schema(source: Folder | Zip, top: str, folders: list[str]) -> Schema | None:
    """The one schema of all ``features.json`` in the folders of vectors or above them, up to the top.

    ValueError where one is damaged, two differ, or a folder has one and another has none.
    """
    found = {}
    for folder in folders:
        read = ((at, read_sidecar(source, at, FILE, LARGEST)) for at in upwards(folder, top))
        found[folder] = next((parse_schema(data, f"{at}/{FILE}".lstrip("/")) for at, data in read if data is not None),
                             None)
    first = next(((folder, known) for folder, known in found.items() if known), None)
    for folder, known in found.items():
        if first and (known is None or known.sha256 != first[1].sha256):
            raise ValueError(f"--source mixes vectors: {first[0] or '.'}/ has those of {first[1]}, {folder or '.'}/ "
                             + (f"those of {known}" if known else f"has no {FILE} that tells what they are")
                             + "; numbers of different kinds can't be trained on together: pack them one by one")
    return first[1] if first else None


@dataclass(frozen=True)
class Schema:
    """What each number of a vector is.

    Attributes:
        features: name of the extractor, such as ``acousticbrainz``.
        version: of the extractor; another version gives other numbers.
        names: of the numbers, in their order.
        options: what else shaped the numbers, as values of JSON (a model's name and hash); part of the hash.
        excerpt: of each track, such as ``{"seconds": 30.0, "count": 1}``; empty = whole tracks; not part of the hash.
    """

    features: str
    version: int
    names: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    excerpt: dict[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        parts = [self.features, self.version, list(self.names), self.options]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()

    def metadata(self) -> dict[str, Any]:
        """What an index says of its vectors: all but the names, and their number and the hash."""
        return {"features": self.features, "version": self.version, "dimension": len(self.names),
                "options": self.options, "excerpt": self.excerpt, "sha256": self.sha256}

    def __str__(self) -> str:
        return f"{self.features} {self.version} ({len(self.names)} numbers, {self.sha256[:12]})"


def write_schema(folder: Path, schema: Schema) -> None:
    """Writes ``FILE`` whole or not at all; ValueError where the folder has the file already, of another schema."""
    there = read_schema(folder)
    if there is not None and there.sha256 != schema.sha256:
        raise ValueError(f"{folder} holds vectors of {there}; these would be of {schema}: take another folder")
    if there is None:
        text = json.dumps({"features": schema.features, "version": schema.version, "options": schema.options,
                           "excerpt": schema.excerpt, "sha256": schema.sha256, "names": list(schema.names)}, indent=1)
        write_atomically(folder / FILE, text.encode() + b"\n")


def read_schema(folder: Path) -> Schema | None:
    """The schema of a folder of vectors, None where it has none; ValueError where it is damaged."""
    path = folder / FILE
    return parse_schema(read_bounded(path, LARGEST), str(path)) if path.is_file() else None


def parse_schema(data: bytes, name: str) -> Schema:
    """The schema in the bytes of a ``FILE`` called ``name``; ValueError unless its hash is that of what it says."""
    try:
        found = json.loads(data)
        schema = Schema(str(found["features"]), int(found["version"]), tuple(map(str, found["names"])),
                        dict(found["options"]), dict(found["excerpt"]))
        if schema.sha256 != found["sha256"]:
            raise ValueError("its hash is not that of its names")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{name} is damaged ({error!s:.200}); compute the features again") from None
    return schema
