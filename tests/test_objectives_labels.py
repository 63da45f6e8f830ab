import math

import pytest
import torch
import torch.nn.functional as F
from conftest import shaken, tiny_config

from mpp.batch import Batch
from mpp.mixing import mix, smoothed
from mpp.models.cnn import ResNet
from mpp.models.resnet_config import ResNetConfig
from mpp.models.vit import ViT
from mpp.objectives.labels import Classification
from mpp.objectives.labels_config import LabelsConfig

NAMES = tuple("abcdefg")


def build(encoder, **settings) -> Classification:
    """An objective none of whose weights is zero."""
    objective = Classification(encoder, LabelsConfig(**{"classes": NAMES, **settings}))
    with torch.no_grad():
        objective.head.linear.weight.normal_()
    return objective.train()


@pytest.fixture
def labelled(batch) -> Batch:
    return Batch(batch.images, torch.tensor([0, 3, 3, 6]))


@pytest.mark.parametrize("pool", ["cls", "avg"])
@pytest.mark.parametrize("hidden", [False, True])
def test_an_untrained_model_guesses(pool, hidden, labelled):
    objective = Classification(ViT(tiny_config(pool=pool)), LabelsConfig(classes=NAMES, hidden=hidden))
    loss, _ = objective(labelled)
    assert loss.item() == pytest.approx(math.log(7)), "the head starts at zero, so all classes are as likely"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [(), (1.0, 2.0, 3.0, 4.0, 0.0, 1.0, 3.0)])
def test_the_loss_is_torchs_cross_entropy(tiny_vit, labelled, smoothing, weights):
    objective = build(tiny_vit, smoothing=smoothing, weights=weights)
    loss, _ = objective(labelled)
    logits = objective.head(tiny_vit(labelled.images))
    weight = torch.tensor(weights) / (sum(weights) / 7) if weights else None
    truth = smoothed(labelled.labels, 7, smoothing)
    expected = F.cross_entropy(logits, truth, weight=weight)  # of shares of classes, torch divides by the batch alone
    torch.testing.assert_close(loss, expected)
    if not weights:
        torch.testing.assert_close(loss, F.cross_entropy(logits, labelled.labels, label_smoothing=smoothing))


def test_mixed_images_and_labels_go_through_the_model_together(tiny_vit, labelled):
    objective = build(tiny_vit, mixup=0.8, cutmix=1.0)
    torch.manual_seed(5)
    loss, _ = objective(labelled)
    torch.manual_seed(5)
    pixels = (labelled.images / 255 - 0.5) / 0.5
    images, truth = mix(pixels, F.one_hot(labelled.labels, 7).float(), mixup=0.8, cutmix=1.0)
    assert not torch.equal(images, pixels)
    torch.testing.assert_close(loss, F.cross_entropy(objective.head(tiny_vit(images)), truth))


def test_evaluation_is_plain_cross_entropy_and_does_not_draw(labelled):
    encoder = shaken(ViT(tiny_config(drop_path=0.5, dropout=0.5)))
    objective = build(encoder, mixup=1.0, smoothing=0.3, weights=(1.0, 2, 3, 4, 5, 6, 7)).eval()
    (first, metrics), (second, _) = objective(labelled), objective(labelled)
    logits = objective.head(encoder(labelled.images))
    assert first == second
    torch.testing.assert_close(first, F.cross_entropy(logits, labelled.labels))
    assert metrics["accuracy"] == (logits.argmax(1) == labelled.labels).float().mean()
    near = torch.topk(logits, 5).indices == labelled.labels[:, None]
    assert metrics["top5"] == near.any(1).float().mean()


def test_a_model_that_says_the_same_of_all_is_not_called_right(tiny_vit):
    objective = Classification(tiny_vit, LabelsConfig(classes=NAMES)).eval()
    images = torch.zeros(7, 3, 32, 48, dtype=torch.uint8)
    _, metrics = objective(Batch(images, torch.arange(7)))
    assert metrics["accuracy"].item() == pytest.approx(1 / 7)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_every_encoder_learns_its_batch(precision):
    images, labels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 3
    for encoder in (
        ViT(tiny_config(image=(32, 32))),
        ResNet(ResNetConfig(image=(32, 32), depth=18, width=8, stem="small")),
    ):
        objective = Classification(encoder, LabelsConfig(classes=("a", "b", "c")))
        optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
        for _ in range(30):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                loss, metrics = objective(Batch(images, labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.dtype == torch.float32
        assert metrics["accuracy"] == 1, type(encoder)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"smoothing": 1.0}, "objective.smoothing"),
        ({"mixup": -1.0}, "objective.mixup"),
        ({"weights": (1.0, 2.0)}, "objective.weights"),
        ({"weights": (0.0,) * 7}, "objective.weights"),
    ],
)
def test_impossible_settings_are_named(settings, key):
    with pytest.raises(ValueError, match=key):
        LabelsConfig(**{"classes": NAMES, **settings})
