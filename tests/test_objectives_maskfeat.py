import math

import pytest
import torch
from conftest import shaken, tiny_config
from learning import check_bfloat16, check_compiled, idle, trained

from mpp import targets
from mpp.batch import Batch
from mpp.models.layers import take
from mpp.models.vit import ViT
from mpp.objectives.maskfeat import MaskFeat
from mpp.objectives.maskfeat_config import MaskFeatConfig
from mpp.objectives.painting import strokes

CPU = torch.device("cpu")


def build(encoder: ViT | None = None, **config) -> MaskFeat:
    return shaken(MaskFeat(encoder or ViT(tiny_config()), MaskFeatConfig(**{"cell": 4} | config)))


@pytest.mark.parametrize("stem", ["linear", "overlap"])
@pytest.mark.parametrize("pool", ["cls", "avg", "avg_norm", "cls_avg", "map"])
def test_the_loss_is_the_mean_over_hidden_patches_alone_and_they_are_not_seen(pool, stem, batch):
    objective = build(ViT(tiny_config(pool=pool, stem=stem, positions="sincos2d")), window=0)
    hidden = objective.draw(4, CPU)
    assert hidden.shape == (4, 10), "0.4 of 24 patches"
    pixels = (batch.images / 127.5 - 1).requires_grad_()
    predicted = objective.predict(pixels, hidden)
    truth = targets.hog(batch.images, 8, 4, 9, 0)
    errors = [
        (predicted[image, number] - truth[image, patch]).square().mean()
        for image in range(4)
        for number, patch in enumerate(hidden[image].tolist())
    ]
    loss, metrics = objective.compute(batch.images, hidden)
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    assert metrics.keys() == objective.config.metrics.keys()
    predicted.square().sum().backward()
    felt = targets.patch_pixels(pixels.grad, 8).abs().sum(-1)
    kept = torch.ones(4, 24, dtype=torch.bool).scatter(1, hidden, False)
    assert felt[~kept].eq(0).all()
    assert felt[kept].gt(0).all()


def test_cosines_are_those_of_histograms_that_have_a_direction(batch):
    objective = build(ViT(tiny_config()))
    batch.images[:2, 1] = 77  # no gradients in green
    hidden = objective.draw(4, CPU)
    predicted, truth = objective.predict(batch.images, hidden), take(targets.hog(batch.images, 8, 4), hidden)
    average, found = truth.reshape(40, -1).mean(0), {"cosine": [], "average": []}
    for image in range(4):
        for number in range(10):
            for c in range(3):
                for cell in range(4):
                    mine = slice(36 * c + cell, 36 * (c + 1), 4)  # the bins of one cell and channel
                    true = truth[image, number, mine]
                    if image < 2 and c == 1:
                        assert not true.any()
                        continue
                    for name, guess in {"cosine": predicted[image, number, mine], "average": average[mine]}.items():
                        found[name].append((guess @ true / guess.norm() / true.norm()).item())
    _, metrics = objective.compute(batch.images, hidden)
    for name, values in found.items():
        assert metrics[name].item() == pytest.approx(sum(values) / len(values), rel=1e-4)
        assert not metrics[name].requires_grad
    flat = objective.compute(torch.full_like(batch.images, 9), hidden)[1]
    assert flat["cosine"] == flat["average"] == 0, "and no number is lost"


@pytest.mark.parametrize("mask", ["random", "blocks", "units", "inverse_block"])
def test_it_learns_and_nothing_in_it_is_idle(mask):
    encoder = ViT(tiny_config(pool="avg", positions="sincos2d"))
    objective = MaskFeat(encoder, MaskFeatConfig(mask=mask, share=0.5))
    images = torch.zeros(4, 3, 32, 48)
    images[:2] = torch.arange(48) * 5  # brighter to the right, or downward: every patch tells
    images[2:] = (torch.arange(32) * 5)[:, None]
    batch = Batch(images.to(torch.uint8))
    losses = trained(objective, lambda: objective(batch))
    assert losses[-1] < 0.3 * losses[0]
    assert idle(objective) == []


def test_it_compiles_as_a_whole(batch):
    objective = build()
    hidden = objective.draw(4, CPU)
    check_compiled(objective.compute, batch.images, hidden)


def test_bfloat16_gives_nearly_the_same_loss_in_float32(batch):
    objective = build()
    hidden = objective.draw(4, CPU)
    check_bfloat16(objective.compute, batch.images, hidden)


# Pictures


def test_strokes_lie_along_the_edges():
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    images[0, :, :, 4:] = 200  # a vertical edge
    images[1, :, 4:] = 200  # a horizontal one
    painted = strokes(targets.hog(images, 8).unflatten(-1, (1, 9, 1)), 8).reshape(2, 8, 8)
    assert painted.dtype == torch.uint8
    assert painted[0, :, 3:5].min() > 2 * painted[0, :, [0, 1, 6, 7]].max(), "columns in the middle are lit"
    assert painted[1, 3:5].sum() > 5 * painted[1, [0, 1, 6, 7]].sum()


def test_the_brightest_stroke_is_seen_pixel_by_pixel():
    histograms = torch.rand(1, 2, 3, 6, 4) - 0.2  # what is below 0 is not drawn
    painted = strokes(histograms, 10).reshape(2, 10, 10, 3)
    for place in range(0, 600, 7):
        n, y, x, c = (int(part) for part in torch.unravel_index(torch.tensor(place), (2, 10, 10, 3)))
        light = 0.0
        for bin in range(6):
            angle = (bin + 0.5) * math.pi / 6
            far = abs(math.cos(angle) * (y % 5 - 2) + math.sin(angle) * (x % 5 - 2))
            value = histograms[0, n, c, bin, 2 * (y // 5) + x // 5].item()
            light = max(light, value * max(0.0, 1 - far))
        assert abs(painted[n, y, x, c].item() - 255 * min(1.0, light)) < 0.51


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_show_true_strokes_but_for_hidden_patches(channels):
    objective = build(ViT(tiny_config(channels=channels)))
    images = torch.randint(0, 256, (2, channels, 32, 48), dtype=torch.uint8)
    torch.manual_seed(3)
    shown = objective.pictures(Batch(images))
    torch.manual_seed(3)
    hidden = objective.draw(2, CPU)
    assert list(shown) == list(objective.config.pictures)
    parts = {name: targets.patch_pixels(picture, 8) for name, picture in shown.items()}
    kept = torch.ones(2, 24, dtype=torch.bool).scatter(1, hidden, False)
    assert torch.equal(parts["seen"][kept], targets.patch_pixels(images, 8)[kept])
    assert torch.equal(parts["predicted"][kept], parts["truth"][kept])
    assert torch.equal(parts["truth"], strokes(targets.hog(images, 8, 4).unflatten(-1, (channels, 9, 4)), 8))
    said = objective.predict(images, hidden).unflatten(-1, (channels, 9, 4))
    assert torch.equal(take(parts["predicted"], hidden), strokes(said, 8))


# What can't be


@pytest.mark.parametrize(
    ("changes", "settings", "words"),
    [
        ({"image": (32, 32), "patch": 4}, {}, r"objective.cell \(8\) must divide model.patch \(4\)"),
        ({}, {"cell": 3}, r"objective.cell \(3\) must divide model.patch \(8\)"),
        ({"image": (1, 20), "patch": 1}, {"cell": 1}, r"images of at least 2x2 pixels, got model.image \(1, 20\)"),
        ({"image": (8, 640)}, {}, "objective.mask blocks, objective.share 0.4: .* grid of 1 x 80"),
        ({"image": (24, 48)}, {"mask": "units"}, "objective.mask units, .* grid of 3 x 6"),
    ],
)
def test_images_that_it_does_not_fit_are_refused(changes, settings, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words) as caught:
        MaskFeat(ViT(tiny_config(**changes)), MaskFeatConfig(**settings))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"), [("share", 1.0), ("cell", 0), ("bins", 1), ("bins", 999), ("window", 1), ("window", -3)]
)
def test_impossible_settings_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"objective.{key}"):
        MaskFeatConfig(**{key: value})
