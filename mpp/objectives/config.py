"""What an objective can be asked for, and what it says of itself. No torch: recipes are checked without it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from mpp.shards.index import Index


@dataclass(frozen=True)
class Needs:
    """What an objective asks of the rest of the program, which asks nothing else of it."""

    labels: bool = False  # every image has one: only labelled images are read
    views: int = 1  # of each image, at least (Batch.images, then Batch.views)
    whole_batch: bool = False  # its loss looks across the batch, which is never split into micro-batches
    pairs: bool = False  # of neighbours in the batch, which is split at even places alone
    drops_patches: bool = False  # the encoder sees some of the patches alone, or none of its mixers could
    classes: tuple[str, ...] = ()  # names by which labels are numbered; those of `data.path` where not given


@dataclass(frozen=True)
class Metric:
    """How a figure that an objective reports is shown."""

    title: str
    share: bool = False  # in [0, 1], shown in per cent
    guess: bool = False  # what is reached without learning
    decibels: bool = False  # reported as a mean squared error, the peak being 1, and shown as the decibels of its mean


NEIGHBOURS = {"knn": Metric("k-NN accuracy of the encoder", share=True)}  # of `eval.knn`, whatever the objective


EXACT = 1e-10  # the least mean squared error that is told from none: 100 dB


def in_units(metrics: Mapping[str, Metric], values: Mapping[str, float]) -> dict[str, float]:
    """Means of reported figures as they are shown.

    Decibels are taken last: a mean of decibels would depend on the parts in which a batch goes through.
    """
    return {
        name: -10 * math.log10(max(value, EXACT)) if name in metrics and metrics[name].decibels else value
        for name, value in values.items()
    }


@dataclass(frozen=True)
class ObjectiveConfig:
    """Settings every objective has: the name under which recipes choose it."""

    name: str

    results: ClassVar[tuple[str, ...]] = ("encoder",)  # names of `Objective.results()`, each a file of the run folder
    adjustable: ClassVar[
        tuple[str, ...]
    ] = ()  # settings that a run may change in going on: no parameter depends on them
    metrics: ClassVar[Mapping[str, Metric]] = {}  # beside the loss; the first one is shown while training
    pictures: ClassVar[Mapping[str, str]] = {}  # what each row of `Objective.pictures()` shows
    takes_decoder: ClassVar[bool] = False  # whether its `decoder` is MAE's, which files of weights may hold too

    @property
    def needs(self) -> Needs:
        """What the objective asks of the data, the loop and the encoder."""
        return Needs()

    @property
    def frozen(self) -> bool:
        """Whether the encoder stays as it is, and only what is beside it learns."""
        return False

    def settled(self, index: Index) -> Self:
        """The settings with what follows from the images to train on; ValueError if the two do not go together."""
        return self
