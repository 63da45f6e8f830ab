"""Folders of Hugging Face's transformers: ViT, ViTMAE, DINOv2 without and with registers; written as ViT or DINOv2.

The image towers of CLIP stand in huggingface_clip.py.

Pooler (`pooler.dense`, a tanh layer behind the class token: Google's pre-logits), mask token and decoders are left
aside. DINOv2's classifier takes class token and average of the patches, our pool `cls_avg`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from mpp.jsons import encoded
from mpp.models.classifier import Head
from mpp.models.trunk_config import TrunkConfig
from mpp.models.vit import ViT
from mpp.models.vit_config import ViTConfig
from mpp.weights import huggingface_clip
from mpp.weights.files import Source
from mpp.weights.format import DecoderNames, Layout, Part, patch_convolution, row, same, stacked
from mpp.weights.huggingface_config import (
    ADDED,
    FAMILIES,
    Family,
    Told,
    classes_of,
    config_of,
    depth_told,
    gelu_of,
    guessed_in,
    mlp_ratio,
    settings_of,
)
from mpp.weights.huggingface_input import croppable, input_of, preprocessing_of

NAME = "huggingface"
CLASS_TOKEN, TABLE = "embeddings.cls_token", "embeddings.position_embeddings"
PROJECTION = "embeddings.patch_embeddings.projection"
REGISTERS = "embeddings.register_tokens"
BOTH = ("weight", "bias")
# Every name that a part of a block has had: in files of ViT and ViTMAE, whatever release up to 5.23 wrote them; then in
# those of DINOv2; then in the modules of release 5, whose state_dict() one may have saved oneself.
BLOCKS = ("encoder.layer", "layers")
# Start of the names of the blocks of MAE's decoder; the latter in what release 5.24 saves, which renames any "layers".
DECODER_BLOCKS = ("decoder.decoder_layers.", "decoder.decoder_encoder.layer.")
NAMES = {
    "norm1": ("layernorm_before", "norm1"),
    "query": ("attention.attention.query", "attention.q_proj"),
    "key": ("attention.attention.key", "attention.k_proj"),
    "value": ("attention.attention.value", "attention.v_proj"),
    "project": ("attention.output.dense", "attention.o_proj"),
    "norm2": ("layernorm_after", "norm2"),
    "expand": ("intermediate.dense", "mlp.fc1", "mlp.weights_in", "mlp.gate_proj"),
    "contract": ("output.dense", "mlp.fc2", "mlp.weights_out", "mlp.down_proj"),
}
WHOLE, GATE, VALUE = "mlp.weights_in", "mlp.gate_proj", "mlp.up_proj"  # of SwiGLU: one map, or its halves


@dataclass(frozen=True)
class Names:
    """What a file calls the parts of the encoder; by default as ViTModel's files do."""

    prefix: str = ""  # of all: "vit." in a classifier
    blocks: str = BLOCKS[0]
    parts: Mapping[str, str] = field(default_factory=lambda: {part: names[0] for part, names in NAMES.items()})

    @property
    def swiglu(self) -> bool:
        return self.parts["expand"] in (WHOLE, GATE)


def recognises(source: Source) -> bool:
    """Whether config.json or the tensors' names are transformers'; `layout` refuses models that are not of FAMILIES."""
    marks = (f"{PROJECTION}.weight", TABLE)
    return str(source.config.get("model_type")) in FAMILIES or any(name.endswith(marks) for name in source.tensors)


def layout(source: Source, facts: dict[str, Any]) -> Layout:
    """What the folder holds. Without config.json, sizes are the tensors' and all else is the published models'."""
    tensors, kind, names = source.tensors, _kind(source), _names(source.tensors)
    family, told = FAMILIES[kind], _told(source.tensors, names)
    config = config_of(source, source.config, family, told, names.swiglu, facts)
    head: dict[str, Part] = {}
    classes: tuple[str, ...] = ()
    rows = [len(tensors[f"classifier.{w}"]) for w in BOTH if f"classifier.{w}" in tensors]
    if rows and family.dinov2:
        config = replace(config, pool=facts.get("pool", "cls_avg"))
    if rows and (config.pool == "cls_avg" or not family.dinov2):
        head, classes = _head(), classes_of(source.config, rows[0])
    known = {f"{names.prefix}pooler.dense.{w}" for w in BOTH} | {f"{names.prefix}embeddings.mask_token"}
    known |= {f"classifier.{w}" for w in BOTH if not head}
    aside = tuple(name for name in tensors if name in known or name.startswith("decoder."))
    fed, notes = input_of(source.preprocessing, config.image, family.dinov2)
    guessed = guessed_in(source, family, names.swiglu)
    decoder = _decoder(source, family) if kind == "vit_mae" else None
    return Layout(config, parts(config, names), head, classes, aside, guessed, fed, notes, decoder)


def parts(config: ViTConfig, names: Names | None = None) -> dict[str, Part]:
    """Where each tensor of an encoder is."""
    names = names or Names()
    found = {
        "class_token": row(CLASS_TOKEN),
        "stem.project.weight": patch_convolution(f"{PROJECTION}.weight", config.patch),
        "stem.project.bias": same(f"{PROJECTION}.bias"),
        "positions.table": _rows(TABLE),
    }
    if config.registers:
        found["registers"] = _rows(REGISTERS)
    for number in range(config.depth):
        found |= of_block(f"blocks.{number}.", f"{names.blocks}.{number}.", config, names)
    found |= {f"norm.{w}": same(f"layernorm.{w}") for w in BOTH}
    prefix = names.prefix
    return {ours: replace(part, names=tuple(prefix + name for name in part.names)) for ours, part in found.items()}


def of_block(ours: str, theirs: str, config: TrunkConfig, names: Names) -> dict[str, Part]:
    """Where each tensor of a block is, by what our names and theirs begin with."""
    at = {part: f"{theirs}{name}" for part, name in names.parts.items()}
    expand = (at["expand"], f"{theirs}{VALUE}") if names.parts["expand"] == GATE else (at["expand"],)
    found = {}
    for w in BOTH:
        found[f"{ours}norm1.{w}"] = same(f"{at['norm1']}.{w}")
        if w == "weight" or config.qkv_bias:
            found[f"{ours}mixer.qkv.{w}"] = stacked(*(f"{at[part]}.{w}" for part in ("query", "key", "value")))
        found[f"{ours}mixer.project.{w}"] = same(f"{at['project']}.{w}")
        found[f"{ours}norm2.{w}"] = same(f"{at['norm2']}.{w}")
        found[f"{ours}mlp.expand.{w}"] = stacked(*(f"{half}.{w}" for half in expand))
        found[f"{ours}mlp.contract.{w}"] = same(f"{at['contract']}.{w}")
    if config.layer_scale is not None:
        found |= {f"{ours}scale{branch}": same(f"{theirs}layer_scale{branch}.lambda1") for branch in (1, 2)}
    return found


def _decoder(source: Source, family: Family) -> DecoderNames:
    """What ViTMAEForPreTraining's files call the decoder. Its epsilon is the encoder's; heads are told beside alone."""
    tensors = source.tensors
    blocks = next((b for b in DECODER_BLOCKS if any(name.startswith(b) for name in tensors)), DECODER_BLOCKS[0])
    # The names of its blocks' parts, whatever release wrote them, are looked up as if it were an encoder.
    parts = {name.removeprefix(blocks): value for name, value in tensors.items() if name.startswith(blocks)}
    names = _names({f"{BLOCKS[0]}.{name}": value for name, value in parts.items()})
    told: dict[str, Any] = {"norm_eps": source.config.get("layer_norm_eps", family.norm_eps)}
    if "decoder_num_attention_heads" in source.config:
        told["heads"] = source.config["decoder_num_attention_heads"]
    if "hidden_act" in source.config:
        told["gelu"] = gelu_of(source.config["hidden_act"])

    def block(ours: str, theirs: str) -> dict[str, Part]:
        return of_block(ours, theirs, TrunkConfig(), names)

    return DecoderNames("decoder.decoder_", "decoder.mask_token", blocks, block, told)


def _head() -> dict[str, Part]:
    return {f"linear.{w}": same(f"classifier.{w}") for w in BOTH}


def _rows(name: str) -> Part:
    """The vectors of several tokens, (n, d), kept as (1, n, d)."""
    return Part((name,), lambda piece: piece.flatten(0, 1), lambda ours: (ours.unsqueeze(0),))


def _kind(source: Source) -> str:
    """The `model_type`; without config.json the tensors', which tell ViTMAE from ViT by its decoder alone."""
    kind = source.config.get("model_type")
    if kind is None:
        registers = any(name.endswith(REGISTERS) for name in source.tensors)
        scaled = any(name.endswith(".lambda1") for name in source.tensors)
        masked = any(name.startswith("decoder.decoder_") for name in source.tensors)
        kind = "dinov2_with_registers" if registers else "dinov2" if scaled else "vit_mae" if masked else "vit"
    if str(kind) not in FAMILIES:
        raise ValueError(f"config.json: model_type must be one of {', '.join(FAMILIES)}, found {kind!r}")
    return kind


def _names(tensors: Mapping[str, Tensor]) -> Names:
    """The names that the file uses; of what it lacks, those of ViT's files."""
    marks = (f"{PROJECTION}.weight", TABLE, CLASS_TOKEN)
    prefix = next((name.removesuffix(mark) for name in tensors for mark in marks if name.endswith(mark)), "")
    blocks = next((b for b in BLOCKS if any(name.startswith(f"{prefix}{b}.") for name in tensors)), BLOCKS[0])
    start = f"{prefix}{blocks}."
    # of "vit.encoder.layer.3.output.dense.bias" that is "output.dense"
    used = {name.removeprefix(start).partition(".")[2].rpartition(".")[0] for name in tensors if name.startswith(start)}
    chosen = {part: next((name for name in known if name in used), known[0]) for part, known in NAMES.items()}
    return Names(prefix, blocks, chosen)


def _told(tensors: Mapping[str, Tensor], names: Names) -> Told:
    """What the tensors show of sizes, as far as they are there."""
    start = f"{names.prefix}{names.blocks}."
    told = depth_told(tensors, start)
    expand = names.parts["expand"]
    for name, axes in {
        f"{names.prefix}{PROJECTION}.weight": {0: "hidden_size", 1: "num_channels", 2: "patch_size"},
        f"{names.prefix}{TABLE}": {1: "patches"},
        f"{names.prefix}{REGISTERS}": {1: "num_register_tokens"},
        f"{start}0.{expand}.weight": {0: "intermediate_size"},
    }.items():
        shape = tensors[name].shape if name in tensors else ()
        told |= {key: (shape[axis], name) for axis, key in axes.items() if axis < len(shape)}
    if "patches" in told:
        told["patches"] = told["patches"][0] - 1, told["patches"][1]  # without the class token's row
    if expand == WHOLE and "intermediate_size" in told:
        told["intermediate_size"] = told["intermediate_size"][0] // 2, told["intermediate_size"][1]
    return told


def write(encoder: ViT, head: Head | None, classes: tuple[str, ...]) -> dict[str, bytes]:
    """The files of a folder: of a ViTForImageClassification with a head, of a ViTModel without pooler otherwise.

    An encoder with LayerScale or the pool `cls_avg` is written as a Dinov2ForImageClassification or Dinov2Model, with
    registers where it has some. ValueError names what transformers' cannot hold. Positions that are added to the tokens
    become a learned table. transformers resizes that bicubically, with registers with antialias, which gives our
    numbers for `resize: bicubic` or `bicubic_antialias`; of others, and of fixed positions, the numbers are ours for
    images of the encoder's own size. With a norm before the blocks it is a CLIP (huggingface_clip.py).
    """
    if encoder.config.pre_norm:
        return huggingface_clip.write(encoder, head, classes)
    family = _refuse(encoder.config, head)
    positions, patches = encoder.positions, encoder.tokens - encoder.prefix
    table = [positions.class_token()[None], positions.patches(encoder.config.grid).expand(patches, -1)]
    ours = {**encoder.state_dict(), "positions.table": torch.cat(table).detach()}
    found, labels = parts(encoder.config, _names_of(family, encoder.config, head)), None
    if head is not None:
        labels = classes or classes_of({}, head.linear.out_features)
        ours |= {f"head.{name}": value for name, value in head.state_dict().items()}
        found |= {f"head.{name}": part for name, part in _head().items()}
    tensors: dict[str, Tensor] = {}
    for name, part in found.items():
        pieces = (piece.float().cpu().clone(memory_format=torch.contiguous_format) for piece in part.write(ours[name]))
        tensors |= dict(zip(part.names, pieces, strict=True))
    if family != "vit":  # only pretraining uses it, but without one transformers draws it anew and warns
        tensors[f"{_prefix(family, head)}embeddings.mask_token"] = torch.zeros(1, encoder.config.width)
    return {
        "config.json": _json(settings_of(family, encoder.config, labels)),
        "preprocessor_config.json": _json(preprocessing_of(encoder.config, encoder.input)),
        "model.safetensors": save(tensors, {"format": "pt"}),  # release 4 asks for it
    }


def _json(values: dict[str, Any]) -> bytes:
    return encoded(values, indent=2, ensure_ascii=False)


def family_of(config: ViTConfig) -> str:
    """The `model_type` that an encoder is written as, if it can be."""
    if config.layer_scale is None and config.pool != "cls_avg":
        return "vit"
    return "dinov2_with_registers" if config.registers else "dinov2"


def _prefix(family: str, head: Head | None) -> str:
    return "" if head is None else f"{family}."


def _names_of(family: str, config: ViTConfig, head: Head | None) -> Names:
    """The names in the files of a family, as transformers itself writes them."""
    if family == "vit":
        return Names(_prefix(family, head))
    mlp = (
        {"expand": WHOLE, "contract": "mlp.weights_out"}
        if config.swiglu
        else {"expand": "mlp.fc1", "contract": "mlp.fc2"}
    )
    return Names(_prefix(family, head), parts={**Names().parts, "norm1": "norm1", "norm2": "norm2", **mlp})


def _refuse(config: ViTConfig, head: Head | None) -> str:
    """The family that an encoder is written as. Raises ValueError with all that this one has no place for."""
    family, plain = family_of(config), ViTConfig()
    dinov2 = family != "vit"
    fields = ["stem", "stem_bias", "norm", "bias", "qk_norm"] + ([] if dinov2 else ["pool", "registers", "swiglu"])
    wrong = [f"{name} {value}" for name in fields if (value := getattr(config, name)) != getattr(plain, name)]
    if dinov2:
        pool = "cls" if head is None else "cls_avg"
        if config.pool != pool:
            wrong.append(f"pool {config.pool} {'without' if head is None else 'with'} a head (it has {pool})")
        if config.layer_scale is None:
            wrong.append("layer_scale None")
        if config.image[0] != config.image[1]:
            wrong.append(f"image {config.image}, which is not square")
        if mlp_ratio(config) is None:
            whole = "a whole multiple of the width" + (" times two thirds" if config.swiglu else "")
            wrong.append(f"mlp {config.hidden}, which is not {whole}")
    if set(config.mixer) != {"attention"}:
        wrong.append(f"mixer {'/'.join(config.mixer)}")
    if config.positions not in ADDED:
        wrong.append(f"positions {config.positions}")
    if head is not None and head.hidden is not None:
        wrong.append(f"head.hidden {head.hidden.out_features}")
    if wrong:
        raise ValueError(f"transformers' {'DINOv2' if dinov2 else 'ViT'} cannot hold {', '.join(wrong)}")
    return family


def usage(encoder: ViT, head: Head | None) -> str:
    """Python that loads the folder in transformers and computes what our encoder, or classifier, does."""
    config = encoder.config
    if config.pre_norm:
        return huggingface_clip.usage(encoder, head)
    size = f"{config.image[0]}x{config.image[1]}"
    mode = {1: '.convert("L")', 3: '.convert("RGB")'}.get(config.channels, "")
    kind, options, output = "ViTModel", ", add_pooling_layer=False", "last_hidden_state[:, 0]  # (1, width)"
    family = family_of(config)
    if family != "vit":
        kind, options = "Dinov2WithRegistersModel" if config.registers else "Dinov2Model", ""
    if head is not None:
        kind, options = kind.replace("Model", "ForImageClassification"), ""
        output = "logits  # (1, classes)"
    resizes = "makes" if croppable(encoder.input) else "squeezes every picture, which mpp crops, to"
    if family != "vit" and config.positions == "learned" and config.resize == FAMILIES[family].resize:
        other = "# Other sizes, multiples of the patch, need nothing else."
    elif config.image[0] != config.image[1]:
        other = f"# It takes pictures of {size} alone: transformers resizes positions of square ones only."
    elif family == "vit" and config.positions == "learned" and config.resize == "bicubic":
        other = "# Other sizes, multiples of the patch: model(pixels, interpolate_pos_encoding=True)."
    else:
        other = f"# Elsewhere than at {size} transformers resizes positions in its own way: other numbers than mpp's."
    return f"""\
import torch
from PIL import Image
from transformers import AutoImageProcessor, {kind}

folder = "."  # where this file is, or its name on the Hub
model = {kind}.from_pretrained(folder{options}).eval()
processor = AutoImageProcessor.from_pretrained(folder)  # {resizes} {size}
pixels = processor(Image.open("picture.jpg"){mode}, return_tensors="pt")["pixel_values"]
with torch.inference_mode():
    output = model(pixels).{output}
{other}
"""
