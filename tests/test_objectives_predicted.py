"""What patches are predicted as, against numpy: one patch after the other, one pixel after the other."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import tiny_config
from torch import Tensor

from mpp.models.layers import take
from mpp.models.vit import ViT
from mpp.objectives.painting import hatch
from mpp.objectives.predicted import target_of
from mpp.objectives.predicted_config import METRICS, TargetName, bits_of, check_bits

NAMES = get_args(TargetName)
MEAN, STD = 0.3, 0.2  # of the encoder's normalisation, on pixels of [0, 1]


@pytest.fixture(scope="module", params=[3, 1], ids=["colour", "grey"])
def encoder(request) -> ViT:
    return ViT(tiny_config(channels=request.param, mean=(MEAN,), std=(STD,), depth=1))


@pytest.fixture(scope="module")
def images(encoder) -> Tensor:
    """Not noise alone: patches differ in their mean, some are black, and one is white."""
    random = torch.Generator().manual_seed(5)
    level = torch.randint(0, 256, (3, 1, 4, 6), generator=random).repeat_interleave(8, 2).repeat_interleave(8, 3)
    noise = torch.randint(-40, 41, (3, encoder.config.channels, 32, 48), generator=random)
    made = (level + noise).clamp(0, 255).to(torch.uint8)
    made[0, :, :16] = 0
    made[1, :, :8, :8] = 255
    return made


@pytest.fixture(scope="module")
def index() -> Tensor:
    return torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(n))[:7] for n in range(3)])


def patch_of(images: Tensor, image: int, number: int) -> np.ndarray:
    """A patch's pixels, (8, 8, c)."""
    top, left = 8 * (number // 6), 8 * (number % 6)
    return images[image, :, top : top + 8, left : left + 8].permute(1, 2, 0).numpy().astype(np.int64)


def cells_of(pixels: np.ndarray, grid: int) -> list[list[int]]:
    """The sums of the colours of each cell."""
    side = 8 // grid
    parts = [pixels[r * side : r * side + side, q * side : q * side + side] for r in range(grid) for q in range(grid)]
    return [part.sum((0, 1)).tolist() for part in parts]


def class_of(sums: list[int], pixels: int, bits: int) -> int:
    found = 0
    for channel in sums:
        found = found * 2**bits + channel * 2**bits // (256 * pixels)
    return found


def seen(pixels: np.ndarray) -> np.ndarray:
    return ((pixels / 255 - MEAN) / STD).flatten()


def slow_loss(name: str, predicted: np.ndarray, images: Tensor, index: Tensor, bits: int) -> float:
    losses = []
    for image in range(3):
        for place, number in enumerate(index[image].tolist()):
            pixels, output = patch_of(images, image, number), predicted[image, place]
            if "pixels" in name:
                truth = seen(pixels)
                if name == "normalised_pixels":
                    truth = (truth - truth.mean()) / math.sqrt(truth.var(ddof=1) + 1e-6)
                losses.append(np.mean((output - truth) ** 2))
                continue
            grid = 2 if name == "colour_grid" else 1
            cells = cells_of(pixels, grid)
            for logits, sums in zip(output.reshape(len(cells), -1), cells, strict=True):
                right = logits[class_of(sums, (8 // grid) ** 2, bits)]
                losses.append(math.log(np.exp(logits).sum()) - right)
    return float(np.mean(losses))


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_slow_one(name, encoder, images, index):
    target, bits = target_of(name, encoder, grid=2), {3: 3, 1: 6}[encoder.config.channels]
    predicted = torch.randn(3, 7, target.outputs)
    loss = target.loss(predicted, take(target.truth(images), index))
    assert loss.item() == pytest.approx(slow_loss(name, predicted.double().numpy(), images, index, bits), rel=1e-5)


@pytest.mark.parametrize("name", ["mean_colour", "colour_grid"])
def test_colours_are_counted_and_painted_by_cells(name, encoder, images, index):
    channels, grid = encoder.config.channels, 2 if name == "colour_grid" else 1
    target, bits = target_of(name, encoder, 2, grid), 2
    predicted, copies = torch.randn(3, 7, target.outputs), (index[:, :4] + 1) % 24
    everywhere = target.truth(images)
    truth = take(everywhere, index)
    right, same, often = [], [], dict.fromkeys(range(4**channels), 0)
    painted, shown = target.painted(predicted, truth), take(target.shown(images), index)
    for image in range(3):
        for place, number in enumerate(index[image].tolist()):
            cells = cells_of(patch_of(images, image, number), grid)
            classes = [class_of(sums, (8 // grid) ** 2, bits) for sums in cells]
            guesses = predicted[image, place].reshape(len(cells), -1).argmax(1).tolist()
            right += [guess == true for guess, true in zip(guesses, classes, strict=True)]
            if place < 4:
                others = cells_of(patch_of(images, image, int(copies[image, place])), grid)
                same += [class_of(sums, (8 // grid) ** 2, bits) == true for sums, true in zip(others, classes)]  # noqa: B905  # both have a cell each
            for true in classes:
                often[true] += 1
            for cell, (guess, sums) in enumerate(zip(guesses, cells, strict=True)):
                bins = [guess // 4**channel % 4 for channel in reversed(range(channels))]
                middle = [64 * one + 32 for one in bins]
                rows, columns = (slice(8 // grid * part, 8 // grid * (part + 1)) for part in divmod(cell, grid))
                for picture, colour in [(painted, middle), (shown, [part * grid**2 // 64 for part in sums])]:
                    square = picture[image, place].reshape(8, 8, channels)[rows, columns]
                    assert (square == torch.tensor(colour)).all()
    metrics = target.metrics(predicted, truth, take(everywhere, copies))
    assert metrics["accuracy"].item() == pytest.approx(np.mean(right))
    assert metrics["nearest"].item() == pytest.approx(np.mean(same))
    assert metrics["commonest"].item() == pytest.approx(max(often.values()) / len(right))
    assert "nearest" not in target.metrics(predicted, truth)


@pytest.mark.parametrize("name", ["pixels", "normalised_pixels"])
def test_pixels_are_compared_and_painted_as_colours(name, encoder, images, index):
    channels, target = encoder.config.channels, target_of(name, encoder)
    bits, (everywhere, copies) = {3: 3, 1: 6}[channels], (target.truth(images), (index[:, :4] + 1) % 24)
    truth = take(everywhere, index)
    predicted = torch.randn(3, 7, target.outputs)
    painted = target.painted(predicted, truth).numpy().astype(np.int64)
    errors, flat, right, same = [], [], [], []
    for image in range(3):
        for place, number in enumerate(index[image].tolist()):
            pixels = patch_of(images, image, number)
            said = predicted[image, place].double().numpy()
            if name == "normalised_pixels":
                said = said * math.sqrt(seen(pixels).var(ddof=1) + 1e-6) + seen(pixels).mean()
            colours = 255 * (said * STD + MEAN)
            assert np.abs(painted[image, place] - colours.clip(0, 255)).max() < 0.501
            errors.append(np.mean((colours - pixels.flatten()) ** 2) / 255**2)
            flat.append(pixels.var() / 255**2)
            classes = [
                class_of(one.reshape(8, 8, channels).sum((0, 1)).tolist(), 64, bits)
                for one in (painted[image, place], pixels, patch_of(images, image, int(copies[image, place % 4])))
            ]
            right.append(classes[0] == classes[1])
            if place < 4:
                same.append(classes[2] == classes[1])
    metrics = target.metrics(predicted, truth, take(everywhere, copies) if target.compares else None)
    assert metrics["psnr"].item() == pytest.approx(np.mean(errors), rel=1e-4)
    assert metrics["flat"].item() == pytest.approx(np.mean(flat), rel=1e-4)
    if name == "pixels":
        assert metrics["accuracy"].item() == pytest.approx(np.mean(right))
        assert metrics["nearest"].item() == pytest.approx(np.mean(same))
    assert metrics.keys() == METRICS[name].keys()
    assert torch.equal(take(target.shown(images), index), truth)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_right_has_no_error_and_black_is_painted_black(name, encoder, images, index):
    target = target_of(name, encoder, grid=2)
    truth = take(target.truth(images), index)
    if "pixels" in name:
        perfect = (truth.float() / 255 - MEAN) / STD
        if name == "normalised_pixels":
            perfect = (perfect - perfect.mean(-1, keepdim=True)) / (perfect.var(-1, keepdim=True) + 1e-6).sqrt()
        assert target.loss(perfect, truth).item() < 1e-6
        assert torch.equal(target.painted(perfect, truth), truth)
    else:
        perfect = 100 * torch.nn.functional.one_hot(truth, 512 if encoder.config.channels == 3 else 64).float().flatten(
            2
        )
        assert target.loss(perfect, truth).item() < 1e-6
        assert target.metrics(perfect, truth)["accuracy"] == 1
    shown = target.shown(images)
    assert not shown[0, :12].any()
    assert (shown[1, 0] == 255).all()


def test_a_chequered_patch_is_no_grey_of_a_picture():
    grey = torch.full((2, 3, 16, 24), 128, dtype=torch.uint8)
    found = hatch(grey, 8).unflatten(-1, (8, 8, 3))  # (b, n, 8, 8, c)
    assert found.shape == (2, 6, 8, 8, 3)
    assert found.unique().tolist() == [96, 160]
    for row, column in [(0, 0), (1, 1), (2, 2), (3, 0), (5, 7)]:
        assert (found[:, :, row, column] == (160 if (row // 2 + column // 2) % 2 else 96)).all()
    assert hatch(grey[:, :1], 1).unique().tolist() == [96, 160], "patches of one pixel alternate"


def test_bits_are_those_of_the_settings_or_of_the_channels():
    assert (bits_of(None, 3), bits_of(None, 1), bits_of(2, 3), bits_of(8, 1)) == (3, 6, 2, 8)
    assert target_of("mean_colour", ViT(tiny_config(channels=1))).outputs == 64
    with pytest.raises(ValueError, match=r"^objective.bits must be 1 to 5 at model.channels 3, got 6$"):
        target_of("pixels", ViT(tiny_config()), bits=6)
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"objective.bits must be 1 to 5 .* got {bits}"):
            check_bits(bits)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_no_part_of_a_loss(name, encoder, images, index):
    target = target_of(name, encoder)
    truth, predicted = take(target.truth(images), index), torch.randn(3, 7, target.outputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = target.loss(predicted, truth)
    assert torch.equal(found, target.loss(predicted, truth))
