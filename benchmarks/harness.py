"""What the benchmarks share: contenders in processes of their own, run in turn; medians of per-round ratios; JSON.

On a shared machine absolute figures drift by tens of per cent within minutes, so contenders are measured round by
round, one after the other, and only ratios taken within a round are compared.
"""

import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = [
    "torch",
    "torchvision",
    "timm",
    "vit-pytorch",
    "webdataset",
    "simplejpeg",
    "opencv-python-headless",
    "pillow",
]
Table = dict[str, Any]  # as it stands in a JSON file
FOREIGN_CORES = 0.1  # a round in which others used more than this is counted as disturbed


@dataclass(frozen=True)
class Timing:
    """One round of one contender."""

    images: int
    seconds: float  # for those images, warm-up excluded
    facts: dict[str, float] = field(default_factory=dict)  # whatever else is worth keeping, such as the loss
    peak_mib: float = 0.0  # of the process since it began (on CUDA: of the allocator); filled in by `serve`
    foreign_cores: float = 0.0  # used by other processes meanwhile; filled in by `serve`

    @property
    def rate(self) -> float:
        return self.images / self.seconds


@dataclass(frozen=True)
class Contender:
    """`prepare(**arguments)` runs once in a new process and returns the function that runs one round."""

    name: str
    prepare: Callable[..., Callable[[], Timing]]
    arguments: Mapping[str, Any]
    cores: int = 0  # pin the process to so many cores; 0: leave it


@dataclass(frozen=True)
class Bar:
    """What an issue asks of a ratio: at least, or at most, this."""

    value: float
    most: bool = False

    def __str__(self) -> str:
        return f"{'<=' if self.most else '>='} {self.value:g}"

    def met(self, ratio: float) -> bool:
        return ratio <= self.value if self.most else ratio >= self.value


@dataclass(frozen=True)
class Ratio:
    """Ours over theirs, round by round."""

    ours: str
    peer: str
    what: str  # "speed", "CPU time" or "peak memory"
    median: float
    least: float
    most: float
    bar: Bar | None = None

    def __str__(self) -> str:
        verdict = "" if self.bar is None else f"  bar {self.bar}: {'met' if self.bar.met(self.median) else 'NOT met'}"
        return f"{self.median:6.2f} ({self.least:.2f}-{self.most:.2f}){verdict}"


def interleave(contenders: Sequence[Contender], rounds: int, unit: str = "images/s") -> dict[str, list[Timing]]:
    """Runs all contenders in turn, `rounds` times; the others sleep on their pipes meanwhile and use no core.

    unit: of their rates, as printed.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    timings: dict[str, list[Timing]] = {contender.name: [] for contender in contenders}
    try:
        for contender in contenders:
            pipes[contender.name], end = context.Pipe()
            processes.append(context.Process(target=serve, args=(end, contender)))
            processes[-1].start()
            end.close()
            receive(pipes[contender.name], contender.name)  # prepared; the next one starts only now
        for number in range(rounds):
            for name, pipe in pipes.items():
                pipe.send("round")
                timings[name].append(receive(pipe, name))
                say(f"  round {number + 1}/{rounds}  {name:<44} {timings[name][-1].rate:10.1f} {unit}")
    finally:
        for pipe in pipes.values():
            pipe.close()  # ends the loop in `serve`
        for process in processes:
            process.join()
    return timings


def receive(pipe: Connection, name: str) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit(f"{name}: its process ended; the traceback is above") from None


def serve(pipe: Connection, contender: Contender) -> None:
    """The life of a contender's process: prepare, then one round for each word from the parent."""
    if contender.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-contender.cores :])
    run = contender.prepare(**contender.arguments)
    pipe.send("ready")
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        busy, own, start = busy_seconds(), own_seconds(), time.perf_counter()
        timing = run()
        foreign = (busy_seconds() - busy) - (own_seconds() - own)
        foreign_cores = max(0.0, foreign / (time.perf_counter() - start))
        pipe.send(Timing(timing.images, timing.seconds, timing.facts, peak_mib(), foreign_cores))


def busy_seconds() -> float:
    """Seconds since its start that the machine's cores worked for any process, or were taken by its host."""
    user, nice, system, _idle, _wait, interrupt, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + interrupt + soft + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """The same for this process and its children, those that have ended and those that live."""
    living = sum(seconds_of(child.pid) for child in multiprocessing.active_children() if child.pid)
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system + living


def seconds_of(process: int) -> float:
    """The same for a process by its number."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()  # its name may hold anything
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mib() -> float:
    """Peak resident memory. Not getrusage's ru_maxrss: a new process starts that one at its parent's size."""
    import torch  # here, so that the parent stays small and starts at once

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def speed(timings: Mapping[str, Sequence[Timing]], ours: str, peer: str, bar: Bar | None = None) -> Ratio:
    """Our images/s over the peer's."""
    ratios = [mine.rate / theirs.rate for mine, theirs in zip(timings[ours], timings[peer], strict=True)]
    return Ratio(ours, peer, "speed", statistics.median(ratios), min(ratios), max(ratios), bar)


def processor_time(timings: Mapping[str, Sequence[Timing]], ours: str, peer: str) -> Ratio:
    """The peer's CPU seconds an image over ours: what speed comes to where nobody else uses the cores."""
    pairs = zip(timings[ours], timings[peer], strict=True)
    ratios = [theirs.facts["cpu_us"] / mine.facts["cpu_us"] for mine, theirs in pairs]
    return Ratio(ours, peer, "CPU time", statistics.median(ratios), min(ratios), max(ratios))


def memory(timings: Mapping[str, Sequence[Timing]], ours: str, peer: str, bar: Bar | None = None) -> Ratio:
    """Our peak memory over the peer's, once: a process's peak only ever grows."""
    ratio = timings[ours][-1].peak_mib / timings[peer][-1].peak_mib
    return Ratio(ours, peer, "peak memory", ratio, ratio, ratio, bar)


def table(title: str, timings: Mapping[str, Sequence[Timing]], ratios: Sequence[Ratio]) -> None:
    """Prints one line for each contender and each ratio."""
    rounds = len(next(iter(timings.values())))
    say(f"\n{title}: {rounds} rounds in turn, medians (least-most)")
    for name, runs in timings.items():
        rates = [run.rate for run in runs]
        spread = f"{statistics.median(rates):10.1f} images/s ({min(rates):.1f}-{max(rates):.1f})"
        facts = "  ".join(f"{key} {value:.4g}" for key, value in runs[-1].facts.items())
        say(f"  {name:<44} {spread:<38} peak {runs[-1].peak_mib:6.0f} MiB  {facts}")
    for ratio in ratios:
        say(f"  {ratio.what:<11} {ratio.ours} / {ratio.peer}: {ratio}")
    disturbed = sum(run.foreign_cores > FOREIGN_CORES for runs in timings.values() for run in runs)
    if disturbed:
        count = rounds * len(timings)
        say(f"  {disturbed} of {count} timings were disturbed: others used more than {FOREIGN_CORES} core")


def summary(settings: Mapping[str, Any], timings: Mapping[str, Sequence[Timing]], ratios: Sequence[Ratio]) -> Table:
    """One table as it stands in the JSON file, with every round."""
    return {
        "settings": dict(settings),
        "ratios": [asdict(ratio) for ratio in ratios],
        "rounds": {name: [asdict(run) | {"images_per_s": run.rate} for run in runs] for name, runs in timings.items()},
    }


def write(name: str, threads: int, device: str, tables: Mapping[str, Table], folder: Path = RESULTS) -> None:
    """Keeps the tables in FOLDER/NAME.json beside when, where and with what they were measured."""
    versions = {package: version(package) for package in PACKAGES}
    cores = len(os.sched_getaffinity(0))
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {"cpu": processor(), "cores": cores, "threads": threads, "gpu": graphics(device)},
        "versions": {"python": platform.python_version(), **versions, "commit": commit()},
        "tables": dict(tables),
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    say(f"\nwritten: {path}")


def commit() -> str | None:
    """Of this work tree, "-dirty" where files differ from it; None where it is a copy without its history."""
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The CPU's name and those of its instruction sets that decide how fast bfloat16 is."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    words = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in words.get("flags", "").split()]
    return f"{words.get('model name', platform.machine())} family {words.get('cpu family', '?')} ({' '.join(sets)})"


def graphics(device: str) -> str | None:
    if device == "cpu":
        return None
    import torch

    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return f"{torch.cuda.get_device_name()}, driver {', '.join(driver[:1])}, CUDA {torch.version.cuda}"


def say(line: str) -> None:
    print(line, flush=True)
