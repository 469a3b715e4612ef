"""Reads and decodes samples of shards: covers and vectors of rows of an index, straight into arrays of a batch."""

from __future__ import annotations

import errno
import zlib

import numpy as np
import torch
from torch import Tensor

from covergen.data.corruption import CorruptSample, Failures
from covergen.data.shard_store import ShardStore
from shard_tools.dataset import images as codec
from shard_tools.dataset.vectors import VECTOR_BYTES, parse_vector
from shard_tools.shards.index import Index

RGB = 3  # torchvision.io.ImageReadMode.RGB

try:  # a decoder that writes into given memory and refuses what is incomplete
    from simplejpeg import decode_jpeg
except ImportError:
    decode_jpeg = None


def decode(jpeg: bytearray | memoryview, out: np.ndarray | None = None) -> np.ndarray:
    """The bytes of a JPEG as pixels, uint8 ``[H, W, 3]``, in ``out`` where that is given; from many threads at once.

    Both decoders are libjpeg-turbo and give the same pixels of what packing writes; torchvision's decides about what
    the fast one refuses. Raises RuntimeError if it can't be decoded, ValueError if it is not of the size of ``out``.
    """
    if decode_jpeg:
        try:
            pixels = decode_jpeg(jpeg, buffer=out)
            if out is None or pixels.shape == out.shape:
                return pixels
        except ValueError:
            pass
    # Here, for it takes two seconds, and registers the operator: its own function holds the interpreter's lock longer.
    import torchvision.io  # noqa: F401
    pixels = torch.ops.image.decode_jpeg.default(torch.frombuffer(jpeg, dtype=torch.uint8), RGB)
    pixels = pixels.permute(1, 2, 0).numpy()
    if out is None:
        return pixels
    if pixels.shape != out.shape:
        raise ValueError(f"a cover of {pixels.shape[1]} x {pixels.shape[0]}, expected {out.shape[1]} x {out.shape[0]}")
    out[:] = pixels
    return out


RANGES = ("shard", "cover_offset", "cover_bytes", "audio_offset", "audio_bytes")  # where a sample lies
LARGEST = codec.COVER_BYTES + VECTOR_BYTES  # bytes of a sample
BLOCK = 4  # pictures at a time, see JpegBatchDecoder
HEADER = 512  # bytes of a tar's header before a member; the name is the first hundred


class SampleReader:
    """Reads the samples of an opened index; safe from many threads."""

    def __init__(self, index: Index, store: ShardStore) -> None:
        self.rows, self.store = index.rows, store
        self.names = [shard["name"] for shard in index.metadata["shards"]]
        self.resolution, audio = index.metadata["resolution"], index.metadata["audio"]
        self.dimension = audio["dimension"] if audio else 0
        self.checked = np.zeros(len(self.rows), bool)  # whether the checksum was found to fit
        self.pinned = False  # whether covers are to lie in memory that a GPU can copy from

    def allocate_batch(self, count: int) -> tuple[Tensor, np.ndarray]:
        """Where ``load`` puts covers, uint8 ``[count, 3, R, R]``, and vectors, float32 ``[count, D]``.

        For a GPU the covers lie in pinned memory and as the decoder gives them, with interleaved colours: the GPU
        transposes them in no time.
        """
        side = self.resolution
        cover = (torch.empty(count, side, side, 3, dtype=torch.uint8, pin_memory=True).permute(0, 3, 1, 2)
                 if self.pinned else torch.empty(count, 3, side, side, dtype=torch.uint8))
        return cover, np.zeros((count, self.dimension), np.float32)

    def load(self, rows: np.ndarray, slots: np.ndarray, cover: Tensor, raw: np.ndarray) -> Failures:
        """Reads and decodes rows ``[n]`` into slots ``[n]`` of ``allocate_batch``; returns which of them are corrupt.

        What is read for the first time must fit its checksum: a flipped bit may still decode.
        """
        failures: Failures = {}
        samples, checked = self.rows[rows], self.checked[rows].tolist()
        self.store.prefetch(samples["shard"].tolist())
        decoder, vectors = JpegBatchDecoder(cover), memoryview(raw.reshape(-1).view(np.uint8))
        ranges = zip(rows.tolist(), slots.tolist(), checked, *(samples[name].tolist() for name in RANGES), strict=True)
        for row, slot, was_checked, shard, start, size, audio, length in ranges:
            try:
                data = self._bytes(shard, start, audio + length - start if length else size)
                if not was_checked:
                    self._check(row, data, size, audio - start, length)
                decoder.decode(memoryview(data)[:size], slot)
                if length:  # not by numpy, which would let go of the interpreter's lock for so little
                    vector = parse_vector(data, self.dimension, audio - start)
                    vectors[slot * vector.nbytes:(slot + 1) * vector.nbytes] = memoryview(vector).cast("B")
                else:
                    raw[slot] = 0
            except Exception as error:  # boundary to bytes that may be anything
                failures[slot] = self._failure(error, shard, start)
        decoder.flush()
        self._refuse_infinite(rows, slots, raw, failures)
        return failures

    def read_audio(self, rows: np.ndarray, slots: np.ndarray, raw: np.ndarray) -> Failures:
        """Reads the vectors alone of rows ``[n]`` that have one into slots ``[n]``; returns which are corrupt."""
        failures: Failures = {}
        samples = self.rows[rows]
        ranges = zip(slots.tolist(), *(samples[name].tolist() for name in RANGES), strict=True)
        for slot, shard, start, _, audio, length in ranges:
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
                sample = self.rows[row]
                failures[slot] = self._failure(ValueError("its vector is not finite"), int(sample["shard"]),
                                               int(sample["cover_offset"]))

    def _failure(self, error: Exception, shard: int, start: int) -> CorruptSample:
        """What is corrupt and why; raises the error itself where it is not the sample's fault.

        A failing network, limit or permission is not: another time the sample could be read.
        """
        kinds = (ValueError, RuntimeError, IndexError, OverflowError, FileNotFoundError)
        if not isinstance(error, kinds) and not (isinstance(error, OSError) and error.errno == errno.EIO):
            raise error
        name = self.names[shard] if shard < len(self.names) else f"shard {shard} of {len(self.names)}"
        try:
            member = bytes(self.store.read(shard, start - HEADER, 100)).split(b"\0")[0].decode("ascii")
        except (OSError, ValueError, IndexError, OverflowError):
            member = ""  # that, too, is corrupt
        key = member.rpartition(".")[0] if member.isprintable() else None
        return CorruptSample(name, start, str(error) or type(error).__name__, key or None)


class JpegBatchDecoder:
    """Decodes JPEGs into slots of a batch, uint8 ``[B, 3, R, R]``, whatever its layout.

    A decoder gives interleaved colours. Where the batch wants them in planes, a few pictures at a time are transposed,
    while they are in the processor's cache; more at a time would drive the decoder's tables out of it, and fewer would
    give up the interpreter's lock more often. By numpy: torch would start compute threads from every decoding thread.
    """

    def __init__(self, cover: Tensor) -> None:
        self.planar = cover.is_contiguous()
        self.cover = cover.numpy() if self.planar else cover.permute(0, 2, 3, 1).numpy()
        self.pixels = np.empty((BLOCK, *cover.shape[2:], RGB), np.uint8) if self.planar else self.cover
        self.slots: list[int] = []

    def decode(self, jpeg: memoryview, slot: int) -> None:
        """Raises RuntimeError or ValueError, see ``decode``."""
        decode(jpeg, self.pixels[len(self.slots) if self.planar else slot])
        if self.planar:
            self.slots.append(slot)
            if len(self.slots) == BLOCK:
                self.flush()

    def flush(self) -> None:
        """Puts the last pictures into their slots."""
        if self.slots:
            self.cover[self.slots] = self.pixels[:len(self.slots)].transpose(0, 3, 1, 2)
            self.slots = []
