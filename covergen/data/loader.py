"""From a stream to a device: batches by number in, the same made ahead by threads and at the wanted resolution out."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from covergen.data.batch import Batch, Stream, downscale
from covergen.data.indexed import ShardDataset
from covergen.data.memory_cache import Drawn, open_decoded_cache


class _Made(NamedTuple):
    """A batch on its device, what it lacks where covers are kept on the device, and what says that it has arrived."""

    batch: Batch
    drawn: Drawn | None
    arrived: torch.cuda.Event | None


class Loader:
    """Batches of a stream from a number on, made ahead by threads, on a device at the wanted resolution.

    Attributes:
        waited: seconds that the reader of this iterator has spent waiting for data.
        kept: decoded samples that are not read again, None without.
    """

    def __init__(self, stream: Stream, start: int, *, device: torch.device, resolution: int, threads: int,
                 ahead: int = 2, stop: int | None = None, cache: str = "none",
                 say: Callable[[str], None] = print) -> None:
        """Args:
            stream: what is read.
            start: number of the first batch.
            device: where batches go.
            resolution: side of the covers in pixels, the stream's or below.
            threads: that read and decode; each makes whole batches, so that none waits for another.
            ahead: batches made ahead beside those in the making: at least what is taken at once.
            stop: number of the first batch that will never be asked for; None = there is none.
            cache: where decoded samples are kept, ``none``, ``ram`` or ``device``; see ``kept``.
            say: told where they can't be.
        """
        self.stream, self.number, self.device, self.resolution = stream, start, device, resolution
        self.blocked_seconds, self.stop = 0.0, stop
        self.kept = open_decoded_cache(stream, cache, resolution, device, say)
        # Copies to a GPU go on a stream of their own, beside the computing.
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.side and isinstance(stream, ShardDataset):
            stream.reader.pinned = True
        threads = threads if stream.pure else 1
        self.threads, self.ahead = ThreadPoolExecutor(threads, "batch"), threads + ahead
        self.pending: deque[Future[_Made]] = deque()

    def _make(self, number: int) -> _Made:
        # A thread begins on the first GPU, whichever its process uses.
        with torch.cuda.device(self.device) if self.side else contextlib.nullcontext():
            drawn = self.kept.draw(number) if self.kept else None
            batch = drawn.batch if drawn else self.stream.batch(number)
            if self.side is None:
                return _Made(batch, drawn, None)
            with torch.cuda.stream(self.side):
                batch = _each(batch, self._copy)
                arrived = torch.cuda.Event()
                arrived.record()
            return _Made(batch, drawn, arrived)

    def _copy(self, part: Tensor) -> Tensor:
        # Pinned memory is given out again by torch only after the copy that uses it.
        part = part if part.is_pinned() else part.pin_memory()
        return part.to(self.device, non_blocking=True)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while len(self.pending) < self.ahead and (self.stop is None or self.number < self.stop):
            self.pending.append(self.threads.submit(self._make, self.number))
            self.number += 1
        began = time.perf_counter()
        batch, drawn, arrived = self.pending.popleft().result()
        if arrived:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            for part in batch:
                if part is not None:
                    part.record_stream(current)  # its memory belongs to the side stream, which must not reuse it yet
        else:
            batch = _each(batch, lambda part: part.to(self.device))
        if drawn and drawn.places is not None:
            batch = batch._replace(cover=self.kept.collect(drawn))
        batch = batch._replace(cover=downscale(batch.cover.contiguous(), self.resolution))
        self.blocked_seconds += time.perf_counter() - began
        return batch

    def close(self) -> None:
        """Stops the threads; batches not yet taken are dropped."""
        self.threads.shutdown(wait=False, cancel_futures=True)


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    return Batch(*(None if part is None else change(part) for part in batch))
