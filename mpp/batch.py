"""The one thing that passes from data to objectives."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images as uint8 (b, c, h, w), and labels (b,) int64 where the shards have them (-1 where one image has none).

    Images stay uint8 up to the encoder, which normalises inside `embed`: targets see true colours, and a transfer to
    the device is four times smaller. A float tensor is taken as already normalised.

    views: more pictures of the same images in the same order, uint8 (b, c, h', w') each, of a size of its own; `images`
        is the first view. Labels and views go wherever the images go: `to` a device, and into the parts of `split`.
    places: where in the whole batch, of all processes, each image stands, (b,) int64: what is drawn for it follows from
        that (mpp.draws). None where this is all of the batch.
    """

    images: Tensor
    labels: Tensor | None = None
    views: tuple[Tensor, ...] = ()
    places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def all_views(self) -> tuple[Tensor, ...]:
        """The images and their further views."""
        return self.images, *self.views

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, size: int) -> Iterator["Batch"]:
        """Yields consecutive parts of `size` images, the last one perhaps smaller."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield replace(self._each(itemgetter(part)), places=self.whole_places[part])

    def blank(self, images: int) -> "Batch":
        """So many black images of label 0, otherwise of this batch's kind."""
        return replace(self._each(lambda tensor: tensor.new_zeros(images, *tensor.shape[1:])), places=None)

    @property
    def whole_places(self) -> np.ndarray:
        """The places of the images, (b,) int64."""
        return np.arange(len(self)) if self.places is None else self.places

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same with each tensor changed."""
        labels = None if self.labels is None else change(self.labels)
        return replace(self, images=change(self.images), labels=labels, views=tuple(map(change, self.views)))
