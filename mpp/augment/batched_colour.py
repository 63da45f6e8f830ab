"""The colour augmentations of colour.py for batches, uint8 (b, c, h, w) with 1 or 3 channels, on any device.

Each gives torchvision.transforms.v2.functional's pixels for the same parameters, but for single values that differ by
1: torchvision cuts values down to whole numbers, so that the last bit of a float decides about some.
"""

import torch
from torch import Tensor

from mpp.augment.batched_crop import no_autocast, to_uint8
from mpp.augment.colour import GREY, REACH, SOLARIZE_FROM

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Adjusts brightness, contrast, saturation and hue by factors (b, 4) in each image's own order (b, 4)."""
    if images.shape[1] == 1:  # no colour: neither saturation nor hue
        factors = torch.cat([factors[:, :2], torch.ones_like(factors[:, 2:3]), torch.zeros_like(factors[:, 3:])], 1)
    for number, factor in zip(order.unbind(1), factors.gather(1, order).float().unbind(1), strict=True):
        images = _adjusted(images, number.view(-1, 1, 1, 1), factor.view(-1, 1, 1, 1))
    return images


def greyscale(images: Tensor, chosen: Tensor) -> Tensor:
    return torch.where(chosen.view(-1, 1, 1, 1), _grey(images).to(torch.uint8), images)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur over reflected borders with a sigma (b,) in pixels for each image, 0 for none."""
    rows, columns = (_gaussian(sigma, side).unsqueeze(1) for side in images.shape[2:])
    with no_autocast(images):
        return to_uint8((rows @ images.float() @ columns.mT).round())


def solarize(images: Tensor, chosen: Tensor) -> Tensor:
    return torch.where(chosen.view(-1, 1, 1, 1) & (images >= SOLARIZE_FROM), 255 - images, images)


def _adjusted(images: Tensor, number: Tensor, factor: Tensor) -> Tensor:
    """One adjustment of each image; all but that of the hue move away from something, or to it."""
    grey = _grey(images)  # (b, 1, h, w)
    centre = torch.where(number == CONTRAST, grey.mean((2, 3), keepdim=True), grey)
    centre = torch.where(number == BRIGHTNESS, 0, centre)
    moved = to_uint8(images * factor + centre * (1 - factor))
    return torch.where(number == HUE, _turned(images, factor), moved) if images.shape[1] == 3 else moved


def _grey(images: Tensor) -> Tensor:
    """Grey values (b, 1, h, w) as float32 whole numbers."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.split(1, dim=1)
    return (red * GREY[0] + green * GREY[1] + blue * GREY[2]).floor()


def _turned(images: Tensor, factor: Tensor) -> Tensor:
    """Hues turned by a share of the circle (b, 1, 1, 1), in HSV (Foley et al., "Computer Graphics", section 13.3)."""
    values = images / 255
    red, green, blue = values.split(1, dim=1)
    high = values.amax(1, keepdim=True)
    spread = high - values.amin(1, keepdim=True)
    span = torch.where(spread == 0, 1, spread)
    after_green = torch.where(high == green, 2 + (blue - red) / span, 4 + (red - green) / span)
    sixths = torch.where(high == red, (green - blue) / span, after_green) + 6 * factor  # of the circle
    # A channel has the highest value for a third of the circle around its own hue and the lowest around the opposite.
    away = torch.cat([(sixths + start) % 6 for start in (5, 3, 1)], dim=1)  # red's, green's and blue's
    turned = high - spread * torch.minimum(away, 4 - away).clamp(0, 1)
    return to_uint8(turned * 255.999)  # as torchvision: equal shares of [0, 1] for all 256 values


def _gaussian(sigma: Tensor, side: int) -> Tensor:
    """Weights (b, side, side) of a blur; what would come from beyond a border comes from its reflection."""
    sigma = sigma.float().clamp(min=1e-3).view(-1, 1, 1)  # so narrow a bell changes nothing
    reach = (REACH * sigma).ceil().clamp(max=side - 1)
    source = torch.arange(side, device=sigma.device)
    target = source.unsqueeze(1)

    def bell(distance: Tensor) -> Tensor:
        return torch.exp(-0.5 * (distance / sigma) ** 2) * (distance <= reach)

    weights = bell((target - source).abs())
    weights = weights + bell(target + source) * (source > 0)
    weights = weights + bell(2 * (side - 1) - target - source) * (source < side - 1)
    return weights / weights.sum(-1, keepdim=True)
