"""Indexing tars that lie elsewhere: patterns become URLs, and each tar is fetched once, scanned and deleted."""

import re
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event

from tqdm import tqdm

from mpp.errors import cause, shown
from mpp.files import missing_folders, remove_left_over, temporary
from mpp.remote.fetch import RETRY, Retry, fetch, retried
from mpp.remote.streams import file_system
from mpp.remote.urls import RemoteError, check_url, kept_url, shown_url
from mpp.shards.build import build_index, split_of
from mpp.shards.index import Index, write_index
from mpp.shards.labels import classes_of, labeller
from mpp.shards.tar import Scan, scan_shard

FETCHED = ".fetched-"  # tars while they are looked at
MOST_URLS = 10**6  # of one pattern
SIDE_BY_SIDE = 4  # tars on the disk at a time


def expand(pattern: str, allow: Collection[str] = (), retry: Retry = RETRY) -> list[str]:
    """The URLs that a pattern stands for: `train-{000000..000009}.tar`, `{a,b}`, or `FOLDER/` for its tars."""
    urls = braces(pattern)
    for url in urls:
        check_url(url, allow)
    return [tar for url in urls for tar in (_listed(url, retry) if url.endswith("/") else [url])]


def braces(pattern: str) -> list[str]:
    """A pattern without braces is itself; numbers are as wide as the wider one of the two if that begins with 0."""
    found, done = [pattern], []
    while found:
        text = found.pop()
        match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
        if not match:
            done.append(text)
            continue
        first, last, choices = match.groups()
        parts = choices.split(",") if choices else _numbers(first, last, pattern)
        if len(parts) + len(found) + len(done) > MOST_URLS:
            raise RemoteError(f"{shown_url(pattern)}: stands for more than {MOST_URLS} URLs")
        found += [text[: match.start()] + part + text[match.end() :] for part in reversed(parts)]
    return list(dict.fromkeys(done))


def _numbers(first: str, last: str, pattern: str) -> list[str]:
    start, end = int(first), int(last)
    if abs(end - start) >= MOST_URLS:
        raise RemoteError(f"{shown_url(pattern)}: stands for more than {MOST_URLS} URLs")
    width = max(len(first), len(last)) if any(text != "0" and text.startswith("0") for text in (first, last)) else 0
    step = 1 if end >= start else -1
    return [f"{number:0{width}}" for number in range(start, end + step, step)]


def _listed(url: str, retry: Retry) -> list[str]:
    """The tars of a folder, in order; over HTTP those that its page links to."""
    scheme = url.split("://")[0]
    web = scheme.startswith("http")
    files = file_system("http" if web else scheme, retry.timeout)
    path = url if web else files._strip_protocol(url).rstrip("/") + "/"
    names = retried(url, lambda: files.ls(path, detail=False), retry)
    found = [name.removeprefix(path) for name in names if name.startswith(path)]
    tars = sorted(name for name in found if name.endswith(".tar") and "/" not in name)
    if not tars:
        raise RemoteError(f"{shown_url(url)}: no shards (*.tar) are listed here")
    return [url + name for name in tars]


def index_urls(
    patterns: Sequence[str],
    folder: str | Path,
    split: str | None = None,
    labels: str = "cls",
    *,
    allow: Collection[str] = (),
    retry: Retry = RETRY,
    report: Callable[[str], None] = print,
) -> list[Index]:
    """Writes FOLDER/SPLIT-index.safetensors, whose shards are the URLs that the patterns stand for.

    split: of all of them; where not given it is what their names tell, as in a folder.
    """
    folder = Path(folder)
    urls = list(dict.fromkeys(url for pattern in patterns for url in expand(pattern, allow, retry)))
    made = missing_folders(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_left_over(folder, FETCHED)
    except OSError as error:
        raise RemoteError(f"{shown(folder)}: cannot be made: {cause(error)}") from None
    try:
        return _index(urls, folder, split, labels, allow, retry, report)
    finally:
        with suppress(OSError):
            for one in made:
                one.rmdir()  # goes only if it stayed empty


def _index(
    urls: Sequence[str],
    folder: Path,
    split: str | None,
    labels: str,
    allow: Collection[str],
    retry: Retry,
    report: Callable[[str], None],
) -> list[Index]:
    stop = Event()
    scan = partial(_scan, folder=folder, labels=labels, allow=allow, retry=retry, stop=stop)
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        try:
            scans = list(tqdm(pool.map(scan, urls), "index", len(urls), unit="shard"))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    classes = classes_of(scans, labels, report)
    groups: dict[str, list[int]] = {}
    for number, found in enumerate(scans):
        groups.setdefault(split or split_of(found.path.name) or "train", []).append(number)
    made = []
    for name, inside in groups.items():
        index = build_index(folder, name, [scans[number] for number in inside], classes, "RGB", report)
        made.append(replace(index, shards=tuple(urls[number] for number in inside)))
    for index in made:  # only when all of them are sound
        write_index(index)
    return made


def _scan(url: str, folder: Path, labels: str, allow: Collection[str], retry: Retry, stop: Event) -> Scan:
    with temporary(folder, FETCHED) as file:
        try:
            fetch(url, file, None, retry, allow=allow, stop=stop)
            found = scan_shard(file.name, labeller(labels))
        except OSError as error:
            raise RemoteError(f"{folder}: cannot hold {shown_url(url)}: {cause(error)}") from None
        except ValueError as error:  # it names the file, which nobody knows
            raise RemoteError(str(error).replace(file.name, shown_url(url))) from None
    name = "" if url.startswith("pipe:") else kept_url(url)
    return found._replace(path=Path(name))
