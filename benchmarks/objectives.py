"""Every objective without labels on CIFAR-10, by one small ViT: what its encoder is worth, for images and for time.

    python -m benchmarks.objectives table --data data/cifar10 --out runs/objectives [--rows mae mpp]

table: for each objective the learning rate is chosen first: a run at each of RATES, and at further ones until the best
    is not at the edge, scored by a linear classifier on training images that it was not fitted to. The run at the best
    rate is the one whose test figures are given. Those are looked at once, behind the choice.
best: the two best of the table, by the held-out score, with two more seeds.
time: the two best and the paper's objective in its full form, for the time that its dropped form takes for IMAGES.
forms: the paper's objective in its two forms, and MAE, for several times, n = 3; its shares and decoders.
speed: images a second of each, one thread, in turn. `time` and `forms` need it.
gather: all figures that there are, in one file (OUT/objectives-cifar10.json), as every command leaves it.

Each stage leaves a JSON file and is not computed again; processes, of one thread, may share the work by --rows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.objectives_rows import FORMS, ROWS, SHAPE, VARIANTS, Row
from benchmarks.objectives_speed import speed
from mpp.jsons import encoded, read_lines

IMAGES, WARM_UP = 75_000, 0.1  # seen in pretraining; the share of them in which the rate rises
LAST = 10  # lines of metrics, of every tenth step
RATES = (5e-4, 1e-3, 2e-3)
FIT, SCORE = 10_000, 5_000  # training images of the held-out score: fitted to, scored on
SEEDS = (0, 1, 2)
FACTORS = (0.5, 1.0, 2.0)  # of the time that the dropped form takes for IMAGES
QUIET = ("data.val=null", "log.pictures=0", "log.tensorboard=false", "train.save_every=100_000", "train.epochs=null")
LABELS = ("data.subset.share=0.1", "train.epochs=null", "train.images=60_000", "train.warmup=6_000", "log.pictures=0")


@dataclass(frozen=True)
class Work:
    """Where everything lies."""

    data: Path
    out: Path

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What a stage found: from its file, or made now."""
        path = self.out / f"{name}.json"
        if not path.exists():
            found = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(found, indent=1))
        return json.loads(path.read_bytes())

    def mpp(self, *words: str | Path) -> None:
        """Runs `mpp`, which goes on where it was interrupted, and shows what it says where it fails."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "mpp", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")

    def run(self, name: str, rate: float, seed: int = 0, images: int = IMAGES) -> Path:
        """The place of a pretraining's run folder."""
        return self.out / "runs" / f"{name}-{images}-{rate:g}-{seed}"

    def pretrained(self, row: Row, name: str, rate: float, seed: int = 0, images: int = IMAGES) -> Path:
        """The run folder of a pretraining, trained now if it is not there."""
        run = self.run(name, rate, seed, images)
        length = (f"train.images={images}", f"train.warmup={round(WARM_UP * images)}", f"train.lr={rate:g}")
        if not (run / "encoder.safetensors").exists():
            settings = (*SHAPE, *QUIET, *length, *row.encoder, *row.settings)
            self.mpp("pretrain", row.recipe, f"data.path={self.data}", f"out={run}", f"seed={seed}", *settings)
        return run

    def held_out(self, run: Path) -> float:
        """The share of SCORE training images that a linear classifier gets right that was fitted to FIT others."""
        return float(self.kept(f"runs/{run.name}-held-out", lambda: held_out(run, self.data)))

    def tested(self, row: Row, run: Path, seed: int) -> dict[str, float]:
        """Figures on the test images: frozen features, and fine-tuning with a tenth of the labels."""

        def test() -> dict[str, float]:
            return self.frozen(run) | {"fine-tuned": self.fine_tuned(row, run.name, seed, "--from", run)}

        found: dict[str, float] = self.kept(f"runs/{run.name}-test", test)
        return found

    def untrained(self, row: Row, run: Path, seed: int) -> dict[str, float]:
        """The same of the encoder that a run began with, which is that of every row of the same seed and encoder."""
        kind = "".join(f"-{setting}" for setting in row.encoder)

        def test() -> dict[str, float]:
            return self.frozen(run, "--untrained") | {"fine-tuned": self.fine_tuned(row, f"scratch{kind}-{seed}", seed)}

        found: dict[str, float] = self.kept(f"untrained{kind}-{seed}", test)
        return found

    def frozen(self, run: Path, *options: str) -> dict[str, float]:
        path = self.out / f"{run.name}-probe{''.join(options)}.json"
        self.mpp("probe", run, "--data", self.data, "--json", path, *options)
        rows = json.loads(path.read_bytes())["rows"]
        path.unlink()
        names = {("linear", "top1"): "linear", ("knn", "top1"): "k-NN", ("few-shot", "5-shot"): "5-shot"}
        return {names[key]: row["value"] for row in rows if (key := (row["protocol"], row["metric"])) in names}

    def fine_tuned(self, row: Row, name: str, seed: int, *start: str | Path) -> float:
        out = self.out / "runs" / f"{name}-fine-tuned"
        settings = (*SHAPE, *LABELS, *row.encoder, f"data.path={self.data}", f"seed={seed}", "log.tensorboard=false")
        self.mpp("finetune", "cifar10/finetune", *start, f"out={out}", *settings)
        return float(json.loads((out / "scores.json").read_bytes())["top1"])


def held_out(run: Path, data: Path) -> float:
    """What `Work.held_out` keeps."""
    import torch

    from mpp import load_encoder, read_shards
    from mpp.eval.features.extract import kept_blocks, vectors
    from mpp.eval.probes.linear import choices, linear_probe

    torch.set_num_threads(1)
    encoder, batch = load_encoder(run).eval(), 250
    batches = read_shards(data, batch, train=False, image=encoder.config.image)
    parts: dict[str, list[torch.Tensor]] = {}
    for step in range((FIT + SCORE) // batch):
        read = batches.at(step)
        assert read.labels is not None, "CIFAR-10 has labels"
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = vectors(encoder, read.images, kept_blocks(encoder, FIT + SCORE))
        for name, part in {**found, "labels": read.labels}.items():
            parts.setdefault(name, []).append(part)
    whole = {name: torch.cat(part) for name, part in parts.items()}
    labels = whole.pop("labels")
    fitted, scored = ({name: part[rows] for name, part in whole.items()} for rows in (slice(FIT), slice(FIT, None)))
    one = "average patch, last 4 blocks"
    known, asked = ({one: choices(parts)[one]} for parts in (fitted, scored))
    return linear_probe(known, labels[:FIT], asked, labels[FIT:]).accuracy


def best_rate(work: Work, name: str, row: Row) -> tuple[float, dict[str, float]]:
    """The rate with the best held-out score, which is not the lowest or highest of those tried; and all scores."""
    rates = list(RATES)
    while True:
        scores = {rate: work.held_out(work.pretrained(row, name, rate)) for rate in rates}
        best = max(rates, key=lambda rate: scores[rate])
        if best not in (min(rates), max(rates)):
            return best, {f"{rate:g}": scores[rate] for rate in sorted(rates)}
        rates.append(best / 2 if best == min(rates) else best * 2)


def line(work: Work, name: str) -> dict[str, Any]:
    """One line of the table."""
    row = ROWS[name]
    rate, scores = best_rate(work, name, row)
    run = work.pretrained(row, name, rate)
    figures = {
        "title": row.title,
        "commit": harness.commit(),
        "rate": rate,
        "held out": scores[f"{rate:g}"],
        "tried": scores,
    }
    return figures | {"test": [work.tested(row, run, 0)], "untrained": [work.untrained(row, run, 0)]}


def lines(work: Work, names: Sequence[str]) -> dict[str, Any]:
    """The table's lines."""
    return {name: work.kept(f"line-{name}", partial(line, work, name)) for name in names}


def two_best(work: Work) -> list[str]:
    """The two rows with the best held-out scores, of all."""
    found = lines(work, list(ROWS))
    return sorted(found, key=lambda name: -found[name]["held out"])[:2]


def more_seeds(work: Work, name: str) -> dict[str, Any]:
    """A line's figures with all seeds; its rate is the one chosen with the first."""
    rate, row = lines(work, [name])[name]["rate"], ROWS[name]
    runs = [work.pretrained(row, name, rate, seed) for seed in SEEDS]
    pairs = list(zip(runs, SEEDS, strict=True))
    return {
        "test": [work.tested(row, run, seed) for run, seed in pairs],
        "untrained": [work.untrained(row, run, seed) for run, seed in pairs],
    }


def in_time(work: Work, name: str, row: Row, rate: float, seconds: float, images_per_second: float) -> dict[str, Any]:
    """What a row reaches with as many images as it trains on in so many seconds, for each seed."""
    images = round(seconds * images_per_second)
    runs = [work.pretrained(row, name, rate, seed, images) for seed in SEEDS]
    return {
        "title": row.title,
        "seconds": seconds,
        "images": images,
        "test": [work.tested(row, run, seed) for run, seed in zip(runs, SEEDS, strict=True)],
    }


def timed(work: Work, names: Sequence[str], factors: Sequence[float] = (1.0,)) -> dict[str, Any]:
    """Rows for equal times, by the benchmark of `speed`; a variant's rate is its row's."""
    rates, found = json.loads((work.out / "speed.json").read_bytes()), dict[str, Any]()
    for name in names:
        row = (ROWS | VARIANTS)[name]
        rate = lines(work, [name.partition("-")[0]])[name.partition("-")[0]]["rate"]
        for factor in factors:
            seconds = factor * IMAGES / rates["mpp_dropped"]["images/s"]
            make = partial(in_time, work, name, row, rate, seconds, rates[name]["images/s"])
            found[f"{name} x {factor:g}"] = work.kept(f"time-{name}-{factor:g}", make)
    return found


def gather(work: Work) -> None:
    """Puts all that is known by now into one file beside the other benchmarks' results."""
    lines = {name: json.loads(path.read_bytes()) for name in ROWS if (path := work.out / f"line-{name}.json").exists()}
    for name, found in lines.items():
        found["task"] = at_the_end(work.run(name, found["rate"]))
    speed = work.out / "speed.json"
    facts = {
        "hardware": {"cpu": harness.processor(), "cores": len(os.sched_getaffinity(0)), "threads": 1},
        "versions": {package: harness.version(package) for package in ("torch", "mpp")},
        "lines": lines,
        "speed": json.loads(speed.read_bytes()) if speed.exists() else {},
        "seeds": {
            path.stem.removeprefix("seeds-"): json.loads(path.read_bytes()) for path in found_in(work, "seeds-*")
        },
        "times": {path.stem.removeprefix("time-"): json.loads(path.read_bytes()) for path in found_in(work, "time-*")},
    }
    path = work.out / "objectives-cifar10.json"
    path.write_bytes(encoded(facts, indent=1))
    harness.say(f"written: {path}")


def at_the_end(run: Path) -> dict[str, float]:
    """How well an objective did at its own task on training images, beside its guesses: means of the last LAST."""
    last = read_lines(run / "metrics.jsonl")[-LAST:]
    others = {"step", "norm", "lr", "images/s", "waiting", "memory"}
    return {name: statistics.fmean(line[name] for line in last) for name in last[-1] if name not in others}


def found_in(work: Work, pattern: str) -> list[Path]:
    return sorted(work.out.glob(f"{pattern}.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "table", "best", "time", "forms", "gather"])
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10's shards")
    parser.add_argument("--out", type=Path, required=True, help="where runs and the figures of each stage are kept")
    parser.add_argument("--rows", nargs="*", choices=[*ROWS, *VARIANTS], help="these alone")
    parser.add_argument("--rounds", type=int, default=5, help="of speed")
    options = parser.parse_args()
    work = Work(options.data.resolve(), options.out.resolve())
    if options.what == "speed":
        rows = {name: row for name, row in (ROWS | VARIANTS).items() if name in (options.rows or ROWS | VARIANTS)}
        found = work.kept("speed", lambda: speed(work.data, rows, options.rounds))
    elif options.what == "table":
        found = lines(work, options.rows or list(ROWS))
    elif options.what == "best":
        found = {
            name: work.kept(f"seeds-{name}", partial(more_seeds, work, name)) for name in options.rows or two_best(work)
        }
    elif options.what == "time":
        found = timed(work, options.rows or list(dict.fromkeys([*two_best(work), "mpp"])))
    elif options.what == "gather":
        found = {}
    else:
        found = timed(work, options.rows or FORMS, FACTORS) | timed(work, options.rows or list(VARIANTS))
    print(encoded(found, indent=1).decode())
    gather(work)


if __name__ == "__main__":
    main()
