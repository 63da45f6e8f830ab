"""DINO's and DINOv2's weights against their encoder in plain numpy, float64, and against transformers' DINOv2."""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy_mae import bicubic, blocks, drawn, encoder_tensors, layer_norm, normalised, patch_tokens
from safetensors.torch import save_file

from mpp.weights import dino, files, foreign
from mpp.weights.files import WeightsError

WIDTH, DEPTH, PATCH, HEADS, SIDE, REGISTERS = 32, 4, 8, 4, 4, 3
SIZES = [(32, 32), (64, 48), (24, 104)]
Tensors = dict[str, np.ndarray]


def dino1() -> Tensors:
    return encoder_tensors(np.random.default_rng(0), WIDTH, DEPTH, PATCH, SIDE, 4 * WIDTH)


def dino2(registers: int = 0, swiglu: bool = False) -> Tensors:
    """A published backbone: a mask token, layer scale, and SwiGLU where it is the giant's."""
    rng = np.random.default_rng(1)
    tensors = dino1() | {"mask_token": drawn(rng, 1, WIDTH)}
    if registers:
        tensors["register_tokens"] = drawn(rng, 1, registers, WIDTH)
    for block in range(DEPTH):
        tensors |= {f"blocks.{block}.{name}.gamma": drawn(rng, WIDTH) for name in ("ls1", "ls2")}
        if swiglu:
            mlp = f"blocks.{block}.mlp"
            tensors = {name: value for name, value in tensors.items() if not name.startswith(mlp)}
            tensors |= {f"{mlp}.w12.weight": drawn(rng, 176, WIDTH), f"{mlp}.w12.bias": drawn(rng, 176)}
            tensors |= {f"{mlp}.w3.weight": drawn(rng, WIDTH, 88), f"{mlp}.w3.bias": drawn(rng, WIDTH)}
    return tensors


def in_chunks(tensors: Tensors) -> Tensors:
    """As DINOv2 trains: two chunks of blocks, in which every block keeps its number."""

    def chunked(name: str) -> str:
        part, _, rest = name.partition(".")
        return f"blocks.{int(rest.split('.')[0]) // 2}.{rest}" if part == "blocks" else name

    return {chunked(name): value for name, value in tensors.items()}


def in_float32(tensors: Tensors, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + name: torch.tensor(value, dtype=torch.float32) for name, value in tensors.items()}


def saved(folder: Path, found: dict[str, Any]) -> Path:
    torch.save(found, folder / "weights.pth")
    return folder / "weights.pth"


def load(path: Path, **facts: Any) -> foreign.Foreign:
    return foreign.load(files.read(path), {"heads": HEADS} | facts)


def positions(tensors: Tensors, grid: tuple[int, int], antialias: bool) -> np.ndarray:
    """DINO's scale is that of a grid 0.1 larger; DINOv2 with registers gives the size, and has antialias."""
    table = tensors["pos_embed"][0, 1:].reshape(SIDE, SIDE, WIDTH)
    if grid == (SIDE, SIDE):
        return table.reshape(-1, WIDTH)
    if not antialias:
        return bicubic(table, grid, ((grid[0] + 0.1) / SIDE, (grid[1] + 0.1) / SIDE)).reshape(-1, WIDTH)
    picture = torch.from_numpy(table).permute(2, 0, 1)[None]
    return F.interpolate(picture, grid, mode="bicubic", antialias=True)[0].flatten(1).T.numpy()


def reference(tensors: Tensors, images: np.ndarray) -> np.ndarray:
    """The normalised tokens (b, 1 + registers + n, d)."""
    grid = images.shape[2] // PATCH, images.shape[3] // PATCH
    weight, bias = tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"]
    tokens = patch_tokens(normalised(images), weight, bias)
    tokens = tokens + positions(tensors, grid, "register_tokens" in tensors)
    front = [tensors["cls_token"] + tensors["pos_embed"][:, :1]]
    front += [tensors["register_tokens"]] if "register_tokens" in tensors else []
    tokens = np.concatenate([*(np.repeat(token, len(images), 0) for token in front), tokens], 1)
    return layer_norm(blocks(tokens, tensors, [f"blocks.{i}" for i in range(DEPTH)], HEADS), tensors, "norm")


def assert_it_gives(found: foreign.Foreign, tensors: Tensors, size: tuple[int, int]):
    images = np.random.default_rng(2).integers(0, 256, (2, 3, *size), dtype=np.uint8)
    encoder, given = found.encoder.eval(), torch.from_numpy(images)
    with torch.no_grad():
        tokens = encoder.encode(encoder.embed(given), grid=encoder.grid(given))
        vectors = encoder.pool(tokens).numpy()
    expected = reference(tensors, images)
    assert tokens.shape == expected.shape
    assert np.abs(tokens.numpy() - expected).max() < 2e-5 * np.abs(expected).max()
    assert np.abs(vectors - expected[:, 0]).max() < 2e-5 * np.abs(expected[:, 0]).max()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("registers", [0, REGISTERS])
def test_a_published_backbone_gives_what_dinov2s_code_gives(
    tmp_path: Path, size: tuple[int, int], swiglu: bool, registers: int
):
    tensors = dino2(registers, swiglu)
    found = load(saved(tmp_path, in_float32(tensors)))
    assert (found.format, found.head, found.aside) == ("dino", None, ("mask_token",))
    assert_it_gives(found, tensors, size)


@pytest.mark.parametrize("swiglu", [False, True])
def test_a_teacher_in_chunks_gives_the_same(tmp_path: Path, swiglu: bool):
    tensors = dino2(swiglu=swiglu)
    heads = {"dino_head.mlp.0.weight": torch.ones(8, WIDTH), "ibot_head.mlp.0.weight": torch.ones(8, WIDTH)}
    found = load(saved(tmp_path, {"teacher": in_float32(in_chunks(tensors), "backbone.") | heads}))
    assert found.format == "dino"
    assert_it_gives(found, tensors, (64, 48))


@pytest.mark.parametrize("size", SIZES)
def test_a_full_checkpoint_of_dino_gives_its_teacher(tmp_path: Path, size: tuple[int, int]):
    tensors = dino1()
    head = {"head.mlp.0.weight": torch.ones(8, WIDTH)}
    student = {f"module.{name}": 2 * value for name, value in (in_float32(tensors, "backbone.") | head).items()}
    checkpoint = {
        "student": student,
        "teacher": in_float32(tensors, "backbone.") | head,
        "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))]).state_dict(),
        "epoch": 1,
        "args": Namespace(arch="vit_small", patch_size=PATCH, momentum_teacher=0.996, global_crops_scale=(0.4, 1.0)),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }
    found = load(saved(tmp_path, checkpoint))
    assert found.format == "dino"
    assert_it_gives(found, tensors, size)


def test_a_bare_backbone_of_dino_is_timms_to_the_last_tensor(tmp_path: Path):
    path = saved(tmp_path, in_float32(dino1()))
    assert not dino.recognises(files.read(path))
    settings = {"resize": "bicubic_offset", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    found = load(path, **settings)
    assert found.format == "timm"
    assert_it_gives(found, dino1(), (64, 48))


def test_transformers_gives_the_same_with_the_same_weights(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
        num_register_tokens=REGISTERS,
        use_swiglu_ffn=True,
    )
    tensors = in_float32(dino2(REGISTERS, swiglu=True))
    config.save_pretrained(tmp_path / "peer")
    save_file(in_transformers(tensors), tmp_path / "peer" / "model.safetensors", {"format": "pt"})
    peer, report = transformers.Dinov2WithRegistersModel.from_pretrained(tmp_path / "peer", output_loading_info=True)
    assert not any(report.values())
    encoder = load(saved(tmp_path, tensors)).encoder.eval()
    images = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected = peer.eval()(images).last_hidden_state
        tokens = encoder.encode(encoder.embed(images), grid=(8, 6))
    assert (tokens - expected).abs().max() < 2e-5 * expected.abs().max()


def in_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of transformers' published files of DINOv2 with registers."""
    renamed = {
        r"^(cls_token|mask_token|register_tokens)": r"embeddings.\1",
        r"^pos_embed": "embeddings.position_embeddings",
        r"^patch_embed.proj": "embeddings.patch_embeddings.projection",
        r"^blocks": "encoder.layer",
        r"^norm": "layernorm",
        r"attn.proj": "attention.output.dense",
        r"ls(\d).gamma": r"layer_scale\1.lambda1",
        r"w12": "weights_in",
        r"w3": "weights_out",
    }
    result = {}
    for name, value in tensors.items():
        for ours, theirs in renamed.items():
            name = re.sub(ours, theirs, name)
        pieces = value.chunk(3) if "attn.qkv" in name else (value,)
        for part, piece in zip(("query", "key", "value"), pieces, strict=False):
            result[name.replace("attn.qkv", f"attention.attention.{part}")] = piece.contiguous()
    return result


def test_registers_keep_their_order(tmp_path: Path):
    tensors = in_float32(dino2(REGISTERS))
    encoder = load(saved(tmp_path, tensors)).encoder
    assert encoder.registers is not None
    assert torch.equal(encoder.registers, tensors["register_tokens"][0])


@pytest.mark.parametrize(
    ("tensors", "recognised"),
    [
        (dino2(), True),
        (dino2(REGISTERS), True),
        ({name: value for name, value in dino2(REGISTERS).items() if name != "mask_token"}, True),
        ({name: value for name, value in dino2(0, True).items() if name != "mask_token"}, True),
        (in_chunks(dino1()), True),
        (dino1(), False),
        (dino1() | {"mask_token": np.ones((1, 1, 16)), "decoder_embed.weight": np.ones((16, WIDTH))}, False),
        ({"encoder.weight": np.ones((2, 2))}, False),
    ],
)
def test_its_content_tells_what_is_dinos(tmp_path: Path, tensors: Tensors, recognised: bool):
    assert dino.recognises(files.read(saved(tmp_path, in_float32(tensors)))) is recognised


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("blocks.1.ls1.gamma", None, "blocks.1.ls1.gamma missing"),
        ("blocks.0.attn.proj.bias", None, "blocks.0.attn.proj.bias missing"),
        ("cls_token", None, "cls_token missing"),
        ("blocks.3.attn.bias", (WIDTH,), "blocks.3.attn.bias unexpected"),
        ("head.weight", (5, WIDTH), "head.weight unexpected"),
        ("blocks.3.mlp.fc2.weight", (WIDTH, 7), r"blocks.3.mlp.fc2.weight \(32, 7\) where \(32, 128\)"),
        ("pos_embed", (1, 12, WIDTH), "11 positions are no square grid"),
        ("register_tokens", (3, WIDTH), r"register_tokens \(3, 32\) where 3 axes were expected"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(
    tmp_path: Path, name: str, change: tuple[int, ...] | None, message: str
):
    tensors = {key: value for key, value in dino2().items() if key != name}
    path = saved(tmp_path, in_float32(tensors if change is None else tensors | {name: np.ones(change)}))
    with pytest.raises(WeightsError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layers", [1, 4])
def test_a_linear_classifier_of_dinov2_gives_its_logits_where_it_looks_at_one_block(tmp_path: Path, layers: int):
    """dinov2_vits14_lc (classifiers.py): class token and average of the last block; with four, four class tokens."""
    tensors, rng = dino2(registers=REGISTERS), np.random.default_rng(3)
    weight, bias = drawn(rng, 5, (1 + layers) * WIDTH), drawn(rng, 5)
    head = {"linear_head.weight": weight, "linear_head.bias": bias}
    found = load(saved(tmp_path, in_float32(tensors, "backbone.") | in_float32(head)))
    assert found.format == "dino"
    if layers > 1:
        assert found.head is None
        assert {"linear_head.weight", "linear_head.bias"} <= set(found.aside)
        return
    for size in SIZES:
        images = rng.integers(0, 256, (2, 3, *size), dtype=np.uint8)
        tokens = reference(tensors, images)
        vectors = np.concatenate([tokens[:, 0], tokens[:, 1 + REGISTERS :].mean(1)], 1)
        expected = vectors @ weight.T + bias
        with torch.no_grad():
            logits = found.head(found.encoder.eval()(torch.from_numpy(images))).numpy()
        assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()
