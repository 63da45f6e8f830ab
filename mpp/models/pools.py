"""Pools: from the tokens of an image to one vector. A new one is a class and a line in POOLS."""

import torch
from einops import rearrange
from torch import Tensor, nn

from mpp.models.layers import MLP
from mpp.models.mixers import attend
from mpp.models.vit_config import ViTConfig


class ClassToken(nn.Module):
    """The class token's output (ViT paper, equation 4)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (b, prefix + n, d) to (b, d)."""
        return tokens[:, 0]


class Average(nn.Module):
    """The average over the patches."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.prefix = config.prefix

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (b, prefix + n, d) to (b, d)."""
        return tokens[:, self.prefix :].mean(1)


class ClassTokenAndAverage(nn.Module):
    """The class token's output and behind it the patches' average, as DINOv2's classifiers take them (2304.07193).

    (dinov2/hub/classifiers.py; transformers' Dinov2ForImageClassification.)
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.prefix = config.prefix

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (b, prefix + n, d) to (b, 2 d)."""
        return torch.cat([tokens[:, 0], tokens[:, self.prefix :].mean(1)], 1)


class AttentionPool(nn.Module):
    """A learned query attends to all patches, and an MLP follows (MAP, arXiv 1810.00825; big_vision's models/vit.py).

    Tokens in front of the patches are left out, as by timm.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.prefix = config.prefix
        self.heads, width = config.heads, config.width
        self.probe = nn.Parameter(torch.empty(width))
        self.query = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (b, prefix + n, d) to (b, d)."""
        query = self.query(self.probe).expand(len(tokens), 1, -1)
        q = rearrange(query, "b one (heads d) -> b heads one d", heads=self.heads)
        kv = self.kv(tokens[:, self.prefix :])
        k, v = rearrange(kv, "b n (two heads d) -> two b heads n d", two=2, heads=self.heads)
        vector = self.project(rearrange(attend(q, k, v), "b heads one d -> b (one heads d)"))
        return vector + self.mlp(self.norm(vector))

    def initialise(self) -> None:
        """Draws big_vision's initial weights."""
        nn.init.xavier_uniform_(self.probe.unsqueeze(0))
        for part in (self.query.weight, *self.kv.weight.chunk(2), self.project.weight):
            nn.init.xavier_uniform_(part)
        for linear in (self.query, self.kv, self.project):
            nn.init.zeros_(linear.bias)


POOLS: dict[str, type[ClassToken] | type[Average] | type[ClassTokenAndAverage] | type[AttentionPool]] = {
    "cls": ClassToken,
    "avg": Average,
    "avg_norm": Average,
    "cls_avg": ClassTokenAndAverage,
    "map": AttentionPool,
}
