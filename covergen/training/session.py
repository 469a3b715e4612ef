"""How fast a run is: engine, loader and saver in, what the log says of speed since its last line out."""

from __future__ import annotations

import time

from covergen.data.loader import Loader
from covergen.distributed.environment import peak_memory
from covergen.runs.checkpoint import AsyncCheckpointer
from covergen.training.engine import Engine


class Throughput:
    """Clocks the steps between two lines of the log; the work that ends such a stretch is not part of it."""

    def __init__(self, engine: Engine, loader: Loader, saver: AsyncCheckpointer | None, step: int) -> None:
        """Args: engine, loader, saver (of the main process): of the run; step: that it goes on from."""
        self.engine, self.loader, self.saver, self.saving = engine, loader, saver, 0.0
        self.start(step)

    def start(self, step: int) -> None:
        """Begins anew after a step."""
        self.since, self.clock = step, time.perf_counter()
        self.blocked_seconds, self.compiled = self.loader.blocked_seconds, self.engine.compiling.seconds

    def row(self, step: int) -> dict[str, float]:
        """Speed since the last start, without the time that compiling took; waiting in seconds; memory in GiB."""
        seconds = time.perf_counter() - self.clock - (self.engine.compiling.seconds - self.compiled)
        row = {"speed/images_per_second": (step - self.since) * self.engine.images_per_step / seconds,
               "speed/data_wait_seconds": self.loader.blocked_seconds - self.blocked_seconds,
               "speed/memory_gib": peak_memory(self.engine.device)}
        if self.saver:
            row["speed/checkpoint_seconds"] = self.saver.blocked_seconds - self.saving
            self.saving = self.saver.blocked_seconds
        return row
