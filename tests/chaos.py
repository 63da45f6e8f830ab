"""Trains over CIFAR-10's shards by several processes while faults befall them, and compares that with training that
none befell: [--shards CIFAR10] [--faults 20] [--seed 0] [--ranks 3] [--json FILE].

A local server gives the shards, cut into smaller ones that its clients must fetch again and again. `torchrun` starts
the processes anew when one ends; when it ends itself, or is killed, this command starts it again, as a scheduler would.
The next fault comes at a drawn step and moment, once training went on after the one before. The disk is a small tmpfs,
which takes root. Exit status 1, and lines that begin with WRONG, where anything is not as it was undisturbed.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from http_server import File, Server, serving
from safetensors.torch import load_file

from mpp import checkpoint
from mpp.log import read_metrics
from mpp.shards.build import index_folder

RECIPE = """\
data: {path: URL, val: test, window: 2, cache: CACHE, cache_gib: GIB, augment: {crop: inception, flip: true}}
model: {image: 32, patch: 8, width: 32, depth: 2, heads: 2, positions: sincos2d, pool: avg, drop_path: 0.2}
objective: {name: mpp}
train:
  {steps: STEPS, batch: 48, micro_batch: 8, lr: 1e-3, warmup: 5, ema: 0.9, save_every: 5, keep: 3, device: cpu,
  precision: float32}
eval: {every: 50, images: 96}
log: {every: 1, pictures: 100, tensorboard: false}
"""
BATCH, SAVED = 48, 5  # images, steps: as in the recipe
PER_SHARD = 200  # images: about four steps; the cache holds five such shards of CIFAR-10
DISK = 64  # MiB
SPACING = 25  # steps in which one fault falls
RESTARTS = 3  # by torchrun, before it gives up
PATIENCE = 300.0  # seconds without the next thing to come, after which something hangs
# By which a disturbed training may differ from an undisturbed one. On a CPU all sums are the same and in the same
# order, so that nothing should; this is two units in the last place of a float32 loss of about 7.
TOLERANCES = {"losses": 1e-6, "figures": 1e-6, "weights": 1e-6}
OTHER = {"images/s", "waiting", "memory"}  # of metrics.jsonl: differ from run to run
PAUSE = 12.0  # seconds that a process is stopped and others must bear: LATE of mpp/heartbeat.py is less, SILENT more
MARK = "MPP_CHAOS"  # in the environment of all processes that a training has


class Stuck(Exception):
    """Nothing came in PATIENCE seconds, or what should not have."""


@dataclass
class Met:
    """A fault and what came of it."""

    kind: str
    what: str
    step: int  # last one logged before
    at: float  # seconds after the beginning
    on_after: float = 0.0  # seconds until a step was logged that never had been, by processes that live on
    launches: int = 0  # of torchrun meanwhile


class Training:
    """A run by torchrun that is started again until it is done, and what can befall it."""

    def __init__(self, recipe: Path, out: Path, server: Server, ranks: int, draws: random.Random) -> None:
        self.out, self.server, self.size, self.draws = out, server, ranks, draws
        self.logs, self.cache = recipe.with_suffix(".logs"), recipe.with_suffix(".cache")
        self.mark = f"{os.getpid()}-{out.name}"
        beside = Path(sys.executable).parent
        self.command = [
            str(beside / "torchrun"), "--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(RESTARTS),
            "--log-dir", str(self.logs), "--redirects", "3",
            "--no-python", str(beside / "mpp"), "pretrain", str(recipe), f"out={out}",
        ]  # fmt: skip
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark}
        self.process: subprocess.Popen[bytes] | None = None
        self.codes: list[int] = []  # of each torchrun that ended

    def tend(self) -> bool:
        """Starts torchrun where it is not there; whether the run is done."""
        if self.process is not None and (code := self.process.poll()) is not None:
            self.codes.append(code)
            self.process = None
        if self.process is None and not self.done:
            time.sleep(0.5 if self.codes else 0)
            self.logs.mkdir(exist_ok=True)
            with (self.logs / f"torchrun-{len(self.codes)}.log").open("wb") as log:
                self.process = subprocess.Popen(self.command, env=self.env, stdout=log, stderr=log)
        return self.done

    @property
    def done(self) -> bool:
        return self.codes[-1:] == [0]

    def until(self, comes: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
        """Waits for something, and meanwhile keeps the training going."""
        end = time.monotonic() + patience
        while not comes():
            if self.tend() and not comes():
                raise Stuck(f"the run was done before {what}")
            if time.monotonic() > end:
                last = (self.said("^mpp: ") or ["nothing"])[-1]
                raise Stuck(f"{what}: not in {patience:g} s, after step {self.reached()}; said was {last}")
            time.sleep(0.05)

    def passes(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end, f"{seconds} s went by")

    def reached(self) -> int:
        """The last step that is logged."""
        path = self.out / "metrics.jsonl"
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 4096))
                lines = file.read().rpartition(b"\n")[0].splitlines()
            return int(json.loads(lines[-1])["step"]) if lines else 0
        except (FileNotFoundError, ValueError):
            return 0

    def said(self, pattern: str = "") -> list[str]:
        """The lines of all processes of mpp so far in which something stands."""
        text = "\n".join(path.read_text(errors="replace") for path in sorted(self.logs.rglob("std*.log")))
        return [line for line in text.replace("\r", "\n").splitlines() if re.search(pattern, line)]

    def is_said(self, pattern: str) -> Callable[[], bool]:
        """Whether a line with that has come since now."""
        before = len(self.said(pattern))
        return lambda: len(self.said(pattern)) > before

    def processes(self) -> dict[int, int | None]:
        """The processes of this training that live, and the rank of those that have one."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                entries = path.read_bytes().split(b"\0")
                if f"{MARK}={self.mark}".encode() in entries:
                    ranks = [int(entry[5:]) for entry in entries if entry.startswith(b"RANK=")]
                    found[int(path.parent.name)] = ranks[0] if ranks else None
        return found

    def ranks(self) -> set[int]:
        """The ids of those that train."""
        return {pid for pid, rank in self.processes().items() if rank is not None}

    def torchrun(self) -> int:
        self.until(lambda: self.process is not None, "torchrun was there")
        assert self.process is not None
        return self.process.pid

    def rank(self) -> tuple[int, int]:
        """One of the processes that train, and its id."""
        rank = self.draws.randrange(self.size)

        def found() -> list[int]:
            return [pid for pid, its in self.processes().items() if its == rank]

        self.until(lambda: bool(found()), f"rank {rank} was there")
        return rank, found()[0]

    def end(self) -> None:
        """Kills whatever is left of it."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    # Faults: each ends when it is over, and says what it was.

    def rank_killed(self) -> str:
        rank, pid = self.rank()
        os.kill(pid, signal.SIGKILL)
        return f"rank {rank}, SIGKILL"

    def rank_stopped(self) -> str:
        rank, pid = self.rank()
        os.kill(pid, signal.SIGSTOP)
        return f"rank {rank}, SIGSTOP for good"

    def rank_paused(self) -> str:
        rank, pid = self.rank()
        os.kill(pid, signal.SIGSTOP)
        self.passes(PAUSE)
        os.kill(pid, signal.SIGCONT)
        return f"rank {rank}, SIGSTOP for {PAUSE:g} s"

    def rank_signalled(self) -> str:
        (rank, pid), number = self.rank(), self.draws.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
        os.kill(pid, number)
        return f"rank {rank}, {number.name}"

    def torchrun_signalled(self) -> str:
        number = self.draws.choice((signal.SIGTERM, signal.SIGINT))
        os.kill(self.torchrun(), number)
        return f"torchrun, {number.name}"

    def torchrun_killed(self) -> str:
        os.kill(self.torchrun(), signal.SIGKILL)
        return "torchrun, SIGKILL"

    def checkpoint_cut(self) -> str:
        def cut(data: bytes) -> bytes:
            return data[: self.draws.randrange(len(data))]

        return self._damaged(cut)

    def bit_flipped(self) -> str:
        def flip(data: bytes) -> bytes:
            place, bit = self.draws.randrange(len(data)), 1 << self.draws.randrange(8)
            return data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]

        return self._damaged(flip)

    def _damaged(self, change: Callable[[bytes], bytes]) -> str:
        """Damages the newest checkpoint once nobody writes another, so that it is the one to be read."""
        back, what = self.is_said("going back to the checkpoint before it"), self.rank_killed()
        time.sleep(0.5)  # for one that was being written
        newest = checkpoint.steps(self.out / "checkpoints")[-1]
        files = sorted((self.out / f"checkpoints/step-{newest:08d}").iterdir())
        path = self.draws.choice(files)
        before = path.read_bytes()
        path.write_bytes(after := change(before))
        self.until(back, f"{path} was found to be damaged")
        how = f"cut to {len(after)} of {len(before)} bytes" if len(after) < len(before) else "with one bit flipped"
        return f"{what}; {path.parent.name}/{path.name} {how}"

    def disk_full(self) -> str:
        told = self.is_said("could not be saved|cannot be written|No space left")
        filler = self.out.parent / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(2**12)):
                pass
        started = time.monotonic()
        self.until(told, "the full disk was told")
        self.passes(self.draws.uniform(0, 10))
        filler.unlink()
        return f"no byte left for {time.monotonic() - started:.0f} s"

    def server_fails(self) -> str:
        return self._failing("status 503", 3, status=503)

    def server_cuts(self) -> str:
        return self._failing("the connection cut in the middle", 3, cut=self.draws.randrange(500_000))

    def server_hangs(self) -> str:
        return self._failing("no byte for 30 s after some", 1, hang=self.draws.randrange(500_000))

    def server_down(self) -> str:
        return self._failing("status 503", None, status=503)

    def _failing(self, how: str, requests: int | None, **faults: Any) -> str:
        """Lets the server fail for so many requests, or until a process gave up."""
        gave_up, before = self.is_said(r"\(tried \d+ times\)"), len(self.server.requests)
        well = dict(self.server.files)
        self.server.counts.clear()
        self.server.files = {name: replace(file, times=10**9, **faults) for name, file in well.items()}

        def met() -> int:
            return len(self.server.requests) - before

        try:
            self.until(gave_up if requests is None else lambda: met() >= requests, "requests failed")
        finally:
            self.server.files = well
        return f"{how}, {met()} requests" + (", until a process gave up" if requests is None else "")


KINDS: dict[str, Callable[[Training], str]] = {
    "a rank killed": Training.rank_killed,
    "a rank stopped": Training.rank_stopped,
    "a rank paused": Training.rank_paused,
    "a rank signalled": Training.rank_signalled,
    "torchrun signalled": Training.torchrun_signalled,
    "torchrun killed": Training.torchrun_killed,
    "checkpoint cut": Training.checkpoint_cut,
    "bit flipped": Training.bit_flipped,
    "disk full": Training.disk_full,
    "server fails": Training.server_fails,
    "server cuts answers": Training.server_cuts,
    "server hangs": Training.server_hangs,
    "server down": Training.server_down,
}
BORNE = {"a rank paused", "server fails", "server cuts answers", "server hangs"}  # the same processes go on


def drawn(faults: int, draws: random.Random) -> list[str]:
    """Kinds of faults: each once in drawn order, then again."""
    kinds: list[str] = []
    while len(kinds) < faults:
        kinds += draws.sample(list(KINDS), len(KINDS))
    return kinds[:faults]


def disturbed(training: Training, kinds: list[str], spacing: int, tell: Callable[[str], None] = print) -> list[Met]:
    """Carries a training to its end, with a fault of each kind on the way."""
    started, found, draws = time.monotonic(), [], training.draws
    for number, kind in enumerate(kinds):
        step = draws.randrange(number * spacing + SAVED + 1, (number + 1) * spacing)
        training.until(lambda at=step: training.reached() >= at, f"step {step}")
        time.sleep(draws.uniform(0, 0.2))  # to land anywhere in a step
        now, launches = time.monotonic(), len(training.codes)
        met = Met(kind, "", training.reached(), round(now - started, 1))
        before = training.ranks()
        met.what = KINDS[kind](training)
        if kind not in BORNE:
            training.until(lambda ids=before: not ids & training.ranks(), f"the processes ended after {met}")
        last = training.reached()
        training.until(lambda at=last: training.reached() > at, f"training went on after {met}")
        met.on_after, met.launches = round(time.monotonic() - now, 1), len(training.codes) - launches
        found.append(met)
        tell(f"{number + 1}: {kind}: {met.what}: after step {met.step}, on after {met.on_after:.0f} s")
    training.until(lambda: training.done, "the end")
    return found


def served(server: Server, shards: Path, images: dict[str, int]) -> str:
    """Serves some images of each split, in small shards with indexes of their own; their URL."""
    with tempfile.TemporaryDirectory() as folder:
        for split, count in images.items():
            for number in range(-(-count // PER_SHARD)):
                _cut_tar(shards, split, number * PER_SHARD, Path(folder) / f"{split}-{number:06d}.tar")
        index_folder(Path(folder), report=lambda line: None)
        for path in Path(folder).iterdir():
            url = server.put(f"cifar10/{path.name}", File(path.read_bytes()))
    return url.rpartition("/")[0]


def _cut_tar(shards: Path, split: str, first: int, to: Path) -> None:
    """Writes PER_SHARD images of the first shard of a split, from one on, with what lies beside them."""
    with tarfile.open(next(iter(sorted(shards.glob(f"{split}-*.tar"))))) as tar, tarfile.open(to, "w") as cut:
        members = tar.getmembers()
        keys = list(dict.fromkeys(member.name.partition(".")[0] for member in members))
        chosen = set(keys[first : first + PER_SHARD])
        for member in members:
            if member.name.partition(".")[0] in chosen and (file := tar.extractfile(member)):
                cut.addfile(member, io.BytesIO(file.read()))


def written_recipe(folder: Path, name: str, url: str, steps: int, gib: float = 0.004) -> Path:
    """A recipe by whose name its cache, of so many GiB, and logs are called."""
    path = folder / f"{name}.yaml"
    values = {"URL": url, "CACHE": path.with_suffix(".cache"), "STEPS": steps, "GIB": gib}
    text = RECIPE
    for name, value in values.items():
        text = text.replace(name, str(value))
    path.write_text(text)
    return path


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A new folder that is a disk of its own, of DISK MiB."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def figures(out: Path) -> list[dict[str, float]]:
    """What training logged at each step, and scoring, but for what depends on the clock."""
    return [{name: value for name, value in row.items() if name not in OTHER} for row in read_metrics(out)]


def differences(one: Path, other: Path) -> dict[str, float]:
    """The largest difference of two runs' losses, of all their figures, and of their weights."""
    pairs = list(zip(figures(one), figures(other), strict=True))
    assert all(a.keys() == b.keys() and a["step"] == b["step"] for a, b in pairs), "the same figures at the same steps"
    weights, others = load_file(one / "encoder.safetensors"), load_file(other / "encoder.safetensors")
    assert weights.keys() == others.keys()
    return {
        "losses": max(abs(a["loss"] - b["loss"]) for a, b in pairs if "loss" in a),
        "figures": max(abs(a[name] - b[name]) for a, b in pairs for name in a),
        "weights": max((weights[name] - others[name]).abs().max().item() for name in weights),
    }


def judged(
    training: Training, undisturbed: Path, steps: int, kinds: list[str], tolerances: dict[str, float] = TOLERANCES
) -> tuple[dict[str, Any], list[str]]:
    """What came out of it all, and what is wrong with it."""
    out, wrong = training.out, []
    logged = [int(row["step"]) for row in figures(out) if "lr" in row]
    if logged != list(range(1, steps + 1)):
        wrong.append(f"steps are not logged once each: {len(logged)} lines for {len(set(logged))} of {steps} steps")
    images, expected = (BATCH * len({row["step"] for row in figures(path)}) for path in (out, undisturbed))
    if images != expected:
        wrong.append(f"{images} images, undisturbed {expected}")
    try:
        apart = differences(out, undisturbed)
        wrong += [f"{name} differ by {apart[name]:g}" for name, most in tolerances.items() if apart[name] > most]
    except (AssertionError, ValueError) as error:
        apart = {}
        wrong.append(f"other figures than undisturbed: {error}")
    shown, others = (sorted((path / "pictures").iterdir()) for path in (out, undisturbed))
    equal = [path.name for path in shown] == [path.name for path in others]
    if apart.get("weights") == 0:
        equal = equal and all(one.read_bytes() == other.read_bytes() for one, other in zip(shown, others, strict=True))
    if not equal:
        wrong.append("other pictures than undisturbed")
    time.sleep(1)
    wrong += [f"process {pid} is left" for pid in training.processes()]
    ends = {out: (".partial-*", "*.part", ".lock"), training.cache: ("*.mpp-part",)}
    left = [path for folder, names in ends.items() for name in names for path in folder.rglob(name)]
    wrong += [f"{path} is left" for path in left]
    wrong += [f"mpp said: {line}" for line in training.said("Traceback")]
    back = len(training.said("going back to the checkpoint before it"))
    if back < (damaged := sum(kind in ("checkpoint cut", "bit flipped") for kind in kinds)):
        wrong.append(f"{back} of {damaged} damaged checkpoints were noticed")
    attempts = len(list(training.logs.glob("*/attempt_*")))
    forced = sum(path.read_text().count("forcefully exiting") for path in training.logs.glob("torchrun-*.log"))
    lines = Counter(re.sub(r"\d+", "N", line) for line in training.said("^mpp: "))
    facts = {"launches": len(training.codes), "attempts": attempts, "killed by torchrun": forced}
    facts |= {"images": images, "apart": apart}
    return facts | {"lines": dict(lines.most_common())}, wrong


def main(options: argparse.Namespace) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # jobs in the background ignore the first, and their children
        signal.signal(number, signal.default_int_handler)
    draws = random.Random(options.seed)
    kinds = options.kinds or drawn(options.faults, draws)
    steps = len(kinds) * SPACING + 3 * SAVED
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    record: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}", "commit": commit.stdout.strip(), "seed": options.seed,
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores", "torch": torch.__version__,
        "ranks": options.ranks, "steps": steps,
    }  # fmt: skip
    with serving() as server, small_disk(folder / "disk") as disk:
        url = served(server, options.shards, {"train": 5000, "test": 400})
        started, out = time.monotonic(), folder / "undisturbed"
        alone = Training(written_recipe(folder, out.name, url, steps), out, server, options.ranks, draws)
        training = Training(
            written_recipe(folder, "disturbed", url, steps), disk / "disturbed", server, options.ranks, draws
        )
        try:
            alone.until(lambda: alone.done, "the end", 4 * PATIENCE)
            record["undisturbed"] = round(time.monotonic() - started)
            print(f"undisturbed: {steps} steps in {record['undisturbed']} s", flush=True)
            started = time.monotonic()
            found = disturbed(training, kinds, SPACING, lambda line: print(line, flush=True))
            record |= {"seconds": round(time.monotonic() - started), "faults": [asdict(met) for met in found]}
            facts, wrong = judged(training, out, steps, kinds)
        except Stuck as error:
            facts, wrong = {}, [str(error)]
        finally:
            alone.end()
            training.end()
        if wrong:
            shutil.copytree(disk, folder / "kept")
        record |= facts | {"wrong": wrong}
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    for line in wrong:
        print(f"WRONG: {line}")
    print(f"{len(kinds)} faults: {record.get('seconds')} s; {facts}")
    if wrong:
        print(f"logs: {folder}")
    else:
        shutil.rmtree(folder)
    return len(wrong) > 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, required=True, help="CIFAR-10 as `mpp shards make` writes it")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), help="these faults, in place of --faults drawn ones")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the record")
    raise SystemExit(main(parser.parse_args()))
