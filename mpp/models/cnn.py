"""The baseline: ResNets (arXiv 1512.03385) made of torchvision's blocks, whose names its parameters have."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from mpp.models.encoder import Encoder
from mpp.models.resnet_config import ResNetConfig

BLOCKS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {  # by depth; table 1 of the paper
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}
STAGES = 4
GROUPS = 32  # of GroupNorm: BiT (arXiv 1912.11370), and the best in GroupNorm's own paper (1803.08494, table 3)
STANDARD_EPS = 1e-10  # added to the variance of a filter's weights; BiT's code (bit_pytorch/models.py)


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose filters have mean 0 and variance 1 each (arXiv 1903.10520), without bias."""

    def forward(self, maps: Tensor) -> Tensor:
        weight = self.weight.float()
        variance, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
        weight = ((weight - mean) * torch.rsqrt(variance + STANDARD_EPS)).to(self.weight.dtype)
        return F.conv2d(maps, weight, None, self.stride, self.padding)


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, or as many of them as divide the channels."""
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


class ResNet(Encoder):
    """A residual network: a stem, four stages of blocks, and the average over the last stage's map.

    Parameters have torchvision's names and, with its width, stem and norm, its shapes. Batch norm has buffers, and
    its parameters must stay float32 where all others are cast to bfloat16 (PyTorch mixes the two in no other way).
    """

    config: ResNetConfig
    prefix = 0
    layers = STAGES

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        block, counts = BLOCKS[config.depth]
        widths = [config.width * 2**stage for stage in range(STAGES)]
        self.width = widths[-1] * block.expansion
        self.looks_across_batch = config.norm == "batch"
        norm = nn.BatchNorm2d if config.norm == "batch" else group_norm
        small = config.stem == "small"
        # Positions of the third stage's map: 14 x 14 of 224 x 224 pixels, as many as ViT-B/16 has patches.
        self.tokens = math.prod(math.ceil(side / (4 if small else 16)) for side in config.image)
        self.conv1 = nn.Conv2d(
            config.channels, config.width, 3 if small else 7, 1 if small else 2, 1 if small else 3, bias=False
        )
        self.bn1 = norm(config.width)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        inputs = config.width
        for stage, (width, count) in enumerate(zip(widths, counts, strict=True)):
            outputs, stride = width * block.expansion, 1 if stage == 0 else 2
            shortcut = None
            if stride > 1 or inputs != outputs:
                shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
            first = block(inputs, width, stride, shortcut, norm_layer=norm)
            rest = [block(outputs, width, norm_layer=norm) for _ in range(count - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
            inputs = outputs
        if config.norm == "group":
            self._standardise()
        self.initialise()

    def _standardise(self) -> None:
        """Puts weight-standardised convolutions in the place of plain ones."""
        for parent in list(self.modules()):
            for name, conv in list(parent.named_children()):
                if isinstance(conv, nn.Conv2d):
                    inputs, outputs, side = conv.in_channels, conv.out_channels, conv.kernel_size[0]
                    new = StandardisedConv2d(inputs, outputs, side, conv.stride[0], side // 2, bias=False)
                    setattr(parent, name, new)

    @torch.no_grad()
    def initialise(self) -> None:
        """Draws torchvision's initial weights, but the last norm of each block starts at zero.

        So each block is the identity at first (arXiv 1706.02677, section 5.1): an option of torchvision, and what the
        ViT authors' ResNet does (vit_jax/models_resnet.py). BiT's blocks end in a convolution and have no such norm.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def layer_of(self, parameter: str) -> int:
        """0 for the stem, 1 to 4 for the stages."""
        part = parameter.split(".")[0]
        return int(part.removeprefix("layer")) if part.startswith("layer") else 0

    def forward(self, images: Tensor) -> Tensor:
        self.check(images)
        # On a CPU channels last makes convolutions some 20 % faster, but bfloat16 group norm 20 times slower.
        layout = torch.channels_last if self.config.norm == "batch" else torch.contiguous_format
        maps = self.normalise(images).to(self.conv1.weight.dtype, memory_format=layout)
        maps = self.maxpool(F.relu(self.bn1(self.conv1(maps)), inplace=True))
        for stage in range(1, STAGES + 1):
            maps = self.get_submodule(f"layer{stage}")(maps)
        return maps.mean((2, 3))  # (b, width)
