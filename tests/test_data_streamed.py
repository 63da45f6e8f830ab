"""Shards by URL read as local ones: the same batches, epochs and resume, from a server with faults."""

import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from http_server import File, Server, serving

from mpp.augment.config import AugmentConfig
from mpp.data.batches import Batches
from mpp.data.read import read_shards
from mpp.remote.cache import Cache
from mpp.remote.fetch import Retry
from mpp.remote.urls import RemoteError
from mpp.shards.index import ShardError, read_index, write_index

PLAIN = AugmentConfig(crop="none", flip=False)
WINDOW = {"window": 1, "seed": 6, "threads": 2}
QUICK = Retry(attempts=4, wait=0.001, timeout=2)


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Waits of milliseconds, and a cache of the test's own."""
    monkeypatch.setattr("mpp.data.read.Cache", partial(Cache, retry=QUICK))
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))


def put(server: Server, folder: Path, **faults) -> str:
    """Serves a folder of shards, its tars with faults; gives its URL."""
    for path in sorted(folder.iterdir()):
        file = File(path.read_bytes(), **(faults if path.suffix == ".tar" else {}))
        url = server.put(f"shards/{path.name}", file)
    return url.rpartition("/")[0]


def fetched(server: Server) -> int:
    """Answers with a tar, or a piece of one, so far."""
    return sum(count for path, count in server.counts.items() if path.endswith(".tar"))


def equal(first: Batches, second: Batches, steps) -> bool:
    return all(torch.equal(first.at(step).images, second.at(step).images) for step in steps)


@pytest.mark.parametrize(
    "faults",
    [
        {},
        {"ranges": False},
        {"cut": 5000, "times": 2},
        {"cut": 70_000},
        {"status": 503, "times": 2},
        {"hang": 100, "times": 1},
        {"drip": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize("train", [True, False])
def test_streamed_batches_are_those_of_local_shards(small_shards, server, faults, train):
    local = read_shards(small_shards, 10, shuffle="window", train=train, **WINDOW)
    streamed = read_shards(put(server, small_shards, **faults), 10, train=train, **WINDOW)
    assert equal(local, streamed, range(12) if train else range(6))
    assert torch.equal(local.at(3).labels, streamed.at(3).labels)
    streamed.close()


def test_each_shard_is_fetched_once_as_long_as_the_cache_holds_all(small_shards, server):
    batches = read_shards(put(server, small_shards), 10, reader="indexed", **WINDOW)
    for step in range(20):  # four epochs
        batches.at(step)
    assert fetched(server) == 3
    again = read_shards(put(server, small_shards), 10, reader="indexed", **WINDOW)
    again.at(0)
    again.close()
    assert fetched(server) == 0, "and not again by the next run"


def test_a_cache_of_two_windows_is_enough_for_every_epoch(small_shards, server, tmp_path):
    index = read_index(small_shards, "train")
    two = sum(sorted(index.shard_bytes)[-2:])
    url, local = put(server, small_shards), read_shards(small_shards, 10, shuffle="window", **WINDOW)
    settings = WINDOW | {"cache": str(tmp_path / "small"), "cache_gib": two / 2**30, "reader": "indexed"}
    batches = read_shards(url, 10, **settings)
    for step in range(22):
        assert equal(batches, local, [step])
        assert sum(path.stat().st_size for path in (tmp_path / "small").iterdir()) <= two
    assert fetched(server) > 3
    batches.close()
    with pytest.raises(ShardError, match=r"two windows of shards take .* GiB, data\.cache_gib is .*; raise it, or"):
        read_shards(url, 10, **settings | {"cache_gib": 0.9 * two / 2**30})


def test_only_the_shards_of_a_window_and_the_next_are_fetched(small_shards, server):
    batches = read_shards(put(server, small_shards), 4, reader="indexed", **WINDOW)
    first = batches.at(0)
    batches._images.shards._fetchers.shutdown()
    assert len(first) == 4
    assert fetched(server) == 2


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_of_one_machine_share_the_cache_and_each_batch(small_shards, server, ranks):
    alone = read_shards(small_shards, 10, shuffle="window", **WINDOW)
    url = put(server, small_shards)
    several = [read_shards(url, 10, rank=rank, ranks=ranks, reader="indexed", **WINDOW) for rank in range(ranks)]
    for step in range(12):
        parts = [batches.at(step).images for batches in several]
        assert torch.equal(torch.cat(parts), alone.at(step).images)
    assert fetched(server) == 3
    for batches in several:
        batches.close()


def test_an_index_of_ones_own_may_name_the_urls_of_others(small_shards, server, tmp_path):
    url = put(server, small_shards)
    index = read_index(small_shards, "train")
    (tmp_path / "own").mkdir()
    write_index(replace(index, folder=tmp_path / "own", shards=tuple(f"{url}/{name}" for name in index.shards)))
    streamed = read_shards(tmp_path / "own", 10, **WINDOW)
    assert equal(streamed, read_shards(small_shards, 10, shuffle="window", **WINDOW), range(6))


@pytest.mark.parametrize(
    "name", ["../outside.tar", "/etc/passwd", "folder/x.tar", "", "..", "file:///etc/passwd", "pipe:ls"]
)
def test_an_index_cannot_lead_out_of_its_folder(small_shards, tmp_path, name):
    index = read_index(small_shards, "train")
    write_index(replace(index, folder=tmp_path, shards=(name, *index.shards[1:])))
    with pytest.raises((ShardError, RemoteError)) as caught:
        read_index(tmp_path, "train")
    assert "\n" not in str(caught.value)
    assert (
        "train-index.safetensors" in str(caught.value) or "scheme" in str(caught.value) or "pipe" in str(caught.value)
    )


def test_shards_from_a_command_need_leave(small_shards, tmp_path):
    index = read_index(small_shards, "train")
    commands = tuple(f"pipe:cat {small_shards / name}" for name in index.shards)
    write_index(replace(index, folder=tmp_path, shards=commands))
    with pytest.raises(RemoteError, match=r"data\.allow: \[pipe\]"):
        read_shards(tmp_path, 10, **WINDOW)
    streamed = read_shards(tmp_path, 10, allow=("pipe",), **WINDOW)
    assert equal(streamed, read_shards(small_shards, 10, shuffle="window", **WINDOW), range(6))


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"status": 404}, r"train-00000\d\.tar: not there"),
        ({"status": 403}, r"train-00000\d\.tar: .*403"),
        ({"status": 500}, r"train-00000\d\.tar: .*4 "),
        ({"cut": 0}, r"train-00000\d\.tar: "),
    ],
    ids=str,
)
def test_a_server_that_never_gives_a_shard_ends_the_run_with_one_line(small_shards, server, faults, message):
    batches = read_shards(put(server, small_shards, **faults), 10, **WINDOW)
    with pytest.raises(RemoteError, match=message) as caught:
        next(batches.iterate())
    assert "\n" not in str(caught.value)
    batches.close()


def test_a_shard_that_changed_on_the_server_ends_the_run_with_both_lengths(small_shards, server):
    url = put(server, small_shards)
    name = read_index(small_shards, "train").shards[0]
    server.put(f"shards/{name}", File(b"x" * 1000))
    batches = read_shards(url, 53, **WINDOW)
    with pytest.raises(RemoteError, match=r"1000 bytes, the index says \d+"):
        batches.at(0)


def test_a_page_in_a_shards_place_is_no_image_and_ends_the_run(small_shards, server):
    size = read_index(small_shards, "train").shard_bytes[0]
    batches = read_shards(put(server, small_shards, page=b"<html>sign in</html>"), 53, **WINDOW)
    with pytest.raises(RemoteError, match=rf"has 20 bytes \(a page of text\), the index says {size}"):
        batches.at(0)


def test_a_url_without_an_index_is_one_line(server):
    server.put("shards/readme.txt", File(b"hello"))
    url = f"http://127.0.0.1:{server.server_port}/shards"
    with pytest.raises(RemoteError, match=r"train-index\.safetensors: not there") as caught:
        read_shards(url, 10)
    assert "\n" not in str(caught.value)
    server.put("shards/train-index.safetensors", File(b"<html>"))
    with pytest.raises(ShardError, match="cut, or no index of mpp"):
        read_shards(url, 10)


def test_closing_ends_a_wait_for_a_server_that_hangs(small_shards, server, monkeypatch):
    patient = partial(Cache, retry=Retry(timeout=300))
    monkeypatch.setattr("mpp.data.read.Cache", patient)
    batches = read_shards(put(server, small_shards, hang=100), 10, **WINDOW)
    import threading

    errors: list[Exception] = []

    def read() -> None:
        try:
            batches.at(0)
        except RemoteError as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    batches.close()
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == 1


def test_a_shard_that_leaves_the_cache_is_fetched_again(small_shards, server, tmp_path):
    cache = tmp_path / "cache" / "shards"
    batches = read_shards(put(server, small_shards), 10, reader="indexed", **WINDOW)
    expected = [batches.at(step).images for step in range(6)]
    batches.close()
    shutil.rmtree(cache)
    os.makedirs(cache)
    again = read_shards(put(server, small_shards), 10, reader="indexed", **WINDOW)
    assert all(torch.equal(again.at(step).images, expected[step]) for step in range(6))


def test_all_images_may_be_shuffled_at_once_if_the_cache_holds_them(small_shards, server):
    url = put(server, small_shards)
    streamed = read_shards(url, 10, shuffle="all", seed=3)
    assert equal(streamed, read_shards(small_shards, 10, seed=3), range(6))
    with pytest.raises(ShardError, match="all shards, shuffled at once, take"):
        read_shards(url, 10, shuffle="all", cache_gib=1e-5)


def test_a_fetched_shard_of_other_bytes_is_fetched_anew_by_the_next_run(small_shards, server):
    url, index = put(server, small_shards), read_index(small_shards, "train")
    data = bytearray((small_shards / index.shards[0]).read_bytes())
    data[index.offset[0] : index.offset[0] + 64] = bytes(64)
    server.put(f"shards/{index.shards[0]}", File(bytes(data)))
    first = read_shards(url, 53, shuffle="window", seed=6, augment=PLAIN)
    first.at(0)
    assert list(first.damaged) == [0]
    url = put(server, small_shards)
    second = read_shards(url, 53, shuffle="window", seed=6, augment=PLAIN)
    second.at(0)
    assert not second.damaged
    assert fetched(server) == 1


def test_the_first_failure_of_a_fetch_is_told(small_shards, server, caplog):
    batches = read_shards(put(server, small_shards, status=503, times=2), 10, **WINDOW)
    batches.at(0)
    lines = [record.getMessage() for record in caplog.records]
    assert any("status 503" in line and "trying again" in line for line in lines)
