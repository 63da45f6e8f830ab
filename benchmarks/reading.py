"""Reading images, ours against webdataset, Pillow and torchvision; and the training loop fed from shards.

    python -m benchmarks.reading [--shards FOLDER] [--photos FOLDER] [--parts small photos loop] [--rounds 5]

small: CIFAR-10 shards to augmented batches of 128. photos: full-size JPEG to crops of 224 pixels. loop: `mpp.train`
fed from CIFAR-10 shards against the bare step on one batch in memory. Ours delivers uint8, which the encoder normalises
on its device; so ours is timed as delivered and again with that normalisation to float32 done here, as the peers do it.
The shards are in the system's memory, and ours has seen each image before, as in every epoch but the first; the first,
in which it looks at each image more closely, is timed as well. `CPU time` compares seconds of processor instead of
seconds passed, which others on the machine disturb less.
"""

import argparse
import contextlib
import io
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks import harness, step
from benchmarks.harness import Bar, Contender, Ratio, Table, Timing

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mpp.batch import Batch
    from mpp.data.read import Batches

SMALL, LARGE = 32, 224  # pixels
BATCH, PHOTO_BATCH = 128, 32  # images
SECONDS = 2.0  # a round of reading, after WARM_UP batches
WARM_UP = 8  # more than webdataset's workers hold ready
LOOP_STEPS, LOOP_WARM_UP = 10, 2  # a round of the loop: ten steps hold one line of its log
AREA = (0.08, 1.0)  # of the crops, torchvision's default

# Issue 4, "speed on the CPU"; PERFORMANCE.md section 7 for two cores against webdataset's two workers.
DECODING_BAR, RESIDENT_BAR, PHOTO_BAR, LOOP_BAR = Bar(20), Bar(50), Bar(1.75), Bar(0.98)
THREADS_BAR, TWO_CORES_BAR = Bar(1.8), Bar(18)
GREY_LEVELS = 0.05  # of 255, that crops may be off in the mean, as PHOTO_BAR has it
Reader = Literal["resident", "indexed"]
KINDS = ("uint8 as delivered", "normalised to float32")


def timed(open_batches: Callable[[], "Iterator[Tensor]"], warm_up: int = WARM_UP, most: float = math.inf) -> Timing:
    """One round: `most` batches from a new iterator, so that none is being prepared while others have their turn."""
    batches = open_batches()
    for _ in range(warm_up):
        next(batches)
    images, count, start, busy = 0, 0, time.perf_counter(), sum(os.times()[:2])
    while count < most and time.perf_counter() - start < SECONDS:
        images, count = images + len(next(batches)), count + 1
    seconds = time.perf_counter() - start
    return Timing(images, seconds, {"cpu_us": 1e6 * (sum(os.times()[:2]) - busy) / images})  # of this process alone


def prepare_webdataset(folder: Path, workers: int) -> Callable[[], Timing]:
    from benchmarks import pipelines

    single_threaded()
    return lambda: timed(lambda: pipelines.webdataset_batches(folder, "train", SMALL, BATCH, workers))


def prepare_ours(folder: Path, side: int, batch: int, reader: Reader, threads: int, kind: str) -> Callable[[], Timing]:
    """Our batches of a training split; a new iterator starts where the last one could not have come."""
    single_threaded()
    batches = our_batches(folder, side, batch, reader, threads)
    for step_of_epoch in range(len(batches)):
        batches.at(step_of_epoch)  # meets each image for the first time, and "resident" decodes it for the last
    starts = itertools.count(1000, 1000)
    return lambda: timed(lambda: images_of(batches, next(starts), kind))


def prepare_first_epoch(folder: Path, side: int, batch: int) -> Callable[[], Timing]:
    """Our batches of images that the reader has not met before."""
    single_threaded()

    def run() -> Timing:
        batches = our_batches(folder, side, batch, "indexed", 1)
        return timed(lambda: images_of(batches, 0, KINDS[0]), warm_up=1, most=len(batches) - 2)

    return run


def our_batches(folder: Path, side: int, batch: int, reader: Reader, threads: int) -> "Batches":
    from mpp.augment.config import AugmentConfig
    from mpp.data.read import read_shards

    augment = AugmentConfig(area=AREA)
    return read_shards(folder, batch, image=(side, side), augment=augment, reader=reader, threads=threads)


def images_of(batches: "Batches", start: int, kind: str) -> "Iterator[Tensor]":
    import torch

    from benchmarks.pipelines import MEAN, STD

    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    for batch in batches.iterate(start):
        yield batch.images if kind == KINDS[0] else batch.images.float().sub_(mean).div_(std)  # (b, c, h, w)


def single_threaded() -> None:
    import cv2
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    cv2.setNumThreads(1)


def in_memory(folder: Path) -> None:
    """Reads all shards once, so that nobody's first round waits for the disk."""
    for path in folder.glob("*.tar"):
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def small(folder: Path, rounds: int) -> Table:
    """CIFAR-10 shards: decoded in every epoch, kept in memory, and on two cores."""
    in_memory(folder)
    shared = {"folder": folder, "side": SMALL, "batch": BATCH}
    theirs, both = "webdataset + Pillow, 1 core", "webdataset + Pillow, 2 workers"
    first = "mpp indexed, 1 thread, first epoch"
    contenders = [
        Contender(theirs, prepare_webdataset, {"folder": folder, "workers": 0}, cores=1),
        Contender(both, prepare_webdataset, {"folder": folder, "workers": 2}, cores=2),
        Contender(first, prepare_first_epoch, shared, cores=1),
    ]
    bars: list[tuple[str, str, Bar | None]] = [(first, theirs, None)]  # contender of ours, the peer and the bar
    for reader, threads, kind, peer, bar in (
        ("indexed", 1, KINDS[0], theirs, DECODING_BAR),
        ("resident", 1, KINDS[0], theirs, RESIDENT_BAR),
        ("indexed", 2, KINDS[0], both, TWO_CORES_BAR),
        ("indexed", 1, KINDS[1], theirs, DECODING_BAR),
        ("resident", 1, KINDS[1], theirs, RESIDENT_BAR),
    ):
        name = f"mpp {reader}, {threads} thread{'s' * (threads > 1)}, {kind}"
        arguments = shared | {"reader": reader, "threads": threads, "kind": kind}
        contenders.append(Contender(name, prepare_ours, arguments, cores=threads))
        bars.append((name, peer, bar))
    bars.append((f"mpp indexed, 2 threads, {KINDS[0]}", f"mpp indexed, 1 thread, {KINDS[0]}", THREADS_BAR))
    timings = harness.interleave(contenders, rounds)
    ratios = [harness.speed(timings, *names) for names in bars]
    ratios += [harness.processor_time(timings, name, peer) for name, peer, _ in bars if peer == theirs]
    return finish("CIFAR-10 shards to batches of 128", timings, ratios)


def first_epoch(folder: Path) -> tuple["np.ndarray", "np.ndarray"]:
    """Which photographs the first epoch shows in turn (n,), and the boxes that it cuts (n, 4)."""
    import numpy as np

    from mpp.augment.config import AugmentConfig
    from mpp.augment.plan import training_plan
    from mpp.seeds import permutation
    from mpp.shards.index import read_index

    index = read_index(folder, "train")
    numbers = permutation(len(index), 0, 0)
    sizes = np.stack([index.height, index.width], axis=1).astype(np.int64)[numbers]
    boxes = training_plan(AugmentConfig(area=AREA), sizes, (LARGE, LARGE), 0, np.arange(len(index))).boxes
    return numbers, boxes


def prepare_pillow(folder: Path) -> Callable[[], Timing]:
    from benchmarks import pipelines

    single_threaded()
    numbers, boxes = first_epoch(folder)
    images = pipelines.encoded(folder, "train")
    images = [images[number] for number in numbers]
    return lambda: timed(lambda: pipelines.pillow_batches(images, boxes.tolist(), LARGE, PHOTO_BATCH))


def prepare_photos(folder: Path, threads: int, kind: str) -> Callable[[], Timing]:
    """Ours on the same photographs, with how far its crops are from Pillow's among the facts."""
    facts = difference(folder)
    run = prepare_ours(folder, LARGE, PHOTO_BATCH, "indexed", threads, kind)

    def with_facts() -> Timing:
        timing = run()
        return replace(timing, facts=timing.facts | facts)

    return with_facts


def difference(folder: Path) -> dict[str, float]:
    """Grey levels, of 255, between our crops and Pillow's: the mean over all photographs, and of the worst one."""
    from benchmarks import pipelines
    from mpp.augment.config import AugmentConfig
    from mpp.data.read import read_shards

    numbers, boxes = first_epoch(folder)
    images = pipelines.encoded(folder, "train")
    augment = AugmentConfig(area=AREA, flip=False)
    batches = read_shards(folder, 1, image=(LARGE, LARGE), augment=augment, reader="indexed", threads=1)
    apart = []
    for position, (number, box) in enumerate(zip(numbers, boxes.tolist(), strict=True)):
        theirs = 255 * pipelines.pillow_crop(images[number], box, LARGE, upright=True)
        apart.append((batches.at(position).images[0] - theirs).abs().mean().item())
    return {"grey_levels_off": sum(apart) / len(apart), "worst": max(apart)}


def photos(folder: Path, rounds: int) -> Table:
    """Full-size JPEG, decoded every time, on one core, and ours on two."""
    in_memory(folder)
    theirs, first = "Pillow + torchvision, 1 core", "mpp, 1 thread, first epoch"
    one, normalised, two = f"mpp, 1 thread, {KINDS[0]}", f"mpp, 1 thread, {KINDS[1]}", f"mpp, 2 threads, {KINDS[0]}"
    contenders = [
        Contender(theirs, prepare_pillow, {"folder": folder}, cores=1),
        Contender(first, prepare_first_epoch, {"folder": folder, "side": LARGE, "batch": PHOTO_BATCH}, cores=1),
        Contender(one, prepare_photos, {"folder": folder, "threads": 1, "kind": KINDS[0]}, cores=1),
        Contender(normalised, prepare_photos, {"folder": folder, "threads": 1, "kind": KINDS[1]}, cores=1),
        Contender(two, prepare_photos, {"folder": folder, "threads": 2, "kind": KINDS[0]}, cores=2),
    ]
    timings = harness.interleave(contenders, rounds)
    ratios = [
        harness.speed(timings, first, theirs),
        harness.speed(timings, one, theirs, PHOTO_BAR),
        harness.speed(timings, normalised, theirs, PHOTO_BAR),
        harness.speed(timings, two, one, THREADS_BAR),
        *(harness.processor_time(timings, name, theirs) for name in (first, one, normalised)),
    ]
    found = timings[one][0].facts["grey_levels_off"]
    harness.say(f"\ncrops are {found:.3f} grey levels of 255 off Pillow's in the mean, asked for is {GREY_LEVELS}")
    return finish("photographs to crops of 224 pixels", timings, ratios)


@dataclass
class Watched:
    """Batches that note when the loop asks for the next one: step k is over at times[k]."""

    batches: "Batches"
    times: list[float]

    def at(self, step: int) -> "Batch":
        return self.batches.at(step)

    def iterate(self, start: int, stop: Sequence[int] = ()) -> "Iterator[Batch]":
        for batch in self.batches.iterate(start, stop):
            self.times.append(time.perf_counter())
            yield batch


def prepare_loop(folder: Path, threads: int) -> Callable[[], Timing]:
    """`mpp.train`, its log and its reader as they come; start and last checkpoint are off the clock."""
    from mpp.data.read import read_shards
    from mpp.loop import train
    from mpp.train_config import TrainConfig

    step.settle(threads)
    size = step.SIZES["cpu"]["tiny32"]
    objective = step.our_objective(size)
    config = TrainConfig(steps=LOOP_WARM_UP + LOOP_STEPS + 2, batch=size.batch)

    def run() -> Timing:
        watched = Watched(read_shards(folder, size.batch, image=(size.image, size.image)), [])
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stderr(io.StringIO()):  # the progress bar
            train(objective, watched, config, out=Path(out))
        seconds = watched.times[LOOP_WARM_UP + LOOP_STEPS] - watched.times[LOOP_WARM_UP]
        return Timing(LOOP_STEPS * size.batch, seconds)

    return run


def loop(folder: Path, rounds: int, threads: int) -> Table:
    """The training loop fed from shards, and the bare step."""
    size = step.SIZES["cpu"]["tiny32"]
    fed, bare = "mpp.train from CIFAR-10 shards", "mpp's step on one batch in memory"
    in_memory(folder)
    arguments = {"size": size, "device": "cpu", "threads": threads, "steps": LOOP_STEPS}
    contenders = [
        Contender(fed, prepare_loop, {"folder": folder, "threads": threads}),
        Contender(bare, step.prepare_ours, arguments),
    ]
    timings = harness.interleave(contenders, rounds)
    return finish("training loop, tiny32", timings, [harness.speed(timings, fed, bare, LOOP_BAR)])


def finish(title: str, timings: dict[str, list[Timing]], ratios: list[Ratio]) -> Table:
    harness.table(title, timings, ratios)
    return harness.summary({"title": title}, timings, ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, metavar="FOLDER", help="CIFAR-10 shards, for `small` and `loop`")
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="shards of full-size photographs, for `photos`")
    parser.add_argument("--parts", nargs="+", choices=["small", "photos", "loop"], help="default: all of those folders")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of the training step in `loop`")
    options = parser.parse_args()
    parts = {
        "small": (options.shards, lambda: small(options.shards, options.rounds)),
        "photos": (options.photos, lambda: photos(options.photos, options.rounds)),
        "loop": (options.shards, lambda: loop(options.shards, options.rounds, options.threads)),
    }
    chosen = options.parts or [name for name, (folder, _) in parts.items() if folder]
    if missing := [name for name in chosen if not parts[name][0]] or not chosen:
        parser.error(f"--shards or --photos is missing{'' if missing is True else ' for ' + ' '.join(missing)}")
    harness.write("reading-cpu", options.threads, "cpu", {name: parts[name][1]() for name in chosen})


if __name__ == "__main__":
    main()
