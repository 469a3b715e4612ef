"""Speed of an all-reduce, as of gradients, among processes of this machine."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(processes: int = 2, mbyte: float = 25.0, rounds: int = 5) -> int:
    """Times an all-reduce over the loopback (gloo), the bus bandwidth of which is 2 (n-1) / n x bytes / seconds.

    Args:
        processes: that take part, one thread each.
        mbyte: what is reduced, in MB; DDP reduces gradients in pieces of 25 MiB.
        rounds: of which the median counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_reduce, (processes, mbyte, rounds, Path(folder)), processes, start_method="spawn")
        large, latency = json.loads((Path(folder) / "seconds.json").read_text())
    bandwidth = 2 * (processes - 1) / processes * mbyte * 1e6 / large
    print(f"{processes} processes over the loopback: {bandwidth / 1e9:.2f} GB/s bus bandwidth for {mbyte:g} MB, "
          f"{latency * 1e6:.0f} us for one number")
    print(json.dumps({"bench": "reduce", "processes": processes, "mbyte": mbyte, "bytes_per_second": bandwidth,
                      "latency_seconds": latency, "torch": torch.__version__}))
    return 0


def _reduce(rank: int, processes: int, mbyte: float, rounds: int, folder: Path) -> None:
    """One of the processes; the first writes the median seconds for all numbers and for a single one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    medians = []
    for count in (int(mbyte * 1e6 / 4), 1):
        numbers, seconds = torch.ones(count), []
        for _ in range(rounds + 1):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(numbers)
            seconds.append(time.perf_counter() - began)
        medians.append(statistics.median(seconds[1:]))
    if rank == 0:
        (folder / "seconds.json").write_text(json.dumps(medians))
    dist.barrier()
    dist.destroy_process_group()
