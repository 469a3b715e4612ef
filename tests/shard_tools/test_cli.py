"""Ranges of options: checked in one way, however a command is called, and shown by --help."""

from __future__ import annotations

from typing import Annotated

import pytest

from shard_tools import cli
from shard_tools.cli import Range, check_range, checked


@checked
def command(count: Annotated[int | None, Range(1, 1000)] = None, share: Annotated[float, Range(0, lt=1)] = 0.0,
            ratios: Annotated[tuple[float, ...], Range(gt=0)] = (0.8, 0.2)) -> int:
    """Counts.

    Args:
        count: how many.
        share: of them.
        ratios: of the parts.
    """
    return 0


@pytest.mark.parametrize("given, message", [
    ({"count": 0}, "--count 0: expected 1 to 1,000"), ({"share": 1.0}, "--share 1.0: expected 0 to below 1"),
    ({"share": float("nan")}, "--share nan: expected 0 to below 1"),
    ({"ratios": (0.5, 0.0)}, "--ratios 0.0: expected above 0")])
def test_a_number_out_of_range_is_named_with_what_is_allowed(given, message):
    with pytest.raises(ValueError, match=message):
        command(**given)
    with pytest.raises(SystemExit) as error:
        cli.run(command, [f"--{name}={str(value).strip('()')}" for name, value in given.items()])
    assert error.value.code == 2


def test_numbers_within_their_ranges_pass_and_help_shows_them(capsys):
    assert command() == command(1, 0.0, (1, 2)) == command(count=1000, share=0.99) == 0
    with pytest.raises(SystemExit):
        cli.run(command, ["--help"])
    assert "--count int (1 to 1,000)" in capsys.readouterr().out


def test_ranges_read_as_people_say_them():
    assert [str(Range(1, 64)), str(Range(0)), str(Range(gt=0)), str(Range(le=9)), str(Range(gt=0, lt=1))] == [
        "1 to 64", "0 or more", "above 0", "at most 9", "above 0 to below 1"]
    check_range("lr", 0.1, None)
