"""DINO's and DINOv2's weights (facebookresearch/dino and dinov2; arXiv 2104.14294, 2304.07193; registers 2309.16588).

A published backbone of DINOv2 is known by its mask token, registers, SwiGLU or blocks in chunks; a checkpoint by what
it holds beside the backbone (heads, loss). A published backbone of DINO, the first, is a state dict of timm's
to the last tensor: timm's reader takes it, and gives what DINO's code does with `resize="bicubic_offset",
mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)`.
"""

import re
from typing import Any

from mpp.models.vit_config import ViTConfig
from mpp.weights import timm
from mpp.weights.files import Source
from mpp.weights.format import Layout, Part, same, shape_of, sizes_of

NAME = "dino"
BLOCK = re.compile(r"(blocks\.(?:\d+\.)?(\d{1,9}))\.[a-z]")  # in a chunk, blocks.CHUNK.BLOCK, each keeps its own number
# Parts of a checkpoint beside the backbone. Others have students and teachers too: they tell nothing.
BESIDE = {"dino_loss", "dino_head", "ibot_head", "ibot_patch_loss"}
HEADS = "dino_head.", "ibot_head."
LINEAR = "linear_head"  # of dinov2_vits14_lc and its like: on class token and average of the last block


def recognises(source: Source) -> bool:
    blocks, names = _blocks(source), source.tensors.keys()
    return bool(blocks) and (
        ("mask_token" in names and source.tensors["mask_token"].ndim == 2)
        or "register_tokens" in names
        or f"{LINEAR}.weight" in names
        or any(".mlp.w12." in name for name in names)
        or any(place.count(".") == 2 for place in blocks.values())
        or not BESIDE.isdisjoint(source.aside)
        or "momentum_teacher" in source.args
    )


def layout(source: Source, facts: dict[str, Any]) -> Layout:
    names, blocks = source.tensors.keys(), _blocks(source)
    depth = 1 + max(blocks)
    swiglu = any(".mlp.w12." in name for name in names)
    first = blocks.get(0, "blocks.0")
    hidden = shape_of(source, f"{first}.mlp.{'w12' if swiglu else 'fc1'}.weight", 2)[0]
    registers = shape_of(source, "register_tokens", 3)[1] if "register_tokens" in names else 0
    given: dict[str, Any] = {
        **sizes_of(source, depth, facts),
        "mlp": hidden // 2 if swiglu else hidden,
        # The published models with registers resize with antialias and without the offset (DINOv2's hub/backbones.py).
        "resize": "bicubic_antialias" if registers else "bicubic_offset",
        "registers": registers,
        "swiglu": swiglu,
        "layer_scale": 1.0 if any(name.endswith(".ls1.gamma") for name in names) else None,
    }
    head: dict[str, Part] = {}
    if f"{LINEAR}.weight" in names:
        inputs, width = shape_of(source, f"{LINEAR}.weight", 2)[1], given["width"]
        if inputs == 2 * width and facts.get("pool", "cls_avg") == "cls_avg":
            given["pool"] = "cls_avg"
            head = {f"linear.{name}": same(f"{LINEAR}.{name}") for name in ("weight", "bias")}
    config = ViTConfig(**given | facts)
    other = HEADS if head else (*HEADS, f"{LINEAR}.")  # with four blocks' class tokens it is no head of one vector
    aside = [name for name in names if name == "mask_token" or name.startswith(other)]
    return Layout(config, parts(config, blocks), head, aside=tuple(aside), guessed=("heads",))


def parts(config: ViTConfig, blocks: dict[int, str]) -> dict[str, Part]:
    """timm's table under DINOv2's names, which differ in registers, SwiGLU and chunks of blocks."""
    return {
        ours: Part(tuple(_name(name, config.swiglu, blocks) for name in part.names), part.read, part.write)
        for ours, part in timm.parts(config).items()
    }


def _name(timms: str, swiglu: bool, blocks: dict[int, str]) -> str:
    """DINOv2's name of a tensor that timm has."""
    if timms == "reg_token":
        return "register_tokens"
    if not (found := BLOCK.match(timms)):
        return timms
    rest = timms.removeprefix(found[1])
    if swiglu:
        rest = rest.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
    return blocks.get(int(found[2]), found[1]) + rest


def _blocks(source: Source) -> dict[int, str]:
    """What the names of each block's tensors begin with."""
    return {int(found[2]): found[1] for name in source.tensors if (found := BLOCK.match(name))}
