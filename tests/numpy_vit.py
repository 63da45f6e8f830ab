"""Google's and big_vision's models in plain numpy and float64, straight from a file's arrays, and random such files.

Written from the papers (2010.11929, 1903.10520, 1810.00825) and from what flax documents of its layers. Nothing here
uses mpp. Images are (b, h, w, c), as in JAX.
"""

import math

import numpy as np
import scipy.ndimage

Arrays = dict[str, np.ndarray]
EPS = 1e-6  # flax's, of layer and group norm


# Layers


def layer_norm(tokens: np.ndarray, file: Arrays, name: str) -> np.ndarray:
    mean = tokens.mean(-1, keepdims=True)
    variance = ((tokens - mean) ** 2).mean(-1, keepdims=True)
    return (tokens - mean) / np.sqrt(variance + EPS) * file[f"{name}/scale"] + file[f"{name}/bias"]


def dense(values: np.ndarray, file: Arrays, name: str) -> np.ndarray:
    return values @ file[f"{name}/kernel"] + file[f"{name}/bias"]


def gelu(values: np.ndarray) -> np.ndarray:
    return 0.5 * values * (1 + np.tanh(math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)))


def mlp(tokens: np.ndarray, file: Arrays, name: str) -> np.ndarray:
    return dense(gelu(dense(tokens, file, f"{name}/Dense_0")), file, f"{name}/Dense_1")


def attention(queries: np.ndarray, tokens: np.ndarray, file: Arrays, name: str) -> np.ndarray:
    """Multi-head attention of (b, m, d) over (b, n, d), one head after the other."""
    summed = np.zeros(queries.shape)
    for head in range(file[f"{name}/query/kernel"].shape[1]):
        q, k, v = (
            values @ file[f"{name}/{kind}/kernel"][:, head] + file[f"{name}/{kind}/bias"][head]
            for values, kind in ((queries, "query"), (tokens, "key"), (tokens, "value"))
        )
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        summed += weights @ v @ file[f"{name}/out/kernel"][head]
    return summed + file[f"{name}/out/bias"]


def convolve(images: np.ndarray, kernel: np.ndarray, stride: int, padding: str) -> np.ndarray:
    """A convolution of (b, h, w, c) with a kernel (k, k, c, d), summed over the kernel's places."""
    side = kernel.shape[0]
    if padding == "SAME":
        images = same(images, side, stride, 0.0)
    rows, columns = ((images.shape[axis] - side) // stride + 1 for axis in (1, 2))
    summed = np.zeros((len(images), rows, columns, kernel.shape[3]))
    for i in range(side):
        for j in range(side):
            summed += (
                images[:, i : i + stride * rows : stride, j : j + stride * columns : stride][:, :rows, :columns]
                @ (kernel[i, j])
            )
    return summed


def same(images: np.ndarray, side: int, stride: int, value: float) -> np.ndarray:
    """TensorFlow's and flax's padding that leaves ceil(h / stride) rows; the odd pixel goes below and to the right."""
    pads = [(0, 0)]
    for size in images.shape[1:3]:
        needed = max((math.ceil(size / stride) - 1) * stride + side - size, 0)
        pads.append((needed // 2, needed - needed // 2))
    return np.pad(images, [*pads, (0, 0)], constant_values=value)


def standardised(kernel: np.ndarray) -> np.ndarray:
    kernel = kernel - kernel.mean((0, 1, 2))
    return kernel / (kernel.std((0, 1, 2)) + 1e-5)


def group_norm(maps: np.ndarray, file: Arrays, name: str) -> np.ndarray:
    b, h, w, c = maps.shape
    groups = maps.reshape(b, h, w, 32, c // 32)
    mean = groups.mean((1, 2, 4), keepdims=True)
    variance = ((groups - mean) ** 2).mean((1, 2, 4), keepdims=True)
    normed = ((groups - mean) / np.sqrt(variance + EPS)).reshape(b, h, w, c)
    return normed * file[f"{name}/scale"].reshape(c) + file[f"{name}/bias"].reshape(c)


def relu(values: np.ndarray) -> np.ndarray:
    return np.maximum(values, 0)


def resnet(images: np.ndarray, file: Arrays) -> np.ndarray:
    """The hybrid's root and its stages."""
    maps = convolve(images, standardised(file["conv_root/kernel"]), 2, "SAME")
    maps = same(relu(group_norm(maps, file, "gn_root")), 3, 2, -np.inf)
    rows, columns = (maps.shape[1] - 3) // 2 + 1, (maps.shape[2] - 3) // 2 + 1
    windows = [maps[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2] for i in range(3) for j in range(3)]
    maps = np.max([window[:, :rows, :columns] for window in windows], axis=0)
    stage = 1
    while f"block{stage}/unit1/conv1/kernel" in file:
        unit = 1
        while f"block{stage}/unit{unit}/conv1/kernel" in file:
            name, stride = f"block{stage}/unit{unit}", 2 if stage > 1 and unit == 1 else 1
            shortcut = maps
            if f"{name}/conv_proj/kernel" in file:
                shortcut = convolve(maps, standardised(file[f"{name}/conv_proj/kernel"]), stride, "SAME")
                shortcut = group_norm(shortcut, file, f"{name}/gn_proj")
            for n in (1, 2, 3):
                maps = convolve(maps, standardised(file[f"{name}/conv{n}/kernel"]), stride if n == 2 else 1, "SAME")
                maps = group_norm(maps, file, f"{name}/gn{n}")
                maps = relu(maps) if n < 3 else relu(maps + shortcut)
            unit += 1
        stage += 1
    return maps


def patches(maps: np.ndarray, file: Arrays) -> tuple[np.ndarray, tuple[int, int]]:
    """Patch tokens (b, n, d) and their grid."""
    kernel = file["embedding/kernel"]
    maps = convolve(maps, kernel, kernel.shape[0], "VALID") + file["embedding/bias"]
    b, h, w, d = maps.shape
    return maps.reshape(b, h * w, d), (h, w)


def resized(table: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Positions (n, d) for another grid, as both repositories do it when they load a file."""
    if old == new:
        return table
    grid = table.reshape(*old, -1)
    return scipy.ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1).reshape(new[0] * new[1], -1)


def blocks(tokens: np.ndarray, file: Arrays, names: tuple[str, str, str, str]) -> np.ndarray:
    """All blocks and the final norm. names: of the first norm, of attention, of the second norm and of the MLP."""
    number = 0
    while any(name.startswith(f"Transformer/encoderblock_{number}/") for name in file):
        norm1, attend, norm2, mapped = (f"Transformer/encoderblock_{number}/{name}" for name in names)
        normed = layer_norm(tokens, file, norm1)
        tokens = tokens + attention(normed, normed, file, attend)
        tokens = tokens + mlp(layer_norm(tokens, file, norm2), file, mapped)
        number += 1
    return layer_norm(tokens, file, "Transformer/encoder_norm")


def head(vectors: np.ndarray, file: Arrays) -> np.ndarray | None:
    if "pre_logits/kernel" in file:
        vectors = np.tanh(dense(vectors, file, "pre_logits"))
    return dense(vectors, file, "head") if "head/kernel" in file else None


# Whole models: tokens (b, all tokens, d) after the final norm, vectors (b, d), logits (b, classes) or None

GOOGLE = ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
LINEN = ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
Outputs = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def google(file: Arrays, images: np.ndarray, native: tuple[int, int], names: tuple[str, ...] = GOOGLE) -> Outputs:
    """vit_jax's VisionTransformer on images; `native` is the grid of the file's positions."""
    file = {name: array.astype(np.float64) for name, array in file.items()}
    tokens, grid = patches(resnet(images, file) if "conv_root/kernel" in file else images, file)
    table = file["Transformer/posembed_input/pos_embedding"][0]
    if "cls" in file:
        tokens = np.concatenate([np.tile(file["cls"], (len(images), 1, 1)), tokens], axis=1)
        tokens = tokens + np.concatenate([table[:1], resized(table[1:], native, grid)])
    else:
        tokens = tokens + resized(table, native, grid)
    tokens = blocks(tokens, file, names)
    vectors = tokens[:, 0] if "cls" in file else tokens.mean(1)
    return tokens, vectors, head(vectors, file)


def sincos(grid: tuple[int, int], width: int) -> np.ndarray:
    table = np.zeros((grid[0] * grid[1], width))
    quarter = width // 4
    for y in range(grid[0]):
        for x in range(grid[1]):
            for k in range(quarter):
                omega = 1 / 10_000 ** (k / (quarter - 1))
                values = math.sin(x * omega), math.cos(x * omega), math.sin(y * omega), math.cos(y * omega)
                table[y * grid[1] + x, k::quarter] = values
    return table


def big_vision(file: Arrays, images: np.ndarray, native: tuple[int, int]) -> Outputs:
    """big_vision's ViT, one without `scan`; with positions learned or, where the file has none, sine-cosine."""
    file = {name: array.astype(np.float64) for name, array in file.items()}
    tokens, grid = patches(images, file)
    if "pos_embedding" in file:
        tokens = tokens + resized(file["pos_embedding"][0], native, grid)
    else:
        tokens = tokens + sincos(grid, tokens.shape[-1])
    if "cls" in file:
        tokens = np.concatenate([np.tile(file["cls"], (len(images), 1, 1)), tokens], axis=1)
    tokens = blocks(tokens, file, LINEN)
    if "MAPHead_0/probe" in file:
        probe = np.tile(file["MAPHead_0/probe"], (len(images), 1, 1))
        vectors = attention(probe, tokens, file, "MAPHead_0/MultiHeadDotProductAttention_0")
        vectors = vectors + mlp(layer_norm(vectors, file, "MAPHead_0/LayerNorm_0"), file, "MAPHead_0/MlpBlock_0")
        vectors = vectors[:, 0]
    else:
        vectors = tokens[:, 0] if "cls" in file else tokens.mean(1)
    return tokens, vectors, head(vectors, file)


# The names and shapes of files


def block_shapes(prefix: str, width: int, heads: int, hidden: int, names: tuple[str, ...] = GOOGLE) -> dict[str, tuple]:
    norm1, attend, norm2, mapped = (f"{prefix}{name}" for name in names)
    shapes: dict[str, tuple] = attention_shapes(attend, width, heads) | mlp_shapes(mapped, width, hidden)
    for norm in (norm1, norm2):
        shapes |= {f"{norm}/scale": (width,), f"{norm}/bias": (width,)}
    return shapes


def attention_shapes(name: str, width: int, heads: int) -> dict[str, tuple]:
    size = width // heads
    shapes: dict[str, tuple] = {f"{name}/out/kernel": (heads, size, width), f"{name}/out/bias": (width,)}
    for kind in ("query", "key", "value"):
        shapes |= {f"{name}/{kind}/kernel": (width, heads, size), f"{name}/{kind}/bias": (heads, size)}
    return shapes


def mlp_shapes(name: str, width: int, hidden: int) -> dict[str, tuple]:
    return {
        f"{name}/Dense_0/kernel": (width, hidden),
        f"{name}/Dense_0/bias": (hidden,),
        f"{name}/Dense_1/kernel": (hidden, width),
        f"{name}/Dense_1/bias": (width,),
    }


def head_shapes(width: int, classes: int, hidden: int) -> dict[str, tuple]:
    shapes: dict[str, tuple] = {}
    if hidden:
        shapes |= {"pre_logits/kernel": (width, hidden), "pre_logits/bias": (hidden,)}
    if classes:
        shapes |= {"head/kernel": (hidden or width, classes), "head/bias": (classes,)}
    return shapes


def resnet_shapes(stages: tuple[int, ...], channels: int = 3, root: int = 64) -> dict[str, tuple]:
    shapes: dict[str, tuple] = {"conv_root/kernel": (7, 7, channels, root)}
    shapes |= {"gn_root/scale": (root,), "gn_root/bias": (root,)}
    inputs = root
    for stage, units in enumerate(stages, 1):
        width = root * 2 ** (stage - 1)
        for unit in range(1, units + 1):
            name = f"block{stage}/unit{unit}"
            kernels = {"1": (1, 1, inputs, width), "2": (3, 3, width, width), "3": (1, 1, width, 4 * width)}
            if unit == 1:
                kernels["_proj"] = (1, 1, inputs, 4 * width)
            for n, kernel in kernels.items():
                shapes |= {f"{name}/conv{n}/kernel": kernel}
                shapes |= {f"{name}/gn{n}/{kind}": kernel[-1:] for kind in ("scale", "bias")}
            inputs = 4 * width
    return shapes


def google_shapes(
    *,
    grid: tuple[int, int],
    side: int,
    width: int,
    depth: int,
    heads: int,
    hidden: int,
    classes: int = 0,
    pre_logits: int = 0,
    token: bool = True,
    stages: tuple[int, ...] | None = None,
    channels: int = 3,
    names: tuple[str, ...] = GOOGLE,
    root: int = 64,
) -> dict[str, tuple]:
    """Every array of one of Google's files. side: of the embedding's kernel; stages, root: of the hybrid's ResNet."""
    shapes: dict[str, tuple] = {} if stages is None else resnet_shapes(stages, channels, root)
    inputs = channels if stages is None else 4 * root * 2 ** (len(stages) - 1) if stages else root
    shapes |= {"embedding/kernel": (side, side, inputs, width), "embedding/bias": (width,)}
    shapes |= {"Transformer/posembed_input/pos_embedding": (1, token + grid[0] * grid[1], width)}
    shapes |= {"cls": (1, 1, width)} if token else {}
    for block in range(depth):
        shapes |= block_shapes(f"Transformer/encoderblock_{block}/", width, heads, hidden, names)
    shapes |= {"Transformer/encoder_norm/scale": (width,), "Transformer/encoder_norm/bias": (width,)}
    return shapes | head_shapes(width, classes, pre_logits)


def big_vision_shapes(
    *,
    grid: tuple[int, int] | None,
    side: int,
    width: int,
    depth: int,
    heads: int,
    hidden: int,
    pool: str,
    classes: int = 0,
    pre_logits: int = 0,
) -> dict[str, tuple]:
    """Every array of one of big_vision's files. grid: of learned positions; pool: gap, tok or map."""
    shapes: dict[str, tuple] = {"embedding/kernel": (side, side, 3, width), "embedding/bias": (width,)}
    shapes |= {"pos_embedding": (1, grid[0] * grid[1], width)} if grid else {}
    shapes |= {"cls": (1, 1, width)} if pool == "tok" else {}
    for block in range(depth):
        shapes |= block_shapes(f"Transformer/encoderblock_{block}/", width, heads, hidden, LINEN)
    shapes |= {"Transformer/encoder_norm/scale": (width,), "Transformer/encoder_norm/bias": (width,)}
    if pool == "map":
        shapes |= {"MAPHead_0/probe": (1, 1, width)}
        shapes |= attention_shapes("MAPHead_0/MultiHeadDotProductAttention_0", width, heads)
        shapes |= {"MAPHead_0/LayerNorm_0/scale": (width,), "MAPHead_0/LayerNorm_0/bias": (width,)}
        shapes |= mlp_shapes("MAPHead_0/MlpBlock_0", width, hidden)
    return shapes | head_shapes(width, classes, pre_logits)


def drawn(shapes: dict[str, tuple], seed: int = 0) -> Arrays:
    """Random float32 arrays of these shapes, none zero or alike, with activations of about 1."""
    random = np.random.default_rng(seed)
    file = {}
    for name, shape in shapes.items():
        array = random.standard_normal(shape)
        if name.endswith("/kernel"):
            inputs = {"query": 1, "key": 1, "value": 1}.get(name.split("/")[-2], len(shape) - 1)
            array = array / math.sqrt(math.prod(shape[:inputs])) + 0.01
        elif name.endswith("/scale"):
            array = 1 + 0.2 * array
        elif name.endswith("/bias"):
            array = 0.2 * array
        file[name] = array.astype(np.float32)
    return file


def stacked(file: Arrays) -> Arrays:
    """A file of big_vision as its `scan` has it: all blocks in one, along a first axis."""
    block = "Transformer/encoderblock_0/"
    found = {name: array for name, array in file.items() if not name.startswith("Transformer/encoderblock_")}
    depth = len({name.split("/")[1] for name in file if name.startswith("Transformer/encoderblock_")})
    for name in (name.removeprefix(block) for name in file if name.startswith(block)):
        layers = [file[f"Transformer/encoderblock_{number}/{name}"] for number in range(depth)]
        found[f"Transformer/encoderblock/{name}"] = np.stack(layers)
    return found
