"""Two network namespaces as two machines: a training run in, one of whose machines dies, returns and is sent away.

    python tests/proofs/two_hosts.py FOLDER        # as root; prints what happens when, and keeps everything in FOLDER

The hosts have addresses of their own and are joined by a bridge in a third namespace, the switch. The one that dies has
its cable pulled before all its processes are killed, so that it says no goodbye: no connection is reset. It is the host
with rank 0, which writes the run folder; the other one is where all meet (``--rdzv_endpoint``).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":  # python tests/proofs/NAME.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.runs import ROOT, environment
from tests.support.waiting import LIMIT, wait_for

HEAD, OTHER = "10.77.0.2", "10.77.0.1"  # ranks are in the order of addresses, so rank 0 is on the one that dies
PORT = 29700
STEPS, PAUSE = 120, 1.5  # so that a host has 2 minutes to return while the other goes on
FLAGS = ["--model", "wgan_gp", "--norm", "group", "--width", "4", "--critic_steps", "2", "--batch_size", "12", "--lr",
         "1e-5", "--steps", str(STEPS), "--sample_every", "0", "--save_every", "10", "--log_every", "1", "--tracker",
         "none", "--mixed_precision", "no", "--threads", "1"]


@dataclass
class Story:
    """What happened.

    Attributes:
        folder: holds ``runs/elastic``, the notes of all processes, the launchers' outputs and the shards.
        events: what, and when (seconds since the beginning).
        silence: seconds from the death of a host to the end of the process on the other.
        left: the first step after the host was asked to leave.
    """

    folder: Path
    events: list[tuple[float, str]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    silence: float = 0.0
    left: int = 0

    def tell(self, event: str) -> None:
        self.events.append((time.monotonic() - self.began, event))
        print(f"{self.events[-1][0]:6.1f} s  {event}", flush=True)

    def notes(self) -> list[dict]:
        """What all processes noted, oldest first; a half-written line at an end is left out."""
        lines = [line for path in (self.folder / "notes").glob("*.jsonl")
                 for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return sorted(map(json.loads, lines), key=lambda note: note["time"])


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def kill_all(space: str) -> None:
    """Every process in a namespace, at once and without a chance to say anything."""
    for process in subprocess.run(["ip", "netns", "pids", space], text=True, capture_output=True).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


@contextlib.contextmanager
def network() -> Iterator[dict[str, str]]:
    """Two hosts and a switch, each in a namespace of its own; address -> namespace. Nothing is left of them."""
    switch, *hosts = spaces = [f"covergen-{name}-{os.getpid()}" for name in ("switch", "head", "other")]
    try:
        for space in spaces:
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for number, (space, address) in enumerate(zip(hosts, (HEAD, OTHER), strict=True)):
            ip("-n", switch, "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("-n", switch, "link", "set", f"port{number}", "master", "bridge", "up")
            ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
        yield dict(zip((HEAD, OTHER), hosts, strict=True))
    finally:
        for space in spaces:
            kill_all(space)
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def launch(space: str, address: str, folder: Path) -> subprocess.Popen:
    """Starts the launcher of a host: the same command on both, but for its own address."""
    words = ["ip", "netns", "exec", space, sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2",
             "--nproc_per_node", "1", "--max_restarts", "10", "--rdzv_backend", "c10d", "--rdzv_id", "elastic",
             "--rdzv_endpoint", f"{HEAD}:{PORT}", "--rdzv_conf", f"last_call_timeout=5,is_host={address == HEAD}",
             "--local_addr", address, str(ROOT / "tests/proofs/loss_log.py"), *FLAGS, "--shards", "shards",
             "--name", "elastic"]
    env = environment(GLOO_SOCKET_IFNAME="eth0", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", NOTES=str(folder / "notes"),
                      PAUSE=str(PAUSE))
    with open(folder / f"{address}.txt", "a") as said:
        return subprocess.Popen(words, cwd=folder, env=env, stdout=said, stderr=subprocess.STDOUT)


def alive(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def make_shards(out: Path) -> None:
    """A small packed demo world."""
    from shard_tools.demo import make
    from shard_tools.pack import pack
    make(out.parent / "raw", tier="toy", resolution=32, albums=90)
    with contextlib.redirect_stdout(None):
        assert pack(str(out.parent / "raw"), str(out), workers=1) == 0


def play(folder: Path) -> Story:
    """Trains on two hosts, of which one dies, returns, and is then asked to leave as one that is preempted.

    Raises:
        RuntimeError, AssertionError: something that must happen did not.
    """
    (folder / "notes").mkdir(parents=True)
    make_shards(folder / "shards")
    story = Story(folder)
    with network() as spaces:
        head, other = (launch(spaces[address], address, folder) for address in (HEAD, OTHER))
        wait_for(lambda: [n for n in story.notes() if n["ranks"] == 2 and n["step"] >= 25], "both hosts train",
                 by=[head, other], pause=0.2)
        story.tell("both hosts have trained 25 steps as two ranks")
        workers = {note["rank"]: note["process"] for note in story.notes()}

        ip("-n", spaces[OTHER], "link", "set", "eth0", "down")
        kill_all(spaces[OTHER])
        other.wait()
        died = time.monotonic()
        wait_for(lambda: not alive(workers[0]), "rank 0 is dead", by=[head], pause=0.2)
        if not alive(workers[1]):
            raise RuntimeError("rank 1 died with the other host, so nothing can be learnt of silence")
        story.tell(f"the host with rank 0 is dead, after step {story.notes()[-1]['step']}")
        wait_for(lambda: not alive(workers[1]), "the process on the other host ends", by=[head], pause=0.2)
        story.silence = time.monotonic() - died
        story.tell(f"the process on the other host has ended, {story.silence:.0f} s later")
        wait_for(lambda: story.notes()[-1]["ranks"] == 1, "the other host goes on alone", by=[head], pause=0.2)
        story.tell(f"it goes on alone, with step {story.notes()[-1]['step']}")

        ip("-n", spaces[OTHER], "link", "set", "eth0", "up")
        other = launch(spaces[OTHER], OTHER, folder)
        wait_for(lambda: story.notes()[-1]["ranks"] == 2, "the host returns", by=[head, other], pause=0.2)
        story.tell(f"the host is back, two ranks go on with step {story.notes()[-1]['step']}")

        stayed = story.notes()[-1]["step"]
        wait_for(lambda: story.notes()[-1]["step"] >= stayed + 5, "both train on", by=[head, other], pause=0.2)
        other.terminate()
        other.wait(timeout=LIMIT)
        story.tell(f"the host was asked to leave, and has left after step {story.notes()[-1]['step']}")
        wait_for(lambda: story.notes()[-1]["ranks"] == 1, "the other host goes on alone", by=[head], pause=0.2)
        story.left = story.notes()[-1]["step"]
        story.tell(f"the other one goes on alone, with step {story.left}")
        (folder / "notes/hurry").touch()
        if head.wait(timeout=LIMIT):
            raise RuntimeError(f"the launcher ended with status {head.returncode}")
        story.tell("the run is complete")
    return story


if __name__ == "__main__":
    play(Path(sys.argv[1]).resolve())
