"""Vectors computed from vectors: what ``pca`` or ``concat`` makes of folders of them, or of data sets.

From a data set a data set is made: all that is not its vectors is linked beside the new ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from shard_tools.core.errors import BadFileError
from shard_tools.core.files import place_link, write_atomically
from shard_tools.core.quarantine import QUARANTINE
from shard_tools.dataset import schema
from shard_tools.dataset.layout import ALIASES, SPLITS
from shard_tools.dataset.schema import Schema
from shard_tools.dataset.source import read_path
from shard_tools.dataset.vectors import VECTOR_BYTES, read_vector
from shard_tools.extractors import Extractor, load
from shard_tools.extractors.compute import FOLDER, Input
from shard_tools.extractors.concat import of_schemas, of_size
from shard_tools.extractors.inputs import vector_inputs
from shard_tools.extractors.pca import FILE, fit, pca_bytes, read_pca
from shard_tools.shards.candidates import shuffle_key


class Sources(NamedTuple):
    """Folders of vectors, their schemas and inputs, and the data set, if there is one, that the first belongs to."""

    roots: list[Path]
    schemas: list[Schema]
    inputs: list[Input]
    data_set: Path | None


def open_sources(folders: list[str]) -> Sources:
    """Lists folders of vectors; of a data set that is its ``audio``. One without ``features.json`` gets a schema of as
    many numbers without names."""
    roots, schemas, data_set = [], [], None
    for number, folder in enumerate(map(Path, folders)):
        if not folder.is_dir():
            raise ValueError(f"--source {folder} is not a folder; expected one with vectors (.npy)")
        inside = folder / "audio"
        if inside.is_dir() and not (folder / schema.FILE).is_file():
            roots.append(inside.resolve())
            data_set = folder.resolve() if number == 0 else data_set
        else:
            roots.append(folder.resolve())
    inputs = list(vector_inputs(roots))
    for number, root in enumerate(roots):
        known = schema.read_schema(root)
        if known is None:
            some = islice(read_files(item.files[number] for item in inputs), 100)
            sizes = Counter(map(len, some)).most_common(1)
            if not sizes:
                raise ValueError(f"--source {root} holds no vectors (.npy)")
            known = of_size(sizes[0][0])
        schemas.append(known)
    return Sources(roots, schemas, inputs, data_set)


def read_files(paths: Iterator[Path | None], size: int | None = None) -> Iterator[np.ndarray]:
    """Yields the vectors that can be read, of that size where one is given; ``compute`` names the others."""
    for path in paths:
        try:
            vector = None if path is None else read_vector(read_path(path, VECTOR_BYTES))
        except BadFileError:
            continue
        if vector is not None and size in (None, len(vector)):
            yield vector


def concatenation(found: Sources) -> tuple[Schema, partial[Extractor]]:
    """The schema of ``concat`` of the sources, of the same excerpts, and what makes its extractor."""
    excerpts = [known.excerpt for known in found.schemas]
    same = all(excerpt == excerpts[0] for excerpt in excerpts)
    make = partial(of_schemas, tuple(found.schemas))
    return replace(make().schema, excerpt=excerpts[0] if same else {"parts": excerpts}), make


def reduction(found: Sources, out: Path, folder: Path, components: int | None, file: str | None,
              standardise: bool) -> tuple[Schema, partial[Extractor]]:
    """The same of ``pca`` of the first source: by a file, or fitted now; either way the file is put into ``folder``,
    that of the vectors. Unfinished work lies in ``out``."""
    known, target = found.schemas[0], folder / FILE
    if file is None:
        names = _training_names(found)
        key = hashlib.sha256(json.dumps([components, standardise, known.sha256, names]).encode()).hexdigest()
        file = str(target if target.is_file() else out / FOLDER / FILE)
        if not Path(file).is_file():
            data = pca_bytes(_fit(found, names, components, standardise), known, key)
            write_atomically(Path(file), data)
        elif str(read_pca(Path(file))["of"]) != key:
            raise ValueError(f"{file} was fitted on other vectors or with other options; apply it with --pca {file}, "
                             "or choose another --out")
    before = json.loads(str(read_pca(Path(file))["source"]))
    if before["sha256"] != known.sha256:
        raise ValueError(f"--pca {file} is of vectors of {before['features']} ({before['dimension']} numbers, "
                         f"{before['sha256'][:12]}); {found.roots[0]} holds those of {known}")
    made = replace(load("pca", files=(file,)).schema, excerpt=known.excerpt)
    schema.write_schema(folder, made)
    if not target.is_file() or target.read_bytes() != Path(file).read_bytes():
        write_atomically(target, Path(file).read_bytes())
    return made, partial(load, "pca", files=(str(target),))


def _training_names(found: Sources) -> list[str]:
    """The names of the vectors to fit on, shuffled: of the train split where there are splits."""
    names = [item.name for item in found.inputs]
    folders = [name.partition("/")[0].lower() if "/" in name else "" for name in names]
    splits = [ALIASES.get(folder, folder) for folder in folders]
    if any(split in SPLITS for split in splits):
        names = [name for name, split in zip(names, splits, strict=True) if split == "train"]
        if not names:
            raise ValueError(f"{found.roots[0]} has splits, but no train split to fit on; use --pca with a fitted file")
    else:
        print("no splits: the PCA is fitted on all vectors; split first where some are to be left out of it")
    return sorted(names, key=lambda name: (shuffle_key(0, "", name), name))


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
    for top, folders, files in os.walk(found.data_set, followlinks=True) if found.data_set else ():
        folder = Path(top)
        folders[:] = sorted(name for name in folders if not name.startswith(".")
                            and folder / name != found.data_set / "audio")
        for name in files:
            if not name.startswith(".") and name != QUARANTINE and (folder / name).is_file():
                target = out / folder.relative_to(found.data_set) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                place_link(folder / name, target, "hard")
