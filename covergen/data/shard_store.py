"""Where the bytes of shards come from: the disk of this machine, or a cache of what lies behind a URL."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

from covergen.data.sampling import ShardWindow
from shard_tools.remote.cache import GIGABYTE, INDEXES, BusyError, Cache, FullError, shard_file
from shard_tools.remote.filesystem import Remote
from shard_tools.remote.index_cache import source_url
from shard_tools.shards.index import Index


class ShardStore:
    """Shards on a disk of this machine; safe from many threads. Only stores that fetch need to know what comes next.

    ``last`` is the position of the stream that is not reached any more: nothing is fetched for what lies beyond.
    """

    last: int | None = None

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = shards

    def set_order(self, window_at: Callable[[int], ShardWindow], largest: int) -> None:
        """Prepares reading in an order, from the window of a position of the stream and the most shards in a window.

        Raises ValueError where the cache can't hold what is read at the same time.
        """

    def advance(self, position: int, batch: int) -> None:
        """The reader is at this position of the stream, and a batch has so many samples."""

    def prefetch(self, shards: Iterable[int]) -> None:
        """Has shards fetched that are about to be read, several at the same time."""

    def read(self, shard: int, offset: int, size: int) -> bytearray:
        """``size`` bytes of a shard from ``offset``; ValueError or OSError if it can't be had, or ends before."""
        return _read(_open(self.shards[shard]), offset, size, self.shards[shard])


@lru_cache(maxsize=256)
def _open(path: Path) -> BinaryIO:
    return open(path, "rb", buffering=0)


def _read(file: BinaryIO, offset: int, size: int, name: object) -> bytearray:
    """Bytes of an opened file, which is referenced here: one that its cache drops must not close before this read."""
    data = bytearray(size)
    if os.preadv(file.fileno(), [data], offset) != size:
        raise ValueError(f"{name} ends before byte {offset + size}; it is damaged (see shard_tools.verify)")
    return data


def open_shard_store(index: Index) -> tuple[ShardStore, list[Path] | list[str]]:
    """The store of an opened index, and what its shards are called."""
    if found := source_url(index.root):
        url, cache = found
        store = RemoteShardStore(url, index.metadata, cache)
        return store, [f"{url}/{shard['name']}" for shard in index.metadata["shards"]]
    if missing := [shard.name for shard in index.shards if not shard.is_file()]:
        raise ValueError(f"{index.root}: {len(missing)} shards of the index are missing, the first is {missing[0]}")
    return ShardStore(index.shards), index.shards


THREADS = 8  # that fetch: shards of a few MB need several at a time where an answer takes long
MAX_OPEN, MAX_OPEN_OUTSIDE = 256, 2  # copies held open at most: in all; of shards that are not of the current window
FULL_TIMEOUT = 300.0  # seconds that a needed shard waits for other processes to let go of space
AHEAD_ATTEMPTS = 2  # for a needed shard, before one that was fetched ahead goes for it
RETRY = 0.2  # seconds until another try to fetch ahead what found no space, or what another process downloads
POLL = 0.05  # the same of what is needed
RELEASE_BATCHES = 16  # batches into a window after which the one before is released


class RemoteShardStore(ShardStore):
    """The shards of an index behind a URL, fetched into a cache by threads that start when there is something to fetch.

    Needed shards come first, then those of the current window of the stream, and when all of it is here those of the
    next one. The threads exclude each other by one condition, which is notified whenever a reader may go on.
    """

    def __init__(self, url: str, metadata: dict[str, Any], cache: Cache) -> None:
        """Of a folder's URL, and an index that has valid names, sizes and hashes of shards, or ValueError."""
        self.remote, self.cache = Remote(url), cache
        self.files = [shard_file(shard, url) for shard in metadata["shards"]]
        self._window_at: Callable[[int], ShardWindow] | None = None
        self._largest = self._release_at = 0
        self._window: ShardWindow | None = None
        self._previous, self._current, self._next = set[int](), set[int](), list[int]()  # shards of windows
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()  # the least recently read first
        self._needed: dict[int, None] = {}  # the first asked for first
        self._fetching, self._failed = set[int](), dict[int, Exception]()
        self._settled = set[int]()  # of the windows: in the cache, or failed while nobody needed them
        self._change, self._threads = threading.Condition(), 0

    def set_order(self, window_at: Callable[[int], ShardWindow], largest: int) -> None:
        sizes = sorted((file.bytes for file in self.files), reverse=True)
        need = sum(sizes[:largest]) + 2 * sizes[0] + self.cache.used(INDEXES)
        if need > self.cache.bound():
            gigabytes = -(-need // (GIGABYTE // 1000)) / 1000
            least = "" if largest == 1 else ", or mix fewer shards at a time with --shard_window (another order)"
            raise ValueError(f"--shard_cache_gb {self.cache.bound() / GIGABYTE:g} is too little for {largest} shards "
                             f"that are mixed at a time, and the index: give --shard_cache_gb {gigabytes:g} or more "
                             f"(three times that to fetch ahead){least}")
        self._window_at, self._largest = window_at, largest

    def advance(self, position: int, batch: int) -> None:
        now = self._window
        if self._window_at is None or (now and now.start <= position < min(now.stop, self._release_at)):
            return
        with self._change:
            now = self._window
            if now and now.start - RELEASE_BATCHES * batch <= position < now.start:
                return  # a thread that lags behind
            if now is None or not now.start <= position < now.stop:
                self._release_previous()  # of a window shorter than a batch
                self._previous = self._current
                self._window = now = self._window_at(position)
                self._current = set(now.shards)
                self._settled -= self._current - self._open.keys()  # those are opened, or fetched
                self._release_at = min(now.start + RELEASE_BATCHES * batch, (now.start + now.stop) // 2)
                self._next, after = [], now
                for _ in range(2):  # of the window after this one, and of another where that is an epoch's short end
                    if len(self._next) >= self._largest or (self.last is not None and after.stop >= self.last):
                        break
                    after = self._window_at(after.stop)
                    self._next += [shard for shard in after.shards if shard not in {*self._current, *self._next}]
            if position >= self._release_at:
                self._release_at = now.stop
                self._release_previous()
            self._start_threads()

    def prefetch(self, shards: Iterable[int]) -> None:
        with self._change:
            self._need([shard for shard in shards if shard not in self._settled])

    def read(self, shard: int, offset: int, size: int) -> bytearray:
        return _read(self._file(shard), offset, size, self.remote.url_of(self.files[shard].name))

    def _file(self, shard: int) -> BinaryIO:
        with self._change:
            while True:
                if file := self._open.get(shard):
                    self._open.move_to_end(shard)
                    return file
                if shard in self._settled and (file := self.cache.open_copy(self.files[shard])):
                    self._hold(shard, file)  # again: there are more than can be held open
                    return file
                if error := self._failed.pop(shard, None):
                    raise error
                self._need([shard])
                self._change.wait()

    def _need(self, shards: list[int]) -> None:
        if fresh := [shard for shard in shards if shard not in self._open and shard not in self._needed]:
            self._needed |= dict.fromkeys(fresh)
            self._start_threads()

    def _to_fetch(self) -> list[int]:
        """What may be fetched now: nothing ahead before all of the window is here, lest it take the space."""
        current = [shard for shard in self._window.shards if shard not in self._settled] if self._window else []
        ahead = [] if current else [shard for shard in self._next if shard not in self._settled]
        return [shard for shard in dict.fromkeys([*self._needed, *current, *ahead]) if shard not in self._fetching]

    def _start_threads(self) -> None:
        self._change.notify_all()
        for _ in range(min(THREADS, len(self._fetching) + len(self._to_fetch())) - self._threads):
            self._threads += 1
            threading.Thread(target=self._fetch_all, name="fetch", daemon=True).start()

    def _fetch_all(self) -> None:
        """A thread: fetches until there is nothing left."""
        while True:
            with self._change:
                if not (shards := self._to_fetch()):
                    self._threads -= 1
                    return
                shard = shards[0]
                self._fetching.add(shard)
            file = error = None
            try:
                file = self._fetch(shard)
            except Exception as failure:  # whatever it is, the reader who needs the shard gets it
                error = failure
            with self._change:
                if isinstance(error, BusyError):
                    self._change.wait(RETRY)  # or until somebody needs a shard, or a window is released
                self._fetching.discard(shard)
                if isinstance(error, BusyError):
                    continue
                self._settled.add(shard)
                if file and (shard in self._needed or shard in self._current):
                    self._hold(shard, file)
                elif file:
                    file.close()
                elif shard in self._needed:
                    self._failed[shard] = error
                self._needed.pop(shard, None)
                self._start_threads()

    def _fetch(self, shard: int) -> BinaryIO:
        """The opened copy; one that is needed gets space at the cost of what is needed later.

        Raises BusyError where nobody needs it yet, and there is no space or another process downloads it.
        """
        for attempt in itertools.count():
            needed, protected = shard in self._needed, partial(self._protected, attempt)
            try:
                return self.cache.open(self.remote, self.files[shard], protected=protected, wait=needed)
            except FullError as full:
                if not needed:
                    raise
                if attempt * POLL > FULL_TIMEOUT:
                    raise ValueError(f"{full}, all in use for {FULL_TIMEOUT:.0f} s; give a larger --shard_cache_gb, or "
                                     "another --shard_cache_dir than the other processes") from None
            with self._change:  # what was read longest ago, of the previous window, is missed least
                for other in sorted(self._open, key=lambda other: other not in self._previous)[:2]:
                    del self._open[other]
            time.sleep(POLL if attempt else 0)

    def _protected(self, attempt: int) -> list[str]:
        """Hashes of the shards that should stay: of this window, the next and, at the first attempt, the previous."""
        with self._change:
            shards = self._current.union(self._next, () if attempt else self._previous)
            return [self.files[shard].sha256 for shard in shards] if attempt <= AHEAD_ATTEMPTS else []

    def _hold(self, shard: int, file: BinaryIO) -> None:
        """Holds a copy open, and drops others where these are too many; the last who reads from one closes it."""
        self._open[shard] = file
        for other in [other for other in self._open if other not in self._current][:-MAX_OPEN_OUTSIDE]:
            del self._open[other]
        while len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)

    def _release_previous(self) -> None:
        for shard in self._previous - self._current:
            self._open.pop(shard, None)
            self._settled.discard(shard)
        self._previous = set()
