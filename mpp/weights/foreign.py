"""Weights that others published: which format a file has, and from it an encoder, and a head if it holds one."""

import logging
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mpp.errors import cause, shown
from mpp.models.classifier import Head
from mpp.models.encoder import fill
from mpp.models.trunk_config import Grid
from mpp.models.vit import ViT
from mpp.models.vit_config import ViTConfig
from mpp.weights import (
    big_vision,
    capi,
    clip,
    dino,
    fed,
    files,
    google,
    huggingface,
    huggingface_clip,
    huggingface_siglip,
    mae,
    timm,
    unread,
)
from mpp.weights.decoder import DecoderFile
from mpp.weights.files import Source, WeightsError
from mpp.weights.format import MISFITS, Layout, found_in, refuse_not_finite

# The first that recognises a file reads it: those that others' names could be taken for come last.
FORMATS: tuple[ModuleType, ...] = (
    *(google, big_vision, huggingface, huggingface_clip, huggingface_siglip),
    *(clip, capi, mae, dino, timm),
)
SHOWN = 6  # names of tensors in an error
PREFIX = "prefix"  # a fact about the file and not about its encoder: where in it the model is

logger = logging.getLogger("mpp.weights")


@dataclass(frozen=True)
class Foreign:
    """What a file of weights gave."""

    format: str
    encoder: ViT
    head: Head | None
    classes: tuple[str, ...]
    aside: tuple[str, ...]  # tensors of the file that are no part of encoder or head
    decoder: DecoderFile | None = None  # MAE's, if the file holds one; its tensors are among `aside`


def read(path: Path, facts: dict[str, Any]) -> Foreign:
    """What a file or folder holds. facts: as in `load`, and `prefix` as in `mpp.weights.files.read`."""
    prefix = facts.get(PREFIX)
    if prefix is not None and not isinstance(prefix, str):
        raise WeightsError(f"{shown(path)}: prefix must be text that names of tensors begin with, got {prefix!r}")
    source = files.read(path, prefix)
    if source.picked:
        logger.warning("%s: %s", shown(path), source.picked)
    return load(source, {name: value for name, value in facts.items() if name != PREFIX})


def load(source: Source, facts: dict[str, Any]) -> Foreign:
    """Builds what a file holds; `facts` are fields of ViTConfig that it cannot tell.

    Raises WeightsError if the format is not known, or if anything is missing, unexpected or of another shape; of a kind
    of model that is not read it names the kind.
    """
    told, asked = fed.apart(source.path, facts)
    told = _checked(source, told)
    try:
        return _load(source, told, asked)
    except WeightsError as error:
        if what := unread.named(source):
            raise WeightsError(f"{shown(source.path)}: {what}") from error
        raise


def _checked(source: Source, facts: dict[str, Any]) -> dict[str, Any]:
    """Fields of ViTConfig, each of its type."""
    names = {field.name for field in fields(ViTConfig)} - {"name", "image"}
    for name in facts.keys() - names:
        near = get_close_matches(name, every := names | {*fed.NAMES}) or sorted(every)
        raise WeightsError(f"{source.path}: {name}: no setting of an encoder; did you mean {', '.join(near)}?")
    facts = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
    if type(facts.get("mixer")) is str:
        facts["mixer"] = (facts["mixer"],)
    try:
        ViTConfig.check_types(facts)
    except ValueError as error:
        raise WeightsError(f"{shown(source.path)}: {error}") from error
    return facts


def _load(source: Source, facts: dict[str, Any], asked: dict[str, Any]) -> Foreign:
    format = next((format for format in FORMATS if format.recognises(source)), None)
    if format is None:
        if what := unread.model_type(source):
            raise WeightsError(f"{shown(source.path)}: {what}")
        some = ", ".join(map(shown, list(source.tensors)[:SHOWN]))
        known = ", ".join(known.NAME for known in FORMATS)
        raise WeightsError(f"{shown(source.path)}: none of the formats {known}; its tensors: {some}, ...")
    place = f"{shown(source.path)}: {format.NAME}"
    try:
        layout = _layout(format, source, facts, asked.get("image"))
        with torch.device("meta"):  # what the file claims costs no memory before its tensors are seen to be there
            encoder = ViT(replace(layout.config, **facts))
        told = fed.read(source.config | source.preprocessing) or layout.input
        encoder.config.check_image(told.image if told else encoder.config.image)
    except (*MISFITS, ArithmeticError) as error:
        raise WeightsError(f"{place}: {shown(cause(error))}") from error
    with torch.device("meta"):
        head = _head(source, layout, encoder)
    wrong: list[str] = []
    used = set(layout.aside)
    for module, parts in ((encoder, layout.encoder), (head, layout.head)):
        if module is not None:
            found, problems = found_in(source.tensors, parts, own := module.state_dict())
            wrong += problems
            used |= {piece for name in own.keys() & parts.keys() for piece in parts[name].names}
            if not wrong:
                fill(module, found)
    wrong += [f"{name} unexpected" for name in source.tensors if name not in used]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise WeightsError(f"{place}: {'; '.join(map(shown, wrong[:SHOWN]))}{more}")
    for module, parts in ((encoder, layout.encoder), (head, layout.head)):
        refuse_not_finite(place, {} if module is None else module.state_dict(), parts, source)
    for note in layout.notes if told is layout.input else ():
        logger.warning("%s: %s", place, note)
    same_image = asked.get("image") == layout.config.image  # else it is not what positions are taken to be for
    _say_guesses(place, layout, encoder, facts | ({"image": asked["image"]} if same_image else {}))
    encoder.input = told or encoder.input
    encoder = fed.fed(encoder, asked, source.path)
    numbers = range(0 if head is None else head.linear.out_features)
    classes, decoder = layout.classes or tuple(map(str, numbers)), None
    if layout.decoder is not None:
        decoder = DecoderFile(source, layout.decoder, layout.config.grid, place)
    return Foreign(format.NAME, encoder, head, classes, source.aside + layout.aside, decoder)


WHY = {"heads": "as the published model of this width and depth", "image": "its positions as a square grid"}


def _say_guesses(place: str, layout: Layout, encoder: ViT, facts: dict[str, Any]) -> None:
    """Warns of all that neither the file nor the user told, with what was taken for it."""
    guesses = [name for name in layout.guessed if name not in facts]
    if not guesses:
        return
    taken = []
    for name in guesses:
        value = str(getattr(encoder.config, name)).replace(" ", "")
        taken.append(f"{name}={value} ({WHY.get(name, 'usual in this format')})")
    way = "on the command line, first `mpp convert WEIGHTS OUT --to safetensors NAME=VALUE`"
    told = f"the file does not tell {', '.join(guesses)}; guessed: {', '.join(taken)}"
    logger.warning("%s: %s; give what is otherwise as NAME=VALUE (%s)", place, told, way)


def _layout(format: ModuleType, source: Source, facts: dict[str, Any], image: Grid | None) -> Layout:
    """What a file holds. An image asked for is the one that its positions are for where they are of so many patches.

    That is a guess, and said, where they are a square's as well; and not so where a config.json tells their image.
    """
    if image is None:
        return format.layout(source, facts)
    try:
        layout: Layout = format.layout(source, facts)
    except MISFITS:
        return format.layout(source, facts | {"image": image})  # it does not tell
    if source.config or image == layout.config.image:
        return layout
    try:
        asked: Layout = format.layout(source, facts | {"image": image})
    except MISFITS:
        return layout
    if not _fits(source, asked):
        return layout
    if _fits(source, layout) and "positions.table" in layout.encoder:
        way = f"{image[0] // asked.config.patch}x{image[1] // asked.config.patch} patches"
        there = shown(source.path)
        logger.warning("%s: its positions are taken to be for %s, as image= says, and not for a square", there, way)
    return asked


def _fits(source: Source, layout: Layout) -> bool:
    """Whether the table of positions, if there is one, has a row for each patch of the image."""
    with torch.device("meta"):
        own = ViT(layout.config).state_dict()
    _, wrong = found_in(source.tensors, layout.encoder, {name: own[name] for name in own if name == "positions.table"})
    return not wrong


def _head(source: Source, layout: Layout, encoder: ViT) -> Head | None:
    if not layout.head:
        return None

    def units(name: str) -> int:
        if name not in layout.head:
            return 0
        try:
            return len(layout.head[name].read(*(source.tensors[piece] for piece in layout.head[name].names)))
        except MISFITS:
            return 1  # what is wrong with it is named later

    return Head(encoder.width, max(1, units("linear.weight")), units("hidden.weight"))
