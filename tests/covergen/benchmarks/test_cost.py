"""The cost of a run on paper: what is counted is what is there, and the arithmetic is that of the formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from covergen import bench, models
from covergen.benchmarks import cost
from covergen.models.base import InputSpec, Model, Phase
from covergen.runs import config
from tests.support.runs import train

SETUP = cost.Setup(batch=50, save_every=100, gpus=8, images=1000.0, inside=100e9, network=10e9, storage=1e9, source=4e9,
                   cores=4.0, decode=500.0, disk=1e9, sample=1e4, price=3.6)
STEP = cost.Step(repeats={"one": 2.0}, gradients={"one": int(10e6)}, operations=1e9, batches=2, checkpoint=int(1e9))


def figures(capsys, **options: object) -> dict:
    assert cost.run(resolution=32, **options) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_operations_are_those_of_the_products_of_forward_and_gradients() -> None:
    layer = nn.Linear(30, 20)
    with cost.Operations() as counted:
        layer(torch.ones(4, 30)).sum().backward()
    assert counted.total == 2 * 4 * 30 * 20 * 2  # the input needs no gradient


def test_phases_that_are_not_taken_every_step_count_as_much_less() -> None:
    class Half(Phase):
        name, repeats, interval = "half", 1, 2

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, batch, noise):
            return self.layer(batch.cover.float().mean((2, 3))).mean(), {}

    phase = Half()
    step = cost.count(config.resolve({"model": "wgan_gp"}), Model({"net": phase.layer}, [phase]), 8, 0)
    assert step.repeats == {"half": 0.5} and step.gradients == {"half": 16}
    assert step.operations == 0.5 * 2 * 2 * 3 and step.checkpoint == 16 + 2 * 16


def test_the_size_of_a_checkpoint_is_that_of_a_real_one(shards: Path, tmp_path: Path) -> None:
    train(tmp_path, "--model", "wgan_gp", "--width", "16", "--resolution", "32", "--shards", str(shards), "--steps",
          "1", "--batch_size", "4", "--sample_every", "0", "--tracker", "none", "--name", "one")
    real = sum(file.stat().st_size for file in (tmp_path / "runs/one/checkpoints/step_00000001").iterdir())
    run = config.resolve({"config": str(tmp_path / "runs/one/config.yaml")})
    built = models.load("wgan_gp").build(run.options, InputSpec(32, 0))
    assert cost.count(run, built, 32, 0).checkpoint == pytest.approx(real, rel=0.05)


def test_an_all_reduce_takes_what_the_formulas_say() -> None:
    assert cost.all_reduce(1e9, 1, SETUP) == 0
    assert cost.all_reduce(1e9, 8, SETUP) == pytest.approx(2 * 7 / 8 * 1e9 / 100e9 + 2 * 3 * 1e-5)
    assert cost.all_reduce(1e9, 16, SETUP) == pytest.approx(2 * 15 / 16 * 1e9 / 10e9 + 2 * 4 * 1e-5)


def test_all_but_the_last_bucket_of_the_gradients_hides_behind_the_backward() -> None:
    def reducing(gradients: float, gpus: int, batch: int = 50) -> tuple[float, float]:
        step, setup = STEP._replace(gradients={"one": int(gradients)}), SETUP._replace(batch=batch)
        row = cost.cost(step, setup, gpus)[0]
        return row["of it all-reduce, ms"] + row["hidden, ms"], row["of it all-reduce, ms"]
    small, large = (reducing(size, 8) for size in (10e6, 3 * cost.BUCKET))
    assert small[0] == small[1] > 0
    assert large[0] == pytest.approx(3 * large[1])
    slow = reducing(3 * cost.BUCKET, 512, batch=1)
    assert slow[0] > slow[1] > slow[0] / 3  # the backward is too short for it


def test_a_step_lasts_as_long_as_its_slowest_resource_needs_and_that_is_named() -> None:
    one, many = (cost.cost(STEP, SETUP, gpus)[0] for gpus in (1, 4096))
    assert (one["limit"], one["step, ms"], one["images/s"]) == ("compute", 100, 1000)
    assert one["$ for 1,000 steps"] == pytest.approx(0.1) and one["$ for 1M images"] == pytest.approx(1.0)
    assert one["saving, % of time"] == pytest.approx(10) and one["decoding cores a GPU"] == 2.0
    assert many["limit"] == "source of the shards" and many["shards, GB/s"] == pytest.approx(4)
    assert many["images/s"] == 4e9 / 1e4 and many["step, ms"] == pytest.approx(1e3 * 4096 * 100 / many["images/s"])


def test_limits_are_the_fewest_gpus_at_which_a_resource_is_slower_than_computing() -> None:
    found = cost.limits(STEP, SETUP)
    assert found == {"all-reduce": None, "decoding": None, "network of a machine to the shards": None,
                     "source of the shards": 512, "writing of checkpoints": None}
    assert cost.limits(STEP, SETUP._replace(sample=5e5))["network of a machine to the shards"] == 4
    large = STEP._replace(gradients={"one": int(4e8)})
    assert cost.limits(large, SETUP._replace(batch=25))["all-reduce"] == 16


def test_a_table_says_of_every_constant_where_it_is_from(capsys) -> None:
    assert bench.load("cost") is cost
    found = figures(capsys, gpus=(1, 8), images_per_second=100, decode_per_core=1e4)
    assert [row["GPUs"] for row in found["rows"]] == [1, 8] and found["rows"][0]["images/s"] == 100
    assert found["constants"] == {"decode": [1e4, "given"], "disk": [1000, "assumed"], "sample": [14000, "assumed"]}


@pytest.mark.slow
def test_what_can_be_measured_here_is(capsys) -> None:
    found = figures(capsys, model="r3gan", audio=20, measure=True, disk_mbyte=7)
    (decode, source), disk, (sample, counted) = (found["constants"][name] for name in ("decode", "disk", "sample"))
    assert source == counted and source.startswith("measured here") and disk == [7, "given"]
    assert found["setup"]["decode"] == decode > 0 and 500 < sample < 10_000


def test_a_conditional_model_asks_for_the_size_of_its_vectors() -> None:
    with pytest.raises(ValueError, match="--audio N"):
        cost.run(model="cond_wgan_gp", resolution=32)
    with pytest.raises(ValueError, match="above 0"):
        cost.run(price=0)
