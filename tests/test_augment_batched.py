from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import pictures
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms.v2 import functional as v2

from mpp import seeds
from mpp.augment.batched import OnDevice, augment, carry_out, move
from mpp.augment.batched_colour import blur, greyscale, jitter, solarize
from mpp.augment.batched_crop import crop, shift_and_flip
from mpp.augment.batched_erase import erase, mix
from mpp.augment.batched_randaugment import operate
from mpp.augment.colour import NEUTRAL, reach
from mpp.augment.config import AugmentConfig
from mpp.augment.input import Input
from mpp.augment.plan import Plan, apply, evaluation_plan, noise_table, training_plan
from mpp.augment.randaugment import NAMES, OPERATIONS

CPU = torch.device("cpu")
COLOURS = {"jitter": (0.4, 0.4, 0.2, 0.1), "grey": 0.2, "blur": 0.5, "solarize": 0.2}
STRONG = AugmentConfig(**COLOURS, randaugment=2, magnitude_std=0.5, erase=0.5)
MOVING = ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"]


def samples(size: tuple[int, int], channels: int = 3) -> Tensor:
    """Smooth, noisy, dark and one-valued images (24, c, h, w)."""
    random = np.random.default_rng(0)
    smooth = np.stack(pictures(11, size))
    noisy = random.integers(0, 256, (11, *size, 3), dtype=np.uint8)
    images = np.concatenate([smooth, noisy, smooth[:1] // 3 + 20, np.full((1, *size, 3), 77, np.uint8)])
    return torch.from_numpy(images[..., :channels]).permute(0, 3, 1, 2).contiguous()


def plan_of(config: AugmentConfig, images: Tensor, size: tuple[int, int], seed: int = 1) -> Plan:
    sizes = np.tile([images.shape[2:]], (len(images), 1))
    return training_plan(config, sizes, size, seed, np.arange(len(images)))


def one_by_one(images: Tensor, plan: Plan, size: tuple[int, int]) -> Tensor:
    """What the CPU's reader makes of each image."""
    out = np.empty((len(images), *size, images.shape[1]), np.uint8)
    changes = plan.changes or [None] * len(images)
    for image, *rest, picture, change in zip(
        images, plan.boxes.tolist(), plan.flips.tolist(), plan.shifts.tolist(), out, changes, strict=True
    ):
        apply(image.permute(1, 2, 0).numpy().copy(), *rest, picture, change)
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def differences(found: Tensor, expected: Tensor) -> Tensor:
    assert found.dtype == expected.dtype == torch.uint8
    assert found.shape == expected.shape
    return (found.int() - expected.int()).abs()


@pytest.mark.parametrize("size", [(16, 16), (48, 40), (45, 60), (20, 90)])
def test_crops_give_torchvisions_pixels_but_for_rounding(size):
    images = samples((45, 60))
    boxes = plan_of(AugmentConfig(), images, size).boxes
    found = crop(images, torch.from_numpy(boxes), size)
    cropped = [v2.resized_crop(*both, list(size), antialias=True) for both in zip_boxes(images, boxes)]
    exact = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # for which torchvision's kernel is written
    assert differences(found, torch.stack(cropped)).max() <= (0 if exact else 1)
    # On a GPU torchvision computes in float32 and rounds once.
    cropped = [v2.resized_crop(*both, list(size), antialias=True) for both in zip_boxes(images.float(), boxes)]
    assert differences(found, torch.stack(cropped).round().to(torch.uint8)).max() <= 1


def zip_boxes(images: Tensor, boxes: np.ndarray):
    """Arguments of torchvision's crops."""
    for image, box in zip(images, boxes.tolist(), strict=True):
        yield image, *box


@pytest.mark.parametrize("crop_", ["shift", "none"])
def test_pictures_that_are_not_resized_are_those_of_the_cpu(crop_):
    images = samples((20, 30))
    plan = plan_of(AugmentConfig(crop=crop_, pad=25), images, (20, 30))
    assert torch.equal(augment(images, plan, (20, 30)), one_by_one(images, plan, (20, 30)))


def test_a_shift_reaches_back_and_forth_between_mirrors():
    images = torch.arange(4, dtype=torch.uint8).view(1, 1, 1, 4)
    for right, expected in [(0, [0, 1, 2, 3]), (2, [2, 1, 0, 1]), (-3, [3, 2, 1, 0]), (7, [1, 0, 1, 2])]:
        found = shift_and_flip(images, torch.tensor([[5, right]]), torch.tensor([False]))
        assert found.flatten().tolist() == expected


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", range(4))
def test_each_adjustment_gives_torchvisions_pixels_but_for_rounding(number, channels):
    images, random = samples((20, 30), channels), np.random.default_rng(1)
    factors = np.tile(NEUTRAL, (len(images), 1))
    factors[:, number] = random.uniform(-0.5, 0.5, len(images)) if number == 3 else random.uniform(0, 2, len(images))
    function = (v2.adjust_brightness, v2.adjust_contrast, v2.adjust_saturation, v2.adjust_hue)[number]
    expected = torch.stack([function(*both) for both in zip(images, factors[:, number].tolist(), strict=True)])
    found = jitter(images, torch.from_numpy(factors), torch.arange(4).expand(len(images), 4))
    assert differences(found, expected).max() <= 1
    assert differences(found, expected).float().mean() < 3e-3


def test_each_image_is_adjusted_in_its_own_order():
    images = samples((20, 30))[:4]
    factors, orders = [1.25, 0.5, 1.5, 0.25], [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]]
    adjust = (v2.adjust_brightness, v2.adjust_contrast, v2.adjust_saturation, v2.adjust_hue)
    expected = images.clone()
    for image, order in zip(expected, orders, strict=True):
        for number in order:
            image.copy_(adjust[number](image, factors[number]))
    found = jitter(images, torch.tensor([factors] * 4, dtype=torch.float64), torch.tensor(orders))
    assert differences(found, expected).max() <= 3, "one value of difference, enlarged by what comes after"
    assert differences(found, expected).float().mean() < 0.01


@pytest.mark.parametrize("channels", [1, 3])
def test_greyscale_and_solarising_give_torchvisions_pixels_where_chosen(channels):
    images, chosen = samples((20, 30), channels), torch.arange(24) % 3 == 0
    where = chosen.view(-1, 1, 1, 1)
    expected = torch.where(where, v2.rgb_to_grayscale(images, channels), images)
    assert differences(greyscale(images, chosen), expected).max() <= 1
    assert differences(greyscale(images, chosen), expected).float().mean() < 1e-3
    assert torch.equal(solarize(images, chosen), torch.where(where, v2.solarize(images, 128), images))


@pytest.mark.parametrize("size", [(20, 30), (3, 1)])
def test_a_blur_gives_torchvisions_pixels_but_for_rounding_and_none_changes_nothing(size):
    images = samples(size)
    sigma = np.where(np.arange(24) % 4, np.linspace(0.1, 2.0, 24), 0)
    expected = images.clone()
    for image, wide in zip(expected, sigma.tolist(), strict=True):
        if wide:
            kernel = [2 * reach(wide, side) + 1 for side in size[::-1]]
            image.copy_(v2.gaussian_blur(image, kernel, [wide, wide]))
    found = blur(images, torch.from_numpy(sigma))
    assert torch.equal(found[::4], images[::4])
    assert differences(found, expected).max() <= 1
    assert differences(found, expected).float().mean() < 1e-3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_randaugments_operations_give_the_cpus_pixels(name, channels):
    for size in [(32, 32), (45, 60), (7, 5), (2, 9)]:
        images, levels = samples(size, channels), np.linspace(-10, 10, 24)
        expected = [
            OPERATIONS[name](image.permute(1, 2, 0).numpy().copy(), level)
            for image, level in zip(images, levels.tolist(), strict=True)
        ]
        found = operate(images, torch.full((24, 1), NAMES.index(name)), torch.from_numpy(levels).unsqueeze(1))
        off = differences(found, torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2))
        if name in MOVING:  # bilinear sums of floats, of which either may round the other way
            assert off.max() <= 1
            assert off.float().mean() < 5e-3
        else:
            assert off.max() == 0


V2 = {
    "AutoContrast": lambda image, level: v2.autocontrast(image),
    "Equalize": lambda image, level: v2.equalize(image),
    "Invert": lambda image, level: v2.invert(image),
    "PosterizeIncreasing": lambda image, level: v2.posterize(image, max(1, 4 - int(level / 10 * 4))),
    "SolarizeIncreasing": lambda image, level: v2.solarize(image, 256 - int(level / 10 * 256)),
    "ColorIncreasing": lambda image, level: v2.adjust_saturation(image, 1 + level / 10 * 0.9),
    "ContrastIncreasing": lambda image, level: v2.adjust_contrast(image, 1 + level / 10 * 0.9),
    "BrightnessIncreasing": lambda image, level: v2.adjust_brightness(image, 1 + level / 10 * 0.9),
    "SharpnessIncreasing": lambda image, level: v2.adjust_sharpness(image, 1 + level / 10 * 0.9),
}


@pytest.mark.parametrize("name", V2)
def test_randaugments_operations_on_values_are_torchvisions_but_for_two_values(name):
    images, levels = samples((32, 32)), np.linspace(1, 10, 24)
    expected = torch.stack([V2[name](*both) for both in zip(images, levels.tolist(), strict=True)])
    found = operate(images, torch.full((24, 1), NAMES.index(name)), torch.from_numpy(levels).unsqueeze(1))
    off = differences(found, expected)[:-1]  # torchvision keeps half the places of a one-valued picture's mean
    # Pillow, whose pixels these are, weighs grey with other roundings; a factor of up to 1.9 enlarges their difference.
    assert off.max() <= 2
    assert off.float().mean() < 0.5


def test_images_without_an_operation_stay_and_several_are_done_in_their_order():
    images = samples((16, 20))[:3]
    invert, posterize = NAMES.index("Invert"), NAMES.index("PosterizeIncreasing")
    numbers = torch.tensor([[invert, posterize], [posterize, invert], [-1, -1]])
    found = operate(images, numbers, torch.full((3, 2), 9.0, dtype=torch.float64))
    assert torch.equal(found[0], (255 - images[0]) // 128 * 128)
    assert torch.equal(found[1], 255 - images[1] // 128 * 128)
    assert torch.equal(found[2], images[2])


def test_hashes_on_a_device_are_those_of_seeds():
    keys, numbers = seeds.mix(3, np.arange(50)), np.arange(40)
    expected = seeds.mix(keys[:, None], numbers).view(np.int64)
    found = mix(torch.from_numpy(keys.view(np.int64)).unsqueeze(1), torch.from_numpy(numbers))
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_erased_rectangles_hold_the_cpus_noise(channels):
    images = samples((23, 31), channels)
    plan = plan_of(AugmentConfig(crop="none", flip=False, erase=0.7), images, (23, 31))
    moved = move(plan, CPU)
    found = erase(images, moved.rectangles, moved.keys, moved.noise)
    assert torch.equal(found, one_by_one(images, plan, (23, 31)))
    assert 5 < (found != images).any(3).any(2).any(1).sum() < 24
    assert np.array_equal(moved.noise.numpy(), noise_table())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("crop_", "size", "allowed"),
    [
        ("none", (45, 60), 1e-3),
        ("shift", (45, 60), 1e-3),
        ("inception", (66, 70), 1e-3),
        ("inception", (24, 32), 0.1),  # small pictures are enlarged by OpenCV, whose rounding is its own
    ],
)
def test_a_whole_plan_gives_the_cpus_pictures_but_for_rounding(crop_, size, allowed, channels):
    images = samples((45, 60), channels)
    plan = plan_of(replace(STRONG, crop=crop_), images, size)
    off = differences(augment(images, plan, size), one_by_one(images, plan, size))
    assert (off > 0).float().mean() < allowed
    # A value that is off by 1 may fall on the other side of a threshold, as of solarising; few do.
    assert (off > 1).float().mean() < allowed / 4


def test_evaluation_gives_the_cpus_centres():
    images = samples((45, 60))
    plan = evaluation_plan(Input((24, 24), centre=0.875), np.tile([[45, 60]], (24, 1)))
    off = differences(augment(images, plan, (24, 24)), one_by_one(images, plan, (24, 24)))
    assert off.max() <= 1
    assert off.float().mean() < 0.02


def test_images_of_different_sizes_give_what_each_gives_alone():
    images = [samples(size)[number] for number, size in enumerate([(40, 50), (31, 22), (24, 32), (90, 64)])]
    sizes = np.array([image.shape[1:] for image in images])
    plan = training_plan(STRONG, sizes, (24, 32), 0, np.arange(4))
    found = augment(images, plan, (24, 32))
    for number, image in enumerate(images):
        alone = training_plan(STRONG, sizes[number : number + 1], (24, 32), 0, np.array([number]))
        off = differences(found[number : number + 1], augment(image.unsqueeze(0), alone, (24, 32)))
        assert (off > 1).float().mean() < 0.005
        assert torch.equal(found[number : number + 1], augment([image], alone, (24, 32)))


def test_a_plan_is_moved_whole():
    images = samples((45, 60))
    plan = plan_of(STRONG, images, (24, 32))
    moved = move(plan, CPU)
    assert np.array_equal(moved.boxes.numpy(), plan.boxes)
    assert np.array_equal(moved.flips.numpy(), plan.flips)
    assert np.array_equal(moved.shifts.numpy(), plan.shifts)
    for found, expected in zip(moved[3:12], [*plan.colours, *plan.operations, *plan.erasures], strict=True):
        expected = expected.view(np.int64) if expected.dtype == np.uint64 else expected
        assert found.numpy().dtype == expected.dtype
        assert np.array_equal(found.numpy(), expected)
    plain = move(plan_of(AugmentConfig(), images, (24, 32)), CPU)
    assert all(part is None for part in plain[3:])


def test_autocast_makes_no_difference():
    images = samples((45, 60))
    plan = plan_of(STRONG, images, (24, 32))
    expected = augment(images, plan, (24, 32))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images, plan, (24, 32)), expected)


def test_it_compiles_into_one_graph_for_all_plans():
    images = samples((20, 30))
    compiled = torch.compile(carry_out, backend="eager", fullgraph=True)  # refuses what waits for the device
    for seed in (1, 2):
        moved = move(plan_of(STRONG, images, (16, 16), seed), CPU)
        with torch.compiler.set_stance("default" if seed == 1 else "fail_on_recompile"):
            assert torch.equal(compiled(images, moved, (16, 16)), carry_out(images, moved, (16, 16)))


@pytest.mark.filterwarnings("ignore:`torch.jit")  # torch 2.11 warns of itself when it compiles
@pytest.mark.slow
def test_compiled_it_gives_the_same_pictures():
    images = samples((20, 30))
    plan = plan_of(STRONG, images, (16, 16))
    off = differences(augment(images, plan, (16, 16), compiled=True), augment(images, plan, (16, 16)))
    assert (off > 0).float().mean() < 1e-3


def test_all_of_it_happens_on_the_device_of_the_images():
    moved = move(plan_of(STRONG, samples((20, 30)), (16, 16)), CPU)
    with FakeTensorMode():  # tensors that have a device and a shape but no values, which nothing may ask for
        there = OnDevice(*(torch.empty(part.shape, dtype=part.dtype, device="cuda") for part in moved))
        found = carry_out(torch.empty(24, 3, 20, 30, dtype=torch.uint8, device="cuda"), there, (16, 16))
    assert found.device.type == "cuda"
    assert found.shape == (24, 3, 16, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_cpus_pictures_but_for_rounding():
    images = samples((45, 60))
    plan = plan_of(STRONG, images, (24, 32))
    found = augment(images.cuda(), plan, (24, 32))
    assert (differences(found.cpu(), augment(images, plan, (24, 32))) > 1).float().mean() < 0.01
    # From a list, torchvision crops: on a CPU with weights of 16 bits and twice rounded, on a GPU in float32 and once.
    cropped = [v2.resized_crop(*both, [24, 32], antialias=True) for both in zip_boxes(images.float(), plan.boxes)]
    rest = replace(plan, boxes=np.tile([0, 0, 24, 32], (len(images), 1)))
    found = augment([image.cuda() for image in images], plan, (24, 32))
    expected = augment(torch.stack(cropped).round().clamp(0, 255).to(torch.uint8), rest, (24, 32))
    assert (differences(found.cpu(), expected) > 1).float().mean() < 0.01
