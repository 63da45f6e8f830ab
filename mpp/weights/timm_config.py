"""What timm's config.json tells about its VisionTransformer beside the tensors, read and written (timm 1.0.31)."""

import math
from typing import Any, Literal

from mpp.augment.input import Filter, Input
from mpp.models.trunk_config import Grid
from mpp.models.vit_config import ViTConfig
from mpp.weights.fed import enlarged, written
from mpp.weights.format import CLIP_EPS

CROP_PCT = 0.875  # timm's data/constants.py, where a config does not say
FILTERS: dict[str, Filter] = {"bilinear": "bilinear", "bicubic": "bicubic"}
FITS: dict[str, Literal["crop", "squeeze"]] = {"center": "crop", "squash": "squeeze"}
POOLS = {"token": "cls", "avg": "avg", "map": "map"}  # timm's names to ours
GELU = {"gelu": "erf", "gelu_tanh": "tanh", "quick_gelu": "quick"}
HALF = (0.5,)  # mean and std of most of its models
# Published models are written as a plain ViT with all its sizes given. SwiGLU can't be asked for in JSON, but this
# architecture has it, and the sizes given replace all the rest of it.
# Nor can epsilons, of which a third has CLIP's.
PLAIN, SWIGLU, CLIP = "vit_base_patch16_224", "vit_giant_patch14_dinov2", "vit_base_patch32_clip_224"
# What the name of an architecture says and neither tensors nor `heads_of` do: the first part of the name that fits.
IMPLIED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("vit_base_patch16_gap_224", {"heads": 16}),
    ("vit_base_patch32_siglip_", {"gelu": "tanh"}),
    ("vit_base_patch16_plus_", {"heads": 14}),
    ("vit_base_patch32_plus_", {"heads": 14}),
    ("vit_betwixt_", {"heads": 10}),
    ("vit_giantopt_patch16_siglip_", {"heads": 16, "gelu": "tanh"}),
    ("vit_large_patch16_siglip_512", {"gelu": "tanh"}),
    ("vit_large_patch16_siglip_gap_512", {"gelu": "tanh"}),
    ("vit_little_", {"heads": 5}),
    ("vit_mediumd_", {"heads": 8}),
    ("vit_small_patch16_36x1_", {"heads": 6}),
    ("vit_so150m2_", {"heads": 13}),
    ("vit_so150m_", {"heads": 14}),
    ("vit_so400m_patch16_siglip_", {"gelu": "tanh"}),
    ("vit_wee_", {"heads": 4}),
    ("vit_xsmall_", {"heads": 4}),
)


class Told:
    """What a config.json of timm says; nothing where another library wrote it or there is none."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config if isinstance(config.get("architecture"), str) else {}
        self.name = self.config.get("architecture", "").split(".")[0]
        self.args = self._section("model_args", {})
        self.pretrained = self._section("pretrained_cfg", self.config)  # in older files these stand in the open
        if "_rpn_" in self.name:
            raise ValueError(f"architecture {self.name} has norms after the branches, which its tensors don't show")

    def _section(self, name: str, otherwise: dict[str, Any]) -> dict[str, Any]:
        found = self.config.get(name, otherwise)
        if not isinstance(found, dict):
            raise ValueError(f"config.json: {name} must be an object, got {found!r}")
        return found

    def implied(self, name: str, argument: str = "") -> dict[str, Any]:
        """A field of ViTConfig, by an argument of the model's if given there, or by its architecture's name."""
        if self.args.get(argument) is not None:
            return {name: self.args[argument]}
        facts = next((facts for start, facts in IMPLIED if self.name.startswith(start)), {})
        return {name: facts[name]} if name in facts else {}

    def gelu(self, swiglu: bool) -> Any:
        name = self.args.get("act_layer")
        if name is None and "_quickgelu_" in self.name:
            return "quick"
        if name is None or (swiglu and name in ("silu", "swish")):
            return self.implied("gelu").get("gelu", "erf")
        if swiglu or name not in GELU:
            raise ValueError(f"act_layer {name!r}, expected {'silu' if swiglu else ' or '.join(GELU)}")
        return GELU[name]

    def norm(self, found: str) -> Any:
        """The norm that the tensors show, unless an argument names one that is neither."""
        name = self.args.get("norm_layer") or found
        if str(name).lower().replace("_", "").removesuffix("fp32").removesuffix("norm") != found:
            raise ValueError(f"norm_layer {name!r}, expected layernorm or rmsnorm")
        return found

    def norm_eps(self, plain: float, clips: float, clip: bool) -> float:
        """Of the norms: that of the architecture, unless an argument names the plain layer; bare files as they look."""
        if self.args.get("norm_layer") is not None:
            return plain
        return clips if "_clip_" in self.name or (clip and not self.name) else plain

    def guessed(self, clip: bool, swiglu: bool) -> tuple[str, ...]:
        """The fields of the config that are not told, and on which published models of the same tensors differ."""
        numbers = tuple(name for name in ("mean", "std") if not self.pretrained.get(name))
        if not self.name:
            return ("heads", "norm_eps", "resize", *(() if swiglu else ("gelu",)), *numbers)
        # timm's weights of OpenAI and others were trained with QuickGELU, which its plain architecture does not have.
        native = clip and "QuickGELU" in str(self.pretrained.get("notes")) and self.gelu(swiglu) != "quick"
        return ("gelu",) * native + numbers

    def pool(self) -> str | None:
        """The encoder's pool, or None where it is not told."""
        name = self.args.get("global_pool", self.config.get("global_pool")) or None
        if name is not None and name not in POOLS:
            raise ValueError(f"global_pool {name!r}, expected {', '.join(POOLS)}")
        return None if name is None else POOLS[name]

    def images(self) -> list[Grid]:
        """Images (h, w) that the positions may be for."""
        sizes = [self.args.get("img_size"), list(self.pretrained.get("input_size") or [])[1:]]
        pairs = [(size, size) if isinstance(size, int) else tuple(size or ()) for size in sizes]
        return [pair for pair in pairs if len(pair) == 2 and all(isinstance(side, int) and side > 0 for side in pair)]

    def numbers(self, name: str, otherwise: tuple[float, ...]) -> tuple[float, ...]:
        """`mean` or `std` of the images, `otherwise` where they are not told."""
        return tuple(float(number) for number in self.pretrained.get(name) or otherwise)

    def fed(self, image: Grid) -> tuple[Input | None, tuple[str, ...]]:
        """What timm feeds the model in evaluation (data/transforms_factory.py), and what of it is not done here."""
        if not self.config:
            return None, ()
        share = self.pretrained.get("crop_pct") or CROP_PCT
        filter = self.pretrained.get("interpolation") or "bicubic"
        mode = self.pretrained.get("crop_mode") or "center"
        if type(share) not in (int, float) or not share > 0:
            raise ValueError(f"config.json: crop_pct must be a number above 0, found {share!r}")
        notes = []
        if filter not in FILTERS:
            notes.append(f"config.json: interpolation {filter} is not done here; bicubic is, in its place")
        if mode not in FITS:
            notes.append(f"config.json: crop_mode {mode} is not done here; center is, in its place")
        if share > 1:
            notes.append(f"config.json: crop_pct {share}, a frame around the picture, is not done here; 1 is")
        return Input(image, min(share, 1.0), FITS.get(mode, "crop"), FILTERS.get(filter, "bicubic")), tuple(notes)

    def classes(self, count: int) -> tuple[str, ...]:
        """The names of the head's classes; none where they are not told, or not of all."""
        names = self.config.get("label_names") or self.pretrained.get("label_names") or self.pretrained.get("labels")
        if isinstance(names, dict):
            names = [names.get(str(number)) for number in range(count)]
        if not isinstance(names, list) or len(names) != count or None in names:
            return ()
        return tuple(str(name) for name in names)


def _crop_pct(side: int, centre: float) -> float:
    """The share by which timm, which cuts off fractions of pixels, enlarges a side as it should be (`enlarged`)."""
    wanted = enlarged(side, centre)
    if math.floor(side / centre) == wanted:
        return centre
    share = side / wanted
    return share if math.floor(side / share) == wanted else math.nextafter(share, 0)


def of_clip(config: ViTConfig) -> bool:
    """Whether an encoder is written as timm's CLIP, which its epsilon asks for; sizes and activation are given too."""
    return config.norm_eps == CLIP_EPS and config.norm == "layer" and not config.swiglu


def about(
    config: ViTConfig, classes: int, names: tuple[str, ...], placed: int, fed: Input | None = None
) -> dict[str, Any]:
    """The config.json of an encoder with a head of so many classes (0 without one).

    fed: timm's `crop_pct` is the same share but for rounding: it resizes pictures, then crops them; we crop first.
    placed: tokens in front of the patches that have a row in `pos_embed`, as in `mpp.weights.timm.parts`.
    """
    fed = fed or Input(config.image)
    told = names and names != tuple(map(str, range(classes)))  # numbers stand in for names
    inner = 2 * config.hidden if config.swiglu else config.hidden
    ratio = inner / config.width
    arguments = {
        "img_size": list(config.image),
        "patch_size": config.patch,
        "in_chans": config.channels,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        # timm cuts off after the point: half a unit more where rounding would cost one
        "mlp_ratio": ratio if int(config.width * ratio) == inner else (inner + 0.5) / config.width,
        "qkv_bias": config.qkv_bias,
        "proj_bias": config.bias,
        "qk_norm": config.qk_norm,
        "init_values": config.layer_scale,
        "class_token": config.has_class_token,
        "reg_tokens": config.registers,
        "pos_embed": "none" if config.positions == "none" else "learn",
        "no_embed_class": placed == 0,
        "global_pool": {"cls": "token", "map": "map"}.get(config.pool, "avg"),
        "fc_norm": config.pool == "avg_norm",
    }
    if config.pre_norm or of_clip(config):
        arguments["pre_norm"] = config.pre_norm
    if not of_clip(config):
        arguments["norm_layer"] = {"layer": "layernorm", "rms": "rmsnorm"}[config.norm]
    if not config.swiglu:
        arguments["act_layer"] = next(name for name, gelu in GELU.items() if gelu == config.gelu)
    pretrained = {
        "input_size": [config.channels, *config.image],
        "fixed_input_size": True,
        "interpolation": fed.filter,
        "crop_pct": _crop_pct(config.image[0], fed.centre),
        "crop_mode": "squash" if fed.fit == "squeeze" else "center",
        "mean": list(config.mean) * (config.channels // len(config.mean)),
        "std": list(config.std) * (config.channels // len(config.std)),
        "num_classes": classes,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return {
        "architecture": SWIGLU if config.swiglu else CLIP if of_clip(config) else PLAIN,
        "num_classes": classes,
        "num_features": config.width,
        "global_pool": arguments["global_pool"],
        **({"label_names": list(names)} if told else {}),
        "model_args": arguments,
        "pretrained_cfg": pretrained,
        **written(fed),
    }
