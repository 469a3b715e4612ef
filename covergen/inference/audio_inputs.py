"""Audio for a trained model: raw vectors from songs, files of vectors or descriptors, or shards, checked against it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from covergen.data.dataset import ShardDataset
from covergen.data.sampling import stratified_rows
from covergen.inference.trained_model import TrainedModel
from covergen.runs.folder import check_fit
from shard_tools import extractors
from shard_tools.core.errors import BadFileError
from shard_tools.dataset.layout import AUDIO_SUFFIXES
from shard_tools.dataset.schema import read_schema
from shard_tools.dataset.source import Entry, read_entry
from shard_tools.dataset.vectors import VECTOR_BYTES, read_vector
from shard_tools.extractors import acousticbrainz, audio

READERS = {".npy": VECTOR_BYTES, ".json": acousticbrainz.JSON_BYTES}  # and the most bytes that are read
KINDS = "a song (" + ", ".join(AUDIO_SUFFIXES) + "), a .npy vector or a .json of descriptors"
# AcousticBrainz's numbers by how many of them a data set of unknown descriptors holds.
SETS = {len(names): names for names in (acousticbrainz.NAMES, acousticbrainz.NAMES_559)}


class AudioInputs(NamedTuple):
    """A name and a raw vector, float32 ``[N, D]``, for each."""

    names: list[str]
    raw: np.ndarray


def listed(paths: str) -> list[Path]:
    """Paths that were typed, separated by commas; the name of one thing that exists may have commas in it."""
    return [Path(path) for path in ([paths] if os.path.exists(paths) else paths.split(",")) if path]


def read_files(paths: str, metadata: dict[str, Any], pca: Sequence[str] = ()) -> AudioInputs:
    """Songs, vectors (``.npy``) and descriptors (``.json``), or all of them in folders, by the run's own extractor.

    Args:
        paths: separated by commas.
        metadata: the ``audio`` part of a run's metadata: dimension, blocks, and ``features``, where known.
        pca: files of the PCAs that made the run's vectors.

    Raises ValueError for a file that is missing, damaged or of another kind, or that gives no vector of the run's.
    """
    files: list[Path] = []
    for path in listed(paths):
        inside = sorted(file for file in path.iterdir()
                        if file.suffix.lower() in (*READERS, *AUDIO_SUFFIXES)) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"--audio {path}: no file in that folder is {KINDS}")
        files += inside
    if not files:
        raise ValueError(f"--audio: expected the path of {KINDS}")
    return AudioInputs([file.stem for file in files], np.stack([_read(file, metadata, pca) for file in files]))


def _read(file: Path, metadata: dict[str, Any], pca: Sequence[str]) -> np.ndarray:
    kind, dimension = file.suffix.lower(), metadata["dimension"]
    if kind not in READERS and kind not in AUDIO_SUFFIXES:
        raise ValueError(f"--audio {file}: expected {KINDS}")
    embed = _extractor_of_songs(file, metadata, pca) if kind in AUDIO_SUFFIXES else None
    if not file.is_file():
        raise ValueError(f"--audio {file}: no such file")
    try:
        if embed:  # an excerpt from the middle as long as those of training, or all of the song
            excerpt, seconds = metadata["features"]["excerpt"].get("seconds"), audio.duration(file)
            vector = embed(file, *((0.0, None) if excerpt is None else audio.excerpt_spans(seconds, excerpt, 1)[0]))
        else:
            vector = _read_vector(file, metadata, pca)
    except BadFileError as error:
        raise ValueError(f"--audio {file}: {error}") from None
    if len(vector) != dimension:
        raise ValueError(f"--audio {file}: a vector of {len(vector)} numbers; the run was trained on {dimension}")
    return vector


def _read_vector(file: Path, metadata: dict[str, Any], pca: Sequence[str]) -> np.ndarray:
    """The vector in a .npy or .json."""
    data = read_entry(file.parent, Entry(file.name, -1, 0), READERS[file.suffix.lower()])
    known = metadata.get("features")
    if file.suffix.lower() == ".npy":
        folders = [file.resolve().parent, *file.resolve().parents[1:4]]  # OUT/audio/<split>/<genre> at the deepest
        schema = next((schema for folder in folders if (schema := read_schema(folder))), None)
        if known and schema and schema.sha256 != known["sha256"]:
            raise ValueError(f"--audio {file}: a vector of {schema}, as {schema.features} made it; the run was trained "
                             f"on {named(metadata)}")
        return read_vector(data)
    if known:
        of_json = _extractor(file, metadata, pca).of_json
        if of_json is None:
            raise ValueError(f"--audio {file}: the run was trained on {named(metadata)}, which are not made of .json "
                             "files")
        return of_json(data)
    vector = np.zeros(metadata["dimension"], np.float32)  # all of it is of AcousticBrainz, or a block of their size
    for start, stop in ([0, metadata["dimension"]], *metadata["blocks"]):
        if stop - start in SETS:
            vector[start:stop] = acousticbrainz.read(data, SETS[stop - start])
            return vector
    raise BadFileError("another kind of audio", f"AcousticBrainz gives {' or '.join(map(str, SETS))} numbers; the run "
                       f"was trained on {metadata['dimension']}, in blocks of "
                       f"{', '.join(str(stop - start) for start, stop in metadata['blocks'])}")


def _extractor_of_songs(file: Path, metadata: dict[str, Any], pca: Sequence[str]) -> Callable[..., np.ndarray]:
    """What makes the run's vector of a song; ValueError, which says what the run was trained on, if nothing does."""
    of_audio = _extractor(file, metadata, pca).of_audio if metadata.get("features") else None
    if of_audio is None:
        raise ValueError(f"--audio {file}: the run was trained on {named(metadata)}, which can't be computed from "
                         "audio files; give a .npy vector of that track, or descriptors (.json) where they are made of "
                         "them")
    return of_audio


def _extractor(file: Path, metadata: dict[str, Any], pca: Sequence[str]) -> extractors.Extractor:
    try:
        return extractors.from_metadata(metadata["features"], pca)
    except ValueError as error:
        raise ValueError(f"--audio {file}: {error}") from None


def named(metadata: dict[str, Any]) -> str:
    """What audio a run was trained on, in words."""
    blocks = " + ".join(str(stop - start) for start, stop in metadata["blocks"])
    known = metadata.get("features")
    return (f"{metadata['dimension']} numbers (blocks of {blocks}) of "
            + (f"{known['features']} {known['version']}" if known else "descriptors without a name"))


def read_shards(run: TrainedModel, root: str, split: str, count: int) -> AudioInputs:
    """Raw vectors for a run of ``count`` packed tracks of as many genres as there are, or of all in their order (0)."""
    dataset = ShardDataset(root, split, audio_scale="raw")
    check_fit(run.folder, run.metadata, root, dataset.metadata, audio=True, covers="none")
    rows = dataset.rows_with_audio()
    if count:
        rows = rows[stratified_rows(dataset.index.rows["genre"][rows], count)]
    names = [dataset.metadata["genres"][genre] for genre in dataset.index.rows["genre"][rows]]
    return AudioInputs(names, dataset.read_audio(rows).numpy())
