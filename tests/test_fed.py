"""What an encoder is fed goes with its weights: whatever reads pictures for them does as the scores of training did."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture_folder, shaken, tiny_config
from PIL import Image
from tiny_runs import LABELS, RECIPE, RESNET, run, write_recipe

import mpp
from mpp.augment.input import Input
from mpp.eval.compare.chains import identity
from mpp.eval.features.extract import extract, key
from mpp.files import unsealed
from mpp.models.classifier import Classifier, Head
from mpp.models.vit import ViT
from mpp.objectives.masked_patch import MaskedPatchPrediction
from mpp.shards.index import read_index
from mpp.shards.write import make_shards
from mpp.train_config import LogConfig, TrainConfig
from mpp.weights import load_classifier, load_encoder, save_classifier, save_encoder

SIZE = (24, 41)  # of the pictures: neither square nor of any encoder's size
CENTRE = "data.augment.centre=0.7"


@pytest.fixture(scope="module", autouse=True)
def exact() -> Iterator[None]:
    """Float32 on any machine, so that results compare closely."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpp.hardware.multiplies_bfloat16", lambda device: False)
        yield


@pytest.fixture(scope="module")
def runs(exact: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of pictures that are not square, and runs on them that were scored on 0.7 of their shorter side."""
    root = tmp_path_factory.mktemp("fed")
    for split, count in {"train": 30, "test": 20}.items():
        picture_folder(root / "source" / split, count, SIZE)
    make_shards(root / "source", root / "shards", report=lambda line: None, progress=False)
    for name, verb, text in (("mpp", "pretrain", RECIPE), ("vit", "finetune", LABELS), ("cnn", "finetune", RESNET)):
        recipe = write_recipe(root, root / "shards", text)
        done = run(verb, recipe, CENTRE, f"out={root / name}", "train.save_every=3", "log.tensorboard=false")
        assert done.code == 0, done.err
    return root


def by_pillow(picture: Image.Image, image: tuple[int, int], share: float) -> np.ndarray:
    """The centred box of that share, resized by Pillow."""
    scale = share * min(picture.height / image[0], picture.width / image[1])
    height, width = round(scale * image[0]), round(scale * image[1])
    top, left = (picture.height - height) // 2, (picture.width - width) // 2
    box = picture.crop((left, top, left + width, top + height))
    return np.asarray(box.resize(image[::-1], Image.Resampling.BILINEAR))


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_predict_gives_the_scores_of_the_training(kind, runs, tmp_path):
    done = run(
        "predict",
        runs / kind,
        runs / "shards",
        "--split",
        "test",
        "--json",
        tmp_path / "p.json",
        "--out",
        tmp_path / "p.csv",
    )
    assert done.code == 0, done.err
    there, here = unsealed(runs / kind / "scores.json", indent=None), json.loads((tmp_path / "p.json").read_text())
    assert there.pop("images"), "of which images they are, for comparisons"
    assert {name: here[name] for name in there} == there  # exactly
    last = [json.loads(line) for line in (runs / kind / "metrics.jsonl").read_text().splitlines()][-1]
    assert here["loss"] == pytest.approx(last["val/loss"], rel=1e-5)


def test_a_folder_is_seen_as_pillow_would_crop_it(runs, tmp_path):
    folder = runs / "source/test/class1"
    assert run("predict", runs / "vit", folder, "--out", tmp_path / "p.jsonl").code == 0
    classifier = load_classifier(runs / "vit")
    assert classifier.input == Input((16, 16), centre=0.7)
    lines = {(line := json.loads(text))["key"]: line for text in (tmp_path / "p.jsonl").read_text().splitlines()}
    paths = sorted(folder.glob("*.jpg"))
    pixels = np.stack([by_pillow(Image.open(path), (16, 16), 0.7) for path in paths])
    ours = classifier.prepare(*paths)
    assert np.abs(ours.permute(0, 2, 3, 1).numpy().astype(int) - pixels).max() <= 1
    with torch.no_grad():
        for path, shares in zip(paths, classifier(ours).softmax(1), strict=True):
            assert lines[path.name]["score"] == pytest.approx(shares.max().item(), abs=1e-6)


@pytest.mark.parametrize("place", ["", "checkpoints/step-00000003", "encoder.safetensors", "classifier.safetensors"])
def test_every_file_of_a_run_says_what_it_was_fed(place, runs):
    assert load_encoder(runs / "vit" / place).input == Input((16, 16), centre=0.7)


def test_probe_embed_and_features_see_what_the_pretraining_was_scored_on(runs, tmp_path):
    encoder = load_encoder(runs / "mpp")
    assert run("embed", runs / "mpp", runs / "source/test/class0", tmp_path / "e.npz").code == 0
    found = np.load(tmp_path / "e.npz")
    pixels = encoder.prepare(*(runs / "source/test/class0" / name for name in found["keys"]))
    with torch.no_grad():
        np.testing.assert_allclose(found["features"], encoder(pixels).numpy(), rtol=1e-4, atol=1e-5)
    features = extract(encoder, runs / "shards", "test", blocks=[1])
    batch = mpp.read_shards(runs / "shards", 20, split="test", train=False, input=encoder.input).at(0)
    with torch.no_grad():
        np.testing.assert_allclose(features.vectors.numpy(), encoder(batch.images).numpy(), atol=0.02)
    done = run(
        "probe", runs / "mpp", "--data", runs / "shards", "--protocol", "knn", "--untrained", "--json", tmp_path / "j"
    )
    assert done.code == 0, done.err


def test_features_of_another_centre_are_not_taken_from_the_cache(runs, tmp_path):
    encoder, index = load_encoder(runs / "mpp"), read_index(runs / "shards", "test")
    before, features = key(encoder, index, [1]), extract(encoder, runs / "shards", "test", cache=tmp_path)
    seen = identity(encoder)
    encoder.input = Input((16, 16))
    assert key(encoder, index, [1]) != before
    assert identity(encoder) != seen  # rows of a comparison are told apart as well
    assert not torch.equal(extract(encoder, runs / "shards", "test", cache=tmp_path).vectors, features.vectors)


def test_fine_tuning_is_fed_what_its_own_recipe_says(runs, tmp_path):
    recipe = write_recipe(
        tmp_path, runs / "shards", LABELS.replace("depth: 2", "depth: 1").replace("pool: avg", "pool: cls")
    )
    done = run("finetune", recipe, "--from", runs / "mpp", "model.image=24", f"out={tmp_path / 'out'}")
    assert done.code == 0, done.err
    assert load_encoder(tmp_path / "out").input == Input((24, 24), centre=1.0)


def test_training_in_python_takes_the_centre_of_its_batches(runs, tmp_path):
    augment = mpp.AugmentConfig(centre=0.5)
    batches = mpp.read_shards(runs / "shards", 8, image=(16, 16), augment=augment)
    objective = MaskedPatchPrediction(ViT(tiny_config(image=(16, 16), patch=4, depth=1)))
    config = TrainConfig(steps=1, warmup=0, batch=8, micro_batch=8, precision="float32", device="cpu")
    mpp.train(objective, batches, config, out=tmp_path, log=LogConfig(pictures=0, tensorboard=False))
    assert load_encoder(tmp_path).input == Input((16, 16), centre=0.5)


def test_what_is_fed_comes_through_every_copy(tmp_path):
    fed = Input((64, 32), centre=0.8, fit="squeeze", filter="bicubic")
    encoder = shaken(ViT(tiny_config()))
    encoder.input = fed
    save_encoder(encoder, tmp_path / "e.safetensors")
    save_classifier(Classifier(encoder, Head(64, 2), ("a", "b")), tmp_path / "c.safetensors")
    assert load_encoder(tmp_path / "e.safetensors").input == load_classifier(tmp_path / "c.safetensors").input == fed
    assert encoder.resized(image=(16, 24)).input == Input((16, 24), centre=0.8, fit="squeeze", filter="bicubic")
    mpp.convert(tmp_path / "c.safetensors", tmp_path / "out", "safetensors")
    assert load_classifier(tmp_path / "out").input == fed


@pytest.mark.parametrize("share", [1.0, 0.9])
def test_squeezed_and_bicubic_pictures_are_pillows(share):
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    picture = coarse.resize((90, 60), Image.Resampling.BICUBIC)
    encoder = ViT(tiny_config(image=(16, 40)))
    encoder.input = Input((16, 40), centre=share, fit="squeeze", filter="bicubic")
    found = encoder.prepare(picture, np.asarray(picture))
    height, width = round(share * 60), round(share * 90)
    top, left = (60 - height) // 2, (90 - width) // 2
    box = picture.crop((left, top, left + width, top + height)).resize((40, 16), Image.Resampling.BICUBIC)
    for one in found:
        assert np.abs(one.permute(1, 2, 0).numpy().astype(int) - np.asarray(box)).max() <= 1


def test_a_grey_encoder_sees_colour_folders_as_grey(runs):
    encoder = ViT(tiny_config(image=(16, 16), channels=1))
    encoder.input = Input((16, 16), centre=0.7)
    path = next((runs / "source/test/class0").glob("*.jpg"))
    with Image.open(path) as picture:
        expected = by_pillow(picture.convert("L"), (16, 16), 0.7)
    assert np.abs(encoder.prepare(path)[0, 0].numpy().astype(int) - expected).max() <= 2


def test_a_run_folder_elsewhere_still_says_it(runs, tmp_path):
    shutil.copytree(runs / "vit", tmp_path / "moved")
    (tmp_path / "moved/recipe.yaml").unlink()
    assert load_encoder(tmp_path / "moved").input.centre == 0.7
