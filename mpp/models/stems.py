"""Stems: from normalised images to patch tokens, without positions."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from mpp.models.resnet_stem import Root, StandardisedConv, Unit
from mpp.models.vit_config import ViTConfig

GROUPS = 32  # at most, of the convolutional stem's GroupNorm: the best in that norm's paper (arXiv 1803.08494, table 3)


class Stem(nn.Module):
    """Maps normalised images (b, c, h, w) to patch tokens (b, n, d); h and w are multiples of the patch.

    Every stem ends in a linear map `project`. Images are cast to its dtype.
    """

    overlaps = False  # whether a token sees pixels of other patches: masked objectives then hide the pixels first
    project: nn.Linear | nn.Conv2d

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.name, self.patch = config.stem, config.patch

    def initialise(self) -> None:
        """Draws initial weights; a stem with further layers draws those as well. Call it under `no_grad`."""
        lecun_normal_(self.project.weight)
        if self.project.bias is not None:
            nn.init.zeros_(self.project.bias)

    def resized(self, patch: int, interpolation: Literal["bilinear", "bicubic"]) -> dict[str, Tensor]:
        """The state dict of this stem for another patch size; ValueError if its weights have no sense there."""
        if patch != self.patch:
            raise ValueError(f"model.stem {self.name} cannot change its patch size ({self.patch} there, {patch} here)")
        return self.state_dict()


class LinearStem(Stem):
    """One linear map of each patch's pixels, in row, column, channel order (ViT paper, equation 1)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.project = nn.Linear(config.patch**2 * config.channels, config.width, bias=config.stem_bias)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (b, c, h, w) to (b, n, d), patches in row-major order."""
        p = self.patch
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
        return self.project(patches.to(self.project.weight.dtype))

    @torch.no_grad()
    def resized(self, patch: int, interpolation: Literal["bilinear", "bicubic"]) -> dict[str, Tensor]:
        """The state dict for another patch size, by FlexiViT's pseudo-inverse (arXiv 2212.08013, section 3.4).

        A larger patch's token of an enlarged patch is exactly the old one of the patch before. A smaller patch's come
        as near to it as a linear map of fewer pixels can (least squares). "bicubic" shrinks with antialias as timm,
        "bilinear" without as big_vision.
        """
        found = self.state_dict()
        if patch == self.patch:
            return found
        # Interpolation treats rows and columns alike, so the pseudo-inverse of the whole is that of one side, twice.
        side = torch.eye(self.patch, dtype=torch.float64, device="cpu")[None, None]
        size, antialias = (patch, self.patch), interpolation == "bicubic"
        side = F.interpolate(side, size, mode=interpolation, antialias=antialias)[0, 0]  # (patch, self.patch)
        inverse = torch.linalg.pinv(side.T).to(found["project.weight"].device)  # (patch, self.patch)
        weight = rearrange(found["project.weight"].double(), "d (p q c) -> d p q c", p=self.patch, q=self.patch)
        weight = einsum(inverse, inverse, weight, "h p, w q, d p q c -> d h w c")
        found["project.weight"] = weight.flatten(1).to(self.project.weight.dtype)
        return found


class OverlapStem(Stem):
    """One linear map of a window of 2 * patch - 1 pixels a side (PVTv2, arXiv 2106.13797, section 3.2).

    It has the patch in its lower right corner; beyond the image's edge are zeros. PVTv2 normalises these tokens; here
    the blocks' own norms do.
    """

    overlaps = True

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        p = config.patch
        self.project = nn.Conv2d(
            config.channels, config.width, 2 * p - 1, stride=p, padding=p - 1, bias=config.stem_bias
        )

    def forward(self, images: Tensor) -> Tensor:
        """Maps (b, c, h, w) to (b, n, d), patches in row-major order."""
        return tokens_of(self.project(images.to(self.project.weight.dtype)))


class ConvStem(Stem):
    """3x3 convolutions of stride 2, then a 1x1 convolution ("early convolutions", arXiv 2106.14881, section 3).

    There is one for each halving that makes the patch; each doubles the channels, and the last has the width.
    """

    overlaps = True

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        halvings = config.patch.bit_length() - 1
        widths = [config.width >> (halvings - 1 - layer) for layer in range(halvings)]
        inputs = [config.channels, *widths[:-1]]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            for before, after in zip(inputs, widths, strict=True)
        )
        # The paper has batch norm. With group norm an image's tokens do not depend on the others of its batch: masked
        # pretraining, micro-batches and exact resumption need that.
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(GROUPS, channels), channels) for channels in widths)
        self.project = nn.Conv2d(config.width, config.width, 1, bias=config.stem_bias)

    def initialise(self) -> None:
        super().initialise()
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.reset_parameters()
        for convolution in self.convolutions:
            nn.init.kaiming_normal_(convolution.get_parameter("weight"), mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Maps (b, c, h, w) to (b, n, d), patches in row-major order."""
        maps = images.to(self.project.weight.dtype, memory_format=torch.contiguous_format)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            maps = F.relu(norm(convolution(maps)))
        return tokens_of(self.project(maps))


class HybridStem(Stem):
    """The first stages of a ResNet, then patches of its map (ViT paper, section 3.1; its code's models_vit.py)."""

    overlaps = True

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.root = Root(config.channels, config.stem_width)
        self.stages = nn.ModuleList()
        channels = config.stem_width
        for stage, count in enumerate(config.stages):
            units = nn.Sequential()
            for unit in range(count):
                width = config.stem_width * 2**stage
                units.append(Unit(channels, width, stride=2 if stage and not unit else 1))
                channels = width * Unit.expansion
            self.stages.append(units)
        side = config.patch // config.resnet_stride
        self.project = nn.Conv2d(channels, config.width, side, stride=side, bias=config.stem_bias)

    def initialise(self) -> None:
        super().initialise()
        for module in self.modules():
            if isinstance(module, StandardisedConv):
                lecun_normal_(module.weight)
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, Unit):
                nn.init.zeros_(module.norm3.weight)  # a new unit passes on its shortcut alone

    def forward(self, images: Tensor) -> Tensor:
        """Maps (b, c, h, w) to (b, n, d), patches in row-major order."""
        maps = self.root(images.to(self.project.weight.dtype, memory_format=torch.contiguous_format))
        for stage in self.stages:
            maps = stage(maps)
        return tokens_of(self.project(maps))


def tokens_of(maps: Tensor) -> Tensor:
    """Maps (b, d, h, w) to tokens (b, h * w, d), row by row."""
    return rearrange(maps, "b d h w -> b (h w) d")


def lecun_normal_(weight: Tensor) -> None:
    """Truncated normal with variance 1 / fan-in after truncation at two standard deviations (flax's lecun_normal)."""
    std = math.sqrt(1 / math.prod(weight.shape[1:])) / 0.87962566103423978  # std of a unit normal cut at +-2
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


STEMS: dict[str, type[Stem]] = {
    "linear": LinearStem,
    "overlap": OverlapStem,
    "conv": ConvStem,
    "hybrid": HybridStem,
}
