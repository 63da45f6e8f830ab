"""The `data` section of a recipe: where images come from, which of them, in which order, and how they are read."""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from mpp.augment.config import AugmentConfig

MOST_VIEWS = 1000  # of one name; a number above is a slip
MOST_PIXELS = 2**28  # of a picture; images with more count as damaged
LONGEST_TURN = 10_000  # positions in which each of several data sets has its share; a batch sorts them
ReaderName = Literal["auto", "resident", "indexed"]
ShuffleName = Literal["auto", "all", "window"]
SamplingName = Literal["images", "classes"]
PrepareName = Literal["auto", "cpu", "device"]
LastBatch = Literal["chained", "kept", "dropped"]


@dataclass(frozen=True)
class SubsetConfig:
    """Which images of the train split are trained on; only labelled ones as soon as anything here is set."""

    share: float = 1.0  # of each class's images, at least one
    per_class: int | None = None  # images of each class, or all where it has fewer; then `share` stays 1
    hold_out: float = 0.0  # share of each class, of those drawn, that is not trained on but scored in data.val's place

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"data.subset.share must be in (0, 1], got {self.share}")
        if self.per_class is not None and (self.per_class < 1 or self.share != 1):
            raise ValueError(f"data.subset.per_class must be at least 1, with share 1, got {self.per_class}")
        if not 0 <= self.hold_out < 1:
            raise ValueError(f"data.subset.hold_out must be in [0, 1), got {self.hold_out}")


@dataclass(frozen=True)
class MixConfig:
    """A further data set that is trained on, all of its split; its labels count if its classes are `data.path`'s."""

    path: str
    train: str = "train"  # split
    weight: int = 1  # its positions for data.weight of data.path


class View(NamedTuple):
    """One picture that is made of each image, beside the first."""

    image: tuple[int, int]  # (h, w) pixels
    augment: AugmentConfig


@dataclass(frozen=True)
class ViewConfig:
    """Further views: more pictures of each image of a batch, each drawn on its own."""

    count: int = 1  # views made alike
    image: tuple[int, int] | None = None  # (h, w) pixels; the model's where not given
    augment: AugmentConfig | None = None  # of these alone, as a whole; data.augment where not given


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are read."""

    path: str  # folder of shards, or its URL
    source: str | None = None  # what `mpp shards make` fills `path` from if it is not there yet
    train: str = "train"  # split
    val: str | None = None  # split that the objective is scored on while training
    hold_out: float = 0.0  # share of train, by a hash of the key alone, that is scored in val's place, never trained on
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    mix: dict[str, MixConfig | None] = field(default_factory=dict)  # more data sets, by any name; null leaves one out
    weight: int = 1  # of path among them
    sampling: SamplingName = "images"  # classes: each is seen equally often
    last_batch: LastBatch = "chained"  # of an epoch: filled up from the next, short, or not
    shuffle: ShuffleName = "auto"  # over all images or a window of shards; auto: window for URLs
    window: int = 16  # shards
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    views: dict[str, ViewConfig | None] = field(default_factory=dict)  # by any name; null leaves out a base's
    reader: ReaderName = "auto"
    memory: float = 4.0  # GiB of decoded images up to which "auto" keeps them
    prepare: PrepareName = "auto"  # where pictures are made; device: that of train; auto: where it is faster
    threads: int | None = None  # that decode; where not given one a core, or a single one for small images
    cache: str | None = None  # folder that fetched shards are kept in; ~/.cache/mpp/shards where not given
    cache_gib: float = 32.0  # that fetched shards may take there
    allow: tuple[Literal["pipe"], ...] = ()  # pipe: shards may be the output of shell commands

    def __post_init__(self) -> None:
        sets: dict[str, DataConfig | MixConfig] = {"data": self}
        for name, part in (sets | {f"data.mix.{name}": part for name, part in self.mixed.items()}).items():
            if not part.path:
                raise ValueError(f"{name}.path must name a folder, got an empty text")
            if part.weight < 1:
                raise ValueError(f"{name}.weight must be at least 1, got {part.weight}")
        if sum(self.weights) // math.gcd(*self.weights) > LONGEST_TURN:
            raise ValueError(
                f"data.weight and those of data.mix are {self.weights}; write them shorter, such as 3 and 1, for their "
                f"sum in lowest terms must be at most {LONGEST_TURN}"
            )
        if not 0 <= self.hold_out < 1:
            raise ValueError(f"data.hold_out must be in [0, 1), got {self.hold_out}")
        if self.hold_out and self.subset.hold_out:
            raise ValueError("data.hold_out and data.subset.hold_out: give one of them")
        if self.window < 1:
            raise ValueError(f"data.window must be at least 1 shard, got {self.window}")
        if self.memory < 0 or self.cache_gib <= 0:
            raise ValueError(
                f"data.memory must be at least 0 GiB and data.cache_gib above 0, got {self.memory} and {self.cache_gib}"
            )
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"data.threads must be at least 1, got {self.threads}")
        if self.sampling == "classes" and (self.mixed or self.shuffle == "window"):
            other = "data.mix" if self.mixed else "data.shuffle: window"
            raise ValueError(f"data.sampling: classes looks for each class in all shards; it does not go with {other}")
        for name, view in self.views.items():
            if view is not None:
                _check_view(f"data.views.{name}", view)

    @property
    def mixed(self) -> dict[str, MixConfig]:
        """The data sets beside `path`."""
        return {name: part for name, part in self.mix.items() if part is not None}

    @property
    def weights(self) -> list[int]:
        """Of `path` and the data sets beside it."""
        return [self.weight, *(part.weight for part in self.mixed.values())]

    def further_views(self, image: tuple[int, int]) -> tuple[View, ...]:
        """The views beside the first, in order, each as often as it counts, for a model of such images (h, w)."""
        views = [view for view in self.views.values() if view is not None]
        return tuple(View(v.image or image, v.augment or self.augment) for v in views for _ in range(v.count))


def batches_of(images: int, batch: int, last: str) -> int:
    """Batches an epoch of so many images."""
    return images // batch if last == "dropped" else math.ceil(images / batch)


def position_of(step: int, images: int, batch: int, last: str) -> int:
    """The position at which a step of training begins, of epochs of so many images."""
    if last == "chained":
        return step * batch
    epoch, place = divmod(step, batches_of(images, batch, last))
    return epoch * images + place * batch


def step_from(position: int, images: int, batch: int, last: str) -> int:
    """The first step of training that begins at a position or after it."""
    if last == "chained":
        return math.ceil(position / batch)
    epoch, place = divmod(position, images)
    each = batches_of(images, batch, last)
    return epoch * each + min(math.ceil(place / batch), each)


def _check_view(name: str, view: ViewConfig) -> None:
    if not 1 <= view.count <= MOST_VIEWS:
        raise ValueError(f"{name}.count must be at least 1 and at most {MOST_VIEWS}, got {view.count}")
    if view.image is not None and (len(view.image) != 2 or min(view.image) < 1 or math.prod(view.image) > MOST_PIXELS):
        raise ValueError(
            f"{name}.image must be two sides of at least 1 pixel, at most 2 ** 28 in all, got {view.image}"
        )
