"""Samples of shards: rows of an index in, covers and vectors in arrays out, and which of the rows are damaged."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from covergen.data.corruption import CorruptSample, is_corruption
from covergen.data.shard_store import ShardStore
from shard_tools.dataset import images as codec
from shard_tools.dataset.vectors import VECTOR_BYTES, parse_vector
from shard_tools.shards.index import Index

RGB = 3  # torchvision.io.ImageReadMode.RGB


@cache
def _fast() -> Callable[..., np.ndarray] | None:
    """A decoder that writes where it is told to and refuses what is cut or bent, where it is installed."""
    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        return None
    return decode_jpeg


@cache
def _general() -> Callable[[Any, int], Any]:
    """What torchvision.io.decode_jpeg calls, without the ten microseconds that its checks take of the interpreter lock.

    torchvision takes two seconds to import, which nobody who only generates covers needs to wait for.
    """
    import torch
    import torchvision.io  # noqa: F401  (registers the operator)
    return torch.ops.image.decode_jpeg.default


def decode(jpeg: bytearray | memoryview, out: np.ndarray | None = None) -> np.ndarray:
    """The bytes of a JPEG as pixels, uint8 ``[H, W, 3]``, in ``out`` where that is given; from many threads at once.

    Both decoders are libjpeg-turbo and give the same pixels of what packing writes; torchvision's decides about what
    the fast one refuses.

    Raises:
        RuntimeError: it can't be decoded.
        ValueError: it is not of the size of ``out``.
    """
    if fast := _fast():
        try:
            pixels = fast(jpeg, buffer=out)
            if out is None or pixels.shape == out.shape:
                return pixels
        except ValueError:
            pass
    import torch
    pixels = _general()(torch.frombuffer(jpeg, dtype=torch.uint8), RGB).permute(1, 2, 0).numpy()
    if out is None:
        return pixels
    if pixels.shape != out.shape:
        raise ValueError(f"a cover of {pixels.shape[1]} x {pixels.shape[0]}, expected {out.shape[1]} x {out.shape[0]}")
    out[:] = pixels
    return out


PLACE = ("shard", "cover_offset", "cover_bytes", "audio_offset", "audio_bytes")  # where a sample lies
LARGEST = codec.COVER_BYTES + VECTOR_BYTES  # that a sample can be
TURNED = 4  # pictures at a time, see Desk
HEADER = 512  # bytes of a tar's header before a member; the name is the first hundred
Failures = dict[int, CorruptSample]  # by their slots in a batch


class SampleReader:
    """The samples of an opened index, whose bytes come from a shelf; safe from many threads."""

    def __init__(self, index: Index, store: ShardStore) -> None:
        self.rows, self.store = index.rows, store
        self.names = [shard["name"] for shard in index.metadata["shards"]]
        self.resolution, audio = index.metadata["resolution"], index.metadata["audio"]
        self.dimension = audio["dimension"] if audio else 0
        self.checked = np.zeros(len(self.rows), bool)  # rows whose checksum was seen to fit
        self.pinned = False

    def allocate_batch(self, count: int) -> tuple[Tensor, np.ndarray]:
        """Where ``load`` puts covers, uint8 ``[count, 3, R, R]``, and vectors, float32 ``[count, D]``.

        For a GPU the covers lie in pinned memory and as the decoder gives them, colour beside colour: the GPU turns
        them around in no time.
        """
        side = self.resolution
        cover = (torch.empty(count, side, side, 3, dtype=torch.uint8, pin_memory=True).permute(0, 3, 1, 2)
                 if self.pinned else torch.empty(count, 3, side, side, dtype=torch.uint8))
        return cover, np.zeros((count, self.dimension), np.float32)

    def load(self, rows: np.ndarray, slots: np.ndarray, cover: Tensor, raw: np.ndarray) -> Failures:
        """Reads and decodes rows ``[n]`` into slots ``[n]`` of ``allocate_batch``; tells which of them are damaged.

        What is read for the first time must fit its checksum: a flipped bit that still decodes would go unseen.
        """
        failures: Failures = {}
        samples, checked = self.rows[rows], self.checked[rows].tolist()
        self.store.prefetch(samples["shard"].tolist())
        desk, vectors = JpegBatchDecoder(cover), memoryview(raw.reshape(-1).view(np.uint8))
        places = zip(rows.tolist(), slots.tolist(), checked, *(samples[name].tolist() for name in PLACE), strict=True)
        for row, slot, sound, shard, start, size, audio, length in places:
            try:
                data = self._bytes(shard, start, audio + length - start if length else size)
                if not sound:
                    self._check(row, data, size, audio - start, length)
                desk.decode(memoryview(data)[:size], slot)
                if length:  # not by numpy, which would let go of the interpreter's lock for so little
                    vector = parse_vector(data, self.dimension, audio - start)
                    vectors[slot * vector.nbytes:(slot + 1) * vector.nbytes] = memoryview(vector).cast("B")
                else:
                    raw[slot] = 0
            except Exception as error:  # boundary to bytes that may be anything
                failures[slot] = self._failure(error, shard, start)
        desk.clear()
        self._refuse_infinite(rows, slots, raw, failures)
        return failures

    def read_audio(self, rows: np.ndarray, slots: np.ndarray, raw: np.ndarray) -> Failures:
        """Reads the vectors alone of rows ``[n]`` that have one into slots ``[n]``; tells which are damaged."""
        failures: Failures = {}
        samples = self.rows[rows]
        places = zip(slots.tolist(), *(samples[name].tolist() for name in PLACE), strict=True)
        for slot, shard, start, _, audio, length in places:
            try:
                raw[slot] = parse_vector(self._bytes(shard, audio, length), self.dimension)
            except Exception as error:  # boundary to bytes that may be anything
                failures[slot] = self._failure(error, shard, start)
        self._refuse_infinite(rows, slots, raw, failures)
        return failures

    def _bytes(self, shard: int, start: int, size: int) -> bytearray:
        if not 0 < size <= LARGEST:
            raise ValueError(f"a sample of {size:,} bytes, at most {LARGEST:,} are possible")
        return self.store.read(shard, start, size)

    def _check(self, row: int, data: bytearray, size: int, audio: int, length: int) -> None:
        """Raises ValueError unless the sample has its checksum and says that it is of the right size."""
        parts = memoryview(data)
        crc = zlib.crc32(parts[:size])
        if length:
            crc = zlib.crc32(parts[audio:], crc)
        if crc != self.rows["crc"][row]:
            raise ValueError("its checksum does not fit")
        width, height = codec.claimed_size(data)
        if (width, height) != (self.resolution, self.resolution):  # before memory is taken for what it says
            raise ValueError(f"a cover of {width} x {height}, expected {self.resolution} x {self.resolution}")
        self.checked[row] = True

    def _refuse_infinite(self, rows: np.ndarray, slots: np.ndarray, raw: np.ndarray, failures: Failures) -> None:
        if np.isfinite(raw).all():
            return
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
            if slot not in failures and not np.isfinite(raw[slot]).all():
                place = self.rows[row]
                failures[slot] = self._failure(ValueError("its vector is not finite"), int(place["shard"]),
                                               int(place["cover_offset"]))

    def _failure(self, error: Exception, shard: int, start: int) -> CorruptSample:
        """What is damaged and why; raises the error itself where it is not the sample's fault."""
        if not is_corruption(error):
            raise error
        name = self.names[shard] if shard < len(self.names) else f"shard {shard} of {len(self.names)}"
        return CorruptSample(name, start, str(error) or type(error).__name__, self._key(shard, start))

    def _key(self, shard: int, start: int) -> str | None:
        try:
            name = bytes(self.store.read(shard, start - HEADER, 100)).split(b"\0")[0].decode("ascii")
        except (OSError, ValueError, IndexError, OverflowError):
            return None  # that, too, is damaged
        return name.rpartition(".")[0] if name.isprintable() else None


class JpegBatchDecoder:
    """Decodes JPEGs into slots of a batch, uint8 ``[B, 3, R, R]``, whatever its layout.

    A decoder gives colour beside colour. Where the batch wants them apart, a few pictures at a time are turned, while
    they are in the processor's cache; more at a time would drive the decoder's tables out of it, and fewer would give
    up the interpreter's lock more often. By numpy: torch would start compute threads from every decoding thread.
    """

    def __init__(self, cover: Tensor) -> None:
        self.apart = cover.is_contiguous()
        self.cover = cover.numpy() if self.apart else cover.permute(0, 2, 3, 1).numpy()
        self.place = np.empty((TURNED, *cover.shape[2:], RGB), np.uint8) if self.apart else self.cover
        self.slots: list[int] = []

    def decode(self, jpeg: memoryview, slot: int) -> None:
        """Raises RuntimeError or ValueError, see ``reading.decode``."""
        decode(jpeg, self.place[len(self.slots) if self.apart else slot])
        if self.apart:
            self.slots.append(slot)
            if len(self.slots) == TURNED:
                self.clear()

    def clear(self) -> None:
        """Puts the last pictures into their slots."""
        if self.slots:
            self.cover[self.slots] = self.place[:len(self.slots)].transpose(0, 3, 1, 2)
            self.slots = []
