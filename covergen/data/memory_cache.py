"""A dataset whose decoded samples stay in memory, so that none is read and decoded twice.

Covers are stored at the resolution that is trained at and audio as networks take it, each sample from when it is first
read: the first epoch is as fast as without, and those after it are copies from memory.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from covergen.data.batch import Batch, downscale
from covergen.data.corruption import CorruptionLog, Failures
from covergen.data.dataset import ShardDataset
from covergen.data.stream import Stream
from covergen.distributed.environment import free_memory, processes

MEMORY_SHARE = 0.5  # of the free memory that may be used


class DecodedCache:
    """The decoded samples of a dataset, at most once in the memory of a machine or of a device.

    Reads like the dataset, whose attributes it has but for ``resolution``. With covers on a GPU all reads must be on
    one CUDA stream, as those of a ``Loader`` are: what one thread stores there another one finds.
    """

    def __init__(self, dataset: ShardDataset, resolution: int, memory: mmap.mmap, device: torch.device | None) -> None:
        """Stores covers of ``resolution`` pixels on the device, if there is one, and all else in memory.

        The memory is of ``bytes_of`` the dataset, zeros at first, and may be shared with other processes.
        """
        self.dataset, self.resolution, self.device = dataset, resolution, device
        cover = (3, resolution, resolution)
        width = dataset.normalizer.size if dataset.normalizer else 0
        covers, offset = _array(memory, 0, (0 if device else dataset.samples, *cover), np.uint8)
        self.audio, offset = _array(memory, offset, (dataset.samples, width), np.float32)
        self.filled, offset = _array(memory, offset, (dataset.samples,), np.bool_)  # set last
        self.covers = torch.empty(dataset.samples, *cover, dtype=torch.uint8, device=device) if device else covers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)

    def read(self, rows: np.ndarray, log: CorruptionLog | None = None) -> Batch:
        """See ``ShardDataset.read``; covers are on the device where they are stored there."""
        fresh: list[tuple[np.ndarray, Tensor]] = []
        rows = self.dataset.replace_corrupt(rows, lambda rows, slots: self._fill(rows, slots, fresh), log)
        positions = self.dataset.positions(rows)
        if self.device:
            cover = self.covers.index_select(0, self._on_device(positions))
        elif len(fresh) == 1 and np.array_equal(fresh[0][0], positions):
            cover = fresh[0][1]  # all of them were read just now
        else:
            cover = torch.empty(len(rows), *self.covers.shape[1:], dtype=torch.uint8, pin_memory=self.reader.pinned)
            np.take(self.covers, positions, axis=0, out=cover.numpy(), mode="clip")  # clip: straight into ``out``
        return self.dataset.label(rows, cover, torch.from_numpy(self.audio[positions]) if self.normalizer else None)

    def read_audio(self, rows: np.ndarray, log: CorruptionLog | None = None,
                   not_of: np.ndarray | None = None) -> Tensor:
        """See ``ShardDataset.read_audio``; what is not stored yet is read, and not stored, for its cover is missing."""
        audio = np.empty((len(rows), self.audio.shape[1]), np.float32)

        def load(rows: np.ndarray, slots: np.ndarray) -> Failures:
            positions = self.dataset.positions(rows)
            stored = self.filled[positions]
            audio[slots[stored]] = self.audio[positions[stored]]
            if stored.all():
                return {}
            raw = np.zeros((len(audio), self.dimension), np.float32)
            failures = self.reader.read_audio(rows[~stored], slots[~stored], raw)
            audio[slots[~stored]] = self.normalizer(raw[slots[~stored]])
            return failures
        self.dataset.replace_corrupt_audio(rows, load, log, not_of)
        return torch.from_numpy(audio)

    def _fill(self, rows: np.ndarray, slots: np.ndarray, fresh: list[tuple[np.ndarray, Tensor]]) -> Failures:
        """Reads and stores what is not stored yet, and adds its positions and covers to ``fresh``."""
        positions = self.dataset.positions(rows)
        missing = np.flatnonzero(~self.filled[positions])
        if not len(missing):
            return {}
        cover, raw = self.reader.allocate_batch(len(missing))
        failures = self.reader.load(rows[missing], np.arange(len(missing)), cover, raw)
        stored = positions[missing]
        if failures:
            good = np.setdiff1d(np.arange(len(missing)), list(failures))
            cover, raw, stored = cover[torch.from_numpy(good)], raw[good], stored[good]
        if self.normalizer:
            self.audio[stored] = self.normalizer(raw)
        cover = downscale((self._on_device(cover) if self.device else cover).contiguous(), self.resolution)
        if self.device:
            self.covers.index_copy_(0, self._on_device(stored), cover)
        else:
            self.covers[stored] = cover.numpy()
        self.filled[stored] = True
        fresh.append((stored, cover))
        return {int(slots[missing[slot]]): failure for slot, failure in failures.items()}

    def _on_device(self, values: Tensor | np.ndarray) -> Tensor:
        """Values on the device; from pinned memory, since any other copy to a GPU waits for all that it has to do."""
        values = torch.as_tensor(values)
        if self.device.type == "cuda" and not values.is_pinned():
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)


def cache_decoded(stream: Stream, where: str, resolution: int, device: torch.device,
                  say: Callable[[str], None]) -> None:
    """From now on a stream reads its samples through a ``DecodedCache``, if they fit; else says so, with numbers.

    ``where``: ``ram``, shared by the processes of a machine; ``device``, covers in the memory of every GPU (vectors,
    which are small, stay in the machine's), on CPUs the same as ``ram``; or ``none``.
    """
    if where == "none":
        return
    if stream.dataset is None:
        say(f"--decoded_cache {where}: shards without an index can't be cached decoded: going on without")
        return
    on_device = device if where == "device" and device.type == "cuda" else None
    covers, rest = bytes_of(stream.dataset, resolution)
    memory, free = _memory(rest if on_device else covers + rest, shared=on_device is None)
    if on_device and memory:
        free = MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
    if memory and (on_device is None or covers <= free):
        stream.dataset = DecodedCache(stream.dataset, resolution, memory, on_device)
    else:
        say(f"--decoded_cache {where}: {(covers + rest) / 1e9:.1f} GB of decoded covers and vectors, {free / 1e9:.1f} "
            "GB are there for them (half of what is free): going on without")


def bytes_of(dataset: ShardDataset, resolution: int) -> tuple[int, int]:
    """Memory for the covers of a dataset, and for all else that is stored of it."""
    width = dataset.normalizer.size if dataset.normalizer else 0
    return dataset.samples * 3 * resolution**2, dataset.samples * (4 * width + 1) + 2 * mmap.PAGESIZE


def _array(memory: mmap.mmap, offset: int, shape: tuple[int, ...], kind: Any) -> tuple[np.ndarray, int]:
    """An array in memory from a byte on, and the next free byte."""
    count = int(np.prod(shape))
    array = np.frombuffer(memory, kind, count, offset) if count else np.empty(0, kind)
    offset += array.nbytes
    return array.reshape(shape), offset + -offset % 64


def _memory(size: int, shared: bool) -> tuple[mmap.mmap | None, float]:
    """Memory of some bytes, None where that is more than is free; and how much that is.

    Processes of a machine that train together share it where ``shared``: a file without a name, which is gone when they
    are, however they end; the others open it through the first one's.
    """
    local = processes()[2]
    if not (shared and local > 1 and torch.distributed.is_available() and torch.distributed.is_initialized()):
        free = MEMORY_SHARE * free_memory() / local
        if size > free:
            return None, free
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # faster to fill and to read at random
        return memory, free
    machine = (Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid"))
    file = os.memfd_create("covergen cache")
    everyone: list[Any] = [None] * processes()[1]
    torch.distributed.all_gather_object(everyone, (machine, os.getpid(), file, MEMORY_SHARE * free_memory()))
    _, process, descriptor, free = next(one for one in everyone if one[0] == machine)
    if size > free:
        return None, free
    common = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
    os.ftruncate(common, size)
    memory = mmap.mmap(common, size)
    os.close(common)
    torch.distributed.barrier()  # until then the first one's must stay open
    os.close(file)
    return memory, free
