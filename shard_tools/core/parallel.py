"""Runs a function on many tasks and yields the results in their order.

Either in processes that do not outlive their parent, or on the machines of a Ray cluster (``core.ray_backend``).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Literal, TypeVar

Task, Result = TypeVar("Task"), TypeVar("Result")
Distributor = Literal["processes", "ray"]
_LEAN = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # a thread's buffers: 10 MB each


def available_workers(distributor: Distributor = "processes") -> int:
    """The number of cores this process may use, 12 at most: a worker takes 30 MB, and disks are busy before that.

    Of a Ray cluster, the cores of all its machines.
    """
    if distributor == "ray":
        return _ray().cores()
    return min(12, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def run_tasks(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int,
              distributor: Distributor = "processes", shared: Sequence[Path] = ()) -> Iterator[Result]:
    """Yields ``function(task)`` for every task, in order; a few tasks ahead are in hand at any time, never all.

    Args:
        function: importable by name from a module other than the program's main one.
        workers: number of processes; 1 = this process. Of ray, of tasks that run at a time.
        distributor: ``processes`` of this machine, or ``ray``: the machines of a cluster.
        shared: files and folders that all of these machines must see.

    Raises:
        ChildProcessError: a worker was killed, by lack of memory as a rule.
        Exception: whatever a task raised.
    """
    if distributor == "ray":
        yield from _ray().run_tasks(function, tasks, workers, shared)
        return
    if workers <= 1:
        yield from map(function, tasks)
        return
    tasks = iter(tasks)
    # spawn, not fork: a fork of a process that has threads (torch, tqdm) can hang.
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        waiting: deque[Future] = deque()
        while True:
            for task in islice(tasks, 3 * workers - len(waiting)):
                with _bare_environment():
                    waiting.append(executor.submit(function, task))
            if not waiting:
                return
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError("a worker process was killed, perhaps for lack of memory; run the same command again "
                                "with fewer --workers") from None
    finally:
        executor.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Pool:
    """Who does the tasks of one command: as the arguments of ``run_tasks``."""

    workers: int
    distributor: Distributor = "processes"
    shared: tuple[Path, ...] = ()

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task], alone: bool = False) -> Iterator[Result]:
        """As ``run_tasks``, with no more workers than tasks; ``alone``: in a process of their own in any case."""
        workers = 2 if alone else min(self.workers, len(tasks))
        return run_tasks(function, tasks, workers, self.distributor, self.shared)


def _ray() -> types.ModuleType:
    from shard_tools.core import ray_backend  # where it is asked for only: it takes a second to import, or is absent
    return ray_backend


@contextlib.contextmanager
def _bare_environment() -> Iterator[None]:
    """While workers start: no main module, which spawn would import in each (with torch, where training packs)."""
    main, before = sys.modules["__main__"], {name: os.environ.get(name) for name in _LEAN}
    sys.modules["__main__"] = types.ModuleType("__main__")
    os.environ.update(_LEAN)
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # A parent that was killed can't say so; without this its workers would wait for it for ever, or go on writing.
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
