"""`mpp probe`: what can be read off an encoder's frozen features, by several protocols, as rows, a table and JSON."""

import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpp.errors import UserError, cause, shown
from mpp.extend import resolve
from mpp.files import FileError, cache_folder, write_atomically
from mpp.jsons import encoded
from mpp.models.encoder import Encoder
from mpp.recipe import load_recipe
from mpp.recipe.settled import load_settled
from mpp.remote.urls import shown_url
from mpp.run.start import at_start
from mpp.shards.classes import lacking, listed, translation
from mpp.shards.index import read_index
from mpp.weights import load_encoder
from mpp.weights.fed import fed

from ..features.extract import ProbeError, extract, kept_blocks
from .protocols import PROTOCOLS, ProtocolError, cheap, check_names
from .task import Row, Task

FORMAT = 1  # of the JSON

logger = logging.getLogger("mpp.eval")


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
    input: dict[str, Any] = field(default_factory=dict)  # what the encoder was fed: the fields of mpp.Input
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
        write_atomically(path, encoded({"format": FORMAT, **asdict(self)}, indent=1))


def probe(
    weights: Path,
    shards: str | Path,
    *,
    protocols: Sequence[str] | None = None,
    train: str = "train",
    test: str = "test",
    untrained: bool = False,
    image: tuple[int, int] | None = None,
    cache: Path | None = None,
) -> ProbeReport:
    """The figures of an encoder that `mpp.load_encoder` takes, or with `untrained` of the same one before its training.

    protocols: names of PROTOCOLS; the cheap ones where not given. image: (h, w) of the images that it is fed; what its
    weights say where not given. cache: the folder that keeps features; the user's own where not given.
    """
    protocols = cheap() if protocols is None else protocols
    check_names(protocols)
    asked = {"image": image}
    encoder = fed(_before_training(weights), asked, weights) if untrained else load_encoder(weights, **asked)
    task = _task(encoder, shards, train, test, None, _cache() if cache is None else cache, {})
    rows, images = _rows(task, protocols), (len(task.train), len(task.test))
    place, said = shown_url(str(shards)), asdict(encoder.input)
    return ProbeReport(str(weights), untrained, place, train, test, *images, rows, said)


def _cache() -> Path | None:
    """The user's folder of features, where there can be one."""
    try:
        return cache_folder("features")
    except FileError as error:
        logger.warning("%s", error)
        return None


def probe_encoder(
    encoder: Encoder,
    shards: str | Path,
    protocols: Sequence[str] | None = None,
    train: str = "train",
    test: str = "test",
    numbers: np.ndarray | None = None,
    *,
    cache: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Row]:
    """The figures of an encoder in memory. numbers: the only images of `train` whose labels may be used.

    With a cache, all images' features are kept, so that calls with other numbers find them; else each call computes.
    settings: by protocol, for those that take some (SGDConfig for linear-sgd).
    """
    protocols = cheap() if protocols is None else protocols
    check_names(protocols)
    return _rows(_task(encoder, shards, train, test, numbers, cache, settings or {}), protocols)


def _task(
    encoder: Encoder,
    shards: str | Path,
    train: str,
    test: str,
    numbers: np.ndarray | None,
    cache: Path | None,
    settings: Mapping[str, Any],
) -> Task:
    """What protocols are given; refuses what no probe could be fitted to before it computes any features."""
    indexes = {split: read_index(shards, split) for split in (train, test)}
    for split, index in indexes.items():
        if not (index.label >= 0).any():
            raise ProbeError(f"{shards}: split {split} has no labels, and a probe needs them")
    index = indexes[train]
    usable = np.flatnonzero((index.label >= 0) & ~index.damaged)
    if numbers is not None:
        usable = np.intersect1d(usable, numbers)
    if missing := lacking(index.select(usable), indexes[test]):
        raise ProbeError(
            f"{shards}: split {test} has images of {listed(missing)}, of which there is no training image in {train}"
        )
    blocks = kept_blocks(encoder, len(index))
    fitted, scored = (extract(encoder, shards, split, blocks=blocks, cache=cache) for split in (train, test))
    fitted = fitted if numbers is None else fitted.choose(numbers)
    numbered = torch.from_numpy(translation(scored.classes, fitted.classes))  # as the training images' labels are
    scored = replace(scored, labels=numbered[scored.labels], classes=fitted.classes)
    return Task(fitted, scored, encoder, shards, train, test, settings)


def _rows(task: Task, protocols: Sequence[str]) -> list[Row]:
    """The rows of each protocol; one of several that is impossible with these images is named and left out."""
    rows: list[Row] = []
    for name in dict.fromkeys(protocols):
        try:
            rows += _checked(name, _found(name, task))
        except ProbeError as error:
            if len(protocols) == 1:
                raise
            logger.warning("left out: %s", error)
    return rows


def _found(name: str, task: Task) -> list[Row]:
    """What a protocol gives. Whatever the code of somebody else raises is one line that names the protocol."""
    if PROTOCOLS.is_own(name):
        return list(resolve(PROTOCOLS[name].rows)(task))
    try:
        return list(resolve(PROTOCOLS[name].rows)(task))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise ProtocolError(f"protocol {name}: {type(error).__name__}: {cause(error)}") from error


def _checked(name: str, rows: list[Row]) -> list[Row]:
    """The rows that a protocol gave, which anybody may have written; ProtocolError if they can't be its own."""
    for row in rows:
        if not (isinstance(row, Row) and isinstance(row.metric, str) and isinstance(row.detail, dict)):
            raise ProtocolError(
                f"protocol {name}: expected mpp.Row(protocol, metric, value), got {shown(repr(row)[:80])}"
            )
        if row.protocol != name:
            raise ProtocolError(f"protocol {name}: gave a row of {shown(row.protocol)!r}, expected its own name")
    try:
        encoded([row.detail for row in rows])
        rows = [replace(row, value=float(row.value)) for row in rows]
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"protocol {name}: gave a row that JSON can't hold: {cause(error)}") from None
    if wrong := [row for row in rows if not 0 <= row.value <= 1]:
        found = f"{wrong[0].metric} {wrong[0].value:g}"
        raise ProtocolError(f"protocol {name}: gave {found}; a row's value is a share in [0, 1]")
    if len({row.metric for row in rows}) < len(rows):
        raise ProtocolError(f"protocol {name}: gave two rows of one metric")
    metrics, headline = [row.metric for row in rows], PROTOCOLS[name].headline
    if headline not in metrics:
        given = ", ".join(metrics) or "none"
        logger.warning("%s: no figure %s, by which it is compared; it gave %s", name, headline, given)
    return rows


def _before_training(run: Path) -> Encoder:
    """The encoder that a run started with."""
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise ProbeError(f"{run}: no run folder (it has no recipe.yaml), so what it was before training is not known")
    return at_start(load_settled(run).fill(load_recipe(recipe))).encoder
