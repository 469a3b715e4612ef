"""Run folders elsewhere: a URL in; a folder of this machine that is kept in step with it out.

A run is written to a folder in the user's cache, and a thread uploads what changed, a checkpoint at a time: its files
first and ``whole.json``, which holds their sizes and hashes, last, so that a checkpoint elsewhere is whole or does not
count. At the start the newest whole one is fetched where this machine has none as new. A network that is away stops no
training: what could not be uploaded is tried again with the next checkpoint.
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
from shard_tools.remote.filesystem import Remote, check_url, is_remote, redact_url
from shard_tools.remote.index_cache import folder_name

CHECKPOINTS, WHOLE, OURS = "checkpoints", "whole.json", ".uploaded.json"
KINDS = ("step", "best")
ATTEMPTS = 5  # a few seconds; a training goes on meanwhile


def local_folder(place: str | Path) -> Path:
    """Where a run folder is on this machine: the path itself, or what stands for a URL (which is not asked)."""
    if not is_remote(place):
        return Path(place)
    url = str(place).rstrip("/")
    return user_cache_path("covergen") / "runs" / folder_name(url.rpartition("/")[0]) / url.rpartition("/")[2]


def fetched_run(place: str | Path) -> Path:
    """The folder of a run that is read: a path as it is, of a URL a copy with its newest and best checkpoint.

    Raises:
        ValueError: there is no run, or credentials in the URL.
        OSError: it is out of reach.
    """
    if not is_remote(place):
        return Path(place)
    mirror = connect(str(place))
    if not (mirror.folder / "config.yaml").is_file():
        raise ValueError(f"{redact_url(place)} is not a run folder: it has no config.yaml (runs are in OUT/<name>)")
    return mirror.folder


def connect(url: str, keep: int = 3) -> RunSync:
    """The mirror of a run folder, with what this machine lacks fetched; see ``RunSync``."""
    mirror = RunSync(url, keep)
    mirror.fetch()
    return mirror


def open_sync(out: str, name: str, keep: int, main: bool) -> RunSync | None:
    """What the main process of a training keeps in step with a URL; None for other processes, and for paths.

    All call it, the main process first: what it alone has is uploaded before the others fetch.
    """
    if not is_remote(out):
        return None
    mirror = connect(f"{out.rstrip('/')}/{name}", keep)
    if main:
        mirror.push()
        mirror.wait()
    return mirror if main else None


class RunSync:
    """A run folder here and elsewhere.

    Attributes:
        folder: here.
    """

    def __init__(self, url: str, keep: int = 3) -> None:
        """Args:
            url: of the run folder.
            keep: newest checkpoints that stay elsewhere.
        """
        check_url("out", url)
        self.remote, self.keep = Remote(url, attempts=ATTEMPTS), keep
        self.folder = local_folder(url)
        self._wanted, self._over, self._idle = threading.Event(), False, threading.Event()
        self._thread: threading.Thread | None = None
        self._idle.set()

    def fetch(self) -> None:
        """Brings what this machine lacks: the newest whole checkpoint if it is newer, the best, and all small files.

        A damaged one is passed over with a warning.
        """
        names = list(self.remote.sizes())
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock(self.folder / ".fetch"):
            fresh, places = False, {name.removeprefix(f"{CHECKPOINTS}/").removesuffix(f"/{WHOLE}") for name in names}
            if gone := self._notes().keys() - places:  # elsewhere all may have been removed
                kept = {name: note for name, note in self._notes().items() if name not in gone}
                write_atomically(self.folder / OURS, json.dumps(kept).encode())
            for kind in KINDS:
                here = [path.name for path in self._checkpoints(kind)]
                there = sorted({name.split("/")[1] for name in names
                                if name.startswith(f"{CHECKPOINTS}/{kind}_") and name.endswith(f"/{WHOLE}")})
                for name in reversed([name for name in there if not here or name > here[-1]]):
                    try:
                        self._fetch_checkpoint(name)
                    except (ValueError, OSError, KeyError) as error:
                        warnings.warn(f"{redact_url(self.remote.url_of(name))} is passed over: {error}", stacklevel=2)
                        continue
                    fresh = True
                    break
            if fresh or not (self.folder / "config.yaml").is_file():
                for name in names:
                    if not name.startswith(f"{CHECKPOINTS}/") and _plain(name):
                        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                        write_atomically(self.folder / name, self.remote.read(name))

    def _checkpoints(self, kind: str) -> list[Path]:
        return sorted((self.folder / CHECKPOINTS).glob(f"{kind}_????????"))

    def _fetch_checkpoint(self, name: str) -> None:
        top = self.folder / CHECKPOINTS
        temporary = top / f".fetched_{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            files = json.loads(self.remote.read(f"{CHECKPOINTS}/{name}/{WHOLE}"))
            for file, (size, sha256) in files.items():
                if not _plain(file) or "/" in file:
                    raise ValueError(f"{file!r} is no name of a file")
                with open(temporary / file, "wb") as out:
                    self.remote.fetch(f"{CHECKPOINTS}/{name}/{file}", size, sha256, out)
            os.replace(temporary, top / name)
            self._note({name: "whole"})
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def push(self) -> None:
        """Has everything uploaded that is new; returns at once."""
        self._idle.clear()
        self._wanted.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Returns when all is uploaded, or could not be (which was said)."""
        self._idle.wait()

    def _work(self) -> None:
        while self._wanted.wait():
            self._wanted.clear()
            try:
                self._upload()
            except Exception as error:  # a training must not end because a network has
                warnings.warn(f"the run was not uploaded ({redact_url(error)}); tried again with the next checkpoint, it is "
                              f"in {self.folder}", stacklevel=2)
            if not self._wanted.is_set():
                self._idle.set()

    def _upload(self) -> None:
        known = self._notes()
        for kind in KINDS:
            for path in self._checkpoints(kind):
                if path.name not in known:
                    self._upload_checkpoint(path)
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and _plain(name) and not name.startswith((f"{CHECKPOINTS}/", "wandb/")):
                stamp = f"{path.stat().st_size} {path.stat().st_mtime_ns}"
                if known.get(name) != stamp:
                    self.remote.put(path, name)
                    self._note({name: stamp})
        self._prune()

    def _upload_checkpoint(self, path: Path) -> None:
        """Its files, then what says that they are all there; nothing if it is removed meanwhile."""
        top = f"{CHECKPOINTS}/{path.name}"
        with contextlib.suppress(FileNotFoundError):
            files = {file.name: [file.stat().st_size, file_sha256(file)] for file in sorted(path.iterdir())}
            for name in files:
                self.remote.put(path / name, f"{top}/{name}")
            self.remote.write(json.dumps(files).encode(), f"{top}/{WHOLE}")
            self._note({path.name: "whole"})

    def _prune(self) -> None:
        """Removes old checkpoints elsewhere, first what says that they are whole."""
        found: dict[str, list[str]] = {}
        for name in list(self.remote.sizes()):
            if name.startswith(f"{CHECKPOINTS}/"):
                found.setdefault(name.split("/")[1], []).append(name)
        whole = sorted(name for name, files in found.items() if f"{CHECKPOINTS}/{name}/{WHOLE}" in files)
        best = [path.name for path in self._checkpoints("best")]
        stay = {*[name for name in whole if name.startswith("step_")][-self.keep:],
                *(best or [name for name in whole if name.startswith("best_")][-1:])}
        for name in found.keys() - stay:
            for file in sorted(found[name], key=lambda file: not file.endswith(f"/{WHOLE}")):
                self.remote.remove(file)

    def _notes(self) -> dict[str, str]:
        with contextlib.suppress(OSError, ValueError):
            notes = json.loads(read_bounded(self.folder / OURS))
            return notes if isinstance(notes, dict) else {}
        return {}

    def _note(self, more: dict[str, str]) -> None:
        write_atomically(self.folder / OURS, json.dumps(self._notes() | more).encode())


def _plain(name: str) -> bool:
    """Whether a relative name stays where it belongs and is none of the hidden files."""
    return not any(part in ("", "..") or part.startswith(".") for part in name.split("/"))
