"""Albums to split: a folder in; a data set of small real files that is not yet split, and where its files went, out."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from shard_tools.dataset.layout import Candidate, album_of, open_layout
from shard_tools.dataset.source import open_source
from shard_tools.split import split
from tests.support import raw_data


def cover(number: int) -> bytes:
    """A picture that resembles no other."""
    noise = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return raw_data.encoded(Image.fromarray(noise).resize((48, 48), Image.Resampling.BICUBIC), quality=90)


def add(root: Path, genre: str, number: int, album: int, picture: bytes | None = None, kind: int = 0,
        suffix: str = ".jpg") -> str:
    """A track of an album in a data set that is not yet split; returns its stem."""
    stem = raw_data.stem(number, kind, album)
    for part, data, ending in (("cover", picture or cover(album), suffix),
                               ("audio", raw_data.npy(raw_data.vector(number)), ".npy")):
        path = root / part / genre / (stem + ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return stem


def make(root: Path, first: int = 0, last: int = 130) -> Path:
    """Albums of two tracks in two genres: of metal every second one."""
    for album in range(first, last):
        for track in range(2):
            add(root, ("metal", "new_age")[album % 2], 2 * album + track, album)
    return root


def run(source: Path, out: Path, **options) -> int:
    return split(str(source), str(out), **({"workers": 1} | options))


def places(out: Path) -> dict[tuple[str, str], str]:
    """{(genre, stem): split} of a data set."""
    listing = list(open_layout(open_source(out)))
    assert all(isinstance(item, Candidate) for item in listing)
    return {(item.genre, item.cover.name.partition(".")[0]): item.split for item in listing}


def albums(out: Path) -> dict[str, set[str]]:
    """The splits that each album is in."""
    found = defaultdict(set)
    for (_, stem), name in places(out).items():
        found[album_of(stem)].add(name)
    return found
