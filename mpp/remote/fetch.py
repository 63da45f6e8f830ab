"""Fetching remote objects whole, however often a server fails on the way."""

import http
import logging
import os
import random
import re
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Event
from typing import IO, TypeVar

from mpp.errors import bare_address, cause, without_secrets
from mpp.remote.streams import Pieces, WrongSize, open_stream
from mpp.remote.urls import RemoteError, check_url, shown_url

T = TypeVar("T")
logger = logging.getLogger("mpp.data")
PROGRESS = 2**16  # bytes; an attempt that got so far on is not counted as one of a row of failures
TRY_AGAIN = (408, 416, 425, 429)  # of the statuses 4xx; all others of them are final
BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError, ArithmeticError)
HERE = Path(__file__).parent
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ImportError, ValueError)


@dataclass(frozen=True)
class Retry:
    """How patient fetching is."""

    attempts: int = 8  # in a row that bring nothing: a minute of waiting
    wait: float = 0.5  # seconds before the second attempt, then twice as long each time
    longest: float = 30.0  # seconds, of any such wait
    timeout: float = 60.0  # seconds without a byte until an attempt has failed
    asked: float = 120.0  # seconds, of a wait that the server asks for by Retry-After


RETRY = Retry()


def fetch(
    url: str,
    file: IO[bytes],
    size: int | None,
    retry: Retry = RETRY,
    *,
    allow: Collection[str] = (),
    most: int = 2**63,
    stop: Event | None = None,
) -> int:
    """Writes a remote object into an open file and returns its length, which must be `size` if that is given.

    An attempt goes on where the last one ended, wherever the server can. stop: gives up soon after it is set.
    Raises RemoteError; an OSError is the local file's.
    """
    end = 0
    with closing(_pieces(url, size, most if size is None else size, retry, allow, stop)) as pieces:
        for place, piece in pieces:
            end, left = place + len(piece), memoryview(piece)
            while left:
                left = left[os.pwrite(file.fileno(), left, end - len(left)) :]
    os.ftruncate(file.fileno(), end)
    return end


def read_small(url: str, limit: int = 2**30, retry: Retry = RETRY, allow: Collection[str] = ()) -> bytes:
    """A whole object of at most `limit` bytes."""
    data = bytearray()
    for place, piece in _pieces(url, None, limit, retry, allow, None):
        data[place:] = piece
    return bytes(data)


def _pieces(url: str, size: int | None, most: int, retry: Retry, allow: Collection[str], stop: Event | None) -> Pieces:
    """Pieces and their places, in order but for new starts from a byte before; the last one ends the object."""
    check_url(url, allow)
    tries = _Tries(url, retry, stop or Event())
    stream = open_stream(url, size, most, retry.timeout, tries.stop)
    place = best = 0
    while True:
        try:
            with closing(stream.pieces(place, tries.failures)) as pieces:
                for at, piece in pieces:
                    if at + len(piece) > most:
                        raise stream.wrong_size()
                    yield at, piece
                    place = at + len(piece)
            if size is None or place == size:
                return
            raise ConnectionError("the connection was cut")
        except RemoteError:
            raise
        except Exception as error:  # whatever those libraries raise; our own writing happens outside, see `fetch`
            if _is_ours(error):
                raise
            if place - best >= PROGRESS:
                tries.failures = 0
            wrong = isinstance(error, WrongSize)
            tries.failed(error, f", after {place} of {size} bytes" if place and size and not wrong else "")
            best = max(best, place)
            if wrong or not stream.resumable:
                place = 0


def retried(url: str, action: Callable[[], T], retry: Retry) -> T:
    """What a short action on a URL gives, with the same patience as fetching it."""
    tries = _Tries(url, retry, Event())
    while True:
        try:
            return action()
        except RemoteError:
            raise
        except Exception as error:  # whatever those libraries raise
            if _is_ours(error):
                raise
            tries.failed(error)


class _Tries:
    """Counts attempts that failed in a row, and waits between them; tells of the first."""

    def __init__(self, url: str, retry: Retry, stop: Event) -> None:
        self.url, self.name, self.retry, self.stop = url, shown_url(url), retry, stop
        self.failures, self.told = 0, False

    def _lacks(self, error: Exception) -> str:
        """What an address without user, password and query may lack, where a server refuses it."""
        plain = self.url.startswith("http") and bare_address(self.url) == self.url
        if _status(error) not in (401, 403) or not plain:
            return ""
        return "; give its address with user and password, or what signs it: a saved recipe keeps neither (or ~/.netrc)"

    def failed(self, error: Exception, note: str = "") -> None:
        """Returns when it is time for another attempt, and raises RemoteError if there is to be none."""
        self.failures += 1
        words = f"{self.name}: {_why(error, self.retry.timeout)}{note}"
        if self.stop.is_set():
            raise RemoteError(f"{words}; given up, since reading has ended") from error
        if _is_final(error):
            raise RemoteError(words + self._lacks(error)) from error
        if self.failures >= self.retry.attempts:
            raise RemoteError(words + (f" (tried {self.failures} times)" if self.failures > 1 else "")) from error
        if not self.told:
            self.told = True
            logger.warning("%s; trying again", words)
        longest = min(self.retry.longest, self.retry.wait * 2 ** (self.failures - 1))
        # Many that failed together should not come back together. No generator of the user's is touched for it.
        share, asked = random.SystemRandom().uniform(0.5, 1), min(self.retry.asked, _retry_after(error))
        if self.stop.wait(max(longest * share, asked * (1.5 - share / 2))):
            raise RemoteError(f"{words}; given up, since reading has ended") from error


def _is_ours(error: Exception) -> bool:
    """Whether it is a mistake of this package's code, which no other attempt mends and whose traceback is wanted."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, BUGS) and bool(frames) and Path(frames[-1].filename).is_relative_to(HERE)


def _is_final(error: Exception) -> bool:
    """Whether another attempt would end in the same way."""
    if isinstance(error, WrongSize):
        return False
    if status := _status(error):
        return 400 <= status < 500 and status not in TRY_AGAIN
    # By name: these belong to packages that may not be installed. gcsfs says "Forbidden" in an OSError.
    words = f"{type(error).__name__} {error}"
    return isinstance(error, FINAL) or re.search("Credentials|Certificate|Forbidden", words) is not None


def _retry_after(error: BaseException) -> float:
    """Seconds until a server wants to be asked again, by its header of that name: a number, or a date; 0 for none."""
    for found in (error, error.__cause__):
        headers = getattr(found, "headers", None) or getattr(getattr(found, "response", None), "headers", None)
        value = str(headers.get("Retry-After", "")) if isinstance(headers, Mapping) else ""
        if re.fullmatch(r"\d{1,9}", value):
            return float(value)
        with suppress(ValueError, TypeError, OverflowError):
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _status(error: BaseException) -> int:
    """The HTTP status behind an exception of aiohttp, gcsfs, huggingface_hub or botocore (through s3fs); 0 for none."""
    for found in (error, error.__cause__):
        response = getattr(found, "response", None)
        if isinstance(response, dict):  # botocore's
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if status := getattr(response, "status_code", 0):
            return int(status)
    for name in ("status", "code"):  # of the error alone: aiohttp gives the causes of its own a code as well
        if str(number := getattr(error, name, "")).isdigit():
            return int(number)
    return 0


def _why(error: Exception, timeout: float) -> str:
    """The failure in one line, without the secrets of a URL."""
    status, words = _status(error), without_secrets(cause(error))
    if status == 404 or isinstance(error, FileNotFoundError):
        return "not there"
    if isinstance(error, PermissionError):
        return f"refused: {words}"
    if status:
        phrase = http.HTTPStatus(status).phrase if status in set(http.HTTPStatus) else ""
        return f"{'refused: ' if status in (401, 403) else ''}status {status} {phrase}".rstrip()
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return f"no byte for {timeout:g} seconds"
    if "payload is not completed" in words or "Server disconnected" in words:  # aiohttp's
        return "the connection was cut"
    return words
