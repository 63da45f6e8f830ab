"""Which patches an objective hides: index tensors (b, k) of fixed k, drawn on the device."""

import torch
from torch import Tensor


def count_of(share: float, patches: int) -> int:
    """How many patches a share is: rounded, but at least one."""
    return max(1, round(share * patches))


def random_index(images: int, patches: int, count: int, device: torch.device) -> Tensor:
    """Draws `count` different patches of each image, every set equally likely: (b, k) int64."""
    return torch.rand(images, patches, device=device).argsort(1)[:, :count]
