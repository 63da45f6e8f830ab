"""The Vision Transformer (arXiv 2010.11929) as three verbs that objectives compose: embed, encode, pool."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpp.models.encoder import Encoder, EncoderConfig
from mpp.models.mixers import MIXERS, Attention
from mpp.models.positions import POSITIONS, Grid, Learned
from mpp.models.stems import STEMS


@dataclass(frozen=True)
class ViTConfig(EncoderConfig):
    """The shape of an encoder. The defaults are the paper's ViT-B/16 (table 1)."""

    name: str = "vit"
    patch: int = 16  # side, pixels
    width: int = 768
    depth: int = 12  # blocks
    heads: int = 12
    mlp: int | None = None  # hidden units of a block's MLP; 4 * width where not given
    stem: Literal["linear"] = "linear"
    mixer: Literal["attention"] = "attention"
    positions: Literal["learned", "sincos2d", "none"] = "learned"
    resize: Literal["bilinear", "bicubic"] = "bilinear"  # of learned positions, for another grid
    pool: Literal["cls", "avg"] = "cls"  # class token, or average of the patches
    gelu: Literal["erf", "tanh"] = "erf"  # the paper's code computes tanh, which costs 3 times as much on a CPU
    norm_eps: float = 1e-6  # flax's default, hence the paper's
    dropout: float = 0.0  # after positions and after every linear layer but q, k, v (ViT paper, appendix B.1)
    drop_path: float = 0.0  # chance that the last block's branches leave out an image; falls linearly to 0 at the first

    def __post_init__(self) -> None:
        super().__post_init__()
        height, width = self.image
        if self.patch < 1 or height % self.patch or width % self.patch or min(height, width) < self.patch:
            raise ValueError(f"model.image ({height}, {width}) must be a multiple of model.patch ({self.patch})")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"model.width ({self.width}) must be a multiple of model.heads ({self.heads})")
        if self.positions == "sincos2d" and self.width % 4:
            raise ValueError(f"model.positions sincos2d needs a model.width that 4 divides, got {self.width}")
        for name, most in {"depth": 1000, "hidden": 10**6, "width": 10**6}.items():
            if not 1 <= getattr(self, name) <= most:
                name_in_recipe = "mlp" if name == "hidden" else name
                raise ValueError(f"model.{name_in_recipe} must be 1 to {most}, got {getattr(self, name)}")
        if self.norm_eps <= 0:
            raise ValueError(f"model.norm_eps must be above 0, got {self.norm_eps}")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be in [0, 1), got {getattr(self, name)}")

    def describe(self) -> str:
        return f"ViT, patch {self.patch}, width {self.width}, depth {self.depth}, {self.heads} heads"

    @property
    def grid(self) -> Grid:
        """Patches, (rows, columns)."""
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def hidden(self) -> int:
        """Hidden units of a block's MLP."""
        return 4 * self.width if self.mlp is None else self.mlp


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Gathers tokens (b, n, d) at index (b, k): (b, k, d)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class MLP(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, width: int, hidden: int, gelu: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout_of(dropout)
        self.approximate = "tanh" if gelu == "tanh" else "none"
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = F.gelu(self.expand(tokens), approximate=self.approximate)
        return self.contract(self.dropout(hidden))


def dropout_of(share: float) -> nn.Module:
    """Dropout, or nothing at all where the share is 0: PyTorch's would copy the tokens."""
    return nn.Dropout(share) if share else nn.Identity()


class DropPath(nn.Module):
    """Leaves out a residual branch for some images in training (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.chance
        return branch * (kept / (1 - self.chance)).to(branch.dtype)


class Block(nn.Module):
    """A pre-norm Transformer block (ViT paper, equations 2 and 3)."""

    def __init__(self, config: ViTConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.mixer = MIXERS[config.mixer](config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config.width, config.hidden, config.gelu, config.dropout)
        path = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop = nn.Sequential(dropout_of(config.dropout), path)  # of both branches

    def forward(self, tokens: Tensor, at: Tensor | None = None) -> Tensor:
        """Maps tokens (b, n, d) to (b, n, d), or only those at `at` (b, k) to (b, k, d)."""
        normed = self.norm1(tokens)
        if at is None:
            tokens = tokens + self.drop(self.mixer(normed))
        else:
            tokens = take(tokens, at) + self.drop(self.mixer(normed, take(normed, at)))
        return tokens + self.drop(self.mlp(self.norm2(tokens)))


class ViT(Encoder):
    """A Vision Transformer encoder.

    `forward(images)` is `pool(encode(embed(images)))`. Images are uint8 (b, c, h, w), of any h and w that the patch
    divides, or float if they are normalised already.
    """

    config: ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.width, self.layers = config.width, config.depth
        self.prefix = 1 if config.pool == "cls" else 0  # tokens in front of the patches
        self.tokens = self.prefix + math.prod(config.grid)
        self.stem = STEMS[config.stem](config.patch, config.channels, config.width)
        self.positions = POSITIONS[config.positions](config.grid, config.width, self.prefix, config.resize)
        self.class_token = nn.Parameter(torch.empty(config.width)) if self.prefix else None
        self.dropout = dropout_of(config.dropout)
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draws the paper's initial weights (its code's models_vit.py; flax's defaults where that is silent)."""
        if self.class_token is not None:
            nn.init.zeros_(self.class_token)
        if isinstance(self.positions, Learned):
            nn.init.normal_(self.positions.table, std=0.02)
        lecun_normal_(self.stem.project.weight)
        nn.init.zeros_(self.stem.project.bias)
        for module in self.modules():
            if isinstance(module, Attention):
                for part in module.qkv.weight.chunk(3):  # each is a map of its own: Xavier's fan-out is d, not 3 d
                    nn.init.xavier_uniform_(part)
                nn.init.xavier_uniform_(module.project.weight)
                nn.init.zeros_(module.qkv.bias)
                nn.init.zeros_(module.project.bias)
            elif isinstance(module, MLP):
                for linear in (module.expand, module.contract):
                    nn.init.xavier_uniform_(linear.weight)
                    nn.init.normal_(linear.bias, std=1e-6)

    def grid(self, images: Tensor) -> Grid:
        """The rows and columns of patches of images (b, c, h, w)."""
        channels, height, width = images.shape[-3:]
        if channels != self.config.channels:
            raise ValueError(f"the encoder takes {self.config.channels} channels, got images with {channels}")
        if height % self.config.patch or width % self.config.patch:
            raise ValueError(f"image sides must be multiples of the patch ({self.config.patch}), got {height}x{width}")
        return height // self.config.patch, width // self.config.patch

    def embed(self, images: Tensor) -> Tensor:
        """Maps images (b, c, h, w) to patch tokens (b, n, d), still without positions."""
        self.grid(images)
        return self.stem(self.normalise(images))

    def encode(
        self,
        tokens: Tensor,
        keep: Tensor | None = None,
        *,
        at: Tensor | None = None,
        layers: Sequence[int] | None = None,
        grid: Grid | None = None,
    ) -> Any:
        """Runs the blocks on patch tokens (b, n, d): (b, prefix + n, d).

        keep: (b, k) indices of patches; the others are dropped, after positions are added to all n.
        at: (b, k) indices of patches; gives their outputs alone, (b, k, d) without prefix tokens. Exact, and saves
            what the last block would compute for the others.
        layers: block numbers from 0; gives a list of these blocks' outputs (b, prefix + n, d), without the final norm.
        grid: (rows, columns) of the patches where it is not the config's.
        """
        grid = grid or self.config.grid
        if grid[0] * grid[1] != tokens.shape[1]:
            raise ValueError(f"{tokens.shape[1]} tokens do not fill a grid of {grid[0]}x{grid[1]} patches; pass grid=")
        if at is not None and (keep is not None or layers is not None):
            raise ValueError("encode takes `at` with neither `keep` nor `layers`")
        tokens = tokens + self.positions.patches(grid).to(tokens.dtype)
        if keep is not None:
            tokens = take(tokens, keep)
        if self.class_token is not None:
            prefix = (self.class_token + self.positions.prefixes()).expand(len(tokens), -1, -1)
            tokens = torch.cat([prefix.to(tokens.dtype), tokens], dim=1)
        tokens = self.dropout(tokens)
        if layers is not None:
            return self._outputs(tokens, layers)
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        last = self.blocks[-1](tokens, None if at is None else at + self.prefix)
        return self.norm(last)

    def _outputs(self, tokens: Tensor, layers: Sequence[int]) -> list[Tensor]:
        outputs = []
        for block in self.blocks[: max(layers) + 1]:
            tokens = block(tokens)
            outputs.append(tokens)
        return [outputs[layer] for layer in layers]

    def patches(self, tokens: Tensor) -> Tensor:
        """Drops the prefix tokens: (b, prefix + n, d) to (b, n, d)."""
        return tokens[:, self.prefix :]

    def pool(self, tokens: Tensor) -> Tensor:
        """Maps encoded tokens (b, prefix + n, d) to one vector an image (b, d), as `config.pool` says."""
        return tokens[:, 0] if self.config.pool == "cls" else self.patches(tokens).mean(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.encode(self.embed(images), grid=self.grid(images)))

    def layer_of(self, parameter: str) -> int:
        """MAE's and BEiT's numbering: stem, positions and class token 0, then the blocks, then the final norm."""
        part, *rest = parameter.split(".")
        if part == "blocks":
            return 1 + int(rest[0])
        return self.layers + 1 if part == "norm" else 0

    @torch.no_grad()
    def adopt(self, given: Encoder) -> None:
        """Takes another encoder's weights; positions are interpolated for this one's grid as `given` does it.

        Raises ValueError if a setting that decides the weights' shapes or meaning differs. A class token that this
        encoder does not have is left aside.
        """
        if not isinstance(given, ViT):
            raise ValueError(f"model: name {given.config.name} there, {self.config.name} here")
        fixed = ["patch", "channels", "width", "depth", "heads", "hidden", "stem", "mixer", "positions", "gelu"]
        fixed += ["norm_eps", "mean", "std"]
        pairs = {name: (getattr(given.config, name), getattr(self.config, name)) for name in fixed}
        if self.prefix > given.prefix:
            pairs["pool"] = (given.config.pool, self.config.pool)
        self._refuse(pairs)
        found = given.state_dict()
        if isinstance(given.positions, Learned):
            rows = [given.positions.prefixes()[: self.prefix], given.positions.patches(self.config.grid)]
            found["positions.table"] = torch.cat(rows)
        self.load_state_dict({name: found[name] for name in self.state_dict()})


def lecun_normal_(weight: Tensor) -> None:
    """Truncated normal with variance 1 / fan-in after truncation at two standard deviations (flax's lecun_normal)."""
    std = math.sqrt(1 / weight.shape[1]) / 0.87962566103423978  # std of a unit normal cut at +-2
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
