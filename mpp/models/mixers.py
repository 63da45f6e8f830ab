"""Mixers: the part of a block that passes information between tokens."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# Above this many keys plain products would hold too large a score matrix. Below it they are faster than PyTorch's fused
# kernel in bf16 on a CPU: 5.3 times at 65 tokens, 1.9 times at 197 and 577. In float32 there is no such difference
# (`python -m benchmarks.attention`, benchmarks/results/attention-cpu.json).
PLAIN_AT_MOST = 2048


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of (b, heads, n, d) queries over keys and values, by the kernel that is fastest there.

    The choice depends on device, dtype and length alone, so that a resumed run computes as the first one did.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= PLAIN_AT_MOST:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (b, heads, n, keys)
        return scores.softmax(-1) @ v  # the kernel sums in float32 whatever the dtype
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention with biases on all four projections (ViT paper, appendix A)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, tokens: Tensor, queries: Tensor | None = None) -> Tensor:
        """Mixes tokens (b, n, d); with `queries` (b, k, d), gives the outputs of those alone, (b, k, d)."""
        if queries is None:
            qkv = self.qkv(tokens)  # (b, n, 3 d)
            q, k, v = rearrange(qkv, "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        else:
            width = tokens.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            q = rearrange(
                F.linear(queries, weight[:width], bias[:width]), "b k (heads d) -> b heads k d", heads=self.heads
            )
            kv = F.linear(tokens, weight[width:], bias[width:])  # (b, n, 2 d)
            k, v = rearrange(kv, "b n (two heads d) -> two b heads n d", two=2, heads=self.heads)
        return self.project(rearrange(attend(q, k, v), "b heads k d -> b k (heads d)"))


MIXERS: dict[str, type[Attention]] = {"attention": Attention}
