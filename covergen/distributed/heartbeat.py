"""Processes that watch each other: the store where they met in, an end of this one out when another falls silent.

A machine that loses its power or its cable sends no goodbye, so the others would wait in the middle of a collective for
as long as that is allowed to take: minutes, or half an hour, for rank 0 may well be evaluating alone meanwhile. Every
process therefore counts aloud in the store where all of them met, from a thread of its own, and listens to the next
one. Who misses a voice writes down who it was, and all read that.
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

INTERVAL = 3.0  # seconds between counts
SILENCE = 30.0  # seconds without one after which a process counts as dead
ANSWER = 20.0  # seconds that the store has for an answer


class Heartbeat:
    """Watches over the processes of a group until it is closed."""

    def __init__(self, rank: int, ranks: int, group: dist.ProcessGroup) -> None:
        """Args:
            rank: of this process.
            ranks: how many there are.
            group: of all of them, on the host.
        """
        # The store may be older than this group: the launcher's own, which outlives a restart.
        name = [secrets.token_hex(8)]
        dist.broadcast_object_list(name, group=group)
        self.rank, self.next = rank, (rank + 1) % ranks
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                              timeout=timedelta(seconds=ANSWER), wait_for_workers=False)
        self.store = dist.PrefixStore(f"heartbeat/{name[0]}", store)
        self.group, self.over = group, threading.Event()
        self.answered = time.monotonic()
        self.threads = [threading.Thread(target=work, name=f"heartbeat {work.__name__}", daemon=True)
                        for work in (self._talk, self._guard)]
        for thread in self.threads:
            thread.start()

    def fail(self, reason: str) -> None:
        """Tells all others why this process is about to die: they end with it."""
        self.over.set()
        with contextlib.suppress(RuntimeError):  # the store died first
            self.store.set("dead", f"process {self.rank} died: {reason}")
            if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                time.sleep(1.5 * INTERVAL)  # the store is in this very process: let the others read it first

    def close(self) -> None:
        """Waits until every process is here, then stops watching."""
        dist.barrier(group=self.group)
        self.over.set()
        for thread in self.threads:
            thread.join(ANSWER)

    def _talk(self) -> None:
        count, heard, when = 0, b"", time.monotonic()
        while not self.over.wait(INTERVAL):
            count += 1
            try:
                self.store.set(str(self.rank), str(count))
                if self.store.check(["dead"]):
                    self._end(self.store.get("dead").decode())
                now = self.store.get(str(self.next)) if self.store.check([str(self.next)]) else b""
                self.answered = time.monotonic()
                if now != heard:
                    heard, when = now, self.answered
                elif self.answered - when > SILENCE:
                    reason = f"process {self.next} has not been heard of for {SILENCE:.0f} s"
                    self.store.set("dead", reason)
                    self._end(reason)
            except RuntimeError as error:
                if not self.over.is_set():  # else all have said goodbye, and the store's process was just faster
                    self._end(f"the process where all others meet is gone ({str(error).strip().splitlines()[0]})")
                return

    def _guard(self) -> None:
        """A question to a machine that has vanished never returns, whatever time limit the store was given."""
        while not self.over.wait(1.0):
            if time.monotonic() - self.answered > INTERVAL + ANSWER:
                self._end(f"the process where all others meet has not answered for {ANSWER:.0f} s")

    def _end(self, reason: str) -> NoReturn:
        """Ends this process at once: its other threads wait for what will never come, so they can't be asked to."""
        print(f"error: process {self.rank} ends: {reason}; a restarted run goes on from its newest checkpoint",
              file=sys.stderr, flush=True)
        if self.rank == 0:  # the store may be in this very process: let the others read it first
            time.sleep(1.5 * INTERVAL)
        os._exit(1)
