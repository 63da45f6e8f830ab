import math

import pytest
import torch

from mpp.masks import random_index
from mpp.objectives.nearest import Nearest


@pytest.mark.parametrize("grid", [(4, 6), (40, 28)])
def test_the_nearest_visible_patch_is_found_by_looking_at_all(grid):
    hidden = random_index(2, grid[0] * grid[1], grid[0] * grid[1] // 2, torch.device("cpu"))
    found = Nearest(grid)(hidden)
    assert found.shape == (2, 12 if grid == (4, 6) else 64), "a sample of the long sequence"
    for b in range(2):
        visible = sorted(set(range(grid[0] * grid[1])) - set(hidden[b].tolist()))
        for patch, nearest in list(zip(hidden[b].tolist(), found[b].tolist(), strict=False))[:40]:
            far = [math.dist(divmod(patch, grid[1]), divmod(other, grid[1])) for other in visible]
            assert nearest == visible[far.index(min(far))]
