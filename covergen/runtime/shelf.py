"""Where the bytes of shards come from: a shard's number and a place in it in, its bytes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from covergen.runtime.reading import read_at
from covergen.runtime.windows import Window
from shard_tools.formats.index import Index


class Shelf(Protocol):
    """What ``IndexedShards`` reads from; all safe from many threads."""

    last: int | None

    def plan(self, window_at: Callable[[int], Window], largest: int) -> None: ...

    def at(self, position: int, batch: int) -> None: ...

    def expect(self, shards: Iterable[int]) -> None: ...

    def read(self, shard: int, offset: int, size: int) -> bytearray: ...


class LocalShelf:
    """Shards that lie on a disk of this machine, which need no preparation."""

    last: int | None = None

    def __init__(self, shards: Sequence[Path]) -> None:
        """Args: shards: in the order of the index."""
        self.shards = shards

    def plan(self, window_at: Callable[[int], Window], largest: int) -> None:
        """Nothing to do."""

    def at(self, position: int, batch: int) -> None:
        """Nothing to do."""

    def expect(self, shards: Iterable[int]) -> None:
        """Nothing to do."""

    def read(self, shard: int, offset: int, size: int) -> bytearray:
        """``size`` bytes of a shard from ``offset``.

        Raises:
            ValueError: the shard ends before.
        """
        return read_at(self.shards[shard], offset, size)


def open_shelf(index: Index) -> tuple[Shelf, list[Path] | list[str]]:
    """The shelf of an opened index, and what its shards are called.

    Raises:
        ValueError: shards of the index are missing.
    """
    from shard_tools.formats.elsewhere import origin
    if found := origin(index.root):
        from covergen.runtime.remote import RemoteShelf
        url, cache = found
        return RemoteShelf(url, index.facts, cache), [f"{url}/{shard['name']}" for shard in index.facts["shards"]]
    if missing := [shard.name for shard in index.shards if not shard.is_file()]:
        raise ValueError(f"{index.root}: {len(missing)} shards of the index are missing, the first is {missing[0]}")
    return LocalShelf(index.shards), index.shards
