"""Candidates for samples as lines of JSON, so that no process holds them all, and the check of one's files."""

from __future__ import annotations

import hashlib
import json
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shard_tools.core.errors import BadFileError, SourceChangedError
from shard_tools.core.quarantine import Drop
from shard_tools.dataset.images import COVER_BYTES, probe_cover
from shard_tools.dataset.layout import Candidate
from shard_tools.dataset.source import Entry, read_entry
from shard_tools.dataset.vectors import VECTOR_BYTES, canonical


class ProbedSample(NamedTuple):
    """A candidate whose files are valid.

    Attributes:
        cover: bytes as found.
        width, height: of the cover in pixels, upright.
        plain: the cover's bytes can stay as they are if its size is right.
        audio: as the bytes of a canonical ``.npy``, b"" = no vector.
        vector: its numbers, float32 ``[D]``.
    """

    cover: bytes
    width: int
    height: int
    plain: bool
    audio: bytes
    vector: np.ndarray | None


def to_line(candidate: Candidate) -> bytes:
    """A line of ASCII; an f-string, for ``json.dumps`` takes as long as reading the file."""
    split, genre, key, album, cover, audio = candidate
    vector = _entry_text(audio) if audio else "null"
    return f'["{split}",{quoted(genre)},"{key}",{quoted(album)},{_entry_text(cover)},{vector}]\n'.encode("ascii")


def _entry_text(entry: Entry) -> str:
    path, size, stamp, member = entry
    return f"[{quoted(path)},{size},{stamp},{list(member)}]"


def from_line(line: bytes) -> Candidate:
    split, genre, key, album, cover, audio = json.loads(line.decode("ascii"))
    cover, audio = (Entry(*parts[:3], tuple(parts[3])) if parts else None for parts in (cover, audio))
    return Candidate(split, genre, key, album, cover, audio)


def probe_sample(source: Path, candidate: Candidate, max_pixels: int, drops: list[Drop]) -> ProbedSample | None:
    """Reads the files of a candidate, each once, and checks them; None = one is bad, all that are go to the drops.

    SourceChangedError for a file that is not of the size that it was listed with.
    """
    entry, audio_entry = candidate.cover, candidate.audio
    info, cover, audio, vector = None, b"", b"", None
    try:
        cover = _read(source, entry, COVER_BYTES)
        info = probe_cover(cover, max_pixels)
    except BadFileError as error:
        drops.append(Drop(entry.path, "cover", error.reason, error.detail))
    if audio_entry:  # read even when the cover is bad: every bad file is named in one run
        try:
            audio, vector = canonical(_read(source, audio_entry, VECTOR_BYTES))
        except BadFileError as error:
            drops.append(Drop(audio_entry.path, "audio", error.reason, error.detail))
    if info is None or (audio_entry and vector is None):
        return None
    return ProbedSample(cover, *info, audio, vector)


def _read(source: Path, entry: Entry, limit: int) -> bytes:
    data = read_entry(source, entry, limit)
    if entry.size not in (-1, len(data)):
        raise SourceChangedError(f"{entry.path} had {entry.size:,} bytes and now has {len(data):,}: it changed while "
                                 "it was packed; run again when nothing writes to --source")
    return data


def shuffle_key(seed: int, split: str, key: str) -> int:
    """64 bits by which the samples of a split are sorted: a shuffle that depends on the seed and the keys alone."""
    digest = hashlib.blake2b(f"{split}/{key}".encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big")
