"""SigLIP's image towers in transformers' names, of SigLIP 2 with images of one size too (arXiv 2303.15343, 2502.14786).

The attention pool is the encoder's own, whose vector is what texts are compared with. SiglipForImageClassification has
its classifier on the average of the patches, and leaves the pool aside. They are read, not written.
"""

from dataclasses import replace
from typing import Any, NoReturn

from torch import Tensor

from mpp.models.vit_config import ViTConfig
from mpp.weights.files import Source
from mpp.weights.format import Layout, Part, patch_convolution, row, same
from mpp.weights.huggingface_clip import BOTH, PATCHES, TABLE, blocks, section, told_of
from mpp.weights.huggingface_config import HALF, Family, classes_of, config_of
from mpp.weights.huggingface_input import input_of

NAME = "huggingface-siglip"
WHOLE, TOWER = ("siglip",), ("siglip_vision_model",)  # model_type
DEFAULTS: dict[str, Any] = {  # transformers' SiglipVisionConfig
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
FAMILY = Family(1e-6, "bicubic", HALF, HALF, hidden_act="gelu_pytorch_tanh")
PROBE = "head.probe"


def _prefix(source: Source) -> str | None:
    """What the names of the image tower begin with; None where there is none."""
    found = (name.removesuffix(PATCHES) for name in source.tensors if name.endswith(PATCHES))
    marks = (f"{TABLE}.weight", "post_layernorm.weight", "encoder.layers.0.self_attn.q_proj.weight")
    without = ("embeddings.class_embedding", "pre_layrnorm.weight")  # which CLIP's relatives have
    return next(
        (
            prefix
            for prefix in found
            if all(prefix + mark in source.tensors for mark in marks)
            and not any(prefix + mark in source.tensors for mark in without)
        ),
        None,
    )


def recognises(source: Source) -> bool:
    return _prefix(source) is not None


def layout(source: Source, facts: dict[str, Any]) -> Layout:
    """The tower. Without config.json, sizes are the tensors' and all else is that of the published models."""
    prefix, tensors = _prefix(source) or "", source.tensors
    settings = section(source.config, WHOLE, TOWER, DEFAULTS)
    outer = prefix.removesuffix("vision_model.")
    rows = [len(tensors[f"{outer}classifier.{kind}"]) for kind in BOTH if f"{outer}classifier.{kind}" in tensors]
    pool = facts.get("pool", "avg" if rows or f"{prefix}{PROBE}" not in tensors else "map")
    config = config_of(source, settings, FAMILY, told_of(source, prefix, 0), False, facts)
    config = replace(config, class_token=False, pool=pool)
    head: dict[str, Part] = {}
    classes: tuple[str, ...] = ()
    if rows and pool == "avg":
        head = {f"linear.{kind}": same(f"{outer}classifier.{kind}") for kind in BOTH}
        classes = classes_of(source.config, rows[0])
    beside = tuple(outer + name for name in ("text_model.", "logit_scale", "logit_bias"))
    beside += () if head else (f"{outer}classifier.",)
    beside += () if pool == "map" else (f"{prefix}head.",)
    aside = tuple(name for name in tensors if name.startswith(beside) or name == f"{prefix}embeddings.position_ids")
    fed, notes = input_of(source.preprocessing, config.image, any_size=False)
    guessed = () if settings else ("heads",)
    return Layout(config, parts(config, prefix), head, classes, aside, guessed, fed, notes)


def parts(config: ViTConfig, prefix: str) -> dict[str, Part]:
    """Where each tensor of the tower is."""
    found = {
        "stem.project.weight": patch_convolution(f"{prefix}{PATCHES}", config.patch),
        "stem.project.bias": same(f"{prefix}{PATCHES.removesuffix('weight')}bias"),
        "positions.table": same(f"{prefix}{TABLE}.weight"),
        **blocks(config, prefix),
    }
    for kind in BOTH:
        found[f"norm.{kind}"] = same(f"{prefix}post_layernorm.{kind}")
    if config.pool == "map":
        found["pooling.probe"] = row(f"{prefix}{PROBE}")
        names = {"project": "attention.out_proj", "norm": "layernorm", "mlp.expand": "mlp.fc1"}
        for kind in BOTH:
            found |= _queries(f"{prefix}head.attention.in_proj_{kind}", kind, config.width)
            for ours, theirs in (names | {"mlp.contract": "mlp.fc2"}).items():
                found[f"pooling.{ours}.{kind}"] = same(f"{prefix}head.{theirs}.{kind}")
    return found


def _queries(name: str, kind: str, width: int) -> dict[str, Part]:
    """The pool's queries, and keys and values, which are rows of one tensor there."""
    return {
        f"pooling.query.{kind}": Part((name,), lambda piece: piece[:width], _unwritten),
        f"pooling.kv.{kind}": Part((name,), lambda piece: piece[width:], _unwritten),
    }


def _unwritten(ours: Tensor) -> NoReturn:
    raise NotImplementedError("no tower of SigLIP's is written")
