"""Small layers that blocks, mixers and pools share."""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpp import draws
from mpp.models.trunk_config import TrunkConfig

QUICK = 1.702  # of the GELU by a sigmoid (arXiv 1606.08415, section 2), as in CLIP's model.py


@runtime_checkable
class Initialised(Protocol):
    """A part of an encoder that draws its own initial weights."""

    def initialise(self) -> None: ...


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Gathers tokens (b, n, d) at index (b, k): (b, k, d)."""
    if (rows := _rows(tokens, index)) is not None:
        return tokens.flatten(0, 1).index_select(0, rows).view(*index.shape, -1)
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def put(tokens: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """The tokens (b, n, d) with `new`, (b, k, d) or a single (d,), at index (b, k), in the tokens' dtype."""
    places = index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])  # (b, k, d)
    new = new.to(tokens.dtype).expand_as(places)
    if (rows := _rows(tokens, index)) is not None:
        return tokens.flatten(0, 1).index_copy(0, rows, new.flatten(0, 1)).view_as(tokens)
    return tokens.scatter(1, places, new)


def _rows(tokens: Tensor, index: Tensor) -> Tensor | None:
    """Which rows of tokens (b * n, d) an index (b, k) means: (b * k,). None where that is not the faster way.

    On a CPU, a row at a time is moved several times as fast, forward and backward, as by gather and scatter, which look
    at each of its numbers. Elsewhere an index that is none of the image's could not be told without waiting.
    """
    if type(index) is not Tensor or index.device.type != "cpu" or torch.compiler.is_compiling() or not index.numel():
        return None
    low, high = index.aminmax()
    if low < 0 or high >= tokens.shape[1] or len(index) != len(tokens):
        return None  # torch's own error, or a smaller batch's index
    return (index + tokens.shape[1] * torch.arange(len(index)).unsqueeze(1)).flatten()


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
        self.drop = Drop(config.dropout)
        self.gelu = config.gelu
        self.expand = nn.Linear(config.width, config.hidden * (2 if config.swiglu else 1), bias=config.bias)
        self.contract = nn.Linear(config.hidden, config.width, bias=config.bias)

    def forward(self, tokens: Tensor, keys: Tensor | None = None, part: int = 0) -> Tensor:
        """Maps tokens (..., d) to (..., d). keys, part: of dropout, as in `Drop`."""
        hidden = self.expand(tokens)
        if self.swiglu:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = gelu(hidden, self.gelu)
        return self.contract(self.drop(hidden, keys, part))

    def initialise(self) -> None:
        """Draws the paper's initial weights (its code's models_vit.py)."""
        for linear in (self.expand, self.contract):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.normal_(linear.bias, std=1e-6)


class Drop(nn.Module):
    """What training leaves out of a branch: elements (dropout), and all of it for some images (stochastic depth).

    path: the chance of the latter (arXiv 1603.09382). What is left grows so that the mean stays.
    """

    def __init__(self, dropout: float, path: float = 0.0) -> None:
        super().__init__()
        self.dropout, self.path = dropout, path

    def forward(self, branch: Tensor, keys: Tensor | None, part: int = 0) -> Tensor:
        """Maps (b, ..., d) to the same shape. keys: (b,) of each image, new ones where not given; part: which of those
        that draw from these keys this is."""
        if not self.training or not (self.dropout or self.path):
            return branch
        keys = draws.keys(len(branch), branch.device) if keys is None else keys
        if self.dropout:
            dropped = draws.hits(draws.apart(keys, 2 * part), branch[0].numel(), self.dropout).view_as(branch)
            branch = torch.where(dropped, 0, branch / (1 - draws.rounded(self.dropout)))
        if self.path:
            kept = draws.uniform(draws.apart(keys, 2 * part + 1), 1) >= self.path  # (b, 1)
            branch = branch * (kept / (1 - self.path)).to(branch.dtype).unsqueeze(-1)
        return branch
