"""What the tests of shards at URLs share."""

from __future__ import annotations

from pathlib import Path

import pytest

from shard_tools.pack import pack


@pytest.fixture(scope="session")
def many(world: Path) -> Path:
    """The small demo world in many shards."""
    out = world.parent / "many"
    assert pack(str(world), str(out), samples_per_shard=10, workers=1) == 0
    return out
