"""The one thing that passes from data to objectives."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images as uint8 (b, c, h, w), and labels (b,) int64 where the shards have them (-1 where one image has none).

    Images stay uint8 up to the encoder, which normalises inside `embed`: targets see true colours, and a transfer to
    the device is four times smaller. A float tensor is taken as already normalised.
    """

    images: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "Batch":
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return Batch(self.images.to(device, non_blocking=True), labels)

    def split(self, size: int) -> Iterator["Batch"]:
        """Yields consecutive parts of `size` images, the last one perhaps smaller."""
        for start in range(0, len(self), size):
            stop = start + size
            yield Batch(self.images[start:stop], None if self.labels is None else self.labels[start:stop])
