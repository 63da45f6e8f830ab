import math

import numpy as np
import pytest
import torch

from mpp import targets
from mpp.models.layers import take


def slow_class(red: int, green: int, blue: int, pixels: int, bits: int) -> int:
    """The paper's class of a sum of colours over some pixels, in whole numbers: floor(mean / (256 / 2 ** bits))."""
    bins = [(colour * 2**bits) // (256 * pixels) for colour in (red, green, blue)]
    return bins[0] * 4**bits + bins[1] * 2**bits + bins[2]


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_a_patch_of_one_colour_has_the_class_of_that_colour_for_every_pixel_value(bits):
    values = torch.arange(256, dtype=torch.uint8)
    for channel in range(3):
        images = torch.zeros(256, 3, 2, 2, dtype=torch.uint8)
        images[:, channel] = values[:, None, None]
        expected = [
            slow_class(*(4 * v if c == channel else 0 for c in range(3)), pixels=4, bits=bits) for v in range(256)
        ]
        assert targets.mean_colour(images, 2, bits).flatten().tolist() == expected


def test_a_mean_on_the_edge_of_a_bin_falls_in_the_upper_bin():
    image = torch.full((1, 3, 2, 2), 32, dtype=torch.uint8)
    assert targets.mean_colour(image, 2).item() == 0o111
    image[0, :, 0, 0] = 31  # mean 31.75
    assert targets.mean_colour(image, 2).item() == 0


def test_mean_colour_is_the_integer_reference_on_every_patch():
    images = torch.randint(0, 256, (3, 3, 12, 20), dtype=torch.uint8)
    found = targets.mean_colour(images, 4)
    for b in range(3):
        for row in range(3):
            for column in range(5):
                square = images[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].numpy().astype(int)
                assert found[b, 5 * row + column] == slow_class(*square.sum((1, 2)).tolist(), pixels=16, bits=3)


def test_colour_grid_is_the_mean_colour_of_each_cell_in_row_major_order():
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    found = targets.colour_grid(images, 8, grid=4)
    assert found.shape == (2, 6, 16)
    for patch in range(6):
        for cell in range(16):
            top, left = 8 * (patch // 3) + 2 * (cell // 4), 8 * (patch % 3) + 2 * (cell % 4)
            square = images[1, :, top : top + 2, left : left + 2].numpy().astype(int)
            assert found[1, patch, cell] == slow_class(*square.sum((1, 2)).tolist(), pixels=4, bits=3)


@pytest.mark.parametrize("bits", [3, 6, 8])
def test_grey_patches_have_the_class_of_their_mean_brightness(bits):
    images = torch.randint(0, 256, (2, 1, 8, 12), dtype=torch.uint8)
    whole, cells = targets.mean_colour(images, 4, bits), targets.colour_grid(images, 4, 2, bits)
    for patch in range(6):
        square = images[1, 0, 4 * (patch // 3) :, 4 * (patch % 3) :].numpy().astype(int)[:4, :4]
        assert whole[1, patch] == square.sum() * 2**bits // (16 * 256)
        for cell in range(4):
            part = square[2 * (cell // 2) :, 2 * (cell % 2) :][:2, :2]
            assert cells[1, patch, cell] == part.sum() * 2**bits // (4 * 256)
    shades = targets.class_colour(torch.arange(2**bits), bits, 1)
    assert torch.equal(targets.mean_colour(shades[:, :, None, None], 1, bits).flatten(), torch.arange(2**bits))


def test_patch_pixels_come_in_row_column_channel_order():
    images = torch.randint(0, 256, (1, 3, 4, 6), dtype=torch.uint8)
    found = targets.patch_pixels(images, 2)
    expected = [images[0, c, 2 + r, 2 + s].item() for r in range(2) for s in range(2) for c in range(3)]
    assert found[0, 4].tolist() == expected  # second row, second column of patches


def test_the_colour_of_a_class_lies_within_that_class():
    classes = torch.arange(512)
    colours = targets.class_colour(classes, 3)
    assert torch.equal(targets.mean_colour(colours[:, :, None, None], 1).flatten(), classes)
    assert np.unique(colours[:, 0]).tolist() == [16 + 32 * i for i in range(8)]


def test_targets_refuse_what_has_no_colours():
    with pytest.raises(ValueError, match="got torch.float32 with 3 channels"):
        targets.mean_colour(torch.zeros(1, 3, 4, 4), 2)
    with pytest.raises(ValueError, match="uint8 with 2 channels"):
        targets.mean_colour(torch.zeros(1, 2, 4, 4, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match=r"grid \(4\) divides, got 6"):
        targets.colour_grid(torch.zeros(1, 3, 12, 12, dtype=torch.uint8), 6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_patches_put_together_again_are_the_image(dtype, channels):
    images = torch.randint(0, 256, (2, channels, 12, 20)).to(dtype)
    patches = targets.patch_pixels(images, 4)
    assert torch.equal(targets.unpatchify(patches, 4, (3, 5)), images)
    alone = torch.zeros_like(patches)
    alone[:, 7] = patches[:, 7]  # row 1, column 2
    expected = torch.zeros_like(images)
    expected[:, :, 4:8, 8:12] = images[:, :, 4:8, 8:12]
    assert torch.equal(targets.unpatchify(alone, 4, (3, 5)), expected)


# HOG


def slow_hog(image: np.ndarray, patch: int, cell: int, bins: int, window: int) -> np.ndarray:
    """MaskFeat's HOG of one image (c, h, w), pixel by pixel in float64: (n, c * bins * cells)."""
    channels, height, width = image.shape
    padded = np.pad(image.astype(float), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    sums = np.zeros((channels, bins, height // cell, width // cell))
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                near = padded[c, y : y + 3, x : x + 3]
                horizontal = (near * [[1, 0, -1], [2, 0, -2], [1, 0, -1]]).sum()
                vertical = (near * [[1, 2, 1], [0, 0, 0], [-1, -2, -1]]).sum()
                phase = math.atan2(horizontal, vertical) / math.pi * bins  # [-bins, bins]
                weight = 1.0
                if window:
                    far = [place % window - (window - 1) / 2 for place in (y, x)]
                    weight = math.exp(-0.5 * sum((each / (window // 2)) ** 2 for each in far))
                sums[c, math.floor(phase) % bins, y // cell, x // cell] += weight * math.hypot(horizontal, vertical)
    sums /= np.maximum(np.sqrt((sums**2).sum(1, keepdims=True)), 1e-12)
    side, found = patch // cell, []
    for row in range(height // patch):
        for column in range(width // patch):
            there = sums[:, :, side * row : side * (row + 1), side * column : side * (column + 1)]
            found.append(
                [there[c, o, r, s] for c in range(channels) for o in range(bins) for r, s in np.ndindex(side, side)]
            )
    return np.array(found)


@pytest.mark.parametrize(("channels", "patch", "cell", "bins", "window"), [
    (3, 8, 4, 9, None), (1, 8, 8, 9, 16), (3, 4, 4, 6, 0), (1, 8, 2, 8, 3), (2, 8, 4, 1, 5),
])  # fmt: skip
def test_hog_is_the_slow_one_pixel_by_pixel(channels, patch, cell, bins, window):
    images = torch.randint(0, 256, (2, channels, 16, 24), dtype=torch.uint8)
    images[0] //= 64  # coarse, so that gradients often point the same way and along the axes
    expected = np.stack(
        [slow_hog(image, patch, cell, bins, 2 * cell if window is None else window) for image in images.numpy()]
    )
    exact = targets.hog(images.double(), patch, cell, bins, window)
    assert exact.dtype == torch.float64
    np.testing.assert_allclose(exact, expected, atol=1e-12)
    found = targets.hog(images, patch, cell, bins, window)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    at = torch.tensor([[3, 0, 1], [2, 5, 4]])
    assert torch.equal(targets.hog(images, patch, cell, bins, window, at), take(found, at))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(targets.hog(images, patch, cell, bins, window), found)


@pytest.mark.parametrize("bins", [4, 8, 9, 12])
def test_every_gradient_falls_in_its_bin(bins):
    images = torch.randint(0, 256, (1, 3, 60, 60), dtype=torch.uint8)
    images[0, 1] //= 100
    found = targets.hog(images, patch=1, cell=1, bins=bins, window=0)[0].unflatten(-1, (3, bins))  # of single pixels
    padded = np.pad(images[0].numpy().astype(int), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    smooth = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    horizontal = smooth[..., :-2] - smooth[..., 2:]
    smooth = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    vertical = smooth[:, :-2] - smooth[:, 2:]
    phase = np.arctan2(horizontal, vertical) / math.pi * bins
    phase = np.where(np.abs(phase - phase.round()) < 1e-9, phase.round(), phase)  # exactly on an edge
    flat = (horizontal == 0) & (vertical == 0)
    expected = np.where(flat[..., None], 0, np.eye(bins)[np.floor(phase).astype(int) % bins])
    assert flat.any()
    np.testing.assert_allclose(found.transpose(0, 1).reshape(3, 60, 60, bins), expected, atol=1e-6)


def test_hog_of_edges_is_known():
    images = torch.full((4, 3, 16, 16), 100, dtype=torch.uint8)
    images[1, :, :, 8:] = 200  # a vertical edge: 90 degrees, the fifth of nine bins
    images[2, :, 8:] = 50  # a horizontal edge
    images[3, 2, 8:] = 50  # one in blue alone
    found = targets.hog(images, 8).unflatten(-1, (3, 9))  # (b, patches, channels, bins)
    assert found[0].eq(0).all(), "flat, and no number is lost"
    assert found.isfinite().all()
    for image, bin in ((1, 4), (2, 0)):
        assert torch.equal(found[image], torch.eye(9)[bin].expand(4, 3, 9))
    assert torch.equal(found[3, :, 2], torch.eye(9)[0].expand(4, 9))
    assert found[3, :, :2].eq(0).all()


def test_hog_is_that_of_the_picture_whatever_its_brightness_and_contrast():
    images = torch.randint(60, 120, (2, 3, 16, 16), dtype=torch.uint8)
    found = targets.hog(images, 8, 4)
    torch.testing.assert_close(targets.hog(255 - images, 8, 4), found)
    torch.testing.assert_close(targets.hog(images.double() / 64 - 1.5, 8, 4), found.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arguments", [{"cell": 3}, {"cell": 0}, {"bins": 0}, {"window": 1}, {"window": -2}])
def test_hog_of_impossible_sizes_is_refused(arguments):
    with pytest.raises(ValueError, match="hog needs"):
        targets.hog(torch.zeros(1, 3, 8, 8), 8, **{"cell": 4, **arguments})
    with pytest.raises(ValueError, match=r"at least 2x2 pixels, got 8x1"):
        targets.hog(torch.zeros(1, 3, 8, 1), 1, 1)
