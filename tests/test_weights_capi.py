"""CAPI's weights against its model written again in numpy, float64."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy_mae import attend, drawn, gelu, linear, normalised, patch_tokens

from mpp.weights import capi, files, foreign
from mpp.weights.files import WeightsError

WIDTH, DEPTH, PATCH, HEADS, REGISTERS = 32, 2, 8, 2, 8


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {
        "registers": drawn(rng, 1, REGISTERS, WIDTH),
        "mask_token": drawn(rng, 1, WIDTH),
        "patch_embed.weight": drawn(rng, WIDTH, 3, PATCH, PATCH) / PATCH,
        "patch_embed.bias": drawn(rng, WIDTH),
    }
    for part, depth in {"encoder": DEPTH, "decoder": 1}.items():
        for block in range(depth):
            first, second = (f"{part}.blocks.{block}.residual{branch}" for branch in (1, 2))
            found |= {f"{first}.fn.{name}.weight": drawn(rng, WIDTH, WIDTH) for name in projections()}
            found |= {f"{branch}.norm.weight": 1 + drawn(rng, WIDTH) for branch in (first, second)}
            found[f"{first}.fn.rope.freqs"] = frequencies(WIDTH // HEADS)
            found[f"{second}.fn.fc1.weight"] = drawn(rng, 4 * WIDTH, WIDTH)
            found[f"{second}.fn.fc2.weight"] = drawn(rng, WIDTH, 4 * WIDTH)
    return found


def projections() -> list[str]:
    return ["q_proj", "k_proj", "v_proj", "proj"]


def frequencies(head: int) -> np.ndarray:
    """(2, head): angles along the height in the first half, the width in the second, each list twice over."""
    quarter = head // 4
    one = [2 * math.pi * 7 * (7 / 7e-4) ** (-index / (quarter - 1)) for index in range(quarter)]
    zeros = [0.0] * (2 * quarter)
    return np.array([one + one + zeros, zeros + one + one])


def edge(count: int) -> list[tuple[float, float]]:
    """Where registers stand: a quarter of them along each edge of the unit square, one edge after another."""
    way = [index / (count // 4) for index in range(count // 4)]
    return [(w, 0) for w in way] + [(1, w) for w in way] + [(1 - w, 1) for w in way] + [(0, 1 - w) for w in way]


def rms_norm(tokens: np.ndarray, weight: np.ndarray | float) -> np.ndarray:
    return tokens / np.sqrt((tokens**2).mean(-1, keepdims=True) + 1e-5) * weight


def turned(values: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """CAPI's `rotate_half`: channel i goes with channel i + head / 2, whose angle is another one."""
    half = values.shape[-1] // 2
    other = np.concatenate([-values[..., half:], values[..., :half]], -1)
    return values * np.cos(angles) + other * np.sin(angles)


def reference(tensors: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """CAPI's `enc_out` with all patches visible, (b, registers + n, d)."""
    rows, columns = images.shape[2] // PATCH, images.shape[3] // PATCH
    tokens = patch_tokens(normalised(images), tensors["patch_embed.weight"], tensors["patch_embed.bias"])
    tokens = np.concatenate([np.repeat(tensors["registers"], len(images), 0), tokens], 1)
    places = edge(REGISTERS)
    places += [(row / (rows - 1), column / (columns - 1)) for row in range(rows) for column in range(columns)]
    for block in range(DEPTH):
        first, second = (f"encoder.blocks.{block}.residual{branch}" for branch in (1, 2))
        angles = np.array(places) @ tensors[f"{first}.fn.rope.freqs"]  # (n, head)
        normed = rms_norm(tokens, tensors[f"{first}.norm.weight"])
        q, k, v = (np.split(linear(normed, tensors, f"{first}.fn.{name}_proj"), HEADS, -1) for name in "qkv")
        heads = [attend(turned(q[i], angles), turned(k[i], angles), v[i]) for i in range(HEADS)]
        tokens = tokens + linear(np.concatenate(heads, -1), tensors, f"{first}.fn.proj")
        normed = rms_norm(tokens, tensors[f"{second}.norm.weight"])
        tokens = tokens + linear(gelu(linear(normed, tensors, f"{second}.fn.fc1")), tensors, f"{second}.fn.fc2")
    return rms_norm(tokens, tensors.get("enc_norm.weight", 1.0))


def saved(path: Path, tensors: dict[str, np.ndarray], prefix: str = "backbone.") -> Path:
    torch.save({prefix + name: torch.tensor(value, dtype=torch.float32) for name, value in tensors.items()}, path)
    return path


@pytest.mark.parametrize(
    ("size", "prefix"), [((224, 224), "backbone."), ((264, 240), "backbone."), ((96, 64), "backbone."), ((96, 64), "")]
)
def test_an_encoder_gives_what_capis_own_gives(
    tensors: dict[str, np.ndarray], tmp_path: Path, size: tuple[int, int], prefix: str
):
    found = foreign.load(files.read(saved(tmp_path / "capi.pth", tensors, prefix)), {})
    images = np.random.default_rng(1).integers(0, 256, (1, 3, *size), dtype=np.uint8)
    expected = reference(tensors, images)
    encoder, given = found.encoder.eval(), torch.from_numpy(images)
    with torch.no_grad():
        tokens = encoder.encode(encoder.embed(given), grid=encoder.grid(given)).numpy()
        vectors = encoder.pool(torch.from_numpy(tokens)).numpy()
    assert (found.format, found.head) == ("capi", None)
    assert np.abs(tokens - expected).max() < 2e-5 * np.abs(expected).max()
    average = expected[:, REGISTERS:].mean(1)
    assert np.abs(vectors - average).max() < 2e-5 * np.abs(average).max()


def test_a_final_norm_with_weights_is_taken_where_a_file_has_one(tensors: dict[str, np.ndarray], tmp_path: Path):
    tensors["enc_norm.weight"] = 1 + drawn(np.random.default_rng(2), WIDTH)
    encoder = foreign.load(files.read(saved(tmp_path / "capi.pth", tensors)), {}).encoder.eval()
    images = np.random.default_rng(1).integers(0, 256, (1, 3, 48, 32), dtype=np.uint8)
    with torch.no_grad():
        tokens = encoder.encode(encoder.embed(torch.from_numpy(images)), grid=(6, 4)).numpy()
    expected = reference(tensors, images)
    assert np.abs(tokens - expected).max() < 2e-5 * np.abs(expected).max()


def test_the_decoder_and_the_frequencies_are_left_aside_by_name(tensors: dict[str, np.ndarray], tmp_path: Path):
    aside = foreign.load(files.read(saved(tmp_path / "capi.pth", tensors)), {}).aside
    frequencies = {f"encoder.blocks.{block}.residual1.fn.rope.freqs" for block in range(DEPTH)}
    assert set(aside) == {"mask_token"} | frequencies | {name for name in tensors if name.startswith("decoder.")}


def test_the_shape_is_read_from_the_file(tensors: dict[str, np.ndarray], tmp_path: Path):
    config = foreign.load(files.read(saved(tmp_path / "capi.pth", tensors)), {}).encoder.config
    assert (config.width, config.depth, config.patch, config.heads) == (WIDTH, DEPTH, PATCH, HEADS)
    assert (config.registers, config.image, config.has_class_token) == (REGISTERS, (224, 224), False)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("encoder.blocks.1.residual1.fn.k_proj.weight", None, "k_proj.weight missing"),
        ("encoder.blocks.0.residual2.norm.weight", None, "encoder.blocks.0.residual2.norm.weight missing"),
        ("registers", None, "registers missing"),
        ("patch_embed.weight", None, "patch_embed.weight missing"),
        ("encoder.blocks.1.residual1.fn.rope.freqs", None, "encoder.blocks.1.residual1.fn.rope.freqs missing"),
        ("encoder.blocks.1.residual1.fn.q_proj.bias", (WIDTH,), "encoder.blocks.1.residual1.fn.q_proj.bias unexpected"),
        ("encoder.blocks.1.residual2.fn.fc2.weight", (WIDTH, 7), r"fc2.weight \(32, 7\) where \(32, 128\)"),
        ("encoder.blocks.1.residual1.fn.rope.freqs", (2, 12), r"rope.freqs \(2, 12\) where \(2, 16\) was expected"),
        ("patch_embed.weight", (WIDTH, 192), r"patch_embed.weight \(32, 192\) where 4 axes were expected"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(
    tensors: dict[str, np.ndarray], tmp_path: Path, name: str, change: tuple[int, ...] | None, message: str
):
    if change is None:
        del tensors[name]
    else:
        tensors[name] = np.ones(change)
    path = saved(tmp_path / "capi.pth", tensors)
    with pytest.raises(WeightsError, match=message) as error:
        foreign.load(files.read(path), {})
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_other_frequencies_than_ours_are_refused(tensors: dict[str, np.ndarray], tmp_path: Path):
    tensors["encoder.blocks.1.residual1.fn.rope.freqs"][1, -1] *= 1.001
    with pytest.raises(WeightsError, match=r"blocks.1.residual1.fn.rope.freqs are other frequencies"):
        foreign.load(files.read(saved(tmp_path / "capi.pth", tensors)), {})


def test_another_number_of_heads_than_the_frequencies_are_for_is_refused(
    tensors: dict[str, np.ndarray], tmp_path: Path
):
    with pytest.raises(WeightsError, match=r"rope.freqs \(2, 16\) where \(2, 8\) was expected"):
        foreign.load(files.read(saved(tmp_path / "capi.pth", tensors)), {"heads": 4})


def test_the_table_can_be_written_as_well(tensors: dict[str, np.ndarray], tmp_path: Path):
    source = files.read(saved(tmp_path / "capi.pth", tensors))
    encoder = foreign.load(source, {}).encoder
    for ours, part in capi.parts(encoder.config).items():
        for name, piece in zip(part.names, part.write(encoder.state_dict()[ours]), strict=True):
            assert torch.equal(piece, source.tensors[name])
