"""When to stop early: signals, a dead launcher and a time limit in, one flag out that the loop looks at."""

from __future__ import annotations

import ctypes
import signal
import sys
import time
from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Stop:
    """Becomes true on SIGTERM, on SIGINT, when the launcher dies, or after a number of minutes.

    Attributes:
        reason: why, for people; None while there is none.
    """

    def __init__(self, minutes: float) -> None:
        """Args: minutes: from now on; 0 for no limit."""
        self.reason: str | None = None
        self.deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        self.minutes = minutes
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._heard)
        if sys.platform == "linux":
            # A killed launcher must not leave processes behind that go on writing: ask for SIGTERM when it dies.
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:  # a second Ctrl-C: now
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.reason = f"{signal.Signals(number).name} received"

    def __bool__(self) -> bool:
        if self.reason is None and time.monotonic() > self.deadline:
            self.reason = f"{self.minutes:g} minutes are over"
        return self.reason is not None
