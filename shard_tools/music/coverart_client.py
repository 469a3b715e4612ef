"""Pictures from a server that must not be burdened: checked bytes, at no more than a given rate.

No host gets more than ``rate`` requests a second, the follow-ups of redirects and repeated ones among them: the next
one starts only when the last is being answered and the time between two has passed since, so that not even a slow
network can push two together, and none is sent between a host's "slow down" and its arrival here. Bodies load
meanwhile.
"""

from __future__ import annotations

import contextlib
import email.utils
import threading
import time
from collections.abc import Iterator

import httpx
import tenacity

from shard_tools.core.errors import BadFileError
from shard_tools.dataset.images import COVER_BYTES, probe_cover

SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG\r\n\x1a\n": ".png"}
REDIRECTS = 5
MAX_BACKOFF, MAX_WAIT = 60.0, 3600.0  # seconds: between our own attempts; that a server may ask us to wait
SHORT = 2**16  # bytes of a page that is read only so that the connection can be used again
TIMEOUT = 60.0  # seconds without a byte
_SLOW_DOWN, _TRANSIENT = (429, 503), (408, 425)


class _TransientError(Exception):
    """What may be better next time; ``args`` are a reason and a detail as of ``BadFileError``."""


class _NoServerError(_TransientError):
    """Nobody answers at the base URL itself."""


class UnreachableError(ValueError):
    """The server itself can't be reached, or has asked to be left alone for long: nothing to do but to stop."""


class _Limiter:
    """The pace of one host: only one request at a time may wait for the beginning of its answer."""

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

    Attributes:
        stopped: once it is set, ``picture`` raises ``InterruptedError`` before its next request.
    """

    def __init__(self, base_url: str, agent: str, rate: float, attempts: int, backoff: float):
        self.base, self.interval = httpx.URL(base_url), 1 / rate
        self.attempts, self.backoff = attempts, backoff
        self.http = httpx.Client(headers={"User-Agent": agent, "Accept": "image/jpeg, image/png, image/*;q=0.5",
                                          "Accept-Encoding": "identity"}, timeout=TIMEOUT)
        self.stopped = threading.Event()
        self._limiters: dict[str, _Limiter] = {}
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_TransientError), stop=tenacity.stop_after_attempt(attempts),
            wait=self._backoff, sleep=self.stopped.wait, reraise=True)

    def picture(self, path: str) -> tuple[bytes, str]:
        """The bytes of the picture at ``path`` below the base URL, and its suffix, ``.jpg`` or ``.png``.

        Raises:
            BadFileError: ``not found``, ``refused``, ``not JPEG or PNG``, ``too many bytes``, ``too many pixels``, for
                good; ``given up`` after the last attempt.
        """
        try:
            return self._retrying.copy()(self._attempt, httpx.URL(f"{str(self.base).rstrip('/')}/{path}"))
        except _NoServerError as error:
            raise UnreachableError(f"{error.args[1]}, after {self.attempts} attempts; is the address right, and are "
                                   "you online? The same command goes on from here") from None
        except _TransientError as error:
            raise BadFileError("given up", "{}: {}".format(*error.args)) from None

    def _backoff(self, state: tenacity.RetryCallState) -> float:
        return (tenacity.wait_exponential(self.backoff, MAX_BACKOFF) + tenacity.wait_random(0, self.backoff / 2))(state)

    def _attempt(self, url: httpx.URL) -> tuple[bytes, str]:
        for _ in range(REDIRECTS + 1):
            with self._get(url) as response:
                if response.status_code != 200 and int(response.headers.get("Content-Length", SHORT)) < SHORT:
                    response.read()
                if not response.has_redirect_location:
                    return _picture_of(response)
                url = url.join(response.headers["Location"])
        raise _TransientError("too many redirects", f"more than {REDIRECTS}, the last to {url}")

    @contextlib.contextmanager
    def _get(self, url: httpx.URL) -> Iterator[httpx.Response]:
        """The answer to one request, its body not yet read; network errors while it is in use are transient."""
        limiter = self._limiters.setdefault(url.host, _Limiter())
        try:
            with limiter.lock:
                if self.stopped.wait(max(0.0, limiter.next - time.monotonic())):
                    raise InterruptedError
                try:
                    response = self.http.send(self.http.build_request("GET", url), stream=True)
                finally:
                    limiter.next = time.monotonic() + self.interval
                wait = retry_after(response) if response.status_code in _SLOW_DOWN else 0.0
                limiter.next += wait
            with contextlib.closing(response):
                if wait > MAX_WAIT:
                    raise UnreachableError(f"{url.host} asks to be left alone for {wait / 3600:.1f} hours (status "
                                           f"{response.status_code}); run the same command again then, it goes on from "
                                           "here")
                yield response
        except (httpx.TransportError, httpx.InvalidURL) as error:
            is_dead = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)) and url.host == self.base.host
            raise (_NoServerError if is_dead else _TransientError)(
                "no whole answer", f"{url.host}: {str(error) or type(error).__name__}") from None


def _picture_of(response: httpx.Response) -> tuple[bytes, str]:
    status, detail = response.status_code, f"status {response.status_code} of {response.url.host}"
    if status in (*_SLOW_DOWN, *_TRANSIENT) or status >= 500:
        raise _TransientError("server trouble", detail)
    if status != 200:
        raise BadFileError("not found" if status == 404 else "refused", detail)
    data = bytearray()
    for part in response.iter_raw():
        data += part
        if len(data) > COVER_BYTES:
            raise BadFileError("too many bytes", f"more than {COVER_BYTES:,}")
    suffix = next((suffix for start, suffix in SUFFIXES.items() if data.startswith(start)), None)
    if suffix is None:
        kind = response.headers.get("Content-Type", "")
        detail = f"it starts with {bytes(data[:8])!r}, and is called {kind[:40]!r}"
        if data and kind.startswith(("image/", "application/")):
            raise BadFileError("not JPEG or PNG", detail)
        raise _TransientError("no picture", detail)  # nothing, or a page that tells of trouble with status 200
    try:
        probe_cover(bytes(data))
    except BadFileError as error:
        if error.reason == "too many pixels":
            raise
        raise _TransientError(error.reason, error.detail) from None
    return bytes(data), suffix


def retry_after(response: httpx.Response) -> float:
    """The seconds that a response asks to wait, given as such or as a date (by the server's own clock); 0: it doesn't.

    Source: RFC 9110, 10.2.3.
    """
    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    now = response.headers.get("Date", email.utils.formatdate(usegmt=True))
    try:
        wait = email.utils.parsedate_to_datetime(value) - email.utils.parsedate_to_datetime(now)
    except (ValueError, TypeError):  # no date, or one without a zone
        return 0.0
    return max(0.0, wait.total_seconds())
