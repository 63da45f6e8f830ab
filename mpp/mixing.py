"""Training on mixtures of two images and their labels: mixup (arXiv 1710.09412), cutmix (arXiv 1905.04899), smoothing.

Draws come from torch's global generator and stay on the device: nothing here waits for it.
"""

import torch
from torch import Tensor
from torch.distributions import Gamma


def mix(
    images: Tensor, targets: Tensor, *, mixup: float, cutmix: float, switch: float = 0.5, chance: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mixes normalised images (b, c, h, w) and targets (b, classes), both float, with those of the batch reversed.

    mixup, cutmix: parameters of the Beta distribution from which the batch's one share is drawn; 0 for never.
    switch: chance of cutmix where both may be. chance: that a batch is mixed at all.

    Image i meets image b - 1 - i, as in timm; the order of a batch is random already. The middle one of an odd batch
    meets itself and stays. Targets are mixed by the share that an image keeps of its pixels, which for cutmix is the
    true area, after rounding and clipping at the border.
    """
    if not mixup and not cutmix:
        return images, targets
    device = images.device
    cut = torch.rand((), device=device) < (switch if mixup and cutmix else float(bool(cutmix)))
    share = _beta(torch.where(cut, float(cutmix), float(mixup)))
    inside = _box(images.shape[-2], images.shape[-1], (1 - share).sqrt())
    kept = torch.where(cut, 1 - inside.to(images.dtype), share)  # (h, w): how much of each pixel the image keeps
    kept = torch.where(torch.rand((), device=device) < chance, kept, 1.0)
    return torch.lerp(images.flip(0), images, kept), torch.lerp(targets.flip(0), targets, kept.mean())


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Targets (b, classes) of labels (b,): `smoothing` is spread evenly over all classes, the label's own among them.

    This is the convention of timm and of torch's cross_entropy. A label of -1 (none) has no class that stands out.
    """
    off = smoothing / classes
    here = labels.unsqueeze(1) == torch.arange(classes, device=labels.device)  # not F.one_hot, which checks the range
    return torch.where(here, 1 - smoothing + off, off)


def _beta(alpha: Tensor) -> Tensor:
    """A draw from Beta(alpha, alpha), both scalars on the device.

    It is the share of one of two draws from Gamma(alpha), each Gamma(alpha + 1) * U ** (1 / alpha); in logarithms, as
    small alphas would underflow. torch's Beta would do as well, but not on the meta device (`mpp plan`).
    """
    gamma = Gamma((alpha + 1).expand(2), torch.ones_like(alpha), validate_args=False).sample()  # a check would wait
    return (gamma.log() + torch.rand(2, device=alpha.device).log() / alpha).softmax(0)[0]


def _box(height: int, width: int, side: Tensor) -> Tensor:
    """Where (h, w) a box lies that is `side` of the image high and wide, around any pixel, cut off at the border."""
    return _span(height, side).unsqueeze(1) & _span(width, side)


def _span(length: int, side: Tensor) -> Tensor:
    """Where (length,) a random interval of floor(side * length) lies, by comparison and so without reading the draw."""
    size = (side * length).floor()
    middle = torch.randint(length, (), device=side.device)
    at = torch.arange(length, device=side.device)
    return (at >= middle - (size / 2).floor()) & (at < middle + (size / 2).ceil())
