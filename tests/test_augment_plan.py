import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import pictures
from PIL import Image
from scipy.stats import ks_2samp, kstest, uniform
from timm.data.random_erasing import RandomErasing

from mpp.augment.colour import NEUTRAL, Colour, Colours, recolour
from mpp.augment.config import AugmentConfig
from mpp.augment.plan import Change, Erasure, apply, centre, evaluation_plan, resize, training_plan
from mpp.augment.randaugment import draw, operate
from mpp.data.read import read_shards

STRONG = AugmentConfig(crop="none", randaugment=2, magnitude_std=0.5, erase=0.5)
COLOURED = AugmentConfig(jitter=(0.4, 0.4, 0.2, 0.1), jitter_chance=0.8, grey=0.2, blur=0.5, solarize=0.2)

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
    found = evaluation_plan(AugmentConfig(centre=0.5).input((32, 64)), sizes)
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
    ("key", "value"),
    [
        ("area", (0.0, 1.0)),
        ("area", (0.5, 0.2)),
        ("aspect", (0.0, 1.0)),
        ("pad", -1),
        ("centre", 1.5),
        ("randaugment", -1),
        ("magnitude", 11.0),
        ("magnitude", -1.0),
        ("magnitude", math.nan),
        ("magnitude_std", -0.5),
        ("magnitude_std", math.inf),
        ("erase", 1.1),
        ("erase", -0.1),
        ("jitter", (0.4, 0.4, 0.2)),
        ("jitter", (0.4, -0.1, 0.2, 0.1)),
        ("jitter", (0.4, 0.4, math.inf, 0.1)),
        ("jitter", (0.4, 0.4, 0.2, 0.6)),
        ("jitter", (0.4, 0.4, 0.2, math.nan)),
        ("jitter_chance", 1.5),
        ("grey", -0.1),
        ("blur", math.nan),
        ("blur_sigma", (0.0, 2.0)),
        ("blur_sigma", (2.0, 1.0)),
        ("blur_sigma", (1.0, math.inf)),
        ("blur_sigma", (1.0,)),
        ("solarize", 2.0),
    ],
)
def test_impossible_settings_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=rf"augment\.{key}"):
        AugmentConfig(**{key: value})


def changes(config: AugmentConfig, count: int, size: tuple[int, int] = (32, 32), seed: int = 0) -> list[Change]:
    return training_plan(config, np.tile([size], (count, 1)), size, seed, np.arange(count)).changes


def unchanged_but_for(size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """Where (h, w) a picture is not erased."""
    kept = np.ones(size, bool)
    kept[box[0] : box[0] + box[2], box[1] : box[1] + box[3]] = False
    return kept


def test_pictures_are_only_changed_where_it_is_asked_for():
    sizes, positions = np.tile([[32, 32]], (10, 1)), np.arange(10)
    assert training_plan(AugmentConfig(), sizes, (32, 32), 0, positions).changes is None
    assert evaluation_plan(STRONG.input((32, 32)), sizes).changes is None
    assert [change.erasure for change in changes(AugmentConfig(randaugment=2), 10)] == [None] * 10
    assert [change.operations for change in changes(AugmentConfig(erase=1.0), 10)] == [[]] * 10


@pytest.mark.parametrize("crop", ["inception", "shift", "none"])
def test_changes_leave_crops_and_flips_as_they_were(crop):
    sizes, positions = np.tile([[40, 60]], (50, 1)), np.arange(50)
    plain = training_plan(AugmentConfig(crop=crop), sizes, (32, 32), 3, positions)
    strong = training_plan(replace(STRONG, crop=crop), sizes, (32, 32), 3, positions)
    assert np.array_equal(plain.boxes, strong.boxes)
    assert np.array_equal(plain.flips, strong.flips)
    assert np.array_equal(plain.shifts, strong.shifts)
    assert [change.operations for change in strong.changes] == draw(2, 9.0, 0.5, 3, positions).each()


def test_changes_depend_on_seed_and_position_alone():
    whole = changes(STRONG, 60)
    part = training_plan(STRONG, np.tile([[90, 70]], (10, 1)), (32, 32), 0, np.arange(20, 30)).changes
    assert part == whole[20:30]
    other = changes(STRONG, 60, seed=1)
    assert [change.operations for change in other] != [change.operations for change in whole]
    one, two = ({number: c.erasure for number, c in enumerate(all_) if c.erasure} for all_ in (whole, other))
    both = one.keys() & two.keys()
    assert one.keys() != two.keys()
    assert all(one[number].key != two[number].key for number in both)
    assert any(one[number].box != two[number].box for number in both)


def test_erased_rectangles_are_as_frequent_large_and_wide_as_timms():
    count, size = 6000, (40, 56)
    found = np.zeros((count, *size), bool)
    for number, change in enumerate(changes(AugmentConfig(erase=0.25), count, size)):
        if change.erasure:
            top, left, height, width = change.erasure.box
            assert 0 <= top <= top + height <= 40
            assert 0 <= left <= left + width <= 56
            found[number, top : top + height, left : left + width] = True
    random.seed(0)
    erase = RandomErasing(0.25, mode="pixel", device="cpu")
    expected = torch.stack([erase(torch.zeros(1, *size))[0] for _ in range(count)]).numpy() != 0
    for erased in (found, expected):
        assert erased.any((1, 2)).mean() == pytest.approx(0.25, abs=0.02)
    assert abs(found.mean(0) - expected.mean(0)).max() < 0.03
    for measure in (lambda a: a.sum((1, 2)), lambda a: a.any(1).sum(1) / a.any(2).sum(1)):
        ours, theirs = (measure(erased[erased.any((1, 2))]) for erased in (found, expected))
        assert ks_2samp(ours, theirs).pvalue > 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_an_erased_rectangle_becomes_normal_noise_and_the_rest_stays(channels):
    size, box = (600, 720), (10, 20, 450, 599)
    image = np.ascontiguousarray(smooth(size)[:, :, :channels])
    plain, erased, again, other = (np.empty_like(image) for _ in range(4))
    apply(image, (0, 0, *size), False, (0, 0), plain)
    apply(image, (0, 0, *size), False, (0, 0), erased, Change([], Erasure(box, 2**64 - 1)))
    apply(image // 2, (0, 0, *size), True, (0, 0), again, Change([], Erasure(box, 2**64 - 1)))
    apply(image, (0, 0, *size), False, (0, 0), other, Change([], Erasure(box, 5)))
    kept = unchanged_but_for(size, box)
    assert np.array_equal(erased[kept], plain[kept])
    assert np.array_equal(erased[~kept], again[~kept])
    assert not np.array_equal(erased[~kept], other[~kept])
    noise = erased[~kept].astype(float)
    for value in [0, 40, 100, 127, 180, 254]:  # half a unit more is the end of what rounds to the value
        expected = 0.5 * (1 + math.erf((value + 0.5 - 127.5) / 63.75 / math.sqrt(2)))
        assert (noise <= value).mean() == pytest.approx(expected, abs=0.005)
    assert noise.mean() == pytest.approx(127.5, abs=0.4)
    rows = noise.reshape(450, 599, channels) - noise.mean()
    assert abs((rows[1:] * rows[:-1]).mean() / noise.var()) < 0.01, "neighbours know nothing of each other"
    assert abs((rows[:, 1:] * rows[:, :-1]).mean() / noise.var()) < 0.01
    if channels == 3:
        assert abs((rows[..., 1] * rows[..., 0]).mean() / noise.var()) < 0.01


def test_pictures_are_flipped_then_changed_then_erased():
    image, flipped, found = smooth((24, 30)), np.empty((16, 20, 3), np.uint8), np.empty((16, 20, 3), np.uint8)
    operations, box = [("TranslateXRel", 9.0), ("Invert", 9.0)], (2, 3, 7, 9)
    apply(image, (1, 2, 20, 25), True, (2, -1), flipped)
    apply(image, (1, 2, 20, 25), True, (2, -1), found, Change(operations, Erasure(box, 7)))
    noise = np.empty((16, 20, 3), np.uint8)
    apply(image, (1, 2, 20, 25), True, (2, -1), noise, Change([], Erasure(box, 7)))
    kept = unchanged_but_for((16, 20), box)
    assert np.array_equal(found[kept], operate(flipped, operations)[kept])
    assert np.array_equal(found[~kept], noise[~kept])


def test_a_picture_too_small_for_a_rectangle_keeps_all_of_itself():
    assert [change.erasure for change in changes(AugmentConfig(erase=1.0), 20, (1, 1))] == [None] * 20
    assert any(change.erasure for change in changes(AugmentConfig(erase=1.0), 20, (3, 3)))


def test_changed_batches_are_the_same_whoever_reads_them(small_shards):
    plain = read_shards(small_shards, 16, augment=AugmentConfig(crop="none"), seed=5)
    resident = read_shards(small_shards, 16, augment=STRONG, seed=5, reader="resident", threads=1)
    indexed = read_shards(small_shards, 16, augment=STRONG, seed=5, reader="indexed", threads=3)
    changed = []
    for step in [0, 3, 1000]:
        found = resident.at(step).images
        assert torch.equal(found, indexed.at(step).images)
        changed += [bool((a != b).any()) for a, b in zip(found, plain.at(step).images, strict=True)]
    assert 24 < sum(changed) < 48, "one image in eight has neither operation nor rectangle"
    assert not torch.equal(resident.at(0).images, resident.at(4).images)


def test_coloured_batches_are_the_same_whoever_reads_them(small_shards):
    resident = read_shards(small_shards, 16, augment=COLOURED, seed=5, reader="resident", threads=1)
    indexed = read_shards(small_shards, 16, augment=COLOURED, seed=5, reader="indexed", threads=3)
    assert torch.equal(resident.at(3).images, indexed.at(3).images)


def test_evaluation_changes_nothing(small_shards):
    strong = read_shards(small_shards, 16, augment=replace(STRONG, jitter=(0.4, 0.4, 0.2, 0.1), blur=1.0), train=False)
    assert torch.equal(strong.at(0).images, read_shards(small_shards, 16, train=False).at(0).images)


def colours(config: AugmentConfig, count: int, seed: int = 0, first: int = 0) -> Colours:
    return training_plan(config, np.tile([[40, 60]], (count, 1)), (32, 32), seed, first + np.arange(count)).colours


def test_colours_are_drawn_from_seed_and_position_alone():
    whole, part, other = colours(COLOURED, 60), colours(COLOURED, 10, first=20), colours(COLOURED, 60, seed=1)
    for mine, others in zip(whole, part, strict=True):
        assert np.array_equal(mine[20:30], others)
    assert all(not np.array_equal(mine, others) for mine, others in zip(whole, other, strict=True))


def test_colours_leave_all_other_draws_as_they_were():
    sizes, positions = np.tile([[40, 60]], (50, 1)), np.arange(50)
    mixed = replace(COLOURED, crop="none", randaugment=2, magnitude_std=0.5, erase=0.5)
    plain, coloured = (training_plan(config, sizes, (32, 32), 3, positions) for config in (STRONG, mixed))
    assert np.array_equal(plain.flips, coloured.flips)
    assert [change._replace(colour=None) for change in coloured.changes] == plain.changes
    assert all(change.colour is None for change in plain.changes)


def test_jitter_moves_each_factor_evenly_within_its_strength_as_often_as_asked():
    drawn = colours(AugmentConfig(jitter=(0.4, 1.5, 0.2, 0.1)), 20_000)
    moved = (drawn.jitter != NEUTRAL).all(1)
    assert moved.mean() == pytest.approx(0.8, abs=0.01)
    assert (drawn.jitter[~moved] == NEUTRAL).all()
    assert not drawn.grey.any() | drawn.solarize.any() | drawn.sigma.any()
    ranges = [(0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1)]  # as torchvision's ColorJitter
    for factor, (low, high) in zip(drawn.jitter[moved].T, ranges, strict=True):
        assert kstest(factor, uniform(low, high - low).cdf).pvalue > 1e-3
    correlation = np.corrcoef(drawn.jitter[moved].T) - np.eye(4)
    assert abs(correlation).max() < 0.03


def test_all_orders_of_jitter_are_equally_frequent():
    orders, counts = np.unique(colours(COLOURED, 24_000).order, axis=0, return_counts=True)
    assert orders.tolist() == [list(order) for order in sorted(itertools.permutations(range(4)))]
    assert (abs(counts - 1000) < 5 * math.sqrt(1000)).all()


def test_grey_blur_and_solarising_are_as_frequent_as_asked_and_independent():
    drawn = colours(COLOURED, 20_000)
    happens = np.stack([drawn.grey, drawn.sigma > 0, drawn.solarize, (drawn.jitter != NEUTRAL).all(1)])
    assert happens.mean(1).tolist() == pytest.approx([0.2, 0.5, 0.2, 0.8], abs=0.015)
    assert abs(np.corrcoef(happens) - np.eye(4)).max() < 0.03
    assert kstest(drawn.sigma[drawn.sigma > 0], uniform(0.1, 1.9).cdf).pvalue > 1e-3


def test_colours_come_after_the_flip_and_before_randaugment():
    image, flipped, found = smooth((24, 30)), np.empty((16, 20, 3), np.uint8), np.empty((16, 20, 3), np.uint8)
    colour = Colour([1.2, 0.7, 1.1, 0.05], [2, 0, 3, 1], False, 1.3, True)
    operations = [("TranslateXRel", 9.0), ("PosterizeIncreasing", 9.0)]
    apply(image, (1, 2, 20, 25), True, (2, -1), flipped)
    apply(image, (1, 2, 20, 25), True, (2, -1), found, Change(operations, None, colour))
    assert np.array_equal(found, operate(recolour(flipped, colour), operations))
