"""Weights of timm's VisionTransformer, read and written: state dicts, and folders as timm.models.push_to_hf_hub leaves.

Names and numbers are those of timm 1.0.31, models/vision_transformer.py. timm itself is not needed.
"""

import math
import re
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from mpp.jsons import encoded
from mpp.models.classifier import Head
from mpp.models.trunk_config import Grid, TrunkConfig
from mpp.models.vit import ViT
from mpp.models.vit_config import ViTConfig
from mpp.weights.files import Source
from mpp.weights.format import (
    CLIP_EPS,
    CLIP_MEAN,
    CLIP_STD,
    Layout,
    Part,
    heads_of,
    image_of,
    joint,
    patch_convolution,
    row,
    same,
    shape_of,
    stacked,
)
from mpp.weights.timm_config import HALF, Told, about, of_clip

NAME = "timm"
EPS = 1e-6  # of timm's norms
LAYER_SCALE = 1e-5  # timm's usual first value, where a file does not tell


def recognises(source: Source) -> bool:
    """Whether tensors have the names that timm gives them. Others took these names over: they are asked first."""
    return {"patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.0.attn.proj.weight"} <= source.tensors.keys()


def parts(config: ViTConfig, placed: int | None = None, split: bool = False) -> dict[str, Part]:
    """Where timm keeps each of our tensors; of positions only learned ones have any.

    placed: tokens in front of the patches that have a row in `pos_embed`: 0, 1 (the class token) or all, which adds the
        positions of the registers to them; where not given, the class token if there is one.
    split: whether gate and value of swiglu are maps of their own (timm's SwiGLU) or one (SwiGLUPacked).
    """
    placed = int(config.has_class_token) if placed is None else placed
    norm = ("weight",) if config.norm == "rms" else ("weight", "bias")
    found = {
        "stem.project.weight": patch_convolution("patch_embed.proj.weight", config.patch),
        **_pairs("norm", "fc_norm" if config.pool == "avg_norm" else "norm", norm),
    }
    if config.stem_bias:
        found["stem.project.bias"] = same("patch_embed.proj.bias")
    if config.pre_norm:
        found |= _pairs("norm_pre", "norm_pre", norm)
    if config.has_class_token:
        found["class_token"] = row("cls_token")
    if config.registers:
        found["registers"] = _registers(int(config.has_class_token), placed)
    if config.positions == "learned":
        found["positions.table"] = _table(int(config.has_class_token), placed)
    for block in range(config.depth):
        found |= of_block(config, f"blocks.{block}.", f"blocks.{block}.", norm, split)
    if config.pool == "map":
        found["pooling.probe"] = row("attn_pool.latent")
        names = {"query": "q", "kv": "kv", "project": "proj", "norm": "norm"}
        for ours, theirs in (names | {"mlp.expand": "mlp.fc1", "mlp.contract": "mlp.fc2"}).items():
            found |= _pairs(f"pooling.{ours}", f"attn_pool.{theirs}")
    return found


def of_block(
    config: TrunkConfig, ours: str, theirs: str, norm: tuple[str, ...] = ("weight", "bias"), split: bool = False
) -> dict[str, Part]:
    """Where timm keeps each tensor of a block, by what our names and its own begin with."""
    bias = ("weight", "bias") if config.bias else ("weight",)
    qkv = ("weight", "bias") if config.qkv_bias else ("weight",)
    kinds = {
        "norm1": ("norm1", norm),
        "mixer.qkv": ("attn.qkv", qkv),
        "mixer.project": ("attn.proj", bias),
        "norm2": ("norm2", norm),
        "mlp.expand": ("mlp.fc1", bias),
        "mlp.contract": ("mlp.fc2", bias),
    }
    if config.qk_norm:
        kinds |= {"mixer.norm_q": ("attn.q_norm", norm), "mixer.norm_k": ("attn.k_norm", norm)}
    found: dict[str, Part] = {}
    for part, (name, of) in kinds.items():
        found |= _pairs(ours + part, theirs + name, of)
    if config.swiglu and split:
        for kind in bias:
            found[f"{ours}mlp.expand.{kind}"] = stacked(f"{theirs}mlp.fc1_g.{kind}", f"{theirs}mlp.fc1_x.{kind}")
    if config.layer_scale is not None:
        found |= {f"{ours}scale{branch}": same(f"{theirs}ls{branch}.gamma") for branch in (1, 2)}
    return found


def _pairs(ours: str, theirs: str, kinds: tuple[str, ...] = ("weight", "bias")) -> dict[str, Part]:
    return {f"{ours}.{kind}": same(f"{theirs}.{kind}") for kind in kinds}


def _registers(first: int, placed: int) -> Part:
    """Registers (r, d) as (1, r, d). Rows that they have in `pos_embed` are added; they are written without."""
    if placed <= first:
        return Part(("reg_token",), lambda piece: piece[0], lambda ours: (ours.unsqueeze(0),))
    return Part(
        ("reg_token", "pos_embed"),
        lambda piece, places: piece[0] + places[0, first:placed],
        lambda ours: (ours.unsqueeze(0),),  # the table's part writes the zeros that stand there then
    )


def _table(first: int, placed: int) -> Part:
    """Positions (first + n, d) as (1, placed + n, d)."""

    def fronted(rows: Tensor, have: int, want: int) -> Tensor:
        kept = rows[: min(have, want)]
        return torch.cat([kept, rows.new_zeros(want - len(kept), rows.shape[1]), rows[have:]])

    return Part(
        ("pos_embed",),
        lambda piece: fronted(piece[0], placed, first),
        lambda ours: (fronted(ours, first, placed).unsqueeze(0),),
    )


def layout(source: Source, facts: dict[str, Any]) -> Layout:
    """The encoder, and the head if there is one, of a state dict; `config.json` counts where timm wrote it.

    A bare file cannot tell the heads of sizes that nobody published, a grid that is not square, GELU by tanh, and that
    the normed patches of a model with a class token are averaged: `facts` do (heads=, image=, gelu="tanh", pool="avg").
    One with a norm before the blocks and no bias in its stem is taken for CLIP's, of timm's models without QuickGELU.
    Nor can it tell timm's two models with "rpn" in their names, whose norms stand elsewhere, from others. ValueError
    says what is missing or cannot be had.
    """
    tensors = source.tensors
    told = Told(source.config)
    width, channels, patch, across = shape_of(source, "patch_embed.proj.weight", 4)
    if patch != across:
        raise ValueError(f"patch_embed.proj.weight: expected square patches, got {patch}x{across}")
    hidden = shape_of(source, "blocks.0.mlp.fc2.weight", 2)[1]
    split = "blocks.0.mlp.fc1_g.weight" in tensors
    swiglu = split or shape_of(source, "blocks.0.mlp.fc1.weight", 2)[0] == 2 * hidden
    depth = 1 + max(int(block[1]) for name in tensors if (block := re.match(r"blocks\.(\d+)\.", name)))
    class_token = "cls_token" in tensors
    registers = shape_of(source, "reg_token", 3)[1] if "reg_token" in tensors else 0
    pool = _pool(tensors, told, facts, class_token + registers)
    image, placed = _places(source, told, facts, patch, class_token + registers)
    stem_bias, pre_norm = "patch_embed.proj.bias" in tensors, "norm_pre.weight" in tensors
    clip = pre_norm and not stem_bias and channels == 3
    config = ViTConfig(
        image=image,
        channels=channels,
        mean=told.numbers("mean", CLIP_MEAN if clip else HALF),
        std=told.numbers("std", CLIP_STD if clip else HALF),
        patch=patch,
        width=width,
        depth=depth,
        heads=heads_of(width, depth, told.implied("heads", "num_heads") | facts),
        mlp=hidden,
        positions="learned" if "pos_embed" in tensors else "none",
        resize="bicubic_antialias",
        pool=pool,  # type: ignore[arg-type]  # or the user's
        class_token=class_token,
        registers=registers,
        stem_bias=stem_bias,
        pre_norm=pre_norm,
        norm=told.norm("layer" if "blocks.0.norm1.bias" in tensors else "rms"),
        norm_eps=told.norm_eps(EPS, CLIP_EPS, clip),
        gelu=told.gelu(swiglu),
        swiglu=swiglu,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        bias="blocks.0.mlp.fc2.bias" in tensors,
        qk_norm="blocks.0.attn.q_norm.weight" in tensors,
        layer_scale=told.args.get("init_values") or LAYER_SCALE if "blocks.0.ls1.gamma" in tensors else None,
    )
    head = _pairs("linear", "head") if tensors.keys() & {"head.weight", "head.bias"} else {}
    other = (() if pool == "map" else ("attn_pool.",)) + (() if head else ("head.",))  # as the MLP of MoCo v3 is a head
    aside = tuple(name for name in tensors if name.startswith(other))
    classes = told.classes(shape_of(source, "head.weight", 2)[0]) if "head.weight" in tensors else ()
    guessed = list(told.guessed(clip, swiglu))
    if not told.images():
        guessed.append("image")
    if not told.name and class_token and not tensors.keys() & {"fc_norm.weight", "attn_pool.latent"}:
        guessed.append("pool")
    if clip and not classes and _projects(tensors):
        classes = joint(len(tensors["head.weight"]))
    fed, notes = told.fed(image)
    return Layout(config, parts(config, placed, split), head, classes, aside, tuple(guessed), fed, notes)


def _projects(tensors: dict[str, Tensor]) -> bool:
    """Whether a CLIP's head is its projection, which has no bias and which timm gives one of zeros."""
    weight, bias = tensors.get("head.weight"), tensors.get("head.bias")
    return weight is not None and bias is not None and weight.ndim == 2 and bool(weight.any()) and not bias.any()


def _pool(tensors: dict[str, Tensor], told: Told, facts: dict[str, Any], prefix: int) -> str:
    given = told.pool()
    if "attn_pool.latent" in tensors:
        found = "map"
    elif "fc_norm.weight" in tensors and given != "cls":
        found = "avg_norm"
    else:
        found = given or ("cls" if "cls_token" in tensors else "avg")
    pool = facts.get("pool", found)
    if "fc_norm.weight" in tensors and pool != "avg_norm":
        raise ValueError(f'fc_norm is of the patches\' average: expected pool="avg_norm", got {pool!r}')
    if "norm.weight" in tensors and pool == "avg_norm":
        raise ValueError("norm is of each token: expected pool=\"avg\" or another, got 'avg_norm'")
    if prefix and told.args.get("pool_include_prefix", False) and pool != "cls":
        raise ValueError("pool_include_prefix: patches alone are pooled here")
    return pool


def _places(source: Source, told: Told, facts: dict[str, Any], patch: int, prefix: int) -> tuple[Grid, int]:
    """The image that positions are for, and how many of the tokens in front of the patches have one."""
    images: list[Grid] = [facts["image"]] if "image" in facts else told.images()
    grids = [(image[0] // patch, image[1] // patch) for image in images]  # timm leaves out pixels beyond the last patch
    if "pos_embed" not in source.tensors:
        # Rotary positions have no tensors either, and are not read.
        if (facts.get("positions") or told.args.get("pos_embed")) != "none":
            raise ValueError('no pos_embed; of a model with no positions at all, of any kind, say positions="none"')
        if not grids:
            raise ValueError("no pos_embed, so that nothing tells for which image it is: image=(h, w)")
        return (grids[0][0] * patch, grids[0][1] * patch), 0
    rows = shape_of(source, "pos_embed", 3)[1]
    apart = told.args.get("no_embed_class")
    choices = sorted({prefix, 0} if apart is None else {0 if apart else prefix}, reverse=True)
    for grid in grids:
        for placed in choices:
            if math.prod(grid) == rows - placed:
                return (grid[0] * patch, grid[1] * patch), placed
    if "image" in facts:
        n = math.prod(grids[0])
        expected = " or ".join(str(n + placed) for placed in choices)
        raise ValueError(f"pos_embed has {rows} rows, expected {expected} for image={facts['image']}")
    square = [placed for placed in choices if rows > placed and math.isqrt(rows - placed) ** 2 == rows - placed]
    if len(square) > 1:
        raise ValueError(f"{rows} rows of pos_embed fit two grids; say for which image: image=(h, w)")
    placed = square[0] if square else choices[0]
    return image_of(rows - placed, patch, {}), placed


def write(encoder: ViT, head: Head | None, classes: tuple[str, ...]) -> dict[str, bytes]:
    """The files of a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

    Positions that are computed are written as a table, which is exact for the encoder's own image; for others timm
    interpolates it, by its own method whatever `resize` says. Rates of dropout are left out. ValueError names what timm
    has no place for.
    """
    config = encoder.config
    _refuse(config, head)
    tensors = encoder.state_dict()
    table, placed = None, 0
    if config.positions != "none":
        patches = encoder.positions.patches(config.grid).detach()
        first = [encoder.positions.class_token().detach()[None]] if config.has_class_token else []
        table = torch.cat([*first, patches])
        placed = config.prefix if first and first[0].any() else 0  # without a position it is as in timm's newer models
    held = {name: value for name, value in tensors.items() if not name.startswith("positions.")}
    held |= {} if table is None else {"positions.table": table}
    places = parts(_with_table(config), placed)
    written = {}
    for name, value in held.items():
        for theirs, piece in zip(places[name].names, places[name].write(value), strict=False):
            written[theirs] = piece.detach().cpu().contiguous()
    if head is not None:
        written |= {f"head.{name}": value.detach().cpu() for name, value in head.linear.state_dict().items()}
    told = about(config, 0 if head is None else len(head.linear.weight), classes, placed, encoder.input)
    return {
        "config.json": encoded(told, indent=2),
        "model.safetensors": save(written, {"format": "pt"}),
    }


def _with_table(config: ViTConfig) -> ViTConfig:
    """The config with a table of positions, as any that are added to tokens are written."""
    return config if config.positions == "none" else replace(config, positions="learned")


def _refuse(config: ViTConfig, head: Head | None) -> None:
    """Raises ValueError with what timm's VisionTransformer cannot hold."""
    pooled = config.pool == "map"
    wrong = {
        f"stem {config.stem}": config.stem != "linear",
        f"mixer {'/'.join(config.mixer)}": set(config.mixer) != {"attention"},
        f"positions {config.positions}": config.positions in ("relative", "rope", "rope_capi"),
        f"norm_eps {config.norm_eps}": not (config.norm_eps == EPS or of_clip(config)),
        f"stem_bias {config.stem_bias} with pre_norm {config.pre_norm}": config.stem_bias == config.pre_norm,
        "pool cls_avg": config.pool == "cls_avg",
        "pool map with swiglu": pooled and config.swiglu,
        "pool map with norm rms": pooled and config.norm == "rms",
        "pool map without bias": pooled and not config.bias,
        "a hidden layer in the head": head is not None and head.hidden is not None,
    }
    if any(wrong.values()):
        raise ValueError(f"timm has no place for {', '.join(what for what, is_so in wrong.items() if is_so)}")


def usage(encoder: ViT, head: Head | None) -> str:
    """Python that loads the folder it runs in with timm."""
    config = encoder.config
    mode = "L" if config.channels == 1 else "RGB"
    result = f"(1, {config.width}), one vector an image" if head is None else f"(1, {len(head.linear.weight)}), logits"
    return f"""\
import timm
import torch

model = timm.create_model("local-dir:.", pretrained=True).eval()
told = timm.data.resolve_model_data_config(model)
mean, std = (torch.tensor(told[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
images = torch.rand(1, {config.channels}, {config.image[0]}, {config.image[1]})  # on [0, 1]
with torch.no_grad():
    outputs = model((images - mean) / std)  # {result}
# A picture of PIL's, {mode}, is resized, cropped and normalised by timm.data.create_transform(**told)(picture)
"""
