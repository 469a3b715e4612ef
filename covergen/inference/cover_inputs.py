"""Covers for a trained model, from shards or from a folder of pictures, at its resolution."""

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
from covergen.runs.folder import check_fit
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
    """The folder of shards and the split to use: as given, else the run's own and the first preferred that is there."""
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


class _Covers:
    """Samples that ``read`` gives for rows; ``blocks`` gives them in parts, so that memory is bounded."""

    def blocks(self, rows: Sequence[int] | np.ndarray) -> Iterator[Batch]:
        return (self.read(rows[start:start + AT_ONCE]) for start in range(0, len(rows), AT_ONCE))


class DatasetCovers(_Covers):
    """The samples of one split of shards for a model: covers at its resolution, audio normalised as in its training.

    ``rows`` are those of the index, ``genres`` the names of their genres.
    """

    def __init__(self, run: TrainedModel, root: str, split: str) -> None:
        self.dataset = ShardDataset(root, split, audio_scale="raw")
        check_fit(run.folder, run.metadata, root, self.dataset.metadata, audio=run.model.conditional)
        self.run, self.split = run, split
        self.rows, self.genres = self.dataset.index.rows, self.dataset.metadata["genres"]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Samples of given rows; audio is None unless the model is conditioned on it."""
        batch = self.dataset.read(np.asarray(rows, np.int64))
        audio = torch.from_numpy(self.run.normalizer(batch.audio.numpy())) if self.run.model.conditional else None
        return batch._replace(cover=downscale(batch.cover, self.run.resolution), audio=audio)

    def stratified(self, count: int) -> list[int]:
        """At most ``count`` rows, always the same, of as many genres as there are."""
        return stratified_rows(self.rows["genre"], count)

    def distinct(self) -> np.ndarray:
        """A row of every cover, in the order of the index: tracks of one album share theirs."""
        return np.sort(np.unique(self.rows["cover_hash"], return_index=True)[1])

    def of_genres(self, names: Sequence[str] | None, rows: np.ndarray) -> np.ndarray:
        """Those of the rows that are of the genres named, each of which must have some; without names all of them."""
        if not names:
            return rows
        chosen = []
        for name in map(str.strip, names):
            if name not in self.genres:
                raise ValueError(f"--genres: {self.dataset.root} has no {name!r}, {nearest(name, self.genres)}")
            chosen.append(self.genres.index(name))
            if chosen[-1] not in self.rows["genre"][rows]:
                raise ValueError(f"--genres: {self.split} of {self.dataset.root} has no sample of {name!r}")
        return rows[np.isin(self.rows["genre"][rows], chosen)]


class FolderCovers(_Covers):
    """The pictures of a folder, in the order of their file names, at a model's resolution."""

    def __init__(self, run: TrainedModel, folder: str, count: int = 0) -> None:
        """Reads the first ``count`` pictures, or all (0), and names those that can't be read in a ValueError.

        A picture of the model's size stays as it was decoded; others are cropped and resized, as shards are packed.
        """
        root, side = Path(folder), run.resolution
        if not root.is_dir():
            raise ValueError(f"--images {folder}: no such folder")
        names = sorted(path.name for path in root.iterdir() if read_name(path.name)[1] in COVERS)
        if not names:
            raise ValueError(f"--images {folder}: no picture in that folder ({', '.join(sorted(COVERS))})")
        self.names, bad = names[:count or None], []
        self.covers = torch.empty(len(self.names), 3, side, side, dtype=torch.uint8)
        for cover, name in zip(self.covers, self.names, strict=True):
            try:
                pixels = codec.read_cover(read_entry(root, Entry(name, -1, 0), codec.COVER_BYTES))
                cover.copy_(torch.from_numpy(np.array(codec.to_square(Image.fromarray(pixels), side))).permute(2, 0, 1))
            except BadFileError as error:
                bad.append(f"{name} ({error.reason})")
        if bad:
            more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
            raise ValueError(f"--images {folder}: {len(bad)} of {len(self.names)} pictures can't be read: "
                             f"{', '.join(bad[:NAMED])}{more}")

    def __len__(self) -> int:
        return len(self.covers)

    def read(self, rows: Sequence[int]) -> Batch:
        """Pictures by their number; they have no audio, genre or album."""
        return Batch(self.covers[list(rows)], None, None, None)
