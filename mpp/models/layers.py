"""Small layers that blocks, mixers and pools share."""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpp.models.trunk_config import TrunkConfig

QUICK = 1.702  # of the GELU by a sigmoid (arXiv 1606.08415, section 2), as in CLIP's model.py


@runtime_checkable
class Initialised(Protocol):
    """A part of an encoder that draws its own initial weights."""

    def initialise(self) -> None: ...


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Gathers tokens (b, n, d) at index (b, k): (b, k, d)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def put(tokens: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """The tokens (b, n, d) with `new`, (b, k, d) or a single (d,), at index (b, k), in the tokens' dtype."""
    places = index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])  # (b, k, d)
    return tokens.scatter(1, places, new.to(tokens.dtype).expand_as(places))


def norm_of(config: TrunkConfig, size: int) -> nn.Module:
    """The config's norm, over that many channels."""
    return (nn.RMSNorm if config.norm == "rms" else nn.LayerNorm)(size, config.norm_eps)


def gelu(hidden: Tensor, kind: str) -> Tensor:
    """The GELU (arXiv 1606.08415), or what stands for it: `gelu` of a config."""
    if kind == "quick":
        return hidden * torch.sigmoid(QUICK * hidden)
    return F.gelu(hidden, approximate="tanh" if kind == "tanh" else "none")


class MLP(nn.Module):
    """Two linear maps with a GELU between them; with swiglu, silu(gate) * value, the gate's rows first."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.swiglu = config.swiglu
        self.dropout = dropout_of(config.dropout)
        self.gelu = config.gelu
        self.expand = nn.Linear(config.width, config.hidden * (2 if config.swiglu else 1), bias=config.bias)
        self.contract = nn.Linear(config.hidden, config.width, bias=config.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.expand(tokens)
        if self.swiglu:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = gelu(hidden, self.gelu)
        return self.contract(self.dropout(hidden))

    def initialise(self) -> None:
        """Draws the paper's initial weights (its code's models_vit.py)."""
        for linear in (self.expand, self.contract):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.normal_(linear.bias, std=1e-6)


def dropout_of(share: float) -> nn.Module:
    """Dropout, or nothing at all where the share is 0: PyTorch's would copy the tokens."""
    return nn.Dropout(share) if share else nn.Identity()


class DropPath(nn.Module):
    """Leaves out a residual branch for some images in training (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.chance
        return branch * (kept / (1 - self.chance)).to(branch.dtype)
