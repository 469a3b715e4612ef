"""What this machine gives a process: its rank among the launched ones, threads to compute with, memory."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch


def processes() -> tuple[int, int, int]:
    """Rank, number of processes and number of them on this machine, as the launcher set them."""
    rank, size, local = (int(os.environ.get(name, default)) for name, default in
                         (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
    return rank, size, local


def use_threads(wanted: int) -> tuple[int, str]:
    """Sets how many threads this process computes with; returns the number and where it comes from.

    Launchers set OMP_NUM_THREADS=1 where the user did not, as their own environment shows; that leaves cores idle.
    """
    local = processes()[2]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS")
    if wanted:
        number, source = wanted, "--threads"
    elif given and (given != "1" or not launched() or _user_set_omp()):
        number, source = int(given), "OMP_NUM_THREADS"
    else:
        number, source = max(1, cores // local), f"{cores} cores / {local} local process{'es' if local > 1 else ''}"
    torch.set_num_threads(number)
    return number, source


def launched() -> bool:
    """Whether ``accelerate launch`` or ``torchrun`` started this process."""
    return bool({"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & set(os.environ))


def _user_set_omp() -> bool:
    try:
        return b"\0OMP_NUM_THREADS=" in b"\0" + Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False


# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_memory(keep: bool = True) -> None:
    """Lets this process keep the memory of freed tensors instead of handing it back to the system each time.

    By default glibc maps every block above 32 MB anew and the kernel clears it again, a quarter of a step's time on
    CPUs. False sets what the defaults come to in a process with large tensors. Nothing happens without glibc.
    """
    mebi = 2**20
    settings = (2**30, 2**31 - 1, 256 * mebi) if keep else (32 * mebi, 64 * mebi, 128 * 2**10)
    try:
        libc = ctypes.CDLL("libc.so.6")
        for name, value in zip((_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_TOP_PAD), settings, strict=True):
            libc.mallopt(name, value)
        if not keep:
            libc.malloc_trim(0)
    except (OSError, AttributeError):
        pass


def free_memory() -> int:
    """Bytes of memory that can still be taken here, by all processes together; caches of files count as free.

    Limits of containers and batch systems (cgroups of either version) count; 0 where the system does not say.
    """
    try:
        metadata = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(metadata["MemAvailable"].split()[0]) * 1024
        groups = [line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except (OSError, KeyError, ValueError):
        return 0
    for kinds, name in groups:
        if kinds and "memory" not in kinds.split(","):
            continue
        root, limit, used = (("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else
                             ("/sys/fs/cgroup", "memory.max", "memory.current"))
        group = Path(root, name.lstrip("/"))
        for folder in (group, *group.parents):
            try:
                most, taken = int((folder / limit).read_text()), int((folder / used).read_text())  # "max": no limit
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free = min(free, most - taken + int(stat.get("inactive_file", 0)))
            except (OSError, ValueError):
                pass
    return max(0, free)
