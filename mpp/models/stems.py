"""Stems: from normalised images to patch tokens, without positions."""

from einops import rearrange
from torch import Tensor, nn


class LinearStem(nn.Module):
    """One linear map of each patch's pixels, in row, column, channel order (ViT paper, equation 1)."""

    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.project = nn.Linear(patch * patch * channels, width)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (b, c, h, w) to (b, n, d), patches in row-major order."""
        p = self.patch
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
        return self.project(patches.to(self.project.weight.dtype))


STEMS: dict[str, type[LinearStem]] = {"linear": LinearStem}
