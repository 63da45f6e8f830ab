"""`mpp compare` by several processes that it starts itself."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_eval_compare import FEW, recipes
from tiny_runs import losses, run, small_splits
from torch import nn

from mpp.eval.compare.chains import Job
from mpp.eval.compare.compare import attempt, compare, share
from mpp.eval.compare.machine import Machine
from mpp.eval.compare.processes import Place, places, relay
from mpp.execution import WORKSPACE
from mpp.extend import imported
from mpp.files import claimed, sealed
from mpp.log import METRICS

ONE_LR = [*FEW, "compare.lrs=[]", "compare.choose_at=null"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    return recipes(folder, small_splits(tmp_path_factory.mktemp("splits")))


def machine(monkeypatch, gpus: int, cores: int, mask: str | None) -> None:
    """Makes this machine one of so many GPUs and cores; a mask hides GPUs that it does not name."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus if mask is None else min(gpus, len(mask.split(","))))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {10 + core for core in range(cores)})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if mask is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)


@pytest.fixture(autouse=True)
def nothing_imported() -> Iterator[None]:
    """What commands import in this process is passed on to those that it starts, by this test alone."""
    yield
    imported.clear()


# Where processes go

UUIDS = "GPU-8f31a2c4-0b1e-11ee-be56-0242ac120002, MIG-5c89852c-d268-c3f3-1b07-005d5ae1dc3f"


@pytest.mark.parametrize(
    ("count", "gpus", "mask", "given", "names"),
    [
        (3, 8, None, ["0", "1", "2"], ["gpu 0", "gpu 1", "gpu 2"]),
        (2, 8, "2,3", ["2", "3"], ["gpu 2", "gpu 3"]),
        (1, 8, "7, 3", ["7"], ["gpu 7"]),
        (2, 8, UUIDS, UUIDS.split(", "), ["gpu 8f31a2c4-0b1", "gpu MIG-5c89852c"]),
    ],
)
def test_each_process_has_one_of_the_gpus_that_may_be_seen(count, gpus, mask, given, names, monkeypatch):
    machine(monkeypatch, gpus, cores=8, mask=mask)
    found = places(count, gpus=True)
    assert [place.environment({"HOME": "/"})["CUDA_VISIBLE_DEVICES"] for place in found] == given
    assert [place.name for place in found] == names
    assert [place.environment({"HOME": "/"})["HOME"] for place in found] == ["/"] * count


def test_cores_are_shared_out_evenly_and_each_once(monkeypatch):
    machine(monkeypatch, gpus=0, cores=7, mask=None)
    found = places(3, gpus=False)
    assert [sorted(place.cores) for place in found] == [[10, 11], [12, 13], [14, 15, 16]]
    assert [place.environment({})["OMP_NUM_THREADS"] for place in found] == ["2", "2", "2"]
    assert not any("CUDA_VISIBLE_DEVICES" in place.environment({}) for place in found)
    for asked, threads in {"1": "1", "64": "2", "": "2", "4,2": "2"}.items():
        assert found[2].environment({"OMP_NUM_THREADS": asked})["OMP_NUM_THREADS"] == threads


def test_more_gpus_than_cores_share_cores_and_more_processes_than_gpus_take_turns(monkeypatch):
    machine(monkeypatch, gpus=4, cores=2, mask=None)
    assert [sorted(place.cores) for place in places(4, gpus=True)] == [[10], [10], [11], [11]]
    machine(monkeypatch, gpus=2, cores=4, mask="5,6")
    found = places(4, gpus=False)
    assert [(place.name, place.gpu) for place in found] == [(f"process {i}", "5656"[i]) for i in range(4)]


@pytest.mark.parametrize(
    ("option", "gpus", "mask", "said"),
    [
        ("--gpus=1", 0, None, "--gpus 1: needs 1 GPU, found none"),
        ("--gpus=3", 2, None, "--gpus 3: needs 3 GPUs, found 2"),
        ("--gpus=3", 8, "2,3", "--gpus 3: needs 3 GPUs, found 2 (CUDA_VISIBLE_DEVICES=2,3)"),
        ("--processes=5", 8, None, "--processes 5: needs as many cores, found 4 that it may run on"),
    ],
)
def test_more_than_the_machine_has_is_one_line(option, gpus, mask, said, recipe, tmp_path, monkeypatch):
    machine(monkeypatch, gpus, cores=4, mask=mask)
    result = run("compare", recipe, f"out={tmp_path / 'out'}", option)
    assert (result.code, result.line) == (2, f"mpp: {said}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--gpus=0"], ["--processes=-1"], ["--gpus=two"], ["--gpus=2", "--processes=2"]])
def test_what_is_no_number_of_processes_is_refused(options, recipe, capsys):
    assert run("compare", recipe, *options).code == 2


# What they do

HOOK = """\
import json, os, signal, sys, time
from pathlib import Path

if "--worker" in sys.argv:
    from mpp import checkpoint

    own, died, save = os.environ["CUDA_VISIBLE_DEVICES"], Path("FOLDER/died"), checkpoint.save
    facts = os.environ["OMP_NUM_THREADS"], sorted(os.sched_getaffinity(0)), os.getcwd() in sys.path
    Path("FOLDER", own).write_text(json.dumps(facts))

    def saved(*arguments):
        save(*arguments)
        if own == "3":  # in its first run
            died.write_text("here")
            os.kill(os.getpid(), signal.SIGKILL)
        while not died.exists():  # so that both have a run at the same time
            time.sleep(0.02)

    checkpoint.save = saved
"""


def steady(results: dict) -> dict:
    """What does not depend on when, and how fast, a comparison was done."""
    costs = [{**cost, "seconds": 0} for cost in results["costs"]]
    return {**results, "created": "", "costs": costs}


def test_two_processes_of_which_one_is_killed_do_all_that_one_does(recipe, tmp_path, monkeypatch):
    hook, alone, shared = tmp_path / "hook.py", tmp_path / "alone", tmp_path / "shared"
    hook.write_text(HOOK.replace("FOLDER", str(tmp_path)))
    (shared / "mpp").mkdir(parents=True)
    (shared / "mpp/__init__.py").write_text("raise SystemExit('of the current folder')")
    alone.mkdir()
    command = ["--import", hook, "compare", recipe, "out=out", *ONE_LR]
    monkeypatch.chdir(alone)  # so that both have the same relative names
    assert run(*command).code == 0
    imported.clear()  # a command of its own
    monkeypatch.chdir(shared)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cores = sorted(os.sched_getaffinity(0))
    result = run(*command, "--gpus", 2)
    assert result.code == 0, result.err
    assert sorted(os.sched_getaffinity(0)) == cores
    one, two = (json.loads((folder / "out/results.json").read_text()) for folder in (alone, shared))
    assert steady(two) == steady(one)
    assert result.out.count("report.html") == 1
    assert result.out.startswith(" "), "the table, and nothing that a process said"

    lines = result.err.splitlines()
    assert all(line.startswith(("mpp: ", "[gpu 2] ", "[gpu 3] ")) for line in lines), result.err
    [early] = [line for line in lines if "ended early" in line]
    assert early.startswith("mpp: gpu 3 ended early, by SIGKILL")
    begun = [line[8:] for line in lines if re.search(r"mpp: .*, seed \d", line)]
    assert (len(begun), len(set(begun))) == (7, 6), "the run of the one that was killed was begun twice"
    assert re.findall(r"(\d) of 6 runs done", result.err) == list("123456")
    for log in shared.rglob("metrics.jsonl"):
        assert losses(log.parent)  # each step once

    half = len(cores) // 2 or 1
    for gpu, part in {"2": cores[:half], "3": cores[half:] or cores}.items():
        threads, allowed, exposed = json.loads((tmp_path / gpu).read_text())
        assert allowed == part
        assert int(threads) <= len(part)
        assert not exposed, "the current folder, from which modules would be run"


def children(pid: int) -> list[int]:
    """The processes that one started and that are still there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def test_a_signal_stops_all_which_save_their_state(recipe, tmp_path):
    """The signal comes twice to a process, as where a scheduler sends it to all processes of a job."""
    out, before = tmp_path / "out", children(os.getpid())
    asked: list[float] = []

    def signalled() -> None:
        deadline = time.monotonic() + 90
        while sum(path.stat().st_size > 0 for path in out.rglob(METRICS)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        asked.append(time.monotonic())
        for pid in [*(pid for pid in children(os.getpid()) if pid not in before), os.getpid()]:
            os.kill(pid, signal.SIGTERM)

    threading.Thread(target=signalled, daemon=True).start()
    long = ["train.steps=100000", "train.save_every=100000", "compare.images=[800000]", "eval.every=100000"]
    result = run("compare", recipe, f"out={out}", *ONE_LR, *long, "log.pictures=0", "--processes", 2)
    assert result.code == 128 + signal.SIGTERM, result.err
    assert time.monotonic() - asked[0] < 15
    assert result.err.splitlines()[-1] == "mpp: stopped"
    assert children(os.getpid()) == before
    for name in ("process 0", "process 1"):
        found = re.search(rf"\[{name}\] mpp: stopped by SIGTERM after step (\d+); run the same command", result.err)
        assert found, result.err
        assert list(out.rglob(f"checkpoints/step-{int(found[1]):08d}/state.json"))
    assert "Traceback" not in result.err
    assert "ended early" not in result.err
    assert len(json.loads((out / "results.json").read_text())["unfinished"]) == 6


CHILD = """
import sys, time
from mpp.errors import terminable
from mpp.eval.compare.processes import leave_with_parent

leave_with_parent()
with terminable():
    try:
        print("here", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("nobody hears this", flush=True)
        open(sys.argv[1], "w").write("saved")
"""
PARENT = """
import subprocess, sys, time

process = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
print(process.stdout.readline().decode().strip(), process.pid, flush=True)
time.sleep(60)
"""


def test_a_process_stops_when_the_one_that_started_it_is_killed(tmp_path):
    command = [sys.executable, "-c", PARENT, CHILD, str(tmp_path / "state")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    here, child = parent.stdout.readline().split()
    assert here == "here"
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break  # whoever has adopted it does not wait for it
        time.sleep(0.02)
    assert (tmp_path / "state").read_text() == "saved"
    parent.stdout.close()


# What is told of them


def test_what_a_process_says_is_passed_on_by_lines_and_of_its_bar_little(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("mpp.eval.compare.processes.time.monotonic", lambda: clock[0])
    read, write = os.pipe()
    thread = threading.Thread(target=relay, args=[os.fdopen(read, "rb"), "gpu 1"])
    thread.start()
    for at, data in {
        1: b"mpp: pre pretrai",
        2: "ning\n\n\rseed-0:  10%|█".encode(),
        3: "| [00:02]\rseed-0:  20%|██| [00:04]\r".encode(),
        70: "seed-0:  30%|███| [01:10]\rseed-0:  31%| [01:11]\rseed-0:  32%| [01:12]mpp: a \x1b[1mword\n".encode(),
        80: "\rseed-0: 100%|█| [01:20]   \nthe end".encode(),
    }.items():
        clock[0] = at
        os.write(write, data)
        time.sleep(0.05)
    os.close(write)
    thread.join()
    assert capsys.readouterr().err.splitlines() == [
        "[gpu 1] mpp: pre pretraining",
        "[gpu 1] seed-0:  30%|███| [01:10]",
        "[gpu 1] seed-0:  32%| [01:12]",
        "[gpu 1] mpp: a \\x1b[1mword",
        "[gpu 1] seed-0: 100%|█| [01:20]",
        "[gpu 1] the end",
    ]


def job(folder: Path, name: str, *needs: str, done: bool = False, work=lambda: None) -> Job:
    result = folder / name / "scores.json"
    if done:
        result.parent.mkdir()
        result.write_bytes(sealed({"images": "some"}, indent=None))
    return Job(name, "finetune", "arm", 0, 1.0, needs, result, work)


def test_what_failed_in_one_process_and_not_in_another_did_not_fail(tmp_path, monkeypatch, capsys):
    jobs = [job(tmp_path, "a", done=True), job(tmp_path, "b"), job(tmp_path, "c", "b"), job(tmp_path, "d", "c")]

    def told(at, words, failures) -> None:
        failures.update({"a": "out of memory", "b": "the loss is nan"})

    monkeypatch.setattr("mpp.eval.compare.compare.share_out", told)
    failures: dict[str, str] = {}
    share(jobs, failures, [Place("gpu 0", frozenset([0]), 1, "0")], ["compare"])
    assert failures == {"b": "the loss is nan", "c": "needs what failed: b", "d": "needs what failed: c"}


def test_runs_that_none_of_the_processes_did_are_counted(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("mpp.eval.compare.compare.share_out", lambda at, words, failures: None)  # all were killed
    result = run("compare", recipe, f"out={tmp_path / 'out'}", *ONE_LR, "--processes", 1)
    assert result.code == 1
    assert result.err.splitlines()[-1] == "mpp: 6 runs not done; run the same command again to go on"


def test_causes_of_failure_reach_the_one_that_started_the_processes(recipe, tmp_path, monkeypatch):
    """By the journal that each writes to: here one, in a process of its own, of a comparison all of which fails."""
    diverging = [
        *ONE_LR,
        "compare.arms.mpp=null",
        "compare.seeds=[0]",
        "train.lr=1e30",
        "train.clip=null",
        "compare.images=[64]",
    ]
    result = run("compare", recipe, f"out={tmp_path / 'out'}", *diverging, "--processes", 1)
    assert result.code == 1
    [failure] = json.loads((tmp_path / "out/results.json").read_text())["failures"]
    assert failure["run"] == "scratch fine-tuning, seed 0, 50 % of the labels"
    assert "the loss is" in failure["error"]
    assert "ended early" not in result.err


# What they share


def test_a_choice_by_measuring_is_made_by_one_while_the_others_wait(tmp_path):
    made, given = [], []

    def measured() -> int:
        made.append(threading.get_ident())
        time.sleep(0.2)
        return len(made)

    threads = [
        threading.Thread(target=lambda: given.append(Machine(tmp_path).once("micro_batch of x", measured)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert given == [1] * 4


def test_a_job_is_one_process_s_until_its_result_is_there(tmp_path, capsys):
    """A run by itself holds its folder only until it is trained; what comes after, scoring, belongs to the job too."""
    asked = []

    def work() -> None:
        with claimed(one.result.parent, "a run"):
            pass
        asked.append(attempt(one, {}, set()))  # as another process would
        one.result.write_bytes(sealed({"images": "some"}, indent=None))

    one = job(tmp_path, "a", work=work)
    assert attempt(one, {}, set())
    assert asked == [False]
    assert not attempt(one, {}, set()), "it was done when this process came to it"
    assert capsys.readouterr().err == "mpp: a\n"


@pytest.mark.parametrize("places", [(), (Place("gpu 0", frozenset([0]), 1, "0"),)])
def test_sums_are_asked_to_be_reproducible_before_anything_computes(places, recipe, tmp_path, monkeypatch):
    """cuBLAS looks once, and a process may begin with a probing or with scores, which ask for nothing."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    found = []
    for name in ("share_out", "carry_out"):
        monkeypatch.setattr(f"mpp.eval.compare.compare.{name}", lambda *_: found.append(os.environ.get(WORKSPACE)))
    for deterministic in ("true", "false"):
        compare(recipe, [f"out={tmp_path / 'out'}", *ONE_LR, f"train.deterministic={deterministic}"], places)
    assert found == [":4096:8", None]
    assert WORKSPACE not in os.environ


class Doubled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return 2 * self.project(rows)


def test_every_run_is_compiled_however_many_were_before(tmp_path, monkeypatch):
    """torch keeps so many graphs of a function, here 2, and carries out what is beyond them uncompiled."""
    graphs: list[int] = []

    def backend(graph, inputs):
        graphs[-1] += 1
        return graph

    def work() -> None:
        graphs.append(0)
        model = Doubled(4 + len(graphs))  # another graph each time
        model.compile(backend=backend)
        model(torch.ones(3, 4 + len(graphs)))

    with torch._dynamo.config.patch(recompile_limit=2):
        failures: dict[str, str] = {}
        for number in range(4):
            assert attempt(job(tmp_path, f"run {number}", work=work), failures, set())
    torch.compiler.reset()
    assert not failures
    assert graphs == [1, 1, 1, 1]
