"""Folders of Hugging Face's transformers: ViT, ViTMAE, DINOv2 without and with registers; written as ViT.

Pooler (`pooler.dense`, a tanh layer behind the class token: Google's pre-logits), mask token and decoders are left
aside. So is DINOv2's classifier, which also takes the mean of the patches: ours maps the encoder's vector alone.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from safetensors.torch import save
from torch import Tensor

from mpp.models.classifier import Head
from mpp.models.vit import ViT
from mpp.models.vit_config import ViTConfig
from mpp.weights.files import Source
from mpp.weights.format import Layout, Part, heads_of, image_of, patch_convolution, row, same, stacked

NAME = "huggingface"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PROJECTION = "embeddings.patch_embeddings.projection.weight"
TABLE = "embeddings.position_embeddings"
# Every model has these names; what stands in front of them ("vit.") stands in front of all the encoder's.
LANDMARKS = (PROJECTION, TABLE, "embeddings.cls_token")
ERF = ("gelu", "gelu_python")
TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh")
BILINEAR = 2  # PIL's number of the triangle filter, by which our own evaluation resizes


@dataclass(frozen=True)
class Family:
    """What transformers takes for granted of a `model_type`."""

    norm_eps: float
    resize: Literal["bicubic", "bicubic_antialias"]
    imagenet: bool = True  # mean and std of the published weights are ImageNet's
    dinov2: bool = False


FAMILIES = {
    "vit": Family(1e-12, "bicubic", imagenet=False),
    "vit_mae": Family(1e-12, "bicubic"),
    "dinov2": Family(1e-6, "bicubic", dinov2=True),
    "dinov2_with_registers": Family(1e-6, "bicubic_antialias", dinov2=True),
}
# Parts of a block, and in front of them that of all blocks, under every name they have had: files first (of all releases
# so far, also 5.23), then the modules of release 5, whose state_dict() is torch.save'd here and there. DINOv2's differ.
NAMES = {
    "blocks": ("encoder.layer", "layers"),
    "norm1": ("layernorm_before", "norm1"),
    "query": ("attention.attention.query", "attention.q_proj"),
    "key": ("attention.attention.key", "attention.k_proj"),
    "value": ("attention.attention.value", "attention.v_proj"),
    "project": ("attention.output.dense", "attention.o_proj"),
    "norm2": ("layernorm_after", "norm2"),
    "expand": ("intermediate.dense", "mlp.fc1", "mlp.weights_in"),
    "gate": ("mlp.gate_proj",),
    "up": ("mlp.up_proj",),
    "contract": ("output.dense", "mlp.fc2", "mlp.weights_out", "mlp.down_proj"),
}
PUBLISHED = {slot: names[0] for slot, names in NAMES.items()}


def recognises(source: Source) -> bool:
    """Whether the names of tensors, or config.json, are of transformers; `layout` refuses models that are no ViT."""
    return source.config.get("model_type") in FAMILIES or any(name.endswith(PROJECTION) for name in source.tensors)


def layout(source: Source, facts: dict[str, Any]) -> Layout:
    """The config from config.json, and from the tensors where that is not there or silent; ValueError says why not."""
    prefix = next((name.removesuffix(m) for name in source.tensors for m in LANDMARKS if name.endswith(m)), "")
    kind, names = _kind(source), _names_in(source.tensors, prefix)
    config = _config(source, prefix, names, kind, facts)
    head = {}
    if prefix + "classifier.weight" not in source.tensors and not FAMILIES[kind].dinov2:
        head = {f"linear.{x}": same(f"classifier.{x}") for x in ("weight", "bias") if _has_head(source)}
    aside = {name for part in ("weight", "bias") for name in (f"{prefix}pooler.dense.{part}", f"classifier.{part}")}
    aside |= {prefix + "embeddings.mask_token", *(name for name in source.tensors if name.startswith("decoder."))}
    aside = (aside & source.tensors.keys()) - {name for part in head.values() for name in part.names}
    return Layout(config, parts(config, prefix, names), head, _classes(source) if head else (), tuple(sorted(aside)))


def parts(config: ViTConfig, prefix: str = "", names: Mapping[str, str] = PUBLISHED) -> dict[str, Part]:
    """Where the tensors of an encoder are; `prefix` stands in front of all, `names` as in NAMES."""
    biased = ("weight", "bias")
    found = {
        "stem.project.weight": patch_convolution(PROJECTION, config.patch),
        "stem.project.bias": same(PROJECTION.replace("weight", "bias")),
        "class_token": row("embeddings.cls_token"),
        "positions.table": _rows(TABLE),
    }
    if config.registers:
        found["registers"] = _rows("embeddings.register_tokens")
    for block in range(config.depth):
        at = {slot: f"{names['blocks']}.{block}.{name}" for slot, name in names.items()}
        expand = ("gate", "up") if "gate" in names else ("expand",)
        for w in biased:
            for slot in ("norm1", "norm2"):
                found[f"blocks.{block}.{slot}.{w}"] = same(f"{at[slot]}.{w}")
            if w == "weight" or config.qkv_bias:
                qkv = (f"{at[slot]}.{w}" for slot in ("query", "key", "value"))
                found[f"blocks.{block}.mixer.qkv.{w}"] = stacked(*qkv)
            found[f"blocks.{block}.mixer.project.{w}"] = same(f"{at['project']}.{w}")
            found[f"blocks.{block}.mlp.expand.{w}"] = stacked(*(f"{at[slot]}.{w}" for slot in expand))
            found[f"blocks.{block}.mlp.contract.{w}"] = same(f"{at['contract']}.{w}")
        for branch in (1, 2) if config.layer_scale is not None else ():
            scale = f"{names['blocks']}.{block}.layer_scale{branch}.lambda1"
            found[f"blocks.{block}.scale{branch}"] = same(scale)
    found |= {f"norm.{w}": same(f"layernorm.{w}") for w in biased}
    return {ours: replace(part, names=tuple(prefix + name for name in part.names)) for ours, part in found.items()}


def write(encoder: ViT, head: Head | None, classes: tuple[str, ...]) -> dict[str, bytes]:
    """The files of a folder: ViTForImageClassification with a head, ViTModel (without pooler) otherwise.

    Fixed positions become a table, and transformers resizes every table bicubically: the same numbers at the encoder's
    own image size, and at others too for learned ones with resize bicubic. ValueError names what ViT cannot hold.
    """
    _refuse(encoder.config, head)
    config = replace(encoder.config, positions="learned")
    ours = encoder.state_dict() | {"positions.table": _table(encoder)}
    found = parts(config, "" if head is None else "vit.")
    if head is not None:
        ours |= {f"head.{name}": value for name, value in head.state_dict().items()}
        found |= {f"head.linear.{w}": same(f"classifier.{w}") for w in ("weight", "bias")}
    tensors = {}
    for name, part in found.items():
        for piece, value in zip(part.names, part.write(ours[name]), strict=True):
            tensors[piece] = value.detach().float().cpu().contiguous().clone()
    height, width = config.image
    size: int | list[int] = height if height == width else [height, width]
    settings: dict[str, Any] = {
        "architectures": ["ViTModel" if head is None else "ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "hidden_act": ERF[0] if config.gelu == "erf" else TANH[0],
        "layer_norm_eps": config.norm_eps,
        "image_size": size,
        "patch_size": config.patch,
        "num_channels": config.channels,
        "qkv_bias": config.qkv_bias,
        "encoder_stride": config.patch,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if head is not None:
        labels = classes or _labels(head.linear.out_features)
        settings["id2label"] = {str(number): label for number, label in enumerate(labels)}
        settings["label2id"] = {label: number for number, label in enumerate(labels)}
    preprocessing = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _each(config.mean, config.channels),
        "image_std": _each(config.std, config.channels),
    }
    return {
        "config.json": _text(settings),
        "preprocessor_config.json": _text(preprocessing),
        "model.safetensors": save(tensors, {"format": "pt"}),
    }


def usage(encoder: ViT, head: Head | None) -> str:
    """Python that loads the folder with transformers."""
    kind, options, output = ("ViTModel", ", add_pooling_layer=False", "last_hidden_state[:, 0]  # (1, width)")
    if head is not None:
        kind, options, output = ("ViTForImageClassification", "", "logits  # (1, classes)")
    height, width = encoder.config.image
    other = (
        f"# Of images that are not {height}x{width}: model(..., interpolate_pos_encoding=True), positions bicubically"
    )
    return (
        f"""\
import torch
from PIL import Image
from transformers import AutoImageProcessor, {kind}

folder = "."  # this folder, or its name on the Hub
model = {kind}.from_pretrained(folder{options}).eval()
processor = AutoImageProcessor.from_pretrained(folder)  # resizes to {height}x{width} whatever the picture's shape
inputs = processor(Image.open("picture.jpg").convert("RGB"), return_tensors="pt")
with torch.inference_mode():
    output = model(**inputs).{output}
{other if height == width else ""}""".rstrip("\n")
        + "\n"
    )


def _kind(source: Source) -> str:
    """The `model_type`; without config.json that of the tensors, which do not tell ViTMAE from ViT."""
    kind = source.config.get("model_type")
    if kind is None:
        kind = "vit"
        if any(".layer_scale1." in name for name in source.tensors):
            with_registers = any(name.endswith("embeddings.register_tokens") for name in source.tensors)
            kind = "dinov2_with_registers" if with_registers else "dinov2"
        elif any(name.startswith("decoder.decoder_") for name in source.tensors):
            kind = "vit_mae"
    if kind not in FAMILIES:
        raise ValueError(f"config.json: model_type {kind!r} is none of {', '.join(FAMILIES)}")
    return kind


def _names_in(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, str]:
    """Of NAMES those that the file uses; the published ones where it has none."""
    names = {"blocks": NAMES["blocks"][0]}
    if any(name.startswith(f"{prefix}{NAMES['blocks'][1]}.") for name in tensors):
        names["blocks"] = NAMES["blocks"][1]
    used = {
        re.sub(r"^\d+\.", "", name.removeprefix(start))
        for name in tensors
        if name.startswith(start := f"{prefix}{names['blocks']}.")
    }
    for slot, known in NAMES.items():
        there = [name for name in known if {f"{name}.weight", f"{name}.bias"} & used]
        if slot not in names and (there or slot not in ("gate", "up")):
            names[slot] = there[0] if there else known[0]
    return names


def _has_head(source: Source) -> bool:
    return "classifier.weight" in source.tensors or "classifier.bias" in source.tensors
