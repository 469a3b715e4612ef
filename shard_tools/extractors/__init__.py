"""The table of extractors: the function that makes each, imported only when it is asked for.

What an extractor needs beyond the package (Essentia, transformers, PyAV) is an extra of it, missed only when used.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shard_tools.dataset.schema import Schema

EXTRACTORS = {
    "acousticbrainz": "shard_tools.extractors.acousticbrainz:acousticbrainz",
    "acousticbrainz-559": "shard_tools.extractors.acousticbrainz:acousticbrainz_559",
    "essentia": "shard_tools.extractors.essentia:essentia",
    "clap": "shard_tools.extractors.clap:clap",
    "pca": "shard_tools.extractors.pca:pca",
    "concat": "shard_tools.extractors.concat:concat",
}
VECTORS = "vectors"  # the features of a folder of vectors without a schema

_loaded: dict[str, Extractor] = {}


class Extractor(NamedTuple):
    """What turns one track into a vector; a function that an extractor does not have is None.

    Every function gives raw numbers, float32 ``[D]``, or raises ``BadFileError``.
    """

    schema: Schema  # its ``options`` are what ``load`` takes to make the extractor again
    of_json: Callable[[bytes], np.ndarray] | None = None
    of_audio: Callable[[Path, float, float | None], np.ndarray] | None = None  # start and length (None: all) in seconds
    json_of_audio: Callable[[Path, float, float | None], bytes] | None = None  # the bytes that ``of_json`` reads
    of_vectors: Callable[[Sequence[np.ndarray | None]], np.ndarray] | None = None  # None where a source is absent


def load(name: str, **options: Any) -> Extractor:
    """The extractor of that name, made once with the same options in a process."""
    if name not in EXTRACTORS:
        close = difflib.get_close_matches(name, EXTRACTORS, n=1)
        raise ValueError(f"there is no extractor {name!r}, "
                         + (f"did you mean {close[0]!r}?" if close else f"choose from: {', '.join(EXTRACTORS)}"))
    key = json.dumps([name, options], sort_keys=True, default=str)
    if key not in _loaded:
        module, _, function = EXTRACTORS[name].partition(":")
        _loaded[key] = getattr(importlib.import_module(module), function)(**options)
    return _loaded[key]


def from_metadata(metadata: dict[str, Any], pca: Sequence[str | Path] = ()) -> Extractor:
    """The extractor that made the vectors of an index, from the ``Schema.metadata()`` in it.

    A PCA is found by its hash among the files ``pca``. ValueError if the extractor gives other numbers by now.
    """
    name = metadata["features"]
    if name not in EXTRACTORS:
        raise ValueError(f"the vectors are of {name!r}, which no extractor here makes (there are: "
                         f"{', '.join(EXTRACTORS)}); give vectors that are computed already")
    files = {"files": tuple(map(str, pca))} if name in ("pca", "concat") else {}
    extractor = load(name, **metadata["options"], **files)
    if extractor.schema.sha256 != metadata["sha256"]:
        raise ValueError(f"the vectors are of {name} {metadata['version']} ({metadata['dimension']} numbers, "
                         f"{metadata['sha256'][:12]}); here it would be {extractor.schema}, whose numbers mean "
                         "something else: use the version of the package that made them")
    return extractor


def without_excerpt(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a schema as options of another: the excerpt of each track is not what the numbers mean."""
    return {name: value for name, value in metadata.items() if name != "excerpt"}
