"""What the processes of a run do together: share work, sum tensors, compare weights, and end when one of them has."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from covergen.distributed.environment import processes
from covergen.distributed.heartbeat import Heartbeat

# One rank may evaluate or train a judge for long while the others wait; a dead one is found by the heartbeat.
TIMEOUT = timedelta(hours=2)


def join() -> Ranks:
    """Joins the process group that the launcher started this process for, if it started several."""
    rank, ranks, _ = processes()
    if ranks > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return Ranks(rank, ranks)


class Ranks:
    """This process (``rank``) among several (``ranks``), or alone; the ``main`` one writes."""

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        self.rank, self.ranks, self.main = rank, ranks, rank == 0

    def share(self, work: Iterable[Any], do: Callable[[Any], Any]) -> list[Any]:
        """Does every piece of work on one of the processes; returns all results, in order, on every process.

        Each process does every ranks-th piece whole, so results do not depend on their number.
        """
        mine = {number: do(piece) for number, piece in enumerate(work) if number % self.ranks == self.rank}
        if self.ranks > 1:
            parts: list[Any] = [None] * self.ranks
            dist.all_gather_object(parts, mine)
            mine = {number: result for part in parts for number, result in part.items()}
        return [mine[number] for number in sorted(mine)]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on all of them; the tensor itself may be overwritten."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def min(self, values: Tensor) -> Tensor:
        """The same for the elementwise minimum."""
        if self.ranks > 1:
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return values

    @torch.no_grad()
    def mean_buffers(self, networks: Iterable[nn.Module]) -> None:
        """Sets the running statistics of networks to their mean over the ranks."""
        for network in networks if self.ranks > 1 else ():
            for buffer in network.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.ranks

    def check_weights(self, networks: dict[str, nn.Module]) -> None:
        """Compares the bits of all weights over the ranks.

        RuntimeError where ranks have drifted apart, FloatingPointError where a network holds NaN or infinity.
        """
        bits = [[value.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)
                 for value in network.state_dict().values() if value.dtype == torch.float32]
                for network in networks.values()]
        sums = torch.stack([torch.stack(one).sum() for one in bits])
        same = (self.min(sums.clone()) == -self.min(-sums)).tolist()
        for (name, network), alike in zip(networks.items(), same, strict=True):
            if not alike:
                raise RuntimeError(f"the weights of {name} differ between processes; nothing was saved")
            if not all(bool(value.isfinite().all()) for value in network.state_dict().values()):
                raise FloatingPointError(f"the weights of {name} are not finite")

    def close(self) -> None:
        if self.ranks > 1:
            dist.barrier()
            dist.destroy_process_group()


class WatchedRanks(Ranks):
    """Ranks that train together: they watch each other with a heartbeat, and agree on flags without waiting."""

    def __init__(self, rank: int, ranks: int) -> None:
        """The process group is there already. What is agreed on goes over the host, apart from any GPU's queue."""
        super().__init__(rank, ranks)
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if ranks > 1 else None
        self._heartbeat = Heartbeat(rank, ranks, self._group) if ranks > 1 else None
        self._asked: tuple[Any, Tensor] | None = None

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; with several ranks the answer of one call ago, so nobody waits."""
        if self.ranks == 1:
            return flag
        before, mine = self._asked, torch.tensor(int(flag))
        self._asked = dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._group, async_op=True), mine
        if before is None:
            return False
        before[0].wait()
        return bool(before[1])

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 goes through the block before the others do."""
        if self.ranks > 1 and not self.main:
            dist.barrier(group=self._group)
        yield
        if self.ranks > 1 and self.main:
            dist.barrier(group=self._group)

    def report_failure(self, error: Exception) -> None:
        """Tells the other ranks why this one is about to die, unless it is because they have."""
        if self._heartbeat and not is_peer_failure(error):
            self._heartbeat.fail(str(error) or type(error).__name__)

    def close(self) -> None:
        """Waits until every rank is here, then leaves the process group."""
        if self._asked:
            self._asked[0].wait()
        if self._heartbeat:
            self._heartbeat.close()
            dist.destroy_process_group()


LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|store", re.IGNORECASE)


def is_peer_failure(error: Exception) -> bool:
    """Whether an error says that other processes are gone."""
    return isinstance(error, RuntimeError) and bool(LOST.search(f"{type(error).__name__} {error}"))


@contextlib.contextmanager
def report_root_cause(ranks: int, delay: float = 3.0) -> Iterator[None]:
    """Lets a process that failed because others have died report after them, in one line: the reason is theirs."""
    try:
        yield
    except RuntimeError as error:
        if ranks == 1 or not is_peer_failure(error):
            raise
        time.sleep(delay)
        lines = str(error).splitlines() or [type(error).__name__]
        raise ConnectionError("another process has ended: the reason is what that one said, or what the "
                              f"launcher says of it ({lines[0][:160]})") from None
