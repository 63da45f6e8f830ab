import math
from collections import Counter

import cv2
import numpy as np
import pytest
import timm.data.auto_augment as timm_augment
from conftest import pictures
from PIL import Image

from mpp.augment.randaugment import NAMES, OPERATIONS, draw, operate

MOVING = ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"]
IN_PLACE = [name for name in NAMES if name not in MOVING]
# OpenCV rounds where Pillow cuts. Before version 5 it also rounded places to 1/32 pixel: between black and white
# neighbours that is up to 1/64 of the range along each side, and single pixels at the edge may fall outside.
ROUNDING, STRAY = (1, 0) if cv2.__version__ >= "5" else (9, 0.03)
SIZES = [(32, 32), (45, 60), (7, 5)]


def timm_operation(pixels: np.ndarray, name: str, level: float, monkeypatch) -> np.ndarray:
    """What timm makes of an image at a signed magnitude, bilinear and filled with grey."""
    sign = math.copysign(1, level)
    monkeypatch.setattr(timm_augment, "_randomly_negate", lambda size: sign * size)
    grey = pixels.shape[2] == 1
    fill = 128 if grey else (128, 128, 128)
    settings = {"img_mean": fill, "interpolation": Image.Resampling.BILINEAR}
    operation = timm_augment.AugmentOp(name, prob=1.0, magnitude=abs(level), hparams=settings)
    picture = Image.fromarray(pixels[:, :, 0] if grey else pixels)
    return np.asarray(operation(picture)).reshape(pixels.shape)


def samples(channels: int) -> list[np.ndarray]:
    """Smooth, noisy, dark, one-valued and nearly one-valued images."""
    random = np.random.default_rng(0)
    found = [pictures(1, size)[0] for size in SIZES]
    found += [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    found += [found[0] // 3 + 20, np.full((9, 8, 3), 77, np.uint8)]
    found += [np.full((9, 8, 3), 77, np.uint8)]
    found[-1][0, 0] = 90
    return [np.ascontiguousarray(image[:, :, :channels]) for image in found]


def test_the_operations_are_those_of_timms_increasing_set():
    assert NAMES == timm_augment._RAND_INCREASING_TRANSFORMS


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", IN_PLACE)
def test_an_operation_on_values_gives_timms_pixels(name, channels, monkeypatch):
    for image in samples(channels):
        for level in [-9.9, -9.0, -2.3, 0.0, 0.4, 5.0, 9.0, 9.9]:
            expected = timm_operation(image, name, level, monkeypatch)
            found = OPERATIONS[name](image, level)
            assert found.dtype == np.uint8
            assert found.shape == image.shape
            assert np.array_equal(found, expected), level


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", MOVING)
def test_an_operation_that_moves_gives_timms_pixels_but_for_rounding(name, channels, monkeypatch):
    for image in samples(channels):
        for level in [-10.0, -9.0, -2.3, 0.0, 0.4, 5.0, 9.0]:
            expected = timm_operation(image, name, level, monkeypatch).astype(int)
            found = OPERATIONS[name](image, level)
            assert found.dtype == np.uint8
            assert found.shape == image.shape
            assert (abs(found - expected) > ROUNDING).mean() <= STRAY, level


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_changes_a_picture_and_leaves_its_input_alone(name):
    image = pictures(1, (32, 32))[0] // 2 + 40
    before = image.copy()
    assert (OPERATIONS[name](image, 9.0) != before).any()
    assert np.array_equal(image, before)


def test_posterizing_keeps_one_bit_at_the_highest_magnitude():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    assert np.array_equal(OPERATIONS["PosterizeIncreasing"](image, 10.0), image // 128 * 128)


def test_operations_are_done_in_their_order():
    image = pictures(1, (16, 16))[0]
    invert, posterize = ("Invert", 9.0), ("PosterizeIncreasing", 9.0)
    assert np.array_equal(operate(image, [invert, posterize]), (255 - image) // 128 * 128)
    assert np.array_equal(operate(image, [posterize, invert]), 255 - image // 128 * 128)
    assert np.array_equal(operate(image, []), image)


def test_draws_depend_on_seed_and_position_alone():
    whole = draw(2, 9.0, 0.5, 3, np.arange(100, 140)).each()
    assert draw(2, 9.0, 0.5, 3, np.arange(110, 120)).each() == whole[10:20]
    assert draw(2, 9.0, 0.5, 4, np.arange(100, 140)).each() != whole
    assert draw(0, 9.0, 0.5, 3, np.arange(3)).each() == [[], [], []]


def test_operations_are_equally_frequent_and_every_other_one_is_left_out():
    images = 30_000
    drawn = draw(2, 9.0, 0.0, 0, np.arange(images)).each()
    done = Counter(len(operations) for operations in drawn)
    for count, share in [(0, 0.25), (1, 0.5), (2, 0.25)]:
        assert done[count] / images == pytest.approx(share, abs=0.01)
    names = Counter(name for operations in drawn for name, _ in operations)
    assert names.keys() == set(NAMES)
    for name in NAMES:
        assert names[name] == pytest.approx(images / 15, abs=5 * math.sqrt(images / 15))
    pairs = Counter(tuple(name for name, _ in operations) for operations in drawn if len(operations) == 2)
    assert len(pairs) == 225, "the second is drawn whatever the first was"


def test_magnitudes_are_normal_around_theirs_cut_at_10_and_of_either_sign():
    exact = [level for operations in draw(3, 7.0, 0.0, 0, np.arange(1000)).each() for _, level in operations]
    assert set(exact) == {-7.0, 7.0}
    drawn = draw(3, 5.0, 1.0, 0, np.arange(20_000)).each()
    levels = np.array([level for operations in drawn for _, level in operations])
    assert (levels > 0).mean() == pytest.approx(0.5, abs=0.02)
    assert abs(levels).mean() == pytest.approx(5, abs=0.03)
    assert abs(levels).std() == pytest.approx(1, abs=0.03)
    share = (abs(levels) < 6).mean()
    assert share == pytest.approx(0.841, abs=0.01), "one standard deviation of a normal draw"
    drawn = draw(3, 9.0, 3.0, 0, np.arange(20_000)).each()
    noisy = np.array([level for operations in drawn for _, level in operations])
    assert abs(noisy).max() == 10
    assert (abs(noisy) == 10).mean() == pytest.approx(0.369, abs=0.01)
