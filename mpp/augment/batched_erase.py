"""Random erasing for batches, uint8 (b, c, h, w), on any device: the same noise as on the CPU, bit for bit."""

import torch
from torch import Tensor

# mpp.seeds.mix on signed words, whose arithmetic wraps to the same bits.
GOLDEN, FIRST, SECOND = (word - 2**64 for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def erase(images: Tensor, boxes: Tensor, keys: Tensor, noise: Tensor) -> Tensor:
    """Fills a rectangle (b, 4) of each image with noise that depends on its key (b,) alone; of height 0, nothing.

    noise: the value for each of 65536 draws (mpp.augment.plan.noise_table).
    """
    b, c, h, w = images.shape
    top, left, height, width = boxes.view(-1, 4, 1, 1, 1).unbind(1)  # (b, 1, 1, 1) each
    row = torch.arange(h, device=images.device).view(-1, 1) - top  # (b, 1, h, 1) of the rectangle
    column = torch.arange(w, device=images.device) - left  # (b, 1, 1, w)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    channel = torch.arange(c, device=images.device).view(-1, 1, 1)
    place = torch.where(inside, (row * width + column) * c + channel, 0)  # (b, c, h, w), which draw a value takes
    words = mix(keys.unsqueeze(1), torch.arange(-(-c * h * w // 4), device=images.device))  # four draws a word
    draws = words.gather(1, place.flatten(1) // 4).view(b, c, h, w) >> (place % 4 * 16) & 0xFFFF
    return torch.where(inside, noise[draws], images)


def mix(*parts: Tensor) -> Tensor:
    """mpp.seeds.mix, of int64 tensors that broadcast against each other."""
    words = torch.zeros((), dtype=torch.int64, device=parts[0].device)
    for part in parts:
        words = _finalise((words + GOLDEN) ^ _finalise(part + GOLDEN))
    return words


def _finalise(words: Tensor) -> Tensor:
    words = (words ^ _shifted(words, 30)) * FIRST
    words = (words ^ _shifted(words, 27)) * SECOND
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """To the right, as unsigned words: zeros come in from the left."""
    return (words >> bits) & (2 ** (64 - bits) - 1)
