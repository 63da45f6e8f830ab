"""A head that says something of each patch by itself: linear, or AIM's MLPs (arXiv 2401.08541, section 3.2)."""

from torch import Tensor, nn

from mpp.models.layers import MLP, norm_of
from mpp.models.patch_head_config import PatchHeadConfig
from mpp.models.position_tables import fixed, sincos2d_mae
from mpp.models.trunk_config import TrunkConfig
from mpp.models.vit import ViT


class PatchHead(nn.Module):
    """Maps the encoder's outputs at patches (b, k, d) to numbers for each, (b, k, outputs); nothing passes among them.

    With blocks: fixed positions are added, a linear map gives the head's width, each block adds an MLP of what it
    normalises, and a norm and a linear map follow. Norms, GELU and biases are as the encoder's. The last map starts at
    zero.
    """

    def __init__(self, config: PatchHeadConfig, encoder: ViT, outputs: int) -> None:
        super().__init__()
        shape = encoder.config
        width = (config.width or shape.width) if config.depth else shape.width
        self.grid, self.width, self.depth = shape.grid, shape.width, config.depth
        if config.depth:
            if shape.width % 4:
                raise ValueError(f"objective.head.depth needs a model.width that 4 divides, got {shape.width}")
            inner = TrunkConfig(
                width=width,
                heads=1,
                positions="none",
                norm=shape.norm,
                norm_eps=shape.norm_eps,
                gelu=shape.gelu,
                bias=shape.bias,
            )
            self.widen = nn.Linear(shape.width, width, bias=shape.bias)
            nn.init.xavier_uniform_(self.widen.weight)
            if self.widen.bias is not None:
                nn.init.zeros_(self.widen.bias)
            self.norms = nn.ModuleList(norm_of(inner, width) for _ in range(config.depth))
            mlps = [MLP(inner) for _ in range(config.depth)]
            for mlp in mlps:
                mlp.initialise()
            self.mlps = nn.ModuleList(mlps)
            self.norm = norm_of(inner, width)
        self.last = nn.Linear(width, outputs, bias=shape.bias or not config.depth)
        nn.init.zeros_(self.last.weight)
        if self.last.bias is not None:
            nn.init.zeros_(self.last.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """What it says of the first k patches, row by row, of the encoder's outputs at these (b, k, d)."""
        if not self.depth:
            return self.last(tokens)
        places = fixed(sincos2d_mae, tokens.device, self.grid, self.width)[: tokens.shape[1]]
        tokens = self.widen(tokens + places.to(tokens.dtype))
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            tokens = tokens + mlp(norm(tokens))
        return self.last(self.norm(tokens))
