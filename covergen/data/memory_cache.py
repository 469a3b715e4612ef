"""Decoded samples kept in memory: an indexed stream in, the same batches without decoding any sample twice out.

Covers are kept at the resolution that is trained at and vectors as networks hear them, each sample from when it is
first read: the first epoch is as fast as without, and those after it are copies from memory.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from covergen.data.batch import Batch, Stream, downscale
from covergen.data.decoding import Failures
from covergen.data.indexed import ShardDataset
from covergen.distributed.environment import free_memory, processes

SHARE = 0.5  # of the free memory that may be used


class Drawn(NamedTuple):
    """A batch, where covers are kept on the device without them: their places, and covers that are to be kept first."""

    batch: Batch
    places: np.ndarray | None = None
    fresh: tuple[tuple[np.ndarray, Tensor], ...] = ()


class DecodedCache:
    """The decoded samples of a stream, at most once in the memory of a machine or of a device."""

    def __init__(self, stream: ShardDataset, resolution: int, memory: mmap.mmap, device: torch.device | None) -> None:
        """Args:
            stream: whose samples are kept.
            resolution: side of the covers in pixels.
            memory: of ``bytes_of`` the stream, zeros at first; may be shared with other processes.
            device: where covers are kept instead, or None.
        """
        self.stream, self.resolution, self.device = stream, resolution, device
        count, side = stream.samples, resolution
        width = stream.scale.size if stream.scale else 0
        shape = (0 if device else count, 3, side, side)
        self.covers, at = _array(memory, 0, shape, np.uint8)
        self.audio, at = _array(memory, at, (count, width), np.float32)
        self.filled, at = _array(memory, at, (count,), np.bool_)  # set last
        self.on_device = torch.empty(count, 3, side, side, dtype=torch.uint8, device=device) if device else None

    @property
    def share(self) -> float:
        """How much of the data is kept by now."""
        return float(self.filled.mean())

    def draw(self, number: int) -> Drawn:
        """A batch as the stream makes it, but for its covers where they are kept on the device; for any thread."""
        stream, fresh = self.stream, []
        positions = stream.positions(number)
        rows = stream.sound(positions, stream.rows(number), lambda rows, slots: self._fill(rows, slots, fresh))
        places = self._places(rows)
        samples = stream.index.rows[rows]
        batch = Batch(None, torch.from_numpy(self.audio[places]) if stream.scale else None,
                      torch.from_numpy(samples["genre"].astype(np.int64)), torch.from_numpy(samples["group"].copy()))
        if stream.mismatch_sampler is not None:
            heard = np.empty((len(rows), self.audio.shape[1]), np.float32)
            stream.others(positions, rows, lambda rows, slots: self._hear(rows, slots, heard))
            batch = batch._replace(mismatched=torch.from_numpy(heard))
        if self.device:
            return Drawn(batch, places, tuple(fresh))
        if len(fresh) == 1 and np.array_equal(fresh[0][0], places):
            return Drawn(batch._replace(cover=fresh[0][1]))  # all of them were read just now
        cover = torch.empty(len(rows), *self.covers.shape[1:], dtype=torch.uint8, pin_memory=stream.reader.pinned)
        np.take(self.covers, places, axis=0, out=cover.numpy(), mode="clip")  # clip: straight into ``out``
        return Drawn(batch._replace(cover=cover))

    def collect(self, drawn: Drawn) -> Tensor:
        """The covers of a batch that are kept on the device; for one thread, in the order of the batches."""
        for places, covers in drawn.fresh:
            covers = downscale(self._there(covers).contiguous(), self.resolution)
            self.on_device.index_copy_(0, self._there(places), covers)
            self.filled[places] = True
        return self.on_device.index_select(0, self._there(drawn.places))

    def _there(self, values: Tensor | np.ndarray) -> Tensor:
        """Values on the device; from pinned memory, since any other copy to a GPU waits for all that it has to do."""
        values = torch.as_tensor(values)
        if self.device.type == "cuda" and not values.is_pinned():
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)

    def _places(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.stream.some is None else np.searchsorted(self.stream.some, rows)

    def _fill(self, rows: np.ndarray, slots: np.ndarray, fresh: list[tuple[np.ndarray, Tensor]]) -> Failures:
        """Reads what is not kept yet and keeps it; tells which slots are damaged."""
        places = self._places(rows)
        missing = np.flatnonzero(~self.filled[places])
        if not len(missing):
            return {}
        members = self.stream.reader
        cover, raw = members.allocate_batch(len(missing))
        failures = members.load(rows[missing], np.arange(len(missing)), cover, raw)
        good = np.setdiff1d(np.arange(len(missing)), list(failures))
        if len(good) < len(missing):
            cover, raw = cover[torch.from_numpy(good)], raw[good]
        kept = places[missing[good]]
        if self.stream.scale:
            self.audio[kept] = self.stream.scale(raw)
        if not self.device:
            cover = downscale(cover.contiguous(), self.resolution)
            self.covers[kept] = cover.numpy()
            self.filled[kept] = True
        fresh.append((kept, cover))
        return {int(slots[missing[place]]): failure for place, failure in failures.items()}

    def _hear(self, rows: np.ndarray, slots: np.ndarray, heard: np.ndarray) -> Failures:
        """Puts the audio of rows into slots, read where it is not kept; tells which slots are damaged."""
        places = self._places(rows)
        kept = self.filled[places]
        heard[slots[kept]] = self.audio[places[kept]]
        if kept.all():
            return {}
        raw = np.zeros((len(heard), self.stream.dimension), np.float32)
        failures = self.stream.reader.read_audio(rows[~kept], slots[~kept], raw)
        heard[slots[~kept]] = self.stream.scale(raw[slots[~kept]])
        return failures


def open_decoded_cache(stream: Stream, where: str, resolution: int, device: torch.device, say: Callable[[str], None],
         ) -> DecodedCache | None:
    """Keeps the decoded samples of a stream, if they fit; else says so, with numbers, and None.

    Args:
        stream: read from the first time on through what is returned.
        where: ``ram``, shared by the processes of a machine; ``device``, covers in the memory of every GPU (vectors,
            which are small, stay in the machine's); on CPUs the same as ``ram``; or ``none``.
        resolution: that is trained at.
        device: that trains.
        say: told when they don't fit.
    """
    if where == "none":
        return None
    if not isinstance(stream, ShardDataset):
        say(f"--decoded_cache {where}: shards without an index can't be kept decoded: going on without")
        return None
    on_device = device if where == "device" and device.type == "cuda" else None
    covers, rest = bytes_of(stream, resolution)
    memory, free = _memory(rest if on_device else covers + rest, apart=on_device is not None)
    if on_device:
        free = SHARE * torch.cuda.mem_get_info(device)[0] if memory else free
        fits = memory and covers <= free
    else:
        fits = memory
    if not fits:
        say(f"--decoded_cache {where}: {(covers + rest) / 1e9:.1f} GB of decoded covers and vectors, {free / 1e9:.1f} GB are "
            "there for them (half of what is free): going on without")
        return None
    return DecodedCache(stream, resolution, memory, on_device)


def bytes_of(stream: ShardDataset, resolution: int) -> tuple[int, int]:
    """Memory for the covers of a stream, and for all else that is kept of it."""
    width = stream.scale.size if stream.scale else 0
    return stream.samples * 3 * resolution**2, stream.samples * (4 * width + 1) + 2 * mmap.PAGESIZE


def _array(memory: mmap.mmap, at: int, shape: tuple[int, ...], kind: Any) -> tuple[np.ndarray, int]:
    """An array in memory from a byte on, and the next free byte."""
    count = int(np.prod(shape))
    array = np.frombuffer(memory, kind, count, at) if count else np.empty(0, kind)
    at += array.nbytes
    return array.reshape(shape), at + -at % 64


def _memory(size: int, apart: bool) -> tuple[mmap.mmap | None, float]:
    """Memory of some bytes, None where that is more than is free; and how much that is.

    Processes of a machine that train together share it unless ``apart``: a file without a name, which is gone when they
    are, however they end; the others open it through the first one's.
    """
    local = processes()[2]
    together = torch.distributed.is_available() and torch.distributed.is_initialized() and local > 1 and not apart
    if not together:
        free = SHARE * free_memory() / local
        if size > free:
            return None, free
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # faster to fill and to read at random
        return memory, free
    machine = (Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid"))
    file = os.memfd_create("covergen cache")
    everyone: list[Any] = [None] * processes()[1]
    torch.distributed.all_gather_object(everyone, (machine, os.getpid(), file, SHARE * free_memory()))
    _, process, theirs, free = next(one for one in everyone if one[0] == machine)
    if size > free:
        return None, free
    common = os.open(f"/proc/{process}/fd/{theirs}", os.O_RDWR)
    os.ftruncate(common, size)
    memory = mmap.mmap(common, size)
    os.close(common)
    torch.distributed.barrier()  # until then the first one's must stay open
    os.close(file)
    return memory, free
