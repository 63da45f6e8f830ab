"""Masks: what their papers say of them holds for 2,000 draws, and they are the same however a batch is computed."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch._dynamo.testing import CompileCounterWithBackend

from mpp import draws, masks

CPU = torch.device("cpu")
DRAWS = 2000
GRID = (14, 14)
CASES = [
    ("random", GRID, 147), ("blocks", GRID, 75), ("blocks", (8, 8), 26), ("blocks", (10, 16), 64), ("units", GRID, 120),
    ("units", (6, 16), 40), ("large_units", (16, 16), 192), ("inverse_block", GRID, 127), ("inverse_block", (8, 8), 42),
    ("inverse_block", (10, 16), 104),
]  # fmt: skip


def drawn(name: str, grid: tuple[int, int], count: int, images: int = DRAWS, step: int = 0) -> np.ndarray:
    with draws.drawing(draws.keys_of(0, step, np.arange(images))):
        return masks.MASKS[name].draw(images, grid, count, CPU).numpy()


def pictures(index: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(b, k) indices as (b, h, w) bool."""
    found = np.zeros((len(index), math.prod(grid)), dtype=bool)
    np.put_along_axis(found, index, True, axis=1)
    return found.reshape(-1, *grid)


@pytest.mark.parametrize(("name", "grid", "count"), CASES)
def test_masks_are_as_many_different_patches_of_the_grid_as_asked(name, grid, count):
    index = drawn(name, grid, count)
    assert index.dtype == np.int64
    assert index.shape == (DRAWS, count)
    assert index.min() >= 0
    assert index.max() < math.prod(grid)
    assert (pictures(index, grid).sum((1, 2)) == count).all()
    assert len(np.unique(pictures(index, grid).reshape(DRAWS, -1), axis=0)) > DRAWS / 20, "images draw apart"


@pytest.mark.parametrize(("name", "grid", "count"), [case for case in CASES if case[0] != "blocks"])
def test_every_patch_is_as_likely(name, grid, count):
    """The spread of 2,000 draws of a share about it; patches of one image depend on one another, so no chi-square."""
    share = count / math.prod(grid)
    rates = pictures(drawn(name, grid, count), grid).mean(0)
    assert np.abs(rates - share).max() < 4.5 * math.sqrt(share * (1 - share) / DRAWS)


@pytest.mark.parametrize(("name", "grid", "count", "unit"), [
    ("units", GRID, 120, 2), ("units", (6, 16), 40, 2), ("large_units", (16, 16), 192, 4),
])  # fmt: skip
def test_units_are_hidden_whole_and_every_set_is_as_likely(name, grid, count, unit):
    found = pictures(drawn(name, grid, count), grid)
    tiles = found.reshape(DRAWS, grid[0] // unit, unit, grid[1] // unit, unit).transpose(0, 1, 3, 2, 4)
    assert (tiles.all((3, 4)) == tiles.any((3, 4))).all()
    with draws.drawing(draws.keys_of(0, 1, np.arange(3000))):
        sets = masks.units(3000, (4, 6), 8, CPU).sort(1).values  # 2 of 6 units: 15 sets
    counts = np.unique(sets.numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == 15
    assert chisquare(counts).pvalue > 1e-3


def test_shares_are_counts_as_their_papers_have_them():
    counts = {name: masks.MASKS[name].count for name in masks.MASKS}
    assert counts["random"](0.75, GRID) == 147  # MAE
    assert counts["units"](0.6, GRID) == 30 * 4  # SimMIM: ceil(0.6 * 49)
    assert counts["units"](0.75, (8, 8)) == 12 * 4, "not pushed over by a last bit"
    assert counts["large_units"](0.75, (16, 16)) == 12 * 16  # Pixio at 256 pixels keeps int(16 * 0.25)
    assert counts["inverse_block"](0.65, GRID) == 127  # CAPI: int(0.65 * 196)


def one_by_one(key: torch.Tensor, grid: tuple[int, int], count: int, smallest: int) -> tuple[list[int], list]:
    """BEiT's loop over blocks in Python: patches in the order in which they are hidden, and each block as it was drawn
    (the limit of its area, area, aspect drawn, height, width)."""
    height, width = grid
    tries = min(32, math.ceil(8 / (1 - count / math.prod(grid))))
    numbers = [number / 2**31 for number in draws.below(key, 4 * tries + 1, 1 << 31)[0].tolist()]
    hidden, found, side = [], [], int(numbers[-1] * 4)
    order = {
        0: lambda patch: patch, 1: lambda patch: (-patch[0], -patch[1]),
        2: lambda patch: patch[::-1], 3: lambda patch: (-patch[1], -patch[0]),
    }[side]  # fmt: skip
    for number in range(tries):
        if len(hidden) >= count:
            break
        limit = max(count - len(hidden), smallest)
        area = smallest + int(numbers[tries + number] * (limit - smallest + 1))
        exponent = (int(numbers[number] * 256) + 0.5) / 256
        aspect = 0.3 * (1 / 0.09) ** exponent
        high = max(1, min(math.floor(math.sqrt(area * aspect) + 0.5), height))
        high = max(high, math.ceil(area / width))
        wide = math.floor(area / high + 0.5)
        top, left = (int(numbers[tries * part + number] * (room - length + 1))
                     for part, room, length in ((2, height, high), (3, width, wide)))  # fmt: skip
        assert 0 <= top <= top + high <= height
        assert 0 <= left <= left + wide <= width
        found.append((limit, area, aspect, high, wide))
        block = {(row, column) for row in range(top, top + high) for column in range(left, left + wide)}
        hidden += sorted(block - set(hidden), key=order)
    return [row * width + column for row, column in hidden], found


@pytest.mark.parametrize(("grid", "count", "smallest"), [(GRID, 75, 16), ((8, 8), 26, 5), ((10, 16), 64, 13)])
def test_blocks_are_those_of_the_algorithm_one_by_one_the_last_cut_to_fit(grid, count, smallest):
    with draws.drawing(draws.keys_of(0, 0, np.arange(DRAWS))):
        keys = draws.keys(DRAWS, CPU)
    index, areas, aspects = drawn("blocks", grid, count), [], []
    for key, patches in zip(keys.split(1), index, strict=True):
        expected, found = one_by_one(key, grid, count, smallest)
        assert patches.tolist() == expected[:count]
        for limit, area, aspect, high, wide in found:
            assert smallest <= area <= limit <= count
            assert 0.3 <= aspect <= 1 / 0.3
            assert abs(high - math.sqrt(area * aspect)) <= 0.5 or high in (grid[0], math.ceil(area / grid[1]))
            assert abs(high * wide - area) <= high / 2, "whole sides come as near to the area as they can"
            aspects.append(aspect)
        areas.append(found[0][1])
    assert chisquare(np.bincount(areas)[smallest:], ddof=0).pvalue > 1e-3, "any area from the smallest to all"
    assert len(np.bincount(areas)) == count + 1
    assert np.mean(np.log(aspects)) == pytest.approx(0, abs=0.05)


def test_blocks_prefer_no_side_of_the_picture():
    rates = pictures(drawn("blocks", GRID, 75), GRID).mean(0)
    for other in (rates[::-1], rates[:, ::-1], rates.T):
        assert np.abs(rates - other).max() < 4.5 * math.sqrt(2 * 0.25 / DRAWS)


def test_blocks_that_do_not_suffice_are_filled_up_from_a_side():
    found = pictures(drawn("blocks", GRID, 195), GRID)  # one patch is left: in a corner wherever tries ran out
    assert (found.sum((1, 2)) == 195).all()
    assert np.mean([not one[::13, ::13].all() for one in found]) > 0.5


@pytest.mark.parametrize(("grid", "count"), [(GRID, 127), ((8, 8), 42), ((10, 16), 104), ((4, 4), 15), ((4, 12), 8)])
def test_what_an_inverse_block_leaves_is_one_rolled_rectangle(grid, count):
    aspect = 0.5 if count != 8 else 0.2
    with draws.drawing(draws.keys_of(0, 0, np.arange(DRAWS))):
        found = pictures(masks.inverse_block(DRAWS, grid, count, CPU, aspect=aspect).numpy(), grid)
    (height, width), visible, widths_of = grid, math.prod(grid) - count, {}
    for wide in range(width, math.ceil(visible / height) - 1, -1):  # so that the narrowest stays
        rectangle = np.zeros(grid, dtype=bool)
        rectangle[:, :wide].flat[:visible] = True  # its first patches, row by row
        for down in range(height):
            for right in range(width):
                widths_of[np.roll(rectangle, (down, right), (0, 1)).tobytes()] = wide
    widths = {widths_of[(~hidden).tobytes()] for hidden in found}
    low, high = max(aspect, visible / width**2), min(1 / aspect, height**2 / visible)
    # CAPI: ceil(sqrt(visible / aspect)) for aspects in the range
    assert min(widths) >= math.floor(math.sqrt(visible / high))
    assert max(widths) <= math.ceil(math.sqrt(visible / low))
    assert len(widths) > 1 or visible == 1


@pytest.mark.parametrize(("grid", "count"), [(GRID, 49), (GRID, 70), ((8, 8), 1), ((8, 8), 20), ((8, 8), 37)])
def test_multi_block_has_targets_of_one_shape_and_a_context_apart_from_them(grid, count):
    heights, distinct = set(), []
    for step in range(8):
        images = DRAWS // 8
        with draws.drawing(draws.keys_of(0, step, np.arange(images))):
            context, targets = masks.multi_block(images, grid, count, CPU)
        area = 30 if grid == GRID else 12
        assert context.shape == (images, count)
        assert targets.shape == (images, 4, area)
        rows, columns = targets // grid[1], targets % grid[1]
        high, wide = (side.amax(2) - side.amin(2) + 1 for side in (rows, columns))
        assert (high * wide == area).all(), "a rectangle of as many patches"
        assert len(high.unique()) == 1, "one shape in a batch"
        assert 0.15 <= area / math.prod(grid) <= 0.2
        assert 0.75 <= int(high[0, 0]) / int(wide[0, 0]) <= 1.5
        hidden, seen = pictures(targets.flatten(1).numpy(), grid), pictures(context.numpy(), grid)
        assert not (hidden & seen).any()
        assert (seen.sum((1, 2)) == count).all()
        assert (targets[:, 0].sort(1).values.diff(dim=1) > 0).all(), "no patch twice in a target"
        heights.add(int(high[0, 0]))
        distinct += [hidden.sum((1, 2)).mean()]
        if count <= math.prod(grid) // 4:
            assert rows.max() == grid[0] - 1, "the last row is reached"
    assert len(heights) == 2
    assert (np.array(distinct) > area * 1.5).all() or count == 37, "targets lie apart where the context allows"


def test_target_shapes_are_all_of_one_area():
    assert sorted(masks.target_shapes(GRID)) == [(5, 6), (6, 5)]
    assert sorted(masks.target_shapes((16, 16))) == [(6, 7), (7, 6)]


def all_masks(images: int, device: torch.device) -> list[torch.Tensor]:
    return [
        *(mask.draw(images, (8, 8), 48, device) for mask in masks.MASKS.values()),
        *masks.multi_block(images, (8, 8), 20, device),
    ]


def test_an_image_has_the_same_mask_in_any_part_of_the_batch():
    def of(places: np.ndarray) -> list[torch.Tensor]:
        with draws.drawing(draws.keys_of(0, 5, places)):
            return all_masks(len(places), CPU)

    whole = of(np.arange(12))
    for part in (np.arange(4, 8), np.array([11, 2])):
        for found, expected in zip(of(part), whole, strict=True):
            assert torch.equal(found, expected[torch.from_numpy(part)])


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compiled_masks_are_the_same_and_one_graph(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA here")

    def few(images: int, place: torch.device) -> list[torch.Tensor]:
        return [
            masks.blocks(images, (4, 6), 6, place), masks.units(images, (4, 6), 8, place),
            masks.inverse_block(images, (4, 6), 14, place), *masks.multi_block(images, (8, 8), 20, place),
        ]  # fmt: skip

    torch._dynamo.reset()
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(few, backend=backend, fullgraph=True, dynamic=False)
    for step in range(3):
        with draws.drawing(draws.keys_of(0, step, np.arange(64))):
            expected = few(64, CPU)
        with draws.drawing(draws.keys_of(0, step, np.arange(64)).to(device)):
            found = compiled(64, torch.device(device))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.cpu(), other)
    assert backend.frame_count == 1


@pytest.mark.parametrize(("check", "message"), [
    (lambda: masks.MASKS["random"].check(GRID, 196), "a mask of 196 patches leaves nothing visible"),
    (lambda: masks.random(2, GRID, 0, CPU), "a mask of 0 patches leaves nothing to predict"),
    (lambda: masks.MASKS["inverse_block"].check(GRID, 196), "leaves nothing visible"),
    (lambda: masks.MASKS["large_units"].check(GRID, 144), "units of 4 x 4 patches don't tile a grid of 14 x 14"),
    (lambda: masks.units(2, GRID, 117, CPU), "a mask of 117 patches is not one of whole units of 2 x 2"),
    (lambda: masks.units(2, GRID, 196, CPU, unit=0), "units of 0 x 0"),
    (lambda: masks.MASKS["blocks"].check(GRID, 12), "blocks of at least 16 patches .* don't fit a mask of 12 patches"),
    (lambda: masks.blocks(2, (2, 32), 30, CPU, smallest=16), "don't fit a mask of 30 patches of a grid of 2 x 32"),
    (lambda: masks.blocks(2, GRID, 30, CPU, aspect=2), r"smallest aspect of a block must be in \[0.01, 1\], got 2"),
    (lambda: masks.inverse_block(2, (2, 32), 40, CPU), "a visible block of 24 patches .* doesn't fit a grid of 2 x 32"),
    (lambda: masks.multi_block(2, (8, 8), 38, CPU), "a context must have 1 to 37 patches, got 38"),
    (lambda: masks.multi_block(2, (3, 3), 1, CPU), "no block has 0.15 to 0.2 of a grid of 3 x 3"),
    (lambda: masks.multi_block(2, GRID, 9, CPU, targets=0), "at least 1 target"),
    (lambda: masks.multi_block(2, GRID, 9, CPU, context=(0.9, 0.8)), "must be a range"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(check, message):
    with pytest.raises(ValueError, match=message) as caught:
        check()
    assert "\n" not in str(caught.value)
