import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import ks_2samp
from timm.data import Mixup
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target

from mpp import draws, mixing
from mpp.mixing import mix, smoothed

SIZE = (7, 10)


def telling(count: int, size: tuple[int, int] = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (b, b, h, w) of which each has a channel of its own, all ones, and targets that say the same."""
    targets = torch.eye(count)
    return targets[:, :, None, None].expand(-1, -1, *size).clone(), targets


def kept(images: torch.Tensor) -> torch.Tensor:
    """How much of each pixel (h, w) the first of the `telling` images keeps."""
    return images[0, 0]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_are_the_share_that_each_image_has_of_the_pixels(count, mixup, cutmix):
    images, targets = telling(count)
    for _ in range(50):
        mixed, labels = mix(images, targets, mixup=mixup, cutmix=cutmix)
        assert mixed.shape == images.shape
        torch.testing.assert_close(labels, mixed.mean((2, 3)), rtol=0, atol=1e-6)
        torch.testing.assert_close(labels.sum(1), torch.ones(count))
        for i in range(count):
            assert set(labels[i].nonzero().flatten().tolist()) <= {i, min(i + 1 - 2 * (i % 2), count - 1)}


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize(
    ("lam", "centre"), [(0.3, (3, 4)), (0.62, (0, 0)), (0.9, (6, 9)), (0.05, (5, 2)), (1.0, (1, 1))]
)
def test_a_batch_is_mixed_as_timm_mixes_it_with_the_same_draws(cut, lam, centre, monkeypatch):
    images, labels = torch.randn(6, 3, *SIZE), torch.randint(0, 4, (6,))
    settings = {"mixup_alpha": 0.0 if cut else 0.8, "cutmix_alpha": 1.0 if cut else 0.0}
    there = iter(centre)
    monkeypatch.setattr(np.random, "rand", lambda: 0.0)
    monkeypatch.setattr(np.random, "beta", lambda a, b: lam)
    monkeypatch.setattr(np.random, "randint", lambda low, high, size: next(there))
    order = torch.tensor([0, 2, 4, 5, 3, 1])  # timm mixes the first with the last, and so on
    there_mixed = Mixup(**settings, label_smoothing=0.1, num_classes=4)(images[order], labels[order])
    expected = [part[order.argsort()] for part in there_mixed]

    row, column = ((at + 0.5) / side for at, side in zip(centre, SIZE, strict=True))
    monkeypatch.setattr(mixing, "_beta", lambda alpha, key: torch.tensor(lam))
    monkeypatch.setattr(mixing.draws, "uniform", lambda key, count: torch.tensor([[0.5, 0.5, row, column]]))
    found = mix(images, smoothed(labels, 4, 0.1), mixup=settings["mixup_alpha"], cutmix=settings["cutmix_alpha"])
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("alpha", [0.1, 0.8, 4.0])
def test_the_share_of_mixup_follows_the_beta_distribution(alpha):
    images, targets = telling(2, (1, 1))
    shares = torch.stack([kept(mix(images, targets, mixup=alpha, cutmix=0.0)[0]).mean() for _ in range(4000)]).numpy()
    # Moments of Beta(a, a): variance 1 / (4 (2a + 1)), kurtosis 3 - 6 / (2a + 3).
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)
    assert ((shares - 0.5) ** 4).mean() / shares.var() ** 2 == pytest.approx(3 - 6 / (2 * alpha + 3), rel=0.06)


def test_a_very_small_alpha_leaves_one_image_or_the_other():
    shares = torch.stack(
        [
            mixing._beta(torch.tensor(0.001), key)
            for key in draws.batch_keys(torch.device("cpu")) + torch.arange(2000).view(-1, 1)
        ]
    )
    assert ((shares < 1e-3) | (shares > 1 - 1e-3)).float().mean() > 0.97
    assert shares.mean() == pytest.approx(0.5, abs=0.06)


def test_cutmix_boxes_are_spread_and_sized_as_timms():
    size, draws = (12, 16), 4000
    images, targets = telling(2, size)
    found = torch.stack([kept(mix(images, targets, mixup=0.0, cutmix=1.0)[0]) for _ in range(draws)])
    assert set(found.unique().tolist()) == {0.0, 1.0}
    expected = torch.ones(draws, *size)
    random = np.random.RandomState(0)
    np.random.seed(0)  # noqa: NPY002  timm draws from it
    for one in expected:
        (top, bottom, left, right), _ = cutmix_bbox_and_lam((1, *size), random.beta(1, 1))
        one[top:bottom, left:right] = 0
    spread = 5 * 0.5 * math.sqrt(2 / draws)  # five standard deviations of the difference of two such means
    assert (found.mean(0) - expected.mean(0)).abs().max() < spread
    assert ks_2samp(found.mean((1, 2)), expected.mean((1, 2))).pvalue > 1e-3


def test_switch_is_the_chance_of_cutmix_and_chance_that_of_any():
    images, targets = telling(2, (16, 16))
    mixed = [kept(mix(images, targets, mixup=1.0, cutmix=1.0, switch=0.3, chance=0.6)[0]) for _ in range(3000)]
    blended = sum(bool(((pixels > 0) & (pixels < 1)).all()) for pixels in mixed) / 3000
    whole = sum(bool((pixels == 1).all()) for pixels in mixed) / 3000
    assert blended == pytest.approx(0.6 * 0.7, abs=0.03)
    assert whole == pytest.approx(0.4, abs=0.03), "besides the boxes too small for a pixel"


def test_without_mixup_and_cutmix_or_chance_nothing_changes():
    images, targets = telling(3)
    for found in [mix(images, targets, mixup=0.0, cutmix=0.0), mix(images, targets, mixup=1.0, cutmix=1.0, chance=0.0)]:
        assert torch.equal(found[0], images)
        assert torch.equal(found[1], targets)


def test_draws_come_from_torchs_generator():
    images, targets = telling(4)
    found = []
    for seed in [0, 0, 1]:
        torch.manual_seed(seed)
        found.append(mix(images, targets, mixup=0.8, cutmix=1.0, chance=0.9)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_no_number_is_read_off_the_device(mixup, cutmix):
    """The meta device has no numbers: reading one raises, as does a tensor that was left on the CPU."""
    labels = torch.zeros(4, dtype=torch.int64, device="meta")
    targets = smoothed(labels, 10, 0.1)
    mixed, found = mix(torch.empty(4, 3, *SIZE, device="meta"), targets, mixup=mixup, cutmix=cutmix, chance=0.5)
    assert mixed.shape == (4, 3, *SIZE)
    assert found.shape == (4, 10)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothing_is_that_of_timm_and_of_torchs_cross_entropy(smoothing):
    labels, logits = torch.tensor([0, 2, 2, 4, 1]), torch.randn(5, 5)
    targets = smoothed(labels, 5, smoothing)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets[1, 2].item(), 1 - smoothing + smoothing / 5)
    torch.testing.assert_close(targets, mixup_target(labels, 5, 1.0, smoothing))
    torch.testing.assert_close(
        F.cross_entropy(logits, targets), F.cross_entropy(logits, labels, label_smoothing=smoothing)
    )


def test_an_image_without_a_label_has_no_class_that_stands_out():
    assert smoothed(torch.tensor([-1]), 4, 0.2).tolist() == [pytest.approx([0.05] * 4)]
