"""What tests share: a small packed demo world, and a cache folder that is not the user's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests find nothing in the user's cache folder and leave nothing there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a small demo world."""
    from shard_tools.demo import make
    out = tmp_path_factory.mktemp("world") / "raw"
    make(out, tier="toy", albums=90)
    return out


@pytest.fixture(scope="session")
def shards(world: Path) -> Path:
    """The same world as shards with an index, several a split."""
    from shard_tools.pack import pack
    out = world.parent / "shards"
    assert pack(str(world), str(out), samples_per_shard=64, workers=1) == 0
    return out
