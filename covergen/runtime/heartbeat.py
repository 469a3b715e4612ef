"""Whether the other processes are alive: a sign of life from each at a time in, the end of this process out.

A process that dies on this machine is noticed by its launcher and by broken connections. A machine that loses its power
or its network says nothing, and those that wait for it would wait for as long as the process group allows. So every
process counts up a number in the store that all met in, and watches that of one other.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

EVERY = 4.0  # seconds between two signs of life
PATIENCE = 30.0  # seconds without one after which a process counts as dead
STATUS = 70  # of a process that ends for another (EX_SOFTWARE of sysexits.h)


def own_store(timeout: float) -> dist.Store:
    """A connection of its own to the store that the processes met in, for one that waits in it blocks all others."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False,
                         timeout=timedelta(seconds=timeout))


class Heartbeat:
    """Signs of life of this process, and its watch over the one before it; ends the process when that one is dead."""

    def __init__(self, rank: int, ranks: int, meeting: str) -> None:
        """Args: rank: of this process; ranks: how many; meeting: the same for all of them, and new in every run."""
        self.rank, self.other, self.meeting = rank, (rank - 1) % ranks, f"covergen/{meeting}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()

    def close(self) -> None:
        """No more signs; the one who watches this process is told that this is right."""
        self._over.set()
        self._thread.join(2 * EVERY)

    def _beat(self) -> None:
        count, seen, since = 0, b"", time.monotonic()
        try:
            store = own_store(PATIENCE)
            store.set(f"{self.meeting}/name/{self.rank}", socket.gethostname())
            while not self._over.wait(EVERY if count else 0):
                count += 1
                store.set(f"{self.meeting}/{self.rank}", str(count))
                if store.check([f"{self.meeting}/dead"]):
                    self._end(store.get(f"{self.meeting}/dead").decode())
                last = self._last(store)
                if last != seen:
                    seen, since = last, time.monotonic()
                elif last != b"done" and time.monotonic() - since > PATIENCE:
                    name = f"{self.meeting}/name/{self.other}"
                    host = store.get(name).decode() if store.check([name]) else "a host that never began"
                    reason = f"process {self.other} on {host} has given no sign of life for {PATIENCE:.0f} s"
                    store.set(f"{self.meeting}/dead", reason)
                    self._end(reason)
            store.set(f"{self.meeting}/{self.rank}", "done")
        except Exception as error:  # the store is gone: its host or the launcher has died, or all is over anyway
            if not self._over.is_set():
                self._end(f"the launcher that all processes met at can't be reached any more ({type(error).__name__})")

    def _last(self, store: dist.Store) -> bytes:
        key = f"{self.meeting}/{self.other}"
        return store.get(key) if store.check([key]) else b""

    def _end(self, reason: str) -> None:
        print(f"error: {reason}; process {self.rank} ends. Started again, the run goes on from its newest checkpoint",
              file=sys.stderr, flush=True)
        os._exit(STATUS)  # the main thread may wait in a collective for ever
