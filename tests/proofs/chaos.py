"""Kills a run again and again at bad moments, and proves what is left.

    python tests/proofs/chaos.py --kills 30 --ranks 2

A random rank, the launcher or everything at once dies by SIGKILL: between two steps, while a checkpoint is written, or
while rank 0 evaluates. The same command goes on, with as many ranks as before or (``--ranks 1,2,4``) with others. In
the end every step is in the log once, every global batch was trained on once by those steps that count, and with a
fixed number of ranks the weights are bit for bit those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil

if __name__ == "__main__":  # python tests/proofs/NAME.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.paths import ROOT
from tests.support.runs import command, environment, largest_difference, log_of, same_bits, weights
from tests.support.waiting import LIMIT, wait_for

STEPS, BATCH = 600, 12
FLAGS = ["--norm", "group", "--width", "4", "--batch_size", str(BATCH), "--critic_steps", "2", "--steps", str(STEPS),
         "--save_every", "10", "--sample_every", "200", "--eval_every", "25", "--log_every", "1", "--lr", "1e-5",
         "--tracker", "none"]

# Notes which rows every step of every start was trained on, and when rank 0 evaluates.
SCRIPT = """
import json, os, sys, time
from pathlib import Path
from covergen import train
from covergen.data.stream import BatchStream
from covergen.evaluation.pipeline import QuickEvaluation
from shard_tools import cli

notes = open(f"rows/{os.environ['START']}-{os.environ.get('RANK', 0)}-{os.getpid()}", "w", buffering=1)
batch, evaluate = BatchStream.batch, QuickEvaluation.__call__

def noted(self, number):
    found = batch(self, number)
    notes.write(json.dumps([number, self.rows(number).tolist()]) + "\\n")
    return found

def evaluating(self, *parts):
    Path("evaluating").touch()
    try:
        return evaluate(self, *parts)
    finally:
        Path("evaluating").unlink(missing_ok=True)

BatchStream.batch, QuickEvaluation.__call__ = noted, evaluating
if __name__ == "__main__":
    cli.guarded(train.main)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", default="2", help="of every start, or several to draw from, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(disturb(Path(folder), given.kills, [int(n) for n in given.ranks.split(",")], given.seed))
    return 0


def disturb(folder: Path, kills: int, ranks: list[int], seed: int, shards: str | None = None) -> str:
    """Trains, kills and goes on; returns a report. AssertionError: something was lost, or happened twice."""
    draw = random.Random(seed)
    (folder / "rows").mkdir()
    (folder / "script.py").write_text(SCRIPT)
    flags = [*FLAGS, *(["--shards", shards] if shards else [])]
    began, starts, done = time.monotonic(), [], Counter()
    while True:
        start, killing = len(starts), len(starts) < kills
        count = ranks[0] if start == 0 else draw.choice(ranks)
        before = step_of(folder)
        starts.append(before)
        process = launch(folder, count, start, [*flags, "--name", "killed"])
        if not killing:
            said, _ = process.communicate(timeout=4 * LIMIT)
            assert process.returncode == 0, said
            break
        moment = draw.choice(["step", "checkpoint", "evaluation"])
        victim = draw.choice(["rank", "launcher", "everything"])
        await_moment(folder, start, process, moment, before + draw.randint(2, STEPS // kills), draw)
        assert process.poll() is None, f"start {start} ended before it was killed: {process.communicate()[0][-2000:]}"
        kill(process, victim, draw)
        done[victim, moment] += 1
    check(folder, starts, flags, ranks)
    counts = ", ".join(f"{victim} during a {moment} {number}" for (victim, moment), number in sorted(done.items()))
    lost = sum(last_of(folder, i) - starts[i + 1] for i in range(kills))
    return (f"{kills} kills ({counts}); ranks {ranks}; {lost:,} steps done again; {time.monotonic() - began:.0f} s: "
            "every step once, every global batch once"
            + ("; weights bitwise those of an undisturbed run" if len(set(ranks)) == 1 else ""))


def launch(folder: Path, count: int, start: int, flags: list[str]) -> subprocess.Popen:
    env = environment(START=str(start)) | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command(*flags, ranks=count, script=["script.py"]), cwd=folder, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def step_of(folder: Path) -> int:
    """The step that the next start goes on from."""
    return max((int(path.name[5:]) for path in (folder / "runs/killed/checkpoints").glob("step_????????")), default=0)


def await_moment(folder: Path, start: int, process: subprocess.Popen, moment: str, step: int, draw: random.Random,
                 ) -> None:
    """Until this start has come to a step and the moment is there."""
    stale = unfinished(folder)
    (folder / "evaluating").unlink(missing_ok=True)

    def there() -> bool:
        return last_of(folder, start) >= step and {"step": True, "checkpoint": unfinished(folder) - stale,
                                                   "evaluation": (folder / "evaluating").exists()}[moment]

    wait_for(there, f"a {moment} from step {step} on", by=[process], pause=0.002)
    if moment != "checkpoint":
        time.sleep(0.1 * draw.random())


def unfinished(folder: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or were when a start was killed."""
    found = set()
    for path in (folder / "runs/killed/checkpoints").glob(".tmp_*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def kill(process: subprocess.Popen, victim: str, draw: random.Random) -> None:
    """Kills a rank, the launcher or everything, and waits until nothing is left of this start."""
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))] if (
        process.poll() is None) else []
    members = [psutil.Process(pid) for pid in family if psutil.pid_exists(pid)]
    workers = [one for one in members[1:] if "RANK" in environ(one)] or members
    doomed = {"rank": [draw.choice(workers)] if workers else [], "launcher": members[:1], "everything": members}[victim]
    for one in doomed:
        if one.is_running():
            one.kill()
    process.communicate(timeout=LIMIT)  # whoever is left has to end by itself
    _, alive = psutil.wait_procs(members, timeout=LIMIT)
    assert not alive, f"still there {LIMIT:.0f} s after the {victim} was killed: {alive}"


def environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def noted(folder: Path, start: int) -> dict[int, list[int]]:
    """The rows of every global batch that a start read, those of all ranks together."""
    found: dict[int, list[int]] = {}
    for path in (folder / "rows").glob(f"{start}-*"):
        for line in path.read_text().splitlines():
            if line.endswith("]]"):  # the last one may be cut
                number, rows = json.loads(line)
                found.setdefault(number, []).extend(rows)
    return found


def last_of(folder: Path, start: int) -> int:
    """The last step that a start finished reading for; a little more than it trained."""
    return max((number // 2 for number in noted(folder, start)), default=0)


def check(folder: Path, starts: list[int], flags: list[str], ranks: list[int]) -> None:
    run = folder / "runs/killed"
    assert [row["step"] for row in log_of(run)] == list(range(1, STEPS + 1))
    config = dict(zip(flags[::2], flags[1::2], strict=True))
    stream = stream_of(config.get("--shards"))
    rows = {start: noted(folder, start) for start in range(len(starts))}
    for step in range(1, STEPS + 1):
        start = max(i for i, begin in enumerate(starts) if begin < step)  # the one whose work counts
        for number in (2 * step - 2, 2 * step - 1):
            assert Counter(rows[start][number]) == Counter(stream.rows(number).tolist()), (step, number, start)
    epoch = np.concatenate([stream.rows(number) for number in range(stream.epoch // BATCH)])
    assert len(np.unique(epoch)) == len(epoch)  # nor does an epoch have a sample twice
    calm = launch(folder, ranks[0], 10**6, [*flags, "--name", "calm"])
    said, _ = calm.communicate(timeout=4 * LIMIT)
    assert calm.returncode == 0, said
    one, other = weights(folder / "runs/calm", STEPS), weights(run, STEPS)
    if len(set(ranks)) == 1:
        assert same_bits(one, other)
    else:
        assert largest_difference(one, other) < 1e-2  # 600 steps amplify rounding


def stream_of(shards: str | None):
    from covergen.data.stream import open_stream
    from covergen.training.setup import demo_shards
    return open_stream(shards or demo_shards(print), "train", batch_size=BATCH)


if __name__ == "__main__":
    sys.exit(main())
