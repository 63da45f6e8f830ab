import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import shaken, tiny_config
from sklearn.utils.class_weight import compute_class_weight

from mpp.batch import Batch
from mpp.loop import build_optimizer, train, update
from mpp.mixing import mix, smoothed
from mpp.models.cnn import ResNet
from mpp.models.resnet_config import ResNetConfig
from mpp.models.vit import ViT
from mpp.objectives.labels import Classification
from mpp.objectives.labels_config import LabelsConfig
from mpp.train_config import LogConfig, TrainConfig
from mpp.watch import TrainingError

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
    weight = torch.tensor(weights) if weights else None
    torch.testing.assert_close(loss, F.cross_entropy(logits, labelled.labels, weight=weight, label_smoothing=smoothing))
    if not weights:
        torch.testing.assert_close(loss, F.cross_entropy(logits, smoothed(labelled.labels, 7, smoothing)))


WEIGHTS = (1.0, 2.0, 3.0, 40.0, 0.5, 1.0, 0.125)


def gradients(objective, batch, micro_batch, **config) -> dict[str, torch.Tensor]:
    """The loss and the gradients of one step of the loop, taken from what SGD with rate 1 changes."""
    config = TrainConfig(steps=1, lr=1.0, optimizer="sgd", betas=(0.0, 0.0), weight_decay=0.0, clip=None, **config)
    before = {name: value.detach().clone() for name, value in objective.named_parameters()}
    optimizer = build_optimizer(objective, config)
    loss, _, _ = update(objective, objective, optimizer, batch, config, micro_batch, 0, 1)
    after = dict(objective.named_parameters())
    found = {name: value - after[name].detach() for name, value in before.items()}
    with torch.no_grad():
        for name, value in before.items():
            after[name].copy_(value)
    return {"loss": loss, **found}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weighted_losses_and_gradients_are_torchs_however_a_batch_is_split(tiny_vit, smoothing):
    batch = Batch(torch.randint(0, 256, (6, 3, 32, 48), dtype=torch.uint8), torch.tensor([0, 3, 3, 6, 1, 2]))
    objective = build(tiny_vit, weights=WEIGHTS, smoothing=smoothing)
    logits = objective.head(tiny_vit(batch.images))
    expected = F.cross_entropy(logits, batch.labels, torch.tensor(WEIGHTS), label_smoothing=smoothing)
    names, parameters = zip(*objective.named_parameters(), strict=True)
    wanted = dict(zip(names, torch.autograd.grad(expected, parameters, allow_unused=True), strict=True))
    for micro_batch in (1, 2, 4, 6):
        found = gradients(objective, batch, micro_batch)
        torch.testing.assert_close(found.pop("loss"), expected.detach())
        for name, value in found.items():
            if wanted[name] is not None:
                torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=2e-6, msg=f"{name}, {micro_batch}")


def test_a_mixed_batch_is_divided_by_the_weights_of_its_labels(tiny_vit, labelled):
    objective = build(tiny_vit, mixup=0.8, cutmix=1.0, weights=WEIGHTS, smoothing=0.1)
    torch.manual_seed(5)
    loss, _ = objective(labelled)
    torch.manual_seed(5)
    pixels = (labelled.images / 255 - 0.5) / 0.5
    images, truth = mix(pixels, F.one_hot(labelled.labels, 7).float() * 0.9 + 0.1 / 7, mixup=0.8, cutmix=1.0)
    logs = objective.head(tiny_vit(images)).log_softmax(1)
    total = sum(
        WEIGHTS[c] * -truth[i, c].item() * logs[i, c].item() for i in range(len(truth)) for c in range(len(NAMES))
    )
    assert loss.item() == pytest.approx(total / sum(WEIGHTS[label] for label in labelled.labels.tolist()), rel=1e-4)


def balanced(counts) -> LabelsConfig:
    labels = np.repeat(np.arange(len(counts)), counts)
    index = SimpleNamespace(label=labels, classes=tuple(f"c{i}" for i in range(len(counts))), origin="x")
    return LabelsConfig(balance=True).settled(index)


def test_balance_weighs_as_scikit_learn_does_and_keeps_the_scale(tiny_vit):
    counts = (990, 10)
    config = balanced(counts)
    labels = np.repeat([0, 1], counts)
    weights = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels)
    assert config.weights == pytest.approx(2 * weights), "the scale is nothing to the loss"
    objective = Classification(tiny_vit, config).train()
    images = torch.randint(0, 256, (10, 3, 32, 48), dtype=torch.uint8)
    loss, _ = objective(Batch(images, torch.tensor([0] * 9 + [1])))
    assert loss.item() == pytest.approx(math.log(2)), "an untrained model guesses, whatever the weights"


def test_of_balanced_images_balance_changes_nothing(tiny_vit, labelled):
    config = balanced((4,) * 7)
    head, plain = torch.randn(7, 64), {}
    for settings in ({}, {"weights": config.weights}, {"weights": (3.0,) * 7}):
        objective = build(tiny_vit, smoothing=0.1, **settings)
        with torch.no_grad():
            objective.head.linear.weight.copy_(head)
        found = gradients(objective, labelled, 2)
        plain = plain or found
        for name in found:
            torch.testing.assert_close(found[name], plain[name], rtol=1e-4, atol=1e-6)


def test_a_class_without_an_image_has_no_weight_and_a_batch_of_such_is_no_division_by_zero(tiny_vit):
    config = balanced((4, 0, 12))
    assert config.weights == pytest.approx((4.0, 0.0, 4 / 3))
    assert config.classes == ("c0", "c1", "c2")
    objective = Classification(tiny_vit, config).train()
    loss, _ = objective(Batch(torch.zeros(2, 3, 32, 48, dtype=torch.uint8), torch.tensor([1, 1])))
    assert loss.item() == 0


OUTSIDE = {
    "image 1 of the batch has label 7; expected 0 to 6, one of 7 classes": torch.tensor([0, 7, 3, 9]),
    "image 2 of the batch has label -1 (none); expected 0 to 6": torch.tensor([0, 6, -1, 9]),
    "image 0 of the batch has label -100; expected 0 to 6": torch.tensor([-100, 6, 0, 0]),
    "labels are float32 of shape (4,); expected whole numbers": torch.tensor([0.0, 1, 2, 3]),
    "labels are bool of shape (4,); expected": torch.tensor([True, False, True, True]),
    "labels are int64 of shape (4, 7); expected": torch.zeros(4, 7, dtype=torch.int64),
    "labels are int64 of shape (3,); expected": torch.zeros(3, dtype=torch.int64),
    "images without labels; expected each to have one of 0 to 6": None,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("message", OUTSIDE)
def test_labels_that_are_no_classes_are_refused(message, training, tiny_vit, batch):
    objective = build(tiny_vit).train(training)
    with pytest.raises(ValueError, match=re.escape(message)):
        objective(Batch(batch.images, OUTSIDE[message]))


@pytest.mark.parametrize("message", OUTSIDE)
def test_training_ends_at_the_step_with_a_label_that_is_no_class(message, tiny_vit, batch, tmp_path):
    class Images:
        def at(self, step):
            labels = torch.tensor([0, 1, 2, 6]) if step < 1 else OUTSIDE[message]
            return Batch(batch.images, labels)

        def iterate(self, start, stop=()):
            return map(self.at, itertools.count(start))

    config = TrainConfig(steps=3, batch=4, lr=1e-3, device="cpu", micro_batch=2, precision="float32")
    with pytest.raises(TrainingError, match=re.escape(f"step 2: labels: {message}")) as caught:
        train(build(tiny_vit), Images(), config, out=tmp_path, log=LogConfig(tensorboard=False, pictures=0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("training", [True, False])
def test_whole_numbers_of_any_type_are_labels(dtype, training, tiny_vit, labelled):
    objective = build(tiny_vit, weights=WEIGHTS).train(training)
    expected, found = (
        objective(Batch(labelled.images, labels)) for labels in (labelled.labels, labelled.labels.to(dtype))
    )
    assert expected == found


def test_what_cannot_be_looked_at_without_waiting_makes_the_loss_not_a_number(tiny_vit, labelled, monkeypatch):
    objective = build(tiny_vit, weights=WEIGHTS)
    right = objective(labelled)[0]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert objective(labelled)[0] == right
    for label in (7, -1):
        labels = labelled.labels.clone()
        labels[2] = label
        assert objective(Batch(labelled.images, labels))[0].isnan()


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
        ({"weights": (math.nan,) * 7}, "objective.weights"),
        ({"weights": (math.inf,) * 7}, "objective.weights"),
    ],
)
def test_impossible_settings_are_named(settings, key):
    with pytest.raises(ValueError, match=key):
        LabelsConfig(**{"classes": NAMES, **settings})
