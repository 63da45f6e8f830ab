"""CLIP's image towers in transformers' names: CLIPVisionModel, with projection, and the tower of a whole CLIPModel.

The projection to the space of images and texts is the head. Text towers are left aside, and so is the classifier of
CLIPForImageClassification, which takes the average of the patches before the last norm.
"""

from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from mpp.jsons import encoded
from mpp.models.classifier import Head
from mpp.models.vit import ViT
from mpp.models.vit_config import ViTConfig
from mpp.weights.clip import projection
from mpp.weights.files import Source
from mpp.weights.format import (
    CLIP_EPS,
    CLIP_MEAN,
    CLIP_STD,
    Layout,
    Part,
    joint,
    patch_convolution,
    same,
    shape_of,
    stacked,
)
from mpp.weights.huggingface_config import ADDED, GELUS, Family, Told, config_of, depth_told
from mpp.weights.huggingface_input import input_of, preprocessing_of

NAME = "huggingface-clip"
MARK, PATCHES, TABLE = (
    "embeddings.class_embedding",
    "embeddings.patch_embedding.weight",
    "embeddings.position_embedding",
)
PROJECTION = "visual_projection.weight"
BOTH = ("weight", "bias")
BLOCK = {
    "norm1": "layer_norm1",
    "mixer.project": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.expand": "mlp.fc1",
    "mlp.contract": "mlp.fc2",
}
WHOLE, TOWER = ("clip", "metaclip_2"), ("clip_vision_model", "metaclip_2_vision_model")  # model_type
# transformers' CLIPVisionConfig, which leaves what is as here out of some files.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": CLIP_EPS,
}
FAMILY = Family(CLIP_EPS, "bicubic", CLIP_MEAN, CLIP_STD, hidden_act="quick_gelu", clip=True)


def _prefix(source: Source) -> str | None:
    """What the names of the image tower begin with; None where there is none."""
    found = (name.removesuffix(MARK) for name in source.tensors if name.endswith(MARK))
    return next((prefix for prefix in found if f"{prefix}pre_layrnorm.weight" in source.tensors), None)


def recognises(source: Source) -> bool:
    return _prefix(source) is not None


def layout(source: Source, facts: dict[str, Any]) -> Layout:
    """The tower. Without config.json, sizes are the tensors' and all else is that of OpenAI's models."""
    prefix, tensors = _prefix(source) or "", source.tensors
    settings, told = section(source.config, WHOLE, TOWER, DEFAULTS), told_of(source, prefix, 1)
    config = config_of(source, settings, FAMILY, told, False, facts)
    head: dict[str, Part] = {}
    classes: tuple[str, ...] = ()
    outer = prefix.removesuffix("vision_model.")
    if f"{outer}{PROJECTION}" in tensors:
        rows = shape_of(source, f"{outer}{PROJECTION}", 2)[0]
        head, classes = projection(f"{outer}{PROJECTION}", rows), joint(rows)
    beside = tuple(outer + name for name in ("text_model.", "text_projection.", "logit_scale", "classifier."))
    aside = tuple(name for name in tensors if name.startswith(beside) or name == f"{prefix}embeddings.position_ids")
    guessed: tuple[str, ...] = () if settings else ("heads", "gelu")
    if "image_mean" not in source.preprocessing:
        guessed += ("mean", "std")
    fed, notes = input_of(source.preprocessing, config.image, any_size=False)
    return Layout(config, parts(config, prefix), head, classes, aside, guessed, fed, notes)


def section(config: dict[str, Any], whole: tuple[str, ...], tower: tuple[str, ...], defaults: dict[str, Any]) -> dict:
    """The settings of an image tower, those that the file leaves out too; {} without config.json.

    whole, tower: the `model_type` of models with a text tower beside, and of image towers alone.
    """
    kind = config.get("model_type")
    if kind is None:
        return {}
    if kind not in whole + tower:
        raise ValueError(f"config.json: model_type must be one of {', '.join(whole + tower)}, found {kind!r}")
    places = ("vision_config", "vision_config_dict")  # the second, of early releases, overrides the first
    sections = [config] if kind in tower else [config.get(name) or {} for name in places]
    if not all(isinstance(section, dict) for section in sections):
        raise ValueError("config.json: vision_config must be an object")
    return {key: value for section in (defaults, *sections) for key, value in section.items() if key in defaults}


def told_of(source: Source, prefix: str, front: int) -> Told:
    """The sizes that the tensors show. front: rows of the positions that are no patches'."""
    told = depth_told(source.tensors, f"{prefix}encoder.layers.")
    width, channels, patch, _ = shape_of(source, name := f"{prefix}{PATCHES}", 4)
    told |= {"hidden_size": (width, name), "num_channels": (channels, name), "patch_size": (patch, name)}
    told["patches"] = shape_of(source, name := f"{prefix}{TABLE}.weight", 2)[0] - front, name
    told["intermediate_size"] = shape_of(source, name := f"{prefix}encoder.layers.0.mlp.fc1.weight", 2)[0], name
    return told


def parts(config: ViTConfig, prefix: str) -> dict[str, Part]:
    """Where each tensor of the tower is."""
    found = {
        "class_token": same(f"{prefix}{MARK}"),
        "stem.project.weight": patch_convolution(f"{prefix}{PATCHES}", config.patch),
        "positions.table": same(f"{prefix}{TABLE}.weight"),
    }
    for kind in BOTH:
        found[f"norm_pre.{kind}"] = same(f"{prefix}pre_layrnorm.{kind}")  # so spelt
        found[f"norm.{kind}"] = same(f"{prefix}post_layernorm.{kind}")
    return found | blocks(config, prefix)


def blocks(config: ViTConfig, prefix: str) -> dict[str, Part]:
    """Where each tensor of the blocks is."""
    found: dict[str, Part] = {}
    for number in range(config.depth):
        ours, theirs = f"blocks.{number}", f"{prefix}encoder.layers.{number}"
        for kind in BOTH:
            found[f"{ours}.mixer.qkv.{kind}"] = stacked(*(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv"))
            found |= {f"{ours}.{part}.{kind}": same(f"{theirs}.{name}.{kind}") for part, name in BLOCK.items()}
    return found


def write(encoder: ViT, head: Head | None, classes: tuple[str, ...]) -> dict[str, bytes]:
    """The files of a folder: of a CLIPVisionModelWithProjection with a projection, of a CLIPVisionModel otherwise.

    ValueError names what they cannot hold. Positions as in `mpp.weights.huggingface.write`.
    """
    config = encoder.config
    _refuse(config, head, classes)
    positions, patches = encoder.positions, encoder.tokens - encoder.prefix
    table = [positions.class_token()[None], positions.patches(config.grid).expand(patches, -1)]
    ours = {**encoder.state_dict(), "positions.table": torch.cat(table).detach()}
    found, rows = parts(config, "vision_model."), 0
    if head is not None:
        rows = head.linear.out_features
        found |= {f"head.{name}": part for name, part in projection(PROJECTION, rows).items()}
        ours |= {f"head.{name}": value for name, value in head.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for name, part in found.items():
        pieces = (piece.float().cpu().clone(memory_format=torch.contiguous_format) for piece in part.write(ours[name]))
        tensors |= dict(zip(part.names, pieces, strict=True))
    settings = {
        "architectures": ["CLIPVisionModelWithProjection" if rows else "CLIPVisionModel"],
        "model_type": TOWER[0],
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_channels": config.channels,
        "image_size": config.image[0],
        "patch_size": config.patch,
        "hidden_act": GELUS[config.gelu][0],
        "layer_norm_eps": config.norm_eps,
        **({"projection_dim": rows} if rows else {}),
    }
    return {
        "config.json": _json(settings),
        "preprocessor_config.json": _json(preprocessing_of(config, encoder.input)),
        "model.safetensors": save(tensors, {"format": "pt"}),
    }


def _json(values: dict[str, Any]) -> bytes:
    return encoded(values, indent=2, ensure_ascii=False)


def _refuse(config: ViTConfig, head: Head | None, classes: tuple[str, ...]) -> None:
    """Raises ValueError with all that transformers' CLIP has no place for."""
    plain = ViTConfig(stem_bias=False)
    fields = ("stem", "stem_bias", "pool", "registers", "norm", "swiglu", "qkv_bias", "bias", "qk_norm", "layer_scale")
    wrong = [f"{name} {value}" for name in fields if (value := getattr(config, name)) != getattr(plain, name)]
    if set(config.mixer) != {"attention"}:
        wrong.append(f"mixer {'/'.join(config.mixer)}")
    if config.positions not in ADDED:
        wrong.append(f"positions {config.positions}")
    if config.image[0] != config.image[1]:
        wrong.append(f"image {config.image}, which is not square,")
    if head is not None and (head.linear.bias.any() or classes != joint(head.linear.out_features)):
        wrong.append("a head for classes, only CLIP's projection (leave it away: --encoder)")
    if wrong:
        raise ValueError(f"transformers' CLIP, which model.pre_norm asks for, cannot hold {', '.join(wrong)}")


def usage(encoder: ViT, head: Head | None) -> str:
    """Python that loads the folder in transformers and computes what our encoder, or its projection, does."""
    kind, output = "CLIPVisionModel", "pooler_output  # (1, width)"
    if head is not None:
        kind, output = "CLIPVisionModelWithProjection", "image_embeds  # (1, places of the space of images and texts)"
    mode = {1: '.convert("L")', 3: '.convert("RGB")'}.get(encoder.config.channels, "")
    return f"""\
import torch
from PIL import Image
from transformers import AutoImageProcessor, {kind}

folder = "."  # where this file is, or its name on the Hub
model = {kind}.from_pretrained(folder).eval()
processor = AutoImageProcessor.from_pretrained(folder)
pixels = processor(Image.open("picture.jpg"){mode}, return_tensors="pt")["pixel_values"]
with torch.inference_mode():
    output = model(pixels).{output}
# Other sizes, multiples of the patch: model(pixels, interpolate_pos_encoding=True).
"""
