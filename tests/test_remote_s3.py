"""Shards in an S3 bucket: moto's server, found as users name theirs, by AWS_ENDPOINT_URL."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from http_server import File, serving

from mpp.remote.cache import Cache
from mpp.remote.fetch import Retry, fetch, read_small
from mpp.remote.streams import Ranges, _file_system
from mpp.remote.urls import RemoteError
from mpp.shards.build_urls import expand

pytest.importorskip("s3fs", reason="s3:// needs s3fs")
server = pytest.importorskip("moto.server", reason="the tests of s3:// need moto[server]")

QUICK = Retry(attempts=3, wait=0.002, longest=0.01, timeout=10)
DATA = np.random.default_rng(0).bytes(1_000_001)


@pytest.fixture(scope="module")
def running() -> Iterator[str]:
    moto = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    yield "http://{}:{}".format(*moto.get_host_and_port())
    moto.stop()


@pytest.fixture
def endpoint(running: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
        monkeypatch.setenv(f"AWS_{name}", running if name == "ENDPOINT_URL" else "us-east-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    _file_system.cache_clear()
    yield running
    _file_system.cache_clear()


@pytest.fixture
def bucket(endpoint: str) -> str:
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="shards")
    for i in range(3):
        client.put_object(Bucket="shards", Key=f"set/train-{i:06d}.tar", Body=DATA)
    client.put_object(Bucket="shards", Key="set/train-index.safetensors", Body=b"index", ACL="public-read")
    client.put_object(Bucket="shards", Key="set/deeper/train-000009.tar", Body=DATA)
    return "s3://shards/set/"


def refused(url: str, path: Path, size: int = len(DATA), retry: Retry = QUICK) -> str:
    with pytest.raises(RemoteError) as caught, open(path, "w+b") as file:
        fetch(url, file, size, retry)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_objects_are_fetched_whole(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("mpp.remote.streams.RANGE", 300_000)  # so that four requests are needed
    with open(tmp_path / "a", "w+b") as file:
        fetch(bucket + "train-000000.tar", file, len(DATA), QUICK)
    assert (tmp_path / "a").read_bytes() == DATA
    with open(tmp_path / "a", "w+b") as file:
        assert fetch(bucket + "train-000000.tar", file, None, QUICK) == len(DATA)
    assert read_small(bucket + "train-index.safetensors", 100, QUICK) == b"index"


def test_the_cache_holds_objects_of_buckets(bucket, tmp_path):
    cache = Cache(tmp_path, 10**7, retry=QUICK)
    descriptor = cache.open(bucket + "train-000001.tar", len(DATA))
    assert os.pread(descriptor, 10**7, 0) == DATA
    os.close(descriptor)


def test_missing_objects_and_buckets_are_one_line(bucket, tmp_path):
    for url in (bucket + "train-000007.tar", "s3://other/train-000000.tar"):
        assert refused(url, tmp_path / "a") == f"{url}: not there"


def test_an_object_of_another_length_is_refused_with_both(bucket, tmp_path):
    url = bucket + "train-000000.tar"
    for size in (len(DATA) - 1, len(DATA) + 1, 10):
        assert f"{url}: has {len(DATA)} bytes, the index says {size}" in refused(url, tmp_path / "a", size)
    with pytest.raises(RemoteError, match=f"has {len(DATA)} bytes, at most 1000 are taken"):
        read_small(url, 1000, QUICK)


def test_a_folder_is_its_tars(bucket):
    assert expand(bucket, retry=QUICK) == [f"{bucket}train-{i:06d}.tar" for i in range(3)]
    with pytest.raises(RemoteError, match="not there|no shards"):
        expand("s3://shards/nothing/", retry=QUICK)


def test_no_credentials_are_one_line_at_once(bucket, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    patient = Retry(attempts=10, wait=60)
    assert "Unable to locate credentials" in refused(bucket + "train-000000.tar", tmp_path / "a", retry=patient)


def test_public_buckets_need_none_if_fsspec_is_told_so(bucket, monkeypatch):
    import fsspec.config

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})  # what FSSPEC_S3_ANON=true does
    assert read_small(bucket + "train-index.safetensors", 100, QUICK) == b"index"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 503}, "status 503 Service Unavailable"),
        ({"status": 500}, "status 500 Internal Server Error"),
        ({"status": 429}, "status 429 Too Many Requests"),
        ({"cut": 1000}, "cut"),
        ({"hang": 1000}, "no byte for 0.3 seconds"),
    ],
    ids=str,
)
def test_a_failing_server_is_asked_as_often_as_we_say(endpoint, tmp_path, monkeypatch, fault, words):
    hasty = Retry(attempts=3, wait=0.002, longest=0.01, timeout=0.3)
    with serving() as failing:
        url = failing.put("shards/a.tar", File(DATA, **fault)).split("/", 3)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "/".join(url[:3]))
        message = refused("s3://shards/a.tar", tmp_path / "a", retry=hasty)
        assert failing.counts["/shards/a.tar"] == 3  # neither botocore nor s3fs adds tries of its own
        assert message.startswith("s3://shards/a.tar: ")
        assert message.endswith("(tried 3 times)")
        assert words in message
        failing.put("shards/a.tar", File(DATA, **fault | {"times": 2}))
        with open(tmp_path / "a", "w+b") as file:
            fetch("s3://shards/a.tar", file, len(DATA), hasty)
        assert (tmp_path / "a").read_bytes() == DATA


def test_waiting_for_a_bucket_ends_soon_when_told_to(endpoint, tmp_path, monkeypatch):
    with serving() as failing:
        url = failing.put("shards/a.tar", File(DATA, hang=1000)).split("/", 3)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "/".join(url[:3]))
        stop = threading.Event()
        threading.Timer(0.3, stop.set).start()
        with pytest.raises(RemoteError, match="given up"), open(tmp_path / "a", "w+b") as file:
            fetch("s3://shards/a.tar", file, len(DATA), Retry(timeout=60), stop=stop)


def test_ranges_grow_shorter_with_failures(monkeypatch):
    asked = []

    def answer(stream: Ranges, files: object, path: str, start: int, end: int) -> bytes:
        asked.append(end - start)
        return bytes(end - start)

    monkeypatch.setattr(Ranges, "_range", answer)
    stream = Ranges("s3://shards/a.tar", 10**9, 10**9, 1, threading.Event())
    for failures in (0, 1, 3, 50):
        next(stream.pieces(0, failures))
    assert asked == [2**24, 2**23, 2**21, 2**18]
