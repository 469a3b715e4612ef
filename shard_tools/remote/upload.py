"""Packing to a URL: shards are packed into a folder of this machine's cache, which is uploaded when all of it is there.

Shards go first, the index last and ``train.index.json`` as the very last, so that a folder at a URL is complete or has
no index. What was uploaded is noted, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from platformdirs import user_cache_path

from shard_tools.core.files import file_sha256
from shard_tools.core.locks import lock
from shard_tools.remote.filesystem import Remote
from shard_tools.remote.index_cache import folder_name, read_indexes
from shard_tools.shards.index import SHARD_NAME, read_metadata
from shard_tools.shards.state import finished

THREADS = 4  # uploads at a time


class Upload:
    """A ``folder`` to pack into (``with``), which is uploaded at the end if it is finished then, and removed."""

    def __init__(self, url: str, overwrite: bool) -> None:
        self.remote, self.overwrite = Remote(url, option="out"), overwrite
        if self.remote.extra == "http":
            raise ValueError(f"--out {url}: web servers take no files; pack to a folder or an object store (s3://, "
                             "gs://)")
        self._work = user_cache_path("covergen") / "packing" / folder_name(self.remote.url)
        self.folder, self._notes = self._work / "shards", self._work / "uploaded"
        self._noting = threading.Lock()

    def published(self) -> list[dict[str, Any]]:
        """The metadata of what is finished at the URL and not to be replaced.

        ValueError where nothing is finished, but there are files that this machine did not upload.
        """
        with contextlib.suppress(FileNotFoundError):
            found = {} if self.overwrite else read_indexes(self.remote)
            metadata = [read_metadata(self.remote.url_of(f"{split}.index.json"), found[split]) for split in found]
            if metadata and set(metadata[0].get("splits", ())) == found.keys():
                return metadata
        if not self.overwrite and not self._notes.exists() and (names := list(self.remote.sizes())):
            raise ValueError(f"{self.remote.url} is not empty (found {', '.join(names[:3])}), and no unfinished upload "
                             "of this machine left it so; choose another --out")
        print(f"packing into {self.folder}, then uploading to {self.remote.url}")
        return []

    def __enter__(self) -> Upload:
        self._held = contextlib.ExitStack()
        self._held.enter_context(lock(self._work.with_name(f"{self._work.name}.lock"), self.remote.url,
                                      "wait for it, or choose another --out", patience=0))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._held:
            if kind is not None or not (metadata := finished(self.folder)):
                return
            try:
                self._upload(metadata)
            except OSError as error:
                raise type(error)(f"{error}; the packed shards are in {self.folder}, and the same command goes on with "
                                  f"uploading them to {self.remote.url}") from None
            shutil.rmtree(self._work)

    def _upload(self, metadata: list[dict[str, Any]]) -> None:
        remote, there = self.remote, self.remote.sizes()
        shards = {shard["name"]: shard["sha256"] for split in metadata for shard in split["shards"]}
        indexes = [f"{split['split']}.index.json" for split in reversed(metadata)]  # train as the very last
        files = [path.name for path in sorted(self.folder.iterdir()) if path.is_file() and path.name not in indexes]
        self._notes.touch()  # from here on what is at the URL is known to be ours
        for name in there:
            if name.endswith(".index.json"):  # from here on it is not finished
                remote.remove(name)
        known = dict(reversed(line.split("  ", 1)) for line in self._notes.read_text().splitlines() if "  " in line)

        def put(name: str) -> None:
            path, sha256 = self.folder / name, file_sha256(self.folder / name)
            if sha256 != shards.get(name, sha256):
                raise ValueError(f"{path} is not what was packed; give --overwrite to pack again")
            if known.get(name) == sha256 and there.get(name) == path.stat().st_size:
                return
            remote.put(path, name)
            with self._noting, open(self._notes, "a") as notes:
                notes.write(f"{sha256}  {name}\n")

        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(put, sorted(files, key=lambda name: name not in shards)))
        there = remote.sizes()
        for name in files:
            if there.get(name) != (size := (self.folder / name).stat().st_size):
                raise OSError(f"{remote.url_of(name)} has {there.get(name)} bytes after the upload, expected {size}")
        for name in there.keys() - files:
            if SHARD_NAME.fullmatch(name) or name.endswith(".index.npy"):  # of what was packed there before
                remote.remove(name)
        for name in indexes:
            remote.put(self.folder / name, name)
        print(f"uploaded {len(files) + len(indexes)} files to {remote.url}, and removing {self.folder}")
