"""Batches of a stream on a device, made ahead by threads: decoding releases the interpreter lock, and threads decode
straight into the memory of a batch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from covergen.data.batch import Batch, downscale
from covergen.data.stream import SequentialBatches, Stream


class Loader:
    """Batches of a stream from a number on, made ahead by threads, on a device at the wanted resolution.

    ``blocked_seconds`` are those that the reader of this iterator has spent waiting for data.
    """

    def __init__(self, stream: Stream | SequentialBatches, start: int, *, device: torch.device, resolution: int,
                 threads: int, ahead: int = 2, stop: int | None = None) -> None:
        """Args:
            stream: what is read.
            start: number of the first batch.
            device: where batches go.
            resolution: side of the covers in pixels, the stream's or below.
            threads: that read and decode; each makes whole batches, so that none waits for another.
            ahead: batches made ahead beside those in the making: at least what is taken at once.
            stop: number of the first batch that will never be asked for; None = there is none.
        """
        self.stream, self.number, self.device, self.resolution = stream, start, device, resolution
        self.blocked_seconds, self.stop = 0.0, stop
        # Copies to a GPU go on a CUDA stream of their own, beside the computing.
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.side and stream.dataset:
            stream.dataset.reader.pinned = True
        threads = threads if stream.pure else 1
        self.threads, self.ahead = ThreadPoolExecutor(threads, "batch"), threads + ahead
        self.pending: deque[Future[tuple[Batch, torch.cuda.Event | None]]] = deque()

    def _make(self, number: int) -> tuple[Batch, torch.cuda.Event | None]:
        """A batch on the device, and what says that it has arrived there."""
        if self.side is None:
            return _each(self.stream.batch(number), lambda part: part.to(self.device)), None
        # A thread begins on the first GPU, whichever its process uses.
        with torch.cuda.device(self.device), torch.cuda.stream(self.side):
            # Pinned memory is given out again by torch only after the copy that uses it.
            batch = _each(self.stream.batch(number), lambda part: (
                part if part.is_cuda or part.is_pinned() else part.pin_memory()).to(self.device, non_blocking=True))
            return batch, self.side.record_event()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while len(self.pending) < self.ahead and (self.stop is None or self.number < self.stop):
            self.pending.append(self.threads.submit(self._make, self.number))
            self.number += 1
        began = time.perf_counter()
        batch, arrived = self.pending.popleft().result()
        if arrived:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            for part in batch:
                if part is not None:
                    part.record_stream(current)  # its memory belongs to the side stream, which must not reuse it yet
        batch = batch._replace(cover=downscale(batch.cover.contiguous(), self.resolution))
        self.blocked_seconds += time.perf_counter() - began
        return batch

    def close(self) -> None:
        """Stops the threads; batches not yet taken are dropped."""
        self.threads.shutdown(wait=False, cancel_futures=True)


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    return Batch(*(None if part is None else change(part) for part in batch))
