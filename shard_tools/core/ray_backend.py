"""Runs tasks on the machines of a Ray cluster.

The only file that imports ray. A task is tried again where a machine or a process dies: tasks leave a whole file or
none, so doing one twice does no harm. The cluster is that of ``RAY_ADDRESS``, else one that runs on this machine, else
one of this machine alone, which ends with the program.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

_TRIES = 3  # more for a task whose machine or process dies
_STORE = 100 * 2**20  # bytes of shared memory of a cluster that is started here: tasks and results are small


def cores() -> int:
    """The cores of the whole cluster."""
    return max(1, int(_connect().cluster_resources().get("CPU", 1)))


def run_tasks(function: Callable[[Any], Any], tasks: Iterable[Any], at_once: int,
              shared: Sequence[Path] = ()) -> Iterator[Any]:
    """Yields ``function(task)`` for every task, in order; each task takes a core.

    Args:
        function: importable by name on every machine.
        tasks: what they name must lie where every machine finds it.
        at_once: so many tasks are in hand at most.
        shared: files and folders that every machine must see; each task checks that before it begins.

    Raises:
        ValueError: ray is not installed, the cluster does not answer, or a machine does not see what is shared.
        ChildProcessError: machines or processes died more often than is tried again.
        Exception: whatever a task raised.
    """
    ray = _connect()
    remote = ray.remote(num_cpus=1, max_retries=_TRIES)(_call)
    tasks, waiting = iter(tasks), deque()
    try:
        while True:
            waiting.extend(remote.remote(function, task, tuple(map(str, shared)))
                           for task in islice(tasks, max(1, at_once) - len(waiting)))
            if not waiting:
                return
            try:
                result = ray.get(waiting.popleft())
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
    """On the machine that does it."""
    for path in shared:
        if not os.path.exists(path):
            raise ValueError(f"machine {os.uname().nodename} of the Ray cluster does not see {path}: --source and "
                             "--out must lie on a file system that all its machines have, under the same name")
    return function(task)


def _connect() -> ModuleType:
    """Ray, connected to a cluster.

    Raises:
        ValueError: it is not installed, or the cluster of ``RAY_ADDRESS`` does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
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
