"""Faults of the system around a run: threads that raise, signals in system calls, network file systems, rights."""

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import every_fault
import numpy as np
import pytest
from conftest import picture_folder
from every_fault import as_process, call, imported, tried
from http_server import File, serving
from tiny_runs import digests, run, write_recipe
from tqdm import tqdm

from mpp.data import batches as batches_module
from mpp.data.batches import Batches
from mpp.data.config import DataConfig
from mpp.data.order import Chain
from mpp.data.read import open_batches, read_shards
from mpp.remote.cache import Cache
from mpp.remote.fetch import Retry, read_small
from mpp.shards import pictures
from mpp.shards.index import read_index
from mpp.shards.pictures import Indexed, Shards
from mpp.shards.tar import Bytes

SOON = 1.0  # seconds


# Threads that raise


class OursToMend(Exception):
    """What a bug raises."""


def bug(*_: object, **__: object) -> None:
    raise OursToMend("in a thread")


def soon(work) -> OursToMend:
    """The error that comes out of `work` as itself, within a second, with the place where it was raised."""
    before = set(threading.enumerate())
    started = time.monotonic()
    with pytest.raises(OursToMend, match="in a thread") as caught:
        work()
    assert time.monotonic() - started < SOON
    assert "in bug" in "".join(traceback.format_exception(caught.value)), "the traceback leads to the bug"
    end = time.monotonic() + 5
    while left := [one for one in set(threading.enumerate()) - before if one.name.startswith("read ahead")]:
        assert time.monotonic() < end, left
        time.sleep(0.01)
    return caught.value


@pytest.mark.parametrize("reader", ["resident", "indexed"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (pictures, "decode_first"),
        (batches_module, "apply"),
        (batches_module, "training_plan"),
        (Chain, "at"),
        (Shards, "read_at"),
        (Indexed, "wrong"),
        (Batches, "_labels"),
        (Batches, "_batch"),
    ],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_a_bug_in_a_thread_that_reads_comes_out_as_itself_at_once(
    small_shards, monkeypatch, owner, name, threads, reader
):
    batches = read_shards(small_shards, 8, reader=reader, threads=threads, shuffle="window", window=2)
    steps = batches.iterate()
    next(steps)
    monkeypatch.setattr(owner, name, bug)
    monkeypatch.setattr(batches._images, "_approved", np.zeros(len(batches.index), bool))
    if hasattr(batches._images, "_kept"):
        monkeypatch.setattr(batches._images, "_kept", [None] * len(batches.index))
    soon(lambda: [next(steps) for _ in range(5)])


def test_a_bug_while_shards_are_brought_near_is_not_lost(small_shards, monkeypatch):
    batches = read_shards(small_shards, 8, shuffle="window", window=1, reader="indexed")
    monkeypatch.setattr(Shards, "_bring", bug)
    soon(lambda: [batch for batch, _ in zip(batches.iterate(), range(20), strict=False)])


def test_a_bug_in_a_thread_that_makes_pictures_on_a_device_comes_out(small_shards, monkeypatch):
    import torch

    index = read_index(small_shards, "train")
    batches = open_batches([index], 8, DataConfig(path=str(small_shards), reader="indexed"), device=torch.device("cpu"))
    monkeypatch.setattr("mpp.data.on_device.decoded_to", bug)
    monkeypatch.setattr("mpp.data.on_device.augment", bug)
    soon(lambda: next(batches.iterate()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures") / "source", 12)


@pytest.mark.parametrize(
    ("place", "arguments"),
    [
        ("mpp.shards.prepare.decode", ("shards", "make", "SOURCE", "OUT/made")),
        ("mpp.shards.build.scan_shard", ("shards", "index", "TARS")),
        ("mpp.shards.pictures.decode_first", ("shards", "check", "TARS")),
        ("mpp.shards.stats.decode", ("shards", "stats", "TARS")),
    ],
)
def test_a_bug_in_a_thread_of_a_command_comes_out(place, arguments, folder, small_shards, tmp_path, monkeypatch):
    tars = shutil.copytree(small_shards, tmp_path / "tars")
    names = {"SOURCE": str(folder), "OUT": str(tmp_path), "TARS": str(tars)}
    words = []
    for word in arguments:
        for name, value in names.items():
            word = word.replace(name, value)
        words.append(word)
    monkeypatch.setattr(place, bug)
    soon(lambda: run(*words))


def test_a_bug_while_fetching_is_not_taken_for_a_failing_server(small_shards, tmp_path, monkeypatch):
    """What libraries raise is tried again for a minute; what our own code raises by mistake is not."""
    with serving() as server:
        data = (small_shards / "train-000000.tar").read_bytes()
        url = server.put("x.tar", File(data))
        cache = Cache(tmp_path / "cache", 2**30, retry=Retry(attempts=5, wait=10))
        os.close(cache.open(url, len(data)))
        monkeypatch.setattr("mpp.remote.streams._more", None)  # calling it is a TypeError
        started = time.monotonic()
        cache.drop(url, len(data))
        with pytest.raises(TypeError):
            cache.open(url, len(data))
        assert time.monotonic() - started < SOON
        assert not list((tmp_path / "cache").glob("*part"))


# Signals in system calls


def test_a_signal_a_millisecond_changes_nothing(tmp_path, folder):
    """EINTR: a timer interrupts whatever system call the main thread is in, as a profiler or a resized window does."""
    found = {}
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        for name, interval in {"calm": 0.0, "often": 0.001}.items():
            out = tmp_path / name
            signal.setitimer(signal.ITIMER_REAL, interval, interval)
            assert run("shards", "make", folder, out / "shards").code == 0
            recipe = write_recipe(out, out / "shards")
            assert run("pretrain", recipe, f"out={out / 'run'}", "data.reader=indexed", "data.threads=2").code == 0
            assert run("embed", out / "run", out / "shards", out / "e.npz").code == 0
            signal.setitimer(signal.ITIMER_REAL, 0)
            found[name] = digests(out / "run", 6), (out / "e.npz").read_bytes()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert found["often"] == found["calm"]


# Network file systems


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(pictures, "WAITS", (0.01, 0.01, 0.01, None))


def faulty_reads(monkeypatch, fault) -> None:
    """Puts `fault(number of the call, bytes)` before what a read gives; it may raise."""
    read, count = os.pread, [0]

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        count[0] += 1
        return fault(count[0], read(descriptor, size, offset))

    monkeypatch.setattr(os, "pread", pread)


def all_batches(shards: Path) -> list[bytes]:
    batches = read_shards(shards, 8, reader="indexed", threads=1)
    return [batches.at(step).images.numpy().tobytes() for step in range(7)]


def test_a_file_system_that_gives_a_part_at_a_time_gives_the_same_pictures(small_shards, tmp_path, monkeypatch):
    expected = all_batches(small_shards)
    tars = shutil.copytree(small_shards, tmp_path / "tars")
    index = (tars / "train-index.safetensors").read_bytes()
    faulty_reads(monkeypatch, lambda number, data: data[: max(1, len(data) * (number % 3 + 1) // 4)] if data else data)
    assert all_batches(small_shards) == expected
    assert run("shards", "index", tars).code == 0
    assert (tars / "train-index.safetensors").read_bytes() == index
    file = Bytes(small_shards / "train-000000.tar")
    assert file.read(0, file.size) == (small_shards / "train-000000.tar").read_bytes()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN])
def test_a_read_that_fails_now_and_then_is_tried_again(small_shards, monkeypatch, impatient, number):
    expected = all_batches(small_shards)

    def fault(count: int, data: bytes) -> bytes:
        if count % 5 in (0, 1):
            raise OSError(number, os.strerror(number))
        return data

    faulty_reads(monkeypatch, fault)
    assert all_batches(small_shards) == expected


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_reads_that_fail_for_good_stop_a_run_with_one_line_and_it_goes_on(
    small_shards, tmp_path, monkeypatch, impatient, number
):
    recipe, settings = write_recipe(tmp_path, small_shards), ["data.reader=indexed", "data.threads=2"]
    assert run("pretrain", recipe, f"out={tmp_path / 'whole'}", *settings).code == 0

    def fault(count: int, data: bytes) -> bytes:
        if count > 30:
            raise OSError(number, os.strerror(number))
        return data

    with monkeypatch.context() as patch:
        faulty_reads(patch, fault)
        stopped = run("pretrain", recipe, f"out={tmp_path / 'run'}", *settings)
    assert stopped.code == 2
    assert f".tar: cannot be read: {os.strerror(number)}" in stopped.line
    assert run("pretrain", recipe, f"out={tmp_path / 'run'}", *settings).code == 0
    assert digests(tmp_path / "run", 6) == digests(tmp_path / "whole", 6)


def test_reads_that_take_long_are_waited_for_and_the_next_ones_wait_beside_them(small_shards, monkeypatch):
    expected = all_batches(small_shards)

    def slow(count: int, data: bytes) -> bytes:
        time.sleep(0.3 if count == 5 else 0)
        return data

    faulty_reads(monkeypatch, slow)
    assert all_batches(small_shards) == expected


STUCK = """
import os, sys, time
read, count = os.pread, 0
def pread(*arguments):
    global count
    count += 1
    if count > 4:
        print("stuck", file=sys.stderr, flush=True)
        time.sleep(100)
    return read(*arguments)
os.pread = pread
from mpp.cli import main
main()
"""


def test_ctrl_c_ends_a_command_whose_reads_hang_for_ever(small_shards):
    """As on a network file system that is gone. Python itself would wait for the threads."""
    command = [sys.executable, "-c", STUCK, "shards", "check", str(small_shards)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    said = ""
    while "stuck" not in said:
        said += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    try:
        _, rest = process.communicate(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 130
    assert rest.strip().splitlines()[-1].startswith("mpp: stopped")
    assert "Traceback" not in rest


# Each place where a command writes


@pytest.fixture(scope="module")
def everything() -> Iterator[Path]:
    """What commands read, where any user may, and each carried out once: what a fork needs is imported."""
    root = Path(tempfile.mkdtemp(prefix="mpp-faults-"))
    root.chmod(0o755)
    try:
        imported(root)
        yield root
    finally:
        shutil.rmtree(root)


@pytest.fixture(autouse=True)
def no_warning_of_forks():
    tqdm.monitor_interval, before = 0, tqdm.monitor_interval
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks of a process with threads: those of the tests before have ended
        yield
    tqdm.monitor_interval = before


@pytest.mark.parametrize("fault", every_fault.FAULTS)
@pytest.mark.parametrize(("name", "stride"), [("embed", 2), ("check", 4)])
def test_a_fault_at_any_place_leaves_nothing_half_done(name, stride, fault, everything):
    """A sample; `python tests/every_fault.py FOLDER` tries all places of all commands."""
    met = tried(everything, name, fault, stride, first=1 + every_fault.FAULTS.index(fault) % stride)
    assert {one.code for one in met} <= ({-9} if fault == "killed" else {0, 2})
    assert met


# An ordinary user


def nobody(said: Path, arguments: list[str], environment: dict[str, str | None]) -> int:
    """Carries out a command as a user without rights, in a fork: its status. What it says goes to a file."""
    process = os.fork()
    if process == 0:
        as_process(said)
        os.chdir("/")
        status = 70
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(54321)  # of no entry in /etc/passwd, as in many containers
            for name, value in environment.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            status = call(list(arguments))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, ended = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(ended)


def serve(root: Path) -> None:
    """Lets commands that come as JSON lines be carried out by nobody: a process of its own for that, since after what
    other tests did torch refuses to train in a fork."""
    imported(root)
    if importlib.util.find_spec("aiohttp"):
        with serving() as server:
            read_small(server.put("any", File(b"")))  # imports what nobody may not
    warnings.simplefilter("ignore")
    tqdm.monitor_interval = 0
    print("ready", flush=True)
    for line in sys.stdin:
        said, arguments, environment = json.loads(line)
        print(nobody(Path(said), arguments, environment), flush=True)


@pytest.fixture(scope="module")
def as_nobody(everything) -> Iterator[Callable[..., tuple[int, str]]]:
    """Carries out a command as a user without rights: its status, and what it said."""
    with subprocess.Popen(
        [sys.executable, __file__, everything], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        while (line := server.stdout.readline().strip()) != "ready":
            assert line or server.poll() is None
        answers, requests = server.stdout, server.stdin

        def ask(folder: Path, *arguments: object, **environment: str | None) -> tuple[int, str]:
            said = folder / "said"
            print(json.dumps([str(said), [str(one) for one in arguments], environment]), file=requests, flush=True)
            return int(answers.readline()), said.read_text().replace("\r", "\n")

        yield ask
        requests.close()


@pytest.fixture
def given(everything) -> Iterator[Path]:
    """Copies of what commands read, whose rights a test may take, and a folder `out` for anybody."""
    root = everything / "given"
    root.mkdir()
    for name in ("shards", "source", "run"):
        shutil.copytree(everything / name, root / name)
    for name in ("mpp.yaml", "labels.yaml"):
        (root / name).write_text((everything / name).read_text().replace(str(everything), str(root)))
    (root / "out").mkdir()
    (root / "out").chmod(0o777)
    (root / "closed").mkdir(mode=0o755)
    if os.getuid():
        (root / "closed").chmod(0o555)
    yield root
    for path in [root, *root.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(root)


def verbs(root: Path, out: str = "out") -> dict[str, list[object]]:
    run, shards, to = root / "run", root / "shards", root / out
    return {
        "pretrain": ["pretrain", root / "mpp.yaml", f"out={to / 'run'}"],
        "finetune": ["finetune", root / "labels.yaml", f"out={to / 'tuned'}", "--from", run],
        "predict": ["predict", run, shards, "--split", "test", "--out", to / "p.jsonl"],
        "folder": ["predict", run, root / "source", "--split", "test", "--out", to / "q.jsonl"],
        "embed": ["embed", run, shards, to / "e.npz", "--split", "test"],
        "probe": ["probe", run, "--data", shards, "--protocol", "knn", "--json", to / "k.json"],
        "convert": ["convert", run, to / "timm", "--to", "timm"],
        "check": ["shards", "check", shards],
        "stats": ["shards", "stats", shards, "--json", to / "s.json"],
        "make": ["shards", "make", root / "source", to / "made"],
        "index": ["shards", "index", shards],
    }


READ_SHARDS = ("pretrain", "finetune", "probe", "check", "stats", "index")
READ_RUN = ("finetune", "predict", "embed", "probe", "convert")


@pytest.mark.parametrize(
    ("closed", "mode", "names", "words"),
    [
        ("shards/train-000000.tar", 0, READ_SHARDS, "shards/train-000000.tar: cannot be read: "),
        (
            "shards/train-index.safetensors",
            0,
            READ_SHARDS[:-1],
            "train-index.safetensors: cannot be read: ",
        ),
        ("shards", 0, READ_SHARDS, "shards"),
        ("shards", 0o644, READ_SHARDS, "shards"),
        ("shards", 0o311, ("check", "stats", "index", "predict"), "shards: cannot be read: "),
        ("run", 0, READ_RUN, "run: cannot be read: "),
        (
            "run/classifier.safetensors",
            0,
            ("predict", "convert"),
            "classifier.safetensors: not readable as",
        ),
        (
            "run/encoder.safetensors",
            0,
            ("finetune", "embed"),
            "encoder.safetensors: not readable as",
        ),
        ("mpp.yaml", 0, ("pretrain",), "mpp.yaml: cannot be read: "),
        ("source/test/class0", 0, ("make", "folder"), "source/test/class0: cannot be read: "),
        ("source/test/class0", 0o644, ("make",), "class0"),
    ],
)
def test_what_may_not_be_read_is_one_line_that_says_so(closed, mode, names, words, given, as_nobody):
    (given / closed).chmod(mode)
    for name in names:
        code, said = as_nobody(given, *verbs(given)[name])
        lines = [line for line in said.splitlines() if line.startswith("mpp: ")]
        assert (code, "Traceback" in said) == (2, False), (name, said)
        assert words in lines[-1], (name, said)
        assert "Permission denied" in lines[-1], (name, said)
        assert str(given / closed).lstrip("/") in lines[-1], (name, said)


def test_where_nothing_may_be_written_each_command_says_so_in_one_line(given, as_nobody):
    for name, words in verbs(given, "closed").items():
        if name == "check":
            continue
        if name == "index":
            (given / "shards").chmod(0o555)
        code, said = as_nobody(given, *words)
        assert (code, "Traceback" in said) == (2, False), (name, said)
        assert "Permission denied" in said.splitlines()[-1], (name, said)
    assert list((given / "closed").iterdir()) == []


def test_a_picture_that_may_not_be_read_is_left_out_by_name(given, as_nobody):
    photo = next((given / "source/test").rglob("*.jpg"))
    photo.chmod(0)
    for name in ("make", "folder"):
        code, said = as_nobody(given, *verbs(given)[name])
        assert code == 0, said
        assert f"{photo.name}: " in said
        assert "cannot be read: Permission denied" in said


def test_read_only_data_and_no_home_are_enough_to_work(given, as_nobody):
    for path in [given / "shards", given / "source", given / "run"]:
        path.chmod(0o555)
    for name, words in verbs(given).items():
        if name != "index":
            code, said = as_nobody(given, *words, HOME=None, MPP_CACHE=None)
            assert (code, "Traceback" in said) == (0, False), (name, said)


def test_shards_by_url_without_a_home_ask_for_a_folder(given, as_nobody):
    pytest.importorskip("aiohttp")
    with serving() as server:
        for path in (given / "shards").iterdir():
            url = server.put(f"s/{path.name}", File(path.read_bytes())).rpartition("/")[0]
        words = ["pretrain", given / "mpp.yaml", f"out={given / 'out/run'}", f"data.path={url}"]
        code, said = as_nobody(given, *words, HOME=None, MPP_CACHE=None)
        assert code == 2, said
        assert "set MPP_CACHE to a folder" in said.splitlines()[-1]
        assert as_nobody(given, *words, f"data.cache={given / 'out/cache'}", HOME=None, MPP_CACHE=None)[0] == 0


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
