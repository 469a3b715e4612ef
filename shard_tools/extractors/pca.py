"""Extractor ``pca``: vectors of fewer numbers, by a principal component analysis that is fitted once.

Columns are standardised first unless told otherwise: raw descriptors span 1e-24 to 1e13, and the first component would
be their largest column and nothing else. The embeddings of one network share a scale; for them it may be left out.
The file is an ``.npz`` without pickles: mean, scale, components, and, as JSON, what the vectors were.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shard_tools.core.errors import BadFileError
from shard_tools.core.files import file_sha256
from shard_tools.dataset.schema import Schema
from shard_tools.extractors import Extractor, from_metadata, without_excerpt
from shard_tools.shards.statistics import Moments

VERSION = 1
FILE = "pca.npz"
_ARRAYS = ("mean", "scale", "components", "explained", "count", "source", "of")
BATCH = 1024  # vectors at once: a compromise of memory and of the time that the decompositions take


def pca(file_sha256: str = "", source: dict[str, Any] | None = None, files: Sequence[str] = ()) -> Extractor:
    """The extractor of a fitted file: the one of ``files`` with that hash; "" = the only one.

    ``source`` is the metadata of the vectors that go in, as the file has them too; None = for vectors only, not tracks.
    """
    found = {_hash(path): path for path in files}
    wanted = file_sha256 or next(iter(found), "")
    if wanted not in found:
        raise ValueError(f"the vectors went through the PCA whose file has SHA-256 {wanted[:12]}...: give that file "
                         f"({FILE} beside the vectors' features.json)"
                         + (f"; it is none of {', '.join(map(str, files))}" if files else ""))
    fitted = read_pca(Path(found[wanted]))
    before = json.loads(str(fitted["source"]))
    names = tuple(f"pca.{i:03d}" for i in range(len(fitted["components"])))
    reduce = partial(apply, fitted)
    extractor = Extractor(Schema("pca", VERSION, names, {"file_sha256": wanted, "source": before}),
                          of_vectors=lambda vectors: reduce(vectors[0]))
    if source is None:
        return extractor
    first = from_metadata(before, files)
    return extractor._replace(
        of_json=first.of_json and (lambda data: reduce(first.of_json(data))),
        of_audio=first.of_audio and (lambda path, start, seconds: reduce(first.of_audio(path, start, seconds))))


def fit(vectors: Callable[[], Iterator[np.ndarray]], components: int, standardise: bool) -> dict[str, np.ndarray]:
    """Fits on a stream of vectors ``[D]`` that can be had twice: their moments, then scikit-learn's IncrementalPCA.

    Vectors of zeros alone (a source that is absent) tell nothing and are left out.

    Returns ``mean`` ``[D]``, ``scale`` ``[D]``, ``components`` ``[components, D]`` float64 (of standardised columns),
    ``explained`` ``[components]`` (shares of the variance), ``count`` (vectors fitted on).
    """
    from sklearn.decomposition import IncrementalPCA
    moments = None
    for batch in _batches(vectors(), BATCH):
        found = Moments.of(batch, ((0, batch.shape[1]),))
        moments = found if moments is None else moments.merge(found)
    count, dimension = (int(moments.count.max()), len(moments.count)) if moments else (0, 0)
    if not 1 <= components <= min(count, dimension):
        raise ValueError(f"--components {components}: expected 1 to {min(count, dimension)}, for {count:,} vectors of "
                         f"{dimension:,} numbers to fit on")
    mean, std = moments.mean_and_std()
    scale = np.where(std > 0, std, 1.0) if standardise else np.ones(dimension)
    model = IncrementalPCA(components)
    for batch in _batches(vectors(), max(BATCH, components)):
        model.partial_fit((batch - mean) / scale)
    return {"mean": mean, "scale": scale, "components": model.components_,
            "explained": model.explained_variance_ratio_, "count": np.int64(count)}


def _batches(vectors: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Batches ``[N, D]`` float64 of at least ``size`` vectors, less than twice as many; one smaller if there are fewer.

    (What is over must not make a batch of its own: IncrementalPCA before 1.6 wants as many vectors as components.)
    """
    waiting: list[np.ndarray] = []
    for vector in vectors:
        if not vector.any():
            continue
        waiting.append(vector)
        if len(waiting) == 2 * size:
            yield np.array(waiting[:size], np.float64)
            del waiting[:size]
    if waiting:
        yield np.array(waiting, np.float64)


def apply(fitted: dict[str, np.ndarray], vector: np.ndarray) -> np.ndarray:
    """A vector ``[D]`` as float32 ``[components]``: one at a time, so that its numbers don't depend on any others."""
    if len(vector) != len(fitted["mean"]):
        raise BadFileError("wrong vector size", f"{len(vector)} numbers; the PCA is of {len(fitted['mean'])}")
    if not vector.any():
        raise BadFileError("absent source", "zeros alone")
    with np.errstate(over="ignore"):
        found = (fitted["components"] @ ((vector - fitted["mean"]) / fitted["scale"])).astype(np.float32)
    if not np.isfinite(found).all():
        raise BadFileError("not finite", "as float32, after the PCA")
    return found


def pca_bytes(fitted: dict[str, np.ndarray], source: Schema, of: str) -> bytes:
    """What is fitted as the bytes of a file; ``of`` is what it was fitted on, by which a file is known again."""
    output = io.BytesIO()
    metadata = json.dumps(without_excerpt(source.metadata()), sort_keys=True)
    np.savez(output, source=np.array(metadata), of=np.array(of), **fitted)
    return output.getvalue()


def read_pca(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that ``pca_bytes`` made; nothing in it is ever unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS}
        _, columns = arrays["components"].shape
        numbers = [arrays[name] for name in ("mean", "scale", "components")]
        if any(array.shape[-1] != columns or not np.isfinite(array).all() for array in numbers):
            raise ValueError("its arrays don't fit each other")
        if json.loads(str(arrays["source"]))["dimension"] != columns:
            raise ValueError("it is of vectors of another size")
    except Exception as error:  # the boundary to numpy and to zips that anybody may have made
        raise ValueError(f"--pca {path} can't be read ({error!s:.200}); expected a file {FILE} that "
                         "shard_tools.features --extractor pca wrote") from None
    return arrays


def _hash(path: str) -> str:
    try:
        return file_sha256(Path(path))
    except OSError as error:
        raise ValueError(f"--pca {path} can't be read: {error.strerror}") from None
