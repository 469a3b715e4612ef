"""Raw data for the tests of packing: a folder in; real covers and vectors in it out, sound and broken."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import pickle
import struct
import uuid
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIDE, DIMENSION = 32, 60
GENRES = ("metal", "new_age", "r&b")


def picture(seed: int, size: tuple[int, int] = (SIDE, SIDE), mode: str = "RGB") -> Image.Image:
    """A smooth random picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    output = io.BytesIO()
    image.save(output, kind, **options)
    return output.getvalue()


def jpeg(seed: int, **options) -> bytes:
    return encoded(picture(seed), quality=90, **options)


def vector(seed: int, absent: int | None = None) -> np.ndarray:
    """Two blocks of 30 numbers at the scales of real features; ``absent`` 0 or 1 zeroes one of them."""
    scale = 10.0 ** np.linspace(-9, 9, DIMENSION)
    values = (np.random.default_rng(seed).normal(3, 1, DIMENSION) * scale).astype(np.float32)
    if absent is not None:
        values[30 * absent:30 * (absent + 1)] = 0
    return values


def npy(values: np.ndarray) -> bytes:
    output = io.BytesIO()
    np.save(output, values)
    return output.getvalue()


def stem(number: int, kind: int, album: int | None = None) -> str:
    """A stem of kind 0 (MusicBrainz), 1 (MSD) or 2 (both)."""
    track, release = uuid.UUID(int=number + 1), uuid.UUID(int=(1 << 100) + (number if album is None else album))
    music_brainz, million = f"{track}-0__{release}", f"TR{number:016d}"
    return (music_brainz, million, f"{million}__{music_brainz}")[kind]


def add(root: Path, below: str, name: str, cover: bytes | None, audio: bytes | None, suffix: str = ".jpg") -> None:
    """Writes a pair into the folder split/genre ``below``, either half of which may be missing."""
    for part, data, ending in (("cover", cover, suffix), ("audio", audio, ".npy")):
        if data is not None:
            path = root / "audio-cover_dataset" / part / below / (name + ending)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def valid_pairs(root: Path, count: int) -> Path:
    """``count`` good pairs in all splits, genres and stem kinds; every third cover is of the album before."""
    for i in range(count):
        below = f"{('train', 'train', 'val', 'test')[i % 4]}/{GENRES[i % 3]}"
        album = i - (i % 5 == 1)
        add(root, below, stem(i, i % 3, album), jpeg(album), npy(vector(i, (None, 0, 1)[i % 3])),
            ".jpg__0.jpg" if i % 2 else ".jpg")
    return root


class Bomb:
    """Unpickling it leaves a trace."""

    def __reduce__(self):
        return os.system, ("touch /tmp/covergen_was_executed",)


def header_of_huge_png() -> bytes:
    """A PNG that claims 20,000 x 20,000 pixels."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + bytes(50)


def messy_pairs(root: Path) -> dict[str, str]:
    """Adds everything that goes wrong in real folders; returns {path of the bad file: reason}."""
    below, bad = "train/r&b", {}
    pickled = npy(np.zeros(DIMENSION, np.float32)).replace(b"'<f4'", b"'|O' ")[:128] + pickle.dumps(Bomb())
    infinite = vector(1)
    infinite[7] = np.inf
    missing = vector(2)
    missing[3] = np.nan
    covers = {
        "truncated image": jpeg(1)[:400], "not an image": b"<html>404</html>", "too many pixels": header_of_huge_png(),
        "empty file": b"", "wrong cover size": encoded(picture(3, (40, 40))),
    }
    vectors = {
        "wrong vector size": npy(vector(4)[:-1]), "not finite": npy(missing), "pickled vector": pickled,
        "truncated vector": npy(vector(5))[:-20], "not a .npy file": b"1.0, 2.0\n",
        "wrong vector type": npy(np.array(["a"])), "wrong vector shape": npy(np.ones((6, 10))),
    }
    for i, (reason, data) in enumerate(covers.items(), 500):
        add(root, below, stem(i, i % 3), data, npy(vector(i)))
        bad[f"audio-cover_dataset/cover/{below}/{stem(i, i % 3)}.jpg"] = reason
    for i, (reason, data) in enumerate([*vectors.items(), ("not finite", npy(infinite)),
                                        ("pickled vector", pickle.dumps(Bomb()))], 600):
        add(root, below, stem(i, i % 3), jpeg(i), data)
        bad[f"audio-cover_dataset/audio/{below}/{stem(i, i % 3)}.npy"] = reason
    add(root, below, stem(700, 0), jpeg(700), None)
    add(root, below, stem(701, 1), None, npy(vector(701)))
    add(root, below, stem(702, 0), encoded(picture(702), "PNG"), npy(vector(702)))  # a PNG named .jpg is valid
    add(root, below, stem(702, 0), jpeg(702), None, ".png")
    bad[f"audio-cover_dataset/cover/{below}/{stem(700, 0)}.jpg"] = "orphan cover"
    bad[f"audio-cover_dataset/audio/{below}/{stem(701, 1)}.npy"] = "orphan audio"
    bad[f"audio-cover_dataset/cover/{below}/{stem(702, 0)}.png"] = "duplicate stem"
    folder = root / "audio-cover_dataset/cover" / below
    for i, make in enumerate((Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/nowhere/at/all"),
                              lambda path: path.symlink_to("/dev/zero")), 800):
        add(root, below, stem(i, 0), None, npy(vector(i)))
        make(folder / f"{stem(i, 0)}.jpg")
        bad[f"audio-cover_dataset/cover/{below}/{stem(i, 0)}.jpg"] = "unreadable"
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "notes.txt").write_bytes(b"x")
    return bad


def add_truth(root: Path, names: list[tuple[str, str]]) -> None:
    """Writes what makes a folder a demo: ``demo.json``, and the truth of (genre, stem) of some training covers, of
    which each shows its own number."""
    genres, stems = zip(*names, strict=True)
    count = len(names)
    np.savez(root / "attributes.npz", stems=np.array(stems), genre=np.array(genres), split=np.array(["train"] * count),
             album=np.arange(count), attribute_names=np.array(["a"]), drawn=np.arange(count, dtype=np.float32)[:, None])
    (root / "demo.json").write_text("{}")


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


class Killed(BaseException):
    """Nothing may catch it, as nothing catches SIGKILL."""


def kill_before(patch: pytest.MonkeyPatch, step: int, names: Iterable[str]) -> None:
    """Makes the ``step``-th call of any of these functions of ``os`` raise ``Killed`` instead."""
    calls = itertools.count(1)

    def counted(function):
        def call(*args, **kwargs):
            if next(calls) == step:
                raise Killed
            return function(*args, **kwargs)
        return call

    for name in names:
        patch.setattr(os, name, counted(getattr(os, name)))
