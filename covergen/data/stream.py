"""Streams of global batches, of which every rank reads its part: batch ``k`` depends on shards, seed and ``k`` alone.

Shards without an index are streamed by ``covergen.data.webdataset``.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from covergen.data.batch import Batch
from covergen.data.corruption import CorruptionLog
from covergen.data.dataset import ShardDataset
from covergen.data.sampling import (
    MismatchedAudioSampler,
    WindowMismatchedAudioSampler,
    WindowOrder,
    make_order,
    rank_slice,
    shard_bounds,
    window_at,
)
from shard_tools.remote.index_cache import resolve

if TYPE_CHECKING:  # whoever has an index needs no webdataset
    from covergen.data.webdataset import WebDatasetStream

ORDER_BLOCK = 4096  # positions whose rows are found together: one call orders the samples of many small batches


Stream: TypeAlias = "BatchStream | WebDatasetStream"


class BatchStream:
    """The endless stream of global batches of a dataset, of which this rank reads its part.

    Attributes (those of ``WebDatasetStream`` too):
        dataset: that it reads, None without an index.
        samples: of the data; epoch: samples in an epoch, 0 if unknown.
        resolution, normalizer, identity: as of ``ShardDataset``; metadata: as in an index (samples, genres, audio).
        pure: whether batches may be asked for in any order and from several threads.
        notice: what people should know of it, or None.
        corruption: samples that were replaced because they can't be read.
    """

    pure, notice = True, None

    def __init__(self, dataset: ShardDataset, *, batch_size: int, seed: int = 0, order: str = "sample",
                 window: int | None = None, rank: int = 0, ranks: int = 1, max_corrupt: float = 0.0) -> None:
        """Args:
            dataset: whose samples are read.
            batch_size: of the global batch, which the ranks share as evenly as can be.
            seed: of the order and of mismatched pairs.
            order: ``sample``, every sample once an epoch, or ``group``, every album once with a random track.
            window: shards that are mixed, 0 for all; None by the rule of ``shards_mixed``.
            rank, ranks: this process, and how many there are.
            max_corrupt: largest share of samples that may be replaced because they can't be read.
        """
        self.dataset, self.metadata, self.identity = dataset, dataset.metadata, dataset.identity
        self.samples, self.resolution, self.normalizer = dataset.samples, dataset.resolution, dataset.normalizer
        self.batch_size, self.seed, self.mismatch_sampler = batch_size, seed, None
        self.part = rank_slice(batch_size, rank, ranks) or range(1)  # a rank without a share reads what does not count
        groups = dataset.column("group") if order == "group" else None
        self.order = make_order(self.metadata, self.samples, dataset.subset, groups, seed, window)
        self.epoch, self.corruption = self.order.size, CorruptionLog(max_corrupt, self.samples)
        self._ordered = lru_cache(maxsize=8)(
            lambda block: self.order(np.arange(block * ORDER_BLOCK, (block + 1) * ORDER_BLOCK)))
        largest = self.order.shards if isinstance(self.order, WindowOrder) else len(dataset.shards)
        dataset.store.set_order(
            lambda position: window_at(self.order, dataset.subset, self.metadata, position), largest)

    def positions(self, number: int) -> np.ndarray:
        """Positions in the endless stream of this rank's part of a global batch."""
        return number * self.batch_size + np.arange(self.part.start, self.part.stop)

    def rows(self, number: int) -> np.ndarray:
        """Rows of the index of this rank's part of a global batch."""
        positions = self.positions(number)
        self.dataset.store.advance(number * self.batch_size, self.batch_size)
        blocks = range(positions[0] // ORDER_BLOCK, positions[-1] // ORDER_BLOCK + 1)
        ordered = np.concatenate([self._ordered(block) for block in blocks])
        return self.dataset.select(ordered[positions - blocks.start * ORDER_BLOCK])

    def batch(self, number: int) -> Batch:
        """This rank's part of a global batch."""
        batch = self.dataset.read(self.rows(number), self.corruption)
        if self.mismatch_sampler is None:
            return batch
        groups = batch.group.numpy()
        others = self.rows_with_audio[self.mismatch_sampler(self.positions(number), groups, batch.genre.numpy())]
        return batch._replace(mismatched=self.dataset.read_audio(others, self.corruption, not_of=groups))

    def examples(self, count: int) -> Batch:
        """See ``ShardDataset.examples``."""
        return self.dataset.examples(count)

    def mismatch(self) -> None:
        """From now on batches also hold audio that does not belong to their covers, see ``MismatchedAudioSampler``."""
        self.rows_with_audio = self.dataset.rows_with_audio()
        with_audio = self.dataset.positions(self.rows_with_audio)
        groups, genres = (self.dataset.column(name)[with_audio] for name in ("group", "genre"))

        def sampler(positions: np.ndarray | slice) -> MismatchedAudioSampler:
            return MismatchedAudioSampler(groups[positions], genres[positions], self.seed)
        self.mismatch_sampler = (
            WindowMismatchedAudioSampler(self.order, shard_bounds(self.metadata, self.rows_with_audio), sampler)
            if isinstance(self.order, WindowOrder) else sampler(slice(None)))

    def ends(self, position: int) -> None:
        """Shards that are needed from this position of the stream on are not fetched ahead."""
        self.dataset.store.last = position


class SequentialBatches:
    """One pass over a dataset in its own order: batch k is this rank's part of the k-th global batch, the last smaller.

    Together the ranks read every sample exactly once, whatever their number. ``batches`` are in the pass.
    """

    pure = True

    def __init__(self, dataset: ShardDataset, batch_size: int, rank: int = 0, ranks: int = 1) -> None:
        self.dataset, self.batch_size, self.rank, self.ranks = dataset, batch_size, rank, ranks
        self.batches = -(-dataset.samples // batch_size)

    def offsets(self, number: int) -> np.ndarray:
        """Where this rank's samples are in a global batch; nowhere when there are fewer samples than ranks."""
        size = min(self.batch_size, max(0, self.dataset.samples - number * self.batch_size))
        return np.array_split(np.arange(size), self.ranks)[self.rank]

    def batch(self, number: int) -> Batch:
        """This rank's part of a global batch; a sample that is not its own where it has none."""
        positions = number * self.batch_size + self.offsets(number)
        return self.dataset.read(self.dataset.select(positions if len(positions) else np.zeros(1, np.int64)))


def open_stream(root: str | Path, split: str, *, audio_scale: str = "standard", album_subset: str = "all",
                window: int | None = None, **options: Any) -> Stream:
    """The stream over a folder (or URL) of shards: by index where there is one, else as ``WebDatasetStream``.

    Options are those of ``ShardDataset`` and ``BatchStream``. FileNotFoundError: no such folder, or no shards in it.
    """
    folder = resolve(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"--shards {root}: no such folder")
    if any(folder.glob("*.index.json")) or (folder / ".pack").exists():
        dataset = ShardDataset(root, split, audio_scale=audio_scale, album_subset=album_subset)
        return BatchStream(dataset, window=window, **options)
    from covergen.data.webdataset import WebDatasetStream
    return WebDatasetStream(root, split, audio_scale=audio_scale, album_subset=album_subset, **options)
