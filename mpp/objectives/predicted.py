"""What patches are predicted as: the loss of it, figures beside guesses that need no learning, and pictures.

A target knows an encoder's images: their channels, patch and normalisation. It has no weights; what predicts, and at
which patches, is the objective's affair.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from mpp import targets
from mpp.models.vit import ViT
from mpp.objectives.predicted_config import MOST_BITS, TargetName, bits_of

EPS = 1e-6  # added to the variance of a patch's pixels (MAE's models_mae.py)


class Target:
    """What is predicted of a patch: `outputs` numbers.

    Predictions are (b, k, outputs) of any k patches, in float32 at least (`precise`). The truth is that of all patches
    of uint8 images, (b, n, ...), from which those of the same k are taken.
    """

    outputs: int
    compares = True  # whether metrics look at what is copied from another patch

    def truth(self, images: Tensor) -> Tensor:
        """What is true of each patch of uint8 images (b, c, h, w): (b, n, ...)."""
        raise NotImplementedError

    def loss(self, predicted: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
        """The mean over patches, a scalar: of predictions (b, k, outputs) and the truth of the same patches. With
        weights (b, k), the sum of each patch's loss times its weight."""
        raise NotImplementedError

    def metrics(
        self, predicted: Tensor, truth: Tensor, copied: Tensor | None = None, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Scalars to log, by names of `predicted_config.METRICS`, without gradients; means over patches, weighted so.

        copied: (b, j, ...) the truth of other patches, as a guess of the first j ones' that needs no learning
            ("nearest"), for targets that compare; without it some log less. With weights, of all of them.
        """
        raise NotImplementedError

    def painted(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Predictions as pixels, uint8 (b, k, p * p * c)."""
        raise NotImplementedError

    def shown(self, images: Tensor) -> Tensor:
        """What would have been right, for all patches, as pixels: uint8 (b, n, p * p * c)."""
        raise NotImplementedError


class Colours(Target):
    """The classes of a patch's mean colours in grid x grid cells (ViT paper, appendix B.1.2), by cross-entropy.

    A class has `bits` of each channel, of images in colour or grey.
    """

    def __init__(self, encoder: ViT, bits: int | None = None, grid: int = 1) -> None:
        config = encoder.config
        self.patch, self.channels, self.grid = config.patch, config.channels, grid
        self.bits = bits_of(bits, self.channels)
        self.outputs = grid**2 << self.channels * self.bits

    def truth(self, images: Tensor) -> Tensor:
        """The classes of each patch's cells: (b, n, cells) int64."""
        if self.grid == 1:
            return targets.mean_colour(images, self.patch, self.bits).unsqueeze(-1)
        return targets.colour_grid(images, self.patch, self.grid, self.bits)

    def loss(self, predicted: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
        logits, classes = self._logits(predicted).flatten(0, 2), truth.flatten()
        if weights is None:
            return F.cross_entropy(logits, classes)
        return (F.cross_entropy(logits, classes, reduction="none").view_as(truth).mean(-1) * weights).sum()

    def metrics(
        self, predicted: Tensor, truth: Tensor, copied: Tensor | None = None, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        classes = 1 << self.channels * self.bits
        return compared(self._logits(predicted.detach()).argmax(-1), truth, classes, copied, weights)

    def painted(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Cells in the colour in the middle of the predicted class."""
        return self._filled(targets.class_colour(self._logits(predicted).argmax(-1), self.bits, self.channels))

    def shown(self, images: Tensor) -> Tensor:
        """Cells in their true mean colour, rounded down, which keeps its class."""
        sums = targets.cell_sums(images, self.patch, self.grid)  # (b, n, cells, c)
        return self._filled((sums // (self.patch // self.grid) ** 2).to(torch.uint8))

    def _logits(self, predicted: Tensor) -> Tensor:
        return rearrange(predicted, "b k (cells colours) -> b k cells colours", cells=self.grid**2)

    def _filled(self, colours: Tensor) -> Tensor:
        """Fills patches with the colours of their cells: (b, k, cells, c) to (b, k, p * p * c)."""
        side = self.patch // self.grid
        cells = rearrange(colours, "b k (p q) c -> b k p q c", p=self.grid)
        return repeat(cells, "b k p q c -> b k (p r) (q s) c", r=side, s=side).flatten(2)


class Pixels(Target):
    """A patch's pixels by mean squared error, or absolute error: as the encoder sees them, or normalised once more as
    MAE has them, less the patch's mean and divided by its deviation."""

    def __init__(self, encoder: ViT, bits: int | None = None, normalised: bool = False, absolute: bool = False) -> None:
        self.encoder, self.normalised = encoder, normalised
        self.error = F.l1_loss if absolute else F.mse_loss
        self.compares = not normalised  # whose true mean is filled in
        self.channels = encoder.config.channels
        self.bits = bits_of(bits, self.channels)  # of the mean colours that are compared
        self.outputs = encoder.config.patch**2 * self.channels

    def truth(self, images: Tensor) -> Tensor:
        """The pixels, uint8 (b, n, p * p * c): the rest is done to those patches alone whose truth it is."""
        return targets.patch_pixels(images, self.encoder.config.patch)

    def loss(self, predicted: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
        pixels = self._seen(truth)
        if self.normalised:
            mean, std = _mean_and_std(pixels)
            pixels = (pixels - mean) / std
        if weights is None:
            return self.error(predicted, pixels)
        return (self.error(predicted, pixels, reduction="none").mean(-1) * weights).sum()

    def metrics(
        self, predicted: Tensor, truth: Tensor, copied: Tensor | None = None, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Mean squared errors, to be shown in decibels; and with `copied`, unless the true mean is filled in, that of
        what is copied, and how often mean colours are right, as of `Colours`, if these are images in colour or grey."""
        pixels, predicted = self._seen(truth), predicted.detach()
        mean, std = _mean_and_std(pixels)
        guess = predicted * std + mean if self.normalised else predicted
        errors = {"psnr": self._squared(guess - pixels, weights), "flat": self._squared(mean - pixels, weights)}
        if self.normalised or copied is None:
            return errors
        near = copied.shape[1]
        errors["copied"] = self._squared(
            self._seen(copied) - pixels[:, :near], None if weights is None else weights[:, :near]
        )
        if self.channels not in MOST_BITS:
            return errors
        said, true, other = (self._colour_of(colours) for colours in (self._as_colours(guess), truth, copied))
        return compared(said, true, 1 << self.channels * self.bits, other, weights) | errors

    def painted(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """The predicted pixels; normalised ones get their patch's true mean and deviation, which are not predicted."""
        if self.normalised:
            mean, std = _mean_and_std(self._seen(truth))
            predicted = predicted * std + mean
        return self._as_colours(predicted)

    def shown(self, images: Tensor) -> Tensor:
        return self.truth(images)

    def _seen(self, pixels: Tensor) -> Tensor:
        """Pixels, uint8 (b, k, p * p * c), as the encoder sees them."""
        return precise(self.encoder.normalise_pixels(pixels))

    def _as_colours(self, pixels: Tensor) -> Tensor:
        """The inverse, rounded, of pixels of any value."""
        image = rearrange(pixels, "b k (s c) -> b c k s", c=self.channels)
        return rearrange(self.encoder.denormalise(image), "b c k s -> b k (s c)")

    def _squared(self, error: Tensor, weights: Tensor | None) -> Tensor:
        """The mean square of errors (b, k, p * p * c) of pixels as the encoder sees them, white being 1."""
        squares = (error.unflatten(-1, (-1, self.channels)) * self.encoder.std.flatten()).square()
        return averaged(squares, weights)

    def _colour_of(self, pixels: Tensor) -> Tensor:
        """The class of the mean colour of patches given as pixels, uint8 (b, k, p * p * c): (b, k, 1) int64."""
        sums = pixels.unflatten(-1, (-1, self.channels)).sum(-2, dtype=torch.int64)
        return targets.colour_class(sums, self.encoder.config.patch**2, self.bits).unsqueeze(-1)


def target_of(name: TargetName, encoder: ViT, bits: int | None = None, grid: int = 4) -> Target:
    """The target of that name for an encoder's images, by objective.bits and objective.grid; ValueError names what does
    not go together."""
    shape = encoder.config
    if name == "pixels" or name == "normalised_pixels":
        return Pixels(encoder, bits, normalised=name == "normalised_pixels")
    if shape.channels not in MOST_BITS:
        raise ValueError(
            f"objective.target {name} needs images in colour or grey (model.channels 3 or 1, got {shape.channels}); "
            "pixels and normalised_pixels take any"
        )
    if name == "colour_grid" and shape.patch % grid:
        raise ValueError(f"objective.grid ({grid}) must divide model.patch ({shape.patch})")
    return Colours(encoder, bits, grid if name == "colour_grid" else 1)


def compared(
    guess: Tensor, truth: Tensor, classes: int, copied: Tensor | None = None, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """How often classes (b, k, cells) are right, by weights of patches (b, k), beside two guesses without learning.

    commonest: the class that is commonest in the batch, everywhere. nearest: the class of another patch, `copied`
    (b, j, cells) for the first j of the patches.
    """
    each = torch.ones_like(truth, dtype=torch.float32)
    each = each if weights is None else each * weights.unsqueeze(-1)
    counts = torch.zeros(classes, device=truth.device).scatter_add(0, truth.flatten(), each.flatten())
    total = truth.numel() if weights is None else each.sum()
    figures = {"accuracy": averaged((guess == truth).float(), weights), "commonest": counts.max() / total}
    if copied is not None:
        figures["nearest"] = averaged((copied == truth[:, : copied.shape[1]]).float(), weights)
    return figures


def averaged(values: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of values of patches (b, k, ...), by weights of these (b, k) if there are some."""
    if weights is None:
        return values.mean()
    return (values.flatten(2).mean(-1) * weights).sum() / weights.sum()


def precise(values: Tensor) -> Tensor:
    """Values in float32 at least, whatever the precision they were computed in."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _mean_and_std(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each patch, (b, k, 1): the deviation is unbiased, with a little added.

    On a CPU torch.var_mean, of rows as short as these, takes 15 times as long.
    """
    mean = pixels.mean(-1, keepdim=True)
    variance = (pixels - mean).square().sum(-1, keepdim=True) / (pixels.shape[-1] - 1)
    return mean, (variance + EPS).sqrt()
