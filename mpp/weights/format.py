"""What a format of weights is: where a file keeps each of our tensors, and how the one becomes the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mpp.augment.input import Input
from mpp.errors import shown
from mpp.finite import all_finite, broken, of_kind, same_kind
from mpp.models.vit_config import ViTConfig
from mpp.weights.files import Source, WeightsError

MISFITS = (KeyError, RuntimeError, ValueError, IndexError, TypeError)  # what tensors of another shape cause, or none


@dataclass(frozen=True)
class Part:
    """One of our tensors as a format keeps it: the names of its pieces, and how to put them together and take apart.

    The same table of parts serves reading, writing and the list of what a file lacks.
    """

    names: tuple[str, ...]
    read: Callable[..., Tensor]  # the pieces, in the order of `names`, to our tensor
    write: Callable[[Tensor], Sequence[Tensor]]  # our tensor to the pieces


@dataclass(frozen=True)
class DecoderNames:
    """What a file calls the parts of MAE's decoder, if it holds one."""

    start: str  # of the names of its parts, but for two
    mask_token: str
    blocks: str  # start of those of its blocks, before their numbers
    block: Callable[[str, str], dict[str, Part]]  # a block's parts, by what our names and the file's begin with
    told: Mapping[str, Any] = field(default_factory=dict)  # settings of ours that no tensor tells


@dataclass(frozen=True)
class Layout:
    """What a file of weights holds, by our own names."""

    config: ViTConfig
    encoder: dict[str, Part]  # each tensor of `ViT(config).state_dict()`
    head: dict[str, Part] = field(default_factory=dict)  # of Head: linear.*, hidden.*; none where the file has no head
    classes: tuple[str, ...] = ()  # names of the head's classes
    aside: tuple[str, ...] = ()  # tensors of the file that belong to something else, such as a decoder
    guessed: tuple[str, ...] = ()  # fields of the config that nothing in the file tells, and on which models differ
    input: Input | None = None  # what the encoder is fed, where files say it
    notes: tuple[str, ...] = ()  # what they say of it that is not done here: to be said
    decoder: DecoderNames | None = None  # MAE's, which an encoder by itself leaves aside


def found_in(
    tensors: Mapping[str, Tensor], parts: Mapping[str, Part], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Our tensors, by the names of our `own`, as far as they are there and fit, and what is wrong with the others."""
    found, wrong = {}, []
    for name, ours in own.items():
        pieces = parts[name].names if name in parts else ()  # none as well of a part that needs no tensor
        if name not in parts:
            wrong.append(f"{name} has no place in this format")
        elif missing := [piece for piece in pieces if piece not in tensors]:
            wrong += [f"{piece} missing" for piece in missing]
        elif other := [piece for piece in pieces if not same_kind(tensors[piece], ours)]:
            wrong += [f"{piece}: {of_kind(tensors[piece])}" for piece in other]
        else:
            try:
                value = parts[name].read(*(tensors[piece] for piece in pieces))
            except MISFITS:
                value = torch.empty(0)
            if value.shape == ours.shape:
                found[name] = value
            else:
                shapes = " and ".join(str(tuple(tensors[piece].shape)) for piece in pieces)
                wrong.append(f"{', '.join(pieces)} {shapes} where {tuple(ours.shape)} for {name} was expected")
    return found, wrong


def refuse_not_finite(place: str, own: Mapping[str, Tensor], parts: Mapping[str, Part], source: Source) -> None:
    """Raises WeightsError for the first of our tensors that is not finite, in the file or here alone."""
    for name, tensor in own.items():
        if not all_finite(tensor):
            pieces = [piece for piece in parts[name].names if not all_finite(source.tensors[piece])]
            which, found = (pieces[0], source.tensors[pieces[0]]) if pieces else (name, tensor)
            raise WeightsError(f"{place}: {shown(which)}: {broken(found)}; restore the file, or take an earlier one")


def shape_of(source: Source, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor of the file; ValueError if it is not there or has another number of axes."""
    if name not in source.tensors:
        raise ValueError(f"{name} missing")
    shape = tuple(source.tensors[name].shape)
    if len(shape) != axes:
        raise ValueError(f"{name} {shape} where {axes} axes were expected")
    return shape


def same(name: str) -> Part:
    """A tensor that is kept as ours is."""
    return Part((name,), lambda piece: piece, lambda ours: (ours,))


def row(name: str) -> Part:
    """A vector that is kept with axes of length 1 in front, (1, 1, d)."""
    return Part((name,), lambda piece: piece.reshape(-1), lambda ours: (ours.reshape(1, 1, -1),))


def stacked(*names: str) -> Part:
    """Several maps, each with its own tensor, that are one of ours: queries, keys and values."""
    return Part(names, lambda *pieces: torch.cat(pieces), lambda ours: ours.chunk(len(names)))


def patch_convolution(name: str, patch: int) -> Part:
    """The weight of a linear stem, (d, p * p * c), kept as a convolution's (d, c, p, p)."""
    return Part(
        (name,),
        lambda piece: rearrange(piece, "d c p q -> d (p q c)"),
        lambda ours: (rearrange(ours, "d (p q c) -> d c p q", p=patch, q=patch),),
    )


def joint(count: int) -> tuple[str, ...]:
    """Names of what CLIP's projection gives, as a head: no classes, but places in the space of images and texts."""
    return tuple(f"joint {number}" for number in range(count))


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # openai/CLIP, clip.py
CLIP_EPS = 1e-5  # of its norms, torch's default
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's, of MAE, DINO and CAPI too

# Heads of the published models by (width, depth): ViT paper, table 1; DeiT and AugReg (Ti, S); DINOv2's giant;
# big_vision's mu and So400m (models/vit.py, `decode_variant`);
# timm's own sizes, of which there is one number of heads each (vision_transformer.py).
HEADS = {
    (32, 1): 2,
    (192, 12): 3,
    (256, 10): 4,
    (256, 14): 4,
    (320, 14): 5,
    (384, 12): 6,
    (384, 36): 6,
    (512, 12): 8,
    (512, 20): 8,
    (640, 12): 10,
    (768, 12): 12,
    (832, 21): 13,
    (896, 12): 14,
    (896, 18): 14,
    (1024, 24): 16,
    (1152, 27): 16,
    (1280, 32): 16,
    (1408, 40): 16,
    (1536, 40): 24,
    (1664, 48): 16,
}


def heads_of(width: int, depth: int, facts: dict[str, Any]) -> int:
    """Attention heads, which tensors don't show: from `facts`, or, a guess, of the published model of that size."""
    if "heads" in facts:
        return facts["heads"]
    if (width, depth) not in HEADS:
        found = f"the file does not tell its heads, and none are known here for width {width} and depth {depth}"
        way = "mpp convert WEIGHTS OUT --to safetensors heads=N"
        raise ValueError(f"{found}; say how many heads: heads=N (on the command line, first `{way}`)")
    return HEADS[width, depth]


def sizes_of(source: Source, depth: int, facts: dict[str, Any]) -> dict[str, Any]:
    """What tensors under timm's names tell of an encoder with a class token that was trained on ImageNet's mean."""
    width, channels, patch, _ = shape_of(source, "patch_embed.proj.weight", 4)
    return {
        "image": image_of(shape_of(source, "pos_embed", 3)[1] - 1, patch, facts),
        "channels": channels,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "patch": patch,
        "width": width,
        "depth": depth,
        "heads": heads_of(width, depth, facts),
        "class_token": True,
    }


def image_of(patches: int, patch: int, facts: dict[str, Any]) -> tuple[int, int]:
    """The image (h, w) that a table of positions is for: from `facts`, or a square."""
    if "image" in facts:
        return facts["image"]
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"{patches} positions are no square grid; say for which image: image=(h, w)")
    return side * patch, side * patch
