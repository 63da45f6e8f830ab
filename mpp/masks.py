"""Which patches an objective hides: index tensors (b, k) of fixed k, drawn on the device."""

import torch
from torch import Tensor

from mpp import draws


def count_of(share: float, patches: int) -> int:
    """How many patches a share is: rounded, but at least one."""
    return max(1, round(share * patches))


def random_index(images: int, patches: int, count: int, device: torch.device) -> Tensor:
    """Draws `count` different patches of each image, every set equally likely: (b, k) int64."""
    return random_order(images, patches, device)[:, :count]


def random_order(images: int, patches: int, device: torch.device) -> Tensor:
    """Draws an order of each image's patches, every one equally likely: (b, n) int64."""
    return draws.words(draws.keys(images, device), patches).argsort(1)  # words of 64 bits: none is there twice
