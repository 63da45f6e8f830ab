"""CLIP's image towers under OpenAI's own names, which open_clip took over (arXiv 2103.00020; openai/CLIP, model.py).

A whole model has its tower under `visual.`; the text tower and the scale of the logits are left aside. OpenAI's `.pt`
are TorchScript, which is code and not read. What a bare file does not tell is OpenAI's: QuickGELU, heads of 64
channels where the size is none of the published ones.
"""

import re
from typing import Any

import torch

from mpp.augment.input import Input
from mpp.models.trunk_config import Grid
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
    same,
    shape_of,
)

NAME = "clip"
HEAD = 64  # channels of a head of attention, where the size is none of the published ones
POOLS = {("tok", False): "cls", ("tok", True): "cls", ("avg", False): "avg", ("avg", True): "avg_norm"}
BOTH = ("weight", "bias")
BLOCK = {
    "norm1": "ln_1",
    "mixer.project": "attn.out_proj",
    "norm2": "ln_2",
    "mlp.expand": "mlp.c_fc",
    "mlp.contract": "mlp.c_proj",
}


def _prefix(source: Source) -> str | None:
    """What the names of the image tower begin with; None where there is none."""
    found = (name.removesuffix("class_embedding") for name in source.tensors if name.endswith("class_embedding"))
    marks = ("conv1.weight", "transformer.resblocks.0.attn.in_proj_weight")
    return next((prefix for prefix in found if all(prefix + mark in source.tensors for mark in marks)), None)


def recognises(source: Source) -> bool:
    return _prefix(source) is not None


def layout(source: Source, facts: dict[str, Any]) -> Layout:
    """The tower, with its projection as a head; open_clip's `open_clip_config.json` counts where it lies beside."""
    prefix = _prefix(source) or ""
    names = [name for name in source.tensors if name.startswith(prefix)]
    width, channels, patch, across = shape_of(source, f"{prefix}conv1.weight", 4)
    if patch != across:
        raise ValueError(f"{prefix}conv1.weight: expected square patches, got {patch}x{across}")
    block = re.compile(re.escape(f"{prefix}transformer.resblocks.") + r"(\d{1,9})\.")
    depth = 1 + max(int(found[1]) for name in names if (found := block.match(name)))
    told, pre_norm = _told(source.config), f"{prefix}ln_pre.weight" in source.tensors
    if not pre_norm and "pool" not in told | facts:  # CLIPA's, of which some average
        raise ValueError(f'{prefix}ln_pre.weight missing; of a tower without it say pool="cls", "avg" or "avg_norm"')
    given: dict[str, Any] = {
        "image": image_of(shape_of(source, f"{prefix}positional_embedding", 2)[0] - 1, patch, facts | told),
        "channels": channels,
        "mean": CLIP_MEAN if channels == 3 else (0.5,),
        "std": CLIP_STD if channels == 3 else (0.5,),
        "patch": patch,
        "width": width,
        "depth": depth,
        "heads": _heads(width, depth, facts | told),
        "mlp": shape_of(source, f"{prefix}transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "stem_bias": False,
        "pre_norm": pre_norm,
        "class_token": True,
        "norm_eps": CLIP_EPS,
        "gelu": "quick",
        "resize": "bicubic_antialias",  # open_clip's resize_pos_embed; OpenAI's code takes no other size
        "layer_scale": 1.0 if any(name.endswith(".ls_1.gamma") for name in names) else None,
    }
    config = ViTConfig(**given | told | facts)
    head: dict[str, Part] = {}
    classes: tuple[str, ...] = ()
    if f"{prefix}proj" in source.tensors:
        rows = shape_of(source, f"{prefix}proj", 2)[1]
        head, classes = projection(f"{prefix}proj", rows, transposed=True), joint(rows)
    aside = tuple(name for name in source.tensors if not name.startswith(prefix))
    guessed = tuple(name for name in ("heads", "gelu", "mean", "std") if name not in told)
    fed, notes = _fed(source.config, config.image)
    return Layout(config, parts(config, prefix), head, classes, aside, guessed, fed, notes)


def _fed(config: dict[str, Any], image: Grid) -> tuple[Input | None, tuple[str, ...]]:
    """What open_clip feeds the tower in evaluation (transform.py), and what of it is not done here."""
    if not isinstance(config.get("model_cfg"), dict):
        return None, ()
    pixels = config.get("preprocess_cfg") or {}
    mode, filter = pixels.get("resize_mode"), pixels.get("interpolation")
    notes = ("open_clip_config.json: resize_mode longest, a frame around the picture, is not done here; shortest is",)
    fed = Input(
        image, fit="squeeze" if mode == "squash" else "crop", filter="bilinear" if filter == "bilinear" else "bicubic"
    )
    return fed, notes if mode == "longest" else ()


def parts(config: ViTConfig, prefix: str) -> dict[str, Part]:
    """Where each tensor of the tower is."""
    found = {
        "class_token": same(f"{prefix}class_embedding"),
        "stem.project.weight": patch_convolution(f"{prefix}conv1.weight", config.patch),
        "positions.table": same(f"{prefix}positional_embedding"),
    }
    for kind in BOTH:
        found[f"norm.{kind}"] = same(f"{prefix}ln_post.{kind}")
        if config.pre_norm:
            found[f"norm_pre.{kind}"] = same(f"{prefix}ln_pre.{kind}")
    for number in range(config.depth):
        block, theirs = f"blocks.{number}", f"{prefix}transformer.resblocks.{number}"
        for kind in BOTH:
            found[f"{block}.mixer.qkv.{kind}"] = same(f"{theirs}.attn.in_proj_{kind}")
            found |= {f"{block}.{ours}.{kind}": same(f"{theirs}.{name}.{kind}") for ours, name in BLOCK.items()}
        if config.layer_scale is not None:
            found |= {f"{block}.scale{branch}": same(f"{theirs}.ls_{branch}.gamma") for branch in (1, 2)}
    return found


def projection(name: str, rows: int, transposed: bool = False) -> dict[str, Part]:
    """The projection to the space of images and texts as a head, which has a bias and gets one of zeros."""
    turned = Part((name,), lambda piece: piece.T.contiguous(), lambda ours: (ours.T.contiguous(),))
    zeros = Part((), lambda: torch.zeros(rows), lambda ours: ())
    return {"linear.weight": turned if transposed else same(name), "linear.bias": zeros}


def _heads(width: int, depth: int, facts: dict[str, Any]) -> int:
    try:
        return heads_of(width, depth, facts)
    except ValueError:
        if width % HEAD:
            raise
        return width // HEAD  # model.py, build_model


def _told(config: dict[str, Any]) -> dict[str, Any]:
    """What open_clip's config says beyond the tensors, as fields of ours; nothing where it is not there."""
    model, pixels = config.get("model_cfg"), config.get("preprocess_cfg")
    if not isinstance(model, dict):
        return {}
    vision = model.get("vision_cfg")
    if not isinstance(vision, dict) or not isinstance(pixels, dict | None):
        raise ValueError("open_clip_config.json: expected objects vision_cfg and preprocess_cfg")
    act, norm = (vision.get(name) or {} for name in ("act_kwargs", "norm_kwargs"))
    if not isinstance(act, dict) or not isinstance(norm, dict):
        raise ValueError("open_clip_config.json: expected objects act_kwargs and norm_kwargs")
    pool = vision.get("pool_type", "tok"), bool(vision.get("final_ln_after_pool", False))
    if pool not in POOLS:
        raise ValueError(f"open_clip_config.json: pool_type must be tok or avg, found {pool[0]!r}")
    image, width = vision.get("image_size", 224), vision.get("width", 768)
    told: dict[str, Any] = {
        "gelu": "quick" if model.get("quick_gelu") else "tanh" if act.get("approximate") == "tanh" else "erf",
        "norm_eps": norm.get("eps", CLIP_EPS),
        "pool": POOLS[pool],
        "heads": width // vision.get("head_width", HEAD),
        "image": (image, image) if isinstance(image, int) else tuple(image),
    }
    for name in ("mean", "std"):
        if (pixels or {}).get(name):
            told[name] = tuple(map(float, (pixels or {})[name]))
    return told
