"""MAE's checkpoints (facebookresearch/mae; arXiv 2111.06377): pretrained with or without decoder, fine-tuned, probed.

The encoder has timm's names. What tells such a file from timm's: a decoder, a batch norm in front of the head, MAE's
settings beside the model, or a table of positions that is MAE's, or was before fine-tuning. Where none of these is
there, as of a model fine-tuned for larger pictures without its settings, timm's reader takes the file, and gives what
MAE's code does with `resize="bicubic", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)`.
"""

import math
import re
from typing import Any, NoReturn

import torch.nn.functional as F
from torch import Tensor

from mpp.models.position_tables import sincos2d_mae
from mpp.models.trunk_config import TrunkConfig
from mpp.models.vit_config import ViTConfig
from mpp.weights import timm
from mpp.weights.files import Source
from mpp.weights.format import DecoderNames, Layout, Part, same, shape_of, sizes_of

NAME = "mae"
BATCH_NORM_EPS = 1e-6  # in front of a linear probe (main_linprobe.py)
BLOCK = re.compile(r"blocks\.(\d+)\.")
# Cosine of the angle between a file's table of positions and MAE's. Its numbers, near 0.7, move little in fine-tuning;
# a table that was learned from scratch has nothing to do with them.
ALIKE = 0.9


def recognises(source: Source) -> bool:
    names = source.tensors.keys()
    if not any(map(BLOCK.match, names)):
        return False
    decoder = any(name.startswith(("decoder_embed.", "decoder_blocks.")) for name in names)
    settings = "blr" in source.args and bool({"global_pool", "mask_ratio"} & source.args.keys())
    return decoder or "head.0.running_mean" in names or settings or _has_table(source)


def _has_table(source: Source) -> bool:
    """Whether the positions, (1, 1 + n, d), are MAE's sines and cosines, or near them, and timm does not say more."""
    table = source.tensors.get("pos_embed")
    if {"architecture", "pretrained_cfg"} & source.config.keys():
        return False
    if table is None or not table.is_floating_point() or table.ndim != 3 or table.shape[0] != 1 or table.shape[2] % 4:
        return False
    side = math.isqrt(max(0, table.shape[1] - 1))
    if side < 2 or side * side != table.shape[1] - 1:
        return False
    original = sincos2d_mae((side, side), table.shape[2]).to(table.dtype)
    return float(F.cosine_similarity(table[0, 1:].flatten(), original.flatten(), dim=0)) > ALIKE


def layout(source: Source, facts: dict[str, Any]) -> Layout:
    depth = 1 + max(int(found[1]) for name in source.tensors if (found := BLOCK.match(name)))
    averaged = any(name.startswith("fc_norm.") for name in source.tensors)  # fine-tuned with its "global_pool"
    given: dict[str, Any] = {
        **sizes_of(source, depth, facts),
        "mlp": shape_of(source, "blocks.0.mlp.fc1.weight", 2)[0],
        "resize": "bicubic",  # util/pos_embed.py
        "pool": "avg_norm" if averaged else "cls",
    }
    config = ViTConfig(**given | facts)
    decoder = [name for name in source.tensors if name.startswith("decoder_") or name == "mask_token"]
    counter = [name for name in source.tensors if name == "head.0.num_batches_tracked"]
    aside = (*decoder, *counter)
    head = _head(source, config.width)
    return Layout(config, timm.parts(config), head, aside=aside, guessed=("heads",), decoder=DECODER)


def _block(ours: str, theirs: str) -> dict[str, Part]:
    return timm.of_block(TrunkConfig(), ours, theirs)


DECODER = DecoderNames("decoder_", "mask_token", "decoder_blocks.", _block, {"norm_eps": 1e-6})  # models_mae.py


def _head(source: Source, width: int) -> dict[str, Part]:
    names = [name for name in source.tensors if name.startswith("head.")]
    if any(name.startswith(("head.0.", "head.1.")) for name in names):
        return _probe(source, width)
    return {f"linear.{name}": same(f"head.{name}") for name in ("weight", "bias")} if names else {}


def _probe(source: Source, width: int) -> dict[str, Part]:
    """A linear probe: batch norm, which is a linear map once it is trained, goes into the linear map behind it."""
    weight, bias, mean, var = "head.1.weight", "head.1.bias", "head.0.running_mean", "head.0.running_var"
    classes = shape_of(source, bias, 1)[0]
    for name, shape in {weight: (classes, width), mean: (width,), var: (width,)}.items():
        if (found := shape_of(source, name, len(shape))) != shape:
            raise ValueError(f"{name} {found} where {shape} was expected")

    def scaled(weight: Tensor, var: Tensor) -> Tensor:
        return weight.double() / (var.double() + BATCH_NORM_EPS).sqrt()

    return {
        "linear.weight": Part((weight, var), lambda weight, var: scaled(weight, var).float(), _unwritten),
        "linear.bias": Part(
            (bias, weight, mean, var),
            lambda bias, weight, mean, var: (bias.double() - scaled(weight, var) @ mean.double()).float(),
            _unwritten,
        ),
    }


def _unwritten(ours: Tensor) -> NoReturn:
    raise NotImplementedError("no probe of MAE's is written")
