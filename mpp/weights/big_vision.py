"""big_vision's .npz of ViTs, and of the image towers of LiT and SigLIP (big_vision/models/vit.py). Read only."""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mpp.models.vit_config import ViTConfig
from mpp.weights.files import Source
from mpp.weights.flax import (
    Blocks,
    block_parts,
    dense,
    head_in,
    norm,
    patch_of,
    patches,
    projection_out,
    projections,
    published_settings,
)
from mpp.weights.format import Layout, Part, image_of, row, same

NAME = "big_vision"
TOWER = "img/"  # what the image's tensors are called in a file of two towers (models/proj/image_text/two_towers.py)
# Where positions are: today, before 2022, and in the ViT paper's code, from which LiT's image towers come.
TABLES = ("pos_embedding", "Transformer/pos_embedding", "Transformer/posembed_input/pos_embedding")
MAP = "MAPHead_0"


def recognises(source: Source) -> bool:
    """Names of flax's blocks; `google` comes before and takes its own."""
    return any(name.removeprefix(TOWER).startswith("Transformer/encoderblock") for name in source.tensors)


def layout(source: Source, facts: dict[str, Any]) -> Layout:
    """What a file holds. A file without a table of positions is of a model with fixed ones, computed for any grid.

    Of two towers the image's is read; its head is the linear map to the space it shares with the text's.
    """
    prefix = TOWER if any(name.startswith(TOWER) for name in source.tensors) else ""
    tensors = {name.removeprefix(prefix): t for name, t in source.tensors.items() if name.startswith(prefix)}
    blocks = Blocks.of(tensors, facts)
    patch, channels = patch_of(tensors["embedding/kernel"])
    table = next((name for name in TABLES if name in tensors), None)
    token = "cls" in tensors
    pooled = any(name.startswith(f"{MAP}/") for name in tensors)
    image = facts.get("image", (224, 224) if 224 % patch == 0 else (16 * patch, 16 * patch))
    combined = table is not None and has_token_row(tensors[table], patch, facts)
    if table is not None:
        image = image_of(tensors[table].shape[1] - combined, patch, facts)
    config = ViTConfig(
        **published_settings(),
        image=image,
        channels=channels,
        patch=patch,
        width=blocks.width,
        depth=blocks.depth,
        heads=blocks.heads,
        mlp=blocks.hidden,
        positions="sincos2d" if table is None else "learned",
        pool="map" if pooled else "cls" if token else "avg",
        class_token=token or None,
    )
    found = parts(config, blocks)
    if table is not None:
        found["positions.table"] = table_part(table, token, combined)
    head, aside = head_in(source.tensors, prefix)
    aside += tuple(name for name in sorted(source.tensors) if not name.startswith(prefix))
    prefixed = {name: with_prefix(part, prefix) for name, part in found.items()}
    return Layout(config, prefixed, head, aside=aside, guessed=("image",) * (table is None))


def parts(config: ViTConfig, blocks: Blocks) -> dict[str, Part]:
    """Where each tensor of an encoder is kept, but its positions."""
    found = {"stem.project.weight": patches("embedding", config.patch), "stem.project.bias": same("embedding/bias")}
    found |= norm("norm", "Transformer/encoder_norm")
    if config.has_class_token:
        found["class_token"] = row("cls")
    for block in range(config.depth):
        theirs = block_parts(
            "Transformer/encoderblock" + ("" if blocks.scanned else f"_{block}"), blocks.names, config.heads
        )
        for name, part in theirs.items():
            found[f"blocks.{block}.{name}"] = layer(part, block, config.depth) if blocks.scanned else part
    if config.pool == "map":
        attention = f"{MAP}/MultiHeadDotProductAttention_0"
        found |= {
            "pooling.probe": row(f"{MAP}/probe"),
            **projections("pooling.query", attention, ("query",), config.heads),
            **projections("pooling.kv", attention, ("key", "value"), config.heads),
            **projection_out("pooling.project", attention, config.heads),
            **norm("pooling.norm", f"{MAP}/LayerNorm_0"),
            **dense("pooling.mlp.expand", f"{MAP}/MlpBlock_0/Dense_0"),
            **dense("pooling.mlp.contract", f"{MAP}/MlpBlock_0/Dense_1"),
        }
    return found


def has_token_row(table: Tensor, patch: int, facts: dict[str, Any]) -> bool:
    """Whether a table (1, rows, d) begins with a row for the class token, as until 2022 (`fix_old_checkpoints`)."""
    if table.ndim != 3:
        raise ValueError(f"positions of shape {tuple(table.shape)} where (1, patches, width) was expected")
    rows = table.shape[1]
    if "image" in facts:
        height, width = facts["image"]
        return rows == 1 + (height // patch) * (width // patch)
    return rows > 1 and math.isqrt(rows) ** 2 != rows and math.isqrt(rows - 1) ** 2 == rows - 1


def table_part(name: str, token: bool, combined: bool) -> Part:
    """Positions (1, patches, d); ours have a row for the class token, of which big_vision's has no position."""

    def read(piece: Tensor) -> Tensor:
        rows = rearrange(piece, "1 n d -> n d")
        if combined:
            return rows if token else rows[1:]
        return torch.cat([torch.zeros_like(rows[:1]), rows]) if token else rows

    return Part((name,), read, lambda ours: (ours[int(token and not combined) :].unsqueeze(0),))


def layer(part: Part, index: int, depth: int) -> Part:
    """One block's of tensors that hold all blocks along their first axis."""

    def read(*pieces: Tensor) -> Tensor:
        if any(piece.shape[:1] != (depth,) for piece in pieces):
            raise ValueError(f"{part.names}: not of {depth} blocks")
        return part.read(*(piece[index] for piece in pieces))

    return Part(part.names, read, part.write)


def with_prefix(part: Part, prefix: str) -> Part:
    return Part(tuple(f"{prefix}{name}" for name in part.names), part.read, part.write)
