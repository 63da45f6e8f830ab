"""A visible context and blocks to be predicted from it (I-JEPA, arXiv 2301.08243)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mpp import draws
from mpp.masks.whole import BITS, ONE, Grid, below, rectangle, root, size

Range = tuple[float, float]
TARGETS, SCALE, ASPECT = 4, (0.15, 0.2), (0.75, 1.5)  # of targets (I-JEPA, appendix A)
CONTEXT = (0.85, 1.0)  # there
TRIES = 8


class Blocks(NamedTuple):
    """What an encoder sees of each image, and what is predicted from it; no patch is in both."""

    context: Tensor  # (b, k)
    targets: Tensor  # (b, t, a), blocks that may overlap


def multi_block(
    images: int, grid: Grid, count: int, device: torch.device, *, targets: int = TARGETS, scale: Range = SCALE,
    aspect: Range = ASPECT, context: Range = CONTEXT,
) -> Blocks:  # fmt: skip
    """Draws targets in each image, and a context of `count` patches, which is a large block less all of them.

    The shape of targets is the whole batch's draw from `target_shapes`, all of one area: I-JEPA draws area and aspect
    anew for each batch, but another number of patches is another graph. The context's block has a share `context` of
    the grid, its shape, and one size in a batch. I-JEPA cuts contexts to the shortest of the batch, from the bottom;
    here those patches that are left out are drawn. It draws anew where 10 or fewer remain; here where fewer than
    `count` do: TRIES times, then all targets of that image lie upon the first. Where `count` always remain, one try is
    drawn. I-JEPA's code never reaches the grid's last row and column; here every place is as likely.
    """
    shapes = check_multi_block(grid, count, targets=targets, scale=scale, aspect=aspect, context=context)
    (height, width), patches, area = grid, math.prod(grid), math.prod(shapes[0])
    tries = 1 if count <= _least(grid, context) - targets * area else TRIES

    of_shape, of_share = draws.below(draws.batch_keys(device), 2, 1 << BITS)[0].unbind()
    shape = below(of_shape, len(shapes))
    high = torch.zeros_like(shape)
    for number, (side, _) in enumerate(shapes):
        high = torch.where(shape == number, side, high)
    wide = area // high
    low, top_share = (round(ONE * part) for part in context)
    share = low + below(of_share, top_share - low + 1)
    context_high, context_wide = root(height**2 * share, height), root(width**2 * share, width)

    keys = draws.keys(images, device)
    numbers = draws.below(keys, 2 + 2 * tries * targets, 1 << BITS)
    top, left = below(numbers[:, 0], height - context_high + 1), below(numbers[:, 1], width - context_wide + 1)
    block = rectangle(top, context_high, left, context_wide, grid)  # (b, n)
    tops = below(numbers[:, 2::2], height - high + 1).unflatten(1, (tries, targets))  # (b, tries, t)
    lefts = below(numbers[:, 3::2], width - wide + 1).unflatten(1, (tries, targets))
    if tries > 1:
        tops, lefts = (torch.cat([places, places[:, :1, :1].expand(-1, 1, targets)], 1) for places in (tops, lefts))
    free = block.unsqueeze(1) & ~rectangle(tops, high, lefts, wide, grid).any(2)  # (b, tries, n)
    first = (free.sum(2) >= count).int().argmax(1)  # (b,), the first try that leaves enough; one does
    image = torch.arange(images, device=device)
    tops, lefts, free = tops[image, first].unsqueeze(2), lefts[image, first].unsqueeze(2), free[image, first]

    inside = torch.arange(area, device=device)
    index = (tops + inside // wide) * width + lefts + inside % wide  # (b, t, a)
    order = draws.words(draws.apart(keys, 1), patches) & ((1 << 62) - 1)
    return Blocks(torch.where(free, order, order + (1 << 62)).argsort(1)[:, :count], index)


def target_shapes(grid: Grid, scale: Range = SCALE, aspect: Range = ASPECT) -> list[Grid]:
    """The rectangles (high, wide) that a batch's targets may be: those within `aspect` (height / width) of one area, a
    share in `scale` of the grid that has most of them, of several such the nearest to the middle of `scale`. At 14 x 14
    5 x 6 and 6 x 5, at 8 x 8 3 x 4 and 4 x 3. ValueError where there is none."""
    found: dict[int, list[Grid]] = {}
    for high in range(1, grid[0] + 1):
        for wide in range(1, grid[1] + 1):
            if scale[0] <= high * wide / math.prod(grid) <= scale[1] and aspect[0] <= high / wide <= aspect[1]:
                found.setdefault(high * wide, []).append((high, wide))
    if not found:
        raise ValueError(
            f"no block has {scale[0]:g} to {scale[1]:g} of a grid of {size(grid)} patches and an aspect of "
            f"{aspect[0]:g} to {aspect[1]:g}"
        )
    middle = sum(scale) / 2 * math.prod(grid)
    return max(found.values(), key=lambda shapes: (len(shapes), -abs(math.prod(shapes[0]) - middle)))


def check_multi_block(
    grid: Grid, count: int, *, targets: int = TARGETS, scale: Range = SCALE, aspect: Range = ASPECT,
    context: Range = CONTEXT,
) -> list[Grid]:  # fmt: skip
    """The targets' shapes; ValueError where there are none, or no context of that many patches."""
    if targets < 1:
        raise ValueError(f"a context needs at least 1 target, got {targets}")
    if not 0 < context[0] <= context[1] <= 1:
        raise ValueError(f"a context's share must be a range in (0, 1], got {context[0]:g} to {context[1]:g}")
    shapes = target_shapes(grid, scale, aspect)
    high, wide = shapes[0]
    most = _least(grid, context) - high * wide
    if not 0 < count <= most:
        raise ValueError(
            f"a context must have 1 to {most} patches, got {count}: a target of {high} x {wide} leaves no more of a "
            f"block with a share of {context[0]:g} of a grid of {size(grid)}"
        )
    return shapes


def _least(grid: Grid, context: Range) -> int:
    """Patches of the smallest block of a context."""
    share, area = round(ONE * context[0]), 1
    for side in grid:  # the root of side ** 2 * share, rounded as `root` does
        area *= max(length for length in range(1, side + 1) if (2 * length - 1) ** 2 * ONE < 4 * side**2 * share)
    return area
