"""The ResNet below the ViT paper's hybrids: group norm, standardised convolutions (its code's models_resnet.py)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32  # flax's defaults for GroupNorm
NORM_EPS = 1e-6
STANDARD_EPS = 1e-5  # added to the standard deviation of a filter's weights; models_resnet.py


def same(maps: Tensor, kernel: int, stride: int) -> Tensor:
    """Pads maps (b, c, h, w) with zeros as flax's "SAME" does, where the stride divides h and w.

    It needs kernel - stride further pixels; of an odd number, right and bottom get one more than left and top.
    Every strided layer of the stem gets even sides, because the patch is a multiple of all strides together.
    """
    missing = max(kernel - stride, 0)
    before, after = missing // 2, missing - missing // 2
    return F.pad(maps, (before, after, before, after)) if missing else maps


class StandardisedConv(nn.Conv2d):
    """A convolution, without bias, whose filters get mean 0 and standard deviation 1 (arXiv 1903.10520)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        std, mean = torch.std_mean(weight, (1, 2, 3), correction=0, keepdim=True)
        weight = ((weight - mean) / (std + STANDARD_EPS)).to(self.weight.dtype)
        kernel, stride = self.kernel_size[0], self.stride[0]
        return F.conv2d(same(maps, kernel, stride), weight, None, stride)


class Root(nn.Module):
    """The first layers, of stride 4: a 7x7 convolution and a maximum over 3x3, both of stride 2."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv = StandardisedConv(inputs, width, 7, stride=2)
        self.norm = nn.GroupNorm(GROUPS, width, NORM_EPS)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (b, c, h, w) to (b, width, h / 4, w / 4)."""
        maps = F.relu(self.norm(self.conv(images)))
        return F.max_pool2d(same(maps, 3, 2), 3, stride=2)  # after relu, padding with zeros never is the maximum


class Unit(nn.Module):
    """A bottleneck: 1x1, 3x3 (with the stride) and 1x1 convolutions, added to the input or to a projection of it."""

    expansion = 4  # output channels for each one of `width`

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = StandardisedConv(inputs, width, 1)
        self.norm1 = nn.GroupNorm(GROUPS, width, NORM_EPS)
        self.conv2 = StandardisedConv(width, width, 3, stride)
        self.norm2 = nn.GroupNorm(GROUPS, width, NORM_EPS)
        self.conv3 = StandardisedConv(width, outputs, 1)
        self.norm3 = nn.GroupNorm(GROUPS, outputs, NORM_EPS)
        projects = stride > 1 or inputs != outputs
        self.shortcut_conv = StandardisedConv(inputs, outputs, 1, stride) if projects else None
        self.shortcut_norm = nn.GroupNorm(GROUPS, outputs, NORM_EPS) if projects else None

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (b, inputs, h, w) to (b, 4 * width, h / stride, w / stride)."""
        branch = F.relu(self.norm1(self.conv1(maps)))
        branch = F.relu(self.norm2(self.conv2(branch)))
        branch = self.norm3(self.conv3(branch))
        if self.shortcut_conv is not None and self.shortcut_norm is not None:
            maps = self.shortcut_norm(self.shortcut_conv(maps))
        return F.relu(maps + branch)
