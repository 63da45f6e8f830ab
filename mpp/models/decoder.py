"""A decoder that says something of the patches that an encoder was not shown (MAE, arXiv 2111.06377, section 3)."""

import math

import torch
from torch import Tensor, nn

from mpp.models.decoder_config import DecoderConfig
from mpp.models.layers import put
from mpp.models.trunk import Trunk
from mpp.models.vit import ViT

STD = 0.02  # of the mask token at first (MAE, models_mae.py)


class Decoder(nn.Module):
    """A narrower trunk over the encoder's tokens, with a learned token in each place that the encoder did not see.

    outputs: numbers of each patch, a linear map of what the trunk gives there. The encoder's tokens in front of the
    patches come along, and so do their gradients.
    """

    def __init__(self, config: DecoderConfig, encoder: ViT, outputs: int) -> None:
        super().__init__()
        if config.class_token or config.registers:
            own = "class_token" if config.class_token else "registers"
            raise ValueError(f"{config.section}.{own}: the tokens in front of a decoder's patches are the encoder's")
        self.prefix = encoder.prefix
        self.narrow = nn.Linear(encoder.config.width, config.width)
        self.mask_token = nn.Parameter(STD * torch.randn(config.width))
        self.trunk = Trunk(config, encoder.config.grid, front=encoder.prefix)
        self.head = nn.Linear(config.width, outputs)
        for linear in (self.narrow, self.head):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, seen: Tensor, kept: Tensor, at: Tensor) -> Tensor:
        """What it says of patches `at` (b, j): (b, j, outputs).

        seen: (b, prefix + k, d), what `encode(tokens, kept)` gave of the patches `kept` (b, k).
        """
        seen = self.narrow(seen)  # (b, prefix + k, width)
        everywhere = self.mask_token.to(seen.dtype).expand(len(seen), math.prod(self.trunk.own_grid), -1)
        tokens = put(everywhere, kept, seen[:, self.prefix :])  # (b, n, width)
        front = seen[:, : self.prefix] if self.prefix else None
        return self.head(self.trunk.encode(tokens, at=at, front=front))
