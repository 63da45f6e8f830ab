"""transformers' preprocessor_config.json as what an encoder is fed, and the other way round.

Its processors resize a picture, then crop it; here the box is cut out, then resized. An encoder sees the same but for
the rounding of sizes to whole pixels and the box's edge (docs/weights.md has figures).
"""

from typing import Any, Literal

from mpp.augment.input import Filter, Input
from mpp.models.vit_config import ViTConfig
from mpp.weights.fed import enlarged, written

RESAMPLE: dict[int, Filter] = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
OTHERS = {0: "nearest", 1: "lanczos", 4: "box", 5: "hamming"}
SHORTEST = ("Bit", "CLIP", "ConvNext")  # classes that take a size of one number as the shorter side's
SQUARED_FROM = 384  # pixels: from here on ConvNext's squeezes, below it takes `crop_pct` (image_processing_convnext.py)
Sides = tuple[int, int]
Fit = Literal["crop", "squeeze"]


def input_of(says: dict[str, Any], image: Sides, any_size: bool) -> tuple[Input | None, tuple[str, ...]]:
    """What a processor feeds a model of such images, and what of that is not done here; None where there is none.

    any_size: whether transformers gives the model images of other sizes than its own, as DINOv2.
    """
    if not says:
        return None, ()
    notes: list[str] = []
    number = says.get("resample", 3 if _kind(says).startswith(SHORTEST) else 2)
    if number not in RESAMPLE:
        notes.append(f"resample {OTHERS.get(number, number)} is not done here; bicubic is, in its place")
    fit, share, made, note = _box(says, image)
    notes += [note] if note else []
    if not 0 < share <= 1:
        notes.append("a crop_size larger than size, a frame around the picture, is not done here")
        share = 1.0
    if made != image and not any_size:
        sizes = f"{made[0]}x{made[1]}, the model takes {image[0]}x{image[1]}"
        notes.append(f"it makes images of {sizes}, which are made here")
    fed = Input(made if any_size else image, share, fit, RESAMPLE.get(number, "bicubic"))
    return fed, tuple(f"preprocessor_config.json: {note}" for note in notes)


def _box(says: dict[str, Any], image: Sides) -> tuple[Fit, float, Sides, str]:
    """How the box is cut, its share, the size that images get, and what of that is not done here."""
    cropped = says.get("do_center_crop", says.get("crop_size") is not None)
    crop = _sides(says.get("crop_size", 224)) if cropped else None
    if not says.get("do_resize", True):
        return "crop", 1.0, crop or image, "pictures are not resized there; here they are, to the encoder's size"
    size = says.get("size") or {"height": image[0], "width": image[1]}
    edge = size.get("shortest_edge") if isinstance(size, dict) else None
    if type(size) is int and _kind(says).startswith(SHORTEST):
        edge = size
    if edge is None:
        sides = _sides(size)
        return "squeeze", max(crop[0] / sides[0], crop[1] / sides[1]) if crop else 1.0, crop or sides, ""
    short, _ = _sides(edge)
    if _kind(says).startswith("ConvNext"):
        share = float(says.get("crop_pct") or 224 / 256)
        return ("crop", share, (short, short), "") if short < SQUARED_FROM else ("squeeze", 1.0, (short, short), "")
    if crop is None:
        return "crop", 1.0, (short, short), "pictures that are not square stay so there; here their centre is cut out"
    return "crop", min(crop) / short, crop, ""


def _kind(says: dict[str, Any]) -> str:
    return str(says.get("image_processor_type") or says.get("feature_extractor_type") or "")


def _sides(size: Any) -> Sides:
    """(h, w) pixels of a number for both or of a dictionary."""
    tall, wide = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    if type(tall) is not int or type(wide) is not int or min(tall, wide) < 1:
        found = f"expected a size of height and width, or shortest_edge, found {size!r}"
        raise ValueError(f"preprocessor_config.json: {found}")
    return tall, wide


def croppable(fed: Input) -> bool:
    """Whether transformers can cut out the box: by the shorter side of pictures, and so for square images alone."""
    return fed.fit == "squeeze" or fed.image[0] == fed.image[1]


def preprocessing_of(config: ViTConfig, fed: Input) -> dict[str, Any]:
    """preprocessor_config.json. For images that are not square pictures are squeezed: see `croppable`."""
    mean, std = (value * config.channels if len(value) == 1 else value for value in (config.mean, config.std))
    (height, width), share = fed.image, fed.centre
    size = {"height": enlarged(height, share), "width": enlarged(width, share)}
    cropped = fed.fit == "crop" and croppable(fed)
    crops = {
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_convert_rgb": config.channels == 3,
    }
    return {
        **written(fed),
        "image_processor_type": "BitImageProcessor" if cropped or share < 1 else "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size["height"]} if cropped else size,
        "resample": next(number for number, filter in RESAMPLE.items() if filter == fed.filter),
        **(crops if cropped or share < 1 else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
