"""CAPI's weights (facebookresearch/capi, model.py; arXiv 2502.08769): the encoder of its encoder and decoder.

CAPI takes as an image's vector the mean of its decoder's output, which has no place here: `pool` is the average of the
normalised patches. Pictures of another size need nothing, for its positions are rotary.
"""

import re
from typing import Any

import torch

from mpp.models.position_tables import rope_capi
from mpp.models.vit_config import ViTConfig
from mpp.weights.files import Source
from mpp.weights.format import IMAGENET_MEAN, IMAGENET_STD, Layout, Part, patch_convolution, same, shape_of, stacked

NAME = "capi"
SIDE = 224  # pixels that it was trained with (default_pretrain_config.yaml)
NORM_EPS = 1e-5  # model.py, `norm_layer_kwargs`
BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.residual1\.")
CLOSE = 1e-5  # relative, of the frequencies that it computed in float32


def recognises(source: Source) -> bool:
    return any(BLOCK.match(name) for name in source.tensors)


def layout(source: Source, facts: dict[str, Any]) -> Layout:
    width, channels, patch, _ = shape_of(source, "patch_embed.weight", 4)
    depth = 1 + max(int(found[1]) for name in source.tensors if (found := BLOCK.match(name)))
    head = shape_of(source, _frequencies(0), 2)[1]
    if patch < 1 or head < 1 or width % head:
        raise ValueError(f"patches of {patch} pixels, and heads of {head} channels that are to make {width}")
    given: dict[str, Any] = {
        "image": (SIDE // patch * patch, SIDE // patch * patch),
        "channels": channels,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "patch": patch,
        "width": width,
        "depth": depth,
        "heads": width // head,
        "mlp": shape_of(source, "encoder.blocks.0.residual2.fn.fc1.weight", 2)[0],
        "positions": "rope_capi",
        "pool": "avg",
        "registers": shape_of(source, "registers", 3)[1],
        "norm": "rms",
        "norm_eps": NORM_EPS,
        "qkv_bias": False,
        "bias": False,
    }
    config = ViTConfig(**given | facts)
    # They lie in the file once a block, though they are never trained ("rope_lr_mult: 0.0").
    frequencies = [_frequencies(block) for block in range(depth)]
    for name in frequencies:
        _check_frequencies(source, name, config.head)
    other = ("decoder.", "dec_norm.")
    aside = [name for name in source.tensors if name.startswith(other) or name in ("mask_token", *frequencies)]
    table = parts(config)
    if "enc_norm.weight" in source.tensors:  # only of models with another `final_norm_kwargs` than the published
        table["norm.weight"] = same("enc_norm.weight")
    return Layout(config, table, aside=tuple(aside), guessed=("image",))


def parts(config: ViTConfig) -> dict[str, Part]:
    """Where a file keeps each tensor. Its final norm has no weight, which is the same as one of ones."""
    table = {
        "stem.project.weight": patch_convolution("patch_embed.weight", config.patch),
        "stem.project.bias": same("patch_embed.bias"),
        "registers": Part(("registers",), lambda piece: piece.squeeze(0), lambda ours: (ours.unsqueeze(0),)),
        "norm.weight": Part((), lambda: torch.ones(config.width), lambda ours: ()),
    }
    for block in range(config.depth):
        ours, first, second = f"blocks.{block}", *(f"encoder.blocks.{block}.residual{branch}" for branch in (1, 2))
        table |= {
            f"{ours}.norm1.weight": same(f"{first}.norm.weight"),
            f"{ours}.mixer.qkv.weight": stacked(*(f"{first}.fn.{name}_proj.weight" for name in "qkv")),
            f"{ours}.mixer.project.weight": same(f"{first}.fn.proj.weight"),
            f"{ours}.norm2.weight": same(f"{second}.norm.weight"),
            f"{ours}.mlp.expand.weight": same(f"{second}.fn.fc1.weight"),
            f"{ours}.mlp.contract.weight": same(f"{second}.fn.fc2.weight"),
        }
    return table


def _frequencies(block: int) -> str:
    return f"encoder.blocks.{block}.residual1.fn.rope.freqs"


def _check_frequencies(source: Source, name: str, head: int) -> None:
    """Raises ValueError unless a block turns its queries and keys by the angles that our encoder computes itself."""
    if (shape := shape_of(source, name, 2)) != (2, head):
        raise ValueError(f"{name} {shape} where {(2, head)} was expected")
    expected = rope_capi((2, 2), head, 0, 0)[[2, 1]].float()  # at the patches (1, 0) and (0, 1): a whole side away
    if not torch.allclose(source.tensors[name], expected, rtol=CLOSE, atol=0):
        raise ValueError(f"{name} are other frequencies than the published 7 to 7e-4 turns from edge to edge")
