"""From shards to batches: the batch for a place in the stream as a pure function of (shards, seed, place).

Shards with an index are read by offset, every rank its slice of every global batch; a few threads read and decode
ahead (decoding releases the interpreter lock, and threads save the copies that worker processes make). Foreign shards
without an index are streamed through the ``webdataset`` package, in ``covergen.runtime.foreign``.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from covergen.runtime.order import GroupOrder, Partners, SampleOrder, of_albums
from covergen.runtime.reading import decode
from covergen.runtime.scale import AudioScale
from covergen.runtime.shelf import LocalShelf
from shard_tools.formats import codec
from shard_tools.formats.facts import check_facts
from shard_tools.formats.index import open_index, splits_in
from shard_tools.formats.layout import UNKNOWN

ORDER_BLOCK = 4096
MOST = codec.COVER_BYTES + codec.VECTOR_BYTES + 2 * 512  # bytes of a sample
PLACE = ("shard", "cover_offset", "cover_bytes", "audio_offset", "audio_bytes")  # where a sample lies


class Batch(NamedTuple):
    """One rank's part of a global batch.

    cover: uint8 ``[B, 3, R, R]``; audio: float32 ``[B, A]`` as ``AudioScale`` gives it, or None; genre:
    int64 ``[B]``, position in the sorted list of genres; group: int64 ``[B]``, album; mismatched: audio of a track of
    another album for each, float32 ``[B, A]``, where the model asked for it.
    """

    cover: Tensor
    audio: Tensor | None
    genre: Tensor
    group: Tensor
    mismatched: Tensor | None = None


class Stream(Protocol):
    """What training reads: ``batch(k)`` is this rank's part of the k-th global batch of the endless stream.

    resolution: side of the covers; samples: that are read; epoch: samples in an epoch, 0 if unknown; scale: of the
    audio, None without it; facts: as in an index (samples, genres, audio); identity: the same for the same samples;
    pure: whether batches may be asked for in any order and from several threads; notice: what people should know of it,
    or None.
    """

    resolution: int
    samples: int
    epoch: int
    scale: AudioScale | None
    facts: dict[str, Any]
    identity: str
    pure: bool
    notice: str | None

    def batch(self, number: int) -> Batch: ...

    def mismatch(self) -> None:
        """From now on batches hold mismatched audio; ValueError where that can't be."""


def varied(genres: np.ndarray, count: int) -> list[int]:
    """At most ``count`` rows, round by round one of every genre, from the genre ``[N]`` of all rows."""
    members = [np.flatnonzero(genres == genre)[:count].tolist() for genre in np.unique(genres)]
    return [row for rows in zip_longest(*members) for row in rows if row is not None][:count]


def share_of(batch_size: int, ranks: int) -> int:
    """How many samples of a global batch each rank reads; ValueError with the nearest size when they can't share it."""
    if batch_size % ranks:
        raise ValueError(f"batch_size {batch_size} can't be shared by {ranks} processes; "
                         f"nearest: {max(1, round(batch_size / ranks)) * ranks}")
    return batch_size // ranks


class IndexedShards:
    """Shards that ``shard_tools.pack`` wrote, cut into global batches of which this rank reads its slice."""

    pure, notice = True, None

    def __init__(self, root: str | Path, split: str, *, batch_size: int, seed: int = 0, order: str = "sample",
                 audio_scale: str = "standard", albums: str = "all", rank: int = 0, ranks: int = 1) -> None:
        """Args:
            root: folder of the shards.
            split: ``train``, ``val`` or ``test``.
            batch_size: of the global batch, over all ranks.
            seed: of the order and of mismatched pairs.
            order: ``sample``, every sample once an epoch, or ``group``, every album once with a random track.
            audio_scale: kind of ``AudioScale``.
            albums: of whom batches are, see ``of_albums``.
            rank: this process among ``ranks``.
            ranks: must divide batch_size.
        """
        self.batch_size, self.rank, self.ranks, self.share = batch_size, rank, ranks, share_of(batch_size, ranks)
        self.index = open_index(root, split)
        try:
            check_facts(self.index.facts, split)
        except ValueError as error:
            raise ValueError(f"{root}/{split}.index.json: {error}") from None
        self.facts, self.resolution = self.index.facts, self.index.facts["resolution"]
        self.identity = self.facts["self_sha256"]
        rows, shards = self.index.rows, self.index.shards
        if missing := [shard.name for shard in shards if not shard.is_file()]:
            raise ValueError(f"{root}: {len(missing)} shards of the index are missing, the first is {missing[0]}")
        self.shards, self.shelf = shards, LocalShelf(shards)
        self.chosen = of_albums(rows["group"], albums)
        if not len(self.chosen):
            raise ValueError(f"--albums_for {albums}: none of the {split} albums of {root} is among them; pack more "
                             "albums, or train with --albums_for all")
        self.order = (GroupOrder(rows["group"][self.chosen], seed) if order == "group"
                      else SampleOrder(len(self.chosen), seed))
        self.samples, self.seed, self.partners = len(self.chosen), seed, None
        self.epoch = self.order.size
        # One vectorised call orders the samples of many small batches.
        self._ordered = lru_cache(maxsize=8)(
            lambda block: self.order(np.arange(block * ORDER_BLOCK, (block + 1) * ORDER_BLOCK)))
        audio = self.facts["audio"]
        self.scale = AudioScale(audio, audio_scale) if audio else None
        self.dimension = audio["dimension"] if audio else 0

    def rows(self, number: int) -> np.ndarray:
        """This rank's rows ``[batch_size / ranks]`` of the global batch with this number."""
        share = self.share
        start = number * self.batch_size + self.rank * share
        blocks = range(start // ORDER_BLOCK, (start + share - 1) // ORDER_BLOCK + 1)
        first = start - blocks.start * ORDER_BLOCK
        return self.chosen[np.concatenate([self._ordered(block) for block in blocks])[first : first + share]]

    def mismatch(self) -> None:
        """From now on batches also hold audio that does not belong to their covers, see ``Partners``."""
        rows, audible = self.index.rows, self.chosen[self.index.rows["audio_bytes"][self.chosen] > 0]
        self.audible_ones = audible
        self.partners = Partners(rows["group"][audible], rows["genre"][audible], self.seed)

    def read(self, rows: np.ndarray) -> Batch:
        """The samples of given rows ``[B]``; safe from many threads."""
        samples = self.index.rows[rows]
        cover = np.empty((len(rows), 3, self.resolution, self.resolution), np.uint8)
        raw = np.zeros((len(rows), self.dimension), np.float32)
        places = zip(*(samples[name].tolist() for name in PLACE), strict=True)
        for slot, place in enumerate(places):
            self._fill(cover[slot], raw[slot], *place)
        return Batch(torch.from_numpy(cover), torch.from_numpy(self.scale(raw)) if self.scale else None,
                     torch.from_numpy(samples["genre"].astype(np.int64)), torch.from_numpy(samples["group"].copy()))

    def hear(self, rows: np.ndarray) -> Tensor:
        """The audio alone of given rows ``[B]``, all of which have a vector."""
        raw = np.empty((len(rows), self.dimension), np.float32)
        places = zip(*(self.index.rows[rows][name].tolist() for name in PLACE), strict=True)
        for slot, (shard, _, _, start, length) in enumerate(places):
            try:
                raw[slot] = codec.parse_vector(self._bytes(shard, start, length), self.dimension)
            except ValueError as error:
                raise ValueError(f"{self.shards[shard]}: damaged sample at byte {start}: {error} (shard_tools.verify "
                                 f"--full {self.index.root} names all of them)") from None
        return torch.from_numpy(self.scale(raw))

    def genres(self, rows: np.ndarray) -> np.ndarray:
        """Genres of given rows, int64 ``[B]``; -1 for ``unknown``, which packing gives to files without a genre."""
        genres = self.index.rows["genre"][rows].astype(np.int64)
        nameless = [number for number, name in enumerate(self.facts["genres"]) if name == UNKNOWN]
        return np.where(np.isin(genres, nameless), -1, genres)

    def batch(self, number: int) -> Batch:
        """This rank's part of a global batch."""
        rows = self.rows(number)
        batch = self.read(rows)
        if self.partners is None:
            return batch
        positions = number * self.batch_size + self.rank * self.share + np.arange(self.share)
        others = self.partners(positions, batch.group.numpy(), batch.genre.numpy())
        return batch._replace(mismatched=self.hear(self.audible_ones[others]))

    def examples(self, count: int) -> Batch:
        """At most ``count`` samples, always the same: one of every genre, in the genres' order, then further ones."""
        return self.read(np.array(varied(self.index.rows["genre"], count)))

    def audible(self) -> np.ndarray:
        """The rows that have a vector; ValueError if none has."""
        rows = np.flatnonzero(self.index.rows["audio_bytes"])
        if not len(rows):
            raise ValueError(f"{self.index.root}: no sample of {self.index.split} has audio")
        return rows

    def _bytes(self, shard: int, start: int, size: int) -> bytearray:
        """What a row points at, if that can be a cover and a vector."""
        if not (shard < len(self.shards) and 0 <= size <= MOST and start < 2**62):
            raise ValueError(f"{self.index.root}/{self.index.split}.index.npy is damaged: it has a sample of {size:,} "
                             f"bytes at byte {start:,} of shard {shard} (shard_tools.verify tells more)")
        return self.shelf.read(shard, start, size)

    def _fill(self, cover: np.ndarray, raw: np.ndarray, shard: int, start: int, size: int, audio: int,
              length: int) -> None:
        """Reads and decodes one sample into its slots; the vector lies beside the cover, so one read fetches both."""
        data = self._bytes(shard, start, audio + length - start if length else size)
        try:
            jpeg = torch.frombuffer(data, dtype=torch.uint8, count=size)
            pixels = decode(jpeg).numpy()
            if pixels.shape != cover.shape:
                raise ValueError(f"a cover of {pixels.shape[1:]}, expected {cover.shape[1:]}")
            np.copyto(cover, pixels)  # numpy, because torch would start compute threads from every decoding thread
            if length:
                raw[:] = codec.parse_vector(data[audio - start:], self.dimension)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self.shards[shard]}: damaged sample at byte {start}: {error} (shard_tools.verify "
                             f"--full {self.index.root} names all of them)") from None


def shrink(cover: Tensor, resolution: int) -> Tensor:
    """uint8 covers ``[B, 3, S, S]`` at a smaller side length, by averaging areas."""
    if cover.shape[-1] == resolution:
        return cover
    return F.interpolate(cover.float(), size=(resolution, resolution), mode="area").round_().to(torch.uint8)


def open_split(root: str, split: str, *, needed: bool, **options: Any) -> IndexedShards | None:
    """A split beside the one that is trained on, in its own order, or None where the shards have none.

    One that is not needed may be incomplete, and counts as none then.
    """
    if split not in splits_in(root):
        return None
    try:
        found = IndexedShards(root, split, **options)
    except ValueError:
        if needed:
            raise
        return None
    return found if found.facts["samples"] else None


def open_stream(root: str, split: str, **options: Any) -> Stream:
    """The stream over a folder of shards: by index where there is one, else as foreign shards.

    Raises:
        FileNotFoundError: no such folder, or no shards in it.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"--shards {root}: no such folder")
    if any(folder.glob("*.index.json")) or (folder / ".pack").exists():
        return IndexedShards(root, split, **options)
    from covergen.runtime.foreign import ForeignShards
    return ForeignShards(root, split, **options)
