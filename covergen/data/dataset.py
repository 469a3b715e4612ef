"""The samples of shards that ``shard_tools.pack`` wrote, by row of their index, in any order and from any thread."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from covergen.data.audio import AudioNormalizer
from covergen.data.batch import Batch
from covergen.data.corruption import CorruptionLog, Failures, replace_corrupt
from covergen.data.decoding import SampleReader
from covergen.data.sampling import rows_of_albums, stratified_rows
from covergen.data.shard_store import open_shard_store
from shard_tools.dataset.layout import UNKNOWN
from shard_tools.remote.index_cache import resolve
from shard_tools.shards.index import check_metadata, open_index, splits_in

COLUMN_BLOCK = 1_000_000  # rows


class ShardDataset:
    """One split of indexed shards.

    Attributes:
        root: folder of the shards, of a URL that of its index.
        identity: the same for the same samples.
        resolution: side of the covers in pixels; dimension: of the audio as packed, 0 without.
        samples: how many there are, see ``rows``.
        normalizer: of the audio, None without it.
        store, shards: where bytes of shards come from, and paths or URLs of the shards.
    """

    def __init__(self, root: str | Path, split: str, *, audio_scale: str = "standard",
                 album_subset: str = "all") -> None:
        """Args:
            root: folder or URL of the shards.
            split: ``train``, ``val`` or ``test``.
            audio_scale: kind of ``AudioNormalizer``.
            album_subset: whose albums ``rows`` are of, see ``rows_of_albums``.
        """
        self.root, self.split = resolve(root), split
        self.index = open_index(self.root, split)
        try:
            check_metadata(self.index.metadata, split)
        except ValueError as error:
            raise ValueError(f"{root}/{split}.index.json: {error}") from None
        self.metadata, self.resolution = self.index.metadata, self.index.metadata["resolution"]
        self.identity = self.metadata["self_sha256"]
        self.store, self.shards = open_shard_store(self.index)
        # None means all: no list of all rows is made, for there may be a billion.
        self.subset = None if album_subset == "all" else rows_of_albums(self.index.rows["group"], album_subset)
        self.samples = len(self.index.rows) if self.subset is None else len(self.subset)
        if not self.samples:
            raise ValueError(f"--album_subset {album_subset}: none of the {split} albums of {root} is among them; pack "
                             "more albums, or train with --album_subset all")
        audio = self.metadata["audio"]
        self.normalizer = AudioNormalizer(audio, audio_scale) if audio else None
        self.reader = SampleReader(self.index, self.store)
        self.dimension = self.reader.dimension

    @cached_property
    def rows(self) -> np.ndarray:
        """The rows of the index that belong to the album subset, ascending."""
        return np.arange(self.samples) if self.subset is None else self.subset

    def select(self, positions: np.ndarray) -> np.ndarray:
        """``rows[positions]``."""
        return positions if self.subset is None else self.subset[positions]

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Where given rows are in ``rows``."""
        return rows if self.subset is None else np.searchsorted(self.subset, rows)

    def column(self, name: str) -> np.ndarray:
        """A field of the index for all of ``rows``; no more than a block of the index stays in memory."""
        rows = self.index.rows
        values = np.empty(len(rows), rows.dtype[name])
        for start in range(0, len(rows), COLUMN_BLOCK):
            values[start:start + COLUMN_BLOCK] = rows[start:start + COLUMN_BLOCK][name]
            if mapped := getattr(rows, "_mmap", None):
                mapped.madvise(mmap.MADV_DONTNEED)
        return values if self.subset is None else values[self.subset]

    def read(self, rows: np.ndarray, log: CorruptionLog | None = None) -> Batch:
        """The samples of given rows ``[B]``; with a log, instead of a corrupt one the next that is not.

        Raises ValueError that names a corrupt one, or says that the log has too many.
        """
        cover, raw = self.reader.allocate_batch(len(rows))
        rows = self.replace_corrupt(rows, lambda rows, slots: self.reader.load(rows, slots, cover, raw), log)
        return self.label(rows, cover, torch.from_numpy(self.normalizer(raw)) if self.normalizer else None)

    def replace_corrupt(self, rows: np.ndarray, load: Callable[[np.ndarray, np.ndarray], Failures],
                        log: CorruptionLog | None) -> np.ndarray:
        """Rows that ``load`` could load, the next of ``rows`` for corrupt ones, see ``corruption.replace_corrupt``."""
        def following(rows: np.ndarray, _: np.ndarray) -> np.ndarray:
            return self.select((self.positions(rows) + 1) % self.samples)
        return replace_corrupt(rows, load, following, log, source=self.root)

    def label(self, rows: np.ndarray, cover: Tensor | None, audio: Tensor | None) -> Batch:
        """A batch of given covers and audio, with the genres and albums of their rows."""
        samples = self.index.rows[rows]
        return Batch(cover, audio, torch.from_numpy(samples["genre"].astype(np.int64)),
                     torch.from_numpy(samples["group"].copy()))

    def read_audio(self, rows: np.ndarray, log: CorruptionLog | None = None,
                   not_of: np.ndarray | None = None) -> Tensor:
        """Audio float32 ``[B, A]`` of given rows ``[B]``, all of which have a vector; for ``log`` see ``read``.

        ``not_of``: ``[B]`` albums that the tracks instead of corrupt ones must not be of.
        """
        raw = np.empty((len(rows), self.dimension), np.float32)
        self.replace_corrupt_audio(rows, lambda rows, slots: self.reader.read_audio(rows, slots, raw), log, not_of)
        return torch.from_numpy(self.normalizer(raw))

    def replace_corrupt_audio(self, rows: np.ndarray, load: Callable[[np.ndarray, np.ndarray], Failures],
                              log: CorruptionLog | None, not_of: np.ndarray | None) -> np.ndarray:
        """As ``replace_corrupt``, but the next that have audio and are of another album than the slot's ``not_of``."""
        def following(rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
            candidates, found = self._with_audio, []
            for row, slot in zip(rows, slots, strict=True):
                later = np.roll(candidates, -np.searchsorted(candidates, row, side="right"))
                if not_of is not None:
                    later = later[self.index.rows["group"][later] != not_of[slot]]
                found.append(later[0])
            return np.array(found)
        return replace_corrupt(rows, load, following, log, source=self.root)

    def genres(self, rows: np.ndarray) -> np.ndarray:
        """Genres of given rows, int64 ``[B]``; -1 for ``unknown``, which packing gives to files without a genre."""
        genres = self.index.rows["genre"][rows].astype(np.int64)
        nameless = [number for number, name in enumerate(self.metadata["genres"]) if name == UNKNOWN]
        return np.where(np.isin(genres, nameless), -1, genres)

    def examples(self, count: int) -> Batch:
        """At most ``count`` samples, always the same: one of every genre, in the genres' order, then further ones.

        Corrupt ones are left out, unless all of them are.
        """
        rows = np.array(stratified_rows(self.index.rows["genre"], count))
        failures = self.reader.load(rows, np.arange(len(rows)), *self.reader.allocate_batch(len(rows)))
        return self.read(np.delete(rows, list(failures)) if len(failures) < len(rows) else rows)

    def rows_with_audio(self) -> np.ndarray:
        """Those of ``rows`` that have a vector; ValueError if none has."""
        if not len(self._with_audio):
            raise ValueError(f"{self.root}: no sample of {self.split} has audio")
        return self._with_audio

    @cached_property
    def _with_audio(self) -> np.ndarray:
        return self.select(np.flatnonzero(self.column("audio_bytes")))


def open_split(root: str | Path, split: str, *, needed: bool, **options: Any) -> ShardDataset | None:
    """A split beside the one that is trained on, or None where the shards have none.

    One that is not needed may be incomplete, and counts as none then.
    """
    if split not in splits_in(resolve(root)):
        return None
    try:
        dataset = ShardDataset(root, split, **options)
    except ValueError:
        if needed:
            raise
        return None
    return dataset if dataset.metadata["samples"] else None
