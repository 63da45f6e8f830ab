"""Masked patch prediction as others have it: vit-pytorch's, mended, and a minimal one on timm's ViT."""

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vit_pytorch import ViT
from vit_pytorch.mpp import MPP

SHARE, MASKED, RANDOM = 0.5, 0.8, 0.1  # of the patches; of those (ViT paper, appendix B.1.2), the rest is kept
LEVELS = 8  # of each colour: three bits


def vit_pytorch_mpp(image: int, patch: int, width: int, depth: int, heads: int) -> MPP:
    """vit_pytorch.mpp.MPP around vit_pytorch.ViT, takes float images in [0, 1] and returns the loss.

    As shipped (1.26.11) it does not run: `repeat(cls_token, "() n d -> b n d")` and `pos_embedding[:, : n + 1]` in
    mpp.py expect a leading axis that vit.py dropped from both parameters in November 2025. We put that axis back by
    wrapping the same values as (1, 1, d) and (1, 1 + n, d) parameters, and change nothing else. Its corruption is
    set to the paper's: of half the patches 80 % masked, and of the 20 % left the half replaced by another patch.
    """
    vit = ViT(image_size=image, patch_size=patch, num_classes=0, dim=width, depth=depth, heads=heads, mlp_dim=4 * width)
    vit.cls_token = nn.Parameter(vit.cls_token.detach()[None])  # (1, 1, d)
    vit.pos_embedding = nn.Parameter(vit.pos_embedding.detach()[None])  # (1, 1 + n, d)
    return MPP(vit, patch, width, mask_prob=SHARE, replace_prob=MASKED, random_patch_prob=RANDOM)


class TimmMaskedPatches(nn.Module):
    """Masked patch prediction of the mean 3-bit colour, as anyone would write it around timm's ViT.

    Already better than the obvious: static shapes without boolean indexing, the head at corrupted positions only.
    """

    def __init__(self, image: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.vit = VisionTransformer(image, patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=0)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.head = nn.Linear(width, LEVELS**3)
        self.patch = patch

    def forward(self, images: Tensor) -> Tensor:
        """Takes float images in [0, 1] and returns the loss."""
        tokens = self.vit.patch_embed(2 * images - 1)  # (b, n, d)
        b, n, d = tokens.shape
        index = torch.rand(b, n, device=images.device).topk(int(SHARE * n)).indices[..., None]  # (b, k, 1)
        tokens = self.corrupt(tokens, index.expand(-1, -1, d))
        tokens = self.vit.norm(self.vit.blocks(self.vit.norm_pre(self.vit._pos_embed(tokens))))[:, 1:]  # (b, n, d)
        logits = self.head(tokens.gather(1, index.expand(-1, -1, d)))  # (b, k, colours)
        target = self.colours(images).gather(1, index[..., 0])  # (b, k)
        return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())

    def corrupt(self, tokens: Tensor, index: Tensor) -> Tensor:
        """Replaces tokens (b, n, d) at index (b, k, d): masked, another patch of the image, or kept."""
        draw = torch.rand(*index.shape[:2], 1, device=tokens.device)  # (b, k, 1)
        own = tokens.gather(1, index)
        other = tokens.gather(1, torch.randint_like(index[..., :1], tokens.shape[1]).expand_as(index))
        new = torch.where(draw < MASKED, self.mask_token, torch.where(draw < MASKED + RANDOM, other, own))
        return tokens.scatter(1, index, new.to(tokens.dtype))

    def colours(self, images: Tensor) -> Tensor:
        mean = F.avg_pool2d(images, self.patch).flatten(2)  # (b, 3, n)
        level = (mean * LEVELS).long().clamp(max=LEVELS - 1)
        return level[:, 0] * LEVELS**2 + level[:, 1] * LEVELS + level[:, 2]  # (b, n)


def timm_mpp(image: int, patch: int, width: int, depth: int, heads: int, fused_attention: bool) -> TimmMaskedPatches:
    """With timm's default attention (PyTorch's scaled_dot_product_attention), or with its plain products."""
    timm.layers.set_fused_attn(fused_attention)
    return TimmMaskedPatches(image, patch, width, depth, heads)
