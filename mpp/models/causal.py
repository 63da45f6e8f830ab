"""Which tokens a token sees where patches come one after the other, row by row (`causal` of `Trunk.encode`)."""

import math

import torch
from torch import Tensor

from mpp.models.mixers import Places
from mpp.models.trunk_config import TrunkConfig


def check_causal(config: TrunkConfig, tokens: Tensor, causal: int | Tensor) -> None:
    """Raises ValueError for mixers that can't do without some patches, and for what is no number of first patches."""
    if reason := config.sees_ahead:
        raise ValueError(f"{reason}, so encode can't be causal")
    if isinstance(causal, Tensor):
        if causal.shape != tokens.shape[:1] or causal.is_floating_point() or causal.dtype == torch.bool:
            found = f"{causal.dtype} {tuple(causal.shape)}"
            raise ValueError(f"encode needs `causal` of shape ({len(tokens)},), whole numbers, got {found}")
    elif isinstance(causal, bool) or not 0 <= causal <= tokens.shape[1]:
        most = tokens.shape[1]
        raise ValueError(f"encode needs `causal` from 0 to {most}, how many first patches all see, got {causal}")


def ordered(places: Places, causal: int | Tensor, tokens: Tensor, index: Tensor | None) -> Places:
    """The places where a token sees itself, what is before it, and the free first ones.

    tokens: (b, prefix + n, d). index: (b, prefix + n), their numbers; 0, 1, ... where not given.
    """
    if isinstance(causal, int) and places.prefix + causal <= 1 and places.bias is None and index is None:
        return places._replace(causal=True)  # the first token is seen by all in any case
    number = torch.arange(tokens.shape[1], device=tokens.device)[None] if index is None else index  # (b or 1, n)
    free = places.prefix + (causal.view(-1, 1, 1) if isinstance(causal, Tensor) else causal)
    seen = (number.unsqueeze(1) <= number.unsqueeze(2)) | (number.unsqueeze(1) < free)  # (b or 1, n, n)
    bias = tokens.new_zeros(()) if places.bias is None else places.bias
    return places._replace(bias=bias.masked_fill(~seen.unsqueeze(1), -math.inf))
