"""Reading images, ours against webdataset, Pillow and torchvision; and the training loop fed from shards.

    python -m benchmarks.reading [--shards FOLDER] [--photos FOLDER] [--parts small photos loop] [--rounds 5]

small: CIFAR-10 shards to augmented batches of 128. photos: full-size JPEG to crops of 224 pixels. loop: `mpp.train`
fed from CIFAR-10 shards against the bare step on one batch in memory. Ours delivers uint8, which the encoder normalises
on its device; so ours is timed as delivered and again with that normalisation to float32 done here, as the peers do it.
"""

import argparse
import contextlib
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
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

# Issue 2, and PERFORMANCE.md section 7 for two cores.
DECODING_BAR, RESIDENT_BAR, TWO_CORES_BAR, PHOTO_BAR, LOOP_BAR = Bar(20), Bar(50), Bar(18), Bar(1.75), Bar(0.98)
Reader = Literal["resident", "indexed"]
KINDS = ("uint8 as delivered", "normalised to float32")


def timed(open_batches: Callable[[], "Iterator[Tensor]"]) -> Timing:
    """One round: batches from a new iterator, so that none is being prepared while others have their turn."""
    batches = open_batches()
    for _ in range(WARM_UP):
        next(batches)
    images, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < SECONDS:
        images += len(next(batches))
    return Timing(images, seconds)


def prepare_webdataset(folder: Path, workers: int) -> Callable[[], Timing]:
    from benchmarks import pipelines

    single_threaded()
    return lambda: timed(lambda: pipelines.webdataset_batches(folder, "train", SMALL, BATCH, workers))


def prepare_ours(folder: Path, side: int, batch: int, reader: Reader, threads: int, kind: str) -> Callable[[], Timing]:
    """Our batches of a training split; a new iterator starts where the last one could not have come."""
    single_threaded()
    batches = our_batches(folder, side, batch, reader, threads)
    for step_of_epoch in range(len(batches) if reader == "resident" else 0):
        batches.at(step_of_epoch)  # decodes each image for the first and last time
    starts = itertools.count(0, 1000)
    return lambda: timed(lambda: images_of(batches, next(starts), kind))


def our_batches(folder: Path, side: int, batch: int, reader: Reader, threads: int) -> "Batches":
    from mpp.data.augment import AugmentConfig
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


def small(folder: Path, rounds: int) -> Table:
    """CIFAR-10 shards: decoded in every epoch, kept in memory, and on two cores."""
    theirs, both = "webdataset + Pillow, 1 core", "webdataset + Pillow, 2 workers"
    contenders = [Contender(theirs, prepare_webdataset, {"folder": folder, "workers": 0}, cores=1)]
    contenders += [Contender(both, prepare_webdataset, {"folder": folder, "workers": 2}, cores=2)]
    bars: dict[str, tuple[str, Bar]] = {}  # contender of ours -> the peer and the bar
    for kind in KINDS:
        for reader, threads, peer, bar in (
            ("indexed", 1, theirs, DECODING_BAR),
            ("resident", 1, theirs, RESIDENT_BAR),
            ("indexed", 2, both, TWO_CORES_BAR),
        ):
            name = f"mpp {reader}, {threads} thread{'s' * (threads > 1)}, {kind}"
            shared = {"folder": folder, "side": SMALL, "batch": BATCH}
            arguments = shared | {"reader": reader, "threads": threads, "kind": kind}
            contenders.append(Contender(name, prepare_ours, arguments, cores=threads))
            bars[name] = (peer, bar)
    timings = harness.interleave(contenders, rounds)
    ratios = [harness.speed(timings, name, peer, bar) for name, (peer, bar) in bars.items()]
    return finish("CIFAR-10 shards to batches of 128", timings, ratios)


def first_epoch(folder: Path) -> tuple["np.ndarray", "np.ndarray"]:
    """Which photographs the first epoch shows in turn (n,), and the boxes that it cuts (n, 4)."""
    import numpy as np

    from mpp.data.augment import AugmentConfig, training_plan
    from mpp.data.index import read_index
    from mpp.seeds import permutation

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


def prepare_photos(folder: Path, kind: str) -> Callable[[], Timing]:
    """Ours on the same photographs, with how far its crops are from Pillow's among the facts."""
    facts = difference(folder)
    run = prepare_ours(folder, LARGE, PHOTO_BATCH, "indexed", 1, kind)
    return lambda: replace(run(), facts=facts)


def difference(folder: Path) -> dict[str, float]:
    """Grey levels, of 255, between our crops and Pillow's: the mean over all photographs, and of the worst one."""
    from benchmarks import pipelines
    from mpp.data.augment import AugmentConfig
    from mpp.data.read import read_shards

    numbers, boxes = first_epoch(folder)
    images = pipelines.encoded(folder, "train")
    augment = AugmentConfig(area=AREA, flip=False)
    batches = read_shards(folder, 1, image=(LARGE, LARGE), augment=augment, reader="indexed", threads=1)
    apart = []
    for position, (number, box) in enumerate(zip(numbers, boxes.tolist(), strict=True)):
        theirs = 255 * pipelines.pillow_crop(images[number], box, LARGE)
        apart.append((batches.at(position).images[0] - theirs).abs().mean().item())
    return {"grey_levels_off": sum(apart) / len(apart), "worst": max(apart)}


def photos(folder: Path, rounds: int) -> Table:
    """Full-size JPEG, decoded every time, on one core."""
    theirs = "Pillow + torchvision, 1 core"
    contenders = [Contender(theirs, prepare_pillow, {"folder": folder}, cores=1)]
    for kind in KINDS:
        arguments = {"folder": folder, "kind": kind}
        contenders.append(Contender(f"mpp, 1 thread, {kind}", prepare_photos, arguments, cores=1))
    timings = harness.interleave(contenders, rounds)
    ratios = [harness.speed(timings, ours.name, theirs, PHOTO_BAR) for ours in contenders[1:]]
    return finish("photographs to crops of 224 pixels, images/s of one core", timings, ratios)


@dataclass
class Watched:
    """Batches that note when the loop asks for the next one: step k is over at times[k]."""

    batches: "Batches"
    times: list[float]

    def at(self, step: int) -> "Batch":
        return self.batches.at(step)

    def iterate(self, start: int) -> "Iterator[Batch]":
        for batch in self.batches.iterate(start):
            self.times.append(time.perf_counter())
            yield batch


def prepare_loop(folder: Path, threads: int) -> Callable[[], Timing]:
    """`mpp.train`, its log and its reader as they come; start and last checkpoint are off the clock."""
    from mpp.data.read import read_shards
    from mpp.loop import TrainConfig, train

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
