import json
import multiprocessing
import os
import signal
import stat
import threading
from pathlib import Path

import pytest

from mpp.files import BusyError, FileError, cache_folder, claimed, sealed, temporary, unsealed, write_atomically

SIZES = {b"a": 200_000, b"b": 100_000}


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("MPP_CACHE", str(tmp_path))
    assert cache_folder("features") == tmp_path / "features"
    monkeypatch.delenv("MPP_CACHE")
    assert cache_folder("shards") == Path.home() / ".cache" / "mpp" / "shards"


# One file and several writers


def write_often(path, letter, times, start, found) -> None:
    start.wait()
    failed = mixed = 0
    for _ in range(times):
        try:
            write_atomically(path, letter * SIZES[letter])
        except FileError:
            failed += 1
        data = path.read_bytes()
        mixed += len(set(data)) > 1 or len(data) not in SIZES.values()
    found.put((failed, mixed))


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_several_writers_of_one_file_all_write_it_whole(kind, tmp_path):
    fork = multiprocessing.get_context("fork")
    start, found = (fork.Barrier(3), fork.Queue()) if kind == "processes" else (threading.Barrier(3), fork.Queue())
    worker = fork.Process if kind == "processes" else threading.Thread
    arguments = [(tmp_path / "results.json", letter, 100, start, found) for letter in (b"a", b"b", b"a")]
    workers = [worker(target=write_often, args=each) for each in arguments]
    for one in workers:
        one.start()
    assert [found.get(timeout=60) for _ in workers] == [(0, 0)] * 3
    for one in workers:
        one.join()
    assert os.listdir(tmp_path) == ["results.json"]


def test_what_a_killed_writer_left_is_removed_by_the_next_one_and_what_a_living_one_writes_is_not(tmp_path):
    path = tmp_path / "results.json"
    child = os.fork()
    if child == 0:
        with temporary(tmp_path, ".results.json.") as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(os.listdir(tmp_path)) == 1
    (tmp_path / ".results.json.notes").write_text("of somebody else")
    with temporary(tmp_path, ".results.json.") as living:
        write_atomically(path, b"whole")
        assert sorted(os.listdir(tmp_path)) == sorted([".results.json.notes", "results.json", Path(living.name).name])
    assert sorted(os.listdir(tmp_path)) == [".results.json.notes", "results.json"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_new_file(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


@pytest.mark.parametrize("name", ["x" * 255, "\u00e4" * 127, "[a]*?", ".hidden"])
def test_any_name_that_a_file_can_have_can_be_written(name, tmp_path):
    for data in (b"first", b"second"):
        write_atomically(tmp_path / name, data)
        assert (tmp_path / name).read_bytes() == data
    assert os.listdir(tmp_path) == [name]


def test_a_pipe_is_written_into_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_atomically(tmp_path / "pipe", b"figures")
    reader.join(10)
    assert got == [b"figures"]
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_in_the_way_is_one_line_and_nothing_is_left(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(FileError, match=r"results.json: cannot be written: Is a directory"):
        write_atomically(tmp_path / "results.json", b"x")
    assert os.listdir(tmp_path) == ["results.json"]


# Sealed files


@pytest.mark.parametrize("indent", [None, 1])
def test_a_flipped_bit_in_any_byte_of_a_sealed_file_is_noticed(indent, tmp_path):
    facts = {"figures": [1, 0.1, None, True, 1e-300], "names": {"\u00e4": "\udcff", "checksums": ""}, "n": 10**30}
    path = tmp_path / "file"
    path.write_bytes(sealed(facts, indent))
    assert unsealed(path, indent) == facts
    assert {**facts, "checksum": json.loads(path.read_text())["checksum"]} == json.loads(path.read_text())
    data = path.read_bytes()
    for place in range(0, 8 * len(data), 3):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError):  # noqa: PT011  # whatever the words
            unsealed(path, indent)
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError):  # noqa: PT011
            unsealed(path, indent)


# Folders that one process holds


def test_a_claimed_folder_is_refused_to_others_and_gone_afterwards_if_it_stayed_empty(tmp_path):
    inner = tmp_path / "a" / "b"
    with claimed(inner, "busy"), pytest.raises(BusyError, match="a/b: busy"), claimed(inner, "busy"):
        pass
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    with claimed(inner, "busy"):
        (inner / "file").touch()
    assert [path.name for path in inner.iterdir()] == ["file"]


def claim_often(folder, start, found) -> None:
    start.wait()
    wrong = ""
    for _ in range(150):
        try:
            with claimed(folder, "busy"):
                pass
        except BusyError:
            continue
        except Exception as error:
            wrong = repr(error)
    found.put(wrong)


def test_two_that_claim_a_folder_that_goes_away_in_between_never_fail(tmp_path):
    fork = multiprocessing.get_context("fork")
    start, found = fork.Barrier(2), fork.Queue()
    workers = [fork.Process(target=claim_often, args=(tmp_path / "a" / "b", start, found)) for _ in range(2)]
    for one in workers:
        one.start()
    assert [found.get(timeout=60) for _ in workers] == ["", ""]
    for one in workers:
        one.join()
