"""What files are that no format reads: their names, so that nobody is sent looking for a setting that does not exist.

Asked only where reading has failed, for a file that is read is what its format says.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from mpp.errors import shown
from mpp.weights.files import Source


class Marks:
    """What a file is known by: the ends of its tensors' names, some shapes, and transformers' `model_type`."""

    def __init__(self, source: Source) -> None:
        self.names = [f".{name}" for name in source.tensors]
        self.rows = [t.shape[1] for n, t in source.tensors.items() if n.endswith("position_embeddings") and t.ndim == 3]
        stems = [tensor for name, tensor in source.tensors.items() if name.endswith("patch_embedding.weight")]
        self.flat = any(stem.ndim == 2 for stem in stems)  # whether patches come cut out already
        self.kind = str(source.config.get("model_type"))

    def all(self, *ends: str) -> bool:
        return all(any(name.endswith(f".{end}") for name in self.names) for end in ends)

    def any(self, *parts: str) -> bool:
        return any(part in name for name in self.names for part in parts)


@dataclass(frozen=True)
class Unread:
    """A kind of model that is not read. instead: what of the same kind is."""

    what: str
    fits: Callable[[Marks], bool]
    instead: str = ""


# The first that fits names the file.
KINDS = (
    Unread(
        "DINOv3's ViT or one like it, whose positions are rotary",
        lambda file: (
            file.kind.startswith("dinov3")
            or file.any(".rope_embed.periods", ".storage_tokens", ".rope_embeddings.")
            or (file.all("cls_token", "reg_token", "blocks.0.gamma_1") and not file.all("pos_embed"))
            or (file.all("embeddings.register_tokens", "embeddings.patch_embeddings.weight"))
        ),
    ),
    Unread(
        "BEiT or data2vec, whose positions are relative",
        lambda file: (
            file.kind in ("beit", "data2vec-vision")
            or file.any(".lambda_1")
            or (file.all("blocks.0.gamma_1") and file.any(".relative_position_bias_table"))
            or (file.all("blocks.0.attn.relative_position_bias_table") and not file.any(".layers.0.blocks.0."))
        ),
    ),
    Unread(
        "a distilled DeiT, which has two class tokens",
        lambda file: file.kind == "deit" or file.all("dist_token") or file.any(".distillation_token"),
        "DeiT without distillation is, from timm",
    ),
    Unread(
        "I-JEPA in transformers' names",
        lambda file: (
            file.kind == "ijepa"
            or (
                file.all("embeddings.patch_embeddings.projection.weight")
                and not file.all("embeddings.cls_token")
                and any(math.isqrt(rows) ** 2 == rows for rows in file.rows)  # a ViT that lacks it would have one more
            )
        ),
        "facebookresearch/ijepa's own checkpoints are",
    ),
    Unread(
        "SigLIP 2 for images of any shape (NaFlex)",
        lambda file: file.kind.startswith("siglip2") or file.flat,
        "SigLIP and SigLIP 2 for images of one size are",
    ),
    Unread(
        "a Swin Transformer",
        lambda file: (
            file.kind.startswith("swin")
            or (file.any(".downsample.reduction.") and file.any(".relative_position_bias_table"))
            or file.any(".layers.0.blocks.0.attn.relative_position", ".layers_0.blocks.0.attn.relative_position")
            or file.all("features.1.0.attn.relative_position_bias_table")
            or file.any(".encoder.layers.0.blocks.0.attention.self.relative_position")
        ),
    ),
    Unread("SAM's image encoder, whose positions are relative", lambda file: file.any(".attn.rel_pos_h")),
    Unread(
        "a ViT whose positions are relative", lambda file: file.any(".rel_pos.", ".rel_pos_bias.", ".relative_position")
    ),
    Unread(
        "timm's hybrid of a CNN and a ViT",
        lambda file: file.any(".patch_embed.backbone."),
        "Google's .npz of the R50 hybrids are",
    ),
    Unread(
        "EVA, or another of timm's ViTs whose positions are rotary",
        lambda file: (
            file.all("blocks.0.attn.q_proj.weight", "blocks.0.norm1.weight")
            or file.all("blocks.0.attn.q_bias")
            or file.all("blocks.0.gamma_1")
        ),
    ),
    Unread(
        "torchvision's ViT",
        lambda file: file.all("conv_proj.weight", "class_token") and file.any(".encoder.layers.encoder_layer_0."),
    ),
    Unread(
        "a ViT of vit-pytorch", lambda file: file.any(".to_patch_embedding.") and file.any(".transformer.layers.0.")
    ),
    Unread(
        "a ConvNeXt",
        lambda file: (
            file.kind.startswith("convnext")
            or file.all("stages.0.blocks.0.conv_dw.weight")
            or file.all("downsample_layers.0.0.weight", "stages.0.0.dwconv.weight")
            or file.all("stages.0.layers.0.dwconv.weight")
            or file.all("features.1.0.layer_scale")
        ),
    ),
    Unread(
        "a ResNet",
        lambda file: file.kind == "resnet" or file.all("layer1.0.conv1.weight", "conv1.weight"),
        "mpp's own ResNets are trained here (model.name=resnet)",
    ),
    Unread("timm's ViT with differential attention", lambda file: file.all("blocks.0.attn.lambda_q1")),
    Unread(
        "timm's ViT with parallel blocks",
        lambda file: file.any(".blocks.0.attns.0.") or file.all("blocks.0.in_norm.weight", "blocks.0.in_proj.weight"),
    ),
    Unread("timm's NaFlexViT", lambda file: file.all("embeds.proj.weight", "blocks.0.norm1.weight")),
    Unread("Hiera", lambda file: file.any(".blocks.1.proj.weight", ".blocks.2.proj.weight")),
    Unread("an MLP-Mixer", lambda file: file.all("blocks.0.mlp_tokens.fc1.weight")),
)


def named(source: Source) -> str | None:
    """What a file is, in a sentence, where it is of a kind that is not read; None of any other."""
    marks = Marks(source)
    found = next((kind for kind in KINDS if kind.fits(marks)), None)
    if found is not None:
        return f"holds {found.what}, which is not read" + (f" ({found.instead})" if found.instead else "")
    return None


def model_type(source: Source) -> str | None:
    """transformers' `model_type` in words, where no format knows the tensors."""
    kind = source.config.get("model_type")
    return f"holds transformers' model_type {shown(kind)}, which is not read" if isinstance(kind, str) else None
