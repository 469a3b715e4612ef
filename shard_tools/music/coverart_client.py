"""Pictures from a server that must not be burdened: addresses in; checked bytes out, at no more than a given rate.

No host gets more than ``rate`` requests a second, the follow-ups of redirects and repeated ones among them: the next
one starts only when the last is being answered and the time between two has passed since, so that not even a slow
network can push two together, and none is sent between a host's "slow down" and our hearing it. Bodies load meanwhile.
"""

from __future__ import annotations

import contextlib
import email.utils
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta

import httpx
import tenacity

from shard_tools.core.errors import BadFileError
from shard_tools.dataset.images import COVER_BYTES, probe_cover

KINDS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG\r\n\x1a\n": ".png"}
REDIRECTS = 5
LONGEST_BACKOFF, LONGEST_WAIT = 60.0, 3600.0  # seconds: between our own attempts; that a server may ask us to wait
SHORT = 2**16  # bytes of a page that is read only to be done with it
TIMEOUT = 60.0  # seconds without a byte
_SLOW_DOWN, _TRANSIENT = (429, 503), (408, 425, 500, 502, 504)


class _TroubleError(Exception):
    """What may be better next time; ``args`` are a reason and a detail as of ``BadFileError``."""


class _NobodyError(_TroubleError):
    """Nobody answers at the base URL itself."""


class UnreachableError(ValueError):
    """The server itself can't be reached, or has asked to be left alone for long: nothing to do but to stop."""


class _Host:
    """One host's turn: only one request at a time may wait for the beginning of its answer."""

    def __init__(self):
        self.lock, self.next = threading.Lock(), 0.0  # when, of time.monotonic, the next request may start


class Client:
    """Asks for pictures, from several threads if need be.

    Args:
        base_url: of the server; when it is dead after all attempts, that is no fault of a single picture.
        agent: the User-Agent, which names a person to write to.
        rate: requests a second to any one host.
        attempts: for each picture.
        backoff: seconds before the second attempt, doubled for each further one, with up to half as much by chance.
    """

    def __init__(self, base_url: str, agent: str, rate: float, attempts: int, backoff: float):
        self.base = httpx.URL(base_url)
        self.interval, self.attempts, self.backoff = 1 / rate, attempts, backoff
        self.http = httpx.Client(headers={"User-Agent": agent, "Accept": "image/jpeg, image/png, image/*;q=0.5",
                                          "Accept-Encoding": "identity"}, timeout=TIMEOUT, follow_redirects=False)
        self.stopped = threading.Event()
        self._hosts: dict[str, _Host] = {}
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Ends all waiting: calls of ``picture`` under way raise ``InterruptedError`` before their next request."""
        self.stopped.set()

    def close(self) -> None:
        self.http.close()

    def picture(self, path: str) -> tuple[bytes, str]:
        """The bytes of a picture and its suffix, ``.jpg`` or ``.png``; whole, of pixels that can be decoded.

        Args:
            path: below the base URL.

        Raises:
            BadFileError: ``not found``, ``refused``, ``not JPEG or PNG``, ``too many bytes``, ``too many pixels``, for
                good; ``given up`` after the last attempt.
            UnreachableError: see there.
            InterruptedError: stopped.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_TroubleError), stop=tenacity.stop_after_attempt(self.attempts),
            wait=self._backoff, sleep=self.stopped.wait, reraise=True)
        try:
            return retrying(self._attempt, httpx.URL(f"{str(self.base).rstrip('/')}/{path}"))
        except _NobodyError as trouble:
            raise UnreachableError(f"{trouble.args[1]}, after {self.attempts} attempts; is the address right, and are "
                                   "you online? The same command goes on from here") from None
        except _TroubleError as trouble:
            raise BadFileError("given up", "{}: {}".format(*trouble.args)) from None

    def _backoff(self, state: tenacity.RetryCallState) -> float:
        wait = tenacity.wait_exponential(self.backoff, LONGEST_BACKOFF) + tenacity.wait_random(0, self.backoff / 2)
        return wait(state)

    def _attempt(self, url: httpx.URL) -> tuple[bytes, str]:
        for _ in range(REDIRECTS + 1):
            with self._asked(url) as response:
                if response.status_code != 200 and int(response.headers.get("Content-Length", SHORT)) < SHORT:
                    response.read()  # so that the connection can be used again
                if not response.has_redirect_location:
                    return self._picture_of(response)
                url = url.join(response.headers["Location"])
        raise _TroubleError("too many redirects", f"more than {REDIRECTS}, the last to {url}")

    @contextlib.contextmanager
    def _asked(self, url: httpx.URL) -> Iterator[httpx.Response]:
        """The answer to one request, its body not yet read; network errors while it is in use become trouble."""
        try:
            with self._turn(url.host) as host:
                response = self.http.send(self.http.build_request("GET", url), stream=True)
                self._slow_down(response, host)
            with contextlib.closing(response):
                yield response
        except (httpx.TransportError, httpx.InvalidURL) as error:
            alone = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)) and url.host == self.base.host
            trouble = _NobodyError if alone else _TroubleError
            raise trouble("no whole answer", f"{url.host}: {str(error) or type(error).__name__}") from None

    @contextlib.contextmanager
    def _turn(self, name: str) -> Iterator[_Host]:
        with self._lock:
            host = self._hosts.setdefault(name, _Host())
        with host.lock:
            if self.stopped.wait(max(0.0, host.next - time.monotonic())):
                raise InterruptedError
            try:
                yield host
            finally:
                host.next = max(host.next, time.monotonic() + self.interval)

    def _slow_down(self, response: httpx.Response, host: _Host) -> None:
        """Keeps everybody from a host that has asked for it, as long as it has asked for."""
        if response.status_code not in _SLOW_DOWN:
            return
        seconds = retry_after(response)
        if seconds > LONGEST_WAIT:
            response.close()
            raise UnreachableError(f"{response.url.host} asks to be left alone for {seconds / 3600:.1f} hours (status "
                                   f"{response.status_code}); run the same command again then, it goes on from here")
        host.next = time.monotonic() + seconds

    def _picture_of(self, response: httpx.Response) -> tuple[bytes, str]:
        status, said = response.status_code, f"status {response.status_code} of {response.url.host}"
        if status == 404:
            raise BadFileError("not found", said)
        if status in (*_SLOW_DOWN, *_TRANSIENT) or status >= 500:
            raise _TroubleError("server trouble", said)
        if status != 200:
            raise BadFileError("refused", said)
        data = bytearray()
        for part in response.iter_raw():
            data += part
            if len(data) > COVER_BYTES:
                raise BadFileError("too many bytes", f"more than {COVER_BYTES:,}")
        return bytes(data), _kind(bytes(data), response.headers.get("Content-Type", ""))


def _kind(data: bytes, said: str) -> str:
    """The suffix of a picture that is whole."""
    suffix = next((suffix for start, suffix in KINDS.items() if data.startswith(start)), None)
    if suffix is None:
        detail = f"it starts with {data[:8]!r}, and is called {said[:40]!r}"
        if data and said.startswith(("image/", "application/")):
            raise BadFileError("not JPEG or PNG", detail)
        raise _TroubleError("no picture", detail)  # nothing, or a page that tells of trouble with status 200
    try:
        probe_cover(data)
    except BadFileError as error:
        if error.reason == "too many pixels":
            raise
        raise _TroubleError(error.reason, error.detail) from None
    return suffix


def retry_after(response: httpx.Response) -> float:
    """The seconds that a response asks to wait, given as such or as a date (by the server's own clock); 0: it doesn't.

    Source: RFC 9110, 10.2.3.
    """
    value = response.headers.get("Retry-After", "")
    if value.strip().isdecimal():
        return float(value)
    until = _date(value)
    if until is None:
        return 0.0
    now = _date(response.headers.get("Date", "")) or datetime.now(until.tzinfo)
    return max(0.0, (until - now) / timedelta(seconds=1))


def _date(text: str) -> datetime | None:
    try:
        return email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
