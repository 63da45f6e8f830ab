"""MAE's and DINO's encoders in plain numpy, float64, by the names of their files: a reference for what reads these."""

import math

import numpy as np

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
erf = np.vectorize(math.erf)


def drawn(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Numbers none of which is 0 or 1, small enough that no softmax saturates."""
    return rng.normal(0, 0.3, shape)


def encoder_tensors(
    rng: np.random.Generator, width: int, depth: int, patch: int, side: int, mlp: int, norm: str = "norm"
) -> dict[str, np.ndarray]:
    """An encoder under timm's names, for `side` x `side` patches; `norm` names the last norm."""
    tensors = {
        "cls_token": drawn(rng, 1, 1, width),
        "pos_embed": drawn(rng, 1, 1 + side * side, width),
        "patch_embed.proj.weight": drawn(rng, width, 3, patch, patch) / patch,
        "patch_embed.proj.bias": drawn(rng, width),
        f"{norm}.weight": 1 + drawn(rng, width),
        f"{norm}.bias": drawn(rng, width),
    }
    for block in range(depth):
        tensors |= block_tensors(rng, f"blocks.{block}.", width, mlp)
    return tensors


def block_tensors(rng: np.random.Generator, prefix: str, width: int, mlp: int) -> dict[str, np.ndarray]:
    shapes = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (mlp, width),
        "mlp.fc2": (width, mlp),
    }
    tensors = {}
    for name in ("norm1", "norm2"):
        tensors |= {f"{prefix}{name}.weight": 1 + drawn(rng, width), f"{prefix}{name}.bias": drawn(rng, width)}
    for name, shape in shapes.items():
        tensors |= {f"{prefix}{name}.weight": drawn(rng, *shape), f"{prefix}{name}.bias": drawn(rng, shape[0])}
    return tensors


def normalised(images: np.ndarray) -> np.ndarray:
    """uint8 (b, 3, h, w) as torchvision's ToTensor and Normalize make them for ImageNet."""
    return (images / 255 - MEAN[:, None, None]) / STD[:, None, None]


def patch_tokens(images: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(b, n, d): a convolution with stride and size of a patch, as loops over the patches."""
    size = weight.shape[2]
    rows, columns = images.shape[2] // size, images.shape[3] // size
    tokens = np.empty((len(images), rows * columns, len(weight)))
    for row in range(rows):
        for column in range(columns):
            window = images[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
            tokens[:, row * columns + column] = np.tensordot(window, weight, ([1, 2, 3], [1, 2, 3])) + bias
    return tokens


def layer_norm(tokens: np.ndarray, tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = tokens - tokens.mean(-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return centred / scale * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def linear(tokens: np.ndarray, tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    return tokens @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One head: (b, n, d) each."""
    scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True) @ v


def attention(tokens: np.ndarray, tensors: dict[str, np.ndarray], name: str, heads: int) -> np.ndarray:
    q, k, v = np.split(linear(tokens, tensors, f"{name}.qkv"), 3, axis=-1)
    pieces = zip(*(np.split(whole, heads, axis=-1) for whole in (q, k, v)), strict=True)
    return linear(np.concatenate([attend(*one) for one in pieces], axis=-1), tensors, f"{name}.proj")


def gelu(hidden: np.ndarray) -> np.ndarray:
    return hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))


def mlp(tokens: np.ndarray, tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """GELU, or DINOv2's SwiGLU where the file has it."""
    if f"{name}.w12.weight" not in tensors:
        return linear(gelu(linear(tokens, tensors, f"{name}.fc1")), tensors, f"{name}.fc2")
    gate, value = np.split(linear(tokens, tensors, f"{name}.w12"), 2, axis=-1)
    return linear(gate / (1 + np.exp(-gate)) * value, tensors, f"{name}.w3")


def blocks(tokens: np.ndarray, tensors: dict[str, np.ndarray], names: list[str], heads: int) -> np.ndarray:
    for name in names:
        mixed = attention(layer_norm(tokens, tensors, f"{name}.norm1"), tensors, f"{name}.attn", heads)
        tokens = tokens + mixed * tensors.get(f"{name}.ls1.gamma", 1)
        mapped = mlp(layer_norm(tokens, tensors, f"{name}.norm2"), tensors, f"{name}.mlp")
        tokens = tokens + mapped * tensors.get(f"{name}.ls2.gamma", 1)
    return tokens


def bicubic(table: np.ndarray, size: tuple[int, int], scale: tuple[float, float]) -> np.ndarray:
    """Resamples (h, w, d) by Keys' cubic with a = -0.75, edges repeated: pixel i lies at (i + 0.5) / scale - 0.5."""
    for axis in (0, 1):
        have = table.shape[axis]
        rows = []
        for place in range(size[axis]):
            at = (place + 0.5) / scale[axis] - 0.5
            first = math.floor(at)
            near = [first - 1, first, first + 1, first + 2]
            taken = (cubic(at - one) * table.take(min(max(one, 0), have - 1), axis) for one in near)
            rows.append(sum(taken))
        table = np.stack(rows, axis)
    return table


def cubic(distance: float, a: float = -0.75) -> float:
    t = abs(distance)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def sincos(side: int, width: int) -> np.ndarray:
    """MAE's table, (1, 1 + side * side, width): a row of zeros, then sines and cosines of the column and of the row."""
    table = np.zeros((1 + side * side, width))
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for channel in range(quarter):
                wave = 10000 ** (-channel / quarter)
                values = math.sin(column * wave), math.cos(column * wave), math.sin(row * wave), math.cos(row * wave)
                for part, value in enumerate(values):
                    table[1 + row * side + column, part * quarter + channel] = value
    return table[None]
