"""The songs of an evaluation: which are chosen, and what is read of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from covergen.data.batch import downscale
from covergen.data.dataset import ShardDataset
from covergen.data.sampling import rows_of_albums

BATCH = 512  # rows that are read together


@dataclass(frozen=True)
class Songs:
    """One track of each of N albums."""

    rows: np.ndarray  # of the split's index, [N]
    raw: np.ndarray | None  # audio float32 [N, D], as it lies in shards; None where they have none
    covers: Tensor  # uint8 [N, 3, R, R] at the run's resolution
    genres: np.ndarray  # [N], positions in the sorted list, -1 for unknown
    groups: np.ndarray  # [N], albums

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def strata(self) -> np.ndarray:
        """Genres ``[N]`` where a song of unknown genre is alone in its own."""
        return np.where(self.genres >= 0, self.genres, -1 - np.arange(len(self)))


def cover_batches(shards: ShardDataset, rows: np.ndarray, resolution: int) -> Iterator[Tensor]:
    """Covers of given rows, uint8 ``[<= BATCH, 3, R, R]`` each."""
    for start in range(0, len(rows), BATCH):
        yield downscale(shards.read(rows[start:start + BATCH]).cover, resolution)


def read_audio(shards: ShardDataset, rows: np.ndarray) -> np.ndarray:
    """Audio of given rows, all of which have some, float32 ``[N, S]`` as the shards were opened."""
    parts = [shards.read_audio(rows[start:start + BATCH]) for start in range(0, len(rows), BATCH)]
    return torch.cat(parts).numpy()


def read_songs(shards: ShardDataset, rows: np.ndarray, resolution: int) -> Songs:
    """The songs of given rows of shards that were opened with raw audio."""
    return Songs(rows, read_audio(shards, rows) if shards.dimension else None,
                 torch.cat(list(cover_batches(shards, rows, resolution))), shards.genres(rows),
                 shards.index.rows["group"][rows])


def choose_songs(shards: ShardDataset, count: int, seed: int, albums: str = "all") -> np.ndarray:
    """Rows ``[<= count]``: one track, drawn at random, of each of so many albums (see ``rows_of_albums``)."""
    rows = rows_of_albums(shards.index.rows["group"], albums)
    if shards.dimension:
        rows = rows[shards.index.rows["audio_bytes"][rows] > 0]
    rows = np.random.default_rng(seed).permutation(rows)
    first = np.unique(shards.index.rows["group"][rows], return_index=True)[1]
    return rows[np.sort(first)][:count]


def mismatched_pairing(groups: np.ndarray, seed: int, genres: np.ndarray | None = None) -> np.ndarray:
    """For each of N songs another one ``[N]`` of another album, where given of the same genre (-1: there is none)."""
    draws, chosen = np.random.default_rng(seed), np.full(len(groups), -1)
    for song in range(len(groups)):
        allowed = groups != groups[song]
        if genres is not None:
            allowed &= genres == genres[song]
        if allowed.any():
            chosen[song] = draws.choice(np.flatnonzero(allowed))
    return chosen
