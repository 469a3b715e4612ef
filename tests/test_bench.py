"""The benchmarks run and compare like with like; how fast anything is is never a test."""

from __future__ import annotations

import json

import pytest

from covergen import bench


@pytest.mark.parametrize(("what", "options", "contenders"), [
    ("step", {"batch_size": 2, "width": 4}, {"notebook fp32", "covergen fp32", "covergen bf16"}),
    ("loader", {"batch_size": 8, "samples": 80},
     {"ImageFolder + DataLoader", "covergen (with vectors)", "decoding alone"}),
    ("pack", {"samples": 40}, {"tar -cf", "tar -cf, sha256sum", "pack --workers 1", "pack --workers 2"}),
])
def test_every_contender_is_measured(what: str, options: dict, contenders: set, capsys) -> None:
    assert bench.load(what).run(resolution=32, rounds=1, **options) == 0
    output = capsys.readouterr().out
    figures = json.loads(output.splitlines()[-1])
    assert set(figures["median"]) == contenders and min(figures["median"].values()) > 0
    base = figures["ratio_to_" + next(iter(figures["median"]))]
    assert next(iter(base.values())) == 1.0
    if what == "step":  # the same weights, covers and noise: all three compute the same loss
        losses = [float(part.split()[-1]) for part in output.splitlines()[0].partition(": ")[2].split(", ")]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[2] == pytest.approx(losses[0], rel=5e-2)
