"""Commands that take long: each is run to its end once, some side by side, over any number of restarts."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from covergen.distributed.interrupts import StopSignal
from shard_tools.core.files import write_atomically

MIN_MINUTES = 0.05  # that are worth starting a training for
INTERVAL = 1.0  # seconds between polls of the commands that run


class JobRunner:
    """Runs commands, each on its share of the cores; what is done and for how long each ran is in ``spent.json``."""

    def __init__(self, folder: Path, jobs: int) -> None:
        """Args: folder: of ``spent.json`` and of a log for each command; jobs: how many run side by side."""
        self.folder, self.state = folder, folder / "spent.json"
        saved = json.loads(self.state.read_text()) if self.state.is_file() else {}
        self.minutes: dict[str, float] = saved.get("minutes", {})
        self.done: list[str] = saved.get("done", [])
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.slots = [cores[slot::jobs] for slot in range(jobs)]
        self.running: dict[str, tuple[subprocess.Popen, list[int]]] = {}
        self.stop = StopSignal(0)

    def training(self, name: str, command: list[str], minutes: float) -> tuple[str, list[str]] | None:
        """What is left to do of a training that may take so many minutes (0: as long as it takes)."""
        label = f"train_{name}"
        left = minutes - self.minutes.get(label, 0.0)
        if label in self.done or (minutes and left < MIN_MINUTES):
            return None
        return label, command + (["--minutes", f"{left:.2f}"] if minutes else [])

    def run(self, jobs: Sequence[tuple[str, list[str]] | None]) -> None:
        """Runs all of them; ValueError for one that fails (the others are ended), SystemExit after a signal."""
        waiting, last = [job for job in jobs if job], time.monotonic()
        try:
            while waiting or self.running:
                while waiting and self.slots:
                    label, command = waiting.pop(0)
                    print(f"{label}: {shlex.join(command)}", flush=True)
                    cores = self.slots.pop(0)
                    restrict = partial(os.sched_setaffinity, 0, cores) if cores else None
                    with open(self.folder / f"{label}.log", "a") as log:
                        self.running[label] = (subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                                                start_new_session=True, preexec_fn=restrict), cores)
                time.sleep(INTERVAL)
                now = time.monotonic()
                for label in self.running:
                    self.minutes[label] = self.minutes.get(label, 0.0) + (now - last) / 60
                last = now
                self._save()
                if self.stop:  # before a poll: what a signal ended must not count as done
                    raise SystemExit(f"stopped ({self.stop.reason}); the same command goes on from here")
                for label in [label for label, (process, _) in self.running.items() if process.poll() is not None]:
                    process, cores = self.running.pop(label)
                    self.slots.append(cores)
                    if process.returncode:
                        raise ValueError(f"{label} failed with status {process.returncode}; see "
                                         f"{self.folder / label}.log")
                    self.done.append(label)
        finally:
            for process, _ in self.running.values():
                process.terminate()
            for process, _ in self.running.values():
                process.wait()
            self.running.clear()
            self._save()

    def _save(self) -> None:
        write_atomically(self.state, (json.dumps({"minutes": self.minutes, "done": self.done}) + "\n").encode())
