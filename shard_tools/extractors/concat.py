"""Extractor ``concat``: the vectors of several sources in one, zeros where one is absent.

By the zeros ``pack`` knows which source a track has, and gives the model a presence bit for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from shard_tools.core.errors import BadFileError
from shard_tools.dataset.schema import Schema
from shard_tools.extractors import VECTORS, Extractor, from_metadata, without_excerpt

VERSION = 1


def concat(parts: Sequence[dict[str, Any]] = (), files: Sequence[str] = ()) -> Extractor:
    """The extractor of several parts, by their ``Schema.metadata()``; vectors without a schema are absent.

    ``files`` are the paths of the PCAs among them.
    """
    made = [Extractor(of_size(part["dimension"])) if part["features"] == VECTORS else from_metadata(part, files)
            for part in parts]
    whole = of_schemas(tuple(part.schema for part in made))

    def joined(kind: str) -> Callable[..., np.ndarray] | None:
        functions = [getattr(part, kind) for part in made]
        if not any(functions):
            return None
        return lambda *given: whole.of_vectors([function and function(*given) for function in functions])

    return whole._replace(of_json=joined("of_json"), of_audio=joined("of_audio"))


def of_schemas(schemas: tuple[Schema, ...]) -> Extractor:
    """The extractor that joins vectors of these schemas."""
    names = tuple(f"{i}.{part.features}:{name}" for i, part in enumerate(schemas) for name in part.names)
    schema = Schema("concat", VERSION, names, {"parts": [without_excerpt(part.metadata()) for part in schemas]})
    return Extractor(schema, of_vectors=partial(join, tuple(len(part.names) for part in schemas)))


def of_size(dimension: int) -> Schema:
    """The schema of vectors that have none: so many numbers without names."""
    return Schema(VECTORS, 1, tuple(f"{VECTORS}.{i:04d}" for i in range(dimension)))


def join(sizes: Sequence[int], vectors: Sequence[np.ndarray | None]) -> np.ndarray:
    """One vector float32 ``[sum(sizes)]``; BadFileError ``wrong vector size``, or ``absent source`` when all are."""
    parts = []
    for i, (size, vector) in enumerate(zip(sizes, vectors, strict=True)):
        if vector is not None and len(vector) != size:
            raise BadFileError("wrong vector size", f"{len(vector)} numbers of source {i}; the others have {size}")
        parts.append(np.zeros(size, np.float32) if vector is None else vector)
    whole = np.concatenate(parts).astype(np.float32)
    if not whole.any():
        raise BadFileError("absent source", "no source has anything but zeros")
    return whole
