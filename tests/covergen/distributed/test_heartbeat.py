"""Processes that train together end together: when one is frozen or dies with a reason, but not when one is busy."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

from tests.support import warm
from tests.support.waiting import LIMIT, wait_for

RANKS = 3


def be(rank: int, port: int, said: str, fate: str) -> None:
    """A process that trains nothing: rank 1 meets its fate, the others wait for it for ever."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    import torch.distributed as dist

    from covergen.distributed import heartbeat
    heartbeat.INTERVAL, heartbeat.SILENCE, heartbeat.ANSWER = 0.1, 3.0, 3.0
    dist.init_process_group("gloo")
    beat = heartbeat.Heartbeat(rank, RANKS, dist.new_group(backend="gloo"))
    began, evaluated = beat.last_answer, Path(f"{said}.evaluated")
    wait_for(lambda: beat.last_answer != began, "a first beat")
    Path(f"{said}.{rank}").touch()
    wait_for(lambda: all_there(Path(said)), "the others")
    if fate == "ends well":
        if rank == 1:
            time.sleep(2 * heartbeat.SILENCE)  # it evaluates alone: a busy process is not a dead one
            evaluated.touch()
        beat.close()
        assert evaluated.exists()  # all have waited for it
    elif fate == "dies" and rank == 1:
        beat.fail("the disk is on fire")
        os._exit(1)
    else:
        time.sleep(LIMIT)


def all_there(said: Path) -> bool:
    """Whether all processes know of each other."""
    return all(Path(f"{said}.{rank}").exists() for rank in range(RANKS))


def play(folder: Path, fate: str, frozen: int | None = None) -> tuple[list[int | None], str, float]:
    """Exit statuses of the processes, what they said, and how long it took after all had met."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = folder / "said.txt"
    processes = [warm._context.Process(target=be, args=(rank, port, str(said), fate)) for rank in range(RANKS)]
    for process in processes:
        process.start()

    def met() -> bool:
        ended = [process for process in processes if process.exitcode]
        together = all_there(said)
        assert together or not ended, said.read_text()
        return together
    try:
        wait_for(met, "all processes")
        began = time.monotonic()
        if frozen is not None:
            os.kill(processes[frozen].pid, signal.SIGSTOP)
        for rank, process in enumerate(processes):
            if rank != frozen:
                process.join(2 * LIMIT)
        return [process.exitcode for process in processes], said.read_text(), time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_a_process_that_falls_silent_ends_the_others_who_name_it(tmp_path: Path) -> None:
    statuses, said, seconds = play(tmp_path, "waits", frozen=1)
    assert statuses == [1, None, 1] and seconds < 60
    assert said.count("process 1 has sent no heartbeat for 3 s") == 2


def test_so_does_the_process_that_keeps_the_store_though_no_answer_ever_comes(tmp_path: Path) -> None:
    statuses, said, seconds = play(tmp_path, "waits", frozen=0)
    assert statuses == [None, 1, 1] and seconds < 60
    assert said.count("the process where all others meet has not answered for 3 s") == 2


def test_the_reason_of_a_death_reaches_all(tmp_path: Path) -> None:
    statuses, said, seconds = play(tmp_path, "dies")
    assert statuses == [1, 1, 1] and seconds < 60
    assert said.count("process 1 died: the disk is on fire; a restarted run goes on") == 2


def test_a_long_wait_for_a_busy_process_is_no_reason_to_end(tmp_path: Path) -> None:
    statuses, said, _ = play(tmp_path, "ends well")
    assert statuses == [0, 0, 0] and "ends:" not in said
