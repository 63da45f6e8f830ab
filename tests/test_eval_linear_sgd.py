import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import shaken, tiny_config
from tiny_runs import small_splits
from torch import nn

from mpp.augment.config import AugmentConfig
from mpp.data.read import read_shards
from mpp.eval.features.extract import ProbeError, extract
from mpp.eval.probes.linear_sgd import LARS, SGDConfig, build_head, linear_sgd
from mpp.models.vit import ViT


def test_lars_takes_the_steps_of_maes_formula():
    torch.manual_seed(1)
    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.zeros(2, 2))]
    plain = [parameter.detach().double().numpy().copy() for parameter in parameters]
    momenta = [np.zeros_like(value) for value in plain]
    optimizer = LARS(parameters, lr=0.7)
    for step in range(4):
        gradients = [torch.randn_like(parameter) for parameter in parameters]
        if step == 2:
            gradients[0].zero_()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        for i, gradient in enumerate(gradients):
            change = gradient.double().numpy()
            if plain[i].ndim > 1:
                size, norm = np.sqrt((plain[i] ** 2).sum()), np.sqrt((change**2).sum())
                change = change * (0.001 * size / norm if size > 0 and norm > 0 else 1.0)
            momenta[i] = 0.9 * momenta[i] + change
            plain[i] = plain[i] - 0.7 * momenta[i]
        for parameter, expected in zip(parameters, plain, strict=True):
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_head_is_as_published():
    norm, linear = build_head(500, 100, 0)
    assert (norm.affine, norm.eps, norm.momentum) == (False, 1e-6, 0.1)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert linear.bias.abs().max() == 0
    assert torch.equal(linear.weight, build_head(500, 100, 0)[1].weight)
    assert not torch.equal(linear.weight, build_head(500, 100, 1)[1].weight)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return small_splits(tmp_path_factory.mktemp("splits"))


@pytest.fixture
def encoder():
    return shaken(ViT(tiny_config(image=(16, 16), patch=4, depth=1)))


def test_the_rate_is_maes_schedule(splits, encoder, monkeypatch):
    published = SGDConfig()
    assert published.blr * published.batch / 256 == pytest.approx(6.4)
    rates, step = [], LARS.step

    def noted(self: LARS) -> None:
        rates.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(LARS, "step", noted)
    monkeypatch.setattr("mpp.eval.probes.linear_sgd.BATCH", 10)
    test = extract(encoder, splits, "test")
    linear_sgd(encoder, splits, "train", np.arange(25), 2, test, SGDConfig(batch=10))  # 2 steps an epoch
    assert len(rates) == 2 * 90
    peak = 0.1 * 10 / 256
    part = {0: 0, 5: 0.5, 10: 1, 30: (1 + math.cos(math.pi / 4)) / 2, 50: 0.5, 70: (1 - math.cos(math.pi / 4)) / 2}
    assert {epoch: rates[2 * epoch] for epoch in part} == pytest.approx({epoch: peak * part[epoch] for epoch in part})
    assert rates[-1] == pytest.approx(peak * (1 - math.cos(math.pi / 160)) / 2, rel=1e-6), "half an epoch from 0"


def test_it_trains_as_a_plain_loop_over_whole_batches_does(splits, encoder, monkeypatch):
    monkeypatch.setattr("mpp.eval.probes.linear_sgd.BATCH", 10)  # micro-batches; a batch has three of them
    monkeypatch.setattr("mpp.hardware.multiplies_bfloat16", lambda device: False)
    config, numbers = SGDConfig(epochs=6, warmup=1, batch=36, blr=20.0), np.arange(2, 37)  # 35 images, 30 a batch
    test = extract(encoder, splits, "test")
    found = linear_sgd(encoder, splits, "train", numbers, 2, test, config)

    head = build_head(64, 2, config.seed)
    momenta = {}
    augment = AugmentConfig(crop="inception", area=(0.08, 1.0))
    batches = read_shards(splits, 30, seed=0, augment=augment, numbers=numbers)
    encoder.eval()
    for step in range(6):
        batch = batches.at(step)
        with torch.no_grad():
            features = encoder(batch.images)
        head.zero_grad()
        F.cross_entropy(head(features), batch.labels).backward()
        epoch = step
        lr = 20.0 * 30 / 256 * (epoch if epoch < 1 else 0.5 * (1 + math.cos(math.pi * (epoch - 1) / 5)))
        with torch.no_grad():
            for name, parameter in head.named_parameters():
                change = parameter.grad
                if parameter.ndim > 1:
                    change = change * 0.001 * parameter.norm() / change.norm()
                momenta[name] = 0.9 * momenta.get(name, 0) + change
                parameter -= lr * momenta[name]
    head.eval()
    logits = head(test.parts["class 1"].float())
    assert (logits[:, 0] - logits[:, 1]).abs().min() > 1e-4, "no coin tosses"
    assert found == (logits.argmax(1) == test.labels).double().mean().item()


def test_features_that_tell_the_classes_apart_are_learned(tmp_path, encoder):
    from PIL import Image

    from mpp.shards.write import make_shards

    for split in ("train", "test"):
        for number in range(20):
            place = tmp_path / "source" / split / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (200 if number % 2 else 50, 100, 5 * number)).save(place / f"{number}.png")
    make_shards(tmp_path / "source", tmp_path / "shards", report=lambda line: None, progress=False)
    test = extract(encoder, tmp_path / "shards", "test")
    settings = SGDConfig(epochs=30, warmup=3, blr=100.0)
    assert linear_sgd(encoder, tmp_path / "shards", "train", np.arange(20), 2, test, settings) == 1


def test_one_image_is_too_few_for_batch_norm(splits, encoder):
    with pytest.raises(ProbeError, match="at least 2 training images, split train has 1"):
        linear_sgd(encoder, splits, "train", np.arange(1), 2, extract(encoder, splits, "test"))
