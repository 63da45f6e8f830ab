"""What Google's and big_vision's files have in common: the names and shapes that flax gives the parts of a ViT."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mpp.weights.format import Part, same


@dataclass(frozen=True)
class BlockNames:
    """How flax numbers a block's modules: until "linen" through all of them, since then through those of a kind."""

    norm1: str = "LayerNorm_0"
    attention: str = "MultiHeadDotProductAttention_1"
    norm2: str = "LayerNorm_2"
    mlp: str = "MlpBlock_3"


PUBLISHED = BlockNames()  # every published file; vit_jax itself renames them when it loads
LINEN = BlockNames("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")  # what vit_jax saves


def published_settings() -> dict[str, Any]:
    """What no file says: flax's GELU and norm, and pixels in [-1, 1] (vit_jax/input_pipeline.py)."""
    return {"gelu": "tanh", "norm_eps": 1e-6, "resize": "bilinear", "mean": (0.5,), "std": (0.5,)}


@dataclass(frozen=True)
class Blocks:
    """What a file's names and shapes tell about its blocks."""

    depth: int
    width: int
    heads: int
    hidden: int
    names: BlockNames
    scanned: bool  # all blocks in one, with an axis for the depth in front (big_vision's `scan`)

    @classmethod
    def of(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> "Blocks":
        """Of each size the most frequent counts, so that one tensor of another shape is an error of that one alone.

        ValueError if there is none to tell, or if `facts` contradict the file.
        """
        if "embedding/kernel" not in tensors:
            raise ValueError("embedding/kernel missing")
        inside = {name: t for name, t in tensors.items() if name.startswith("Transformer/encoderblock")}
        scanned = any(name.startswith("Transformer/encoderblock/") for name in inside)
        numbers = [int(m[1]) for name in inside if (m := re.match(r"Transformer/encoderblock_(\d{1,4})/", name))]
        depth = _most_common("depth", inside, "", 0) if scanned else 1 + max(numbers, default=0)
        heads = _most_common("heads", inside, "/(query|key|value)/(kernel|bias)", -2)
        if facts.get("heads", heads) != heads:
            raise ValueError(f"heads={facts['heads']}, where the file has {heads}")
        width = _most_common("width", inside, "/LayerNorm_./(scale|bias)", -1)
        hidden = _most_common("hidden units", inside, "/Dense_0/(kernel|bias)", -1)
        published = any(f"/{PUBLISHED.attention}/" in name for name in inside)
        return cls(depth, width, heads, hidden, PUBLISHED if published else LINEN, scanned)


def _most_common(what: str, tensors: dict[str, Tensor], name_ends: str, axis: int) -> int:
    least = 1 if axis >= 0 else -axis
    sizes = [t.shape[axis] for name, t in tensors.items() if re.search(f"{name_ends}$", name) and t.ndim >= least]
    if not sizes:
        raise ValueError(f"no tensor Transformer/encoderblock...{name_ends} tells the {what}")
    return Counter(sizes).most_common(1)[0][0]


def patch_of(kernel: Tensor) -> tuple[int, int]:
    """The side of the patches of an embedding's kernel (p, p, c, d), and the channels."""
    if kernel.ndim != 4 or kernel.shape[0] != kernel.shape[1] or not kernel.numel():
        raise ValueError(f"embedding/kernel {tuple(kernel.shape)} where (patch, patch, channels, width) was expected")
    return kernel.shape[0], kernel.shape[2]


def block_parts(theirs: str, names: BlockNames, heads: int) -> dict[str, Part]:
    """Of one block, by our names inside it."""
    attention = f"{theirs}/{names.attention}"
    return {
        **norm("norm1", f"{theirs}/{names.norm1}"),
        **projections("mixer.qkv", attention, ("query", "key", "value"), heads),
        **projection_out("mixer.project", attention, heads),
        **norm("norm2", f"{theirs}/{names.norm2}"),
        **dense("mlp.expand", f"{theirs}/{names.mlp}/Dense_0"),
        **dense("mlp.contract", f"{theirs}/{names.mlp}/Dense_1"),
    }


def head_parts(names: set[str], prefix: str = "") -> dict[str, Part]:
    """Of the head, with its tanh layer if there is one; nothing where a file ends before the head."""
    if not any(name.startswith(f"{prefix}head/") for name in names):
        return {}
    hidden = any(name.startswith(f"{prefix}pre_logits/") for name in names)
    return dense("linear", f"{prefix}head") | (dense("hidden", f"{prefix}pre_logits") if hidden else {})


def head_in(tensors: dict[str, Tensor], prefix: str = "") -> tuple[dict[str, Part], tuple[str, ...]]:
    """The parts of a file's head, and what is left aside: a tanh layer with no head behind it."""
    for name in (f"{prefix}head/kernel", f"{prefix}pre_logits/kernel"):
        if name in tensors and tensors[name].ndim != 2:
            raise ValueError(f"{name} {tuple(tensors[name].shape)} where (inputs, outputs) was expected")
    parts = head_parts(set(tensors), prefix)
    return parts, () if parts else tuple(n for n in sorted(tensors) if n.startswith(f"{prefix}pre_logits/"))


def dense(ours: str, theirs: str) -> dict[str, Part]:
    """flax's Dense, whose kernel is (inputs, outputs)."""
    kernel = Part(
        (f"{theirs}/kernel",),
        lambda piece: rearrange(piece, "inputs outputs -> outputs inputs"),
        lambda weight: (rearrange(weight, "outputs inputs -> inputs outputs"),),
    )
    return {f"{ours}.weight": kernel, f"{ours}.bias": same(f"{theirs}/bias")}


def projections(ours: str, theirs: str, which: tuple[str, ...], heads: int) -> dict[str, Part]:
    """flax's maps to queries, keys and values, kernels (d, heads, head size), as one linear map."""
    kernel = Part(
        tuple(f"{theirs}/{name}/kernel" for name in which),
        lambda *pieces: torch.cat([rearrange(p, "d heads e -> (heads e) d", heads=heads) for p in pieces]),
        lambda weight: [rearrange(w, "(heads e) d -> d heads e", heads=heads) for w in weight.chunk(len(which))],
    )
    bias = Part(
        tuple(f"{theirs}/{name}/bias" for name in which),
        lambda *pieces: torch.cat([rearrange(p, "heads e -> (heads e)", heads=heads) for p in pieces]),
        lambda bias: [rearrange(b, "(heads e) -> heads e", heads=heads) for b in bias.chunk(len(which))],
    )
    return {f"{ours}.weight": kernel, f"{ours}.bias": bias}


def projection_out(ours: str, theirs: str, heads: int) -> dict[str, Part]:
    """flax's map of all heads' outputs to tokens, kernel (heads, head size, d)."""
    kernel = Part(
        (f"{theirs}/out/kernel",),
        lambda piece: rearrange(piece, "heads e d -> d (heads e)", heads=heads),
        lambda weight: (rearrange(weight, "d (heads e) -> heads e d", heads=heads),),
    )
    return {f"{ours}.weight": kernel, f"{ours}.bias": same(f"{theirs}/out/bias")}


def norm(ours: str, theirs: str) -> dict[str, Part]:
    return {f"{ours}.weight": same(f"{theirs}/scale"), f"{ours}.bias": same(f"{theirs}/bias")}


def group_norm(ours: str, theirs: str) -> dict[str, Part]:
    """Read as (1, 1, 1, c) or (c,); written as (c,), which flax wants today (checkpoint.py, `_fix_groupnorm`)."""

    def squeezed(name: str) -> Part:
        return Part((name,), lambda piece: piece.squeeze(), lambda weight: (weight,))

    return {f"{ours}.weight": squeezed(f"{theirs}/scale"), f"{ours}.bias": squeezed(f"{theirs}/bias")}


def convolution(theirs: str) -> Part:
    """flax's kernel, (h, w, inputs, outputs)."""
    return Part(
        (f"{theirs}/kernel",),
        lambda piece: rearrange(piece, "h w inputs outputs -> outputs inputs h w"),
        lambda weight: (rearrange(weight, "outputs inputs h w -> h w inputs outputs"),),
    )


def patches(theirs: str, patch: int) -> Part:
    """The kernel of a convolution over patches, (p, p, c, d), as a linear map of a patch's pixels."""
    return Part(
        (f"{theirs}/kernel",),
        lambda piece: rearrange(piece, "p q c d -> d (p q c)"),
        lambda weight: (rearrange(weight, "d (p q c) -> p q c d", p=patch, q=patch),),
    )
