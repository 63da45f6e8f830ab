"""The shape of a Vision Transformer: a trunk's, and a choice from two more tables (stems, pools). No torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mpp.models.encoder_config import EncoderConfig
from mpp.models.trunk_config import MIXER_NAMES, Grid, TrunkConfig

OVERLAPPING = ("overlap", "conv", "hybrid")  # stems that show a token pixels of other patches than its own
OF_CLASS_TOKEN = ("cls", "cls_avg")  # pools that look at it
RESNET_GROUPS = 32  # of the hybrid stem's group norms (flax's default)


@dataclass(frozen=True)
class ViTConfig(TrunkConfig, EncoderConfig):
    """The shape of an encoder. The defaults are the paper's ViT-B/16 (table 1)."""

    section: ClassVar[str] = "model"
    mixer_names: ClassVar[tuple[str, ...]] = tuple(name for name in MIXER_NAMES if name != "cross")

    name: str = "vit"
    patch: int = 16  # side, pixels
    # linear: one map of a patch's pixels; overlap: of a window of 2 * patch - 1 (arXiv 2106.13797); conv: convolutions
    # of stride 2 (2106.14881); hybrid: a ResNet with group norm and weight standardisation (ViT paper, section 3.1)
    stem: Literal["linear", "overlap", "conv", "hybrid"] = "linear"
    stem_bias: bool = True  # of the stem's last map; CLIP has none, as its norm before the blocks (pre_norm) follows
    stages: tuple[int, ...] = (3, 4, 9)  # units of each stage of the hybrid stem's ResNet: R50 of the paper
    stem_width: int = 64  # channels of the hybrid stem's first convolution; its first stage gives four times as many
    # avg: of the normalised patches; avg_norm: then normalised; cls_avg: class token and average, one behind the other
    pool: Literal["cls", "avg", "avg_norm", "cls_avg", "map"] = "cls"
    causal: bool = False  # each patch sees itself and those before it alone, in every pass: iGPT's encoder

    def __post_init__(self) -> None:
        super().__post_init__()
        height, width = self.image
        if self.patch < 1 or height % self.patch or width % self.patch or min(height, width) < self.patch:
            raise ValueError(f"model.image ({height}, {width}) must be a multiple of model.patch ({self.patch})")
        self._check_stem()
        if self.causal and self.unordered:
            raise ValueError(f"model.causal shows a patch those before it alone, and {self.unordered}")
        if self.causal and self.pool in OF_CLASS_TOKEN:
            raise ValueError(
                f"model.causal shows a class token no patch, and model.pool {self.pool} reads it; take avg or map"
            )

    def _check_mixers(self) -> None:
        if "cross" in self.mixer:
            raise ValueError("model.mixer cross looks at the tokens of an encoder, which is no part of one itself")
        super()._check_mixers()

    def _check_attention(self) -> None:
        if self.pool in OF_CLASS_TOKEN and self.class_token is False:
            raise ValueError(f"model.pool {self.pool} needs model.class_token")
        if self.pool in OF_CLASS_TOKEN and not self.attends:
            raise ValueError(
                f"model.pool {self.pool} needs attention in some block; mixer {self.mixer_words} passes it nothing; "
                "take model.pool avg"
            )
        super()._check_attention()

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
            if not 1 <= self.stem_width <= 10**4 or self.stem_width % RESNET_GROUPS:
                raise ValueError(f"model.stem_width must be a multiple of {RESNET_GROUPS}, got {self.stem_width}")
            if self.patch % self.resnet_stride:
                raise ValueError(
                    f"model.stem hybrid with {len(self.stages)} stages has stride {self.resnet_stride}, "
                    f"of which model.patch must be a multiple, got {self.patch}"
                )

    def check_image(self, image: tuple[int, int]) -> None:
        super().check_image(image)
        if "mlp" in self.mixer and image != self.image:
            raise ValueError(f"model.mixer mlp has weights for images of {self.image} alone, got {image}")

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
    def has_class_token(self) -> bool:
        return self.pool in OF_CLASS_TOKEN if self.class_token is None else self.class_token

    @property
    def vector(self) -> int:
        """Numbers of the vector that an image becomes."""
        return 2 * self.width if self.pool == "cls_avg" else self.width

    @property
    def undroppable(self) -> str | None:
        """Why the encoder can't do without some of the patches, by setting, or None if it can."""
        return self.needs_grid or self._overlaps

    @property
    def unordered(self) -> str | None:
        """Why a token can't be kept from knowing of the patches behind it, by setting, or None if it can."""
        return self.sees_ahead or self._overlaps

    @property
    def _overlaps(self) -> str | None:
        overlaps = self.stem in OVERLAPPING
        return f"model.stem {self.stem} shows a token the pixels of other patches" if overlaps else None

    @property
    def resnet_stride(self) -> int:
        """Pixels between the places of the hybrid stem's last map."""
        return resnet_stride(self.stages)


def resnet_stride(stages: tuple[int, ...]) -> int:
    """Pixels between the places of the last map of a ResNet's stages: 4 of its root, and 2 of each but the first."""
    return 4 * 2 ** max(0, len(stages) - 1)
