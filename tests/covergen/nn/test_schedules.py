"""Schedules by images seen: learning rates at their ends, and averages with a half-life."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from covergen.nn.schedules import decay_of_average, half_cosine, learning_rate
from covergen.training.ema import EMA


def test_half_a_cosine_goes_from_first_to_last_and_stays() -> None:
    values = [half_cosine(images, 3.0, 1.0, 100) for images in (0, 25, 50, 75, 100, 1000)]
    assert values == pytest.approx([3, 2 + 0.5**0.5, 2, 2 - 0.5**0.5, 1, 1])
    assert half_cosine(1000, 3.0, 1.0, 0) == 3


def test_a_learning_rate_rises_to_its_peak_falls_to_its_share_and_stays() -> None:
    values = [learning_rate(images, 0.8, 100, 0.25, 1000) for images in (1, 50, 99, 100, 600, 1100, 5000)]
    assert values == pytest.approx([0.008, 0.4, 0.792, 0.8, 0.5, 0.2, 0.2])
    assert all(learning_rate(images, 0.8, 0, 0.25, 0) == 0.8 for images in (1, 10**9))
    assert learning_rate(10**9, 0.8, 100, 0.25, 0) == 0.8


@pytest.mark.parametrize("step", [1, 10, 250])
def test_after_a_half_life_in_images_the_old_weights_count_half(step: int) -> None:
    late, left = 10**9, 1.0
    for number in range(1000 // step):
        left *= decay_of_average(late + number * step, step, 1000)
    assert left == pytest.approx(0.5)


def test_an_early_average_remembers_a_twentieth_of_what_it_saw() -> None:
    assert decay_of_average(4000, 200, 1e6) == pytest.approx(0.5)
    assert decay_of_average(4000, 200, 100) == pytest.approx(0.25)  # a shorter half-life stays as it is
    assert decay_of_average(8, 8, 1e6) < 1e-5  # the initial weights are forgotten


def test_an_average_takes_the_decay_it_is_given() -> None:
    live = nn.BatchNorm1d(3)
    average = EMA({"net": live}, 0.999)
    nn.init.constant_(live.weight, 5.0)  # from 1
    live.running_mean.fill_(2.0)
    for number in range(10):
        average.update(decay_of_average(10**9 + number * 100, 100, 1000.0))
    torch.testing.assert_close(average.networks["net"].weight.data, torch.full((3,), 3.0))
    assert torch.equal(average.networks["net"].running_mean, live.running_mean) and average.updates == 10
    average.update()  # without one: (1 + n) / (10 + n)
    torch.testing.assert_close(average.networks["net"].weight.data, torch.full((3,), 3 + 2 * (1 - 12 / 21)))
