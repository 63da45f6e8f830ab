import re

import numpy as np
import pytest
import torch
from conftest import picture_folder, shaken, tiny_config
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler
from tiny_runs import run, small_splits, write_recipe

from mpp.data.read import read_shards
from mpp.data.write import make_shards
from mpp.eval.features import extract
from mpp.eval.ridge import L2, Ridge, _scores, ridge
from mpp.models.vit import ViT
from mpp.weights import save_encoder


def clouds(images: int, classes: int, width: int = 20, seed: int = 0, apart: float = 1.0):
    """Overlapping clouds of features, unevenly scaled and off the centre."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width)) * apart
    labels = random.integers(0, classes, images)
    features = centres[labels] + random.normal(size=(images, width))
    features = features * np.logspace(0, 3, width) + 5
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("l2", [1e-6, 1e-3, 1.0, 100.0])
def test_it_predicts_what_scikit_learns_ridge_classifier_predicts(classes, l2):
    (x, y), (test, truth) = clouds(300, classes), clouds(500, classes, seed=1)
    scaler = StandardScaler().fit(x.double().numpy())
    reference = RidgeClassifier(alpha=l2 * len(x)).fit(scaler.transform(x.double().numpy()), y.numpy())
    predicted = reference.predict(scaler.transform(test.double().numpy()))
    [(accuracy, found)] = _scores(x, y, test, truth, (l2,))
    assert found == l2
    assert accuracy == pytest.approx((predicted == truth.numpy()).mean(), abs=1e-12)
    assert accuracy < 1, "not so easy that all predictions would agree anyway"
    assert accuracy > 0.5 or l2 > 1, "and more than the commonest class, but where l2 leaves nothing else"
    [(agreement, _)] = _scores(x, y, test, torch.from_numpy(predicted), (l2,))
    assert agreement == 1


def blocks(images: int, seed: int):
    """Features of three blocks, of which only the second tells the classes apart."""
    features, labels = clouds(images, 4, seed=seed)
    noise = torch.randn(2, *features.shape, generator=torch.Generator().manual_seed(seed))
    return torch.stack([noise[0], features, noise[1]], dim=1), labels


def test_the_block_that_tells_classes_apart_is_chosen():
    found = ridge(*blocks(300, 0), *blocks(200, 1))
    assert found.block == 2
    assert found.l2 in L2
    assert found.accuracy > 0.6
    assert abs(found.accuracy - found.held_out) < 0.2


def test_the_choice_never_looks_at_the_test_split():
    (x, y), (test, truth) = blocks(300, 0), blocks(200, 1)
    found = ridge(x, y, test, truth)
    for labels in (truth[torch.randperm(200)], (truth + 1) % 4):
        other = ridge(x, y, test, labels)
        assert (other.block, other.l2, other.held_out) == (found.block, found.l2, found.held_out)
        assert other.accuracy < found.accuracy - 0.2
    unlike = ridge(x, y, torch.randn_like(test), truth)
    assert (unlike.block, unlike.l2, unlike.held_out) == (found.block, found.l2, found.held_out)


def test_images_that_choose_are_not_fitted_while_choosing():
    x, y = torch.randn(200, 1, 500), torch.randint(0, 2, (200,))  # more features than images: fitted ones are all right
    assert ridge(x, y, x, y).accuracy == 1
    assert ridge(x, y, x, y).held_out < 0.9


def test_a_class_that_only_the_test_split_has_is_never_right():
    (x, y), (test, truth) = clouds(300, 3), clouds(90, 3, seed=1)
    [(without, _)] = _scores(x, y, test, truth, (1e-3,))
    [(accuracy, _)] = _scores(x, y, torch.cat([test, test]), torch.cat([truth, torch.full_like(truth, 7)]), (1e-3,))
    assert accuracy == pytest.approx(without / 2)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return small_splits(tmp_path_factory.mktemp("splits"))


def test_features_are_the_average_patch_after_each_block(splits):
    encoder = shaken(ViT(tiny_config(image=(16, 16), patch=4, depth=3)))
    features, labels = extract(encoder, splits, "test")
    batch = read_shards(splits, 20, split="test", train=False).at(0)
    tokens, expected = encoder.embed(batch.images), []
    tokens = torch.cat([(encoder.class_token + encoder.positions.table[:1]).expand(20, 1, -1), tokens], dim=1)
    tokens = torch.cat([tokens[:, :1], tokens[:, 1:] + encoder.positions.table[1:]], dim=1)
    for block in encoder.blocks:
        tokens = block(tokens)
        expected.append(tokens[:, 1:].mean(1))
    assert features.shape == (20, 3, 64)
    assert features.dtype == torch.float32
    exact = torch.stack(expected, dim=1).detach()
    assert (features - exact).norm() < 0.02 * exact.norm(), "as close as bfloat16 gets"
    assert torch.equal(labels, batch.labels)


def test_a_run_is_probed_before_and_after_training(splits, tmp_path):
    recipe = write_recipe(tmp_path, splits)
    assert run("pretrain", recipe, f"out={tmp_path / 'run'}").code == 0
    for weights, extra in [("run", []), ("run/encoder.safetensors", []), ("run", ["--untrained"])]:
        result = run("probe", tmp_path / weights, "--data", splits, *extra)
        assert result.code == 0, result.err
        pattern = r"ridge: \d+\.\d\d % on the test split \(held-out part of train \d+\.\d\d %; block 1, l2 [\de.+-]+ "
        assert re.match(pattern, result.out), result.out


def test_a_result_says_all_that_was_found():
    text = str(Ridge(accuracy=0.51234, held_out=0.5, block=3, l2=1e-3))
    assert all(part in text for part in ("51.23 %", "50.00 %", "block 3", "0.001"))


@pytest.fixture
def encoder_file(tmp_path):
    save_encoder(ViT(tiny_config(image=(16, 16), patch=4)), tmp_path / "encoder.safetensors")
    return tmp_path / "encoder.safetensors"


def test_shards_without_labels_are_named(encoder_file, tmp_path):
    source = picture_folder(tmp_path / "source", 30)
    make_shards(source, tmp_path / "plain", labels="none", report=lambda line: None, progress=False)
    arguments = ["probe", encoder_file, "--data", tmp_path / "plain", "--test", "train"]
    result = run(*arguments)
    assert result.code == 2
    [line] = [line for line in result.err.splitlines() if line.startswith("mpp: ")]
    assert str(tmp_path / "plain") in line
    assert "labels" in line


def test_images_without_a_label_are_left_out_or_refused_but_no_bug(encoder_file, tmp_path):
    source = picture_folder(tmp_path / "source" / "train", 30)
    for number in range(3):
        (source / "class0" / f"{2 * number:04d}.jpg").rename(source / f"{number}.jpg")
    make_shards(tmp_path / "source", tmp_path / "some", report=lambda line: None, progress=False)
    assert run("probe", encoder_file, "--data", tmp_path / "some", "--test", "train").code in (0, 2)


def test_a_split_that_is_not_there_is_named(encoder_file, splits):
    result = run("probe", encoder_file, "--data", splits, "--test", "tset")
    assert result.code == 2
    assert "no split 'tset'; it holds test, train" in result.err
