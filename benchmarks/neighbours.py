"""What `eval.knn` adds to an evaluation while training: 2,000 CIFAR-10 images to know, 2,000 to tell the class of.

    python -m benchmarks.neighbours --shards SHARDS [--rounds 7] [--threads 1]

The ViT of cifar10/mpp. A round is an evaluation of the first 2,000 test images, with and without, after one that
decodes them all. `cpu_s` is the process's own time, which others on the machine change least.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Contender, Timing
from benchmarks.step import settle

WITHOUT, WITH = "eval.knn=0", "eval.knn=2000"
IMAGES = 2000  # scored


def prepare(setting: str, shards: Path, threads: int, folder: Path) -> Callable[[], Timing]:
    from mpp.execution import at_once, choose
    from mpp.recipe import load_recipe
    from mpp.run.evaluation import evaluation
    from mpp.run.images import open_images
    from mpp.run.start import build, with_index

    settle(threads)
    overrides = [f"data.path={shards}", f"out={folder}", f"eval.images={IMAGES}", f"train.threads={threads}", setting]
    recipe = load_recipe("cifar10/mpp", [*overrides, "train.device=cpu"])
    images = open_images(recipe, None, at_once)
    settings = with_index(recipe, images.batches.index).in_steps(images.batches.epoch)
    objective = build(settings)
    evaluate = evaluation(settings, objective, images, choose(objective, images.batches, settings.train))
    assert evaluate
    evaluate([])

    def in_turn() -> Timing:
        start, own = time.perf_counter(), time.process_time()
        evaluate([])
        return Timing(IMAGES, time.perf_counter() - start, {"cpu_s": time.process_time() - own})

    return in_turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="a folder of CIFAR-10's shards")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shared = {"shards": options.shards, "threads": options.threads, "folder": Path(folder)}
        entrants = [Contender(name, prepare, {**shared, "setting": name}) for name in (WITHOUT, WITH)]
        timings = harness.interleave(entrants, options.rounds)
    pairs = list(zip(timings[WITH], timings[WITHOUT], strict=True))
    medians = {
        "seconds more": statistics.median(more.seconds - less.seconds for more, less in pairs),
        "seconds more of CPU": statistics.median(more.facts["cpu_s"] - less.facts["cpu_s"] for more, less in pairs),
    }
    harness.table("an evaluation of 2,000 images", timings, [])
    for name, value in medians.items():
        harness.say(f"  {name:<44} {value:8.3f}")
    tables = {"cifar10": harness.summary({"images": IMAGES, "medians": medians}, timings, [])}
    harness.write("neighbours-cpu", options.threads, "cpu", tables)


if __name__ == "__main__":
    main()
