"""The folder of fetched shards: fetched once, whole, within its bound, by several threads and processes."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from http_server import File, Server, serving

import mpp.remote.fetch
from mpp.remote.cache import PART, SHARD, Cache
from mpp.remote.fetch import Retry
from mpp.remote.urls import RemoteError

pytest.importorskip("aiohttp", reason="fetching over HTTP needs fsspec[http]")

QUICK = Retry(attempts=3, wait=0.002, longest=0.01, timeout=10)
SIZE = 100_000


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as running:
        yield running


def shard(server: Server, number: int, **fault) -> tuple[str, bytes]:
    data = np.random.default_rng(number).bytes(SIZE)
    return server.put(f"{number}.tar", File(data, **fault)), data


def content(cache: Cache, url: str, size: int = SIZE) -> bytes:
    descriptor = cache.open(url, size)
    try:
        return os.pread(descriptor, size + 1, 0)
    finally:
        os.close(descriptor)


def kept(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.mpp-*"))


def run(code: str, *arguments: object) -> subprocess.Popen:
    code = "import os, sys\nfrom mpp.remote.cache import Cache\nfrom mpp.remote.fetch import Retry\n" + code
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_a_shard_is_fetched_once_and_stays(server, tmp_path):
    url, data = shard(server, 0, times=1, cut=300)
    cache = Cache(tmp_path / "cache", 10 * SIZE, retry=QUICK)
    assert content(cache, url) == data
    assert content(cache, url) == data
    assert content(Cache(tmp_path / "cache", 10 * SIZE), url) == data
    assert server.counts["/0.tar"] == 2
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == ["", SHARD]  # the first is .lock


def test_threads_that_want_the_same_shard_fetch_it_once(server, tmp_path):
    url, data = shard(server, 0, drip=0.02)
    caches = [Cache(tmp_path, 10 * SIZE), Cache(tmp_path, 10 * SIZE)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: content(caches[i % 2], url), range(16)))
    assert found == [data] * 16
    assert server.counts["/0.tar"] == 1


def test_processes_that_want_the_same_shards_fetch_each_once(server, tmp_path):
    shards = [shard(server, i, drip=0.01) for i in range(6)]
    code = "\nfor url in sys.argv[2:]: print(len(os.pread(Cache(sys.argv[1], 10**6).open(url, 100_000), 10**6, 0)))"
    urls = [url for url, _ in shards]
    processes = [
        run(code, tmp_path, *urls),
        run(code, tmp_path, *urls[::-1]),
        run(code, tmp_path, *urls[3:], *urls[:3]),
    ]
    for process in processes:
        assert process.communicate(timeout=60)[0].split() == [str(SIZE)] * 6
    assert [server.counts[f"/{i}.tar"] for i in range(6)] == [1] * 6


def test_the_shard_opened_longest_ago_goes_first(server, tmp_path):
    cache = Cache(tmp_path, 3 * SIZE)
    shards = [shard(server, i) for i in range(4)]
    for i in (0, 1, 2, 0, 3):  # 1 is the oldest when 3 comes
        assert content(cache, shards[i][0]) == shards[i][1]
        time.sleep(0.01)
    for i in (3, 2, 0):
        content(cache, shards[i][0])
    assert [server.counts[f"/{i}.tar"] for i in range(4)] == [1, 1, 1, 1]
    content(cache, shards[1][0])
    assert server.counts["/1.tar"] == 2


def test_a_shard_that_is_open_can_be_read_after_it_gave_way(server, tmp_path):
    cache = Cache(tmp_path, SIZE)
    (first, data), (second, _) = shard(server, 0), shard(server, 1)
    descriptor = cache.open(first, SIZE)
    content(cache, second)
    assert os.pread(descriptor, SIZE, 0) == data
    os.close(descriptor)


def test_the_bound_holds_while_many_fetch(server, tmp_path):
    shards = [shard(server, i, drip=0.004) for i in range(12)]
    caches, most, done = [Cache(tmp_path, 3 * SIZE + 5), Cache(tmp_path, 3 * SIZE + 5)], 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            with open(tmp_path / ".lock", "ab") as lock:  # so that nothing is deleted or begun while it counts
                fcntl.flock(lock, fcntl.LOCK_EX)
                sizes = {}
                for path in tmp_path.glob("*.mpp-*"):
                    with suppress(FileNotFoundError):  # renamed, and so met twice
                        sizes[path.stem] = path.stat().st_size
                most = max(most, sum(sizes.values()))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: content(caches[i % 2], shards[i % 12][0]), range(24)))
    done.set()
    watcher.join()
    assert found == [shards[i % 12][1] for i in range(24)]
    assert 2 * SIZE <= most <= 3 * SIZE + 5


def test_a_shard_larger_than_the_bound_is_one_line(server, tmp_path):
    url, _ = shard(server, 0)
    with pytest.raises(RemoteError, match=f"{SIZE} bytes, more than the 1000 that {tmp_path} may hold"):
        Cache(tmp_path, 1000).open(url, SIZE)


def test_a_shard_that_was_cut_on_the_disk_is_fetched_again(server, tmp_path):
    url, data = shard(server, 0)
    cache = Cache(tmp_path, 10 * SIZE)
    content(cache, url)
    os.truncate(next(tmp_path.glob("*" + SHARD)), 10)
    assert content(cache, url) == data


def test_what_cannot_be_fetched_leaves_nothing(server, tmp_path):
    cache = Cache(tmp_path, 10 * SIZE, retry=QUICK)
    for fault in ({"status": 404}, {"status": 500}, {"cut": 10}, {"claim": 1}):
        url, _ = shard(server, 0, **fault)
        with pytest.raises(RemoteError, match=r"/0\.tar"):
            cache.open(url, SIZE)
        assert kept(tmp_path) == 0
    assert not list(tmp_path.glob("*" + PART))


def test_the_part_of_a_killed_process_goes_and_others_wait_no_longer(server, tmp_path):
    url, data = shard(server, 0, times=1, hang=1000)
    process = run("Cache(sys.argv[1], 10**6).open(sys.argv[2], 100_000)", tmp_path, url)
    while not server.counts["/0.tar"] or not list(tmp_path.glob("*" + PART)):
        time.sleep(0.01)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(content, Cache(tmp_path, 10 * SIZE), url)
        time.sleep(0.2)
        assert not waiting.done()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert waiting.result(20) == data
    assert not list(tmp_path.glob("*" + PART))


def test_left_over_parts_are_removed_and_nothing_that_is_not_ours(server, tmp_path):
    names = ["mine.tar", "a.part", "notes", "train-index.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(b"x" * 10 * SIZE)
    (tmp_path / ("0" * 32 + PART)).write_bytes(b"x" * SIZE)
    with open(tmp_path / ("1" * 32 + PART), "wb") as held:
        held.write(b"x")
        fcntl.flock(held, fcntl.LOCK_EX)
        cache = Cache(tmp_path, 2 * SIZE)
        assert [path.name for path in tmp_path.glob("*" + PART)] == ["1" * 32 + PART]
        content(cache, shard(server, 0)[0])
        content(cache, shard(server, 1)[0])
    assert {name for name in names if (tmp_path / name).exists()} == set(names)


def test_a_full_disk_costs_old_shards_first(server, tmp_path, monkeypatch):
    room = 2 * SIZE + SIZE // 2  # of a disk that is smaller than the bound
    write, cache = os.pwrite, Cache(tmp_path, 10 * SIZE)

    def pwrite(file: int, data: memoryview, place: int) -> int:
        if sum(path.stat().st_blocks * 512 for path in tmp_path.glob("*.mpp-*")) + len(data) > room + 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data, place)

    monkeypatch.setattr(mpp.remote.fetch.os, "pwrite", pwrite)
    shards = [shard(server, i) for i in range(4)]
    for url, data in shards:
        assert content(cache, url) == data
    assert len(list(tmp_path.glob("*" + SHARD))) == 2
    room = -(10**9)
    with pytest.raises(RemoteError, match=rf"{tmp_path}: the disk is full: \d+ bytes are free, .*/9\.tar needs {SIZE}"):
        cache.open(shard(server, 9)[0], SIZE)
    assert kept(tmp_path) == 0


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small file system can only be mounted as root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_really_full(server, tiny_disk):
    cache = Cache(tiny_disk, 10**9)
    for i in (0, 1, 2, 3, 2):
        url, data = shard(server, i)
        assert content(cache, url) == data
    (tiny_disk / "others").write_bytes(b"x" * 50_000)
    held = [cache.open(shard(server, 4)[0], SIZE)]  # what is open keeps its space
    with pytest.raises(RemoteError, match="the disk is full"):
        held += [cache.open(shard(server, i)[0], SIZE) for i in (5, 6)]
    for descriptor in held:
        os.close(descriptor)
    assert content(cache, url) == shard(server, 2)[1]


def test_a_folder_that_cannot_be_written_is_one_line(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RemoteError, match="file/cache: cannot be made: Not a directory"):
        Cache(tmp_path / "file" / "cache", SIZE)
    cache = Cache(tmp_path / "cache", SIZE)
    os.rmdir(tmp_path / "cache")
    with pytest.raises(RemoteError, match="cannot hold .*: No such file or directory"):
        cache.open(shard(server, 0)[0], SIZE)


@pytest.mark.parametrize("fault", [{"status": 503}, {"hang": 100}], ids=str)
def test_closing_ends_whoever_fetches_or_waits(server, tmp_path, fault):
    url, _ = shard(server, 0, **fault)
    cache = Cache(tmp_path, 10 * SIZE, retry=Retry(wait=60, timeout=60))
    start = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(cache.open, url, SIZE) for _ in range(3)]  # one fetches, two wait for it
        while not server.counts["/0.tar"]:
            time.sleep(0.01)
        cache.close()
        for future in waiting:
            with pytest.raises(RemoteError, match="given up"):
                future.result()
    assert time.monotonic() - start < 20
    assert kept(tmp_path) == 0


def test_urls_that_are_not_allowed_are_not_fetched(tmp_path):
    cache = Cache(tmp_path, SIZE)
    for url in (f"pipe:touch {tmp_path}/run", "file:///etc/passwd"):
        with pytest.raises(RemoteError):
            cache.open(url, 10)
    assert not (tmp_path / "run").exists()
    os.close(Cache(tmp_path, SIZE, allow=["pipe"]).open("pipe:printf 0123456789", 10))
