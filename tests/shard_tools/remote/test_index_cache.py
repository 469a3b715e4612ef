"""Shards behind URLs: the cache's bound, one download, damage, errors, and the same batches as from a disk."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from covergen.data.shard_store import RemoteShardStore
from covergen.data.stream import open_stream
from shard_tools.core.locks import lock
from shard_tools.inspect import inspect
from shard_tools.remote import filesystem as far
from shard_tools.remote.cache import BusyError, Cache, FullError, RemoteFile
from shard_tools.remote.filesystem import Remote, check_url, redact_url
from shard_tools.remote.index_cache import resolve
from shard_tools.shards.index import open_index, splits_in
from tests.support.servers import Faults, fetch_all, proxy
from tests.support.waiting import LIMIT, wait_for

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")
SIZE = 50_000


class Quiet(SimpleHTTPRequestHandler):
    """A web server without ranges."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass


class Ranges(Quiet):
    """A web server with ranges, which remembers those that it was asked for."""

    asked: ClassVar[Counter] = Counter()

    def do_GET(self) -> None:
        data = Path(self.directory, self.path.lstrip("/")).read_bytes()
        start, stop = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        self.asked[self.path, start] += 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop}/{len(data)}")
        self.send_header("Content-Length", str(stop + 1 - start))
        self.end_headers()
        self.wfile.write(data[start:stop + 1])


def serve(folder: Path, handler: type[Quiet] = Quiet) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Faults, list[RemoteFile]]]:
    """Six files of random bytes behind a proxy; its URL, what it does, and the files."""
    (tmp_path / "web").mkdir()
    stored = []
    for number in range(6):
        data = np.random.default_rng(number).bytes(SIZE)
        (tmp_path / "web" / f"{number}.tar").write_bytes(data)
        stored.append(RemoteFile(f"{number}.tar", SIZE, hashlib.sha256(data).hexdigest()))
    faults, server = Faults(), serve(tmp_path / "web")
    with proxy(f"http://127.0.0.1:{server.server_address[1]}", faults) as url:
        yield url, faults, stored
    server.shutdown()
    server.server_close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far, "BACKOFF", 0.005)


def sizes(cache: Cache) -> int:
    with lock(cache.folder / ".lock"):  # or what goes and what comes for it would both be counted
        return sum(path.stat().st_size for path in cache.folder.rglob("*") if path.is_file() and path.name != "bound")


def test_a_cache_stays_within_its_bound_and_lets_go_of_what_was_used_longest_ago(tmp_path: Path, web) -> None:
    url, faults, stored = web
    cache = Cache(tmp_path / "cache", 3.5 * SIZE / 1e9)
    for number in (0, 1, 2, 0, 3):
        with cache.open(Remote(url), stored[number]) as file:
            assert hashlib.sha256(file.read()).hexdigest() == stored[number].sha256
        time.sleep(0.01)  # or the clock of files may say the same for two
        assert sizes(cache) <= 3.5 * SIZE
    assert faults.whole == Counter({f"/{number}.tar": 1 for number in range(4)})
    left = {path.name for path in (tmp_path / "cache" / "shards").iterdir()}
    assert left == {f"{stored[number].sha256}.tar" for number in (0, 2, 3)}


def test_what_is_open_or_spared_is_not_removed(tmp_path: Path, web) -> None:
    url, _, stored = web
    cache, remote = Cache(tmp_path / "cache", 2.5 * SIZE / 1e9), Remote(url)
    with cache.open(remote, stored[0]) as held:
        cache.open(remote, stored[1]).close()
        with pytest.raises(FullError):
            cache.open(remote, stored[2], protected=lambda: [stored[1].sha256])
        cache.open(remote, stored[2]).close()
        assert os.fstat(held.fileno()).st_nlink == 1
        with Cache(tmp_path / "cache").open(remote, stored[2]), pytest.raises(FullError):
            cache.open(remote, stored[3])
    cache.open(remote, stored[3]).close()
    assert Cache(tmp_path / "cache").bound() == int(2.5 * SIZE)  # the folder's, for all who use it


def test_a_copy_that_was_damaged_or_cut_is_fetched_again(tmp_path: Path, web) -> None:
    url, faults, stored = web
    Cache(tmp_path / "cache").open(Remote(url), stored[0]).close()
    copy = tmp_path / "cache" / "shards" / f"{stored[0].sha256}.tar"
    for damaged in (copy.read_bytes()[:-1], b"x" + copy.read_bytes()[1:]):
        copy.write_bytes(damaged)
        with Cache(tmp_path / "cache").open(Remote(url), stored[0]) as file:
            assert hashlib.sha256(file.read()).hexdigest() == stored[0].sha256
    assert faults.whole["/0.tar"] == 3


def test_processes_that_want_the_same_at_once_download_it_once(tmp_path: Path, web) -> None:
    url, faults, stored = web
    faults.latency = 0.05
    processes = [multiprocessing.get_context("spawn").Process(target=fetch_all, args=(str(tmp_path / "c"), url, stored))
                 for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
        assert process.exitcode == 0
    assert faults.whole == Counter({f"/{number}.tar": 1 for number in range(6)})


def test_who_does_not_wait_is_told_that_another_downloads(tmp_path: Path, web) -> None:
    url, _, stored = web
    cache, slow, begun, told = Cache(tmp_path / "cache"), Remote(url), threading.Event(), threading.Event()
    fetch = slow.fetch

    def waiting(*rest: object) -> object:
        begun.set()
        told.wait(LIMIT)
        return fetch(*rest)
    slow.fetch = waiting
    thread = threading.Thread(target=lambda: cache.open(slow, stored[0]).close())
    thread.start()
    assert begun.wait(LIMIT)
    with pytest.raises(BusyError):
        Cache(tmp_path / "cache").open(Remote(url), stored[0], wait=False)
    told.set()
    thread.join()


def test_failures_and_cut_bodies_are_tried_again(tmp_path: Path, web, hasty: None) -> None:
    url, faults, stored = web
    faults.failed, faults.cut = 0.3, 0.3
    fetch_all(str(tmp_path / "cache"), url, stored)
    assert faults.broken >= 3
    assert [Remote(url).size("0.tar") for _ in range(10)] == [SIZE] * 10 and Remote(url).size("9.tar") is None


def test_a_download_goes_on_where_it_broke_off(tmp_path: Path, web, hasty: None,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    _, faults, stored = web
    faults.failed = 0.3
    monkeypatch.setattr(far, "PIECE_BYTES", 20_000)
    Ranges.asked.clear()
    server = serve(tmp_path / "web", Ranges)
    with proxy(f"http://127.0.0.1:{server.server_address[1]}", faults) as url:
        fetch_all(str(tmp_path / "cache"), url, stored)
    server.shutdown()
    server.server_close()
    assert faults.broken >= 3
    assert Ranges.asked == Counter((f"/{file.name}", start) for file in stored for start in (0, 20_000, 40_000))


def test_a_wrong_hash_is_tried_again_and_then_refused(tmp_path: Path, web, hasty: None) -> None:
    url, faults, stored = web
    wrong = RemoteFile("0.tar", SIZE, stored[1].sha256)
    with pytest.raises(ValueError, match=r"0\.tar: its SHA-256 is not that of the index, 3 times"):
        Cache(tmp_path / "cache").open(Remote(url), wrong)
    assert faults.whole["/0.tar"] == 3 and not list((tmp_path / "cache" / "shards").iterdir())
    longer = RemoteFile("0.tar", SIZE - 1, stored[0].sha256)
    with pytest.raises(OSError, match="50,000 bytes of the 49,999 asked for"):
        Cache(tmp_path / "cache").open(Remote(url, attempts=2), longer)


def test_errors_say_what_to_do_and_no_secret(tmp_path: Path, web, monkeypatch: pytest.MonkeyPatch) -> None:
    url, _, _ = web
    with pytest.raises(FileNotFoundError, match=r"no shards with an index there .*make them with shard_tools\.pack"):
        resolve(url, tmp_path / "cache")
    for secret in ("https://me:hidden@host/x", "https://host/x?X-Amz-Signature=hidden", "s3://key:hidden@bucket/x"):
        with pytest.raises(ValueError, match="credentials by the environment") as error:
            check_url("shards", secret)
        assert "hidden" not in str(error.value)
    assert redact_url("no https://a:b@c/d?e#f, s3://g/h") == "no https://c/d s3://g/h"
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    monkeypatch.setitem(__import__("sys").modules, "aiohttp", None)
    for url, extra in (("gs://bucket/x", "gcs"), ("https://host/x", "http")):
        with pytest.raises(ValueError, match=rf"{url[:2]}.*// needs pip install -e \.\[{extra}\]"):
            resolve(url, tmp_path / "cache")
    with pytest.raises(ValueError, match="give a path, s3://"):
        resolve("s4://bucket/x", tmp_path / "cache")


def test_an_index_of_a_url_names_no_files_of_this_machine(tmp_path: Path) -> None:
    valid = {"name": "train-00000-of-00001.tar", "bytes": 5, "sha256": "0" * 64}
    RemoteShardStore("memory://x", {"shards": [valid]}, Cache(tmp_path))
    for wrong in ({"sha256": "../../../x"}, {"name": "../x"}, {"bytes": -1}, {"bytes": "5"}, {"sha256": None}):
        with pytest.raises(ValueError, match="which packing does not write"):
            RemoteShardStore("memory://x", {"shards": [valid | wrong]}, Cache(tmp_path))


def put(folder: Path, url: str) -> str:
    """A folder's files in fsspec's memory."""
    import fsspec
    for path in folder.iterdir():
        if path.is_file():
            fsspec.filesystem("memory").pipe_file(f"{url}/{path.name}", path.read_bytes())
    return url


@pytest.mark.parametrize(("window", "order", "windows"), [
    (None, "sample", 0), (4, "sample", 2), (4, "group", 2), (10, "sample", 1)])
def test_batches_are_those_of_local_shards_and_each_shard_comes_once_an_epoch(
        many: Path, tmp_path: Path, window: int | None, order: str, windows: int) -> None:
    largest = max(path.stat().st_size for path in many.glob("train-*.tar"))
    indexes = sum(path.stat().st_size for path in [*many.glob("*.index.*"), *many.glob("*.npz")])
    bound = (largest * (windows * (window or 0) + 2) + indexes + 4096) / 1e9 if windows else 1.0
    root = resolve(put(many, f"memory://{tmp_path.name}"), tmp_path / "cache", bound)
    here, there = (open_stream(folder, "train", batch_size=4, seed=3, window=window, order=order)
                   for folder in (many, root))
    here.mismatch()
    there.mismatch()
    fetched, cache, fetch = Counter(), Cache(tmp_path / "cache"), there.dataset.store.remote.fetch
    there.dataset.store.remote.fetch = lambda name, *rest: (fetched.update([name]), fetch(name, *rest))[1]
    epochs, largest = 3, 0
    batches = epochs * here.epoch // 4
    there.ends(batches * 4)
    for number in range(batches):
        assert all(torch.equal(*parts) for parts in zip(here.batch(number), there.batch(number), strict=True))
        largest = max(largest, sizes(cache))
    assert largest <= bound * 1e9
    assert len(fetched) == len(here.dataset.shards)
    assert set(fetched.values()) == {1} if not windows else max(fetched.values()) <= epochs


@pytest.mark.parametrize(("window", "follow"), [(0, 1), (2, 2)])  # of 14 shards four at a time, the last one has two
def test_the_next_window_comes_at_once(window: int, follow: int, many: Path, tmp_path: Path) -> None:
    root = resolve(put(many, f"memory://{tmp_path.name}"), tmp_path / "cache")
    stream = open_stream(root, "train", batch_size=1, seed=3, window=4)
    windows = [stream.order.window(0)]
    for _ in range(4):
        windows.append(stream.order.window(windows[-1].stop))
    stream.dataset.store.advance(windows[window].start, 1)
    shards = {shard for part in windows[window:window + 1 + follow] for shard in part.shards}
    expected = {stream.dataset.store.files[shard].sha256 for shard in shards}

    def idle() -> bool:
        with stream.dataset.store._change:
            return not stream.dataset.store._threads
    wait_for(idle, "all that is fetched ahead")
    assert {path.stem for path in (tmp_path / "cache" / "shards").iterdir()} == expected


def test_a_cache_too_small_for_what_is_mixed_is_refused_with_the_size_it_needs(many: Path, tmp_path: Path) -> None:
    root = resolve(put(many, f"memory://{tmp_path.name}"), tmp_path / "cache", 0.0006)
    with pytest.raises(ValueError, match=r"_gb 0\.0006 is too little for 14 shards .* give --shard_cache_gb 0\.00\d+"):
        open_stream(root, "train", batch_size=4)
    open_stream(root, "train", batch_size=4, window=1).batch(0)


def test_a_url_has_splits_and_rows_and_is_packed_anew_when_it_changed(many: Path, shards: Path, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from shard_tools.remote import index_cache
    url = put(many, f"memory://{tmp_path.name}")
    assert list(splits_in(resolve(url))) == ["train", "val", "test"]
    assert (open_index(resolve(url), "train").rows == open_index(many, "train").rows).all()
    assert inspect(url) == 0
    put(shards, url)
    index_cache._fetch_index.cache_clear()  # as another process
    assert open_index(resolve(url), "train").metadata == open_index(shards, "train").metadata
    assert (open_index(resolve(url), "train").rows == open_index(shards, "train").rows).all()
