"""Files that lie elsewhere: URLs and names in; bytes, checked files and errors that people can mend out.

The one room that knows fsspec. Credentials come from the usual environment and files only (AWS_*, GOOGLE_*, HF_TOKEN,
.netrc); a URL that holds some is refused, and whatever is said of a URL is said without.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}
HTTP = ("http", "https")
RENAMED = ("file", "local", "sftp", "ssh", "smb", "ftp", "webhdfs")  # where a file can be seen while it is written
ATTEMPTS, BACKOFF, LONGEST = 10, 0.2, 20.0  # tries; seconds before the second, doubled each time; at most so many
DAMAGED = 3  # downloads with a wrong hash before it is believed
CONNECT, SILENT = 20.0, 60.0  # seconds until a connection, and without a byte
AT_ONCE = 2**24  # bytes of a file that are asked for together
_FINAL = {400, 401, 403, 404, 405, 410, 501}  # answers that will not change
_URL = re.compile(r"([A-Za-z][\w+.-]*)://([^\s'\"<>]*)")
Result = TypeVar("Result")


def is_remote(place: str | Path | None) -> bool:
    """Whether this is a URL, not a path."""
    return bool(re.match(r"[A-Za-z][\w+.-]*://", str(place or "")))


def redact_url(text: Any) -> str:
    """Any text with its URLs as they may be shown: no user, password, query or fragment."""
    def bare(match: re.Match) -> str:
        host, slash, path = re.split(r"[?#]", match[2], maxsplit=1)[0].partition("/")
        return f"{match[1]}://{host.rpartition('@')[2]}{slash}{path}"
    return _URL.sub(bare, str(text))


def check_url(option: str, url: str) -> None:
    """Raises ValueError for a URL with credentials in it: it would be kept in configurations and logs."""
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"--{option} {redact_url(url)}: what was given has a user, a password or a query, which would end "
                         "up in configurations and logs; give credentials by the environment (AWS_*, HF_TOKEN) or "
                         "files (~/.aws, ~/.netrc), and the URL without")


class CutError(OSError):
    """Fewer or more bytes than were promised."""


class DamagedError(ValueError):
    """Other bytes than were promised, time and again."""


class _Sink:
    """Where a download goes: a file, its hash, and how far it is; never longer than expected."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.restart()

    def restart(self) -> None:
        self.file.seek(0)
        self.have, self.hash = 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        if self.have + len(data) > self.size:
            raise CutError(f"longer than the {self.size:,} bytes it should have")
        self.file.write(data)
        self.hash.update(data)
        self.have += len(data)
        return len(data)

    read = close = seek = tell = None  # what fsspec knows a file by


class Remote:
    """A folder elsewhere.

    Args:
        url: of the folder, without credentials; any that fsspec knows.
    """

    def __init__(self, url: str, attempts: int = ATTEMPTS) -> None:
        check_url("shards", url)
        self.url, self.attempts = url.rstrip("/"), attempts
        self.protocol, self._files = url.partition("://")[0].lower(), None

    @property
    def files(self) -> Any:
        """The file system, made once."""
        with _MAKING:
            if self._files is None:
                self._files = self._file_system()
            return self._files

    def _file_system(self) -> Any:
        """ValueError that names the extra when its library is not installed."""
        extra = "http" if self.protocol in HTTP else EXTRAS.get(self.protocol)
        need = f"pip install -e .[{extra}]" if extra else "the package of fsspec for it"
        try:
            import fsspec
            options: dict[str, Any] = {}
            if self.protocol in HTTP:
                import aiohttp
                timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENT)
                options = {"client_kwargs": {"timeout": timeout, "trust_env": True}, "headers": dict(_PLAIN)}
            elif EXTRAS.get(self.protocol) == "s3":
                options = {"use_listings_cache": False, "config_kwargs": {
                    "connect_timeout": CONNECT, "read_timeout": SILENT, "retries": {"max_attempts": 1}}}
            elif self.protocol in ("file", "local"):
                options = {"auto_mkdir": True}
            return fsspec.filesystem(self.protocol, skip_instance_cache=True, **options)
        except ImportError as error:
            raise ValueError(f"{self.protocol}:// needs {need} ({error})") from None
        except ValueError as error:
            raise ValueError(f"{redact_url(self.url)}: {redact_url(error)}; give a path, s3://, gs://, https:// or hf://"
                             ) from None

    def at(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        """A small file as a whole; FileNotFoundError where there is none."""
        plain = {"max_concurrency": 1} if EXTRAS.get(self.protocol) == "s3" else {}  # else s3fs asks for the size first
        return self._retry(name, lambda: self.files.cat_file(self.at(name), **plain))

    def fetch(self, name: str, size: int, sha256: str, file: BinaryIO) -> None:
        """Writes a file of known size and hash to an open one, going on where an attempt broke off.

        Raises:
            ValueError: its hash is another, whatever one tries.
            OSError: it can't be had.
        """
        sink, damaged = _Sink(file, size), 0

        def attempt() -> None:
            nonlocal damaged
            if self.protocol in HTTP:
                self._stream(name, sink)
            else:
                self._pieces(name, sink)
            if sink.hash.hexdigest() != sha256:
                sink.restart()
                damaged += 1
                if damaged == DAMAGED:
                    raise DamagedError(f"{redact_url(self.at(name))}: its SHA-256 is not that of the index, {DAMAGED} "
                                       "times; it is damaged, or was packed again since (start again)")
                raise CutError("another SHA-256")

        self._retry(name, attempt)
        file.flush()

    def _pieces(self, name: str, sink: _Sink) -> None:
        while sink.have < sink.size:
            stop = min(sink.have + AT_ONCE, sink.size)
            data = self.files.cat_file(self.at(name), start=sink.have, end=stop)
            if len(data) != stop - sink.have:
                raise CutError(f"{len(data):,} bytes of the {stop - sink.have:,} asked for")
            sink.write(data)

    def _stream(self, name: str, sink: _Sink) -> None:
        """One request for all that is left; a server without ranges sends everything, which begins again."""
        from fsspec.callbacks import Callback

        class Told(Callback):
            def set_size(self, size: int | None) -> None:
                if sink.have and size != sink.size - sink.have:
                    sink.restart()

        headers = dict(_PLAIN) | ({"Range": f"bytes={sink.have}-"} if sink.have else {})
        if sink.have < sink.size:
            self.files.get_file(self.at(name), sink, callback=Told(), headers=headers)
        if sink.have != sink.size:
            raise CutError(f"{sink.have:,} bytes of {sink.size:,}")

    def size(self, name: str) -> int | None:
        """The size of a file in bytes, None where there is none."""
        def ask() -> int | None:
            self.files.invalidate_cache()
            return self.files.info(self.at(name))["size"]
        try:
            return self._retry(name, ask)
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> list[str]:
        """The names below a folder of this one (whole paths from here), none where there is no such folder."""
        def ask() -> list[str]:
            self.files.invalidate_cache()
            top = self.files._strip_protocol(self.url).rstrip("/") + "/"
            return sorted(path.partition(top)[2] for path in self.files.find(self.at(folder) if folder else self.url))
        try:
            return self._retry(folder, ask)
        except FileNotFoundError:
            return []

    def put(self, path: Path, name: str) -> None:
        """Uploads a file: it is there whole, or not at all."""
        def attempt() -> None:
            if self.protocol not in RENAMED:  # an object appears when all of it is there
                self.files.put_file(str(path), self.at(name))
                return
            folder, _, last = self.at(name).rpartition("/")
            self.files.makedirs(folder, exist_ok=True)
            self.files.put_file(str(path), f"{folder}/.{last}.tmp")
            self.files.mv(f"{folder}/.{last}.tmp", self.at(name))
        self._retry(name, attempt, "written")

    def write(self, data: bytes, name: str) -> None:
        """Uploads a small file."""
        self._retry(name, lambda: self.files.pipe_file(self.at(name), data), "written")

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        def attempt() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.files.rm_file(self.at(name))
        self._retry(name, attempt, "removed")

    def _retry(self, name: str, call: Callable[[], Result], done: str = "read") -> Result:
        """A call until it succeeds, with growing pauses of chance length; errors name the URL and nothing secret."""
        where, files = redact_url(self.at(name) if name else self.url), self.files
        assert files
        for attempt in range(1, self.attempts + 1):
            try:
                return call()
            except DamagedError:
                raise
            except Exception as failure:  # every library behind fsspec has errors of its own
                error = failure
                if isinstance(error, FileNotFoundError):
                    error = error.__cause__ if self.protocol in HTTP and error.__cause__ else error
                    # fsspec says that of a web server's file too when it could not ask for it
                    if isinstance(error, FileNotFoundError) or getattr(error, "status", None) in (404, 410):
                        raise FileNotFoundError(f"{where}: no such file (404)") from None
                status = getattr(error, "status", None)
                if isinstance(error, PermissionError) or status in (401, 403) or "Credential" in type(error).__name__:
                    raise PermissionError(f"{where}: access denied ({_said(error)}); credentials come from the "
                                          "environment (AWS_*, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN) or files "
                                          "(~/.aws, ~/.netrc)") from None
                if getattr(error, "errno", None) == 28:  # our own disk is full
                    raise OSError(f"no space left for {where}; give a smaller --shard_cache_gb, or another --shard_cache_dir"
                                  ) from None
                if attempt == self.attempts or status in _FINAL:
                    raise OSError(f"{where} can't be {done} (attempt {attempt}): {_said(error)}") from None
            time.sleep(min(LONGEST, BACKOFF * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable")


_MAKING = threading.Lock()
_PLAIN = {"Accept-Encoding": "identity"}  # sizes are those of the files


def _said(error: BaseException) -> str:
    status = getattr(error, "status", None)
    return redact_url(f"HTTP {status}" if status else f"{type(error).__name__}: {error}".rstrip(": "))[:300]
