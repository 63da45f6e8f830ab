"""This work tree against another commit of ours, side by side: the training step, and reading.

    python -m benchmarks.against REF [--shards FOLDER] [--photos FOLDER] [--parts step small] [--rounds 11]

step: `mpp.train` of tiny32 by default settings, on one batch in memory. small: 32x32 shards to batches of 128 on one
core, decoded in every epoch (indexed) and once (resident). photos: full-size JPEG to crops of 224 pixels on one core.
REF's code lies in a second work tree meanwhile. The ratios are ours / REF's, taken within a round: above 1, we are
faster. `CPU time` compares seconds of processor an image instead of seconds passed, which others on the machine disturb
less. The interval of a median lies between two of its rounds' ratios, chosen by their rank alone.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import FOREIGN_CORES, Table, Timing, say
from tests.same_losses import HERE, git, second_tree

WORKER = Path(__file__).with_name("against_worker.py")
CONFIDENCE = 0.95  # of the intervals, at least
TINY = {"image": 32, "batch": 128}
STEPS, WARM_UP = 4, 1  # a round of training
SECONDS, BATCHES = 2.0, 8  # a round of reading, after so many batches


@dataclass(frozen=True)
class Part:
    """What both trees do, as arguments of against_worker.py."""

    kind: str
    arguments: dict[str, Any]
    cores: int = 0  # pin to so many cores; 0: leave it


@dataclass(frozen=True)
class Comparison:
    """Ours over theirs: the median of the rounds' ratios, and an interval of that median."""

    what: str  # "speed" or "CPU time"
    median: float
    low: float
    high: float
    confidence: float  # that low to high covers the true median, whatever the distribution

    def __str__(self) -> str:
        return f"{self.median:6.3f}  ({self.low:.3f} to {self.high:.3f} at {100 * self.confidence:.1f} %)"


class Worker:
    """A process that runs one tree's code."""

    def __init__(self, name: str, tree: Path, part: Part, threads: int) -> None:
        self.name = name
        command = [sys.executable, str(WORKER), json.dumps([part.kind, part.cores, part.arguments])]
        env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env, cwd=tree.parent)
        home = self._answer()["home"]
        if Path(home) != tree.resolve():
            raise SystemExit(f"{name}: runs the code of {home}, expected that of {tree}")

    def round(self) -> Timing:
        assert self.process.stdin is not None
        busy, start = harness.busy_seconds(), time.perf_counter()
        self.process.stdin.write("round\n")
        self.process.stdin.flush()
        facts = self._answer()
        foreign = harness.busy_seconds() - busy - facts["busy_in_all"]
        foreign_cores = max(0.0, foreign / (time.perf_counter() - start))
        images = facts["images"]
        cpu = {"cpu_us": 1e6 * facts["busy"] / images}
        return Timing(images, facts["seconds"], cpu, facts["peak_mib"], foreign_cores)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> Table:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process ended; the traceback is above")
        return json.loads(line)


def interleave(trees: dict[str, Path], part: Part, rounds: int, threads: int) -> dict[str, list[Timing]]:
    """Rounds of both trees in turn, the other one first in every second round, each in a new process.

    Where a process happens to have its memory makes it up to a fifth faster or slower than its twin, for good: with one
    process a tree, no number of rounds would show it.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in trees}
    for number in range(rounds):
        with contextlib.ExitStack() as stack:
            workers = [Worker(name, tree, part, threads) for name, tree in trees.items()]
            for worker in workers:
                stack.callback(worker.close)
            for worker in workers if number % 2 else workers[::-1]:
                timings[worker.name].append(worker.round())
        rates = "  ".join(f"{name} {runs[-1].rate:10.1f}" for name, runs in timings.items())
        say(f"  round {number + 1:2}/{rounds}  images/s: {rates}")
    return timings


def bracket(count: int) -> tuple[int, float]:
    """The rank k for which the k-th smallest to the k-th largest of `count` values cover their median, and how surely.

    They miss it if fewer than k values lie on one side of it, each of which is as a coin's throw: a chance of
    2 * P(Binomial(count, 1/2) < k). Of the ranks that leave CONFIDENCE the largest is taken; 1 if none does.
    """

    def confidence(k: int) -> float:
        return 1 - 2 * sum(math.comb(count, fewer) for fewer in range(k)) / 2**count

    enough = [k for k in range(1, count // 2 + 1) if confidence(k) >= CONFIDENCE]
    best = max(enough, default=1)
    return best, max(0.0, confidence(best))


def comparison(what: str, ratios: Sequence[float]) -> Comparison:
    rank, confidence = bracket(len(ratios))
    ordered = sorted(ratios)
    return Comparison(what, statistics.median(ratios), ordered[rank - 1], ordered[-rank], confidence)


def compare(title: str, trees: dict[str, Path], part: Part, rounds: int, threads: int) -> Table:
    """Measures one part, prints its ratios, and gives its table for the JSON file."""
    say(f"\n{title}")
    timings = interleave(trees, part, rounds, threads)
    ours, theirs = timings.values()
    pairs = list(zip(ours, theirs, strict=True))
    found = [
        comparison("speed", [mine.rate / other.rate for mine, other in pairs]),
        comparison("CPU time", [other.facts["cpu_us"] / mine.facts["cpu_us"] for mine, other in pairs]),
    ]
    for ratio in found:
        say(f"  {ratio.what:<9} {' / '.join(trees)}: {ratio}, n = {rounds}")
    disturbed = sum(run.foreign_cores > FOREIGN_CORES for runs in timings.values() for run in runs)
    if disturbed:
        say(f"  {disturbed} of {2 * rounds} timings were disturbed: others used more than {FOREIGN_CORES} core")
    table = harness.summary({"title": title, **asdict(part)}, timings, [])
    return table | {"ratios": [asdict(ratio) for ratio in found]}


def parts_of(options: argparse.Namespace) -> Iterator[tuple[str, str, Part]]:
    """The name in --parts, a title, and the part itself, for all whose folder is given."""
    training = {**TINY, "threads": options.threads, "steps": STEPS, "warm_up": WARM_UP}
    yield "step", f"training step, tiny32, {options.threads} threads", Part("training", training, options.threads)
    for name, folder, batch, image, readers in (
        ("small", options.shards, 128, 32, ("indexed", "resident")),
        ("photos", options.photos, 32, 224, ("indexed",)),
    ):
        for reader in readers if folder else ():
            where = {"folder": str(folder.resolve()), "batch": batch, "image": image, "reader": reader}
            part = Part("reading", {**where, "seconds": SECONDS, "warm_up": BATCHES}, cores=1)
            yield name, f"reading, {name}, {reader}, 1 core", part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", metavar="REF", help="the commit to compare with")
    parser.add_argument("--shards", type=Path, metavar="FOLDER", help="shards of 32x32 images, for `small`")
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="shards of full-size photographs, for `photos`")
    parser.add_argument("--parts", nargs="+", choices=["step", "small", "photos"], help="default: all that can be")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2, help="of the training step")
    options = parser.parse_args()
    parts = [part for part in parts_of(options) if part[0] in (options.parts or part[0])]
    if missing := set(options.parts or ()) - {name for name, *_ in parts}:
        parser.error(f"--shards or --photos is missing for {' '.join(sorted(missing))}")
    ours = git("describe", "--always", "--abbrev=12", "--dirty")
    theirs = git("rev-parse", "--verify", f"{options.ref}^{{commit}}")[:12]
    with second_tree(options.ref) as other:
        say(f"ours is {ours}, in {HERE}")
        trees = {"ours": HERE, theirs: other}
        tables = {title: compare(title, trees, part, options.rounds, options.threads) for _, title, part in parts}
    for table in tables.values():
        table["settings"]["commits"] = [ours, theirs]
    harness.write(f"against-{theirs}", options.threads, "cpu", tables)


if __name__ == "__main__":
    main()
