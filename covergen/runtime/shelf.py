"""Where the bytes of shards come from: a shard's number and a place in it in, its bytes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from covergen.runtime.reading import read_at


class LocalShelf:
    """Shards that lie on a disk of this machine."""

    def __init__(self, shards: Sequence[Path]) -> None:
        """Args: shards: in the order of the index."""
        self.shards = shards

    def read(self, shard: int, offset: int, size: int) -> bytearray:
        """``size`` bytes of a shard from ``offset``; safe from many threads.

        Raises:
            ValueError: the shard ends before.
        """
        return read_at(self.shards[shard], offset, size)
