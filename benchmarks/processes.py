"""Two processes of one thread against one process of two, and what it costs to sum their gradients, on the CPU.

    python -m benchmarks.processes [--sizes cifar10 tiny32 vit_s] [--sums cifar10 vit_s vit_b] [--rounds 11]

The step is that of `benchmarks.step`, of the same whole batch: each of several processes (gloo) takes its part of it
and the mean of all gradients, as `mpp pretrain` does under torchrun. The sum is `Ranks.average` of a model's gradients:
one copy into a flat tensor, one all-reduce, one division.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.against import comparison
from benchmarks.harness import FOREIGN_CORES, Contender, Table, Timing, say
from benchmarks.step import LEARNING_RATE, SIZES, SameBatch, Size, images_of, our_objective, settle, timed

if TYPE_CHECKING:
    from mpp.ranks import Ranks

STEP_SIZES = {"cifar10": Size(32, 4, 128, 4, 4, 128), **SIZES["cpu"]}  # the first is that of recipes/cifar10/mpp.yaml
SUM_SIZES = {**STEP_SIZES, "vit_b": Size(224, 16, 768, 12, 12, 8)}
SUMS = 5  # a round
FEWEST = 5  # quiet rounds, to leave the others out
SAME = 0.02  # share by which losses may differ after the same steps, in bfloat16


def prepare(size: Size, processes: int, threads: int, part: str) -> Callable[[], Timing]:
    """This process as the first of several, which it starts; `part` is what a round of each does: step or sum."""
    context = multiprocessing.get_context("spawn")
    meeting = tempfile.mkdtemp()
    pipes = []
    for rank in range(1, processes):
        pipe, end = context.Pipe()
        # A daemon: it ends with this process.
        context.Process(target=follow, args=(end, size, rank, processes, threads, part, meeting), daemon=True).start()
        end.close()
        pipes.append(pipe)
    run = PARTS[part](size, joined(0, processes, threads, meeting))

    def all_run() -> Timing:
        for pipe in pipes:
            pipe.send("round")
        busy = harness.own_seconds()
        timing = run()
        peaks = [harness.peak_mib(), *(pipe.recv() for pipe in pipes)]
        cpu_us = 1e6 * (harness.own_seconds() - busy) / timing.images  # with warm-up and sums, for a comparison
        return Timing(timing.images, timing.seconds, {**timing.facts, "cpu_us": cpu_us, "mib_in_all": sum(peaks)})

    return all_run


def follow(pipe: Connection, size: Size, rank: int, processes: int, threads: int, part: str, meeting: str) -> None:
    """The life of another process: a round for each word from the first one."""
    run = PARTS[part](size, joined(rank, processes, threads, meeting))
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        run()
        pipe.send(harness.peak_mib())


def joined(rank: int, processes: int, threads: int, meeting: str) -> "Ranks":
    """The processes together, as `mpp.ranks.together` joins them, but for the heartbeat."""
    import torch.distributed as dist

    from mpp.launch import Launch
    from mpp.ranks import Ranks

    settle(threads)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=processes)
    return Ranks(Launch(rank, processes, rank, processes))


def prepare_step(size: Size, ranks: "Ranks") -> Callable[[], Timing]:
    """What `mpp.train` does with each batch, by default settings; then how long the sum of such gradients takes."""
    import torch

    from mpp.batch import Batch
    from mpp.execution import choose, forward_pass
    from mpp.loop import build_optimizer, placed, update
    from mpp.train_config import TrainConfig

    whole = Batch(images_of(size, "cpu"))
    batch = list(whole.split(size.batch // ranks.size))[ranks.rank]
    objective = our_objective(size).train()
    config = TrainConfig(steps=10_000, batch=size.batch, lr=LEARNING_RATE, device="cpu")
    execution = choose(objective, SameBatch(whole), config)
    micro_batch = min(execution.micro_batch, len(batch))
    optimizer, forward = build_optimizer(objective, config), forward_pass(objective, config, execution)
    numbers = itertools.count(1)

    def step() -> torch.Tensor:
        turn = ranks.turn([], batch)
        mine, number, share = placed(batch, turn), next(numbers), turn.images / ranks.size
        loss, _norm, _metrics = update(
            forward, objective, optimizer, mine, config, micro_batch, 0, number, ranks, share
        )
        return loss

    gradients = [torch.zeros_like(parameter) for parameter in objective.parameters()]

    def run() -> Timing:
        timing = timed(step, size.batch, "cpu")
        sums = seconds_of_sums(ranks, gradients)
        share = sums * timing.images / size.batch / timing.seconds
        return Timing(timing.images, timing.seconds, {**timing.facts, "sum_ms": 1e3 * sums, "sum_share": share})

    return run


def prepare_sum(size: Size, ranks: "Ranks") -> Callable[[], Timing]:
    """The mean of a model's gradients over the processes, and of it the all-reduce alone."""
    import torch
    import torch.distributed as dist

    with torch.device("meta"):
        shapes = [parameter.shape for parameter in our_objective(size).parameters()]
    gradients = [torch.zeros(shape) for shape in shapes]
    flat = torch.cat([gradient.flatten() for gradient in gradients])

    def run() -> Timing:
        seconds = seconds_of_sums(ranks, gradients)
        alone = clocked(ranks, lambda: dist.all_reduce(flat))
        facts = {"parameters": float(flat.numel()), "sum_ms": 1e3 * seconds, "all_reduce_ms": 1e3 * alone}
        return Timing(SUMS, SUMS * seconds, facts)

    return run


def seconds_of_sums(ranks: "Ranks", gradients: list[Any]) -> float:
    return clocked(ranks, lambda: ranks.average(gradients)) if ranks.size > 1 else 0.0


def clocked(ranks: "Ranks", work: Callable[[], object]) -> float:
    """Seconds of one call, of some after a first one, which all processes begin together."""
    work()
    ranks.wait()
    start = time.perf_counter()
    for _ in range(SUMS):
        work()
    return (time.perf_counter() - start) / SUMS


PARTS = {"step": prepare_step, "sum": prepare_sum}


def steps(name: str, processes: int, rounds: int) -> Table:
    """One size: the same number of threads in one process and in several."""
    size, load = STEP_SIZES[name], os.getloadavg()[0]
    alone, together = f"1 process of {processes} threads", f"{processes} processes of 1 thread"
    arguments: dict[str, Any] = {"size": size, "part": "step"}
    timings = harness.interleave(
        [
            Contender(alone, prepare, {**arguments, "processes": 1, "threads": processes}),
            Contender(together, prepare, {**arguments, "processes": processes, "threads": 1}),
        ],
        rounds,
    )
    harness.table(f"{name} {size}", timings, [])
    pairs = list(zip(timings[together], timings[alone], strict=True))
    if wrong := [pair for pair in pairs if abs(pair[0].facts["loss"] / pair[1].facts["loss"] - 1) > SAME]:
        raise SystemExit(f"{name}: not the same training, its losses are {[run.facts['loss'] for run in wrong[0]]}")
    pairs = quiet(pairs)
    found = [
        comparison("speed", [ours.rate / theirs.rate for ours, theirs in pairs]),
        comparison("CPU time", [theirs.facts["cpu_us"] / ours.facts["cpu_us"] for ours, theirs in pairs]),
    ]
    for ratio in found:
        say(f"  {ratio.what:<9} {together} / {alone}: {ratio}, n = {len(pairs)}")
    shares = [ours.facts["sum_share"] for ours, _ in pairs]
    say(f"  the sum of gradients takes {spread([100 * share for share in shares])} % of a step")
    settings = {**asdict(size), "processes": processes, "load_average": [load, os.getloadavg()[0]], "quiet": len(pairs)}
    return harness.summary(settings, timings, []) | {"ratios": [asdict(ratio) for ratio in found]}


def sums(names: list[str], processes: int, rounds: int) -> Table:
    """The sum of gradients by size, of all sizes in turn."""
    load = os.getloadavg()[0]
    shared = {"processes": processes, "threads": 1, "part": "sum"}
    entrants = [Contender(name, prepare, {"size": SUM_SIZES[name], **shared}) for name in names]
    timings = harness.interleave(entrants, rounds, "sums/s")
    say(f"\nthe sum of gradients over {processes} processes: {rounds} rounds in turn, medians (least-most)")
    for name, runs in timings.items():
        kept = [run for (run,) in quiet([(run,) for run in runs])]
        whole, alone = (spread([run.facts[key] for run in kept]) for key in ("sum_ms", "all_reduce_ms"))
        millions = runs[0].facts["parameters"] / 1e6
        say(f"  {name:<8} {millions:5.1f} M parameters  {whole} ms, of it the all-reduce {alone} ms, n = {len(kept)}")
    return harness.summary({"processes": processes, "load_average": [load, os.getloadavg()[0]]}, timings, [])


def quiet(rounds: Sequence[tuple[Timing, ...]]) -> list[tuple[Timing, ...]]:
    """The rounds that nobody else disturbed; all, where too few would be left."""
    found = [runs for runs in rounds if all(run.foreign_cores <= FOREIGN_CORES for run in runs)]
    if len(found) < min(FEWEST, len(rounds)):
        say(f"  only {len(found)} of {len(rounds)} rounds were quiet: all of them count, disturbed as they are")
        return list(rounds)
    say(f"  {len(found)} of {len(rounds)} rounds were quiet, and count: others used at most {FOREIGN_CORES} core")
    return found


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=list(STEP_SIZES), default=list(STEP_SIZES))
    parser.add_argument("--sums", nargs="*", choices=list(SUM_SIZES), default=["cifar10", "vit_s", "vit_b"])
    parser.add_argument("--processes", type=int, default=2, help="and threads of the one process (default: 2)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, metavar="FOLDER", help="of the JSON file")
    options = parser.parse_args()
    say(f"load average {' '.join(f'{load:.1f}' for load in os.getloadavg())}")
    tables = {name: steps(name, options.processes, options.rounds) for name in options.sizes}
    if options.sums:
        tables["sums"] = sums(options.sums, options.processes, options.rounds)
    harness.write("processes-cpu", options.processes, "cpu", tables, options.out)


if __name__ == "__main__":
    main()
