"""Waiting for evidence: for what another process or thread does, however long a busy machine takes for it.

A fixed sleep after which something is assumed fails on a slow machine, and so does a limit of seconds; what is waited
for here comes soon, and the limits are for tests that fail.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

LIMIT = 300.0  # seconds
T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str, limit: float = LIMIT, by: Sequence[subprocess.Popen] = (),
             pause: float = 0.02) -> T:
    """What ``condition`` returns as soon as that is true.

    Args:
        condition: looks at the evidence.
        what: is awaited, for people.
        limit: seconds.
        by: processes that must be alive until then.
        pause: seconds between looks.

    Raises:
        AssertionError: it took longer, or one of the processes ended before.
    """
    deadline = time.monotonic() + limit
    while True:
        ended = [process for process in by if process.poll() is not None]
        if found := condition():
            return found
        for process in ended:
            said = f": {process.communicate()[0]}" if process.stdout else ""
            raise AssertionError(f"a process ended with status {process.returncode} before {what}{said}")
        assert time.monotonic() < deadline, f"after {limit:.0f} s still waiting for {what}"
        time.sleep(pause)
