"""A run over two hosts outlives the silent death of one, takes it back, lets it go, and is still the same run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from tests.proofs.two_hosts import FLAGS, ROOT, STEPS, Story, ip, play
from tests.support.runs import environment, largest_difference, log_of, weights
from tests.support.waiting import LIMIT


def courses(story: Story) -> dict[int, list[list[list[int]]]]:
    """step -> batch -> checksums of the global batch, as it was trained the last time, rank after rank."""
    latest: dict[int, dict[int, dict]] = {}
    for note in story.notes():
        taken = latest.setdefault(note["step"], {})
        if any(other["ranks"] != note["ranks"] or other["rank"] == note["rank"] for other in taken.values()):
            taken.clear()  # it is trained again, from a checkpoint before it
        taken[note["rank"]] = note
    assert all(sorted(taken) == list(range(taken[0]["ranks"])) for taken in latest.values())
    return {step: [list(chain(*parts)) for parts in zip(*(taken[rank]["samples"] for rank in sorted(taken)),
                                                         strict=True)] for step, taken in latest.items()}


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and iproute2")
def test_a_run_over_two_hosts_outlives_the_death_of_one_takes_it_back_and_lets_it_go(tmp_path: Path) -> None:
    try:
        ip("netns", "add", f"covergen-try-{os.getpid()}")
        ip("netns", "del", f"covergen-try-{os.getpid()}")
    except RuntimeError as error:
        pytest.skip(str(error))
    story = play(tmp_path / "hosts")
    assert story.silence < 60
    worlds = [note["ranks"] for note in story.notes()]
    changes = [ranks for ranks, before in zip(worlds, [0, *worlds], strict=False) if ranks != before]
    assert changes == [2, 1, 2, 1]
    assert "process 1 ends: " in (tmp_path / "hosts/10.77.0.2.txt").read_text()

    alone = tmp_path / "alone"
    (alone / "notes").mkdir(parents=True)
    subprocess.run([sys.executable, str(ROOT / "tests/proofs/loss_log.py"), *FLAGS, "--shards", "../hosts/shards",
                    "--name", "one"], cwd=alone, env=environment(NOTES=str(alone / "notes")), check=True,
                   capture_output=True, timeout=LIMIT)
    runs = tmp_path / "hosts/runs/elastic", alone / "runs/one"
    every = list(range(1, STEPS + 1))
    for run in runs:
        assert [row["step"] for row in log_of(run)] == every
    steps = [note["step"] for note in story.notes()]
    assert steps.count(story.left) == 1  # who is asked to leave saves first, so that nothing is trained twice
    batches = courses(story)
    assert sorted(batches) == every and batches == courses(Story(alone))
    assert largest_difference(*(weights(run, STEPS) for run in runs)) < 1e-4
