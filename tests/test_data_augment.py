import math

import numpy as np
import pytest
from conftest import pictures
from PIL import Image

from mpp.data.augment import AugmentConfig, apply, centre, evaluation_plan, resize, training_plan

SHAPES = [((40, 60), (16, 16)), ((16, 16), (40, 30)), ((50, 20), (20, 50)), ((17, 23), (16, 23))]


def smooth(size: tuple[int, int]) -> np.ndarray:
    return pictures(1, size)[0].copy()  # writable, as decoded ones are


@pytest.mark.parametrize(("size", "wanted"), SHAPES)
def test_resizing_agrees_with_pils_bilinear_filter(size, wanted):
    found = resize(smooth(size), np.empty((*wanted, 3), np.uint8)).astype(int)
    expected = np.asarray(Image.fromarray(smooth(size)).resize(wanted[::-1], Image.Resampling.BILINEAR)).astype(int)
    assert abs(found - expected).max() <= 2
    assert abs(found - expected).mean() < 0.3


def test_inception_crops_lie_within_the_image_and_keep_area_and_aspect():
    sizes = np.tile([[100, 160]], (20_000, 1))
    boxes = training_plan(AugmentConfig(area=(0.05, 1.0)), sizes, (32, 32), 0, np.arange(20_000)).boxes
    top, left, height, width = boxes.T
    assert (boxes >= 0).all()
    assert (top + height <= 100).all()
    assert (left + width <= 160).all()
    area, aspect = height * width / 16_000, width / height
    assert area.min() > 0.045
    assert aspect.min() > 0.70
    assert aspect.max() < 1.40
    # Of boxes that always fit, small ones, area and the logarithm of the aspect are uniform.
    boxes = training_plan(AugmentConfig(area=(0.05, 0.25)), sizes, (32, 32), 0, np.arange(20_000)).boxes
    area, aspect = boxes[:, 2] * boxes[:, 3] / 16_000, np.log(boxes[:, 3] / boxes[:, 2])
    assert area.mean() == pytest.approx(0.15, rel=0.02)
    assert np.quantile(area, [0.25, 0.75]).tolist() == pytest.approx([0.1, 0.2], rel=0.05)
    assert aspect.mean() == pytest.approx(0, abs=0.01)
    assert aspect.std() == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), rel=0.05)
    assert (boxes[:, 0] / (100 - boxes[:, 2])).mean() == pytest.approx(0.5, abs=0.02)


def test_an_image_too_narrow_for_any_crop_gives_its_centre():
    boxes = training_plan(AugmentConfig(area=(0.9, 1.0)), np.array([[10, 100]]), (8, 8), 0, np.arange(1)).boxes
    assert boxes.tolist() == [[0, 43, 10, 13]] or boxes[0, 2] == 10


def test_half_of_the_images_are_flipped_and_none_if_not_asked():
    sizes = np.tile([[32, 32]], (10_000, 1))
    assert training_plan(AugmentConfig(), sizes, (32, 32), 0, np.arange(10_000)).flips.mean() == pytest.approx(
        0.5, abs=0.02
    )
    assert not training_plan(AugmentConfig(flip=False), sizes, (32, 32), 0, np.arange(10_000)).flips.any()


def test_a_plan_depends_on_seed_and_position_alone():
    sizes = np.tile([[40, 60]], (10, 1))
    whole = training_plan(AugmentConfig(), sizes, (32, 32), 3, np.arange(100, 110))
    part = training_plan(AugmentConfig(), sizes[4:6], (32, 32), 3, np.arange(104, 106))
    assert (whole.boxes[4:6] == part.boxes).all()
    assert (whole.flips[4:6] == part.flips).all()
    other = training_plan(AugmentConfig(), sizes, (32, 32), 4, np.arange(100, 110))
    assert (whole.boxes != other.boxes).any()


@pytest.mark.parametrize("down", [-3, 0, 2])
@pytest.mark.parametrize("right", [-2, 0, 4])
def test_a_shift_crop_is_a_crop_of_the_reflected_image(down, right):
    image, out = smooth((16, 20)), np.empty((16, 20, 3), np.uint8)
    apply(image, (0, 0, 16, 20), False, (down, right), out)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    assert (out == padded[4 - down : 20 - down, 4 - right : 24 - right]).all()


def test_shifts_are_even_over_all_places():
    shifts = training_plan(
        AugmentConfig(crop="shift", pad=2), np.tile([[16, 16]], (25_000, 1)), (16, 16), 0, np.arange(25_000)
    ).shifts
    found = np.unique(shifts, axis=0, return_counts=True)
    assert found[0].tolist() == [[a, b] for a in range(-2, 3) for b in range(-2, 3)]
    assert (abs(found[1] - 1000) < 5 * math.sqrt(1000)).all()


def test_a_flip_mirrors_the_crop():
    image, plain, flipped = smooth((16, 20)), np.empty((8, 8, 3), np.uint8), np.empty((8, 8, 3), np.uint8)
    box, still = (2, 3, 11, 13), (0, 0)
    apply(image, box, False, still, plain)
    apply(image, box, True, still, flipped)
    assert (flipped == plain[:, ::-1]).all()


def test_evaluation_sees_the_centre():
    sizes = np.array([[100, 160], [160, 100], [64, 64]])
    assert centre(sizes, (32, 32), 1.0).tolist() == [[0, 30, 100, 100], [30, 0, 100, 100], [0, 0, 64, 64]]
    assert centre(sizes, (32, 64), 0.5).tolist() == [[30, 40, 40, 80], [67, 25, 25, 50], [24, 16, 16, 32]]
    found = evaluation_plan(AugmentConfig(centre=0.5), sizes, (32, 64))
    assert not found.flips.any()
    assert not found.shifts.any()


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_keep_their_one_channel(channels):
    image = smooth((20, 20))[:, :, :channels].copy()
    for size in [(16, 16), (32, 32), (20, 20)]:
        out = np.empty((*size, channels), np.uint8)
        apply(image, (0, 0, 20, 20), True, (1, -2), out)
        assert out.std() > 0


@pytest.mark.parametrize(
    ("key", "value"), [("area", (0.0, 1.0)), ("area", (0.5, 0.2)), ("aspect", (0.0, 1.0)), ("pad", -1), ("centre", 1.5)]
)
def test_impossible_settings_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"data.augment.{key}"):
        AugmentConfig(**{key: value})
