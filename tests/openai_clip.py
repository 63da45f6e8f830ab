"""CLIP's image tower as OpenAI published it (openai/CLIP, model.py at d05afc4), in plain torch on its own state dict.

Tokens (b, n, d) throughout, where the origin has attention take (n, b, d): the numbers are the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, DEPTH, PATCH, SIDE, SPACE = 128, 2, 8, 32, 6  # heads of 64 channels, as all of OpenAI's


def state_dict(pre: bool = True, prefix: str = "visual.", scaled: bool = False) -> dict[str, Tensor]:
    """A random model's tensors by OpenAI's names, with a little of a text tower where there is a prefix."""
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (WIDTH,),
        "positional_embedding": ((SIDE // PATCH) ** 2 + 1, WIDTH),
        "proj": (WIDTH, SPACE),
        "conv1.weight": (WIDTH, 3, PATCH, PATCH),
    }
    norms = ["ln_pre"] * pre + ["ln_post"]
    for block in range(DEPTH):
        name = f"transformer.resblocks.{block}"
        norms += [f"{name}.ln_1", f"{name}.ln_2"]
        shapes |= {f"{name}.attn.in_proj_weight": (3 * WIDTH, WIDTH), f"{name}.attn.in_proj_bias": (3 * WIDTH,)}
        for part, (rows, columns) in {
            "attn.out_proj": (WIDTH, WIDTH),
            "mlp.c_fc": (4 * WIDTH, WIDTH),
            "mlp.c_proj": (WIDTH, 4 * WIDTH),
        }.items():
            shapes |= {f"{name}.{part}.weight": (rows, columns), f"{name}.{part}.bias": (rows,)}
        if scaled:  # open_clip's LayerScale
            shapes |= {f"{name}.ls_1.gamma": (WIDTH,), f"{name}.ls_2.gamma": (WIDTH,)}
    tensors = {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    for norm in norms:
        tensors |= {f"{norm}.weight": 1 + 0.1 * torch.randn(WIDTH), f"{norm}.bias": 0.1 * torch.randn(WIDTH)}
    found = {prefix + name: tensor for name, tensor in tensors.items()}
    if prefix:
        found |= {"logit_scale": torch.tensor(4.6), "text_projection": torch.randn(16, SPACE)}
        found |= {"transformer.resblocks.0.ln_1.weight": torch.ones(16), "token_embedding.weight": torch.randn(5, 16)}
        found |= {"positional_embedding": torch.randn(7, 16), "input_resolution": torch.tensor(SIDE)}
    return found


def tokens(tensors: dict[str, Tensor], images: Tensor, heads: int = 2, quick: bool = True, eps: float = 1e-5) -> Tensor:
    """What goes into the last norm, (b, 1 + n, d); positions resized as open_clip's resize_pos_embed does."""
    grid = images.shape[2] // PATCH, images.shape[3] // PATCH
    place = tensors["positional_embedding"]
    if grid != (SIDE // PATCH, SIDE // PATCH):
        side = SIDE // PATCH
        table = place[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=grid, mode="bicubic", antialias=True, align_corners=False)
        place = torch.cat([place[:1], table.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1)])
    patches = F.conv2d(images, tensors["conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    hidden = torch.cat([tensors["class_embedding"].expand(len(images), 1, -1), patches], 1) + place
    if "ln_pre.weight" in tensors:
        hidden = normed(tensors, "ln_pre", hidden, eps)
    for block in range(DEPTH):
        name = f"transformer.resblocks.{block}"
        attention = torch.nn.MultiheadAttention(WIDTH, heads, batch_first=True)
        of = f"{name}.attn."
        attention.load_state_dict({key.removeprefix(of): value for key, value in tensors.items() if key.startswith(of)})
        before = normed(tensors, f"{name}.ln_1", hidden, eps)
        branch = attention(before, before, before, need_weights=False)[0]
        hidden = hidden + branch * tensors.get(f"{name}.ls_1.gamma", torch.ones(()))
        branch = linear(tensors, f"{name}.mlp.c_fc", normed(tensors, f"{name}.ln_2", hidden, eps))
        branch = branch * torch.sigmoid(1.702 * branch) if quick else F.gelu(branch)
        branch = linear(tensors, f"{name}.mlp.c_proj", branch)
        hidden = hidden + branch * tensors.get(f"{name}.ls_2.gamma", torch.ones(()))
    return hidden


def normed(tensors: dict[str, Tensor], name: str, hidden: Tensor, eps: float) -> Tensor:
    return F.layer_norm(hidden, (WIDTH,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)


def linear(tensors: dict[str, Tensor], name: str, hidden: Tensor) -> Tensor:
    return F.linear(hidden, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
