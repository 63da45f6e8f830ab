"""Model cards: the README.md of a folder of weights, as the Hugging Face hub shows it.

Whatever others chose, such as names of classes, paths and recipes, stands in code spans and code blocks alone.
"""

import importlib.metadata
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from types import ModuleType
from typing import Any

from mpp.augment.input import Input
from mpp.errors import counted
from mpp.export import onnx
from mpp.export.markdown import block, code
from mpp.export.origin import Given, origin, results
from mpp.models.encoder import Encoder
from mpp.models.vit import ViT
from mpp.models.vit_config import ViTConfig
from mpp.shards.classes import displayed
from mpp.weights import google, huggingface, timm
from mpp.weights.fed import NAMES

WRITERS: dict[str, ModuleType] = {format.NAME: format for format in (timm, huggingface, google)}
TITLES = {"timm": "timm", "huggingface": "transformers", "google": "vit_jax"}  # of the libraries that load them
LIBRARIES = TITLES | {"safetensors": "mpp", "export": "torch", "onnx": "onnx"}
GRAPHS = ("export", "onnx")  # which nothing here reads again
MOST_CLASSES = 50  # named in a card


def card(given: Given, to: str) -> str:
    """The model card, in Markdown, of weights that were written in the format `to`."""
    task = "image-feature-extraction" if given.head is None or given.projects else "image-classification"
    head = [
        "---",
        "# license: not chosen yet; add for instance license: apache-2.0",
        f"library_name: {LIBRARIES[to]}",
        f"pipeline_tag: {task}",
        "tags:",
        *(f"- {tag}" for tag in ["masked-patch-pretraining", _kind(given), *([] if to != "timm" else ["timm"])]),
        "---",
    ]
    sections = [
        "\n".join(head),
        f"# {given.encoder.config.describe()}",
        *_model(given),
        "## Where the weights come from",
        *origin(given),
        "## Results",
        *results(given),
        "## How to load them",
        *_usages(given, to),
        "## Made with",
        _made_with(to),
    ]
    return "\n\n".join(sections) + "\n"


def _kind(given: Given) -> str:
    return "vision-transformer" if isinstance(given.encoder, ViT) else "resnet"


# The model


def _model(given: Given) -> Iterator[str]:
    config = given.encoder.config
    count = sum(parameter.numel() for parameter in given.encoder.parameters())
    lines = [f"Encoder: {config.describe()}; {count:,} parameters."]
    if isinstance(config, ViTConfig):
        lines.append(_details(config))
    if given.head is not None and given.projects:
        places = counted(given.head.linear.out_features, "number")
        lines.append(f"Head: CLIP's projection, {places} in the space of images and texts, not of length 1.")
    elif given.head is not None:
        hidden = "" if given.head.hidden is None else f", behind {given.head.hidden.out_features} tanh units"
        lines.append(f"Head: linear, {counted(given.head.linear.out_features, 'logit')}{hidden}.")
    else:
        lines.append(f"No head: an image gives a vector of {given.encoder.width} numbers.")
    mean, std = (", ".join(f"{number:g}" for number in value) for value in (config.mean, config.std))
    size = f"{config.channels} x {config.image[0]} x {config.image[1]} (channels, height, width)"
    lines.append(f"Input: images of {size}; pixels on [0, 1] minus mean ({mean}), over standard deviation ({std}).")
    lines.append(f"Pictures of any size become such images as follows: {given.encoder.input}.")
    yield "\n".join(f"- {line}" for line in lines)
    if given.classes and not given.projects:
        names = ", ".join(map(code, displayed(given.classes[:MOST_CLASSES])))
        more = len(given.classes) - MOST_CLASSES
        yield f"Classes, in the order of the logits: {names}{f' and {more} more' if more > 0 else ''}."


def _details(config: ViTConfig) -> str:
    """The settings of a ViT that decide its numbers, in words."""
    resized = f" (resized {config.resize.replace('_', ', ')})" if config.positions.startswith("learned") else ""
    pool = {
        "cls": "the class token's output",
        "avg": "the average of the normed patches",
        "avg_norm": "the normed average of the patches",
        "cls_avg": "the class token's output and the average of the normed patches",
        "map": "attention pooling",
    }[config.pool]
    activation = "SwiGLU" if config.swiglu else f"GELU ({config.gelu})"
    words = [f"{config.hidden} hidden units, {activation}", f"{config.norm} norm, eps {config.norm_eps:g}"]
    words += [f"positions {config.positions}{resized}", f"output: {pool}"]
    extra = {
        counted(config.registers, "register"): config.registers > 0,
        "LayerScale": config.layer_scale is not None,
        "normed queries and keys": config.qk_norm,
        "causal attention": config.causal,
        "queries, keys and values without bias": not config.qkv_bias,
        "no bias in its other linear layers": not config.bias,
        "no bias in its stem": not config.stem_bias,
        "a norm before the blocks": config.pre_norm,
    }
    return "; ".join([*words, *(name for name, there in extra.items() if there)]) + "."


# Loading


def facts_needed(to: str, encoder: Encoder) -> dict[str, Any]:
    """What mpp has to be told to read a format back, as its files don't say it."""
    if to != "google":
        return {}
    config = encoder.config
    without = {"positions": "none"} if config.positions == "none" else {}
    plain, fed = Input(config.image), encoder.input
    seen = {name: getattr(fed, name) for name in NAMES if getattr(fed, name) != getattr(plain, name)}
    return {"heads": config.heads, "image": config.image, **without, **seen}


def _usages(given: Given, to: str) -> Iterator[str]:
    for name, format in WRITERS.items():
        if name == to or name != "google":
            yield f"### {TITLES[name]}"
            yield block(format.usage(given.encoder, given.head), "python") if name == to else _hint(given, to, name)
    yield "### Plain torch"
    yield _exported(given) if to == "export" else _hint(given, to, "export")
    yield "### onnxruntime"
    yield block(onnx.usage(given), "python") if to == "onnx" else _hint(given, to, "onnx")
    if to not in GRAPHS:
        yield "### mpp"
        yield _mpp(given, to)


def _hint(given: Given, to: str, other: str) -> str:
    """How to get the weights for another library, or why there is no way."""
    if other in WRITERS and (reason := refusal(given, other)):
        return f"Not possible: {reason}."
    source = "WEIGHTS" if to in GRAPHS else "model.npz" if to == "google" else "."
    facts = [f"{name}={str(value).replace(' ', '')}" for name, value in facts_needed(to, given.encoder).items()]
    command = " ".join(["mpp convert", source, "OUT --to", other, *facts]).replace("(", "[").replace(")", "]")
    made = ", with WEIGHTS what this was made from" if to in GRAPHS else ""
    return f"`{command}` writes them so{made}."


def refusal(given: Given, to: str) -> str | None:
    """Why a format has no place for a model, or None. Asks with a model of as few blocks as can be, which is cheap."""
    config = given.encoder.config
    if not isinstance(config, ViTConfig):
        return f"there is no place for model.name {config.name}"
    try:
        WRITERS[to].write(ViT(replace(config, depth=len(config.mixer))), given.head, given.classes)
    except ValueError as error:
        return str(error).rstrip(".")
    return None


def _images(given: Given) -> str:
    config = given.encoder.config
    shape = f"1, {config.channels}, {config.image[0]}, {config.image[1]}"
    return f"images = torch.randint(0, 256, ({shape}), dtype=torch.uint8)  # normalised inside"


def prepared(given: Given) -> str:
    """Python that makes of a picture what mpp's evaluation does, but for rounding."""
    fed, (height, width) = given.encoder.input, given.encoder.input.image
    mode = "L" if given.encoder.config.channels == 1 else "RGB"
    across = f"min(tall / {height}, wide / {width})"
    sides = f"round(scale * {height}), round(scale * {width})"
    if fed.fit == "squeeze":
        across, sides = "1", "round(scale * tall), round(scale * wide)"
    return f"""\
picture = Image.new("{mode}", (640, 480))  # yours: Image.open("picture.jpg").convert("{mode}")
tall, wide = picture.height, picture.width
scale = {fed.centre:g} * {across}
h, w = {sides}
top, left = (tall - h) // 2, (wide - w) // 2
box = picture.crop((left, top, left + w, top + h)).resize(({width}, {height}), Image.Resampling.{fed.filter.upper()})
pixels = torch.from_numpy(numpy.array(box)).reshape(1, {height}, {width}, -1)
images = pixels.permute(0, 3, 1, 2)  # uint8: they are normalised inside"""


def _outputs(given: Given) -> str:
    if given.head is None:
        return f"outputs = model(images)  # (1, {given.encoder.width}), one vector an image"
    what = "projected" if given.projects else "logits"
    return f"outputs = model(images)  # (1, {given.head.linear.out_features}), {what}"


def _exported(given: Given) -> str:
    return block(
        f"""\
import numpy
import torch
from PIL import Image

model = torch.export.load("model.pt2").module()
{prepared(given)}
with torch.no_grad():
    {_outputs(given)}
""",
        "python",
    )


def _mpp(given: Given, to: str) -> str:
    load = "load_encoder" if given.head is None else "load_classifier"
    facts = "".join(f", {name}={value!r}" for name, value in facts_needed(to, given.encoder).items())
    place = "model.npz" if to == "google" else "."
    return block(
        f"""\
import mpp
import torch

model = mpp.{load}("{place}"{facts}).eval()
{_images(given)}, or: model.prepare("picture.jpg")
with torch.no_grad():
    {_outputs(given)}
""",
        "python",
    )


def _made_with(to: str) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mpp", "torch"))
    return f"`mpp convert --to {to}`, {versions}, {datetime.now(UTC).date()}."
