"""What the processes of a run agree on: wishes, weights and statistics of each in, the same on all out."""

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


def bits_of(network: nn.Module) -> Tensor:
    """A sum over the raw bits of all weights and buffers, int64."""
    return torch.stack([value.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)
                        for value in network.state_dict().values() if value.dtype == torch.float32]).sum()


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


class DelayedAny:
    """Asks all ranks for a wish; they talk on the host, for it must never wait for a GPU's queue."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.group = dist.new_group(backend="gloo") if ranks > 1 else None
        self._asked: tuple[Any, Tensor] | None = None

    def __call__(self, wish: bool) -> bool:
        """Whether any rank wished so; with several ranks the answer to the wishes of one call ago, so nobody waits."""
        if self.ranks == 1:
            return wish
        flag = torch.tensor(int(wish))
        before, self._asked = self._asked, (dist.all_reduce(
            flag, dist.ReduceOp.MAX, group=self.group, async_op=True), flag)
        if before is None:
            return False
        before[0].wait()
        return bool(before[1])

    def close(self) -> None:
        """Hears the last answer, which somebody may still be giving."""
        if self._asked:
            self._asked[0].wait()


def mean_buffers(networks: Iterable[nn.Module], ranks: int) -> None:
    """Sets the running statistics of networks to their mean over the ranks."""
    for network in networks:
        for buffer in network.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= ranks


def check_weights(networks: dict[str, nn.Module], ranks: int) -> None:
    """Compares the bits of all weights over the ranks.

    Raises:
        RuntimeError: ranks have drifted apart.
        FloatingPointError: a network holds NaN or infinity.
    """
    sums = torch.stack([bits_of(network) for network in networks.values()])
    low, high = sums.clone(), sums.clone()
    if ranks > 1:
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
    for name, network, same in zip(networks, networks.values(), (low == high).tolist(), strict=True):
        if not same:
            raise RuntimeError(f"the weights of {name} differ between processes; nothing was saved")
        if not all(bool(value.isfinite().all()) for value in network.state_dict().values()):
            raise FloatingPointError(f"the weights of {name} are not finite")


LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|store", re.IGNORECASE)


def is_peer_failure(error: Exception) -> bool:
    """Whether an error says that other processes are gone."""
    return isinstance(error, RuntimeError) and bool(LOST.search(f"{type(error).__name__} {error}"))


@contextlib.contextmanager
def report_root_cause(ranks: int, delay: float = 3.0) -> Iterator[None]:
    """Lets a process whose partners have died speak after them, and in one line, for the reason is theirs.

    Raises:
        ConnectionError: a collective operation failed because others are gone.
    """
    try:
        yield
    except RuntimeError as error:
        if ranks == 1 or not is_peer_failure(error):
            raise
        time.sleep(delay)
        lines = str(error).splitlines() or [type(error).__name__]
        raise ConnectionError("another process has ended: the reason is what that one said, or what the "
                              f"launcher says of it ({lines[0][:160]})") from None
