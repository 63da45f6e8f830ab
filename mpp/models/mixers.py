"""Mixers: the part of a block that passes information between tokens. A new one is a class and a line in MIXERS."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mpp.models.layers import gelu, norm_of, take
from mpp.models.positions import turn
from mpp.models.trunk_config import Grid, TrunkConfig

# Above this many keys plain products would hold too large a score matrix. Below it they are faster than PyTorch's fused
# kernel in bf16 on a CPU: 5.3 times at 65 tokens, 1.9 times at 197 and 577. In float32 there is no such difference
# (`python -m benchmarks.attention`, benchmarks/results/attention-cpu.json).
PLAIN_AT_MOST = 2048
POOL_SIDE = 3  # PoolFormer (arXiv 2111.11418, section 4.1)
CONV_SIDE = 7  # ConvNeXt (arXiv 2201.03545, section 2.5), and MetaFormer's ConvFormer (2210.13452)


class Places(NamedTuple):
    """Where the tokens of a sequence are, for mixers that ask."""

    grid: Grid
    prefix: int  # tokens in front of the patches
    angles: Tensor | None = None  # by which queries and keys are turned, (b or 1, 1, n, head size)
    bias: Tensor | None = None  # of attention's scores, (b or 1, heads or 1, n, n)
    context: Tensor | None = None  # the tokens that cross-attention looks at, (b, m, context)
    context_angles: Tensor | None = None  # by which their keys are turned, (b, 1, m, head size)
    keys: Tensor | None = None  # from which each image draws what is left out of it, (b,); see mpp.draws
    causal: bool = False  # whether tokens see themselves and those before them alone, and there is no bias


class Mixer(nn.Module):
    """`forward(tokens, places, at)` mixes tokens (b, n, d); with `at` (b, k), it gives the outputs there, (b, k, d).

    grid: the trunk's own. context: channels of the tokens that cross-attention looks at.
    """

    def __init__(self, config: TrunkConfig, grid: Grid, context: int) -> None:
        super().__init__()

    def forward(self, tokens: Tensor, places: Places, at: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def initialise(self) -> None:
        """Draws initial weights."""


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False) -> Tensor:
    """Softmax attention of (b, heads, n, d) queries over keys and values, by the kernel that is fastest there.

    causal: query i over the keys 0 to i alone; without a bias.

    The choice depends on device, dtype and length alone, so that a resumed run computes as the first one did.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= PLAIN_AT_MOST:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (b, heads, n, keys)
        if bias is not None:
            scores = scores + bias
        if causal:
            scores = scores.masked_fill(~scores.new_ones(scores.shape[2:], dtype=torch.bool).tril(), -math.inf)
        return scores.softmax(-1) @ v  # the kernel sums in float32 whatever the dtype
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal)


class Attention(Mixer):
    """Multi-head self-attention (ViT paper, appendix A), its four projections with biases as published."""

    def __init__(self, config: TrunkConfig, grid: Grid, context: int) -> None:
        super().__init__(config, grid, context)
        self.heads, width = config.heads, config.width
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.norm_q = norm_of(config, config.head) if config.qk_norm else None
        self.norm_k = norm_of(config, config.head) if config.qk_norm else None
        self.project = nn.Linear(width, width, bias=config.bias)

    def forward(self, tokens: Tensor, places: Places, at: Tensor | None = None) -> Tensor:
        angles, bias = places.angles, places.bias
        turned, biased = angles, bias  # of the queries
        if at is None:
            qkv = self.qkv(tokens)  # (b, n, 3 d)
            q, k, v = rearrange(qkv, "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        else:
            q, k, v = self._queries_at(tokens, at)
            turned = None if angles is None else _rows(angles, at, (len(tokens), 1))
            biased = None if bias is None else _rows(bias, at, (len(tokens), bias.shape[1]))
            if places.causal:
                behind = torch.arange(tokens.shape[1], device=at.device) > at.unsqueeze(-1)  # (b, k, n)
                biased = q.new_zeros(()).masked_fill(behind.unsqueeze(1), -math.inf)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        if angles is not None and turned is not None:
            q, k = turn(q, turned), turn(k, angles)
        biased = None if biased is None else biased.to(q.dtype)
        mixed = attend(q, k, v, biased, causal=places.causal and at is None)
        return self.project(rearrange(mixed, "b heads k d -> b k (heads d)"))

    def _queries_at(self, tokens: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the tokens at `at` (b, k), keys and values of all."""
        width, weight, bias = tokens.shape[-1], self.qkv.weight, self.qkv.bias
        bias_q, bias_kv = (None, None) if bias is None else (bias[:width], bias[width:])
        q = F.linear(take(tokens, at), weight[:width], bias_q)
        kv = F.linear(tokens, weight[width:], bias_kv)  # (b, n, 2 d)
        k, v = rearrange(kv, "b n (two heads d) -> two b heads n d", two=2, heads=self.heads)
        return rearrange(q, "b k (heads d) -> b heads k d", heads=self.heads), k, v

    def initialise(self) -> None:
        for part in self.qkv.weight.chunk(3):  # each is a map of its own: Xavier's fan-out is d, not 3 d
            nn.init.xavier_uniform_(part)
        nn.init.xavier_uniform_(self.project.weight)
        for linear in (self.qkv, self.project):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


class CrossAttention(Mixer):
    """Multi-head attention of the tokens to a context, and not among themselves (CrossMAE, arXiv 2401.14391)."""

    def __init__(self, config: TrunkConfig, grid: Grid, context: int) -> None:
        super().__init__(config, grid, context)
        self.heads, width = config.heads, config.width
        self.query = nn.Linear(width, width, bias=config.qkv_bias)
        self.kv = nn.Linear(context, 2 * width, bias=config.qkv_bias)
        self.norm_q = norm_of(config, config.head) if config.qk_norm else None
        self.norm_k = norm_of(config, config.head) if config.qk_norm else None
        self.project = nn.Linear(width, width, bias=config.bias)

    def forward(self, tokens: Tensor, places: Places, at: Tensor | None = None) -> Tensor:
        assert places.context is not None, "a trunk's encode gives one"
        tokens = tokens if at is None else take(tokens, at)
        q = rearrange(self.query(tokens), "b n (heads d) -> b heads n d", heads=self.heads)
        kv = self.kv(places.context)  # (b, m, 2 d)
        k, v = rearrange(kv, "b m (two heads d) -> two b heads m d", two=2, heads=self.heads)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        if places.angles is not None and places.context_angles is not None:
            turned = places.angles if at is None else _rows(places.angles, at, (len(tokens), 1))
            q, k = turn(q, turned), turn(k, places.context_angles)
        return self.project(rearrange(attend(q, k, v), "b heads n d -> b n (heads d)"))

    def initialise(self) -> None:
        for weight in (self.query.weight, *self.kv.weight.chunk(2), self.project.weight):
            nn.init.xavier_uniform_(weight)
        for linear in (self.query, self.kv, self.project):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


def _rows(of: Tensor, at: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows `at` (b, k) of (b or 1, x, n, m), for (b, x) as in `shape`: (b, x, k, m)."""
    of = of.expand(*shape, -1, -1)
    return of.gather(2, at[:, None, :, None].expand(-1, shape[1], -1, of.shape[3]))


class OnGrid(Mixer):
    """A mixer of the grid of patches, all of them. Tokens in front of the patches get nothing from it."""

    def forward(self, tokens: Tensor, places: Places, at: Tensor | None = None) -> Tensor:
        mixed = self.mix(tokens[:, places.prefix :], places.grid)
        if places.prefix:
            mixed = torch.cat([torch.zeros_like(tokens[:, : places.prefix]), mixed], dim=1)
        return mixed if at is None else take(mixed, at)

    def mix(self, patches: Tensor, grid: Grid) -> Tensor:
        """Mixes the patches (b, n, d) of a grid."""
        raise NotImplementedError


class TokenMLP(OnGrid):
    """MLP-Mixer's map across patches (arXiv 2105.01601, equation 1); hidden units half the width (its table 1)."""

    def __init__(self, config: TrunkConfig, grid: Grid, context: int) -> None:
        super().__init__(config, grid, context)
        self.section, self.grid, patches = config.section, grid, math.prod(grid)
        self.gelu = config.gelu
        self.expand = nn.Linear(patches, max(1, config.width // 2), bias=config.bias)
        self.contract = nn.Linear(max(1, config.width // 2), patches, bias=config.bias)

    def mix(self, patches: Tensor, grid: Grid) -> Tensor:
        if grid != self.grid:
            have, got = ("x".join(map(str, shape)) for shape in (self.grid, grid))
            raise ValueError(
                f"{self.section}.mixer mlp has weights for a grid of {have} patches only, got images of {got}"
            )
        hidden = gelu(self.expand(patches.transpose(1, 2)), self.gelu)  # (b, d, hidden)
        return self.contract(hidden).transpose(1, 2)

    def initialise(self) -> None:
        for linear in (self.expand, self.contract):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.normal_(linear.bias, std=1e-6)


class Pooling(OnGrid):
    """The average of each patch's 3x3 neighbours inside the grid, minus itself (arXiv 2111.11418, equation 4)."""

    def mix(self, patches: Tensor, grid: Grid) -> Tensor:
        # Sums along either axis as products with band matrices: avg_pool2d's gradient is many times slower on a CPU.
        down, along = (self._near(side, patches) for side in grid)
        maps = along @ patches.unflatten(1, grid)  # (b, h, w, d)
        maps = down @ maps.flatten(2)  # (b, h, w * d)
        counts = down.sum(1).unsqueeze(1) * along.sum(1)  # (h, w); whole numbers, exact in bfloat16
        return maps.view_as(patches) / counts.view(-1, 1) - patches

    def _near(self, side: int, like: Tensor) -> Tensor:
        """(side, side): 1 where two places along an axis are in one window."""
        places = torch.arange(side, device=like.device)
        return ((places - places.unsqueeze(1)).abs() <= POOL_SIDE // 2).to(like.dtype)


class DepthwiseConv(OnGrid):
    """A 7x7 convolution of each channel by itself."""

    def __init__(self, config: TrunkConfig, grid: Grid, context: int) -> None:
        super().__init__(config, grid, context)
        width = config.width
        self.conv = nn.Conv2d(width, width, CONV_SIDE, padding=CONV_SIDE // 2, groups=width, bias=config.bias)

    def mix(self, patches: Tensor, grid: Grid) -> Tensor:
        maps = rearrange(patches, "b (h w) d -> b d h w", h=grid[0])
        return rearrange(self.conv(maps), "b d h w -> b (h w) d")

    def initialise(self) -> None:
        nn.init.trunc_normal_(self.conv.weight, std=0.02)  # ConvNeXt's
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)


class IdentityMixer(Mixer):
    """Every token by itself: what is left of a MetaFormer without mixing (arXiv 2210.13452, IdentityFormer)."""

    def forward(self, tokens: Tensor, places: Places, at: Tensor | None = None) -> Tensor:
        return tokens if at is None else take(tokens, at)


MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "cross": CrossAttention,
    "mlp": TokenMLP,
    "pool": Pooling,
    "conv": DepthwiseConv,
    "identity": IdentityMixer,
}
