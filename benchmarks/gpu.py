"""The training step on one GPU: ours, eager and compiled, against timm's and vit-pytorch's, of the ViT paper's sizes.

    python -m benchmarks.gpu [--sizes S/16 B/16 L/16] [--rounds 5] [--folder benchmarks/results] [--tiny]

Random images on the GPU, forward, backward and AdamW, as in benchmarks.step. One process holds all contenders, which
take turns; the first round of each, with its compiling, stands apart as cold. A matrix product in every round measures
what the GPU can do at most, of which the steps' matrix products reach a share. `--tiny` tries all of it on a CPU.
"""

import argparse
import gc
import re
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.harness import Table, Timing
from benchmarks.step import (
    OURS_COMPILED,
    STEPS,
    TIMM,
    TIMM_BEST,
    VIT_PYTORCH_BF16,
    WARM_UP,
    Size,
    our_objective,
    prepare_ours,
    prepare_peer,
)
from mpp.batch import Batch

OURS_EAGER = "mpp, eager"
SIZES = {
    "S/16": Size(224, 16, 384, 12, 6, 1024),
    "B/16": Size(224, 16, 768, 12, 12, 512),
    "L/16": Size(224, 16, 1024, 24, 16, 256),
}
TINY = {"tiny": Size(32, 8, 64, 2, 2, 8)}
SIDE = 8192  # of the matrices that measure the most a GPU can do
PRODUCTS = 20  # of them a round
COUNTED = 2  # images of which FLOPs are counted
KERNELS = {  # by their names; the first that fits
    "attention": r"flash|fmha|attention|sdpa",
    "products": r"gemm|nvjet|cutlass|xmma|cublas|splitk",
    "optimizer": r"multi_tensor|foreach",
    "copies": r"memcpy|memset",
    "compiled": r"^triton",
}


@dataclass(frozen=True)
class Contender:
    run: Callable[[], Timing]  # one round
    batch: int
    cold: float  # s, of what comes before the first step on the clock: loading, compiling, warming up
    peak: float  # MiB of the device


def contenders(size: Size, device: str) -> dict[str, Callable[[int], Callable[[], Timing]]]:
    """By name what prepares a contender for steps of so many images."""

    def ours(batch: int, compiled: bool) -> Callable[[], Timing]:
        return prepare_ours(replace(size, batch=batch), device, 1, micro_batch=batch, compiled=compiled)

    def peer(name: str) -> Callable[[int], Callable[[], Timing]]:
        return lambda batch: prepare_peer(replace(size, batch=batch), device, 1, name=name)

    compiled = {OURS_COMPILED: lambda batch: ours(batch, True), TIMM_BEST: peer(TIMM_BEST)}
    eager = {OURS_EAGER: lambda batch: ours(batch, False), TIMM: peer(TIMM), VIT_PYTORCH_BF16: peer(VIT_PYTORCH_BF16)}
    return eager if device == "cpu" else compiled | eager


def warmed(prepare: Callable[[int], Callable[[], Timing]], batch: int, device: str) -> Contender:
    """A contender after its first round, with the largest half of the batch, or half of that ..., that fits."""
    while True:
        try:
            before = 0
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            run = prepare(batch)
            first = run()
            cold = time.perf_counter() - start - first.seconds
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if device == "cuda" else harness.peak_mib()
            return Contender(run, batch, cold, peak)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
        gc.collect()
        torch.cuda.empty_cache()


def flops(size: Size) -> int:
    """FLOPs of one image's matrix products, forward and backward, counted on torch's "meta" device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        images = torch.empty(COUNTED, 3, size.image, size.image, dtype=torch.uint8)
        our_objective(size)(Batch(images))[0].backward()
    return counter.get_total_flops() // COUNTED


def ceiling(device: str) -> float:
    """FLOP/s of a large product of random bfloat16 matrices."""
    side, count = (SIDE, PRODUCTS) if device == "cuda" else (256, 1)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    a @ b
    wait()
    start = time.perf_counter()
    for _ in range(count):
        a @ b
    wait()
    return 2 * side**3 * count / (time.perf_counter() - start)


def by_kernel(run: Callable[[], Timing]) -> dict[str, Any]:
    """GPU milliseconds of a step by group of kernels, and of the twelve kernels that take most."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as told:
        run()
    times = {
        event.key: event.self_device_time_total / 1e3 / (WARM_UP + STEPS)
        for event in told.key_averages()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    }
    groups: dict[str, float] = {}
    for name, milliseconds in times.items():
        groups[group_of(name)] = groups.get(group_of(name), 0) + milliseconds
    most = sorted(times.items(), key=lambda pair: -pair[1])[:12]
    return {"ms": groups, "most": {name[:100]: milliseconds for name, milliseconds in most}}


def group_of(kernel: str) -> str:
    return next((group for group, words in KERNELS.items() if re.search(words, kernel, re.I)), "other")


def syncs(run: Callable[[], Timing]) -> int:
    """How often the host waits for the device in a round; a round itself does so for its loss."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in seen)


def measure(name: str, size: Size, device: str, rounds: int) -> Table:
    """All contenders of a size in turn, printed and as they stand in the JSON file."""
    torch.compiler.reset()
    ready, lost = {}, {}
    for each, prepare in contenders(size, device).items():
        try:
            ready[each] = warmed(prepare, size.batch, device)
            harness.say(f"  {name} {each:<34} cold {ready[each].cold:6.1f} s")
        except Exception as error:  # a peer's may be any; the others go on
            lost[each] = f"{type(error).__name__}: {str(error)[:300]}"
            harness.say(f"  {name} {each}: {lost[each]}")
    timings: dict[str, list[Timing]] = {each: [] for each in ready}
    most = []
    for _ in range(rounds):
        most.append(ceiling(device))
        for each, contender in ready.items():
            timings[each].append(replace(contender.run(), peak_mib=contender.peak))
    ours, count = OURS_EAGER if device == "cpu" else OURS_COMPILED, flops(size)
    ratios = [harness.speed(timings, ours, each) for each in timings if each != ours and ours in timings]
    harness.table(f"{name} {size}", timings, ratios)
    found = harness.summary(vars(size), timings, ratios)
    found |= {"lost": lost, "flops_an_image": count, "ceiling_tflops": [one / 1e12 for one in most]}
    found["contenders"] = {}
    for each, contender in ready.items():
        reached = share(timings[each], count, most)
        facts = {"batch": contender.batch, "cold_s": contender.cold, "share_of_ceiling": reached}
        found["contenders"][each] = facts
        harness.say(f"  {each:<34} batch {contender.batch}, {reached:.1%} of the ceiling")
    if device == "cuda" and ours in ready:
        found["profile"] = by_kernel(ready[ours].run)
        found["syncs"] = syncs(ready[ours].run)
        harness.say(
            f"  a step of {ours}, ms: {found['profile']['ms']}; a round's waits for the device: {found['syncs']}"
        )
    return found


def share(runs: list[Timing], count: int, most: list[float]) -> float:
    """The median over rounds of the FLOP/s that a contender reached over the ceiling of the same round."""
    return statistics.median(run.rate * count / one for run, one in zip(runs, most, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), metavar="SIZE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=harness.RESULTS, help="where the JSON file goes")
    parser.add_argument("--tiny", action="store_true", help="a tiny size on a CPU, to try the command")
    options = parser.parse_args()
    device, sizes = ("cpu", TINY) if options.tiny else ("cuda", {name: SIZES[name] for name in options.sizes})
    name = "gpu-tiny" if options.tiny else "gpu-" + re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    tables: dict[str, Table] = {}
    for each, size in sizes.items():
        tables[each] = measure(each, size, device, options.rounds)
        harness.write(name, 1, device, tables, options.folder)  # each time: what is done is kept
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
