"""The processes of a command that is not training: numbered pieces of work in, all results on every process out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from covergen.runtime.machine import processes

PATIENCE = timedelta(hours=2)  # while rank 0 trains a judge, the others wait


def join() -> Ranks:
    """Meets the other processes that the launcher started, if it did."""
    rank, ranks, _ = processes()
    if ranks > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("gloo", timeout=PATIENCE)
    return Ranks(rank, ranks)


class Ranks:
    """This process among several, or alone.

    Attributes:
        rank: of this process.
        ranks: how many there are.
    """

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        self.rank, self.ranks = rank, ranks

    def share(self, work: Iterable[Any], do: Callable[[Any], Any]) -> list[Any]:
        """What ``do`` makes of every piece of work, in order, on all processes; each does every ranks-th piece.

        A piece is done whole by one process, so results do not depend on how many there are.
        """
        mine = {number: do(piece) for number, piece in enumerate(work) if number % self.ranks == self.rank}
        if self.ranks > 1:
            parts: list[Any] = [None] * self.ranks
            dist.all_gather_object(parts, mine)
            mine = {number: result for part in parts for number, result in part.items()}
        return [mine[number] for number in sorted(mine)]

    def close(self) -> None:
        """Leaves the process group."""
        if self.ranks > 1:
            dist.barrier()
            dist.destroy_process_group()
