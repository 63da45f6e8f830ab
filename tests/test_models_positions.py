import itertools
import math

import numpy as np
import pytest
import scipy.ndimage
import timm.layers
import timm.layers.pos_embed_rel
import torch
from torch import Tensor

from mpp.models.position_tables import TABLES
from mpp.models.positions import POSITIONS, Positions, turn
from mpp.models.vit_config import ViTConfig

OWN = (4, 6)  # rows and columns of the encoder's own grid
OTHERS = [(5, 3), (7, 11), (6, 4), (2, 13), (4, 7), (9, 1), (1, 1)]
RESIZES = ["bilinear", "bicubic", "bicubic_antialias", "bicubic_offset"]
KINDS = list(POSITIONS)
LEARNED = ["learned", "learned2d", "relative"]


def build(kind: str, grid: tuple[int, int] = OWN, **changes) -> Positions:
    """Positions whose parameters are all random and different."""
    image = (8 * grid[0], 8 * grid[1])
    config = ViTConfig(**{"image": image, "patch": 8, "width": 32, "depth": 1, "heads": 2, "positions": kind} | changes)
    positions = POSITIONS[kind](config, config.grid)
    for parameter in positions.parameters():
        torch.nn.init.normal_(parameter)
    return positions


def array(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.detach().double().numpy()


def cubic(own: int, new: int, how: str) -> np.ndarray:
    """(new, own): weights of Keys's cubic convolution, pixel centres aligned.

    PyTorch has two kernels: with antialiasing a = -0.5, stretched where there are fewer pixels, and
    cut off at the edge as in Pillow; else a = -0.75, and the edge is repeated.
    """
    weights, antialias = np.zeros((new, own)), how == "bicubic_antialias"
    a, scale = -0.5 if antialias else -0.75, own / (new + (0.1 if how == "bicubic_offset" else 0))
    stretch = max(scale, 1) if antialias else 1
    for place in range(new):
        source = (place + 0.5) * scale - 0.5
        for neighbour in range(math.floor(source - 2 * stretch), math.ceil(source + 2 * stretch) + 1):
            x = abs(source - neighbour) / stretch
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
            weight = near if x <= 1 else far if x < 2 else 0
            if not antialias or 0 <= neighbour < own:
                weights[place, min(max(neighbour, 0), own - 1)] += weight
    return weights / weights.sum(1, keepdims=True)


def resize(picture: np.ndarray, grid: tuple[int, int], how: str) -> np.ndarray:
    """Resizes a picture (h, w, d) by other people's code or by weights written out."""
    own = picture.shape[:2]
    if how == "bilinear":  # the ViT paper's code, checkpoint.py
        return scipy.ndimage.zoom(picture, (grid[0] / own[0], grid[1] / own[1], 1), order=1)
    rows, columns = (cubic(*sides, how) for sides in zip(own, grid, strict=True))
    return np.einsum("ih,jw,hwd->ijd", rows, columns, picture)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("grid", OTHERS)
@pytest.mark.parametrize("how", RESIZES)
def test_a_learned_table_is_interpolated_as_published_code_does(how, grid, class_token):
    positions = build("learned", resize=how, pool="avg", class_token=class_token, registers=2)
    table = array(positions.table)
    assert len(table) == class_token + 24
    picture = table[class_token:].reshape(*OWN, 32)
    np.testing.assert_allclose(array(positions.patches(OWN)), picture.reshape(24, 32))
    np.testing.assert_allclose(
        array(positions.patches(grid)), resize(picture, grid, how).reshape(-1, 32), atol=2e-5, rtol=1e-4
    )
    np.testing.assert_allclose(array(positions.class_token()), table[0] if class_token else np.zeros(32))


@pytest.mark.parametrize("grid", [(5, 3), (7, 11), (6, 4)])
def test_bicubic_antialias_is_timms(grid):
    positions = build("learned", resize="bicubic_antialias")
    expected = timm.layers.resample_abs_pos_embed(positions.table[None], list(grid), list(OWN))[0]
    torch.testing.assert_close(torch.cat([positions.class_token()[None], positions.patches(grid)]), expected)


@pytest.mark.parametrize("grid", [OWN, *OTHERS])
@pytest.mark.parametrize("how", RESIZES)
def test_rows_and_columns_of_learned2d_are_interpolated_each_for_itself(how, grid):
    positions = build("learned2d", resize=how)
    rows, columns = array(positions.rows), array(positions.columns)
    if grid[0] != OWN[0]:
        rows = resize(rows[:, None], (grid[0], 1), how)[:, 0]
    if grid[1] != OWN[1]:
        columns = resize(columns[None], (1, grid[1]), how)[0]
    expected = [np.concatenate([columns[x], rows[y]]) for y in range(grid[0]) for x in range(grid[1])]
    np.testing.assert_allclose(array(positions.patches(grid)), np.stack(expected), atol=2e-5, rtol=1e-4)
    assert positions.class_token() is positions.token


@pytest.mark.parametrize("how", RESIZES)
def test_a_table_of_one_row_or_column_is_resized_along_the_other_axis_alone(how):
    for own, new in [((1, 6), (1, 4)), ((6, 1), (4, 1)), ((6, 1), (9, 1))]:
        positions = build("learned", own, resize=how, pool="avg")
        picture = array(positions.table).reshape(*own, 32)
        found = array(positions.patches(new)).reshape(*new, 32)
        np.testing.assert_allclose(found, resize(picture, new, how), atol=2e-5, rtol=1e-4)


def wave(kind: str, x: int, y: int, width: int) -> list[float]:
    """A patch's sines and cosines, channel by channel."""
    quarter, values = width // 4, []
    for channel in range(width):
        part, k = divmod(channel, quarter)
        omega = 10_000 ** -(k / (quarter - 1 if kind == "sincos2d" else quarter))
        if kind == "sincos2d_timm":
            axis, wave = (y, x)[part % 2], (math.sin, math.cos)[part // 2]
        else:
            axis, wave = (x, y)[part // 2], (math.sin, math.cos)[part % 2]
        values.append(wave(axis * omega))
    return values


@pytest.mark.parametrize("grid", [OWN, *OTHERS])
@pytest.mark.parametrize("kind", ["sincos2d", "sincos2d_mae", "sincos2d_timm"])
def test_sines_and_cosines_are_laid_out_as_published(kind, grid):
    positions = build(kind)
    expected = [wave(kind, x, y, 32) for y in range(grid[0]) for x in range(grid[1])]
    np.testing.assert_allclose(array(positions.patches(grid)), expected, atol=1e-6)
    assert not positions.class_token().any()


def test_sincos2d_timm_is_what_timm_computes():
    found = build("sincos2d_timm").patches((5, 3))
    torch.testing.assert_close(found, timm.layers.build_sincos2d_pos_embed([5, 3], 32), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("class_token", "registers"), [(False, 0), (True, 0), (True, 2), (False, 1)])
@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize("grid", [OWN, (5, 3), (1, 4), (3, 9), (7, 1)])
def test_the_relative_bias_is_that_of_each_pair_of_tokens(grid, how, class_token, registers):
    positions = build("relative", resize=how, pool="avg", class_token=class_token, registers=registers)
    table, prefix = array(positions.table), class_token + registers
    assert table.shape == (2, 7 * 11 + (3 if prefix else 0))
    picture, new = table[:, :77].reshape(2, 7, 11), (2 * grid[0] - 1, 2 * grid[1] - 1)
    if grid != OWN:
        picture = resize(picture.transpose(1, 2, 0), new, how).transpose(2, 0, 1)
    places = [None] * prefix + list(itertools.product(range(grid[0]), range(grid[1])))
    expected = np.empty((2, len(places), len(places)))
    for (i, query), (j, key) in itertools.product(enumerate(places), enumerate(places)):
        if query and key:
            expected[:, i, j] = picture[:, query[0] - key[0] + grid[0] - 1, query[1] - key[1] + grid[1] - 1]
        else:
            expected[:, i, j] = table[:, -3 if key else -2 if query else -1]
    np.testing.assert_allclose(array(positions.bias(grid)), expected, atol=2e-5, rtol=1e-4)


def test_the_relative_table_is_beits_transposed():
    positions = build("relative", class_token=True)
    index = timm.layers.pos_embed_rel.gen_relative_position_index(OWN, class_token=True)
    beit = positions.table.T[index.flatten()].view(25, 25, 2).permute(2, 0, 1)
    assert torch.equal(positions.bias(OWN), beit)


@pytest.mark.parametrize("grid", [OWN, *OTHERS])
def test_rope_is_that_of_timm_and_transformers(grid):
    positions = build("rope", heads=2, registers=4)
    angles = positions.angles(grid)
    assert angles.shape == (5 + math.prod(grid), 16)
    assert not angles[:5].any()
    theirs = timm.layers.RotaryEmbeddingDinoV3(16).get_embed(list(grid))  # sines, then cosines
    torch.testing.assert_close(torch.cat([angles.sin(), angles.cos()], 1)[5:], theirs, atol=1e-5, rtol=0)
    peer = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")
    config = peer.DINOv3ViTConfig(hidden_size=32, num_attention_heads=2, patch_size=8, image_size=32)
    cos, sin = peer.DINOv3ViTRopePositionEmbedding(config).eval()(torch.zeros(1, 3, 8 * grid[0], 8 * grid[1]))
    torch.testing.assert_close(angles.cos()[5:], cos, atol=1e-5, rtol=0)
    torch.testing.assert_close(angles.sin()[5:], sin, atol=1e-5, rtol=0)


def test_rope_makes_scores_depend_on_offsets_alone():
    angles = build("rope", pool="avg").angles(OWN)
    query, key = torch.randn(2, 1, 2, 1, 16)
    scores = (turn(query, angles) @ turn(key, angles).mT)[0, 0]  # the same query and key everywhere
    of_offset: dict[tuple[int, int], list[float]] = {}
    for (i, a), (j, b) in itertools.product(enumerate(itertools.product(range(4), range(6))), repeat=2):
        of_offset.setdefault((a[0] - b[0], a[1] - b[1]), []).append(scores[i, j].item())
    assert len(of_offset) == 7 * 11
    assert all(max(group) - min(group) < 1e-4 for group in of_offset.values())
    means = [np.mean(group) for group in of_offset.values()]
    assert len(np.unique(np.round(means, 4))) == 7 * 11  # and every offset has its own


def test_turning_multiplies_complex_numbers_and_keeps_the_dtype():
    values, angles = torch.randn(3, 2, 5, 8), torch.randn(5, 4).repeat(1, 2)
    turned = torch.complex(values[..., :4], values[..., 4:]) * torch.polar(torch.ones(5, 4), angles[:, :4])
    torch.testing.assert_close(turn(values, angles), torch.cat([turned.real, turned.imag], -1))
    assert turn(values.bfloat16(), angles).dtype == torch.bfloat16
    torch.testing.assert_close(turn(values.bfloat16(), angles).float(), turn(values, angles), atol=0.05, rtol=0.05)
    each = turn(values, angles.expand(3, 1, 5, 8))  # angles of each image's own tokens
    assert torch.equal(each, turn(values, angles))


@pytest.mark.parametrize("registers", [0, 4, 8])
@pytest.mark.parametrize("grid", [OWN, (3, 2), (1, 5)])
def test_rope_capi_places_tokens_as_capi_does(grid, registers):
    side = registers // 4
    places = [(step / side, 0.0) for step in range(side)]
    places += [(1.0, step / side) for step in range(side)]
    places += [(1 - step / side, 1.0) for step in range(side)]
    places += [(0.0, 1 - step / side) for step in range(side)]
    places = [(row * (grid[0] > 1), column * (grid[1] > 1)) for row, column in places]  # its scale_reg_to_visible
    places += itertools.product(np.linspace(0, 1, grid[0]), np.linspace(0, 1, grid[1]))
    turns = [7 * 10_000 ** -(k / 3) for k in range(4)]  # 7, ..., 7e-4
    expected = [[2 * math.pi * axis * turn for axis in (y, y, x, x) for turn in turns] for y, x in places]
    bare = build("rope_capi", pool="avg", registers=registers).angles(grid)
    np.testing.assert_allclose(array(bare), expected, rtol=1e-6)
    angles = build("rope_capi", registers=registers).angles(grid)  # with a class token, which CAPI lacks
    assert not angles[0].any()
    assert torch.equal(angles[1:], bare)


def test_rope_capi_is_no_rotation_and_rope_is():
    for kind, rotates in [("rope_capi", False), ("rope", True)]:
        values = torch.randn(1, 2, 24, 16)
        turned = turn(values, build(kind, pool="avg").angles(OWN))
        assert torch.allclose(turned.norm(dim=-1), values.norm(dim=-1), rtol=1e-4) == rotates


def everything(positions: Positions, grid: tuple[int, int]) -> list[Tensor]:
    found = [positions.patches(grid), positions.class_token(), positions.angles(grid), positions.bias(grid)]
    return [part for part in found if part is not None]


@pytest.mark.parametrize("grid", [OWN, (5, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_the_shapes_it_promises(kind, grid):
    positions, n = build(kind, registers=4), math.prod(grid)
    nothing = kind in ("relative", "rope", "rope_capi", "none")
    assert positions.patches(grid).shape == ((1, 32) if nothing else (n, 32))
    assert positions.patches(grid).any() != nothing
    assert positions.class_token().shape == (32,)
    assert positions.class_token().any() == (kind in ("learned", "learned2d"))
    angles, bias = positions.angles(grid), positions.bias(grid)
    assert (angles is None) == (kind not in ("rope", "rope_capi"))
    assert angles is None or angles.shape == (5 + n, 16)
    assert (bias is None) == (kind != "relative")
    assert bias is None or bias.shape == (2, 5 + n, 5 + n)


@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize("grid", [OWN, (5, 3), (9, 13)])
@pytest.mark.parametrize("kind", LEARNED)
def test_gradients_reach_every_learned_value(kind, grid, how):
    positions = build(kind, resize=how, registers=2)
    sum((part**2).sum() for part in everything(positions, grid)).backward()
    for name, parameter in positions.named_parameters():
        assert parameter.grad is not None, name
        if grid != (5, 3) or how == "bicubic_antialias":  # a smaller grid does not look at every patch
            assert (parameter.grad != 0).all(), name


@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_resized_is_the_state_of_an_encoder_with_that_grid(kind, class_token, how):
    positions = build(kind, resize=how, pool="avg", class_token=class_token)
    for grid in [OWN, (5, 3), (8, 12)]:
        other = build(kind, grid, resize=how, pool="avg", class_token=class_token)
        state = positions.resized(other.config, other.grid)
        assert not any(value.requires_grad for value in state.values())
        other.load_state_dict(state)  # strict
        for found, expected in zip(everything(other, grid), everything(positions, grid), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_resized_leaves_out_what_a_class_token_had(kind):
    positions = build(kind, pool="avg", class_token=True)
    other = build(kind, (5, 3), pool="avg")
    other.load_state_dict(positions.resized(other.config, other.grid))  # strict
    torch.testing.assert_close(other.patches((5, 3)), positions.patches((5, 3)))
    if kind == "relative":
        torch.testing.assert_close(other.bias((5, 3)), positions.bias((5, 3))[:, 1:, 1:])


@pytest.mark.parametrize("kind", LEARNED)
def test_initial_values_are_small_normal_numbers_or_for_biases_zero(kind):
    positions = build(kind, (12, 10), width=64)
    positions.initialise()
    for parameter in positions.parameters():
        if kind == "relative":
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.3 if parameter.ndim == 1 else 0.15)
            assert abs(parameter.mean().item()) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_positions_work_on_the_meta_device_and_leave_nothing_of_it_behind(kind):
    TABLES.clear()
    with torch.device("meta"):
        positions = build(kind)
        assert all(part.is_meta for part in everything(positions, (5, 3)))
        real = everything(build(kind).to_empty(device="cpu"), (5, 3))
    assert not any(part.is_meta for part in real)
    if not list(positions.parameters()):
        for found, expected in zip(real, everything(build(kind), (5, 3)), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_parameters_can_be_put_in_place_of_the_own(kind):
    positions = build(kind, resize="bicubic")

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = positions

        def forward(self, grid):
            return everything(self.positions, grid)

    lower = {f"positions.{name}": value.bfloat16() for name, value in positions.named_parameters()}
    for grid in (OWN, (5, 3)):
        found = torch.func.functional_call(Whole(), lower, (grid,))
        for part, expected in zip(found, everything(positions, grid), strict=True):
            torch.testing.assert_close(part.float(), expected.float(), atol=0.02, rtol=0.02)
            assert part.dtype == (torch.bfloat16 if expected.requires_grad else torch.float32)


@pytest.mark.parametrize("kind", ["sincos2d", "rope", "rope_capi"])
def test_a_fixed_table_is_made_once_and_serves_training_after_evaluation(kind):
    TABLES.clear()
    with torch.inference_mode():
        everything(build(kind), OWN)
    (table,) = TABLES.values()
    assert not table.is_inference()
    assert not table.requires_grad
    assert any(part is table for part in everything(build(kind), OWN))
    weight = torch.ones((), requires_grad=True)
    (table * weight).sum().backward()
    assert weight.grad is not None


def test_tables_are_few():
    positions = build("sincos2d")
    for rows in range(1, 50):
        positions.patches((rows, 2))
    assert len(TABLES) <= 32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "how"), [(kind, "bilinear") for kind in KINDS] + list(itertools.product(LEARNED, RESIZES[2:]))
)
def test_compiled_whole_positions_stay_the_same_for_every_grid(kind, how):
    TABLES.clear()
    torch.compiler.reset()
    positions = build(kind, resize=how)

    def forward(image: Tensor) -> list[Tensor]:
        return everything(positions, (image.shape[0] // 8, image.shape[1] // 8))

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for sides in [(32, 48), (40, 24), (56, 88)]:
        for found, expected in zip(compiled(torch.zeros(sides)), forward(torch.zeros(sides)), strict=True):
            torch.testing.assert_close(found, expected)
    assert all(type(table) is Tensor for table in TABLES.values())
