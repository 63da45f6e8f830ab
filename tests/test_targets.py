import numpy as np
import pytest
import torch

from mpp import targets


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
