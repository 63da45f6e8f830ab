"""`mpp probe`: what can be read off an encoder's frozen features, by several protocols, as rows, a table and JSON."""

import importlib.metadata
import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpp.data.subset import lacking
from mpp.errors import shown
from mpp.files import cache_folder, write_atomically
from mpp.models.encoder import Encoder
from mpp.recipe import load_recipe
from mpp.run import build
from mpp.shards.index import read_index
from mpp.weights import load_encoder

from ..features.extract import Features, ProbeError, extract, kept_blocks
from .few_shot import SHOTS, few_shot
from .knn import KS, knn_predictions
from .linear import choices, linear_probe
from .linear_sgd import SGDConfig, linear_sgd

PROTOCOLS = ("linear", "linear-sgd", "few-shot", "knn")
CHEAP = ("linear", "few-shot", "knn")  # seconds on kept features; linear-sgd takes 90 epochs
TOP1_K = 20  # neighbours of the k-NN's headline figure: DINO's choice
FORMAT = 1  # of the JSON

logger = logging.getLogger("mpp.eval")


@dataclass(frozen=True)
class Row:
    """One figure: a share in [0, 1], and what it takes to read it."""

    protocol: str
    metric: str
    value: float
    detail: dict[str, Any]


@dataclass(frozen=True)
class ProbeReport:
    """All figures of one encoder, and what they were read off."""

    weights: str
    untrained: bool
    data: str
    train: str
    test: str
    train_images: int
    test_images: int
    rows: list[Row]
    versions: dict[str, str] = field(
        default_factory=lambda: {name: importlib.metadata.version(name) for name in ("mpp", "torch")}
    )

    def __str__(self) -> str:
        lines = [("protocol", "metric", "accuracy", "")]
        for row in self.rows:
            facts = {name: f"{fact:.4g}" if isinstance(fact, float) else fact for name, fact in row.detail.items()}
            detail = "; ".join(f"{name} {fact}" for name, fact in facts.items() if isinstance(fact, str | int))
            lines.append((row.protocol, row.metric, f"{100 * row.value:.2f} %", detail))
        wide = [max(len(line[column]) for line in lines) for column in range(3)]
        head = f"{self.weights}{' before training' if self.untrained else ''}, frozen, on {self.data}: "
        head += f"{self.train_images} images of {self.train}, {self.test_images} of {self.test}"
        table = [f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c:>{wide[2]}}  {d}".rstrip() for a, b, c, d in lines]
        return "\n".join([head, *table])

    def save(self, path: Path) -> None:
        """Writes the report as JSON."""
        write_atomically(path, (json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n").encode())


def probe(
    weights: Path,
    shards: str | Path,
    *,
    protocols: Sequence[str] = CHEAP,
    train: str = "train",
    test: str = "test",
    untrained: bool = False,
    cache: Path | None = None,
) -> ProbeReport:
    """The figures of an encoder that `mpp.load_encoder` takes, or with `untrained` of the same one before its training.

    cache: the folder that keeps features; the user's own where not given.
    """
    encoder = _before_training(weights) if untrained else load_encoder(weights)
    cache = cache_folder("features") if cache is None else cache
    features = _features(encoder, shards, protocols, train, test, None, cache)
    rows = _rows(encoder, shards, protocols, train, *features, SGDConfig())
    return ProbeReport(str(weights), untrained, str(shards), train, test, len(features[0]), len(features[1]), rows)


def probe_encoder(
    encoder: Encoder,
    shards: str | Path,
    protocols: Sequence[str] = CHEAP,
    train: str = "train",
    test: str = "test",
    numbers: np.ndarray | None = None,
    *,
    cache: Path | None = None,
    sgd: SGDConfig | None = None,
) -> list[Row]:
    """The figures of an encoder in memory. numbers: the only images of `train` whose labels may be used.

    With a cache, all images' features are kept, so that calls with other numbers find them; else each call computes.
    """
    features = _features(encoder, shards, protocols, train, test, numbers, cache)
    return _rows(encoder, shards, protocols, train, *features, sgd or SGDConfig())


def _features(
    encoder: Encoder,
    shards: str | Path,
    protocols: Sequence[str],
    train: str,
    test: str,
    numbers: np.ndarray | None,
    cache: Path | None,
) -> tuple[Features, Features]:
    """The features to fit on and to score on; refuses what no probe could be fitted to before it computes any."""
    if unknown := [name for name in protocols if name not in PROTOCOLS]:
        raise ProbeError(f"no protocol {unknown[0]!r}; there are {', '.join(PROTOCOLS)}")
    indexes = {split: read_index(shards, split) for split in (train, test)}
    for split, index in indexes.items():
        if not (index.label >= 0).any():
            raise ProbeError(f"{shards}: split {split} has no labels, and a probe needs them")
    index = indexes[train]
    usable = np.flatnonzero((index.label >= 0) & ~index.damaged)
    if numbers is not None:
        usable = np.intersect1d(usable, numbers)
    if missing := lacking(index.select(usable), indexes[test]):
        names = ", ".join(map(shown, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise ProbeError(
            f"{shards}: split {test} has images of {names}, of which there is no training image in {train}"
        )
    blocks = kept_blocks(encoder, len(index))
    fitted, scored = (extract(encoder, shards, split, blocks=blocks, cache=cache) for split in (train, test))
    return fitted if numbers is None else fitted.choose(numbers), scored


def _rows(
    encoder: Encoder,
    shards: str | Path,
    protocols: Sequence[str],
    split: str,
    train: Features,
    test: Features,
    sgd: SGDConfig,
) -> list[Row]:
    rows: list[Row] = []
    for protocol in dict.fromkeys(protocols):
        if protocol == "linear":
            try:
                rows += linear_rows(train, test)
            except ProbeError as error:
                if len(protocols) == 1:
                    raise
                logger.warning("left out: %s", error)
        elif protocol == "linear-sgd":
            value = linear_sgd(encoder, shards, split, train.numbers, len(train.classes), test, sgd)
            rows.append(Row("linear-sgd", "top1", value, {"features": train.output, **asdict(sgd)}))
        elif protocol == "few-shot":
            rows += few_shot_rows(train, test)
        else:
            rows += knn_rows(train, test)
    return rows


def linear_rows(train: Features, test: Features) -> list[Row]:
    """The accuracy of the linear probe on the features and with the l2 that it chose."""
    found = linear_probe(choices(train.parts), train.labels, choices(test.parts), test.labels)
    facts = {"features": found.choice, "l2": found.l2, "held out": found.held_out}
    return [Row("linear", "top1", found.accuracy, {**facts, "per class": found.per_class, "tried": found.tried})]


def few_shot_rows(train: Features, test: Features) -> list[Row]:
    """The accuracy of each number of shots that all classes have images for."""
    rows = []
    for name in read_off(train):
        for found in few_shot(train.parts[name], train.labels, test.parts[name], test.labels):
            spread = statistics.stdev(found.accuracies) if len(found.accuracies) > 1 else None
            facts = {"features": name, "l2": found.l2, "draws": len(found.accuracies), "sd": spread}
            metric = f"{found.shots}-shot" + ("" if name == train.output else ", average patch")
            rows.append(Row("few-shot", metric, found.accuracy, {**facts, "accuracies": found.accuracies}))
    if left_out := [str(shots) for shots in SHOTS if f"{shots}-shot" not in {row.metric for row in rows}]:
        logger.warning("few-shot: %s shots left out: a class has fewer training images", ", ".join(left_out))
    return rows


def knn_rows(train: Features, test: Features) -> list[Row]:
    """The accuracy for each number of neighbours."""
    rows = []
    for name in read_off(train):
        guesses = knn_predictions(train.parts[name], train.labels, test.parts[name], KS)
        for k, guess in zip(KS, guesses, strict=True):
            metric = ("top1" if k == TOP1_K else f"k={k}") + ("" if name == train.output else ", average patch")
            value = (guess == test.labels).double().mean().item()
            rows.append(Row("knn", metric, value, {"features": name, "k": min(k, len(train))}))
    return rows


def read_off(features: Features) -> list[str]:
    """The parts that k-NN and few-shot read: the encoder's own output and, of a ViT, the last block's average patch."""
    averages = [name for name in features.parts if name.startswith("average ")]
    return list(dict.fromkeys([features.output, *sorted(averages, key=lambda name: int(name.split()[1]))[-1:]]))


def _before_training(run: Path) -> Encoder:
    """The encoder that a run started with."""
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise ProbeError(f"{run}: no run folder (it has no recipe.yaml), so what it was before training is not known")
    return build(load_recipe(recipe)).encoder
