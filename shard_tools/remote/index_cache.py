"""The index of shards behind a URL, as a folder of this machine that holds all but the shards themselves.

The folder is part of the cache, named after the URL, and remembers it (``origin.json``), so that whatever opens it
finds the shards. The JSON is compared with the one at the URL once in every process; rows are fetched when it changed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from shard_tools.core.files import write_atomically
from shard_tools.core.locks import lock
from shard_tools.dataset.demo_truth import TRUTH
from shard_tools.dataset.layout import SPLITS
from shard_tools.remote.cache import GIGABYTE, INDEXES, Cache, FullError
from shard_tools.remote.filesystem import Remote, check_url, is_remote, redact_url
from shard_tools.shards.index import read_metadata

ORIGIN = "origin.json"


def resolve(root: str | Path, cache: str | Path | None = None, gigabytes: float | None = None) -> Path:
    """The folder where the index of shards is: a path as it is, of a URL the folder in the cache.

    ``cache`` and ``gigabytes`` are as of ``Cache``. ValueError for credentials in the URL, a missing extra, a damaged
    index or a full cache; OSError for no index there, or one out of reach.
    """
    if not is_remote(root):
        return Path(root)
    url = str(root).rstrip("/")
    check_url("shards", url)
    bounded = Cache(cache, gigabytes)
    try:
        return _fetch_index(url, bounded.folder)
    except FullError as error:
        raise ValueError(f"the index of {url} does not fit in the cache ({error}); give a larger --shard_cache_gb than "
                         f"{bounded.bound() / GIGABYTE:.3g}") from None


def source_url(root: Path) -> tuple[str, Cache] | None:
    """The URL that a folder stands for and the cache it is in; None for a folder of shards."""
    if root.parent.name != INDEXES or not (root / ORIGIN).is_file():
        return None
    return json.loads((root / ORIGIN).read_text())["url"], Cache(root.parent.parent)


def folder_name(url: str) -> str:
    """A readable and unique name for a URL."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", redact_url(url)).strip("-")[-60:]
    return f"{plain}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


@functools.cache
def _fetch_index(url: str, folder: Path) -> Path:
    cache, remote = Cache(folder), Remote(url, attempts=6)  # a wrong address is soon reported
    root = folder / INDEXES / folder_name(url)
    found = read_indexes(remote)
    with lock(root / ".lock"):
        changed = [split for split, data in found.items()
                   if not (path := root / f"{split}.index.json").is_file() or path.read_bytes() != data]
        if changed:
            try:  # what only demo shards have: the attributes that their covers show
                truth = remote.read(TRUTH)
            except (FileNotFoundError, PermissionError):
                (root / TRUTH).unlink(missing_ok=True)
            else:
                _save(cache, root / TRUTH, len(truth), lambda file: file.write(truth))
        with ThreadPoolExecutor(len(found)) as threads:
            list(threads.map(lambda split: _fetch_split(cache, remote, root, split, found[split]), changed))
        for path in root.glob("*.index.json"):
            if path.name.removesuffix(".index.json") not in found:
                path.unlink()
        write_atomically(root / ORIGIN, json.dumps({"url": url}).encode())
    return root


def read_indexes(remote: Remote) -> dict[str, bytes]:
    """The index JSON of every split: of the usual ones, and of those that these name; web servers list no files."""
    def read(split: str) -> bytes | OSError:
        try:
            return remote.read(f"{split}.index.json")
        except (FileNotFoundError, PermissionError) as error:  # S3 denies what is not there to who may not list
            return error

    with ThreadPoolExecutor(8) as threads:
        answers = dict(zip(SPLITS, threads.map(read, SPLITS), strict=True))
        others = set()
        for answer in answers.values():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # whoever opens a damaged one reports it
                others |= {split for split in json.loads(answer)["splits"] if re.fullmatch("[a-z]+", split)}
        others = sorted(others - answers.keys())
        answers |= zip(others, threads.map(read, others), strict=True)
    if found := {split: answer for split, answer in answers.items() if isinstance(answer, bytes)}:
        return found
    for answer in answers.values():
        if isinstance(answer, PermissionError):
            raise answer
    raise FileNotFoundError(f"{remote.url}: no shards with an index there (train.index.json, val.index.json or "
                            "test.index.json); make them with shard_tools.pack")


def _fetch_split(cache: Cache, remote: Remote, root: Path, split: str, data: bytes) -> None:
    """Fetches the rows of a split, then writes its JSON."""
    path, rows = root / f"{split}.index.json", f"{split}.index.npy"
    path.unlink(missing_ok=True)  # from here on it is not finished
    sha256 = read_metadata(remote.url_of(path.name), data)["rows_sha256"]
    size = remote.size(rows)
    if size is None:
        raise FileNotFoundError(f"{remote.url_of(rows)}: no such file, but {path.name} is there; pack again")
    _save(cache, root / rows, size, lambda file: remote.fetch(rows, size, sha256, file))
    _save(cache, path, len(data), lambda file: file.write(data))


def _save(cache: Cache, path: Path, size: int, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file, whole or absent, whose space is reserved in the cache."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w+b") as file:
        cache.reserve(file, size)
        write(file)
    os.replace(temporary, path)
