"""From shards to batches: the batch for a place in the stream as a pure function of (shards, seed, place).

Shards with an index are read by offset, every rank its slice of every global batch; a few threads read and decode
ahead (decoding releases the interpreter lock, and threads save the copies that worker processes make). Foreign shards
without an index are streamed through the ``webdataset`` package, in ``covergen.data.webdataset``.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from covergen.data.audio import AudioNormalizer
from covergen.data.batch import Batch, Stream
from covergen.data.corruption import CorruptionLog, replace_corrupt
from covergen.data.decoding import Failures, SampleReader
from covergen.data.sampling import (
    MismatchedAudioSampler,
    WindowMismatchedAudioSampler,
    WindowOrder,
    album_subset,
    keys,
    make_order,
    rank_slice,
    scramble,
    shard_bounds,
    stratified_rows,
    window_at,
)
from covergen.data.shard_store import open_shard_store
from shard_tools.dataset.layout import UNKNOWN
from shard_tools.remote.index_cache import resolve
from shard_tools.shards.index import check_metadata, open_index, splits_in

ORDER_BLOCK = 4096
COLUMN_BLOCK = 1_000_000  # rows


class ShardDataset:
    """Shards that ``shard_tools.pack`` wrote, cut into global batches of which this rank reads its slice."""

    pure, notice = True, None

    def __init__(self, root: str | Path, split: str, *, batch_size: int, seed: int = 0, order: str = "sample",
                 audio_scale: str = "standard", albums: str = "all", window: int | None = None, rank: int = 0,
                 ranks: int = 1, max_corrupt: float = 0.0) -> None:
        """Args:
            root: folder or URL of the shards.
            split: ``train``, ``val`` or ``test``.
            batch_size: of the global batch, over all ranks.
            seed: of the order and of mismatched pairs.
            order: ``sample``, every sample once an epoch, or ``group``, every album once with a random track.
            audio_scale: kind of ``AudioNormalizer``.
            albums: of whom batches are, see ``album_subset``.
            window: shards that are mixed, 0 for all; None by the rule of ``shards_mixed``.
            rank: this process among ``ranks``.
            ranks: how many there are; they share a batch as evenly as can be.
            max_corrupt: largest share of samples that ``batch`` may replace because they can't be read.
        """
        self.batch_size, self.rank, self.ranks = batch_size, rank, ranks
        places = rank_slice(batch_size, rank, ranks) or range(1)  # a rank without a share reads what does not count
        self.first, self.share = places.start, len(places)
        self.index = open_index(resolve(root), split)
        try:
            check_metadata(self.index.metadata, split)
        except ValueError as error:
            raise ValueError(f"{root}/{split}.index.json: {error}") from None
        self.metadata, self.resolution = self.index.metadata, self.index.metadata["resolution"]
        self.identity = self.metadata["self_sha256"]
        rows = self.index.rows
        self.store, self.shards = open_shard_store(self.index)
        self.some = None if albums == "all" else album_subset(rows["group"], albums)  # no list of all rows is built
        self.samples = len(rows) if self.some is None else len(self.some)
        if not self.samples:
            raise ValueError(f"--album_subset {albums}: none of the {split} albums of {root} is among them; pack more "
                             "albums, or train with --album_subset all")
        groups = self._column("group") if order == "group" else None
        self.order = make_order(self.metadata, self.samples, self.some, groups, seed, window)
        self.seed, self.mismatch_sampler = seed, None
        self.epoch, self.corruption = self.order.size, CorruptionLog(max_corrupt, self.samples)
        # One vectorised call orders the samples of many small batches.
        self._ordered = lru_cache(maxsize=8)(
            lambda block: self.order(np.arange(block * ORDER_BLOCK, (block + 1) * ORDER_BLOCK)))
        audio = self.metadata["audio"]
        self.scale = AudioNormalizer(audio, audio_scale) if audio else None
        self.reader = SampleReader(self.index, self.store)
        self.dimension = self.reader.dimension

    def rows(self, number: int) -> np.ndarray:
        """This rank's rows ``[batch_size / ranks]`` of the global batch with this number."""
        share = self.share
        start = number * self.batch_size + self.first
        self.store.advance(number * self.batch_size, self.batch_size)
        blocks = range(start // ORDER_BLOCK, (start + share - 1) // ORDER_BLOCK + 1)
        first = start - blocks.start * ORDER_BLOCK
        return self._chosen(np.concatenate([self._ordered(block) for block in blocks])[first : first + share])

    def positions(self, number: int) -> np.ndarray:
        """Places in the endless stream of this rank's part of a global batch."""
        return number * self.batch_size + self.first + np.arange(self.share)

    def _chosen(self, places: np.ndarray) -> np.ndarray:
        return places if self.some is None else self.some[places]

    def _column(self, name: str) -> np.ndarray:
        """One field of all rows that are read, of whose index no more than a block stays in memory."""
        rows = self.index.rows
        found = np.empty(len(rows), rows.dtype[name])
        for start in range(0, len(rows), COLUMN_BLOCK):
            found[start:start + COLUMN_BLOCK] = rows[start:start + COLUMN_BLOCK][name]
            if mapped := getattr(rows, "_mmap", None):
                mapped.madvise(mmap.MADV_DONTNEED)
        return found if self.some is None else found[self.some]

    @cached_property
    def chosen(self) -> np.ndarray:
        """The rows that are read, in the order of the index."""
        return np.arange(self.samples) if self.some is None else self.some

    def mismatch(self) -> None:
        """From now on batches also hold audio that does not belong to their covers, see ``MismatchedAudioSampler``."""
        audible = self._column("audio_bytes") > 0
        self.audible_ones = self._chosen(np.flatnonzero(audible))
        groups, genres = self._column("group")[audible], self._column("genre")[audible]
        self.mismatch_sampler = (WindowMismatchedAudioSampler(self.order, shard_bounds(self.metadata, self.audible_ones),
                                        lambda places: MismatchedAudioSampler(groups[places], genres[places], self.seed))
                         if isinstance(self.order, WindowOrder) else MismatchedAudioSampler(groups, genres, self.seed))

    def ends(self, position: int) -> None:
        """Shards that are needed from this position of the stream on are not fetched ahead."""
        self.store.last = position

    def read(self, rows: np.ndarray) -> Batch:
        """The samples of given rows ``[B]``; safe from many threads.

        Raises:
            ValueError: names a damaged one.
        """
        cover, raw = self.reader.allocate_batch(len(rows))
        for failure in self.reader.load(rows, np.arange(len(rows)), cover, raw).values():
            raise ValueError(f"{self.index.root}/{failure} (shard_tools.verify --full {self.index.root} names all)")
        return self.labelled(rows, cover, raw)

    def labelled(self, rows: np.ndarray, cover: Tensor, raw: np.ndarray) -> Batch:
        """A batch of the covers and raw vectors of given rows."""
        samples = self.index.rows[rows]
        return Batch(cover, torch.from_numpy(self.scale(raw)) if self.scale else None,
                     torch.from_numpy(samples["genre"].astype(np.int64)), torch.from_numpy(samples["group"].copy()))

    def hear(self, rows: np.ndarray) -> Tensor:
        """The audio alone of given rows ``[B]``, all of which have a vector; ValueError names a damaged one."""
        raw = np.empty((len(rows), self.dimension), np.float32)
        for failure in self.reader.read_audio(rows, np.arange(len(rows)), raw).values():
            raise ValueError(f"{self.index.root}/{failure} (shard_tools.verify --full {self.index.root} names all)")
        return torch.from_numpy(self.scale(raw))

    def genres(self, rows: np.ndarray) -> np.ndarray:
        """Genres of given rows, int64 ``[B]``; -1 for ``unknown``, which packing gives to files without a genre."""
        genres = self.index.rows["genre"][rows].astype(np.int64)
        nameless = [number for number, name in enumerate(self.metadata["genres"]) if name == UNKNOWN]
        return np.where(np.isin(genres, nameless), -1, genres)

    def batch(self, number: int) -> Batch:
        """This rank's part of a global batch, in which sound samples have taken the places of damaged ones."""
        positions, (cover, raw) = self.positions(number), self.reader.allocate_batch(self.share)
        rows = self.sound(positions, self.rows(number), lambda rows, slots: self.reader.load(rows, slots, cover, raw))
        batch = self.labelled(rows, cover, raw)
        if self.mismatch_sampler is None:
            return batch
        raw = np.empty_like(raw)
        self.others(positions, rows, lambda rows, slots: self.reader.read_audio(rows, slots, raw))
        return batch._replace(mismatched=torch.from_numpy(self.scale(raw)))

    def sound(self, positions: np.ndarray, rows: np.ndarray,
              load: Callable[[np.ndarray, np.ndarray], Failures]) -> np.ndarray:
        """Rows of which every one could be read, those given except for damaged ones; others depend on the place alone.

        Args: positions, rows: ``[B]`` of a batch; load: reads rows into slots and tells which failed.

        Raises:
            ValueError: too many are damaged.
        """
        def another(slots: np.ndarray, attempt: int) -> np.ndarray:
            key = keys("damaged", self.seed, attempt, count=1)
            draws = scramble(scramble(positions[slots].astype(np.uint64)) + key)
            return self._chosen((draws % np.uint64(self.samples)).astype(np.int64))
        return replace_corrupt(rows, load, another, self.corruption)

    def others(self, positions: np.ndarray, rows: np.ndarray,
               listen: Callable[[np.ndarray, np.ndarray], Failures]) -> np.ndarray:
        """Rows of other albums, whose audio does not belong to the covers of the rows given; likewise."""
        groups, genres = (self.index.rows[name][rows] for name in ("group", "genre"))

        def another(slots: np.ndarray, attempt: int) -> np.ndarray:
            places = positions[slots] + (attempt << 48)  # even: a place keeps or ignores the genre as before
            return self.audible_ones[self.mismatch_sampler(places, groups[slots], genres[slots].astype(np.int64))]
        return replace_corrupt(another(np.arange(len(rows)), 0), listen, another, self.corruption)

    def examples(self, count: int) -> Batch:
        """At most ``count`` samples, always the same: one of every genre, in the genres' order, then further ones.

        Damaged ones are left out, unless all of them are.
        """
        rows = np.array(stratified_rows(self.index.rows["genre"], count))
        damaged = self.reader.load(rows, np.arange(len(rows)), *self.reader.allocate_batch(len(rows)))
        return self.read(np.delete(rows, list(damaged)) if len(damaged) < len(rows) else rows)

    def audible(self) -> np.ndarray:
        """The rows that have a vector; ValueError if none has."""
        rows = np.flatnonzero(self.index.rows["audio_bytes"])
        if not len(rows):
            raise ValueError(f"{self.index.root}: no sample of {self.index.split} has audio")
        return rows


def open_split(root: str | Path, split: str, *, needed: bool, **options: Any) -> ShardDataset | None:
    """A split beside the one that is trained on, in its own order, or None where the shards have none.

    One that is not needed may be incomplete, and counts as none then.
    """
    if split not in splits_in(resolve(root)):
        return None
    try:
        found = ShardDataset(root, split, **options)
    except ValueError:
        if needed:
            raise
        return None
    return found if found.metadata["samples"] else None


def open_stream(root: str | Path, split: str, **options: Any) -> Stream:
    """The stream over a folder (or URL) of shards: by index where there is one, else as foreign shards.

    Raises:
        FileNotFoundError: no such folder, or no shards in it.
    """
    folder, window = resolve(root), options.pop("window", None)
    if not folder.is_dir():
        raise FileNotFoundError(f"--shards {root}: no such folder")
    if any(folder.glob("*.index.json")) or (folder / ".pack").exists():
        stream = ShardDataset(root, split, window=window, **options)
        largest = stream.order.shards if isinstance(stream.order, WindowOrder) else len(stream.shards)
        stream.store.set_order(lambda at: window_at(stream.order, stream.some, stream.metadata, at), largest)
        return stream
    from covergen.data.webdataset import WebDatasetStream
    return WebDatasetStream(root, split, **options)
