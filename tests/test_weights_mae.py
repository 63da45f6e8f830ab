"""MAE's checkpoints against its encoder written again in numpy, float64, and against timm's with the same weights."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy_mae import (
    bicubic,
    block_tensors,
    blocks,
    drawn,
    encoder_tensors,
    layer_norm,
    normalised,
    patch_tokens,
    sincos,
)
from timm.models.vision_transformer import VisionTransformer

from mpp.weights import files, foreign, mae
from mpp.weights.files import WeightsError

WIDTH, DEPTH, PATCH, HEADS, SIDE, MLP, CLASSES = 32, 2, 8, 4, 4, 128, 5
SIZES = [(32, 32), (64, 48), (72, 104)]
Tensors = dict[str, np.ndarray]


def pretrained(decoder: bool = True) -> Tensors:
    """What main_pretrain.py saves, or the encoder alone as published: both with MAE's fixed positions."""
    rng = np.random.default_rng(0)
    tensors = encoder_tensors(rng, WIDTH, DEPTH, PATCH, SIDE, MLP) | {"pos_embed": sincos(SIDE, WIDTH)}
    if not decoder:
        return tensors
    tensors |= {"mask_token": drawn(rng, 1, 1, 16), "decoder_pos_embed": sincos(SIDE, 16)}
    tensors |= {"decoder_embed.weight": drawn(rng, 16, WIDTH), "decoder_embed.bias": drawn(rng, 16)}
    tensors |= {"decoder_norm.weight": drawn(rng, 16), "decoder_norm.bias": drawn(rng, 16)}
    tensors |= {"decoder_pred.weight": drawn(rng, 192, 16), "decoder_pred.bias": drawn(rng, 192)}
    return tensors | block_tensors(rng, "decoder_blocks.0.", 16, 64)


def finetuned(averaged: bool = True) -> Tensors:
    """What main_finetune.py saves: its positions moved, its class token's too."""
    rng = np.random.default_rng(0)
    tensors = encoder_tensors(rng, WIDTH, DEPTH, PATCH, SIDE, MLP, "fc_norm" if averaged else "norm")
    tensors["pos_embed"] = sincos(SIDE, WIDTH) + 0.5 * drawn(rng, 1, 1 + SIDE * SIDE, WIDTH)
    return tensors | {"head.weight": drawn(rng, CLASSES, WIDTH), "head.bias": drawn(rng, CLASSES)}


def probed(averaged: bool = False) -> Tensors:
    """What main_linprobe.py saves."""
    rng = np.random.default_rng(3)
    tensors = finetuned(averaged) | {"pos_embed": sincos(SIDE, WIDTH)}
    tensors["head.1.weight"], tensors["head.1.bias"] = tensors.pop("head.weight"), tensors.pop("head.bias")
    tensors["head.0.running_mean"], tensors["head.0.running_var"] = drawn(rng, WIDTH), rng.uniform(0.001, 3, WIDTH)
    return tensors | {"head.0.num_batches_tracked": np.array(7)}


def saved(folder: Path, tensors: Tensors, **settings: Any) -> Path:
    """A checkpoint as util/misc.py writes it; without settings, as the published ones are."""
    model = {name: torch.tensor(value, dtype=torch.float32 if value.ndim else None) for name, value in tensors.items()}
    found: dict[str, Any] = {"model": model}
    if settings:
        optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))]).state_dict()
        scaler = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0}
        args = Namespace(blr=1e-3, accum_iter=1, lr=None, betas=(0.9, 0.95), output_dir="./output_dir", **settings)
        found |= {"optimizer": optimiser, "epoch": 3, "scaler": scaler, "args": args}
    torch.save(found, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


def load(path: Path, **facts: Any) -> foreign.Foreign:
    return foreign.load(files.read(path), {"heads": HEADS} | facts)


def reference(tensors: Tensors, images: np.ndarray) -> np.ndarray:
    """The last block's output (b, 1 + n, d), positions as util/pos_embed.py interpolates them."""
    grid = images.shape[2] // PATCH, images.shape[3] // PATCH
    table = tensors["pos_embed"][0, 1:]
    if grid != (SIDE, SIDE):
        scale = grid[0] / SIDE, grid[1] / SIDE
        table = bicubic(table.reshape(SIDE, SIDE, WIDTH), grid, scale).reshape(-1, WIDTH)
    weight, bias = tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"]
    tokens = patch_tokens(normalised(images), weight, bias) + table
    first = np.repeat(tensors["cls_token"] + tensors["pos_embed"][:, :1], len(images), 0)
    return blocks(np.concatenate([first, tokens], 1), tensors, [f"blocks.{i}" for i in range(DEPTH)], HEADS)


def pictures(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, 3, *size), dtype=np.uint8)


def outputs(found: foreign.Foreign, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and vectors from bytes."""
    encoder, given = found.encoder.eval(), torch.from_numpy(images)
    with torch.no_grad():
        tokens = encoder.encode(encoder.embed(given), grid=encoder.grid(given))
        return tokens.numpy(), encoder.pool(tokens).numpy()


def logits(found: foreign.Foreign, vectors: np.ndarray) -> np.ndarray:
    assert found.head is not None
    return found.head(torch.from_numpy(vectors)).detach().numpy()


def assert_alike(ours: np.ndarray, expected: np.ndarray):
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("decoder", [True, False])
def test_a_pretrained_encoder_gives_what_maes_own_gives(tmp_path: Path, size: tuple[int, int], decoder: bool):
    tensors = pretrained(decoder)
    settings = {"model": "mae_vit_base_patch16", "mask_ratio": 0.75, "norm_pix_loss": True} if decoder else {}
    found = load(saved(tmp_path, tensors, **settings))
    tokens, vectors = outputs(found, pictures(size))
    expected = layer_norm(reference(tensors, pictures(size)), tensors, "norm")
    assert (found.format, found.head) == ("mae", None)
    assert_alike(tokens, expected)
    assert_alike(vectors, expected[:, 0])


@pytest.mark.parametrize("size", SIZES)
def test_a_fine_tuned_encoder_averages_before_its_norm(tmp_path: Path, size: tuple[int, int]):
    tensors = finetuned()
    found = load(saved(tmp_path, tensors, model="vit_base_patch16", global_pool=True, nb_classes=CLASSES))
    tokens, vectors = outputs(found, pictures(size))
    expected = reference(tensors, pictures(size))
    pooled = layer_norm(expected[:, 1:].mean(1), tensors, "fc_norm")
    assert found.format == "mae"
    assert_alike(tokens, expected)
    assert_alike(vectors, pooled)
    assert_alike(logits(found, vectors), pooled @ tensors["head.weight"].T + tensors["head.bias"])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("averaged", [False, True])
def test_a_probes_batch_norm_goes_into_its_linear_map(tmp_path: Path, size: tuple[int, int], averaged: bool):
    tensors = probed(averaged)
    found = load(saved(tmp_path, tensors, model="vit_base_patch16", global_pool=averaged))
    expected = reference(tensors, pictures(size))
    if averaged:
        expected = layer_norm(expected[:, 1:].mean(1), tensors, "fc_norm")
    else:
        expected = layer_norm(expected, tensors, "norm")[:, 0]
    scale = np.sqrt(tensors["head.0.running_var"] + 1e-6)
    expected = (expected - tensors["head.0.running_mean"]) / scale @ tensors["head.1.weight"].T + tensors["head.1.bias"]
    assert_alike(logits(found, outputs(found, pictures(size))[1]), expected)
    assert set(found.aside) == {"optimizer", "scaler", "head.0.num_batches_tracked"}


@pytest.mark.parametrize("averaged", [False, True])
def test_timm_gives_the_same_with_the_same_weights(tmp_path: Path, averaged: bool):
    path = saved(tmp_path, finetuned(averaged), model="vit_base_patch16", global_pool=averaged)
    peer = VisionTransformer(
        img_size=SIDE * PATCH,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=CLASSES,
        global_pool="avg" if averaged else "token",
    ).eval()
    peer.load_state_dict(files.read(path).tensors)
    images = pictures(SIZES[0])
    found = load(path)
    with torch.no_grad():
        expected = peer(torch.tensor(normalised(images), dtype=torch.float32)).numpy()
    assert_alike(logits(found, outputs(found, images)[1]), expected)


def test_the_decoder_is_left_aside_by_name(tmp_path: Path):
    tensors = pretrained()
    aside = load(saved(tmp_path, tensors)).aside
    assert set(aside) == {name for name in tensors if name.startswith("decoder_") or name == "mask_token"}


@pytest.mark.parametrize(
    ("tensors", "settings", "recognised"),
    [
        (pretrained(), {}, True),
        (pretrained(decoder=False), {}, True),
        (finetuned(), {}, True),  # its positions are near MAE's still
        (probed(), {}, True),
        (finetuned() | {"pos_embed": drawn(np.random.default_rng(4), 1, 17, WIDTH)}, {}, False),
        (finetuned() | {"pos_embed": drawn(np.random.default_rng(4), 1, 17, WIDTH)}, {"global_pool": True}, True),
        (finetuned() | {"pos_embed": drawn(np.random.default_rng(4), 1, 17, WIDTH)}, {"smoothing": 0.1}, False),
        ({"encoder.weight": np.ones((2, 2))}, {}, False),
    ],
)
def test_its_content_tells_what_is_maes(tmp_path: Path, tensors: Tensors, settings: dict[str, Any], recognised: bool):
    assert mae.recognises(files.read(saved(tmp_path, tensors, **settings))) is recognised


def test_timms_own_folder_of_an_mae_is_left_to_timm(tmp_path: Path):
    path = saved(tmp_path, pretrained(decoder=False))
    (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch16_224", "pretrained_cfg": {}}')
    assert not mae.recognises(files.read(path))


def test_heads_are_asked_for_where_the_size_is_not_a_published_one(tmp_path: Path):
    with pytest.raises(WeightsError, match="say how many heads: heads="):
        foreign.load(files.read(saved(tmp_path, pretrained())), {})


@pytest.mark.parametrize(
    ("tensors", "name", "change", "message"),
    [
        (pretrained(), "blocks.1.attn.qkv.bias", None, "blocks.1.attn.qkv.bias missing"),
        (pretrained(), "pos_embed", None, "pos_embed missing"),
        (pretrained(), "blocks.0.mlp.fc1.weight", None, "blocks.0.mlp.fc1.weight missing"),
        (pretrained(), "blocks.1.ls1.gamma", (WIDTH,), "blocks.1.ls1.gamma unexpected"),
        (pretrained(), "norm.bias", (7,), r"norm.bias \(7,\) where \(32,\) for norm.bias"),
        (pretrained(), "pos_embed", (1, 12, WIDTH), "11 positions are no square grid"),
        (pretrained(), "patch_embed.proj.weight", (WIDTH, 192), r"\(32, 192\) where 4 axes were expected"),
        (finetuned(), "head.bias", None, "head.bias missing"),
        (probed(), "head.0.running_var", None, "head.0.running_var missing"),
        (probed(), "head.0.running_mean", (7,), r"head.0.running_mean \(7,\) where \(32,\) was expected"),
        (probed(), "head.1.bias", (7,), r"head.1.weight \(5, 32\) where \(7, 32\) was expected"),
        (probed(), "head.1.bias", None, "head.1.bias missing"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(
    tmp_path: Path, tensors: Tensors, name: str, change: tuple[int, ...] | None, message: str
):
    kept = {key: value for key, value in tensors.items() if key != name}
    path = saved(tmp_path, kept if change is None else kept | {name: np.ones(change)}, global_pool=True)
    with pytest.raises(WeightsError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
