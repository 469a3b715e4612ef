"""The cost of a run on paper: what is counted is what is there, and the arithmetic is that of the formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from covergen import bench, models
from covergen.benchmarks import cost, counting, scaling
from covergen.data.indexed import ShardDataset
from covergen.models.base import InputSpec, Model, Phase
from covergen.runs import config
from tests.support.runs import train

HARDWARE = scaling.Machine(gpus=8, images=1000.0, inside=100e9, network=10e9, hop=1e-5, storage=1e9, source=4e9,
                           decode=500.0, cores=4.0, disk=1e9, price=3.6)


def work(**changes: float) -> scaling.Work:
    step = counting.Step(repeats={"one": 2.0}, gradients={"one": int(changes.pop("gradients", 10e6))}, operations=1e9,
                         batches=2, checkpoint=int(1e9))
    return scaling.Work(step, **{"batch": 50, "sample": 1e4, "save_every": 100, **changes})


def figures(capsys, **options: object) -> dict:
    assert cost.run(resolution=32, **options) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_operations_are_those_of_the_products_of_forward_and_gradients() -> None:
    layer = nn.Linear(30, 20)
    with counting.Operations() as counted:
        layer(torch.ones(4, 30)).sum().backward()
    assert counted.total == 2 * 4 * 30 * 20 * 2  # the input needs no gradient


def test_turns_that_are_not_taken_every_step_count_as_much_less() -> None:
    class Half(Phase):
        name, repeats, every = "half", 1, 2

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, batch, noise):
            return self.layer(batch.cover.float().mean((2, 3))).mean(), {}

    turn = Half()
    step = counting.count(config.resolve({"model": "wgan_gp"}), Model({"net": turn.layer}, [turn]), 8, 0)
    assert step.repeats == {"half": 0.5} and step.gradients == {"half": 16}
    assert step.operations == 0.5 * 2 * 2 * 3 and step.checkpoint == 16 + 2 * 16


def test_the_size_of_a_checkpoint_is_that_of_a_real_one(shards: Path, tmp_path: Path) -> None:
    train(tmp_path, "--model", "wgan_gp", "--width", "16", "--resolution", "32", "--shards", str(shards), "--steps",
          "1", "--batch_size", "4", "--sample_every", "0", "--tracker", "none", "--name", "one")
    real = sum(file.stat().st_size for file in (tmp_path / "runs/one/checkpoints/step_00000001").iterdir())
    run = config.resolve({"config": str(tmp_path / "runs/one/config.yaml")})
    built = models.load("wgan_gp").build(run.options, InputSpec(32, 0))
    assert counting.count(run, built, 32, 0).checkpoint == pytest.approx(real, rel=0.05)


def test_an_all_reduce_takes_what_the_formulas_say() -> None:
    assert scaling.all_reduce(1e9, 1, HARDWARE) == 0
    assert scaling.all_reduce(1e9, 8, HARDWARE) == pytest.approx(2 * 7 / 8 * 1e9 / 100e9 + 2 * 3 * 1e-5)
    assert scaling.all_reduce(1e9, 16, HARDWARE) == pytest.approx(2 * 15 / 16 * 1e9 / 10e9 + 2 * 4 * 1e-5)


def test_all_but_the_last_piece_of_the_gradients_hides_behind_the_backward() -> None:
    small, large = (scaling.reducing(work(gradients=size), 8, HARDWARE) for size in (10e6, 3 * scaling.BUCKET))
    assert small[0] == small[1] > 0
    assert large[0] == pytest.approx(3 * large[1])
    slow = scaling.reducing(work(gradients=3 * scaling.BUCKET, batch=1), 512, HARDWARE)
    assert slow[0] > slow[1] > slow[0] / 3  # the backward is too short for it


def test_a_step_lasts_as_long_as_its_slowest_resource_needs_and_that_is_named() -> None:
    one, many = (scaling.cost(work(), gpus, HARDWARE) for gpus in (1, 4096))
    assert (one.limit, one.step, one.images) == ("compute", 0.1, 1000.0)
    assert one.dollars == pytest.approx(0.1) and one.dollars_per_million == pytest.approx(1.0)
    assert one.saving == pytest.approx(1 / 10) and one.cores == 2.0
    assert many.limit == "source of the shards" and many.shards == pytest.approx(4e9)
    assert many.images == pytest.approx(4e9 / 1e4) and many.step == pytest.approx(4096 * 100 / many.images)


def test_limits_are_the_fewest_gpus_at_which_a_resource_is_slower_than_computing() -> None:
    found = scaling.limits(work(), HARDWARE)
    assert found == {"all-reduce": None, "decoding": None, "network of a machine to the shards": None,
                     "source of the shards": 512, "writing of checkpoints": None}
    assert scaling.limits(work(sample=5e5), HARDWARE)["network of a machine to the shards"] == 4
    assert scaling.limits(work(gradients=4e8, batch=25), HARDWARE)["all-reduce"] == 16


def test_a_table_says_of_every_constant_where_it_is_from(capsys) -> None:
    assert bench.load("cost") is cost
    found = figures(capsys, gpus=(1, 8), images_per_second=100, decode_per_core=1e4)
    assert [row["gpus"] for row in found["rows"]] == [1, 8] and found["rows"][0]["images"] == 100
    assert found["sources"] == {"decode": "given", "disk": "assumed", "sample": "assumed"} and not found["measured"]


def test_what_is_given_is_counted_or_measured_where_the_shards_are(shards: Path, tmp_path: Path) -> None:
    step = counting.Step({"one": 1.0}, {"one": 4}, 1e9, 1, 1)
    given = {"decode": 0.0, "disk": 7.0, "sample": 0.0}
    found, measured = cost.find_constants(given, None, tmp_path, str(shards), 32, 0, False, step)
    assert found["disk"] == (7.0, "given") and found["decode"][1] == "assumed" and not measured
    assert found["sample"][1] == "counted in --shards" and 500 < found["sample"][0] < 10_000
    assert cost.time_decoding(ShardDataset(shards, "train", batch_size=1), 50) > 0
    assert cost.time_disk(tmp_path, 1) > 0


@pytest.mark.slow
def test_what_can_be_measured_here_is(capsys) -> None:
    found = figures(capsys, model="r3gan", audio=20, measure=True)
    assert found["sources"]["decode"] == found["sources"]["disk"] != "assumed"
    assert found["sources"]["sample"] == "counted in a demo world"
    assert min(found["measured"].values()) > 0 and found["machine"]["decode"] == found["measured"]["decode"]


def test_a_model_that_hears_asks_for_the_size_of_its_vectors() -> None:
    with pytest.raises(ValueError, match="--audio N"):
        cost.run(model="cond_wgan_gp", resolution=32)
    with pytest.raises(ValueError, match="above 0"):
        cost.run(price=0)
