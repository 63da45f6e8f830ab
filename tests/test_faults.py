"""Data that is missing, broken or hostile, through the command line: passed over by name, or one line and status 2."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from http_server import File, Server, serving
from safetensors.numpy import load, save
from shard_files import image, png, write_tar
from tiny_runs import LABELS, RECIPE, RESNET, Finished, digests, losses, run, small_disk, small_splits, start

from mpp.data.batches import Batches
from mpp.remote.cache import Cache
from mpp.remote.fetch import Retry
from mpp.shards.index import read_index

STEPS = 35  # five epochs of 53 images in batches of 8
STREAMED = (
    RECIPE.replace("path: PATH,", "path: PATH, cache: CACHE, shuffle: window, window: 1, reader: indexed, threads: 1,")
    .replace("steps: 6", f"steps: {STEPS}")
    .replace("micro_batch: 4", "micro_batch: 8")
)
QUICK = Retry(attempts=5, wait=0.05, longest=0.2, timeout=2)


@pytest.fixture
def own(small_shards, tmp_path) -> Path:
    """Shards that the test may damage."""
    return shutil.copytree(small_shards, tmp_path / "own")


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def quick(monkeypatch):
    """Waits of milliseconds between attempts to fetch."""
    monkeypatch.setattr("mpp.data.read.Cache", partial(Cache, retry=QUICK))


@pytest.fixture(scope="module")
def undisturbed(small_shards, tmp_path_factory) -> dict[str, str]:
    """What the last checkpoint holds of a run that met no fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert pretrain(folder, small_shards).code == 0
    return digests(folder / "run", STEPS)


def pretrain(folder: Path, shards: Path | str, *settings: str):
    return run("pretrain", streamed(folder, shards), f"out={folder / 'run'}", *settings)


def streamed(folder: Path, shards: Path | str) -> Path:
    path = folder / "streamed.yaml"
    path.write_text(STREAMED.replace("PATH", str(shards)).replace("CACHE", str(folder / "cache")))
    return path


def written(folder: Path, text: str, shards: Path | str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text.replace("PATH", str(shards)))
    return path


def refused(*arguments: object) -> str:
    """The one line of a command that must exit with status 2."""
    result = run(*arguments)
    assert result.code == 2, result
    lines = [line for line in result.err.replace("\r", "\n").splitlines() if line.startswith("mpp: ")]
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    assert lines[0].isprintable()
    return lines[0]


def put(server: Server, folder: Path, **faults) -> str:
    """Serves a folder of shards, its tars with faults; gives its URL."""
    for path in sorted(folder.iterdir()):
        url = server.put(f"shards/{path.name}", File(path.read_bytes(), **(faults if path.suffix == ".tar" else {})))
    return url.rpartition("/")[0]


def at_step(monkeypatch, step: int, fault) -> None:
    """Lets something happen while the batch of a step is read."""
    read = Batches.at

    def at(self, number):
        if number == step and self.train:
            fault()
        return read(self, number)

    monkeypatch.setattr(Batches, "at", at)


# While training


@pytest.mark.parametrize("fault", ["gone", "cut", "longer", "a folder"])
def test_a_shard_that_changes_while_training_stops_the_run_which_goes_on_once_it_is_mended(
    own, tmp_path, undisturbed, monkeypatch, fault
):
    shard = own / "train-000001.tar"
    data = shard.read_bytes()

    def damage() -> None:
        if fault == "cut":
            os.truncate(shard, 3000)
            return
        shard.unlink()
        if fault == "longer":
            shard.write_bytes(data + bytes(512))
        elif fault == "a folder":
            shard.mkdir()

    with monkeypatch.context() as patch:
        at_step(patch, 7, damage)
        stopped = pretrain(tmp_path, own)
    assert stopped.code == 2, "at the latest when a later epoch opens it again"
    assert "train-000001.tar" in stopped.line
    assert "Traceback" not in stopped.err
    again = pretrain(tmp_path, own)
    assert (again.code, "train-000001.tar" in again.line) == (2, True)
    if fault == "a folder":
        shard.rmdir()
    shard.write_bytes(data)
    assert pretrain(tmp_path, own).code == 0
    assert digests(tmp_path / "run", STEPS) == undisturbed


def test_a_shard_replaced_by_one_of_equal_size_costs_its_images_which_are_named(own, tmp_path, monkeypatch, caplog):
    shard = own / "train-000001.tar"

    def replace() -> None:
        (own / "other").write_bytes(bytes(shard.stat().st_size))
        os.replace(own / "other", shard)

    at_step(monkeypatch, 7, replace)
    assert pretrain(tmp_path, own).code == 0
    index = read_index(own, "train")
    held = {index.key(i) for i in np.flatnonzero(index.shard == 1)}
    named = [record.getMessage() for record in caplog.records if "damaged and passed over" in record.getMessage()]
    assert all("train-000001.tar" in line for line in named)
    assert {line.split("image ")[1].split()[0] for line in named} == held


@pytest.mark.parametrize("back", [True, False])
def test_a_server_that_goes_away_while_training_is_waited_for_and_otherwise_missed_in_one_line(
    small_shards, server, tmp_path, undisturbed, monkeypatch, quick, back
):
    url = put(server, small_shards)

    def lose() -> None:
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "cache").mkdir()
        put(server, small_shards, cut=0, times=2 if back else 10**9)

    with monkeypatch.context() as patch:
        at_step(patch, 7, lose)
        result = pretrain(tmp_path, url)
    if not back:
        last = result.err.replace("\r", "\n").strip().splitlines()[-1]
        assert result.code == 2
        assert last.startswith(f"mpp: {url}/train-00000")
        assert "Traceback" not in result.err
        put(server, small_shards)
        result = pretrain(tmp_path, url)
    assert result.code == 0
    assert digests(tmp_path / "run", STEPS) == undisturbed
    assert not list((tmp_path / "cache").glob("*part"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_server_hangs_ends_the_run_soon_and_it_goes_on(
    small_shards, server, tmp_path, undisturbed, number
):
    url = put(server, small_shards, hang=1000)
    process = start("pretrain", streamed(tmp_path, url), f"out={tmp_path / 'run'}")
    until_asked(server, process)
    process.send_signal(number)
    result = soon(process)
    assert result.code == 128 + number
    assert f"stopped by {number.name}" in result.line
    assert not list((tmp_path / "cache").glob("*part"))
    assert pretrain(tmp_path, put(server, small_shards)).code == 0
    assert digests(tmp_path / "run", STEPS) == undisturbed


def test_a_process_killed_while_it_fetches_leaves_nothing_that_the_next_one_keeps(
    small_shards, server, tmp_path, undisturbed
):
    url = put(server, small_shards, hang=1000)
    process = start("pretrain", streamed(tmp_path, url), f"out={tmp_path / 'run'}")
    until_asked(server, process)
    process.kill()
    process.communicate()
    assert list((tmp_path / "cache").glob("*part"))
    assert pretrain(tmp_path, put(server, small_shards)).code == 0
    assert not list((tmp_path / "cache").glob("*part"))
    assert digests(tmp_path / "run", STEPS) == undisturbed


def test_a_signal_while_the_shards_to_score_on_hang_ends_the_run_soon(server, tmp_path):
    shards = small_splits(tmp_path)
    url = put(server, shards)
    held = shards / "test-000000.tar"
    server.put(f"shards/{held.name}", File(held.read_bytes(), hang=1000))
    path = written(tmp_path, STREAMED.replace("CACHE", str(tmp_path / "cache")) + "eval: {every: 2}\n", url)
    process = start("pretrain", path, f"out={tmp_path / 'run'}", "data.val=test")
    until_asked(server, process, held.name)
    process.send_signal(signal.SIGTERM)
    assert soon(process).code == 128 + signal.SIGTERM
    assert run("pretrain", path, f"out={tmp_path / 'run'}", "data.val=null").code == 2, "it has saved, and goes on"
    put(server, shards)
    assert run("pretrain", path, f"out={tmp_path / 'run'}", "data.val=test").code == 0


def test_ctrl_c_ends_a_prediction_that_waits_for_a_server(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    shards = small_splits(tmp_path)
    assert run("finetune", written(tmp_path, LABELS, shards), f"out={tmp_path / 'run'}").code == 0
    process = start("predict", tmp_path / "run", put(server, shards, hang=1000), "--split", "test")
    until_asked(server, process)
    process.send_signal(signal.SIGINT)
    result = soon(process)
    assert (result.code, result.line) == (130, "mpp: stopped")
    assert not list((tmp_path / "cache" / "shards").glob("*part"))


def soon(process: subprocess.Popen) -> Finished:
    """What a process said that must end within seconds; the servers here hang for 30."""
    try:
        out, err = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"still there after 20 seconds: {process.communicate()[1]}")
    return Finished(process.returncode, out, err)


def until_asked(server: Server, process, name: str = ".tar") -> None:
    """Waits until a tar is being fetched, and some bytes of it have come."""
    end = time.monotonic() + 60
    while not any(path.endswith(name) and count for path, count in server.counts.items()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.3)


def test_a_full_cache_disk_is_one_line_and_the_run_goes_on_where_there_is_room(
    small_shards, server, tmp_path, undisturbed, quick
):
    url = put(server, small_shards)
    with small_disk(tmp_path / "disk", 64) as disk:
        full = pretrain(tmp_path, url, f"data.cache={disk / 'shards'}")
    assert full.code == 2
    assert "the disk is full" in full.err.splitlines()[-1]
    assert "Traceback" not in full.err
    assert pretrain(tmp_path, url).code == 0
    assert digests(tmp_path / "run", STEPS) == undisturbed


def test_a_cache_that_cannot_be_is_named(small_shards, server, tmp_path):
    (tmp_path / "cache").write_text("a file")
    recipe = streamed(tmp_path, put(server, small_shards))
    assert f"{tmp_path / 'cache'}: cannot be made" in refused("pretrain", recipe, f"out={tmp_path / 'run'}")


def test_a_command_that_scores_shards_of_a_failing_server_ends_with_one_line_and_writes_nothing(
    server, tmp_path, quick, monkeypatch
):
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    shards = small_splits(tmp_path)
    out, predictions, vectors = tmp_path / "run", tmp_path / "p.csv", tmp_path / "e.npz"
    assert run("finetune", written(tmp_path, LABELS, shards), f"out={out}").code == 0
    url = put(server, shards, status=403)
    assert "403" in refused("predict", out, url, "--split", "test", "--out", predictions)
    assert "403" in refused("embed", out, url, vectors, "--split", "test")
    assert "403" in refused("probe", out, "--data", url, "--protocol", "knn")
    assert not predictions.exists()
    assert not vectors.exists()


# Tars and images


def labelled(count: int, h: int = 16, w: int = 16, kind=image) -> list[tuple[str, bytes]]:
    ending = "jpg" if kind is image else "png"
    return [
        member
        for i in range(count)
        for member in ((f"{i:04d}.{ending}", kind(i, h=h, w=w)), (f"{i:04d}.cls", str(i % 2).encode()))
    ]


def tars(folder: Path, members: list[tuple[str, bytes]]) -> Path:
    (folder / "tars").mkdir()
    write_tar(folder / "tars" / "train-000000.tar", members)
    return folder / "tars"


def vast_png(side: int = 50_000) -> bytes:
    """A small file of a picture of 7.5 GB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(3 * side + 1) * 20)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_bad_images_are_named_when_indexing_counted_by_check_and_passed_over_in_training(tmp_path, caplog):
    good = image(1, h=16, w=16)
    broken = good[:-40] + b"\xff\xd0" * 10 + good[-20:]
    bad = {"page.jpg": b"<!DOCTYPE html>" * 20, "zero.png": b"", "cut.jpg": good[:300], "vast.png": vast_png()}
    shards = tars(tmp_path, [*labelled(20), *bad.items(), ("a\nb\x1b[2J.jpg", broken)])
    indexed = run("shards", "index", shards)
    assert indexed.code == 0
    assert "25 images in 1 shard, 2 classes, 4 damaged" in indexed.out
    assert all(f"train-000000.tar {name.split('.')[0]}: " in indexed.out for name in bad)
    assert run("pretrain", written(tmp_path, RECIPE, shards), f"out={tmp_path / 'run'}", "train.steps=4").code == 0
    [named] = [record.getMessage() for record in caplog.records if "damaged and passed over" in record.getMessage()]
    assert named.isprintable(), "a name from a tar cannot steer the terminal"
    checked = run("shards", "check", shards, "--mark")
    assert (checked.code, "5 bad" in checked.out, "\x1b" in checked.out) == (1, True, False)
    assert "5 damaged" in run("shards", "stats", shards).out


def test_names_that_lead_out_of_the_folder_are_only_names(tmp_path):
    good = image(1, h=16, w=16)
    names = ["../../out", "/abs/path", "a\nb\x1b[2J", "\udcff\udcfe", "=cmd()"]
    shards = tars(tmp_path, [*labelled(8), *((f"{name}.jpg", good) for name in names)])
    inside, out = {tmp_path}, tmp_path / "run"
    before = set(tmp_path.parent.iterdir())
    assert "13 images" in run("shards", "index", shards).out
    assert run("shards", "check", shards).code == 0
    assert run("finetune", written(tmp_path, LABELS.replace("val: test, ", ""), shards), f"out={out}").code == 0
    for arguments in (
        ("predict", out, shards, "--out", tmp_path / "p.jsonl"),
        ("embed", out, shards, tmp_path / "e.npz"),
    ):
        assert run(*arguments).code == 0
    printed = run("predict", out, shards)
    assert (printed.code, "\x1b" in printed.out) == (0, False)
    keys = [json.loads(line)["key"] for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(keys) == 13
    assert set(tmp_path.parent.iterdir()) == before | inside


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ([("x.jpg", image(1)), ("x.cls", b"NaN")], "have a whole number for a label and 1 have not, such as NaN"),
        ([("x.jpg", image(1)), ("x.cls", b"-5")], "1 have not, such as -5"),
        ([("x.jpg", image(1)), ("x.cls", b"a\nb")], r"1 have not, such as 'a\nb'"),
        ([("0001.jpg", image(1))], "key 0001 occurs 2 times in train"),
    ],
    ids=str,
)
def test_odd_labels_and_keys_that_occur_twice_leave_no_index(tmp_path, extra, words):
    shards = tars(tmp_path, labelled(4) + extra)
    assert words in refused("shards", "index", shards)
    assert [path.name for path in shards.iterdir()] == ["train-000000.tar"]


@pytest.mark.parametrize("kept", [0, 1, 512, 1000, 5000])
def test_a_cut_tar_is_not_indexed(small_shards, tmp_path, kept):
    shard = tmp_path / "train-000000.tar"
    shard.write_bytes((small_shards / shard.name).read_bytes()[:kept])
    line = refused("shards", "index", tmp_path)
    assert str(shard) in line
    assert f"{kept}" in line
    assert list(tmp_path.iterdir()) == [shard]


# Indexes


def hostile(path: Path, arrays: dict[str, object] | None = None, facts: dict[str, object] | str | None = None) -> None:
    """Changes some arrays and facts of an index."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    known = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["mpp"])
    del known["crc32"]  # as earlier versions wrote it: what is not covered by a checksum is looked at as well
    held = load(data) | {name: np.ascontiguousarray(value) for name, value in (arrays or {}).items()}
    path.write_bytes(save(held, {"mpp": facts if isinstance(facts, str) else json.dumps(known | (facts or {}))}))


ARRAYS = {
    "a shard that is not there": {"shard": np.full(53, 7, np.int32)},
    "a negative place": {"offset": np.full(53, -512)},
    "sums beyond 64 bits": {"offset": np.full(53, 2**62), "size": np.full(53, 2**62)},
    "a label beyond the classes": {"label": np.full(53, 2, np.int32)},
    "a label below -1": {"label": np.full(53, -2, np.int32)},
    "keys that end before they start": {"key_ends": np.arange(53)[::-1]},
    "keys beyond their text": {"key_ends": np.arange(53) + 2**40},
    "no numbers": {"size": np.full(53, np.nan)},
    "two columns": {"height": np.ones((53, 2), np.int32)},
    "fewer": {"crc32": np.zeros(5, np.uint32)},
}
SHARDS = [f"train-00000{i}.tar" for i in range(3)]
FACTS = {
    "a file elsewhere": {"shards": ["../../etc/passwd", *SHARDS[1:]]},
    "a whole path": {"shards": ["/etc/passwd", *SHARDS[1:]]},
    "a name without end": {"shards": ["x" * 5000, *SHARDS[1:]]},
    "a name that steers the terminal": {"shards": ["\x1b[2J\n.tar", *SHARDS[1:]]},
    "a command": {"shards": ["pipe:touch here", *SHARDS[1:]]},
    "a size beyond all": {"shard_bytes": [10**30] * 3},
    "sizes that are texts": {"shard_bytes": ["1", "2", "3"]},
    "a list without end": "[" * 100_000,
    "no object": "[]",
}


@pytest.mark.parametrize("arrays", ARRAYS.values(), ids=ARRAYS)
def test_an_index_with_impossible_arrays_is_one_line(own, tmp_path, arrays):
    hostile(own / "train-index.safetensors", arrays)
    assert "train-index.safetensors" in refused("pretrain", written(tmp_path, RECIPE, own), f"out={tmp_path / 'run'}")


@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS)
def test_an_index_with_hostile_names_is_one_line_and_nothing_is_opened(own, tmp_path, monkeypatch, facts):
    monkeypatch.chdir(tmp_path)
    hostile(own / "train-index.safetensors", facts=facts)
    refused("pretrain", written(tmp_path, RECIPE, own), f"out={tmp_path / 'run'}")
    assert not (tmp_path / "here").exists()


def test_the_index_of_another_set_is_refused_with_both_sizes(own, tmp_path):
    shards = tars(tmp_path, labelled(8))
    shutil.copy(own / "train-index.safetensors", shards)
    sizes = [path.stat().st_size for path in (shards / SHARDS[0], own / SHARDS[0])]
    line = refused("pretrain", written(tmp_path, RECIPE, shards), f"out={tmp_path / 'run'}")
    assert f"{SHARDS[0]}: {sizes[0]} bytes, the index says {sizes[1]}" in line


# Recipes


@pytest.mark.parametrize(
    "settings",
    [
        "data.cache=5",
        "data.cache_gib=0",
        "data.cache_gib=.nan",
        "data.allow=[shell]",
        "data.shuffle=none",
        "data.window=0",
        "data.window=1.5",
        "data.hold_out=1.0",
        "data.hold_out=1e-12",
        "data.hold_out=0.9999999",
        "data.last_batch=short",
        "data.sampling=balanced",
        "data.sampling=classes data.shuffle=window",
        "data.weight=0",
        "data.weight=4611686018427387904 data.mix.a.path=SHARDS",
        "data.mix.a.path=SHARDS data.mix.a.weight=0",
        "data.mix.a.path=SHARDS data.mix.a.weigth=1",
        "data.mix.a=5",
        "data.prepare=gpu",
        "data.last_batch=dropped train.batch=64 train.micro_batch=64",
    ],
)
def test_a_mistake_in_the_data_section_is_one_line_that_names_it(small_shards, tmp_path, settings):
    recipe = written(tmp_path, RECIPE, small_shards)
    line = refused(
        "pretrain", recipe, f"out={tmp_path / 'run'}", *settings.replace("SHARDS", str(small_shards)).split()
    )
    names = [setting.split("=")[0] for setting in settings.split()] + ["make no batch of 64"]
    assert any(name in line for name in names), line


def test_data_sets_that_are_not_there_or_of_another_kind_are_named(small_shards, tmp_path):
    grey = tmp_path / "grey"
    assert run("shards", "make", "digits", grey, "--mode", "L").code == 0
    recipe, out = written(tmp_path, RECIPE, small_shards), f"out={tmp_path / 'run'}"
    assert f"{grey} L" in refused("pretrain", recipe, out, f"data.mix.a.path={grey}")
    assert "data.mix.a.path: missing" in refused("pretrain", recipe, out, "data.mix.a.weight=1")
    assert "/nowhere: no such folder" in refused("pretrain", recipe, out, "data.mix.a.path=/nowhere")
    bare = tars(tmp_path, labelled(8)[::2])
    assert run("shards", "index", bare).code == 0
    assert "no labels" in refused("pretrain", recipe, out, f"data.path={bare}", "data.sampling=classes")


@pytest.mark.parametrize(
    "setting", ["data.window=2", "data.hold_out=0.2", "data.last_batch=kept", "data.mix.a.path=OWN"]
)
def test_going_on_with_another_reading_is_refused_with_the_key(own, tmp_path, setting):
    assert pretrain(tmp_path, own, "train.steps=2").code == 0
    setting = setting.replace("OWN", str(own))
    recipe = streamed(tmp_path, own)
    line = refused("pretrain", recipe, f"out={tmp_path / 'run'}", "train.steps=2", setting)
    assert f"holds a run of another recipe ({setting.split('=')[0]}: " in line


def test_going_on_with_a_set_that_has_grown_is_refused_with_both_counts(own, tmp_path):
    assert pretrain(tmp_path, own, "train.steps=2").code == 0
    write_tar(own / "train-000003.tar", labelled(6))
    assert run("shards", "index", own).code == 0
    line = refused("pretrain", streamed(tmp_path, own), f"out={tmp_path / 'run'}", "train.steps=2")
    assert "53 images" in line
    assert "59 images" in line


@pytest.mark.parametrize("verb", ["check", "stats"])
def test_what_looks_at_every_image_wants_a_folder_and_says_so_of_a_url(small_shards, server, verb):
    url = put(server, small_shards)
    line = refused("shards", verb, url)
    assert url in line
    assert "shards make" not in line


# Odd sizes


@pytest.mark.parametrize(
    ("verb", "text", "settings"),
    [
        ("pretrain", RECIPE, ["train.micro_batch=8"]),
        ("pretrain", RECIPE, ["train.micro_batch=2"]),
        ("finetune", LABELS, ["train.micro_batch=4", "objective.mixup=0.8", "objective.cutmix=1.0"]),
    ],
)
def test_a_last_batch_of_one_image_is_trained_on(tmp_path, verb, text, settings):
    shards = tars(tmp_path, labelled(9))
    run("shards", "index", shards)
    recipe = written(tmp_path, text.replace("val: test, ", ""), shards)
    assert run(verb, recipe, f"out={tmp_path / 'run'}", "data.last_batch=kept", *settings).code == 0
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


def test_a_last_batch_of_one_image_that_batch_norm_would_see_is_one_line_before_training(tmp_path):
    shards = tars(tmp_path, labelled(9))
    run("shards", "index", shards)
    recipe, out = written(tmp_path, RESNET.replace("val: test, ", ""), shards), tmp_path / "run"
    assert "data.last_batch: kept" in refused("finetune", recipe, f"out={out}", "data.last_batch=kept")
    kept = ["data.last_batch=kept", "train.batch=6", "train.micro_batch=6"]
    assert run("finetune", recipe, f"out={out}", *kept).code == 0
    assert sorted(losses(out)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("last", ["chained", "kept"])
@pytest.mark.parametrize(("count", "h", "w"), [(1, 16, 16), (3, 1, 1), (3, 1, 2000)])
def test_one_image_images_of_one_pixel_and_batches_larger_than_the_set(tmp_path, count, h, w, last):
    shards = tars(tmp_path, labelled(count, h, w, png))
    run("shards", "index", shards)
    out = tmp_path / "run"
    assert run("pretrain", written(tmp_path, RECIPE, shards), f"out={out}", f"data.last_batch={last}").code == 0
    assert len(losses(out)) == 6
    assert run("embed", out, shards, tmp_path / "e.npz").code == 0
    with np.load(tmp_path / "e.npz") as vectors:
        assert len(vectors["features"]) == count


def test_a_reader_that_has_seen_enough_is_no_error():
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "mpp", "recipes"]
    found = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, check=False)
    os.close(theirs)
    assert (found.returncode, found.stderr) == (1, "")
