"""Google's published .npz: ViT, AugReg and the hybrids, as google-research/vision_transformer (vit_jax) has them."""

import io
import re
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mpp.models.classifier import Head
from mpp.models.vit import ViT
from mpp.models.vit_config import ViTConfig, resnet_stride
from mpp.weights.files import Source
from mpp.weights.flax import (
    PUBLISHED,
    BlockNames,
    Blocks,
    block_parts,
    convolution,
    group_norm,
    head_in,
    head_parts,
    norm,
    patch_of,
    patches,
    published_settings,
)
from mpp.weights.format import Layout, Part, image_of, row, same

NAME = "google"
TABLE = "Transformer/posembed_input/pos_embedding"


def recognises(source: Source) -> bool:
    """Positions inside the Transformer are Google's alone.

    A file without them, but with blocks of the published names and a class token, is one that lacks its positions.
    """
    names = source.tensors
    published = any(name.startswith("Transformer/") and f"/{PUBLISHED.attention}/" in name for name in names)
    elsewhere = any(name in names for name in ("pos_embedding", "Transformer/pos_embedding", "MAPHead_0/probe"))
    blocks = any(name.startswith("Transformer/encoderblock") for name in names)
    return blocks and (TABLE in names or (published and "cls" in names and not elsewhere))


def layout(source: Source, facts: dict[str, Any]) -> Layout:
    """What a file holds; its shapes tell all but a non-square image. `positions="none"` reads one without positions."""
    tensors = source.tensors
    blocks = Blocks.of(tensors, facts)
    side, channels = patch_of(tensors["embedding/kernel"])
    stem: dict[str, Any] = {"stem": "linear", "patch": side, "channels": channels}
    if any(name.startswith(("conv_root/", "gn_root/", "block1/")) for name in tensors):
        stages, channels, stem_width = resnet_of(tensors)
        stem = {"stem": "hybrid", "patch": side * resnet_stride(stages), "channels": channels, "stages": stages}
        stem["stem_width"] = stem_width
    patch, without = stem["patch"], facts.get("positions") == "none"
    config = ViTConfig(
        **published_settings(),
        **stem,
        image=facts.get("image", (16 * patch, 16 * patch)) if without else image_in(tensors, patch, facts),
        width=blocks.width,
        depth=blocks.depth,
        heads=blocks.heads,
        mlp=blocks.hidden,
        positions="none" if without else "learned",
        pool="cls" if "cls" in tensors else "avg",
        class_token="cls" in tensors or None,
    )
    head, aside = head_in(tensors)
    return Layout(config, parts(config, blocks.names), head, aside=aside, guessed=("image",) * without)


def image_in(tensors: dict[str, Tensor], patch: int, facts: dict[str, Any]) -> tuple[int, int]:
    """The image that the positions are for."""
    if TABLE not in tensors:
        raise ValueError(f"{TABLE} missing")
    if tensors[TABLE].ndim != 3:
        raise ValueError(f"{TABLE} {tuple(tensors[TABLE].shape)} where (1, tokens, width) was expected")
    return image_of(tensors[TABLE].shape[1] - ("cls" in tensors), patch, facts)


def resnet_of(tensors: dict[str, Tensor]) -> tuple[tuple[int, ...], int, int]:
    """Units of each stage of a hybrid's ResNet, the channels of its images, and those of its first convolution."""
    if "conv_root/kernel" not in tensors or tensors["conv_root/kernel"].ndim != 4:
        raise ValueError("conv_root/kernel missing, or not of shape (7, 7, channels, width)")
    units = {tuple(map(int, m.groups())) for n in tensors if (m := re.match(r"block(\d{1,2})/unit(\d{1,3})/", n))}
    last = max((stage for stage, _ in units), default=0)
    stages = tuple(max((unit for at, unit in units if at == stage), default=1) for stage in range(1, last + 1))
    return stages, *tensors["conv_root/kernel"].shape[2:]


# The tables of parts, for both directions


def parts(config: ViTConfig, names: BlockNames = PUBLISHED) -> dict[str, Part]:
    """Where each tensor of an encoder is kept."""
    found = stem_parts(config)
    if config.has_class_token:
        found["class_token"] = row("cls")
    if config.positions != "none":
        found["positions.table"] = Part(
            (TABLE,), lambda piece: rearrange(piece, "1 n d -> n d"), lambda ours: (ours.unsqueeze(0),)
        )
    for block in range(config.depth):
        theirs = block_parts(f"Transformer/encoderblock_{block}", names, config.heads)
        found |= {f"blocks.{block}.{name}": part for name, part in theirs.items()}
    return found | norm("norm", "Transformer/encoder_norm")


def stem_parts(config: ViTConfig) -> dict[str, Part]:
    """Of a linear stem, or of the hybrid (vit_jax/models_resnet.py)."""
    if config.stem != "hybrid":
        weight = patches("embedding", config.patch)
        return {"stem.project.weight": weight, "stem.project.bias": same("embedding/bias")}
    found = {"stem.project.weight": convolution("embedding"), "stem.project.bias": same("embedding/bias")}
    found |= {"stem.root.conv.weight": convolution("conv_root")} | group_norm("stem.root.norm", "gn_root")
    for stage, units in enumerate(config.stages):
        for unit in range(units):
            ours, theirs = f"stem.stages.{stage}.{unit}", f"block{stage + 1}/unit{unit + 1}"
            pairs = {f"conv{n}": (f"conv{n}", f"norm{n}", f"gn{n}") for n in (1, 2, 3)}
            if unit == 0:  # the only one whose output has more channels than its input, or fewer pixels
                pairs["conv_proj"] = ("shortcut_conv", "shortcut_norm", "gn_proj")
            for kernel, (conv, normed, gn) in pairs.items():
                found[f"{ours}.{conv}.weight"] = convolution(f"{theirs}/{kernel}")
                found |= group_norm(f"{ours}.{normed}", f"{theirs}/{gn}")
    return found


# Writing


def write(encoder: ViT, head: Head | None, classes: tuple[str, ...]) -> dict[str, bytes]:
    """The file as Google published it; equal weights give equal bytes. Raises ValueError as `refuse` does.

    Positions that are added to the patches are written as a table, fixed ones too: the same numbers at the encoder's
    own image, and interpolated instead of computed at another. The format has no names of classes, no shape of the
    image (tell mpp image= where it is not square) and no way of interpolation (vit_jax's is bilinear).
    """
    config = encoder.config
    refuse(config)
    tensors = {name: value.detach() for name, value in encoder.state_dict().items()}
    table = parts(config)
    if config.positions != "none":
        with torch.no_grad():
            first = [encoder.positions.class_token().unsqueeze(0)] if config.has_class_token else []
            tensors["positions.table"] = torch.cat([*first, encoder.positions.patches(config.grid)])
    if head is not None:
        tensors |= {name: value.detach() for name, value in head.state_dict().items()}
        table |= head_parts({"head/kernel"} if head.hidden is None else {"head/kernel", "pre_logits/kernel"})
    arrays: dict[str, Any] = {}  # typed loosely: savez has a keyword of another type
    for name, part in table.items():
        for theirs, piece in zip(part.names, part.write(tensors[name]), strict=True):
            arrays[theirs] = piece.cpu().float().contiguous().numpy()
    file = io.BytesIO()
    np.savez(file, **arrays)
    return {"model.npz": file.getvalue()}


def refuse(config: ViTConfig) -> None:
    """Raises ValueError for the first setting with which Google's models would give other numbers, or none."""
    theirs = {
        "norm": "layer",
        "gelu": "tanh",  # nothing in the file would say erf, and the numbers there would be others
        "norm_eps": 1e-6,
        "swiglu": False,
        "qkv_bias": True,
        "bias": True,
        "qk_norm": False,
        "layer_scale": None,
        "registers": 0,
        "stem_bias": True,
        "pre_norm": False,
    }
    for name, value in theirs.items():
        if (ours := getattr(config, name)) != value:
            raise ValueError(f"model.{name} {ours} has no place in Google's format: its models have {value}")
    allowed = {
        "mixer": ("attention",),
        "stem": ("linear", "hybrid"),
        "positions": ("learned", "learned2d", "sincos2d", "sincos2d_mae", "sincos2d_timm", "none"),
        "pool": ("cls", "avg"),
        "mean": (0.5,),
        "std": (0.5,),
    }
    for name, values in allowed.items():
        ours = getattr(config, name)
        if wrong := [one for one in (ours if isinstance(ours, tuple) else (ours,)) if one not in values]:
            has = ", ".join(map(str, values))
            raise ValueError(f"model.{name} {wrong[0]} has no place in Google's format: its models have {has}")
    if config.pool == "avg" and config.has_class_token:
        raise ValueError(
            "model.class_token with model.pool avg has no place in Google's format: it has one or the other"
        )


def usage(encoder: ViT, head: Head | None) -> str:
    """How vit_jax loads the file."""
    config = encoder.config
    hybrid = config.stem == "hybrid"
    side = config.patch // (config.resnet_stride if hybrid else 1)
    hidden = None if head is None or head.hidden is None else head.hidden.out_features
    resnet = (
        f'ConfigDict({{"num_layers": {config.stages}, "width_factor": {config.stem_width / 64:g}}})'
        if hybrid
        else "None"
    )
    height, width = config.image
    return f"""\
from ml_collections import ConfigDict
from vit_jax import checkpoint, models_vit

model = models_vit.VisionTransformer(
    num_classes={0 if head is None else head.linear.out_features},
    patches=ConfigDict({{"size": ({side}, {side})}}),
    resnet={resnet},
    hidden_size={config.width},
    transformer={{
        "num_layers": {config.depth},
        "num_heads": {config.heads},
        "mlp_dim": {config.hidden},
        "dropout_rate": 0.0,
        "attention_dropout_rate": 0.0,
        "add_position_embedding": {config.positions != "none"},
    }},
    classifier="{"token" if config.pool == "cls" else "gap"}",
    representation_size={hidden},
)
params = checkpoint.load("model.npz")
# images: float32 (b, {height}, {width}, {config.channels}), pixels in [-1, 1]
{"vectors" if head is None else "logits"} = model.apply({{"params": params}}, images, train=False)
"""
