"""Run folders behind URLs: a folder of this machine that is kept in step with one.

A thread uploads what changed in a folder of the user's cache, a checkpoint at a time: its files first and
``whole.json``, which holds their sizes and hashes, last, so that a checkpoint at the URL is whole or does not count.
What could not be uploaded is tried again with the next checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import warnings
from pathlib import Path

from platformdirs import user_cache_path

from shard_tools.core.files import file_sha256, read_bounded, write_atomically
from shard_tools.core.locks import lock
from shard_tools.remote.filesystem import Remote, is_remote, redact_url
from shard_tools.remote.index_cache import folder_name

CHECKPOINTS, MANIFEST, UPLOADED = "checkpoints", "whole.json", ".uploaded.json"
KINDS = ("step", "best")
ATTEMPTS = 5  # a few seconds; a training goes on meanwhile


def local_folder(run: str | Path) -> Path:
    """Where a run folder is on this machine: the path itself, or the folder for a URL (which is not asked)."""
    if not is_remote(run):
        return Path(run)
    parent, _, name = str(run).rstrip("/").rpartition("/")
    return user_cache_path("covergen") / "runs" / folder_name(parent) / name


def fetched_run(run: str | Path) -> Path:
    """The folder of a run to read: a path as it is, of a URL a copy with its newest and best checkpoint."""
    if not is_remote(run):
        return Path(run)
    sync = RunSync(str(run))
    sync.fetch()
    if not (sync.folder / "config.yaml").is_file():
        raise ValueError(f"{sync.remote.url} is not a run folder: it has no config.yaml (runs are in OUT/<name>)")
    return sync.folder


def open_sync(out: str, name: str, keep: int, main: bool) -> RunSync | None:
    """What the main process uploads with (None for others and for paths); it calls first, and uploads what it has."""
    if not is_remote(out):
        return None
    sync = RunSync(f"{out.rstrip('/')}/{name}", keep)
    sync.fetch()
    if not main:
        return None
    sync.push()
    sync.wait()
    return sync


class RunSync:
    """A run folder on this machine (``folder``) and at a URL, where the newest ``keep`` checkpoints stay."""

    def __init__(self, url: str, keep: int = 3) -> None:
        self.remote, self.keep = Remote(url, attempts=ATTEMPTS, option="out"), keep
        self.folder = local_folder(url)
        self._thread: threading.Thread | None = None

    def fetch(self) -> None:
        """Brings what this machine lacks: the newest and best whole checkpoints, if newer, and all small files."""
        names = list(self.remote.sizes())
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock(self.folder / ".fetch"):
            whole = [name.split("/")[1] for name in names if _is_manifest(name)]
            uploaded = self._uploaded()
            if lost := uploaded.keys() - names - set(whole):  # removed at the URL, perhaps with the whole run
                self._write_uploaded({name: note for name, note in uploaded.items() if name not in lost})
            fetched = [self._fetch_newest(kind, whole) for kind in KINDS]
            if any(fetched) or not (self.folder / "config.yaml").is_file():
                for name in names:
                    if not name.startswith(f"{CHECKPOINTS}/") and _is_plain(name):
                        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                        write_atomically(self.folder / name, self.remote.read(name))

    def _checkpoints(self, kind: str) -> list[Path]:
        return sorted((self.folder / CHECKPOINTS).glob(f"{kind}_????????"))

    def _fetch_newest(self, kind: str, whole: list[str]) -> bool:
        """Fetches the newest checkpoint of a kind that is not damaged, if it is newer than those here."""
        here = [path.name for path in self._checkpoints(kind)]
        for name in sorted(whole, reverse=True):
            if name.startswith(f"{kind}_") and name > max(here, default=""):
                try:
                    self._fetch_checkpoint(name)
                    return True
                except (ValueError, OSError, KeyError) as error:
                    url = self.remote.url_of(f"{CHECKPOINTS}/{name}")
                    warnings.warn(f"{url} is passed over: {error}", stacklevel=4)
        return False

    def _fetch_checkpoint(self, name: str) -> None:
        target = self.folder / CHECKPOINTS / name
        temporary = target.with_name(f".fetched_{name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            files = json.loads(self.remote.read(f"{CHECKPOINTS}/{name}/{MANIFEST}"))
            for file, (size, sha256) in files.items():
                if not _is_plain(file) or "/" in file:
                    raise ValueError(f"{file!r} is no name of a file")
                with open(temporary / file, "wb") as out:
                    self.remote.fetch(f"{CHECKPOINTS}/{name}/{file}", size, sha256, out)
            os.replace(temporary, target)
            self._write_uploaded(self._uploaded() | {name: "whole"})
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def push(self) -> None:
        """Has everything uploaded that is new; returns at once."""
        self._thread = threading.Thread(target=self._work, args=(self._thread,), name="upload", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when all is uploaded, or could not be (which a warning says)."""
        if self._thread:
            self._thread.join()

    def _work(self, before: threading.Thread | None) -> None:
        if before:
            before.join()
        if threading.current_thread() is not self._thread:
            return  # the next one uploads all
        try:
            self._upload()
        except Exception as error:  # a training must not end because a network has
            warnings.warn(f"the run was not uploaded ({redact_url(error)}); tried again with the next checkpoint, it "
                          f"is in {self.folder}", stacklevel=2)

    def _upload(self) -> None:
        uploaded = self._uploaded()
        for path in (path for kind in KINDS for path in self._checkpoints(kind)):
            if path.name not in uploaded:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    files = {file.name: [file.stat().st_size, file_sha256(file)] for file in sorted(path.iterdir())}
                    for name in files:
                        self.remote.put(path / name, f"{CHECKPOINTS}/{path.name}/{name}")
                    self.remote.write(json.dumps(files).encode(), f"{CHECKPOINTS}/{path.name}/{MANIFEST}")
                    self._write_uploaded(uploaded := uploaded | {path.name: "whole"})
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and _is_plain(name) and not name.startswith((f"{CHECKPOINTS}/", "wandb/")):
                stamp = f"{path.stat().st_size} {path.stat().st_mtime_ns}"
                if uploaded.get(name) != stamp:
                    self.remote.put(path, name)
                    self._write_uploaded(uploaded := uploaded | {name: stamp})
        # Old checkpoints go, first what says that they are whole.
        names = [name for name in self.remote.sizes() if name.startswith(f"{CHECKPOINTS}/")]
        whole = sorted(name.split("/")[1] for name in names if _is_manifest(name))
        steps, bests = ([name for name in whole if name.startswith(f"{kind}_")] for kind in KINDS)
        stay = {*steps[-self.keep:], *([path.name for path in self._checkpoints("best")] or bests[-1:])}
        for name in sorted(names, key=lambda name: not _is_manifest(name)):
            if name.split("/")[1] not in stay:
                self.remote.remove(name)

    def _uploaded(self) -> dict[str, str]:
        """What is at the URL already: checkpoints, and other files with their sizes and times."""
        with contextlib.suppress(OSError, ValueError):
            notes = json.loads(read_bounded(self.folder / UPLOADED))
            return notes if isinstance(notes, dict) else {}
        return {}

    def _write_uploaded(self, notes: dict[str, str]) -> None:
        write_atomically(self.folder / UPLOADED, json.dumps(notes).encode())


def _is_manifest(name: str) -> bool:
    return name.startswith(f"{CHECKPOINTS}/") and name.endswith(f"/{MANIFEST}")


def _is_plain(name: str) -> bool:
    """Whether a relative name stays where it belongs and is none of the hidden files."""
    return not any(part in ("", "..") or part.startswith(".") for part in name.split("/"))
