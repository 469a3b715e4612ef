"""Runs a function on many tasks and yields the results in their order, on this machine or those of a Ray cluster.

The cluster is that of ``RAY_ADDRESS``, else one that runs on this machine, else one of this machine alone, which ends
with the program. A task is tried again there where a machine or a process dies: tasks leave a whole file or none.
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
from typing import Any, Literal, TypeVar

Task, Result = TypeVar("Task"), TypeVar("Result")
Distributor = Literal["processes", "ray"]
_LEAN = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # a thread's buffers: 10 MB each
_TRIES = 3  # more for a task of ray whose machine or process dies
_STORE = 100 * 2**20  # bytes of shared memory of a cluster that is started here: tasks and results are small


def available_workers(distributor: Distributor = "processes") -> int:
    """The number of cores this process may use, 12 at most: a worker takes 30 MB, and disks are busy before that.

    Of a Ray cluster, the cores of all its machines.
    """
    if distributor == "ray":
        return max(1, int(_connect().cluster_resources().get("CPU", 1)))
    return min(12, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def run_tasks(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int,
              distributor: Distributor = "processes", shared: Sequence[Path] = ()) -> Iterator[Result]:
    """Yields ``function(task)`` for every task, in order; a few tasks ahead are in hand at any time, never all.

    Args:
        function: importable by name from a module other than the program's main one.
        workers: number of processes; 1 = this process. Of ray, of tasks that run at a time.
        distributor: ``processes`` of this machine, which do not outlive it, or ``ray``: the machines of a cluster.
        shared: files and folders that all of these machines must see; each task checks that before it begins.

    Raises:
        ChildProcessError: a worker was killed, by lack of memory as a rule; of ray, again and again.
        ValueError: ray is not installed, the cluster does not answer, or a machine does not see what is shared.
        Exception: whatever a task raised.
    """
    if distributor == "ray":
        yield from _run_on_ray(function, tasks, workers, tuple(map(str, shared)))
        return
    if workers <= 1:
        yield from map(function, tasks)
        return

    def submit(task: Task) -> Future:
        with _bare_environment():
            return executor.submit(function, task)

    # spawn, not fork: a fork of a process that has threads (torch, tqdm) can hang.
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield from (future.result() for future in _ahead(submit, tasks, 3 * workers, deque()))
    except BrokenProcessPool:
        raise ChildProcessError("a worker process was killed, perhaps for lack of memory; run the same command again "
                                "with fewer --workers") from None
    finally:
        executor.shutdown(cancel_futures=True)


def _ahead(submit: Callable[[Any], Any], tasks: Iterable[Any], count: int, waiting: deque) -> Iterator[Any]:
    """What ``submit`` gives for every task, in order; up to ``count`` of them are submitted and ``waiting``."""
    tasks = iter(tasks)
    while True:
        waiting.extend(map(submit, islice(tasks, count - len(waiting))))
        if not waiting:
            return
        yield waiting.popleft()


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


def _run_on_ray(function: Callable[[Any], Any], tasks: Iterable[Any], at_once: int,
                shared: Sequence[str]) -> Iterator[Any]:
    ray, waiting = _connect(), deque()
    remote = ray.remote(num_cpus=1, max_retries=_TRIES)(_call)
    try:
        for reference in _ahead(lambda task: remote.remote(function, task, shared), tasks, max(1, at_once), waiting):
            try:
                result = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError,
                    ray.exceptions.OutOfMemoryError) as error:
                raise ChildProcessError(f"machines or processes of the Ray cluster die again and again "
                                        f"({error!s:.200}); run the same command again") from None
            yield result
    finally:
        for reference in waiting:
            ray.cancel(reference)


def _call(function: Callable[[Any], Any], task: Any, shared: Sequence[str]) -> Any:
    """A task on the machine that does it."""
    for path in shared:
        if not os.path.exists(path):
            raise ValueError(f"machine {os.uname().nodename} of the Ray cluster does not see {path}: --source and "
                             "--out must lie on a file system that all its machines have, under the same name")
    return function(task)


def _connect() -> types.ModuleType:
    """Ray, connected to a cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray  # here: it takes a second, or is absent
    except ImportError:
        raise ValueError("--distributor ray needs ray: pip install -e .[ray], on every machine") from None
    if not ray.is_initialized():
        options = {"logging_level": "error", "log_to_driver": False}
        try:
            ray.init(address="auto", **options)
        except ConnectionError as error:
            if address := os.environ.get("RAY_ADDRESS"):
                raise ValueError(f"no Ray cluster answers at RAY_ADDRESS {address} ({error!s:.200}); start it: ray "
                                 "start --head on one machine, ray start --address HEAD:6379 on the others") from None
            ray.init(address="local", include_dashboard=False, object_store_memory=_STORE, **options)
    return ray


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
