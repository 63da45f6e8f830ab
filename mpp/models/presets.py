"""The published sizes by name, "B/16" being ViT-B with patches of 16 pixels."""

from mpp.models.vit_config import ViTConfig

# Width, depth, heads: B, L and H from the ViT paper (table 1), Ti and S from DeiT (arXiv 2012.12877, table 1) and
# AugReg (arXiv 2106.10270). The MLP is 4 times as wide in all of them.
SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "H": (1280, 32, 16)}
PATCHES = (2, 4, 7, 8, 14, 16, 28, 32)  # all that divide 224

presets: dict[str, ViTConfig] = {
    f"{name}/{patch}": ViTConfig(patch=patch, width=width, depth=depth, heads=heads)
    for name, (width, depth, heads) in SIZES.items()
    for patch in PATCHES
}
