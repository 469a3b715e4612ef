"""The schedule of a run: which steps there are, and what is due after each."""

from __future__ import annotations

import pytest

from covergen.runs.config import Training
from covergen.runs.state import EarlyStopping, TrainState
from covergen.training.session import Due, Schedule

OFTEN = Training(steps=10, log_every=2, sample_every=3, save_every=4, eval_every=5)
NOTHING = Due(grids=False, save=False, validate=False, evaluate=False, networks=False, epoch=False, log=False)


def due(schedule: Schedule, name: str) -> list[int]:
    return [step for step in range(1, schedule.steps + 1) if getattr(schedule.due(step), name)]


def test_each_task_has_its_interval_and_the_last_step_has_nearly_all() -> None:
    schedule = Schedule(OFTEN, images_per_step=8, epoch=0, validates=True)
    assert due(schedule, "grids") == [3, 6, 9, 10] and due(schedule, "save") == [4, 8, 10]
    assert due(schedule, "evaluate") == [5, 10] and due(schedule, "validate") == [10]
    assert due(schedule, "log") == [2, 3, 4, 5, 6, 8, 9, 10]  # whatever is due, a line of the log is
    assert schedule.due(7) == schedule.due(1) == NOTHING


@pytest.mark.parametrize(("epochs", "steps"), [(0, 10), (1, 3), (2, 5), (9, 10)])
def test_epochs_end_a_run_and_are_validated_where_they_end(epochs: int, steps: int) -> None:
    schedule = Schedule(Training(steps=10, epochs=epochs), images_per_step=8, epoch=20, validates=True)
    assert schedule.steps == steps  # an epoch that ends within a step ends with it
    assert due(schedule, "epoch") == [step for step in (3, 5, 8, 10) if step <= steps]
    assert due(schedule, "validate") == due(schedule, "epoch")
    assert not due(Schedule(Training(steps=10), 8, 20, validates=False), "validate")


def test_no_step_is_taken_before_a_validation_that_is_pending() -> None:
    schedule = Schedule(OFTEN, images_per_step=8, epoch=20, validates=True)
    assert list(schedule.steps_after(TrainState(8))) == [9, 10] and not schedule.steps_after(TrainState(10))
    assert not schedule.steps_after(TrainState(5, EarlyStopping(validation_pending=True)))
