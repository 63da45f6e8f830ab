"""Commands carried out with a fault at one place, then at the next, until they meet none: FOLDER [COMMAND ...].

The places are the calls by which a command opens, writes, syncs, renames, locks and makes files in its own folder, in
their order. At place k the process is killed (-9), one call fails (EIO), or all do from there on (ENOSPC, as on a disk
that is full and stays so). After an error there must be one line and status 2, or the result of an undisturbed run if
it could be done without; never a traceback. The same command again must then leave what an undisturbed one leaves, byte
for byte. Children are forks, which have torch imported already.
"""

import builtins
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import picture_folder
from tiny_runs import LABELS, RECIPE
from tqdm import tqdm

FAULTS = ("killed", "one error", "full disk")
CALLS = [(os, name) for name in ("fsync", "replace", "rename", "mkdir", "open", "ftruncate")] + [(fcntl, "flock")]
OTHER = {"images/s", "waiting", "memory"}  # of metrics.jsonl: differ from run to run
SKIPPED = (".lock", "events.out", ".machine.lock", "report.html")


STRIDE = {"compare": 11}  # places of those that have hundreds
COMPARE = """\
base: labels.yaml
compare:
  arms: {scratch: {finetune: labels}, mpp: {pretrain: before, finetune: labels}}
  seeds: [0]
  protocols: [finetune, knn]
"""


class Met(NamedTuple):
    """How a command with a fault at a place ended."""

    fault: str
    place: int
    call: str
    code: int  # negative for a signal
    said: str


def commands(root: Path) -> dict[str, Callable[[Path], list[object]]]:
    """Each command by name, for a folder of its own that it writes to; makes what they read."""
    shards, source = root / "shards", root / "source"
    if not source.exists():
        for split, count in {"train": 24, "test": 8}.items():
            picture_folder(source / split, count)
        (root / "mpp.yaml").write_text(RECIPE.replace("PATH", str(shards)).replace("steps: 6", "steps: 4"))
        (root / "labels.yaml").write_text(LABELS.replace("PATH", str(shards)).replace("steps: 6", "steps: 4"))
        (root / "before.yaml").write_text((root / "mpp.yaml").read_text().replace("depth: 1", "depth: 2, pool: avg"))
        (root / "compare.yaml").write_text(COMPARE)
        call(["shards", "make", source, shards, "--per-shard", "10"])
        call(["finetune", root / "labels.yaml", f"out={root / 'run'}"])
    run, test = root / "run", ("--split", "test")
    return {
        "make": lambda out: ["shards", "make", source, out / "made", "--per-shard", "10"],
        "index": lambda out: ["shards", "index", copied(shards, out / "tars", "*.tar")],
        "pretrain": lambda out: ["pretrain", root / "mpp.yaml", f"out={out / 'run'}"],
        "finetune": lambda out: ["finetune", root / "labels.yaml", f"out={out / 'run'}", "--from", run],
        "predict": lambda out: ["predict", run, shards, *test, "--out", out / "p.jsonl", "--json", out / "s.json"],
        "embed": lambda out: ["embed", run, shards, out / "e.npz", *test],
        "probe": lambda out: ["probe", run, "--data", shards, "--protocol", "knn", "--json", out / "p.json"],
        "convert": lambda out: ["convert", run, out / "timm", "--to", "timm"],
        "check": lambda out: ["shards", "check", copied(shards, out / "marked", "*"), "--mark"],
        "compare": lambda out: ["compare", root / "compare.yaml", f"out={out / 'both'}"],
        "stats": lambda out: ["shards", "stats", shards, "--json", out / "s.json"],
    }


def imported(root: Path) -> None:
    """Carries out each command once, which imports all that it needs: forks then find it."""
    shutil.rmtree(root / "once", ignore_errors=True)
    for name, command in commands(root).items():
        (root / "once" / name).mkdir(parents=True)
        assert call(command(root / "once" / name)) == 0, name


def copied(shards: Path, to: Path, names: str) -> Path:
    if not to.exists():
        to.mkdir()
        for path in shards.glob(names):
            shutil.copy(path, to)
    return to


def call(arguments: list[object]) -> int:
    from mpp.cli import main

    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


class Places:
    """Counts the calls that touch files below a folder, and lets a fault happen at one of them."""

    def __init__(self, folder: Path, fault: str, place: int) -> None:
        self.folder, self.fault, self.place, self.count, self.last = str(folder), fault, place, 0, ""
        self.counting = threading.Lock()  # checkpoints are written by a thread of their own

    def met(self, name: str, path: Any) -> None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif hasattr(path, "fileno"):
            path = os.readlink(f"/proc/self/fd/{path.fileno()}")
        path = os.fsdecode(path)
        if not path.startswith(self.folder):
            return
        with self.counting:
            self.count += 1
            count = self.count
        if count == self.place:
            self.last = f"{name} {os.path.basename(path)}"
            (Path(self.folder).parent / "call").write_text(self.last)
            if self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        if count == self.place or (self.fault == "full disk" and count > self.place):
            number = errno.EIO if self.fault == "one error" else errno.ENOSPC
            raise OSError(number, os.strerror(number), path)

    def watch(self) -> None:
        """Puts itself before the calls, in this process for good."""
        for module, name in CALLS:
            setattr(module, name, self._before(name, getattr(module, name)))
        opened = io.open

        def watched(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return opened(file, mode, *rest, **more)
            self.met("open", file)
            return Watched(opened(file, mode, *rest, **more), self)

        builtins.open = io.open = watched  # type: ignore[assignment]
        import safetensors.torch

        from mpp import checkpoint

        save = safetensors.torch.save_file

        def save_file(tensors: Any, path: Any, metadata: Any = None) -> None:
            self.met("save_file", path)
            save(tensors, path, metadata)

        if hasattr(checkpoint, "save_file"):
            checkpoint.save_file = save_file

    def _before(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any, *rest: Any, **more: Any) -> Any:
            reading = name == "open" and not rest[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            unlocks = name == "flock" and rest[0] == fcntl.LOCK_UN
            if not (reading or unlocks):
                self.met(name, path)
            return function(path, *rest, **more)

        return counted


class Watched:
    """An open file whose writes count as calls."""

    def __init__(self, file: Any, places: Places) -> None:
        self._file, self._places = file, places

    def write(self, data: Any) -> int:
        self._places.met("write", self._file.name)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)


def as_process(said: Path) -> None:
    """Makes a fork of a test look like a process of its own, whose output and errors go to a file."""
    tqdm.set_lock(threading.RLock())  # the usual lock is shared by forks: one killed with it would stop all others
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    logging.getLogger().handlers.clear()  # of those who started it


def child(arguments: list[object], out: Path, fault: str, place: int) -> tuple[int, str, int]:
    """Carries out a command in a fork: its status, what it said on standard error, and the calls that it made."""
    said, counted = out.parent / "said", out.parent / "counted"
    counted.write_text("0")
    process = os.fork()
    if process == 0:
        as_process(said)
        places, status = Places(out, fault, place), 70
        write = Path.write_text
        try:
            places.watch()
            status = call(arguments)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            places.place = places.folder = "nowhere"  # type: ignore[assignment]
            write(counted, str(places.count))
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(process, 0)
    text = said.read_text(errors="replace").replace("\r", "\n") if said.exists() else ""
    return os.waitstatus_to_exitcode(status), text, int(counted.read_text() or 0)


def left(out: Path) -> dict[str, str]:
    """What a command left, by file: digests, and of metrics.jsonl what does not depend on the clock."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if not path.is_file() or path.name.startswith(SKIPPED):
            continue
        data = path.read_bytes()
        if path.name == "results.json":
            data = json.dumps({key: json.loads(data)[key] for key in ("rows", "failures", "unfinished")}).encode()
        if path.name == "metrics.jsonl":
            rows = [{k: v for k, v in json.loads(line).items() if k not in OTHER} for line in data.splitlines()]
            data = json.dumps(rows).encode()
        found[name] = hashlib.sha256(data.replace(str(out).encode(), b"OUT")).hexdigest()
    return found


def tried(root: Path, name: str, fault: str, stride: int = 1, first: int = 1) -> list[Met]:
    """A command with a fault at each place, or at each of some; AssertionError where it does not end as it should."""
    command, out = commands(root)[name], root / name / "out"
    shutil.rmtree(out.parent, ignore_errors=True)
    out.mkdir(parents=True)
    arguments = command(out)
    code, said, calls = child(arguments, out, "none", 0)
    assert code in (0, 1), said
    undisturbed, found = left(out), []
    for place in range(first, calls + 1, stride):
        shutil.rmtree(out)
        out.mkdir()
        command(out)
        code, said, _ = child(arguments, out, fault, place)
        where = (out.parent / "call").read_text()
        met = Met(fault, place, where, code, said)
        found.append(met)
        lines = [line for line in said.splitlines() if line.startswith("mpp: ")]
        assert "Traceback" not in said, met
        if fault == "killed":
            assert code == -signal.SIGKILL, met
        elif code == 2:
            assert lines, met
        elif code == 1:  # of a comparison whose other runs go on
            assert "failed: " in said, met
        else:
            assert (code, left(out)) == (0, undisturbed), (met, difference(left(out), undisturbed))
        code, said, _ = child(arguments, out, "none", 0)
        # All of it was there already: `convert` writes into no folder that holds something.
        assert code == 0 or "not empty; choose a new folder" in said, (met, said)
        assert left(out) == undisturbed, (met, difference(left(out), undisturbed))
    return found


def difference(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def main(root: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of forks of a process with threads: here all have ended
    tqdm.monitor_interval = 0
    root.mkdir(parents=True, exist_ok=True)
    failed = 0
    imported(root)
    for name in names or list(commands(root)):
        for fault in FAULTS:
            try:
                met = tried(root, name, fault, STRIDE.get(name, 1))
            except AssertionError as error:
                failed += 1
                print(f"{name}, {fault}: WRONG: {error}")
                continue
            ends = sorted(Counter(one.code for one in met).items())
            said = ", ".join(f"{number} x status {code}" for code, number in ends)
            print(f"{name}, {fault}: {len(met)} places: {said}", flush=True)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
