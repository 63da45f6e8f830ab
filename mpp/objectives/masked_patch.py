"""Masked patch prediction, the self-supervision of the ViT paper (arXiv 2010.11929, section 4.6, appendix B.1.2)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpp import draws, targets
from mpp.batch import Batch
from mpp.masks import random_order
from mpp.models.decoder import Decoder
from mpp.models.layers import put, take
from mpp.models.vit import ViT
from mpp.objectives.base import Objective
from mpp.objectives.hiding import Hiding, encoder_of_patches, mask_token
from mpp.objectives.masked_patch_config import MaskedPatchConfig
from mpp.objectives.nearest import Nearest
from mpp.objectives.painting import hatch
from mpp.objectives.predicted import precise, target_of
from mpp.objectives.predicted_config import of_several

MASKED, REPLACED, KEPT = range(3)  # fates of corrupted patches, in the order of `split`


class Draw(NamedTuple):
    """What happens to which patches."""

    patches: Tensor  # (b, k) the corrupted ones
    fate: Tensor  # (b, k) what becomes of each; where patches are dropped, those that are masked, in the same order
    other: Tensor  # (b, k) the patch whose embedding replaces this one's where it is replaced; never itself
    seen: Tensor | None = None  # (b, s) where patches are dropped, all others: the encoder is given no more


class MaskedPatchPrediction(Objective):
    """Predicts corrupted patches, by default their mean colours, from the encoder's output at their places.

    A share of the patch embeddings is corrupted, before positions are added: 80 % of those become a learned [mask]
    embedding, 10 % the embedding of another patch of the image, and 10 % stay. The loss counts them all, no others; of
    several targets it is the sum.

    With `decoder` nothing stands in the place of masked patches: they are dropped, always as many, and a decoder says
    what all corrupted ones are, from the encoder's output for the others.
    """

    encoder: ViT
    config: MaskedPatchConfig
    mask_token: nn.Parameter  # unless patches are dropped
    head: nn.Linear  # likewise
    decoder: Decoder  # where patches are dropped

    def __init__(self, encoder: ViT, config: MaskedPatchConfig | None = None) -> None:
        config = config or MaskedPatchConfig()
        super().__init__(encoder_of_patches(encoder, config), config)
        shape = encoder.config
        self.targets = {name: target_of(name, encoder, config.bits, config.grid) for name in config.targets}
        if shape.grid[0] * shape.grid[1] < 2:
            raise ValueError(f"masked patches need at least 2 patches, got an image {shape.image} of one patch")
        self.hiding = Hiding(config, shape.grid)
        self.outputs = [target.outputs for target in self.targets.values()]
        if config.decoder is None:
            self.mask_token = mask_token(encoder)
            head = self.head = nn.Linear(shape.width, sum(self.outputs))
        else:
            self.dropped, self.replaced = config.dropped_and_replaced(self.hiding.count, self.hiding.patches)
            self.decoder = Decoder(config.decoder, encoder, sum(self.outputs))
            head = self.decoder.head
        nn.init.zeros_(head.weight)  # as every head of the paper's code: the first guess is uniform
        nn.init.zeros_(head.bias)
        self.nearest = Nearest(shape.grid)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.compute(batch.images, self.draw(len(batch), batch.images.device))

    def draw(self, images: int, device: torch.device) -> Draw:
        """Draws what is corrupted, and how, for that many images."""
        if self.config.decoder is not None:
            return self._draw_dropped(images, device)
        patches = self.hiding.draw(images, device)
        keys = draws.keys(images, device)
        chance, (masked, replaced, _) = draws.uniform(draws.apart(keys, 1), self.hiding.count), self.config.split
        fate = (chance >= masked).int() + (chance >= masked + replaced)
        return Draw(patches, fate, self._others(patches, draws.apart(keys, 0)))

    def _draw_dropped(self, images: int, device: torch.device) -> Draw:
        """The same where patches are dropped: fates go by place in an order that is drawn."""
        left, patches = self.hiding.split(images, device)
        count = self.hiding.count
        if self.dropped < count and not self.hiding.random:  # else their order is random already, or without meaning
            patches = patches.gather(1, random_order(images, count, device))
        place = torch.arange(count, device=device).expand(images, -1)
        fate = (place >= self.dropped).int() + (place >= self.dropped + self.replaced)
        others = self._others(patches, draws.keys(images, device)) if self.replaced else patches
        return Draw(patches, fate, others, torch.cat([patches[:, self.dropped :], left], dim=1))

    def _others(self, patches: Tensor, keys: Tensor) -> Tensor:
        """Draws for each patch (b, k) another one of its image, every one equally likely."""
        count = self.hiding.patches
        return (patches + 1 + draws.below(keys, patches.shape[1], count - 1)) % count

    def corrupt(self, tokens: Tensor, draw: Draw, mask: Tensor | None = None) -> Tensor:
        """Replaces patch embeddings (b, n, d) as drawn; with `mask`, what stands in the place of [mask]."""
        mask = self.mask_token if mask is None else mask
        fate = draw.fate.unsqueeze(-1)  # (b, k, 1)
        kept_or_other = torch.where(fate == REPLACED, take(tokens, draw.other), take(tokens, draw.patches))
        return put(tokens, draw.patches, torch.where(fate == MASKED, mask.to(tokens.dtype), kept_or_other))

    def predict(self, images: Tensor, draw: Draw) -> Tensor:
        """What is said of the corrupted patches, float32 at least (b, k, outputs)."""
        if draw.seen is not None:
            # What is shown of a patch: itself, or another one where it is replaced; those come first.
            shown = torch.cat([draw.other[:, self.dropped :][:, : self.replaced], draw.seen[:, self.replaced :]], dim=1)
            seen = self.encoder.encode(self.encoder.embed(images, shown), places=draw.seen)  # (b, prefix + s, d)
            return precise(self.decoder(seen, draw.seen, draw.patches))
        if self.encoder.stem.overlaps:
            tokens = self.masked(self.encoder.embed(self.without(images, draw)), draw)  # (b, n, d)
        else:
            tokens = self.corrupt(self.encoder.embed(images), draw)  # (b, n, d)
        return precise(self.head(self.encoder.encode(tokens, at=draw.patches)))

    def without(self, images: Tensor, draw: Draw) -> Tensor:
        """The images as an overlapping stem may see them, normalised: with corrupted patches of pixels.

        A token of such a stem sees other patches' pixels too, so that to replace embeddings alone would leave the
        answer in its neighbours: masked patches get the mean colour, and replaced ones another patch's pixels.
        """
        patch, pixels = self.encoder.config.patch, self.encoder.normalise(images)
        patches = self.corrupt(targets.patch_pixels(pixels, patch), draw, pixels.new_zeros(()))
        return targets.unpatchify(patches, patch, self.encoder.grid(images))

    def masked(self, tokens: Tensor, draw: Draw) -> Tensor:
        """Replaces those patch embeddings (b, n, d) by [mask] that are to be masked, and no others."""
        fate = draw.fate.unsqueeze(-1)  # (b, k, 1)
        new = torch.where(fate == MASKED, self.mask_token.to(tokens.dtype), take(tokens, draw.patches))
        return put(tokens, draw.patches, new)

    def compute(self, images: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and what to log, for a given draw."""
        predicted = self.predict(images, draw).split(self.outputs, dim=-1)
        nearest = self.nearest(draw.patches) if any(target.compares for target in self.targets.values()) else None
        losses, metrics = [], {}
        for (name, target), outputs in zip(self.targets.items(), predicted, strict=True):
            everywhere = target.truth(images)  # (b, n, ...)
            truth = take(everywhere, draw.patches)
            losses.append(target.loss(outputs, truth))
            copied = take(everywhere, nearest) if target.compares and nearest is not None else None
            for figure, value in target.metrics(outputs, truth, copied).items():
                metrics[of_several(self.config.targets, name, figure)] = value
            if len(predicted) > 1:
                metrics[f"{name}_loss"] = losses[-1].detach()
        return torch.stack(losses).sum(), metrics

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures of the input, the corrupted input (chequered where masked), and each target's prediction and truth.

        Prediction and truth show the target alone in the corrupted patches, and the image elsewhere.
        """
        images, patch = batch.images, self.encoder.config.patch
        draw = self.draw(len(batch), images.device)
        predicted = self.predict(images, draw).split(self.outputs, dim=-1)
        patches = targets.patch_pixels(images, patch)  # (b, n, p * p * c)
        rows = {"input": patches, "corrupted": self.corrupt(patches, draw, take(hatch(images, patch), draw.patches))}
        for (name, target), outputs in zip(self.targets.items(), predicted, strict=True):
            guess = target.painted(outputs, take(target.truth(images), draw.patches))
            right = take(target.shown(images), draw.patches)
            rows[of_several(self.config.targets, name, "predicted")] = put(patches, draw.patches, guess)
            rows[of_several(self.config.targets, name, "truth")] = put(patches, draw.patches, right)
        grid = self.encoder.grid(images)
        return {name: targets.unpatchify(pixels, patch, grid) for name, pixels in rows.items()}
