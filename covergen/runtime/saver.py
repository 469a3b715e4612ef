"""Checkpoints written beside training: copies of this moment in, files on disk a little later out."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from torch import nn

from covergen.runtime import checkpoint
from covergen.runtime.mirror import Mirror


class Saver:
    """Copies what is to be saved and leaves the writing to a thread; one checkpoint is in the making at a time.

    Attributes:
        waited: seconds that training has spent on copying and on waiting for an earlier checkpoint.
        failure: why the last checkpoint could not be written, None while all could.
    """

    def __init__(self, folder: Path, keep: int, mirror: Mirror | None = None) -> None:
        """Args: folder: of the run; keep: how many checkpoints stay; mirror: what uploads the folder, if anything."""
        self.folder, self.keep, self.mirror = folder, keep, mirror
        self.waited = 0.0
        self.failure: OSError | None = None
        self._thread: threading.Thread | None = None

    def save(self, step: int, networks: dict[str, nn.Module], averaged: dict[str, nn.Module],
             trainer: dict[str, Any], kinds: list[str]) -> None:
        """Starts the writing of checkpoints of this moment; what fails is told by ``failure``, later; then no more."""
        began = time.perf_counter()
        self.wait()
        if self.failure:
            return
        taken = checkpoint.snapshot(step, networks, averaged, trainer)
        # Not a daemon: a process that ends in peace ends after its last checkpoint is on disk.
        self._thread = threading.Thread(target=self._write, args=(taken, kinds), name="checkpoint")
        self._thread.start()
        self.waited += time.perf_counter() - began

    def wait(self) -> None:
        """Waits until everything is on disk, or has failed."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Waits until all that the folder holds is uploaded, too, or could not be."""
        self.wait()
        if self.mirror:
            self.mirror.push()
            self.mirror.wait()

    def _write(self, taken: checkpoint.Snapshot, kinds: list[str]) -> None:
        try:
            for kind in kinds:
                checkpoint.write(self.folder, taken, self.keep, kind)
            if self.mirror:
                self.mirror.push()
        except OSError as error:
            self.failure = error
