"""Packing to a URL: what packs into a folder, and a URL, in; shards and their index elsewhere, whole or not there, out.

Shards are packed into a folder of this machine's cache and uploaded by threads as each is settled (when all files were
looked at, so the disk must hold them); an uploaded one becomes a hole of its size. What is uploaded is noted, so the
same command goes on; the index follows at the end, ``train.index.json`` as the very last.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from shard_tools.core.files import file_sha256
from shard_tools.core.locks import _alone
from shard_tools.dataset.layout import SPLITS
from shard_tools.remote.filesystem import HTTP, Remote, check_url, redact_url
from shard_tools.remote.index_cache import folder_name
from shard_tools.shards.index import SHARD_NAME, read_metadata, splits_in

THREADS, PAUSE = 4, 0.3  # uploads at a time; seconds between looks at what is finished
Pack = Callable[[Path], int]


def pack_to(url: str, overwrite: bool, pack: Pack) -> int:
    """Packs to a URL; returns what packing returns.

    Args:
        url: of the folder.
        overwrite: replace what is finished there.
        pack: packs into a folder of this machine, as the same command would.

    Raises:
        ValueError: what packing raises, or the folder there holds other files.
        OSError: it is out of reach.
    """
    check_url("out", url)
    remote = Remote(url)
    if remote.protocol in HTTP:
        raise ValueError(f"--out {url}: web servers take no files; pack to a folder or an object store (s3://, gs://)")
    stage = user_cache_path("covergen") / "packing" / folder_name(remote.url)
    stage.mkdir(parents=True, exist_ok=True)
    with _alone(stage.with_name(f"{stage.name}.lock"), url), _named(stage, url):
        there = _finished(remote)
        if there and not overwrite:
            return _compare(remote, there, stage.with_name(f"{stage.name}.there"), pack)
        upload = Upload(remote, stage)
        if not upload.notes and not overwrite and (names := remote.names()):
            raise ValueError(f"{url} is not empty (found {', '.join(names[:3])}), and no unfinished packing of this "
                             "machine left it so; choose another --out")
        for split in there:  # from here on it is not finished
            remote.remove(f"{split}.index.json")
        with upload:
            status = pack(stage)
        upload.finish()
        print(f"uploaded to {url}")
        shutil.rmtree(stage)
        upload.path.unlink(missing_ok=True)
        return status


def _finished(remote: Remote) -> dict[str, bytes]:
    """The JSON of all splits elsewhere, empty where one of those that belong together is missing."""
    found = {}
    for split in SPLITS:
        with contextlib.suppress(FileNotFoundError):
            found[split] = remote.read(f"{split}.index.json")
    for data in found.values():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if set(json.loads(data)["splits"]) != set(found):
                return {}
    return found


def _compare(remote: Remote, there: dict[str, bytes], folder: Path, pack: Pack) -> int:
    """Lets packing say whether what is finished elsewhere is what it would make, from its index and holes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        for split, data in there.items():
            (folder / f"{split}.index.json").write_bytes(data)
            for shard in read_metadata(folder / f"{split}.index.json")["shards"]:
                if SHARD_NAME.fullmatch(shard["name"]):
                    _hole(folder / shard["name"], shard["bytes"])
        with _named(folder, remote.url):
            status = pack(folder)
        for path in folder.glob("*.npz"):  # the truth of a demo, which earlier versions left behind
            if remote.size(path.name) is None:
                remote.put(path, path.name)
        return status
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Upload:
    """Uploads the shards of a folder while they are packed (``with``), then the rest.

    Attributes:
        notes: SHA-256 of what is uploaded, by name.
        path: of the file that keeps them.
    """

    def __init__(self, remote: Remote, stage: Path) -> None:
        self.remote, self.stage, self.path = remote, stage, stage.with_name(f"{stage.name}.uploaded")
        self.notes: dict[str, str] = {}
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # half a line, by a kill
                    self.notes |= json.loads(line)
        self._lock, self._over = threading.Lock(), threading.Event()
        self._threads = ThreadPoolExecutor(THREADS, "upload")
        self._begun: set[str] = set()

    def __enter__(self) -> Upload:
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._watcher.join()
        self._threads.shutdown()

    def _watch(self) -> None:
        while not self._over.wait(PAUSE):
            for path in sorted(self.stage.glob("*.tar")):  # a shard gets its name when it is settled
                if path.name not in self.notes and path.name not in self._begun:
                    self._begun.add(path.name)
                    self._threads.submit(self._try, path)

    def _try(self, path: Path) -> None:
        with contextlib.suppress(OSError, ValueError):  # ``finish`` tries again, and tells
            self._shard(path.name, file_sha256(path))

    def _shard(self, name: str, sha256: str) -> None:
        """Uploads a finished shard, unless that was done, and leaves a hole."""
        if self.notes.get(name) == sha256:
            return
        path = self.stage / name
        if file_sha256(path) != sha256:
            path.unlink()
            raise ValueError(f"{path} is not what was packed; run the same command again")
        size = path.stat().st_size
        self.remote.put(path, name)
        if (there := self.remote.size(name)) != size:
            raise ValueError(f"{redact_url(self.remote.at(name))} has {there} bytes after the upload, expected {size}; run "
                             "the same command again")
        with self._lock:
            self.notes[name] = sha256
            with open(self.path, "a") as notes:
                notes.write(json.dumps({name: sha256}) + "\n")
                notes.flush()
                os.fsync(notes.fileno())
        _hole(path, size)

    def finish(self) -> None:
        """Uploads what is left of a finished folder, the index last, and removes what an earlier one left there.

        Raises:
            ValueError: a shard that was uploaded is gone.
        """
        splits = list(splits_in(self.stage))
        shards = {shard["name"]: shard["sha256"] for split in splits
                  for shard in read_metadata(self.stage / f"{split}.index.json")["shards"]}
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(self._shard, shards, shards.values()))
        names = set(self.remote.names())
        if missing := sorted(shards.keys() - names):
            shutil.rmtree(self.stage)
            self.path.unlink()
            raise ValueError(f"{redact_url(self.remote.url)}: {len(missing)} shards that were uploaded are gone, the first "
                             f"is {missing[0]}; run the same command again")
        last = [f"{split}.index.json" for split in reversed(splits)]  # train as the very last
        for path in sorted(self.stage.iterdir()):
            if path.is_file() and path.name not in shards and path.name not in last:
                self.remote.put(path, path.name)
        for name in sorted(names - shards.keys()):
            if SHARD_NAME.fullmatch(name) or (name.endswith(".index.npy") and not (self.stage / name).exists()):
                self.remote.remove(name)
        for name in last:
            self.remote.put(self.stage / name, name)


def _hole(path: Path, size: int) -> None:
    """A file of a size that takes no room."""
    with open(path, "wb") as file:
        file.truncate(size)


class _Renamed(io.TextIOBase):
    """A stream that says one thing for another."""

    def __init__(self, stream: Any, old: str, new: str) -> None:
        self.stream, self.old, self.new = stream, old, new

    def write(self, text: str) -> int:
        self.stream.write(text.replace(self.old, self.new))
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


@contextlib.contextmanager
def _named(folder: Path, url: str) -> Iterator[None]:
    """What packing says of a folder is said of a URL."""
    try:
        with contextlib.redirect_stdout(_Renamed(sys.stdout, str(folder), url)):
            yield
    except ValueError as error:
        raise type(error)(str(error).replace(str(folder), url)) from None
