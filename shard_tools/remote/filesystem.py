"""Files behind URLs: checked downloads, whole uploads, and errors that people can mend. Only this file knows fsspec.

Credentials come from the usual environment and files only (AWS_*, GOOGLE_*, HF_TOKEN, .netrc); a URL that holds some is
refused, and errors of the libraries are shown without any.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}
NOT_ATOMIC = ("file", "local", "sftp", "ssh", "smb", "ftp", "webhdfs")  # where a file is visible while it is written
ATTEMPTS, BACKOFF, MAX_PAUSE = 10, 0.2, 20.0  # tries; seconds before the second, doubled each time; at most so many
HASH_ATTEMPTS = 3  # downloads with a wrong hash before it is believed
CONNECT_TIMEOUT, READ_TIMEOUT = 20.0, 60.0  # seconds until a connection, and without a byte
PIECE_BYTES = 2**24  # of a file that are asked for together
FINAL_STATUS = {400, 401, 403, 404, 405, 410, 501}  # answers that will not change
_PLAIN = {"Accept-Encoding": "identity"}  # sizes are those of the files
_URL = re.compile(r"([A-Za-z][\w+.-]*)://([^\s'\"<>]*)")
_CREATION = threading.Lock()
Result = TypeVar("Result")


def is_remote(path: str | Path | None) -> bool:
    return bool(re.match(r"[A-Za-z][\w+.-]*://", str(path or "")))


def redact_url(text: Any) -> str:
    """Any text with its URLs as they may be shown: no user, password, query or fragment."""
    def bare(match: re.Match) -> str:
        host, slash, path = re.split(r"[?#]", match[2], maxsplit=1)[0].partition("/")
        return f"{match[1]}://{host.rpartition('@')[2]}{slash}{path}"
    return _URL.sub(bare, str(text))


def check_url(option: str, url: str) -> None:
    """Raises ValueError for a URL with credentials in it: it would end up in configurations and logs."""
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"--{option} {redact_url(url)}: what was given has a user, a password or a query, which would "
                         "end up in configurations and logs; give credentials by the environment (AWS_*, HF_TOKEN) or "
                         "files (~/.aws, ~/.netrc), and the URL without")


class TransferError(OSError):
    """Other bytes than were promised, this time."""


class ChecksumError(ValueError):
    """Other bytes than were promised, time and again."""


class Remote:
    """A folder behind a URL, any that fsspec knows; each request is tried so many times."""

    def __init__(self, url: str, attempts: int = ATTEMPTS, option: str = "shards") -> None:
        check_url(option, url)
        self.url, self.attempts = url.rstrip("/"), attempts
        self.protocol, self._files = url.partition("://")[0].lower(), None
        self.extra = EXTRAS.get(self.protocol)

    @property
    def files(self) -> Any:
        """The file system, made once; ValueError that names the extra when its library is not installed."""
        with _CREATION:
            if self._files is None:
                self._files = self._file_system()
            return self._files

    def _file_system(self) -> Any:
        need = f"pip install -e .[{self.extra}]" if self.extra else "the package of fsspec for it"
        try:
            import fsspec
            options: dict[str, Any] = {}
            if self.extra == "http":
                import aiohttp
                timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
                options = {"client_kwargs": {"timeout": timeout, "trust_env": True}, "headers": dict(_PLAIN)}
            elif self.extra == "s3":
                options = {"use_listings_cache": False, "config_kwargs": {
                    "connect_timeout": CONNECT_TIMEOUT, "read_timeout": READ_TIMEOUT, "retries": {"max_attempts": 1}}}
            elif self.protocol in ("file", "local"):
                options = {"auto_mkdir": True}
            return fsspec.filesystem(self.protocol, skip_instance_cache=True, **options)
        except ImportError as error:
            raise ValueError(f"{self.protocol}:// needs {need} ({error})") from None
        except ValueError as error:
            raise ValueError(f"{self.url}: {redact_url(error)}; give a path, s3://, gs://, https:// or hf://") from None

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def read(self, name: str) -> bytes:
        """A small file as a whole; FileNotFoundError where there is none."""
        plain = {"max_concurrency": 1} if self.extra == "s3" else {}  # else s3fs asks for the size first
        return self._retry(name, lambda: self.files.cat_file(self.url_of(name), **plain))

    def fetch(self, name: str, size: int, sha256: str, file: BinaryIO) -> None:
        """Writes a file of known size and hash to an open one, going on where an attempt broke off.

        ValueError where its hash is another, whatever one tries; OSError where it can't be had.
        """
        digest, received, wrong = hashlib.sha256(), 0, 0

        def attempt() -> None:
            nonlocal digest, received, wrong
            while received < size:
                stop = min(received + PIECE_BYTES, size)
                data = self.files.cat_file(self.url_of(name), start=received, end=stop)
                if len(data) == size:  # some web servers always send all of it
                    data = data[received:]
                elif len(data) != stop - received:
                    raise TransferError(f"{len(data):,} bytes of the {stop - received:,} asked for")
                file.seek(received)
                file.write(data)
                digest.update(data)
                received += len(data)
            if digest.hexdigest() != sha256:
                digest, received, wrong = hashlib.sha256(), 0, wrong + 1
                if wrong == HASH_ATTEMPTS:
                    raise ChecksumError(f"{self.url_of(name)}: its SHA-256 is not that of the index, {HASH_ATTEMPTS} "
                                        "times; it is damaged, or was packed again since (start again)")
                raise TransferError("another SHA-256")

        self._retry(name, attempt)
        file.flush()

    def size(self, name: str) -> int | None:
        """The size of a file in bytes, None where there is none."""
        def ask() -> int:
            self.files.invalidate_cache()
            return self.files.info(self.url_of(name))["size"]
        with contextlib.suppress(FileNotFoundError):
            return self._retry(name, ask)
        return None

    def sizes(self) -> dict[str, int]:
        """The bytes of the files in and below this folder, by their paths from here; none where there is no folder."""
        def ask() -> dict[str, int]:
            self.files.invalidate_cache()
            top = self.files._strip_protocol(self.url).rstrip("/") + "/"
            found = self.files.find(self.url, detail=True)
            return {path.partition(top)[2]: found[path]["size"] for path in sorted(found)}
        with contextlib.suppress(FileNotFoundError):
            return self._retry("", ask)
        return {}

    def put(self, path: Path, name: str) -> None:
        """Uploads a file: it is there whole, or not at all."""
        def attempt() -> None:
            if self.protocol not in NOT_ATOMIC:  # an object appears when all of it is there
                self.files.put_file(str(path), self.url_of(name))
                return
            folder, _, last = self.url_of(name).rpartition("/")
            self.files.makedirs(folder, exist_ok=True)
            self.files.put_file(str(path), f"{folder}/.{last}.tmp")
            self.files.mv(f"{folder}/.{last}.tmp", self.url_of(name))
        self._retry(name, attempt, "written")

    def write(self, data: bytes, name: str) -> None:
        self._retry(name, lambda: self.files.pipe_file(self.url_of(name), data), "written")

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._retry(name, lambda: self.files.rm_file(self.url_of(name)), "removed")

    def _retry(self, name: str, call: Callable[[], Result], done: str = "read") -> Result:
        """Calls until it succeeds, with growing pauses of random length; errors name the URL and nothing secret."""
        assert self.files  # what is not installed is not tried again
        for attempt in range(1, self.attempts + 1):
            try:
                return call()
            except Exception as error:  # every library behind fsspec has errors of its own
                if final := self._final_error(error, self.url_of(name), f"{done} (attempt {attempt})", attempt):
                    raise final from None
            time.sleep(min(MAX_PAUSE, BACKOFF * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5))
        raise AssertionError("the last attempt returns or raises")

    def _final_error(self, error: BaseException, url: str, done: str, attempt: int) -> BaseException | None:
        """What is raised for a failure; None where it may go away."""
        if isinstance(error, ChecksumError):
            return error
        if isinstance(error, FileNotFoundError):
            if self.extra == "http" and error.__cause__:
                error = error.__cause__  # fsspec says that of a web server's file too when it could not ask for it
            if isinstance(error, FileNotFoundError) or getattr(error, "status", None) in (404, 410):
                return FileNotFoundError(f"{url}: no such file (404)")
        status = getattr(error, "status", None)
        shown = redact_url(f"HTTP {status}" if status else f"{type(error).__name__}: {error}".rstrip(": "))[:300]
        if isinstance(error, PermissionError) or status in (401, 403) or "Credential" in type(error).__name__:
            return PermissionError(f"{url}: access denied ({shown}); credentials come from the environment (AWS_*, "
                                   "GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN) or files (~/.aws, ~/.netrc)")
        if getattr(error, "errno", None) == errno.ENOSPC:  # our own disk is full
            return OSError(f"no space left for {url}; give a smaller --shard_cache_gb, or another --shard_cache_dir")
        if attempt == self.attempts or status in FINAL_STATUS:
            return OSError(f"{url} can't be {done}: {shown}")
        return None
