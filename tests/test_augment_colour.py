import numpy as np
import pytest
import torch
from conftest import pictures
from torchvision.transforms.v2 import functional as v2

from mpp.augment.colour import ADJUST, NEUTRAL, Colour, Colours, blur, greyscale, hue, reach, recolour, solarize

FACTORS = [0.0, 0.2, 0.61, 1.0, 1.1, 1.8, 2.5]
TURNS = [-0.5, -0.2, -0.03, 0.0, 0.1, 0.5]


def samples(channels: int) -> list[np.ndarray]:
    """Smooth, noisy, one-valued and tiny images."""
    random = np.random.default_rng(0)
    sizes = [(32, 32), (45, 60), (7, 5), (1, 9), (1, 1)]
    found = [pictures(1, size)[0] for size in sizes]
    found += [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    found += [np.full((9, 8, 3), 77, np.uint8), np.repeat(random.integers(0, 256, (20, 20, 1), np.uint8), 3, 2)]
    return [image[:, :, :channels].copy() for image in found]


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def differences(found: np.ndarray, expected: torch.Tensor) -> np.ndarray:
    assert found.dtype == np.uint8
    assert found.shape == tuple(expected.permute(1, 2, 0).shape)
    return abs(found.astype(int) - expected.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_factors_give_torchvisions_pixels(name, channels):
    function = {function.__name__: function for function in ADJUST}[name]
    found = []
    for image in samples(channels):
        for factor in FACTORS:
            expected = getattr(v2, f"adjust_{name}")(tensor(image), factor)
            found.append(differences(function(image, factor), expected).flatten())
    off = np.concatenate(found)
    # The last bit of a float decides about values that come out as whole numbers, as where all is one grey.
    assert off.max() <= (0 if name == "brightness" else 1)
    assert off.mean() < 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_turned_hues_are_torchvisions_but_for_rounding(channels):
    for image in samples(channels):
        for turn in TURNS:
            found = differences(hue(image, turn), v2.adjust_hue(tensor(image), turn))
            assert found.max() <= 1
            assert found.mean() < 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_greyscale_and_solarising_give_torchvisions_pixels(channels):
    for image in samples(channels):
        assert not differences(greyscale(image), v2.rgb_to_grayscale(tensor(image), channels)).any()
        assert not differences(solarize(image), v2.solarize(tensor(image), 128)).any()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0, 40.0])
def test_a_blur_gives_torchvisions_pixels_but_for_rounding(sigma, channels):
    for image in samples(channels):
        size = [2 * reach(sigma, side) + 1 for side in image.shape[1::-1]]  # torchvision's order is width, height
        found = differences(blur(image, sigma), v2.gaussian_blur(tensor(image), size, [sigma, sigma]))
        assert found.max() <= 1
        assert found.mean() < 2e-3


def test_a_larger_kernel_would_blur_no_more():
    for image in samples(3):
        if min(image.shape[:2]) > 11:
            expected = v2.gaussian_blur(tensor(image), [23, 23], [2.0, 2.0])  # SimCLR's and BYOL's for 224 pixels
            assert differences(blur(image, 2.0), expected).max() <= 1
            assert differences(blur(image, 2.0), expected).mean() < 0.02


def test_colours_change_in_their_order_and_only_as_told():
    image = pictures(1, (20, 24))[0].copy()
    nothing = Colour(list(NEUTRAL), [3, 1, 0, 2], False, 0.0, False)
    assert np.array_equal(recolour(image, nothing), image)
    factors = [1.3, 0.6, 1.7, 0.2]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        expected = tensor(image)
        adjust = [v2.adjust_brightness, v2.adjust_contrast, v2.adjust_saturation, v2.adjust_hue]
        for number in order:
            expected = adjust[number](expected, factors[number])
        found = recolour(image, Colour(factors, order, False, 0.0, False))
        assert differences(found, expected).max() <= 3, "one value of difference, enlarged by what comes after"
        assert differences(found, expected).mean() < 1e-3
    whole = recolour(image, Colour(list(NEUTRAL), [0, 1, 2, 3], True, 1.5, True))
    assert np.array_equal(whole, solarize(blur(greyscale(image), 1.5)))


def test_a_batch_of_colours_gives_each_pictures_own():
    drawn = Colours(
        np.array([[1.1, 0.9, 1.0, 0.1], NEUTRAL]),
        np.array([[0, 2, 1, 3], [3, 2, 1, 0]]),
        np.array([True, False]),
        np.array([0.0, 0.7]),
        np.array([False, True]),
    )
    first = Colour([1.1, 0.9, 1.0, 0.1], [0, 2, 1, 3], True, 0.0, False)
    assert drawn.each() == [first, Colour([1.0, 1.0, 1.0, 0.0], [3, 2, 1, 0], False, 0.7, True)]
