"""The benchmarks run and compare like with like; how fast anything is is never a test."""

from __future__ import annotations

import json

import pytest

from covergen import bench


@pytest.mark.parametrize(("what", "options", "contenders"), [
    ("step", {"batch_size": 2, "width": 4, "compile": False, "curve": 8},
     {"notebook fp32", "covergen fp32", "covergen bf16"}),
    ("loader", {"batch_size": 8, "samples": 80, "threads": (1, 2)},
     {"ImageFolder + DataLoader", "covergen, 1 thread", "decoding alone, 1 thread", "covergen, 2 threads",
      "decoding alone, 2 threads", "torchvision's decoder, 1 thread", "torchvision's decoder, 2 threads",
      "first reading, 2 threads", "--decoded_cache ram, 2 threads"}),
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
        plain, ours, low = (mean for mean, _ in figures["curve"].values())  # and go on to do so
        assert ours == pytest.approx(plain, rel=1e-2) and low == pytest.approx(plain, rel=0.3)


def test_steps_of_a_model_that_the_thesis_had_not_are_compared_with_eager_ones(capsys) -> None:
    assert bench.load("step").run(model="r3gan", batch_size=2, width=4, rounds=1, compile=False) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures["median"]) == {"covergen fp32", "covergen bf16"}


def test_whole_runs_are_compared_by_their_logs_after_a_quarter(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    runs = bench.load("train")

    def trained(folder, name: str, flags: dict) -> list[dict[str, float]]:
        assert flags["steps"] == 400 and flags["tracker"] == "none"
        fast = {"speed/compile_seconds": 9.0, "speed/graph_breaks": 0.0, "speed/recompiles": 1.0}
        speeds = [1.0, *[200.0 if flags["compile"] else 100.0] * 19]  # the first is slow
        return [{"step": 20 * number, "images": 1280 * number, "speed/images_per_second": speed,
                 **(fast if flags["compile"] and number == 1 else {})} for number, speed in enumerate(speeds, 1)]
    monkeypatch.setattr(runs, "trained", trained)
    assert runs.run(shards="given") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["ratio_to_eager"] == {"eager": 1.0, "compiled": pytest.approx(2.0)}
    assert (figures["compile_seconds"], figures["recompiles"]) == (9.0, 1.0)
    with pytest.raises(ValueError, match="--steps 3: expected 8 or more"):
        runs.run(steps=3)


def test_help_names_the_benchmark() -> None:
    import subprocess
    import sys
    said = subprocess.run([sys.executable, "-m", "covergen.bench", "train", "--help"], capture_output=True, text=True)
    assert said.stdout.startswith("usage: python -m covergen.bench train [options]")


def test_a_process_of_its_own_opens_an_index(capsys) -> None:
    assert bench.load("index").run(rows=3000, orders=("group",)) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["bytes"] > 3000 * 50
    assert figures["group"]["open_seconds"] > 0 and figures["group"]["peak_gib"] > figures["group"]["before_gib"] > 0
