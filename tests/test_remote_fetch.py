"""Fetching over HTTP, from a real server on loopback that fails in every way that it knows."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import numpy as np
import pytest
from http_server import File, Server, serving

from mpp.remote.fetch import Retry, fetch, read_small
from mpp.remote.urls import RemoteError, check_url, is_url, shown_url

pytest.importorskip("aiohttp", reason="fetching over HTTP needs fsspec[http]")

QUICK = Retry(attempts=4, wait=0.002, longest=0.01, timeout=5)
HASTY = Retry(attempts=3, wait=0.002, longest=0.01, timeout=0.2)
DATA = np.random.default_rng(0).bytes(3_000_001)
PAGE = b"<html>please come back later</html>"


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running.files.clear()
    running.requests.clear()
    return running


LACKS = "give its address with user and password, or what signs it: a saved recipe keeps neither (or ~/.netrc)"


def fetched(url: str, path: Path, size: int | None = len(DATA), retry: Retry = QUICK, **options) -> bytes:
    with open(path, "w+b") as file:
        length = fetch(url, file, size, retry, **options)
    data = path.read_bytes()
    assert len(data) == length
    return data


def refused(url: str, path: Path, size: int | None = len(DATA), retry: Retry = QUICK, **options) -> str:
    with pytest.raises(RemoteError) as caught:
        fetched(url, path, size, retry, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "fault",
    [
        {},
        {"lengths": False},
        {"ranges": False},
        {"status": 500, "times": 3},
        {"status": 503, "times": 3},
        {"status": 429, "times": 3},
        {"cut": 0, "times": 3},
        {"cut": 700_000, "times": 3},
        {"cut": 700_000, "times": 3, "ranges": False},
        {"cut": 700_000, "times": 3, "lengths": False},
        {"cut": 700_000, "times": 3, "tag": '"one"'},
        {"page": PAGE, "times": 3},
        {"page": PAGE, "times": 3, "lengths": False},
        {"claim": 5, "times": 3},
        {"claim": -5, "times": 3},
        {"cut": 700_000, "shift": 10, "times": 2},
        {"drip": 0.01},
    ],
    ids=str,
)
def test_the_bytes_are_right_in_the_end(server, tmp_path, fault):
    url = server.put("a.tar", File(DATA, **fault))
    assert fetched(url, tmp_path / "a") == DATA


def test_it_goes_on_where_the_connection_broke(server, tmp_path):
    url = server.put("a.tar", File(DATA, cut=700_000, tag='"one"'))  # always, so that at least five answers are needed
    assert fetched(url, tmp_path / "a") == DATA
    starts = [int(headers.get("Range", "bytes=0-")[6:-1]) for _, headers in server.requests]
    # aiohttp forgets what it has not handed on yet, at most 2^18 bytes.
    assert all(700_000 - 2**18 <= step <= 700_000 for step in np.diff(starts))
    assert {headers.get("If-Range") for _, headers in server.requests[1:]} == {'"one"'}


def test_an_object_that_changes_on_the_way_is_fetched_anew(server, tmp_path):
    other = DATA[::-1]
    url = server.put("a.tar", File(DATA, cut=700_000, times=1, tag='"one"'))

    def change() -> None:
        while server.counts["/a.tar"] < 1:
            time.sleep(0.001)
        server.files["/a.tar"] = File(other, tag='"two"')

    changer = threading.Thread(target=change)
    changer.start()
    data = fetched(url, tmp_path / "a", retry=Retry(attempts=4, wait=0.3, timeout=5))
    changer.join()
    assert data == other


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 404}, "not there"),
        ({"status": 410}, "status 410 Gone"),
        ({"status": 401}, f"refused: status 401 Unauthorized; {LACKS}"),
        ({"status": 403}, f"refused: status 403 Forbidden; {LACKS}"),
    ],
    ids=str,
)
def test_what_is_final_is_asked_for_once(server, tmp_path, fault, words):
    url = server.put("a.tar", File(DATA, **fault))
    assert refused(url, tmp_path / "a") == f"{url}: {words}"
    assert server.counts["/a.tar"] == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 500}, "status 500 Internal Server Error"),
        ({"status": 503}, "status 503 Service Unavailable"),
        ({"status": 429}, "status 429 Too Many Requests"),
        ({"cut": 0}, "the connection was cut"),
        ({"cut": 1000}, "the connection was cut(, after [1-4]000 of 3000001 bytes)?"),
        ({"cut": 700_000, "ranges": False}, "the connection was cut, after [0-9]+ of 3000001 bytes"),
        ({"page": PAGE}, f"has {len(PAGE)} bytes \\(a page of text\\), the index says 3000001"),
        ({"claim": -1}, "has 3000000 bytes, the index says 3000001"),
    ],
    ids=str,
)
def test_what_never_ends_is_given_up_with_the_last_failure(server, tmp_path, fault, words):
    url = server.put("a.tar", File(DATA, **fault))
    assert re.fullmatch(rf"{url}: {words} \(tried 4 times\)", refused(url, tmp_path / "a"))
    assert server.counts["/a.tar"] == 4


def test_an_object_of_another_length_is_refused_with_both(server, tmp_path):
    url = server.put("a.tar", File(DATA))
    assert "has 3000001 bytes, the index says 3000000" in refused(url, tmp_path / "a", len(DATA) - 1)
    assert "has 3000001 bytes, the index says 3000002" in refused(url, tmp_path / "a", len(DATA) + 1)
    url = server.put("a.tar", File(DATA, lengths=False))
    assert "has more than 3000000 bytes, the index says 3000000" in refused(url, tmp_path / "a", len(DATA) - 1)


@pytest.mark.parametrize("bytes_before", [0, 700_000])
def test_a_server_that_hangs_is_left_and_asked_again(server, tmp_path, bytes_before):
    url = server.put("a.tar", File(DATA, hang=bytes_before, times=2))
    assert fetched(url, tmp_path / "a", retry=HASTY) == DATA
    url = server.put("a.tar", File(DATA, hang=0))
    assert "no byte for 0.2 seconds" in refused(url, tmp_path / "a", retry=HASTY)


def test_a_slow_server_is_waited_for(server, tmp_path):
    url = server.put("a.tar", File(DATA, drip=0.1))  # longer in all than HASTY waits for any byte
    assert fetched(url, tmp_path / "a", retry=HASTY) == DATA
    assert server.counts["/a.tar"] == 1


def test_no_server_at_all_is_one_line(tmp_path):
    assert "127.0.0.1:9/a.tar" in refused("http://127.0.0.1:9/a.tar", tmp_path / "a")


def test_any_length_is_taken_where_none_is_known(server, tmp_path):
    for fault in ({}, {"lengths": False}, {"cut": 700_000, "times": 2}):
        url = server.put("a.tar", File(DATA, **fault))
        assert fetched(url, tmp_path / "a", None) == DATA


def test_a_small_file_is_bounded(server):
    url = server.put("index", File(DATA, cut=1_000_000, times=2))
    assert read_small(url, len(DATA), QUICK) == DATA
    for fault in ({}, {"lengths": False}):
        url = server.put("index", File(DATA, **fault))
        with pytest.raises(RemoteError, match="at most 1000 are taken"):
            read_small(url, 1000, QUICK)


def test_what_was_in_the_file_before_is_gone(server, tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 4_000_000)
    url = server.put("a.tar", File(DATA))
    with open(tmp_path / "a", "r+b") as file:
        fetch(url, file, len(DATA), QUICK)
    assert (tmp_path / "a").read_bytes() == DATA


def test_file_systems_without_coroutines_are_read_as_well(tmp_path, monkeypatch):
    import fsspec

    files = fsspec.filesystem("memory")  # as huggingface_hub's, which cannot be asked here
    files.pipe_file(files._strip_protocol("hf://datasets/me/set/a.tar"), DATA)
    monkeypatch.setattr("mpp.remote.streams.file_system", lambda *_: files)
    monkeypatch.setattr("mpp.remote.streams.RANGE", 2**20)
    url = "hf://datasets/me/set/a.tar"
    assert fetched(url, tmp_path / "a") == DATA
    assert fetched(url, tmp_path / "a", None) == DATA
    assert "has 3000001 bytes, the index says 10 (tried 4 times)" in refused(url, tmp_path / "a", 10)
    assert refused(url + "x", tmp_path / "a") == f"{url}x: not there"


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    message = refused("gs://bucket/a.tar", tmp_path / "a")
    assert "gs:// needs the package gcsfs" in message
    assert "pip install gcsfs" in message


def test_secrets_of_a_url_are_used_and_not_shown(server, tmp_path):
    url = server.put("a.tar", File(DATA, status=503, times=1)).replace("//", "//user:word@") + "?Signature=geheim%2Fx"
    assert fetched(url, tmp_path / "a") == DATA
    assert server.requests[-1][1]["Authorization"].startswith("Basic ")
    for fault in ({"status": 403}, {"status": 500}, {"cut": 10}):
        server.put("a.tar", File(DATA, **fault))
        message = refused(url, tmp_path / "a")
        assert "geheim" not in message
        assert "word" not in message
        assert "127.0.0.1" in message


@pytest.mark.parametrize(
    "faults",
    [
        {"whole": True},
        {"whole": True, "tag": '"a"'},
        {"shift": 7, "times": 2},
        {"shift": 7, "times": 3, "tag": '"a"'},
        {"dated": "then", "times": 1},
    ],
    ids=str,
)
def test_a_server_that_answers_with_other_ranges_or_another_version_still_gives_the_right_bytes(
    faults, server, tmp_path
):
    file = File(DATA, **{"times": 1, **faults, "cut": 1_000_000})
    patient = Retry(attempts=8, wait=0.01, longest=0.02, timeout=5)
    assert fetched(server.put("a.tar", file), tmp_path / "a", retry=patient) == DATA


def test_what_changed_between_two_ranges_is_fetched_from_the_start(server, tmp_path):
    url = server.put("a.tar", File(bytes(len(DATA)), dated="then", cut=1_000_000))

    def swap() -> None:
        while not server.counts["/a.tar"]:
            time.sleep(0.005)
        server.files["/a.tar"] = File(DATA, dated="now", times=0)

    threading.Thread(target=swap).start()
    assert fetched(url, tmp_path / "a", retry=Retry(attempts=8, wait=0.5, longest=0.6, timeout=5)) == DATA


@pytest.mark.parametrize(
    ("asks", "bound", "least", "most"),
    [("1", 9.0, 0.9, 5), ("5000", 0.4, 0.35, 5), ("soon", 9.0, 0, 0.8), ("DATE", 9.0, 0.8, 6), ("-1", 9, 0, 0.8)],
)
def test_a_server_that_says_when_to_come_back_is_obeyed_within_bounds(asks, bound, least, most, server, tmp_path):
    if asks == "DATE":
        asks = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
    url, before = server.put("a.tar", File(DATA, status=503, times=1, patience=asks)), len(server.times)
    patient = Retry(attempts=3, wait=0.01, longest=0.01, timeout=5, asked=bound)
    assert fetched(url, tmp_path / "a", retry=patient) == DATA
    assert least <= server.times[before + 1] - server.times[before] <= most


def test_waiting_and_reading_end_soon_when_told_to(server, tmp_path):
    patient = Retry(attempts=50, wait=60, longest=60, timeout=60)
    for fault in ({"status": 503}, {"hang": 1000}):
        url, stop = server.put("a.tar", File(DATA, **fault)), threading.Event()
        threading.Timer(0.3, stop.set).start()
        start = time.monotonic()
        assert "given up" in refused(url, tmp_path / "a", retry=patient, stop=stop)
        assert time.monotonic() - start < 10


def test_commands_run_only_where_they_are_allowed_by_name(tmp_path):
    (tmp_path / "data").write_bytes(DATA)
    command = f"pipe:cat '{tmp_path}/data'"
    message = refused(command, tmp_path / "a")
    assert "runs a shell command" in message
    assert "data.allow: [pipe]" in message
    assert fetched(command, tmp_path / "a", allow=["pipe"]) == DATA


def test_a_command_that_fails_says_why_and_is_run_again(tmp_path):
    (tmp_path / "data").write_bytes(DATA)
    fails = f"pipe:head -c 1000 {tmp_path}/data; echo one >&2; echo no luck >&2; exit 3"
    assert refused(fails, tmp_path / "a", allow=["pipe"]).endswith(
        "exit 3: exit status 3: no luck, after 1000 of 3000001 bytes (tried 4 times)"
    )
    twice = f"pipe:cd {tmp_path}; echo >> tries; test $(wc -l < tries) -gt 2 && cat data"
    assert fetched(twice, tmp_path / "a", allow=["pipe"]) == DATA
    assert "tried" not in refused("pipe:no_such_command", tmp_path / "a", allow=["pipe"])
    assert "no byte for 0.2 seconds" in refused("pipe:sleep 30", tmp_path / "a", retry=HASTY, allow=["pipe"])


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///etc/passwd", "expected a URL that begins with"),
        ("local:///etc/passwd", "expected a URL"),
        ("memory://x/y", "expected a URL"),
        ("ftp://host/x", "expected a URL"),
        ("/etc/passwd", "expected a URL"),
        ("simplecache::s3://bucket/a.tar", "expected a URL"),
        ("s3://bucket/a.zip::file:///etc/passwd", "chained"),
        ("http://host/a.tar\nHost: other", "characters that no URL holds"),
        ("http://host/a b.tar", "blanks"),
        ("http:///a.tar", "names no server"),
        ("s3://", "names no server or bucket"),
        ("http://[half/a.tar", "names no server"),
        ("pipe:rm -rf /", "runs a shell command"),
    ],
)
def test_urls_that_could_reach_anything_else_are_refused(url, words):
    with pytest.raises(RemoteError, match=words.replace("(", "\\(")) as caught:
        check_url(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["http", "https", "s3", "gs", "gcs", "hf", "az", "abfs"])
def test_urls_of_objects_are_taken(scheme):
    check_url(f"{scheme}://place/folder/train-000000.tar")


def test_a_url_is_told_from_a_path():
    assert all(map(is_url, ["s3://a/b", "https://a", "pipe:cat x", "file:///x", "x+y://z"]))
    assert not any(map(is_url, ["a/b.tar", "/a/b", "pipes", "c:/x", "://x", "train-000000.tar"]))


def test_shown_urls_hold_no_secrets():
    assert shown_url("https://me:pass@host/a.tar?X-Amz-Signature=1&b=2") == "https://host/a.tar?..."
    assert shown_url("pipe:curl 'https://me:pass@host/a?sig=1' | cat") == "pipe:curl 'https://host/a?...' | cat"
    assert shown_url("s3://bucket/a\x1b[2J") == "'s3://bucket/a\\x1b[2J'"


def test_nothing_but_the_first_failure_is_printed_when_the_process_ends(server, tmp_path):
    url = server.put("a.tar", File(DATA, cut=700_000, times=2))
    bad = server.put("b.tar", File(DATA, cut=700_000, ranges=False))
    code = f"""
import tempfile
from mpp.remote.fetch import Retry, fetch
quick = Retry(attempts=2, wait=0.001, timeout=5)
with tempfile.TemporaryFile() as file:
    print(fetch({url!r}, file, {len(DATA)}, Retry(wait=0.001)))
    try: fetch({bad!r}, file, {len(DATA)}, quick)
    except ValueError as error: print("refused")
"""
    done = subprocess.run([sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(DATA)), "refused"]
    lines = done.stderr.splitlines()
    assert [line.split("; ")[-1] for line in lines] == ["trying again"] * 2
    assert "/a.tar" in lines[0]
    assert "/b.tar" in lines[1]


def test_fetching_works_in_a_forked_process(server, tmp_path):
    url = server.put("a.tar", File(DATA))
    code = f"""
import io, os, tempfile
from mpp.remote.fetch import read_small
assert len(read_small({url!r})) == {len(DATA)}
if os.fork() == 0:
    os._exit(0 if len(read_small({url!r})) == {len(DATA)} else 1)
assert os.wait()[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_interpreter_is_interrupted_at_once(server):
    url = server.put("a.tar", File(DATA, hang=1000))
    code = f"from mpp.remote.fetch import read_small; print(1, flush=True); read_small({url!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not server.counts["/a.tar"]:
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(2)
    _, errors = process.communicate(timeout=20)
    assert errors.strip().endswith("KeyboardInterrupt")
