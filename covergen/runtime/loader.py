"""From a stream to a device: batches by number in, the same made ahead by threads and at the wanted resolution out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from covergen.runtime.data import Batch, Stream, shrink


class Loader:
    """Batches of a stream from a number on, made ahead by threads, on a device at the wanted resolution.

    Attributes:
        waited: seconds that the reader of this iterator has spent waiting for data.
    """

    def __init__(self, stream: Stream, start: int, *, device: torch.device, resolution: int, threads: int,
                 ahead: int = 2, stop: int | None = None) -> None:
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
        self.waited, self.stop = 0.0, stop
        threads = threads if stream.pure else 1
        self.threads, self.ahead = ThreadPoolExecutor(threads, "batch"), threads + ahead
        self.pending: deque[Future[Batch]] = deque()

    def _make(self, number: int) -> Batch:
        batch = self.stream.batch(number)
        if self.device.type == "cuda":
            batch = Batch(*(None if part is None else part.pin_memory() for part in batch))
        return batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while len(self.pending) < self.ahead and (self.stop is None or self.number < self.stop):
            self.pending.append(self.threads.submit(self._make, self.number))
            self.number += 1
        began = time.perf_counter()
        batch = self.pending.popleft().result()
        self.waited += time.perf_counter() - began
        batch = Batch(*(None if part is None else part.to(self.device, non_blocking=True) for part in batch))
        return batch._replace(cover=shrink(batch.cover, self.resolution))

    def close(self) -> None:
        """Stops the threads; batches not yet taken are dropped."""
        self.threads.shutdown(wait=False, cancel_futures=True)
