"""The bytes of a remote object from some byte on, over HTTP, from an object store, or from a command."""

import asyncio
import functools
import logging
import os
import re
import selectors
import signal
import subprocess
import tempfile
from collections.abc import Coroutine, Generator
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from typing import IO, TYPE_CHECKING, Any, TypeVar

from mpp.remote.urls import PIPE, RemoteError, shown_url

if TYPE_CHECKING:
    import aiohttp
    from fsspec import AbstractFileSystem

T = TypeVar("T")
Pieces = Generator[tuple[int, bytes], None, None]  # the place of each in the object, and its bytes
PIECE = 2**20  # bytes handed on at a time
RANGE = 2**24  # bytes of one request to an object store
LEAST_RANGE = 2**18  # after failures
POLL = 0.2  # seconds after which a wait looks whether it should go on
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs", "abfs": "adlfs"}


class WrongSize(Exception):
    """The object has another length than expected; the message says both."""


@dataclass
class Stream:
    """An object that is read by `pieces`, once more after each failure.

    `resumable` says whether the next attempt may go on where the last one ended.
    """

    url: str
    size: int | None  # bytes that it should have, if that is known
    most: int  # bytes that are taken at all
    timeout: float  # seconds without a byte
    stop: Event
    resumable: bool = True

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs it in fsspec's thread, but no longer than until `stop` is set."""
        from fsspec.asyn import get_loop

        future = asyncio.run_coroutine_threadsafe(coroutine, get_loop())
        try:
            while not future.done():
                self.check_stop()
                wait([future], POLL)
            return future.result()
        finally:
            future.cancel()

    def wrong_size(self, found: int | None = None, kind: str = "") -> WrongSize:
        bytes_ = f"more than {self.most}" if found is None else str(found)
        page = " (a page of text)" if kind == "text/html" else ""
        expected = f"at most {self.most} are taken" if self.size is None else f"the index says {self.size}"
        return WrongSize(f"has {bytes_} bytes{page}, {expected}")

    def check_stop(self) -> None:
        if self.stop.is_set():
            raise RemoteError(f"{shown_url(self.url)}: given up, since reading has ended")


class Http(Stream):
    """One GET for all that is missing, so that a cut connection costs only the bytes under way."""

    tag = ""  # the server's name for this state of the object
    state = ("", "")  # that, if only a weak one, and when it was changed

    def pieces(self, start: int, failures: int) -> Pieces:
        files = file_system("http", self.timeout)
        response = self.run(self._get(files, start))
        try:
            place = self._place(response, start)
            while piece := self.run(_more(response)):
                yield place, piece
                place += len(piece)
        finally:
            files.loop.call_soon_threadsafe(response.close)

    async def _get(self, files: "AbstractFileSystem", start: int) -> "aiohttp.ClientResponse":
        from yarl import URL

        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if self.tag:
                headers["If-Range"] = self.tag  # all of it, if it has changed meanwhile
        session = await files.set_session()
        # What is quoted already stays as it is: signatures are over the exact text.
        return await session.get(URL(self.url, encoded="%" in self.url), headers=headers)

    def _place(self, response: "aiohttp.ClientResponse", start: int) -> int:
        """Where the answer's first byte belongs, after a look at its length."""
        if response.status == 416:
            self.resumable = False
        response.raise_for_status()
        place, total = 0, response.content_length
        if "Content-Encoding" in response.headers:
            total = None
        if response.status == 206:
            parts = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if not parts or int(parts[1]) > start:  # some know ranges from the start alone, which will do
                self.resumable = False
                raise OSError("the server answered with other bytes than were asked for")
            place, total = int(parts[1]), int(parts[2]) if parts[2] != "*" else None
        state = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
        changed = any(old and new and old != new for old, new in zip(self.state, state, strict=True))
        self.state = state
        if place and changed:
            self.resumable = False
            raise OSError("it has changed while it was fetched")
        # Without a length, a page that says "try again later" would pass for the first bytes of the object.
        self.resumable = total is not None
        if total is not None and (total != self.size if self.size is not None else total > self.most):
            raise self.wrong_size(total, response.content_type)
        tag = response.headers.get("ETag", "")
        self.tag = tag if tag.startswith('"') else ""  # weak ones are of no use here
        return place


async def _more(response: "aiohttp.ClientResponse") -> bytes:
    """The next bytes, empty at the end; those that came before a failure are given out first."""
    parts: list[bytes] = []
    missing = PIECE
    try:
        while missing and (part := await response.content.read(missing)):
            parts.append(part)
            missing -= len(part)
    except Exception:  # the next call meets it again
        if not parts:
            raise
    return b"".join(parts)


class Ranges(Stream):
    """Ranges of an object, through fsspec; shorter ones after each failure."""

    def pieces(self, start: int, failures: int) -> Pieces:
        files = file_system(self.url.split("://")[0], self.timeout)
        path = files._strip_protocol(self.url)
        size = self._length(files, path) if self.size is None else self.size
        if size > self.most:
            raise self.wrong_size(size)
        while start < size:
            end = min(start + max(LEAST_RANGE, RANGE >> failures), size)
            asked = end + (end == size)  # one byte more at the end, to notice if there is one
            data = self._range(files, path, start, asked)
            if len(data) != end - start:
                found = self._length(files, path)
                raise (
                    self.wrong_size(found)
                    if found != size
                    else OSError(f"{len(data)} bytes for {end - start} asked for")
                )
            yield start, data
            start = end

    def _range(self, files: "AbstractFileSystem", path: str, start: int, end: int) -> bytes:
        if files.async_impl:
            return self.run(files._cat_file(path, start=start, end=end))
        # cache_type: no more than was asked for.
        return self.run(asyncio.to_thread(files.cat_file, path, start=start, end=end, cache_type="none"))

    def _length(self, files: "AbstractFileSystem", path: str) -> int:
        info = self.run(files._info(path) if files.async_impl else asyncio.to_thread(files.info, path))
        if info["type"] != "file":
            raise RemoteError(f"{shown_url(self.url)}: a folder, not a file")
        return info["size"]


class Pipe(Stream):
    """What a shell command prints; it is run from the start after each failure."""

    def pieces(self, start: int, failures: int) -> Pieces:
        self.resumable, place = False, 0
        command = self.url.removeprefix(PIPE)
        with (
            tempfile.TemporaryFile() as complaints,
            subprocess.Popen(
                command,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=complaints,
                start_new_session=True,  # so that all its processes can be ended
            ) as process,
        ):
            assert process.stdout
            try:
                while piece := self._read(process.stdout):
                    yield place, piece
                    place += len(piece)
                status = process.wait(self.timeout)
            except BaseException:  # the end of this generator among them
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
            if status:
                complaints.seek(max(0, complaints.seek(0, os.SEEK_END) - 4096))
                lines = complaints.read().decode("utf-8", "replace").split("\n")
                last = next((line.strip() for line in reversed(lines) if line.strip()), "no word of why")
                if status in (126, 127):  # of the shell: no such command
                    raise RemoteError(f"{shown_url(self.url)}: {last}")
                raise OSError(f"exit status {status}: {last}")

    def _read(self, output: IO[bytes]) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            waited = 0.0
            while not selector.select(POLL):
                self.check_stop()
                if (waited := waited + POLL) > self.timeout:
                    raise TimeoutError
        self.check_stop()
        return os.read(output.fileno(), PIECE)


def open_stream(url: str, size: int | None, most: int, timeout: float, stop: Event) -> Http | Ranges | Pipe:
    kind = Pipe if url.startswith(PIPE) else Http if url.startswith("http") else Ranges
    return kind(url, size, most, timeout, stop)


def file_system(scheme: str, timeout: float) -> "AbstractFileSystem":
    """fsspec's, with our timeout, and without retries of its own where it lets us."""
    return _file_system(scheme, timeout, os.getpid())


@functools.lru_cache
def _file_system(scheme: str, timeout: float, _: int) -> "AbstractFileSystem":
    """One a process: their connections are those of a thread, which a fork does not take along."""
    try:
        import fsspec
        from aiohttp import ClientTimeout

        patience = ClientTimeout(total=None, connect=timeout, sock_read=timeout)
        options: dict[str, Any] = {}
        if scheme == "http":
            options = {"client_kwargs": {"timeout": patience, "trust_env": True}}  # proxies and ~/.netrc
        elif scheme == "s3":
            config = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 0}}
            options = {"config_kwargs": config, "use_listings_cache": False}
        elif scheme in ("gs", "gcs"):
            options = {"requests_timeout": patience, "use_listings_cache": False}
        files = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except ImportError as error:
        needed = PACKAGES.get(scheme, "aiohttp")
        raise RemoteError(f"{scheme}:// needs the package {needed} ({error}); pip install {needed}") from None
    if scheme == "s3":
        files.retries = 1
    for name in ("gcsfs", "huggingface_hub.utils._http"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they log whatever they try again, gcsfs with tracebacks
    return files
