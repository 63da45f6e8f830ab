"""The shape of a trunk, what encoders, decoders and predictors have in common. No torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mpp.models.settings import Settings

Grid = tuple[int, int]  # patches, (rows, columns)
MIXER_NAMES = ("attention", "cross", "mlp", "pool", "conv", "identity")
ATTEND = ("attention", "cross")  # mixers in which every token, with a place or without, asks others
ON_GRID = ("mlp", "pool", "conv")  # mixers that work on the grid of patches, all of them, and on these alone
PositionName = Literal[
    "learned", "learned2d", "sincos2d", "sincos2d_mae", "sincos2d_timm", "relative", "rope", "rope_capi", "none"
]
TURNING = ("rope", "rope_capi")  # positions that turn queries and keys


@dataclass(frozen=True)
class TrunkConfig(Settings):
    """The shape of a trunk: sizes, and a choice from two tables (mixers, positions). The defaults are ViT-B's."""

    section: ClassVar[str] = "trunk"
    mixer_names: ClassVar[tuple[str, ...]] = MIXER_NAMES

    width: int = 768
    depth: int = 12  # blocks
    heads: int = 12
    mlp: int | None = None  # hidden units of a block's MLP; 4 * width where not given, 2 / 3 of that with swiglu
    # What passes information between tokens: attention, mlp (MLP-Mixer, 2105.01601), pool (PoolFormer, 2111.11418),
    # conv (depthwise), identity, or in trunks behind an encoder cross (attention to a context, its tokens). Several
    # names share the blocks equally: [pool, attention] pools in the first half.
    mixer: tuple[str, ...] = ("attention",)
    positions: PositionName = "learned"
    resize: Literal["bilinear", "bicubic", "bicubic_antialias", "bicubic_offset"] = "bilinear"  # of learned positions
    class_token: bool | None = None  # whether there is one; where not given, if a ViT's `pool` needs it
    registers: int = 0  # further tokens without a place (arXiv 2309.16588)
    pre_norm: bool = False  # a norm of the tokens with their positions, before the blocks (CLIP, arXiv 2103.00020)
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-6  # flax's default, hence the paper's
    # erf: exact; tanh: the paper's code, which costs 3 times as much on a CPU; quick: x * sigmoid(1.702 x), of CLIP
    gelu: Literal["erf", "tanh", "quick"] = "erf"
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
        section = self.section
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"{section}.width ({self.width}) must be a multiple of {section}.heads ({self.heads})")
        for name, value, most in (
            ("depth", self.depth, 1000),
            ("mlp", self.hidden, 10**6),
            ("width", self.width, 10**6),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"{section}.{name} must be 1 to {most}, got {value}")
        if not 0 <= self.registers <= 1000:
            raise ValueError(f"{section}.registers must be 0 to 1000, got {self.registers}")
        for name in ("norm_eps", "layer_scale"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{section}.{name} must be above 0, got {value}")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{section}.{name} must be in [0, 1), got {getattr(self, name)}")
        self._check_mixers()
        self._check_attention()
        self._check_positions()

    def _check_mixers(self) -> None:
        if unknown := [name for name in self.mixer if name not in self.mixer_names]:
            raise ValueError(f"{self.section}.mixer must be of {', '.join(self.mixer_names)}, got {unknown[0]!r}")
        if not 1 <= len(self.mixer) <= self.depth:
            raise ValueError(
                f"{self.section}.mixer needs 1 to {self.depth} names ({self.section}.depth), got {len(self.mixer)}"
            )

    def _check_attention(self) -> None:
        """Raises ValueError for what works in attention alone, where no block attends."""
        if not self.attends and self.prefix:
            what = "a class token" if self.has_class_token else "registers"
            raise ValueError(f"{what} needs attention in some block; mixer {self.mixer_words} passes it nothing")
        if not self.attends and self.positions in ("relative", *TURNING):
            raise ValueError(
                f"{self.section}.positions {self.positions} work inside attention, "
                f"and {self.section}.mixer is {self.mixer_words}"
            )
        if "cross" in self.mixer and self.positions == "relative":
            raise ValueError(
                f"{self.section}.positions relative know no offsets from a context, "
                f"which {self.section}.mixer cross looks at"
            )

    def _check_positions(self) -> None:
        part = {"learned2d": 2, "sincos2d": 4, "sincos2d_mae": 4, "sincos2d_timm": 4}.get(self.positions, 1)
        named = f"{self.section}.positions {self.positions}"
        if self.width % part:
            raise ValueError(f"{named} needs a {self.section}.width that {part} divides, got {self.width}")
        if self.positions in TURNING and self.head % 4:
            raise ValueError(f"{named} needs heads of a size that 4 divides, got {self.head}")
        if self.positions == "rope_capi" and self.registers % 4:
            raise ValueError(f"{named} needs {self.section}.registers that 4 divides, got {self.registers}")

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
    def mixer_words(self) -> str:
        """The mixers, each once, for messages."""
        return "/".join(dict.fromkeys(self.mixer))

    @property
    def drops(self) -> bool:
        """Whether training leaves anything out."""
        return self.dropout > 0 or self.drop_path > 0

    @property
    def attends(self) -> bool:
        """Whether some block has attention."""
        return any(name in ATTEND for name in self.mixer)

    @property
    def has_class_token(self) -> bool:
        return bool(self.class_token)

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches: the class token, then the registers."""
        return self.has_class_token + self.registers

    @property
    def needs_grid(self) -> str | None:
        """Why the blocks can't do without some of the patches, by setting, or None if they can."""
        needy = [name for name in self.mixer if name in ON_GRID]
        return f"{self.section}.mixer {needy[0]} needs the whole grid" if needy else None

    @property
    def sees_ahead(self) -> str | None:
        """Why a patch can't be kept from seeing those behind it, by setting, or None if it can."""
        free = [name for name in self.mixer if name not in ("attention", "identity")]
        return f"{self.section}.mixer {free[0]} shows a patch what is behind it" if free else None
