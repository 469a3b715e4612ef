"""The true attributes of covers of demo data, by rows of an index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from covergen.data.dataset import ShardDataset
from shard_tools.core.errors import BadFileError
from shard_tools.core.files import file_sha256
from shard_tools.dataset.demo_truth import TRUTH, read_columns
from shard_tools.dataset.layout import make_key
from shard_tools.shards.tar import header_key

HEADER = 512  # bytes of a tar member's header, which lies before its data


@dataclass(frozen=True)
class Truth:
    """The truth of a demo, with one row for each of T tracks, and the SHA-256 of its file. ``values``, what the covers
    show (``drawn`` of the demo), are standardised with the mean and standard deviation of the training rows."""

    names: tuple[str, ...]
    mean: np.ndarray  # float32 [A], in the units of the demo
    std: np.ndarray
    values: np.ndarray  # float32 [T, A]
    row_of: dict[tuple[str, str, str], int]  # (split, genre, key of a sample) -> row
    digest: str

    def find(self, shards: ShardDataset, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the covers of rows ``[N]`` of an index show, standardised, float32 ``[N, A]``, zeros for those that are
        not in the truth; and which are in it, bool ``[N]``."""
        genres, split = shards.metadata["genres"], shards.index.split
        found = np.array([self.row_of.get((split, genres[row["genre"]], key_of(shards, row)), -1)
                          for row in shards.index.rows[rows]], np.int64)
        return np.where(found[:, None] >= 0, self.values[found], np.float32(0)), found >= 0

    def attributes(self, shards: ShardDataset, rows: np.ndarray) -> np.ndarray:
        """The same of rows that must all be in the truth; ValueError where one is not."""
        values, found = self.find(shards, rows)
        if not found.all():
            raise ValueError(f"{shards.index.root}/attributes.npz knows {found.sum():,} of {len(found):,} samples of "
                             f"{shards.index.split}: it is another demo's; pack the demo again, or delete that file")
        return values

    def by_name(self, values: Tensor) -> dict[str, float]:
        """One number an attribute ``[A]`` by its name, and their mean."""
        return dict(zip(self.names, values.tolist(), strict=True)) | {"mean": values.mean().item()}


def key_of(shards: ShardDataset, row: np.void) -> str:
    """The key of a sample, from the header before its cover's bytes, as the index has none; ValueError without one."""
    path, at = shards.shards[row["shard"]], int(row["cover_offset"])
    try:
        header = shards.store.read(int(row["shard"]), max(at - HEADER, 0), HEADER)
        return header_key(bytes(header), at, int(row["cover_bytes"]), ".jpg")
    except BadFileError as error:
        raise ValueError(f"{path}: {error.detail}; see shard_tools.verify --full") from None


def read_truth(root: str | Path) -> Truth | None:
    """The truth beside shards, which packing a demo leaves there; None where there is none, ValueError if damaged."""
    path = Path(root) / TRUTH
    if not path.exists():
        return None
    columns = read_columns(path)
    drawn = columns["drawn"].astype(np.float64)
    training = drawn[columns["split"] == "train"]
    training = training if len(training) else drawn
    mean, std = training.mean(0), training.std(0)
    std[std == 0] = 1
    row_of: dict[tuple[str, str, str], int] = {}
    names = zip(columns["split"].tolist(), columns["genre"].tolist(), columns["stems"].tolist(), strict=True)
    for row, (split, genre, stem) in enumerate(names):
        # Packing gives a stem that recurs in another genre of its split the second key.
        for key in (make_key(stem), make_key(stem, f"{genre}/{stem}")):
            row_of[split, genre, key] = row
    return Truth(tuple(columns["attribute_names"].tolist()), mean.astype(np.float32), std.astype(np.float32),
                 ((drawn - mean) / std).astype(np.float32), row_of, file_sha256(path))
