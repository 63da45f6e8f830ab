"""The shape of a Vision Transformer: sizes, and a choice from each of four tables (stems, mixers, positions, pools)."""

from dataclasses import dataclass
from typing import Literal

from mpp.models.encoder import EncoderConfig

Grid = tuple[int, int]  # patches, (rows, columns)
MIXER_NAMES = ("attention", "mlp", "pool", "conv", "identity")
ON_GRID = ("mlp", "pool", "conv")  # mixers that work on the grid of patches, all of them, and on these alone
RESNET_WIDTH = 64  # channels of the hybrid stem's first convolution; its first stage gives four times as many


@dataclass(frozen=True)
class ViTConfig(EncoderConfig):
    """The shape of an encoder. The defaults are the paper's ViT-B/16 (table 1)."""

    name: str = "vit"
    patch: int = 16  # side, pixels
    width: int = 768
    depth: int = 12  # blocks
    heads: int = 12
    mlp: int | None = None  # hidden units of a block's MLP; 4 * width where not given, 2 / 3 of that with swiglu
    # linear: one map of a patch's pixels; overlap: of a window of 2 * patch - 1 (arXiv 2106.13797); conv: convolutions
    # of stride 2 (2106.14881); hybrid: a ResNet with group norm and weight standardisation (ViT paper, section 3.1)
    stem: Literal["linear", "overlap", "conv", "hybrid"] = "linear"
    stages: tuple[int, ...] = (3, 4, 9)  # units of each stage of the hybrid stem's ResNet: R50 of the paper
    # What passes information between tokens: attention, mlp (MLP-Mixer, 2105.01601), pool (PoolFormer, 2111.11418),
    # conv (depthwise) or identity. Several names share the blocks equally: [pool, attention] pools in the first half.
    mixer: tuple[str, ...] = ("attention",)
    positions: Literal[
        "learned", "learned2d", "sincos2d", "sincos2d_mae", "sincos2d_timm", "relative", "rope", "rope_capi", "none"
    ] = "learned"
    resize: Literal["bilinear", "bicubic", "bicubic_antialias", "bicubic_offset"] = "bilinear"  # of learned positions
    pool: Literal["cls", "avg", "avg_norm", "map"] = "cls"  # avg: of the normalised patches; avg_norm: then normalised
    class_token: bool | None = None  # whether there is one; where not given, if `pool` needs it
    registers: int = 0  # further tokens without a place (arXiv 2309.16588)
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-6  # flax's default, hence the paper's
    gelu: Literal["erf", "tanh"] = "erf"  # the paper's code computes tanh, which costs 3 times as much on a CPU
    swiglu: bool = False  # silu(gate) * value in the place of gelu (arXiv 2002.05202)
    qkv_bias: bool = True
    bias: bool = True  # of the blocks' other linear layers
    qk_norm: bool = False  # normalise each head's queries and keys (arXiv 2302.05442)
    layer_scale: float | None = None  # first value of a factor for each channel of a branch (arXiv 2103.17239)
    dropout: float = 0.0  # after positions and after every linear layer but q, k, v (ViT paper, appendix B.1)
    drop_path: float = 0.0  # chance that the last block's branches leave out an image; falls linearly to 0 at the first

    def __post_init__(self) -> None:
        if isinstance(self.mixer, str):
            object.__setattr__(self, "mixer", (self.mixer,))
        super().__post_init__()
        height, width = self.image
        if self.patch < 1 or height % self.patch or width % self.patch or min(height, width) < self.patch:
            raise ValueError(f"model.image ({height}, {width}) must be a multiple of model.patch ({self.patch})")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"model.width ({self.width}) must be a multiple of model.heads ({self.heads})")
        for name, most in {"depth": 1000, "hidden": 10**6, "width": 10**6}.items():
            if not 1 <= getattr(self, name) <= most:
                name_in_recipe = "mlp" if name == "hidden" else name
                raise ValueError(f"model.{name_in_recipe} must be 1 to {most}, got {getattr(self, name)}")
        if not 0 <= self.registers <= 1000:
            raise ValueError(f"model.registers must be 0 to 1000, got {self.registers}")
        for name in ("norm_eps", "layer_scale"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"model.{name} must be above 0, got {value}")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be in [0, 1), got {getattr(self, name)}")
        self._check_mixers()
        self._check_stem()
        self._check_positions()

    def _check_mixers(self) -> None:
        if unknown := [name for name in self.mixer if name not in MIXER_NAMES]:
            raise ValueError(f"model.mixer must be of {', '.join(MIXER_NAMES)}, got {unknown[0]!r}")
        if not 1 <= len(self.mixer) <= self.depth:
            raise ValueError(f"model.mixer needs 1 to {self.depth} names (model.depth), got {len(self.mixer)}")
        if self.pool == "cls" and self.class_token is False:
            raise ValueError("model.pool cls needs model.class_token")
        if "attention" in self.mixer:
            return
        names = "/".join(dict.fromkeys(self.mixer))
        if self.prefix:
            what = "model.pool cls" if self.pool == "cls" else "a class token" if self.has_class_token else "registers"
            raise ValueError(
                f"{what} needs attention in some block; mixer {names} passes it nothing; take model.pool avg"
            )
        if self.positions in ("relative", "rope", "rope_capi"):
            raise ValueError(f"model.positions {self.positions} work inside attention, and model.mixer is {names}")

    def _check_stem(self) -> None:
        if self.stem == "conv":
            if self.patch < 2 or self.patch & (self.patch - 1):
                raise ValueError(f"model.stem conv needs a model.patch of 2, 4, 8, 16, ..., got {self.patch}")
            if self.grid == (1, 1):  # nothing is left for group norm to norm
                raise ValueError(f"model.stem conv needs more than one patch, got model.image {self.image}")
            if self.width % (self.patch // 2):
                raise ValueError(
                    f"model.stem conv needs a model.width that {self.patch // 2} divides, got {self.width}"
                )
        if self.stem == "hybrid":
            if any(not 1 <= units <= 1000 for units in self.stages):
                raise ValueError(f"model.stages must be 1 to 1000 each, got {self.stages}")
            if self.patch % self.resnet_stride:
                raise ValueError(
                    f"model.stem hybrid with {len(self.stages)} stages has stride {self.resnet_stride}, "
                    f"of which model.patch must be a multiple, got {self.patch}"
                )

    def _check_positions(self) -> None:
        part = {"learned2d": 2, "sincos2d": 4, "sincos2d_mae": 4, "sincos2d_timm": 4}.get(self.positions, 1)
        if self.width % part:
            raise ValueError(
                f"model.positions {self.positions} needs a model.width that {part} divides, got {self.width}"
            )
        if self.positions in ("rope", "rope_capi") and self.width // self.heads % 4:
            raise ValueError(f"model.positions {self.positions} needs heads of a size that 4 divides, got {self.head}")
        if self.positions == "rope_capi" and self.registers % 4:
            raise ValueError(f"model.positions rope_capi needs model.registers that 4 divides, got {self.registers}")

    def describe(self) -> str:
        words = [f"patch {self.patch}", f"width {self.width}", f"depth {self.depth}"]
        words += [f"{self.heads} heads"] if "attention" in self.mixer else []
        words += [f"{self.stem} stem"] if self.stem != "linear" else []
        words += [f"mixer {'/'.join(self.mixer)}"] if self.mixer != ("attention",) else []
        return ", ".join(["ViT", *words])

    @property
    def grid(self) -> Grid:
        """Patches, (rows, columns)."""
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def head(self) -> int:
        """Channels of an attention head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Hidden units of a block's MLP; of swiglu, gate and value have as many each (DINOv2's rounding)."""
        if self.mlp is not None:
            return self.mlp
        return (8 * self.width // 3 + 7) // 8 * 8 if self.swiglu else 4 * self.width

    @property
    def mixers(self) -> tuple[str, ...]:
        """The mixer of each block."""
        return tuple(self.mixer[block * len(self.mixer) // self.depth] for block in range(self.depth))

    @property
    def has_class_token(self) -> bool:
        return self.pool == "cls" if self.class_token is None else self.class_token

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches: the class token, then the registers."""
        return self.has_class_token + self.registers

    @property
    def resnet_stride(self) -> int:
        """Pixels between the places of the hybrid stem's last map."""
        return resnet_stride(self.stages)


def resnet_stride(stages: tuple[int, ...]) -> int:
    """Pixels between the places of the last map of a ResNet's stages: 4 of its root, and 2 of each but the first."""
    return 4 * 2 ** max(0, len(stages) - 1)
