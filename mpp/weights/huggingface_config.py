"""transformers' config.json and preprocessor_config.json as a ViTConfig, and the other way round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from mpp.models.vit_config import ViTConfig
from mpp.weights.files import Source
from mpp.weights.format import IMAGENET_MEAN, IMAGENET_STD, heads_of, image_of

# Positions that are added to the tokens, which a table can stand for.
ADDED = ("learned", "learned2d", "sincos2d", "sincos2d_mae", "sincos2d_timm", "none")
HALF = (0.5,)  # mean and std of Google's weights
# transformers' activations.py. The first of each is what we write.
GELUS: dict[Literal["erf", "tanh", "quick"], tuple[str, ...]] = {
    "erf": ("gelu", "gelu_python"),
    "tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"),
    "quick": ("quick_gelu",),
}
# Sizes that the tensors show, named as in config.json, and `patches`; each with the tensor that shows it.
Told = dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Family:
    """What transformers takes for granted of a `model_type`."""

    norm_eps: float
    resize: Literal["bicubic", "bicubic_antialias"]
    mean: tuple[float, ...] = IMAGENET_MEAN  # and std: of the published weights, whose images have three channels
    std: tuple[float, ...] = IMAGENET_STD
    hidden_act: str = "gelu"
    dinov2: bool = False
    clip: bool = False


FAMILIES = {
    "vit": Family(1e-12, "bicubic", HALF, HALF),
    "vit_mae": Family(1e-12, "bicubic"),
    "dinov2": Family(1e-6, "bicubic", dinov2=True),
    "dinov2_with_registers": Family(1e-6, "bicubic_antialias", dinov2=True),
}


ARCHITECTURES = {"vit": "ViT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}  # that are written


def config_of(
    source: Source, settings: dict[str, Any], family: Family, told: Told, swiglu: bool, facts: dict[str, Any]
) -> ViTConfig:
    """The encoder's config. settings: config.json, or the section of it that is the encoder's.

    Raises ValueError where config.json contradicts the tensors, or asks for what our encoder has not. Where it is
    silent, or not there, sizes are theirs, and heads those of the published model of that size.
    """

    def size(key: str) -> int:
        value, place = told.get(key, (None, ""))
        given = settings.get(key, value)
        if key == "patch_size":
            given, side = _pair(given, key)
            if given != side:
                raise ValueError(f"config.json: patch_size must be square, found {given, side}")
        if type(given) is not int or given < 1:
            raise ValueError(f"config.json: {key} must be a whole number above 0, found {given!r}")
        if value is not None and given != value:
            raise ValueError(f"config.json: {key} is {given}, but {value} by {place}")
        return given

    width, depth = size("hidden_size"), size("num_hidden_layers")
    patch, channels = size("patch_size"), size("num_channels")
    if "image_size" in settings:
        image = _pair(settings["image_size"], "image_size")
    else:
        image = image_of(told["patches"][0] if "patches" in told else 1, patch, facts)
    if family.dinov2 and image[0] != image[1]:  # it resizes every table as if it were square
        raise ValueError(f"config.json: image_size of DINOv2 must be square, found {image}")
    mean, std = _normalisation(source, family, channels, facts)
    return ViTConfig(
        image=image,
        channels=channels,
        mean=mean,
        std=std,
        patch=patch,
        width=width,
        depth=depth,
        heads=size("num_attention_heads") if "num_attention_heads" in settings else heads_of(width, depth, facts),
        mlp=size("intermediate_size") if "intermediate_size" in settings.keys() | told.keys() else None,
        class_token=True,
        registers=told.get("num_register_tokens", (0, ""))[0],
        resize=family.resize,
        stem_bias=not family.clip,
        pre_norm=family.clip,
        norm_eps=settings.get("layer_norm_eps", family.norm_eps),
        gelu=gelu_of(settings.get("hidden_act", family.hidden_act)),
        swiglu=swiglu,
        qkv_bias=bool(settings.get("qkv_bias", True)),
        layer_scale=1.0 if family.dinov2 else None,  # only a first value: the file has what came of it
    )


def depth_told(tensors: Mapping[str, Tensor], start: str) -> Told:
    """The number of blocks, whose names begin so and go on with the block's number."""
    blocks = {number: name for name in tensors if (number := name.removeprefix(start).partition(".")[0]).isdecimal()}
    if not blocks:
        return {}
    last = max(blocks, key=int)
    return {"num_hidden_layers": (int(last) + 1, blocks[last])}


def _pair(value: Any, key: str) -> tuple[int, int]:
    """A whole number for both sides, or one for each."""
    pair = (value, value) if type(value) is int else value
    if not isinstance(pair, list | tuple) or len(pair) != 2 or any(type(side) is not int or side < 1 for side in pair):
        raise ValueError(f"config.json: {key} must be a whole number above 0 or two, found {value!r}")
    return pair[0], pair[1]


def gelu_of(name: Any) -> Literal["erf", "tanh", "quick"]:
    for gelu, names in GELUS.items():
        if name in names:
            return gelu
    known = ", ".join(name for names in GELUS.values() for name in names)
    raise ValueError(f"config.json: hidden_act must be one of {known}, found {name!r}")


def _normalisation(
    source: Source, family: Family, channels: int, facts: dict[str, Any]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std: those of preprocessor_config.json, or else of the published weights."""
    says = {key: value for key, value in source.preprocessing.items() if value is not None}
    scale = 255 * says.get("rescale_factor", 1 / 255) if says.get("do_rescale", True) else 255
    if abs(scale - 1) > 1e-6 and not {"mean", "std"} <= facts.keys():
        raise ValueError("preprocessor_config.json: expected pixels times 1/255; give mean= and std= of [0, 1]")
    if not says.get("do_normalize", True):
        return (0.0,), (1.0,)
    usual = {"image_mean": family.mean, "image_std": family.std}
    found = (says.get(key, value if channels == 3 else HALF) for key, value in usual.items())
    mean, std = (tuple(map(float, value if isinstance(value, list | tuple) else [value])) for value in found)
    return mean, std


def guessed_in(source: Source, family: Family, swiglu: bool) -> tuple[str, ...]:
    """The fields of the encoder's config that neither file of settings tells. Where config.json is, what it leaves out
    is what transformers takes for granted."""
    says = source.preprocessing
    normalised = says.get("do_normalize", True)
    found = [name for name in ("mean", "std") if normalised and says.get(f"image_{name}") is None]
    if "num_attention_heads" not in source.config:
        found.append("heads")
    if not source.config:
        found += ["norm_eps"] + ["gelu"] * (not swiglu) + ["image"] * (not family.dinov2)
    return tuple(found)


def classes_of(settings: dict[str, Any], count: int) -> tuple[str, ...]:
    """Names of so many classes, in the order of their ids; where there are none, those transformers gives them."""
    labels = settings.get("id2label")
    if labels is None:
        return tuple(f"LABEL_{number}" for number in range(count))
    if not isinstance(labels, dict) or labels.keys() != {str(number) for number in range(count)}:
        raise ValueError(f"config.json: id2label must name classes 0 to {count - 1}, the classifier's rows")
    return tuple(str(labels[str(number)]) for number in range(count))


def mlp_ratio(config: ViTConfig) -> int | None:
    """DINOv2's `mlp_ratio`, a whole number, or None if none gives these hidden units (modeling_dinov2.py)."""
    if not config.swiglu:
        return config.hidden // config.width if config.hidden % config.width == 0 else None
    near = round(1.5 * config.hidden / config.width)
    return next(
        (n for n in (near, near + 1, near - 1) if (config.width * n * 2 // 3 + 7) // 8 * 8 == config.hidden), None
    )


def settings_of(family: str, config: ViTConfig, classes: Sequence[str] | None) -> dict[str, Any]:
    """config.json of a family's ...ForImageClassification, or without classes of its ...Model."""
    settings: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family] + ("Model" if classes is None else "ForImageClassification")],
        "model_type": family,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "hidden_act": GELUS[config.gelu][0],
        "layer_norm_eps": config.norm_eps,
        "image_size": config.image[0] if config.image[0] == config.image[1] else config.image,
        "patch_size": config.patch,
        "num_channels": config.channels,
        "qkv_bias": config.qkv_bias,
    }
    if family != "vit":
        del settings["intermediate_size"]
        settings |= {"mlp_ratio": mlp_ratio(config), "use_swiglu_ffn": config.swiglu}
        settings |= {"layerscale_value": config.layer_scale}
    if config.registers:
        settings["num_register_tokens"] = config.registers
    if classes is not None:
        settings["id2label"] = {str(number): name for number, name in enumerate(classes)}
        settings["label2id"] = {name: number for number, name in enumerate(classes)}
    return settings
