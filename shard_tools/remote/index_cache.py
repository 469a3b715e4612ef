"""The index of shards that lie elsewhere: a URL in; a folder of this machine with all but the shards themselves out.

The folder is part of the cache, named after the URL, and remembers it (``source_url.json``), so that whatever opens it
finds the shards. The JSON is compared with the one elsewhere once in every process; rows are fetched when it changed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shard_tools.core.files import write_atomically
from shard_tools.dataset.demo_truth import TRUTH
from shard_tools.dataset.layout import SPLITS
from shard_tools.remote.cache import GIGABYTE, INDEXES, Cache, FullError, locked
from shard_tools.remote.filesystem import Remote, check_url, redact_url
from shard_tools.shards.index import read_metadata


def resolve(root: str | Path, cache: str | Path | None = None, shard_cache_gb: float | None = None) -> Path:
    """The folder where an index is: as given, or where that of a URL is kept, see ``local_index``."""
    if "://" not in str(root):
        return Path(root)
    return local_index(str(root), cache, shard_cache_gb)


ORIGIN = "origin.json"


def local_index(url: str, folder: str | Path | None = None, gigabytes: float | None = None) -> Path:
    """The folder that stands for a URL.

    Args:
        url: of a folder that ``shard_tools.pack`` wrote.
        folder: of the cache; None = in the user's cache folder.
        gigabytes: bound of the cache, None = as it is.

    Raises:
        ValueError: no extra for it, credentials in it, or a damaged index.
        FileNotFoundError, OSError: no index there, or out of reach.
    """
    check_url("shards", url)
    return _fetched(url.rstrip("/"), Cache(folder, gigabytes))


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
def _fetched_once(url: str, folder: Path) -> Path:
    cache, remote = Cache(folder), Remote(url, attempts=6)  # a wrong address is soon told
    root = folder / INDEXES / folder_name(url)
    found = _facts_at(remote)
    with locked(root / ".lock"):
        changed = [split for split, data in found.items() if not _is_there(root / f"{split}.index.json", data)]
        if changed:
            _take_truth(cache, remote, root)
        with ThreadPoolExecutor(len(found)) as threads:
            list(threads.map(lambda split: _take_split(cache, remote, root, split, found[split]), changed))
        for path in root.glob("*.index.json"):
            if path.name.removesuffix(".index.json") not in found:
                path.unlink()
        write_atomically(root / ORIGIN, json.dumps({"url": url}).encode())
    return root


def _fetched(url: str, cache: Cache) -> Path:
    try:
        return _fetched_once(url, cache.folder)
    except FullError as error:
        raise ValueError(f"the index of {redact_url(url)} has no room in the cache ({error}); give a larger --shard_cache_gb than "
                         f"{cache.bound() / GIGABYTE:.3g}") from None


def _facts_at(remote: Remote) -> dict[str, bytes]:
    """The JSON of every split; plain web servers can't be asked which there are."""
    found: dict[str, bytes] = {}
    failed: OSError | None = None

    def ask(split: str) -> bytes | OSError:
        try:
            return remote.read(f"{split}.index.json")
        except (FileNotFoundError, PermissionError) as error:  # S3 denies what is not there to who may not list
            return error

    asked: list[str] = []
    names = list(SPLITS)
    while names:
        with ThreadPoolExecutor(len(names)) as threads:
            answers = list(zip(names, threads.map(ask, names), strict=True))
        asked, names = asked + names, []
        for split, answer in answers:
            if isinstance(answer, OSError):
                failed = answer if failed is None or isinstance(answer, PermissionError) else failed
                continue
            found[split] = answer
            with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged ones are told by who reads them
                names += [name for name in json.loads(answer)["splits"]
                          if name not in asked + names and re.fullmatch("[a-z]+", name)]
    if not found:
        if isinstance(failed, PermissionError):
            raise failed
        raise FileNotFoundError(f"{redact_url(remote.url)}: no shards with an index there (train.index.json, "
                                "val.index.json or test.index.json); make them with shard_tools.pack")
    return found


def _is_there(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _take_split(cache: Cache, remote: Remote, root: Path, split: str, data: bytes) -> None:
    path = root / f"{split}.index.json"
    path.unlink(missing_ok=True)  # from here on it is not finished
    temporary = root / f".{path.name}.tmp"
    _take(cache, temporary, data)
    metadata = read_metadata(temporary)
    _take_rows(cache, remote, root, split, metadata["rows_sha256"])
    os.replace(temporary, path)


def _take(cache: Cache, path: Path, data: bytes) -> None:
    with open(path, "a+b") as file:
        cache.set_aside(file, len(data))
        file.truncate(0)
        file.write(data)


def _take_rows(cache: Cache, remote: Remote, root: Path, split: str, sha256: str) -> None:
    name = f"{split}.index.npy"
    size = remote.size(name)
    if size is None:
        raise FileNotFoundError(f"{redact_url(remote.at(name))}: no such file, but {split}.index.json is there; pack again")
    temporary = root / f".{name}.tmp"
    with open(temporary, "a+b") as file:
        cache.set_aside(file, size)
    with open(temporary, "r+b") as file:
        remote.fetch(name, size, sha256, file)
    os.replace(temporary, root / name)


def _take_truth(cache: Cache, remote: Remote, root: Path) -> None:
    """What only demo shards have: the attributes that their covers show."""
    try:
        data = remote.read(TRUTH)
    except (FileNotFoundError, PermissionError):
        (root / TRUTH).unlink(missing_ok=True)
        return
    _take(cache, root / f".{TRUTH}.tmp", data)
    os.replace(root / f".{TRUTH}.tmp", root / TRUTH)
