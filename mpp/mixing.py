"""Training on mixtures of two images and their labels: mixup (arXiv 1710.09412), cutmix (arXiv 1905.04899), smoothing.

What is drawn is the same for a whole batch, however that is split, and stays on the device: nothing here waits for it.
"""

import math

import torch
from torch import Tensor

from mpp import draws

TRIES = 16  # of a draw from the Gamma distribution, of which each fails in at most 5 % of cases: all in 1 of 10 ** 20


def mix(
    images: Tensor, targets: Tensor, *, mixup: float, cutmix: float, switch: float = 0.5, chance: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mixes normalised images (b, c, h, w) and targets (b, classes), both float, with their neighbours in the batch.

    mixup, cutmix: parameters of the Beta distribution from which the batch's one share is drawn; 0 for never.
    switch: chance of cutmix where both may be. chance: that a batch is mixed at all.

    Images 0 and 1 meet, 2 and 3, and so on: the order of a batch is random already, and a part of it that begins at an
    even place holds every image's partner. The last one of an odd batch meets itself and stays. Targets are mixed by
    the share that an image keeps of its pixels, which for cutmix is the true area, after rounding and clipping at the
    border.
    """
    if not mixup and not cutmix:
        return images, targets
    key = draws.batch_keys(images.device)
    cuts, happens, row, column = draws.uniform(draws.apart(key, 0), 4)[0]
    cut = cuts < (switch if mixup and cutmix else float(bool(cutmix)))
    share = _beta(torch.where(cut, float(cutmix), float(mixup)), key)
    inside = _box(images.shape[-2], images.shape[-1], (1 - share).sqrt(), row, column)
    kept = torch.where(cut, 1 - inside.to(images.dtype), share)  # (h, w): how much of each pixel the image keeps
    kept = torch.where(happens < chance, kept, 1.0)
    partner = partners(len(images), images.device)
    return torch.lerp(images[partner], images, kept), torch.lerp(targets[partner], targets, kept.mean())


def partners(images: int, device: torch.device) -> Tensor:
    """Which image each of a batch is mixed with, (b,) int64."""
    return (torch.arange(images, device=device) ^ 1).clamp(max=images - 1)


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Targets (b, classes) of labels (b,): `smoothing` is spread evenly over all classes, the label's own among them.

    This is the convention of timm and of torch's cross_entropy. A label of -1 (none) has no class that stands out.
    """
    off = smoothing / classes
    here = labels.unsqueeze(1) == torch.arange(classes, device=labels.device)  # not F.one_hot, which checks the range
    return torch.where(here, 1 - smoothing + off, off)


def _beta(alpha: Tensor, key: Tensor) -> Tensor:
    """A draw from Beta(alpha, alpha), both scalars on the device.

    It is the share of one of two draws from Gamma(alpha), each Gamma(alpha + 1) * U ** (1 / alpha); in logarithms, as
    small alphas would underflow.
    """
    raised = 1 - draws.uniform(draws.apart(key, 1), 2)[0]  # in (0, 1]
    return (_gamma(alpha + 1, key).log() + raised.log() / alpha).softmax(0)[0]


def _gamma(shape: Tensor, key: Tensor) -> Tensor:
    """Two draws (2,) from the Gamma distribution of a shape of at least 1: the first that is accepted of some tries.

    Marsaglia and Tsang 2000, "A simple method for generating gamma variables", with normal numbers by Box and Muller.
    """
    radius, angle, accept = (1 - draws.uniform(draws.apart(key, 2), 3 * 2 * TRIES)).view(3, 2, TRIES)
    normal = (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()  # (2, tries)
    d = shape - 1 / 3
    v = (1 + normal / (9 * d).sqrt()) ** 3
    accepted = (v > 0) & (accept.log() < 0.5 * normal**2 + d - d * v + d * v.clamp(min=1e-30).log())
    return d * v.gather(1, accepted.to(torch.uint8).argmax(1, keepdim=True)).squeeze(1)


def _box(height: int, width: int, side: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Where (h, w) a box lies that is `side` of the image high and wide, around any pixel, cut off at the border.

    row, column: uniform in [0, 1), for the pixel.
    """
    return _span(height, side, row).unsqueeze(1) & _span(width, side, column)


def _span(length: int, side: Tensor, middle: Tensor) -> Tensor:
    """Where (length,) an interval of floor(side * length) lies, by comparison and so without reading a number."""
    size = (side * length).floor()
    middle = (middle * length).floor()
    at = torch.arange(length, device=side.device)
    return (at >= middle - (size / 2).floor()) & (at < middle + (size / 2).ceil())
