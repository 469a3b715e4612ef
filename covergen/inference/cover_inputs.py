"""Covers for an opened run: shards or a folder of pictures in; covers of its size and the audio that it hears out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from covergen.data.batch import Batch, downscale
from covergen.data.dataset import ShardDataset
from covergen.data.sampling import stratified_rows
from covergen.inference.trained_model import TrainedModel
from shard_tools.cli import nearest
from shard_tools.core.errors import BadFileError
from shard_tools.dataset import images as codec
from shard_tools.dataset.layout import COVERS, read_name
from shard_tools.dataset.source import Entry, read_entry
from shard_tools.remote.index_cache import resolve
from shard_tools.shards.index import splits_in

AT_ONCE = 512  # samples read together
NAMED = 5  # pictures that an error names


def find_split(run: TrainedModel, shards: str | None, split: str | None, preferred: Sequence[str]) -> tuple[str, str]:
    """The folder of shards and the split to use: as given, else the run's own and the first preferred that is there.

    Raises:
        ValueError: no shards there, or not that split (says which there are).
    """
    root = shards or run.metadata.get("shards")
    root = root and resolve(root)
    have = list(splits_in(root)) if root else []
    if not have:
        if shards:
            raise ValueError(f"--shards {shards}: no shards with an index there; make them with shard_tools.pack")
        raise ValueError(f"the shards that {run.folder} was trained on ({root or 'not recorded'}) are not here; say "
                         "where covers are with --shards DIR")
    chosen = split or next((name for name in preferred if name in have), None)
    if chosen not in have:
        raise ValueError(f"{root} has no {chosen or ' or '.join(preferred)} split; it has {', '.join(have)}")
    return str(root), chosen


class Samples:
    """One split of shards as a run sees it.

    Attributes:
        split: its name.
        rows: of the index, ``[N]``.
        genres: names by the rows' genre.
    """

    def __init__(self, run: TrainedModel, root: str, split: str) -> None:
        """Opens the split.

        Raises:
            ValueError, FileNotFoundError: no such split, covers smaller than the run's, or not the audio it hears.
        """
        shards = ShardDataset(root, split, audio_scale="raw")
        if shards.resolution < run.resolution:
            raise ValueError(f"{root} has covers of {shards.resolution} px; {run.folder} needs {run.resolution} px")
        if run.model.conditional and shards.dimension != run.normalizer.dimension:
            has = f"vectors of {shards.dimension} numbers" if shards.dimension else "no audio"
            raise ValueError(f"{root} has {has}; {run.folder} hears {run.normalizer.dimension} numbers")
        self.run, self.shards, self.split = run, shards, split
        self.rows, self.genres = shards.index.rows, shards.metadata["genres"]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Samples of given rows: covers at the run's resolution; audio scaled as the run was trained, or None."""
        batch = self.shards.read(np.asarray(rows, np.int64))
        audio = torch.from_numpy(self.run.normalizer(batch.audio.numpy())) if self.run.model.conditional else None
        return batch._replace(cover=downscale(batch.cover, self.run.resolution), audio=audio)

    def blocks(self, rows: Sequence[int] | np.ndarray) -> Iterator[Batch]:
        """The same in blocks, so that memory is bounded."""
        for start in range(0, len(rows), AT_ONCE):
            yield self.read(rows[start:start + AT_ONCE])

    def varied(self, count: int) -> list[int]:
        """At most ``count`` rows, always the same, of as many genres as there are."""
        return stratified_rows(self.rows["genre"], count)

    def distinct(self) -> np.ndarray:
        """A row of every cover, in the order of the index: tracks of one album share theirs."""
        return np.sort(np.unique(self.rows["cover_hash"], return_index=True)[1])

    def rows_with_audio(self) -> np.ndarray:
        """The rows that have a vector; ValueError if none has."""
        return self.shards.rows_with_audio()

    def of_genres(self, names: Sequence[str] | None, rows: np.ndarray) -> np.ndarray:
        """Those of the rows that are of the genres named, or all of them.

        Raises:
            ValueError: a genre that isn't there (names the nearest), or that no row has.
        """
        if not names:
            return rows
        chosen = []
        for name in map(str.strip, names):
            if name not in self.genres:
                raise ValueError(f"--genres: {self.shards.index.root} has no {name!r}, {nearest(name, self.genres)}")
            chosen.append(self.genres.index(name))
            if chosen[-1] not in self.rows["genre"][rows]:
                raise ValueError(f"--genres: {self.split} of {self.shards.index.root} has no sample of {name!r}")
        return rows[np.isin(self.rows["genre"][rows], chosen)]


class Pictures:
    """The pictures of a folder, in the order of their file names, at a run's resolution."""

    def __init__(self, run: TrainedModel, folder: str, count: int = 0) -> None:
        """Reads the first ``count`` pictures, or all (0).

        A picture of the run's size stays pixel by pixel as it was decoded; any other is cropped to its centre and
        resized (Lanczos), as shards are packed.

        Raises:
            ValueError: no such folder, no picture in it, or pictures that can't be read (names them).
        """
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(f"--images {folder}: no such folder")
        names = sorted(path.name for path in root.iterdir() if read_name(path.name)[1] in COVERS)
        if not names:
            raise ValueError(f"--images {folder}: no picture in that folder ({', '.join(sorted(COVERS))})")
        self.names, bad = names[:count or None], []
        self.covers = torch.empty(len(self.names), 3, run.resolution, run.resolution, dtype=torch.uint8)
        for place, name in enumerate(self.names):
            try:
                pixels = codec.read_cover(read_entry(root, Entry(name, -1, 0), codec.COVER_BYTES))
                self.covers[place] = torch.from_numpy(fit(pixels, run.resolution)).permute(2, 0, 1)
            except BadFileError as error:
                bad.append(f"{name} ({error.reason})")
        if bad:
            more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
            raise ValueError(f"--images {folder}: {len(bad)} of {len(self.names)} pictures can't be read: "
                             f"{', '.join(bad[:NAMED])}{more}")

    def __len__(self) -> int:
        return len(self.covers)

    def read(self, rows: Sequence[int]) -> Batch:
        """Pictures by their places; they have no audio, genre or album."""
        return Batch(self.covers[list(rows)], None, None, None)

    def blocks(self, rows: Sequence[int]) -> Iterator[Batch]:
        """The same in blocks."""
        for start in range(0, len(rows), AT_ONCE):
            yield self.read(rows[start:start + AT_ONCE])


def fit(pixels: np.ndarray, side: int) -> np.ndarray:
    """uint8 ``[H, W, 3]`` to ``[side, side, 3]``: the very same where it has that size, else as packing crops and
    resizes covers."""
    return np.array(codec.to_square(Image.fromarray(pixels), side))
