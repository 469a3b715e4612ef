"""What a trained model is to hear: files of vectors or descriptors, or shards in, checked raw vectors out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from covergen.runtime.data import IndexedShards, varied
from shard_tools.formats import acousticbrainz, codec
from shard_tools.formats.source import BadFileError, Entry, read_entry

READERS = {".npy": codec.VECTOR_BYTES, ".json": acousticbrainz.JSON_BYTES}  # and the most bytes that are read
SONGS = (".mp3", ".flac", ".ogg", ".opus", ".wav", ".m4a")
# What makes a raw vector float32 [D] of a song (ValueError: damaged), by the name of the descriptors that a run was
# trained on (``features`` of its facts); there is none yet.
EXTRACTORS: dict[str, Callable[[Path], np.ndarray]] = {}
# AcousticBrainz's numbers by how many of them a data set holds.
SETS = {len(names): names for names in (acousticbrainz.NAMES, acousticbrainz.NAMES_559)}


class Heard(NamedTuple):
    """Raw vectors float32 ``[N, D]`` and a name for each."""

    names: list[str]
    raw: np.ndarray


def listed(paths: str) -> list[Path]:
    """Paths that were typed, separated by commas; the name of one thing that exists may have commas in it."""
    return [Path(path) for path in ([paths] if os.path.exists(paths) else paths.split(",")) if path]


def read_files(paths: str, facts: dict[str, Any]) -> Heard:
    """Vectors (``.npy``) and AcousticBrainz low-level files (``.json``), or all of them in folders.

    Args:
        paths: separated by commas.
        facts: the ``audio`` part of a run's facts: dimension and blocks.

    Raises:
        ValueError: names the file: missing, of another kind, damaged, not of the run's dimension, or a song that
            nothing here makes the run's vector of.
    """
    files: list[Path] = []
    for path in listed(paths):
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"--audio {path}: no {' or '.join(READERS)} file in that folder")
        files += inside
    if not files:
        raise ValueError("--audio: expected the path of a .npy vector or an AcousticBrainz .json")
    return Heard([file.stem for file in files], np.stack([_read(file, facts) for file in files]))


def _read(file: Path, facts: dict[str, Any]) -> np.ndarray:
    kind, dimension = file.suffix.lower(), facts["dimension"]
    if kind not in READERS and kind not in SONGS:
        raise ValueError(f"--audio {file}: expected a .npy vector or an AcousticBrainz low-level .json")
    extract = _extractor(file, facts) if kind in SONGS else None
    if not file.is_file():
        raise ValueError(f"--audio {file}: no such file")
    try:
        data = b"" if extract else read_entry(file.parent, Entry(file.name, -1, 0), READERS[kind])
        if kind == ".json":
            return _place(data, facts)
        vector = extract(file) if extract else codec.read_vector(data)
    except BadFileError as error:
        raise ValueError(f"--audio {file}: {error}") from None
    if len(vector) != dimension:
        raise ValueError(f"--audio {file}: a vector of {len(vector)} numbers; the run was trained on {dimension}")
    return vector


def _extractor(file: Path, facts: dict[str, Any]) -> Callable[[Path], np.ndarray]:
    """What makes the run's vector of a song; ValueError, which says what the run was trained on, if nothing does."""
    features = facts.get("features")
    if features not in EXTRACTORS:
        blocks = " + ".join(str(stop - start) for start, stop in facts["blocks"])
        raise ValueError(f"--audio {file}: the run was trained on {facts['dimension']} numbers (blocks of {blocks}) of "
                         f"{features or 'descriptors without a name'}, which can't be computed from audio files here "
                         "yet; give a .npy vector or an AcousticBrainz low-level .json of that track")
    return EXTRACTORS[features]


def _place(data: bytes, facts: dict[str, Any]) -> np.ndarray:
    """The descriptors as a vector of the run's: the whole of it, or its first block of their size, the rest absent."""
    vector = np.zeros(facts["dimension"], np.float32)
    for start, stop in ([0, facts["dimension"]], *facts["blocks"]):
        if stop - start in SETS:
            vector[start:stop] = acousticbrainz.read(data, SETS[stop - start])
            return vector
    raise BadFileError("another kind of audio", f"AcousticBrainz gives {' or '.join(map(str, SETS))} numbers; the run "
                       f"was trained on {facts['dimension']}, in blocks of "
                       f"{', '.join(str(stop - start) for start, stop in facts['blocks'])}")


def read_shards(root: str, split: str, count: int, facts: dict[str, Any]) -> Heard:
    """Raw vectors of packed tracks, of as many genres as there are.

    Args:
        root: folder of the shards; split: of them.
        count: how many tracks; 0 for all, in the order of the index.
        facts: as above.

    Raises:
        ValueError, FileNotFoundError: no such split, no vectors, or not of the run's dimension.
    """
    shards = IndexedShards(root, split, batch_size=1, audio_scale="raw")
    if shards.dimension != facts["dimension"]:
        has = f"vectors of {shards.dimension} numbers" if shards.dimension else "no vectors"
        raise ValueError(f"{root} has {has}; the run was trained on {facts['dimension']}")
    rows = shards.audible()
    batch = shards.read(rows[varied(shards.index.rows["genre"][rows], count)] if count else rows)
    genres = shards.facts["genres"]
    return Heard([genres[genre] for genre in batch.genre.tolist()], batch.audio.numpy())
