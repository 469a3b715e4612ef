"""A heartbeat between the processes of a run: each ends when another has fallen silent.

A machine that loses its power closes no connection, and the others would wait in a collective for hours. Every process
therefore counts up in the store where all of them met, from a thread of its own, and watches the count of the next one.
The first that finds a count standing still writes down whose it is, and all read that.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import threading
import time
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

INTERVAL = 3.0  # seconds between beats
SILENCE = 30.0  # seconds without one after which a process counts as dead
ANSWER = 20.0  # seconds that the store has for an answer


class Heartbeat:
    """Watches over the processes of a group until it is closed."""

    def __init__(self, rank: int, ranks: int, group: dist.ProcessGroup) -> None:
        """Starts to beat and to watch; ``group`` has all ranks and works on the host."""
        # The store may be older than this group: the launcher's own, which outlives a restart.
        name = [secrets.token_hex(8)]
        dist.broadcast_object_list(name, group=group)
        self.rank, self.next = rank, (rank + 1) % ranks
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                              timeout=timedelta(seconds=ANSWER), wait_for_workers=False)
        self.store = dist.PrefixStore(f"heartbeat/{name[0]}", store)
        self.group, self.closed, self.last_answer = group, threading.Event(), time.monotonic()
        self.threads = [threading.Thread(target=work, name=f"heartbeat {work.__name__}", daemon=True)
                        for work in (self._beat, self._watch_store)]
        for thread in self.threads:
            thread.start()

    def fail(self, reason: str) -> None:
        """Writes down why this process is about to die: all others end with it."""
        self.closed.set()
        with contextlib.suppress(RuntimeError):  # the store died first
            self.store.set("dead", f"process {self.rank} died: {reason}")
            if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                time.sleep(1.5 * INTERVAL)  # the store is in this very process: let the others read it first

    def close(self) -> None:
        """Waits until every process is here, then stops watching."""
        dist.barrier(group=self.group)
        self.closed.set()
        for thread in self.threads:
            thread.join(ANSWER)

    def _beat(self) -> None:
        count, seen, since = 0, b"", time.monotonic()
        while not self.closed.wait(INTERVAL):
            count += 1
            try:
                self.store.set(str(self.rank), str(count))
                if self.store.check(["dead"]):
                    self._end(self.store.get("dead").decode())
                now = self.store.get(str(self.next)) if self.store.check([str(self.next)]) else b""
                self.last_answer = time.monotonic()
                if now != seen:
                    seen, since = now, self.last_answer
                elif self.last_answer - since > SILENCE:
                    reason = f"process {self.next} has sent no heartbeat for {SILENCE:.0f} s"
                    self.store.set("dead", reason)
                    self._end(reason)
            except RuntimeError as error:
                if not self.closed.is_set():  # else all have finished, and the store's process was just faster
                    self._end(f"the process where all others meet is gone ({str(error).strip().splitlines()[0]})")
                return

    def _watch_store(self) -> None:
        """A question to a machine that has vanished never returns, whatever time limit the store was given."""
        while not self.closed.wait(1.0):
            if time.monotonic() - self.last_answer > INTERVAL + ANSWER:
                self._end(f"the process where all others meet has not answered for {ANSWER:.0f} s")

    def _end(self, reason: str) -> NoReturn:
        """Ends this process at once: its other threads wait for what will never come, so they can't be asked to."""
        print(f"error: process {self.rank} ends: {reason}; a restarted run goes on from its newest checkpoint",
              file=sys.stderr, flush=True)
        if self.rank == 0:  # the store may be in this very process: let the others read it first
            time.sleep(1.5 * INTERVAL)
        os._exit(1)
