"""When to stop before the end: on signals, when the launcher has died, or after a time limit."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from covergen.distributed.environment import launched

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def launcher_is_gone() -> bool:
    """Asks for SIGTERM when the launcher of this process dies, so that it stops writing; True when it already has."""
    if sys.platform != "linux" or not launched():
        return False
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if parent == 1:  # an orphan, or the launcher is the first process of a container
        return not any(word in Path("/proc/1/cmdline").read_bytes() for word in (b"accelerate", b"torch"))
    return os.getppid() != parent


class StopSignal:
    """Becomes true on SIGTERM, on SIGINT, when the launcher dies, or after a number of minutes (0: no limit)."""

    def __init__(self, minutes: float) -> None:
        self.reason: str | None = None  # for people
        self.deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        self.minutes = minutes
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if launcher_is_gone():
            self.reason = "the launcher is gone"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:  # a second Ctrl-C: now
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.reason = f"{signal.Signals(number).name} received"

    @property
    def out_of_time(self) -> bool:
        """Whether the minutes are over: unlike after a signal, there is time for a last grid."""
        return time.monotonic() > self.deadline

    def __bool__(self) -> bool:
        if self.reason is None and self.out_of_time:
            self.reason = f"{self.minutes:g} minutes are over"
        return self.reason is not None

    def status(self, timed: bool) -> int:
        """The exit status after all processes stopped together, for the time limit of one of them if it is ``timed``.

        An elastic launcher takes 0 for the end of the run. If only other machines were asked to go, it is not: with
        status 1 this one's launcher starts its processes again, and the run goes on without the others.
        """
        left_behind = self.reason is None and not timed
        return int(left_behind and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0)
