"""SimMIM (arXiv 2111.09886; its code's models/simmim.py)."""

import torch
from torch import Tensor, nn

from mpp.batch import Batch
from mpp.models.layers import take
from mpp.models.vit import ViT
from mpp.objectives.base import Objective
from mpp.objectives.hiding import Hiding, embed_without, encoder_of_patches, mask_token
from mpp.objectives.nearest import Nearest
from mpp.objectives.painting import rows
from mpp.objectives.predicted import Pixels, precise
from mpp.objectives.simmim_config import SimMIMConfig


class SimMIM(Objective):
    """Hides patches behind a learned token, encodes all, and predicts the hidden ones' pixels by one linear map.

    The loss is the mean absolute error over the hidden patches alone, of pixels as the encoder sees them. The code
    divides by the number of hidden pixels plus 1e-5, which changes nothing that float32 could hold.
    """

    encoder: ViT
    config: SimMIMConfig

    def __init__(self, encoder: ViT, config: SimMIMConfig | None = None) -> None:
        config = config or SimMIMConfig()
        super().__init__(encoder_of_patches(encoder, config), config)
        self.hiding = Hiding(config, encoder.config.grid)
        self.target = Pixels(encoder, absolute=True)
        self.mask_token = mask_token(encoder)
        self.head = nn.Linear(encoder.config.width, self.target.outputs)
        self.nearest = Nearest(encoder.config.grid)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.compute(batch.images, self.draw(len(batch), batch.images.device))

    def draw(self, images: int, device: torch.device) -> Tensor:
        """Draws the hidden patches (b, k), for that many images."""
        return self.hiding.draw(images, device)

    def predict(self, images: Tensor, hidden: Tensor) -> Tensor:
        """The head's outputs at the hidden patches, float32 at least (b, k, p * p * c)."""
        tokens = embed_without(self.encoder, images, hidden, self.mask_token)  # (b, n, d)
        return precise(self.head(self.encoder.encode(tokens, at=hidden)))

    def compute(self, images: Tensor, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and what to log, for given hidden patches."""
        predicted, everywhere = self.predict(images, hidden), self.target.truth(images)
        truth, copied = take(everywhere, hidden), take(everywhere, self.nearest(hidden))
        return self.target.loss(predicted, truth), self.target.metrics(predicted, truth, copied)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures of what the encoder is given, of the predictions in hidden patches, and of the image."""
        hidden = self.draw(len(batch), batch.images.device)
        truth = self.target.truth(batch.images)
        painted = self.target.painted(self.predict(batch.images, hidden), take(truth, hidden))
        return rows(batch.images, self.encoder.config.patch, hidden, painted, truth)
