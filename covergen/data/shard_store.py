"""Where the bytes of shards come from: a shard's number and a place in it in, its bytes out."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from covergen.data.sampling import ShardWindow
from shard_tools.remote.cache import GIGABYTE, BusyError, Cache, FullError, stored_shard, wait_a_little
from shard_tools.remote.filesystem import Remote
from shard_tools.remote.index_cache import source_url
from shard_tools.shards.index import Index


@lru_cache(maxsize=256)
def _opened(path: Path) -> Any:
    return open(path, "rb", buffering=0)


def read_at(path: Path, offset: int, size: int) -> bytearray:
    """``size`` bytes of a file from ``offset``; safe from many threads.

    Raises:
        ValueError: the file ends before.
    """
    return read_from(_opened(path), offset, size, path)


def read_from(file: Any, offset: int, size: int, name: object) -> bytearray:
    """The same of an opened file, which is held here: one that its cache drops must not close before this read."""
    data = bytearray(size)
    if os.preadv(file.fileno(), [data], offset) != size:
        raise ValueError(f"{name} ends before byte {offset + size}; it is damaged (shard_tools.verify tells more)")
    return data


class ShardStore(Protocol):
    """What ``IndexedShards`` reads from; all safe from many threads."""

    last: int | None

    def plan(self, window_at: Callable[[int], ShardWindow], largest: int) -> None: ...

    def at(self, position: int, batch: int) -> None: ...

    def expect(self, shards: Iterable[int]) -> None: ...

    def read(self, shard: int, offset: int, size: int) -> bytearray: ...


class LocalShardStore:
    """Shards that lie on a disk of this machine, which need no preparation."""

    last: int | None = None

    def __init__(self, shards: Sequence[Path]) -> None:
        """Args: shards: in the order of the index."""
        self.shards = shards

    def plan(self, window_at: Callable[[int], ShardWindow], largest: int) -> None:
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


def open_shard_store(index: Index) -> tuple[ShardStore, list[Path] | list[str]]:
    """The shelf of an opened index, and what its shards are called.

    Raises:
        ValueError: shards of the index are missing.
    """
    if found := source_url(index.root):
        url, cache = found
        return RemoteShardStore(url, index.metadata, cache), [f"{url}/{shard['name']}" for shard in index.metadata["shards"]]
    if missing := [shard.name for shard in index.shards if not shard.is_file()]:
        raise ValueError(f"{index.root}: {len(missing)} shards of the index are missing, the first is {missing[0]}")
    return LocalShardStore(index.shards), index.shards


THREADS = 8  # that fetch: shards of a few MB need several at a time where an answer takes long
HELD, LOOSE = 256, 2  # copies held open at most: of a window; where nothing is known of what comes next
PATIENCE = 300.0  # seconds that a needed shard waits for others to let go of room
IDLE = 5.0  # seconds after which a thread with nothing to fetch ends
DEAR = 0.1  # seconds that a needed shard waits before one that was fetched ahead goes for it
FULL, TAKEN = 0.3, 0.1  # seconds until another try where there was no room; where another process is at it
SLACK = 16  # batches into a window after which the one before is let go


class RemoteShardStore:
    """The shards of an index, elsewhere; ``read`` is safe from many threads.

    Attributes:
        last: position of the stream that is not reached any more, None where it has no end: nothing is fetched for what
            lies beyond.
    """

    def __init__(self, url: str, metadata: dict[str, Any], cache: Cache) -> None:
        """Args:
            url: of their folder.
            metadata: of the index: name, bytes and sha256 of every shard.
            cache: where copies go.

        Raises:
            ValueError: these are no names, sizes and hashes of shards.
        """
        self.remote, self.cache = Remote(url), cache
        self.stored = [stored_shard(shard, url) for shard in metadata["shards"]]
        self.last: int | None = None
        self._window_at: Callable[[int], ShardWindow] | None = None
        self._largest = 0
        self._now: ShardWindow | None = None
        self._held: OrderedDict[int, BinaryIO] = OrderedDict()
        self._current, self._before, self._soon = set[int](), set[int](), set[int]()
        self._queue: list[int] = []
        self._urgent, self._busy, self._had, self._failed = set[int](), set[int](), set[int](), dict[int, Exception]()
        self._change, self._threads, self._releases, self._release_at = threading.Condition(), 0, 0, 0

    def plan(self, window_at: Callable[[int], ShardWindow], largest: int) -> None:
        """Prepares reading in an order.

        Args:
            window_at: the window of a position of the stream.
            largest: shards in a window.

        Raises:
            ValueError: the cache can't hold what is read at the same time.
        """
        sizes = sorted((stored.bytes for stored in self.stored), reverse=True)
        need = sum(sizes[:largest]) + 2 * sizes[0] + self.cache.used_by_indexes()
        if need > self.cache.bound():
            gigabytes = -(-need // (GIGABYTE // 1000)) / 1000
            least = "" if largest == 1 else ", or mix fewer shards at a time with --shard_window (another order)"
            raise ValueError(f"--shard_cache_gb {self.cache.bound() / GIGABYTE:g} is too little for {largest} shards that "
                             f"are mixed at a time, and the index: give --shard_cache_gb {gigabytes:g} or more (three times "
                             f"that to fetch ahead){least}")
        self._window_at, self._largest = window_at, largest

    def at(self, position: int, batch: int) -> None:
        """Tells where in the stream the reader is, and how many samples a batch has."""
        now = self._now
        if self._window_at is None or (now and now.start <= position < min(now.stop, self._release_at)):
            return
        with self._change:
            now = self._now
            if now and (now.start - SLACK * batch <= position < now.start):
                return  # a thread that lags behind
            if now is None or not now.start <= position < now.stop:
                self._release(self._before - self._current)  # of a window shorter than a batch
                self._before = self._current
                self._now = now = self._window_at(position)
                self._current = set(now.shards)
                self._had -= self._current - self._soon
                self._release_at = min(now.start + SLACK * batch, (now.start + now.stop) // 2)
                self._queue = []
                self._line_up([*self._urgent, *now.shards])
                self._look_ahead(now)
            if position >= self._release_at:
                self._release_at = now.stop
                self._release(self._before - self._current)
                self._before = set()
                self._look_ahead(now)  # shards that the window before had too
            self._start_threads()

    def _look_ahead(self, now: ShardWindow) -> None:
        """Lines up the shards of the window after this one, and of another where that is the short end of an epoch."""
        self._soon, following = set(), now
        for _ in range(2):
            if len(self._soon) >= self._largest or (self.last is not None and following.stop >= self.last):
                break
            following = self._window_at(following.stop)
            fresh = [shard for shard in following.shards if shard not in self._current | self._soon]
            self._soon.update(fresh)
            self._line_up(shard for shard in fresh if shard not in self._had)

    def _line_up(self, shards: Iterable[int]) -> None:
        """Puts shards at the end of the queue that are neither here, nor coming, nor in it."""
        known = self._held.keys() | self._busy | set(self._queue)
        self._queue += [shard for shard in dict.fromkeys(shards) if shard not in known]

    def expect(self, shards: Iterable[int]) -> None:
        """Has shards fetched that are about to be read, several at the same time."""
        with self._change:
            self._ask([shard for shard in dict.fromkeys(shards) if shard not in self._had])

    def read(self, shard: int, offset: int, size: int) -> bytearray:
        """``size`` bytes of a shard from ``offset``.

        Raises:
            ValueError, OSError: the shard can't be had, or ends before.
        """
        return read_from(self._file(shard), offset, size, self.remote.at(self.stored[shard].name))

    def _file(self, shard: int) -> BinaryIO:
        with self._change:
            if file := self._held.get(shard):
                self._held.move_to_end(shard)
                return file
            known = shard in self._had
        if known and (file := self.cache.copy(self.stored[shard])):  # more shards than can be held open
            with self._change:
                self._keep(shard, file, True)
            return file
        with self._change:
            while True:
                if file := self._held.get(shard):
                    return file
                if error := self._failed.pop(shard, None):
                    raise error
                self._ask([shard])
                self._change.wait()

    def _ask(self, shards: list[int]) -> None:
        fresh = [shard for shard in shards if shard not in self._held and shard not in self._urgent]
        if fresh:
            self._urgent.update(fresh)
            self._queue = [shard for shard in fresh if shard not in self._busy] + [
                shard for shard in self._queue if shard not in fresh]
            self._start_threads()

    def _start_threads(self) -> None:
        self._change.notify_all()
        while self._threads < min(THREADS, len(self._queue)):
            self._threads += 1
            threading.Thread(target=self._work, name="fetch", daemon=True).start()

    def _place(self) -> int | None:
        """Where in the queue is what may be fetched now: nothing ahead before all of the window is here, lest it take
        the room."""
        ahead = self._current <= self._had
        return next((place for place, shard in enumerate(self._queue)
                     if ahead or shard in self._current or shard in self._urgent), None)

    def _work(self) -> None:
        while True:
            with self._change:
                if not self._change.wait_for(lambda: self._place() is not None, IDLE):
                    self._threads -= 1
                    return
                shard = self._queue.pop(self._place())
                self._busy.add(shard)
                releases = self._releases
            file = error = None
            again = 0.0
            try:
                file = self._fetch(shard)
            except BusyError as busy:
                again = FULL if isinstance(busy, FullError) else TAKEN
            except Exception as failure:  # whatever it is, the reader who needs the shard is told
                error = failure
            with self._change:
                if again:
                    self._wait_for_room(shard, releases, again)
                self._busy.discard(shard)
                if file:
                    self._keep(shard, file, shard in self._urgent or shard in self._current)
                elif again and (shard in self._urgent or shard in self._current or shard in self._soon):
                    self._queue.insert(0 if shard in self._urgent else len(self._queue), shard)
                elif error and shard in self._urgent:
                    self._failed[shard] = error
                    self._urgent.discard(shard)
                self._start_threads()

    def _wait_for_room(self, shard: int, releases: int, seconds: float) -> None:
        """Until room was made since so many releases, or somebody waits for the shard, or for one in the queue, whose
        needed ones come first."""
        self._change.wait_for(lambda: self._releases != releases or shard in self._urgent
                              or bool(self._urgent.intersection(self._queue[:1])), seconds)

    def _fetch(self, shard: int) -> BinaryIO:
        remote, stored, began = self.remote, self.stored[shard], time.monotonic()
        while True:
            with self._change:
                urgent = shard in self._urgent
            try:
                return self.cache.open(remote, stored, spare=lambda: self._spared(True), wait=urgent)
            except FullError as full:
                if not urgent:
                    raise
                with self._change:  # what was read longest ago, of the window before, is what is missed least
                    for other in [*(o for o in self._held if o in self._before), *self._held][:LOOSE]:
                        self._held.pop(other, None)
                with contextlib.suppress(FullError):
                    dear = time.monotonic() - began < DEAR
                    return self.cache.open(remote, stored, spare=lambda dear=dear: self._spared(False) if dear else [])
                wait_a_little(began, PATIENCE, full)

    def _spared(self, before: bool) -> list[str]:
        """Hashes of the shards that should stay: of this window, the next, and with ``before`` the last one."""
        with self._change:
            shards = self._current | self._soon | (self._before if before else set())
            return [self.stored[shard].sha256 for shard in shards]

    def _keep(self, shard: int, file: BinaryIO, hold: bool) -> None:
        """Holds a copy open, or only knows that it is there."""
        self._had.add(shard)
        if hold:
            self._urgent.discard(shard)
            self._held[shard] = file
            loose = [other for other in self._held if other not in self._current]
            for other in loose[:max(0, len(loose) - LOOSE)]:
                self._let_go(other)
            while len(self._held) > HELD:
                self._let_go(next(iter(self._held)))

    def _release(self, shards: Iterable[int]) -> None:
        self._releases += 1
        for shard in shards:
            self._let_go(shard)
            self._had.discard(shard)

    def _let_go(self, shard: int) -> None:
        """Drops a held copy; whoever reads from it at this moment still holds it, and the last one closes it."""
        if file := self._held.pop(shard, None):
            with contextlib.suppress(OSError):
                os.utime(file.fileno())  # last used now
