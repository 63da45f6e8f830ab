"""What the number of images costs: start-up, memory and the time of a batch with a million images indexed.

    python -m benchmarks.scale --shards FOLDER [--sizes 10000 1000000] [--rounds 7]

The index is synthetic: the images of FOLDER again and again under keys of their own. The reads are real: each image is
read at its place, checked and decoded, in a whole epoch before the rounds, over which memory is watched. Every size is
a process of its own, and rounds go in turn.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import harness
from benchmarks.harness import Bar, Contender, Timing

if TYPE_CHECKING:
    from mpp.shards.index import Index

BATCH, STEPS = 128, 100  # images; batches of a round
START_BAR = Bar(2.0, most=True)  # issue 4: seconds until the first batch of a million images
BATCH_BAR = Bar(0.95)  # issue 4: independent of the set's size; the rest is noise between processes
MEMORY_BAR = Bar(1.05, most=True)  # issue 4: flat; resident memory after an epoch over that after its first batches
STRIDE = 997  # batches between rounds, so that each round reads elsewhere


def repeated(index: "Index", count: int) -> "Index":
    """`count` images: those of an index again and again, each with a key of its own."""
    import numpy as np

    from mpp.shards.index import ARRAYS

    rows = {name: np.resize(getattr(index, name), count) for name in ARRAYS if not name.startswith("key_")}
    keys = np.frombuffer(b"".join(b"%012d" % number for number in range(count)), np.uint8)
    return replace(index, **rows, key_bytes=keys, key_ends=12 * np.arange(1, count + 1))


def prepare(folder: Path, size: int) -> Callable[[], Timing]:
    """Opens a split of `size` images, hold-out and all, and times it up to the first batch."""
    import numpy as np
    import torch

    from mpp.data.chosen import chosen
    from mpp.data.config import DataConfig
    from mpp.data.read import open_batches
    from mpp.shards.index import read_index, write_index

    torch.set_num_threads(1)
    source = read_index(folder, "train")
    place = Path(tempfile.mkdtemp(prefix=f"mpp-scale-{size}-"))
    for name in source.shards:
        (place / name).symlink_to((folder / name).resolve())
    write_index(replace(repeated(source, size), folder=place))
    start = time.perf_counter()
    config = DataConfig(str(place), hold_out=0.01, reader="indexed", threads=1)
    train, _ = chosen(config, seed=0, labelled=False)
    batches = open_batches(train, BATCH, config)
    batches.at(0)
    facts = {"start_s": time.perf_counter() - start, "index_mib": size_of(place) / 2**20}
    for step in range(1, STEPS):
        batches.at(step)
    facts["rss_mib"] = resident_mib()
    for step in range(STEPS, len(batches)):
        batches.at(step)
    facts["rss_growth"] = resident_mib() / facts["rss_mib"]
    rounds = itertools.count(1)

    def run() -> Timing:
        first, times = len(batches) + next(rounds) * STRIDE, []
        for step in range(first, first + STEPS):
            begin = time.perf_counter()
            batches.at(step)
            times.append(time.perf_counter() - begin)
        return Timing(STEPS * BATCH, STEPS * float(np.median(times)), facts | {"slowest_ms": 1000 * max(times)})

    return run


def size_of(place: Path) -> int:
    """Bytes of the index."""
    return sum(path.stat().st_size for path in place.glob("*-index.safetensors"))


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shards", type=Path, metavar="FOLDER", required=True, help="of small images, such as CIFAR-10"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 1_000_000], help="images indexed")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    names = {size: f"{size:,} images" for size in options.sizes}
    contenders = [
        Contender(names[size], prepare, {"folder": options.shards, "size": size}, cores=1) for size in options.sizes
    ]
    timings = harness.interleave(contenders, options.rounds)
    least, most = names[min(options.sizes)], names[max(options.sizes)]
    ratios = [harness.speed(timings, most, least, BATCH_BAR)]
    harness.table("batches of 128 images of 32x32, decoded each time", timings, ratios)
    facts = timings[most][-1].facts
    for what, value, bar in (("start", facts["start_s"], START_BAR), ("memory", facts["rss_growth"], MEMORY_BAR)):
        harness.say(f"  {what:<11} {most}: {value:.3f}  bar {bar}: {'met' if bar.met(value) else 'NOT met'}")
    spread = statistics.median(run.facts["slowest_ms"] for run in timings[most])
    harness.say(f"  slowest batch of a round, {most}: median {spread:.1f} ms")
    table = harness.summary({"title": "a million images", "batch": BATCH}, timings, ratios)
    harness.write("scale-cpu", 1, "cpu", {"scale": table})


if __name__ == "__main__":
    main()
