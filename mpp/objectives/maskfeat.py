"""Masked feature prediction (MaskFeat, arXiv 2112.09133; its authors' slowfast/models/masked.py)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpp import targets
from mpp.batch import Batch
from mpp.models.layers import put, take
from mpp.models.vit import ViT
from mpp.objectives.base import Objective
from mpp.objectives.hiding import Hiding, embed_without, encoder_of_patches, mask_token
from mpp.objectives.maskfeat_config import MaskFeatConfig
from mpp.objectives.painting import rows, strokes
from mpp.objectives.predicted import precise

STD = 0.02  # of the head's first weights (mmpretrain's configs)


class MaskFeat(Objective):
    """Hides patches behind a learned token, encodes all, and predicts the hidden ones' histograms of oriented gradients
    (`targets.hog`) by one linear map. The loss is the mean squared error over the hidden patches alone."""

    encoder: ViT
    config: MaskFeatConfig

    def __init__(self, encoder: ViT, config: MaskFeatConfig | None = None) -> None:
        config = config or MaskFeatConfig()
        super().__init__(encoder_of_patches(encoder, config), config)
        shape = encoder.config
        if shape.patch % config.cell:
            raise ValueError(f"objective.cell ({config.cell}) must divide model.patch ({shape.patch})")
        if min(shape.image) < 2:
            raise ValueError(
                f"objective.name maskfeat needs images of at least 2x2 pixels, got model.image {shape.image}"
            )
        self.hiding = Hiding(config, shape.grid)
        self.mask_token = mask_token(encoder)
        self.parts = shape.channels, config.bins, (shape.patch // config.cell) ** 2  # of a patch's numbers
        self.head = nn.Linear(shape.width, self.parts[0] * self.parts[1] * self.parts[2])
        nn.init.trunc_normal_(self.head.weight, std=STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.compute(batch.images, self.draw(len(batch), batch.images.device))

    def draw(self, images: int, device: torch.device) -> Tensor:
        """Draws the hidden patches (b, k), for that many images."""
        return self.hiding.draw(images, device)

    def predict(self, images: Tensor, hidden: Tensor) -> Tensor:
        """The head's outputs at the hidden patches, float32 at least (b, k, c * bins * cells)."""
        tokens = embed_without(self.encoder, images, hidden, self.mask_token)  # (b, n, d)
        return precise(self.head(self.encoder.encode(tokens, at=hidden)))

    def truth(self, images: Tensor, at: Tensor | None = None) -> Tensor:
        """The histograms of all patches, or of those `at` (b, k) alone: (b, k, c * bins * cells)."""
        return targets.hog(
            images, self.encoder.config.patch, self.config.cell, self.config.bins, self.config.window, at
        )

    def compute(self, images: Tensor, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and what to log, for given hidden patches."""
        predicted, truth = self.predict(images, hidden), self.truth(images, hidden)
        average = truth.mean((0, 1)).expand_as(truth)
        return F.mse_loss(predicted, truth), {
            "cosine": self._cosine(predicted.detach(), truth),
            "average": self._cosine(average, truth),
        }

    def _cosine(self, guess: Tensor, truth: Tensor) -> Tensor:
        """The mean cosine between histograms, but for those of cells without a gradient, which have no direction."""
        guess, truth = guess.unflatten(-1, self.parts), truth.unflatten(-1, self.parts)  # (b, k, c, bins, cells)
        known = truth.any(3)
        return (F.cosine_similarity(guess, truth, dim=3) * known).sum() / known.sum().clamp(min=1)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures of what the encoder is given, and of histograms: predicted in hidden patches, and true ones."""
        images, patch = batch.images, self.encoder.config.patch
        hidden, truth = self.draw(len(batch), images.device), self.truth(images)
        guess = put(truth, hidden, self.predict(images, hidden))
        painted, true = (strokes(part.unflatten(-1, self.parts), patch) for part in (guess, truth))
        return rows(images, patch, hidden, take(painted, hidden), true)
