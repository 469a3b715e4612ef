"""Vectors made of vectors: folders of them, or data sets, in; what ``pca`` or ``concat`` makes of each, planned, out.

Of a data set a data set is made: all that is not its vectors is linked beside the new ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from shard_tools.core.errors import BadFileError
from shard_tools.core.files import place_link, write_atomically
from shard_tools.dataset import schema
from shard_tools.dataset.layout import ALIASES, SPLITS
from shard_tools.dataset.schema import Schema
from shard_tools.dataset.source import Entry, read_entry
from shard_tools.dataset.vectors import VECTOR_BYTES, read_vector
from shard_tools.extractors import Extractor, load
from shard_tools.extractors import tracks as sources
from shard_tools.extractors.compute import FOLDER, Item
from shard_tools.extractors.concat import of_schemas, of_size
from shard_tools.extractors.pca import FILE, fit, pca_bytes, read_pca
from shard_tools.shards.candidates import shuffle_key


class Sources(NamedTuple):
    """Folders of vectors and what they hold, and the data set, if it is one, that the first of them belongs to."""

    roots: list[Path]
    schemas: list[Schema]
    items: list[tuple[Item, int]]
    data_set: Path | None


def open_sources(folders: list[str]) -> Sources:
    """Lists folders of vectors; of a data set that is its ``audio``.

    Raises:
        ValueError: no such folder, or no vectors in it.
    """
    roots, data_set = [], None
    for number, folder in enumerate(map(Path, folders)):
        if not folder.is_dir():
            raise ValueError(f"--source {folder} is not a folder; expected one with vectors (.npy)")
        inside = folder / "audio"
        if inside.is_dir() and not (folder / schema.FILE).is_file():
            roots.append(inside.resolve())
            data_set = folder.resolve() if number == 0 else data_set
        else:
            roots.append(folder.resolve())
    items = list(sources.of_vectors(roots))
    return Sources(roots, [_describe(root, items, number) for number, root in enumerate(roots)], items, data_set)


def _describe(root: Path, items: list[tuple[Item, int]], number: int) -> Schema:
    """What a folder's ``features.json`` says, else so many numbers that nobody described."""
    known = schema.read_schema(root)
    if known is None:
        some = islice(read_files(item.files[number] for item, _ in items), 100)
        sizes = Counter(map(len, some)).most_common(1)
        if not sizes:
            raise ValueError(f"--source {root} holds no vectors (.npy)")
        known = of_size(sizes[0][0])
    return known


def read_files(paths: Iterator[Path | None], size: int | None = None) -> Iterator[np.ndarray]:
    """Yields the vectors that can be read, of that size where one is given; others are named when their turn comes."""
    for path in paths:
        try:
            vector = None if path is None else read_vector(read_entry(path.parent, Entry(path.name, -1, 0),
                                                                      VECTOR_BYTES))
        except BadFileError:
            continue
        if vector is not None and size in (None, len(vector)):
            yield vector


def concatenation(found: Sources) -> tuple[Schema, partial[Extractor]]:
    """The schema of ``concat`` of the sources, heard as they are, and what makes its extractor."""
    heard = [known.excerpt for known in found.schemas]
    same = all(one == heard[0] for one in heard)
    make = partial(of_schemas, tuple(found.schemas))
    return _heard(make().schema, heard[0] if same else {"parts": heard}), make


def reduction(found: Sources, out: Path, folder: Path, components: int | None, file: str | None,
              standardise: bool) -> tuple[Schema, partial[Extractor]]:
    """The same of ``pca`` of the first source: by a file, or fitted now; either way the file is put into ``folder``.

    Args:
        found: the source.
        out: of the command; unfinished work lies in its ``FOLDER``.
        folder: where the vectors go.
        components: numbers to keep, when a PCA is fitted.
        file: a PCA to apply instead.
        standardise: as of ``fit``.

    Raises:
        ValueError: the file is of other vectors, or one is there already that was fitted on others.
    """
    known, target = found.schemas[0], folder / FILE
    if file is None:
        names = _to_fit(found)
        work = hashlib.sha256(json.dumps([components, standardise, known.sha256, names]).encode()).hexdigest()
        file = str(target if target.is_file() else out / FOLDER / FILE)
        if not Path(file).is_file():
            data = pca_bytes(_fit(found, names, components, standardise), known, work)
            write_atomically(Path(file), data)
        elif str(read_pca(Path(file))["of"]) != work:
            raise ValueError(f"{file} was fitted on other vectors or with other options; apply it with --pca {file}, "
                             "or choose another --out")
    before = json.loads(str(read_pca(Path(file))["source"]))
    if before["sha256"] != known.sha256:
        raise ValueError(f"--pca {file} is of vectors of {before['features']} ({before['dimension']} numbers, "
                         f"{before['sha256'][:12]}); {found.roots[0]} holds those of {known}")
    made = _heard(load("pca", files=(file,)).schema, known.excerpt)
    schema.write_schema(folder, made)
    if not target.is_file() or target.read_bytes() != Path(file).read_bytes():
        write_atomically(target, Path(file).read_bytes())
    return made, partial(load, "pca", files=(str(target),))


def _heard(known: Schema, heard: dict) -> Schema:
    return Schema(known.features, known.version, known.names, known.options, heard)


def _to_fit(found: Sources) -> list[str]:
    """The names of the vectors to fit on: of the train split where there are splits; in a fair order."""
    names = [item.name for item, _ in found.items]
    splits = {name: _split(name) for name in names}
    if any(splits.values()):
        names = [name for name in names if splits[name] == "train"]
        if not names:
            raise ValueError(f"{found.roots[0]} has splits, but no train split to fit on; use --pca with a fitted file")
    else:
        print("no splits: the PCA is fitted on all vectors; split first where some are to be kept from it")
    return sorted(names, key=lambda name: (shuffle_key(0, "", name), name))


def _split(name: str) -> str | None:
    first = name.partition("/")[0].lower() if "/" in name else ""
    return ALIASES.get(first, first) if ALIASES.get(first, first) in SPLITS else None


def _fit(found: Sources, names: list[str], components: int, standardise: bool) -> dict[str, np.ndarray]:
    size = len(found.schemas[0].names)
    passes = iter(("moments", "fitting"))

    def vectors() -> Iterator[np.ndarray]:
        paths = (found.roots[0] / f"{name}.npy" for name in names)
        return read_files(tqdm(paths, desc=next(passes), total=len(names), unit=" vectors"), size)

    fitted = fit(vectors, components, standardise)
    share = fitted["explained"].sum()
    print(f"{components} components hold {share:.1%} of the variance of {fitted['count']:,} vectors")
    return fitted


def link_rest(found: Sources, out: Path) -> None:
    """Links all of the first source's data set but its vectors and reports."""
    if found.data_set is None:
        return
    for top, folders, files in os.walk(found.data_set, followlinks=True):
        here = Path(top)
        folders[:] = sorted(name for name in folders if not name.startswith(".")
                            and here / name != found.data_set / "audio")
        for name in files:
            if not name.startswith(".") and name != "quarantine.jsonl" and (here / name).is_file():
                target = out / here.relative_to(found.data_set) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                place_link(here / name, target, "hard")
