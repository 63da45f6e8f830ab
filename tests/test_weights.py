import json
import pickle
import re
import shutil
from dataclasses import asdict

import pytest
import torch
from conftest import shaken, tiny_config
from safetensors.torch import load_file, save_file
from tiny_runs import RESNET, run, small_disk, write_recipe
from torch import nn

from mpp.errors import UserError
from mpp.models.classifier import Classifier, Head
from mpp.models.cnn import ResNet
from mpp.models.encoders import facts_of
from mpp.models.resnet_config import ResNetConfig
from mpp.models.vit import ViT
from mpp.weights import WeightsError, load_classifier, load_encoder, save_classifier, save_encoder, timm


@pytest.fixture(scope="module")
def trained(small_shards, tmp_path_factory):
    """Run folders: one with a running average, one without."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder, small_shards)
    for name, ema in {"ema": 0.9, "plain": 0.0}.items():
        assert run("pretrain", recipe, f"train.ema={ema}", f"out={folder / name}").code == 0
    return folder


@pytest.fixture
def encoder_file(tiny_vit, tmp_path):
    save_encoder(tiny_vit, tmp_path / "encoder.safetensors")
    return tmp_path / "encoder.safetensors"


def refused(path, load=load_encoder) -> str:
    """The one line with which a path is refused, which names it."""
    with pytest.raises(WeightsError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def resnet(**changes) -> ResNet:
    """A small ResNet whose statistics, like its parameters, are not those at its start."""
    encoder = shaken(ResNet(ResNetConfig(**{"image": (32, 48), "depth": 18, "width": 4, "stem": "small"} | changes)))
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(17)
    return encoder


def equal(encoder: nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    own = encoder.state_dict()
    return own.keys() == tensors.keys() and all(torch.equal(own[name], tensors[name]) for name in own)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pool": "avg", "positions": "sincos2d", "gelu": "tanh"},
        {"channels": 1, "positions": "none", "mlp": 32, "norm_eps": 1e-5},
        {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "resize": "bicubic"},
    ],
)
def test_an_encoder_is_loaded_as_it_was_saved(changes, tmp_path):
    encoder = shaken(ViT(tiny_config(**changes)))
    save_encoder(encoder, tmp_path / "my.safetensors")
    loaded = load_encoder(str(tmp_path / "my.safetensors"))
    assert loaded.config == encoder.config
    assert equal(loaded, encoder.state_dict())
    images = torch.randint(0, 256, (2, encoder.config.channels, 32, 48), dtype=torch.uint8)
    assert torch.equal(loaded(images), encoder(images))
    assert [path.name for path in tmp_path.iterdir()] == ["my.safetensors"]


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_resnet_is_loaded_as_it_was_saved_with_its_statistics(norm, tmp_path):
    encoder = resnet(norm=norm)
    save_encoder(encoder, tmp_path / "my.safetensors")
    loaded = load_encoder(tmp_path / "my.safetensors")
    assert loaded.config == encoder.config
    assert equal(loaded, encoder.state_dict())
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    assert torch.equal(loaded.eval()(images), encoder.eval()(images))


@pytest.mark.parametrize("hidden", [0, 6])
@pytest.mark.parametrize("make", [lambda: shaken(ViT(tiny_config())), resnet, lambda: resnet(norm="group")])
def test_a_classifier_is_loaded_as_it_was_saved(make, hidden, tmp_path):
    path, names = tmp_path / "classifier.safetensors", ("cat", "dög", '"', "cat")
    encoder = make()
    classifier = Classifier(encoder, shaken(Head(encoder.width, 4, hidden)), names)
    save_classifier(classifier, path)
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    for place in (path, str(path), tmp_path):
        loaded = load_classifier(place)
        assert loaded.classes == names
        assert not loaded.training
        assert torch.equal(loaded(images), classifier.eval()(images))
    assert loaded(images).abs().min() > 0
    found = load_encoder(path)
    assert found.config == encoder.config
    assert equal(found, encoder.state_dict())


def test_an_encoder_comes_from_a_run_a_checkpoint_or_a_file(trained):
    last = load_file(trained / "plain/checkpoints/step-00000006/model.safetensors")
    expected = {name.removeprefix("encoder."): value for name, value in last.items() if name.startswith("encoder.")}
    for path in ("plain", "plain/encoder.safetensors", "plain/checkpoints/step-00000006"):
        assert equal(load_encoder(trained / path), expected), path
    assert equal(load_encoder(trained / "plain/checkpoints/step-00000006/model.safetensors"), expected)
    assert not equal(load_encoder(trained / "plain/checkpoints/step-00000004"), expected)


def test_of_a_run_with_a_running_average_that_average_counts(trained):
    average = load_file(trained / "ema/checkpoints/step-00000006/ema.safetensors")
    weights = load_file(trained / "ema/checkpoints/step-00000006/model.safetensors")
    name = "stem.project.weight"
    assert not torch.equal(average[f"encoder.{name}"], weights[f"encoder.{name}"])
    for path in ("ema", "ema/checkpoints/step-00000006"):
        assert torch.equal(load_encoder(trained / path).state_dict()[name], average[f"encoder.{name}"]), path


def test_a_resnets_running_average_is_loaded_from_a_checkpoint(small_shards, tmp_path):
    recipe, out = write_recipe(tmp_path, small_shards, RESNET), tmp_path / "run"
    settings = ["data.val=null", "train.steps=2", "train.warmup=0", "train.ema=0.9", f"out={out}"]
    assert run("finetune", recipe, *settings).code == 0
    expected = load_encoder(out)
    for name in ("encoder.safetensors", "classifier.safetensors"):
        (out / name).unlink()
    found = {name: value for name, value in load_encoder(out).state_dict().items() if "num_batches" not in name}
    assert found
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in found.items())


def test_of_a_run_that_is_not_at_its_end_the_last_checkpoint_counts(trained, tmp_path):
    stopped = shutil.copytree(trained / "plain", tmp_path / "run")
    (stopped / "encoder.safetensors").unlink()
    shutil.rmtree(stopped / "checkpoints/step-00000006")
    assert equal(load_encoder(stopped), load_encoder(trained / "plain/checkpoints/step-00000004").state_dict())


def test_what_is_not_there_is_named(tmp_path):
    refused(tmp_path / "none.safetensors")
    assert "neither encoder.safetensors nor a checkpoint" in refused(tmp_path)


@pytest.mark.parametrize("left", [0, 5, 100, 0.5, -1])
@pytest.mark.parametrize("load", [load_encoder, load_classifier])
def test_a_cut_file_is_refused(left, load, encoder_file):
    data = encoder_file.read_bytes()
    encoder_file.write_bytes(data[: int(len(data) * left) if isinstance(left, float) else left])
    refused(encoder_file, load)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize(
    "write", [lambda path: path.write_bytes(pickle.dumps(Bomb())), lambda path: torch.save(Bomb(), path)]
)
@pytest.mark.parametrize("name", ["weights.pt", "encoder.safetensors", "weights.npz"])
@pytest.mark.parametrize("load", [load_encoder, load_classifier])
def test_nothing_is_unpickled(write, name, load, tmp_path):
    write(tmp_path / name)
    refused(tmp_path / name, load)


def test_files_of_other_programs_are_refused(tmp_path):
    save_file({"blocks.0.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    assert "none of the formats google, " in refused(tmp_path / "other.safetensors")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    refused(tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors: tensors.pop("norm.weight"), "norm.weight missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "extra"),
        (lambda tensors: tensors.update({"norm.weight": torch.zeros(7)}), "norm.weight .*of another shape"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(change, expected, encoder_file):
    tensors, metadata = load_file(encoder_file), {"encoder": json.dumps(facts_of(ViT(tiny_config())))}
    change(tensors)
    save_file(tensors, encoder_file, metadata)
    with pytest.raises(WeightsError, match=expected):
        load_encoder(encoder_file)


@pytest.mark.parametrize(
    "config", ["", "3", "[1]", '{"width": "wide"}', '{"patch": 5}', '{"width": 7, "heads": 2}', '{"image": 3}']
)
def test_a_config_that_can_not_be_is_refused(config, encoder_file):
    save_file(load_file(encoder_file), encoder_file, {"encoder": config})
    refused(encoder_file)


def test_a_run_without_labels_has_no_classifier(trained, encoder_file):
    folder = trained / "plain"
    assert refused(folder, load_classifier) == (
        f"{folder}: holds no classifier.safetensors, which a finished run with labels leaves"
    )
    refused(folder / "none", load_classifier)
    found = refused(encoder_file, load_classifier)
    assert found == f"{encoder_file}: holds no classifier of mpp (its metadata names no classes)"


@pytest.mark.parametrize("classes", ["", "[", "3", "null", "[]", '["one", "two", "three"]'])
def test_classes_that_can_not_be_are_refused(classes, tmp_path):
    path, encoder = tmp_path / "classifier.safetensors", ViT(tiny_config())
    save_classifier(Classifier(encoder, Head(encoder.width, 2), ["a", "b"]), path)
    about = json.dumps(facts_of(encoder)).removesuffix("}") + f', "classes": {classes}}}'
    save_file(load_file(path), path, {"encoder": about})
    refused(path, load_classifier)


@pytest.mark.parametrize("name", ["alexnet", 3, None, ["vit"], {}])
def test_an_encoder_of_an_unknown_kind_is_refused(name, encoder_file):
    config = {**facts_of(ViT(tiny_config())), "name": name}
    save_file(load_file(encoder_file), encoder_file, {"encoder": json.dumps(config)})
    refused(encoder_file)


def test_a_file_that_does_not_say_what_its_encoder_is_fed_is_refused(encoder_file, tiny_vit):
    """As those of earlier versions: whatever is assumed of it, figures might be other than those of its training."""
    save_file(load_file(encoder_file), encoder_file, {"encoder": json.dumps(asdict(tiny_vit.config))})
    assert "no 'input', what it is fed: a file of an earlier version of mpp" in refused(encoder_file)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"centre": 0}, r"centre must be in \(0, 1\], got 0"),
        ({"centre": "half"}, "centre must be in"),
        ({"centre": float("nan")}, "centre must be in"),
        ({"image": [32, 47]}, "must be a multiple of model.patch"),
        ({"image": [2**20, 2**20]}, "image must be two sides"),
        ({"image": 32}, "image must be two sides"),
        ({"fit": "stretch"}, "fit must be one of crop, squeeze, got 'stretch'"),
        ({"filter": ["bicubic"]}, "filter must be one of"),
        ({"zoom": 2}, "zoom"),
    ],
)
def test_what_an_encoder_can_not_be_fed_is_refused(wrong, why, encoder_file, tiny_vit):
    facts = facts_of(tiny_vit)
    facts["input"] |= wrong
    save_file(load_file(encoder_file), encoder_file, {"encoder": json.dumps(facts)})
    assert re.search(why, refused(encoder_file))


def test_weights_in_half_precision_become_float32(encoder_file, tiny_vit):
    half = {name: value.bfloat16() for name, value in load_file(encoder_file).items()}
    save_file(half, encoder_file, {"encoder": json.dumps(facts_of(tiny_vit))})
    assert {value.dtype for value in load_encoder(encoder_file).state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("kind", [torch.int8, torch.int32, torch.bool, torch.complex64])
def test_weights_that_are_no_plain_numbers_are_refused(kind, encoder_file, foreign_file, tiny_vit):
    # As int8 the numbers of a quantized model stand without its scales: read as they are, every answer is wrong.
    metadata = {"encoder": json.dumps(facts_of(tiny_vit))}
    for path, name, facts, written in (
        (encoder_file, "blocks.0.mlp.expand.weight", {}, metadata),
        (foreign_file, "blocks.0.mlp.fc1.weight", {"heads": 2, "image": (32, 48)}, None),
    ):
        tensors = load_file(path)
        save_file(tensors | {name: (100 * tensors[name]).to(kind)}, path, written)
        told = refused(path, lambda path, facts=facts: load_encoder(path, **facts))
        assert f"{name}: holds {str(kind).removeprefix('torch.')}, and not plain numbers" in told


def test_an_encoder_that_does_not_fit_on_the_disk_leaves_the_old_one(tiny_vit, tmp_path):
    small = ViT(tiny_config(width=16, depth=1))
    with small_disk(tmp_path / "disk", kib=300) as disk:
        save_encoder(small, disk / "encoder.safetensors")
        with pytest.raises(UserError, match="encoder.safetensors: cannot be written: No space left on device"):
            save_encoder(tiny_vit, disk / "encoder.safetensors")
        assert equal(load_encoder(disk), small.state_dict())
        assert [path.name for path in disk.iterdir()] == ["encoder.safetensors"]


def test_a_config_that_claims_what_the_tensors_are_not_costs_no_memory(encoder_file):
    config = {**facts_of(ViT(tiny_config())), "width": 10**5, "depth": 100}  # 48 TB of weights
    save_file(load_file(encoder_file), encoder_file, {"encoder": json.dumps(config)})
    assert "missing, unexpected or of another shape" in refused(encoder_file)


def test_loading_draws_no_random_numbers(encoder_file):
    before = torch.get_rng_state()
    load_encoder(encoder_file)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def foreign_file(tiny_vit, tmp_path):
    (tmp_path / "timm.safetensors").write_bytes(timm.write(tiny_vit, None, ())["model.safetensors"])
    return tmp_path / "timm.safetensors"


@pytest.mark.parametrize(
    ("fact", "expected"),
    [
        ({"heads": "2"}, "model.heads must be int, got '2'"),
        ({"heads": True}, "model.heads must be int, got True"),
        ({"image": "x\n"}, "image must be two sides of at least 1 pixel, at most 2 ** 28 in all, got 'x\\n'"),
        ({"image": (16,)}, "image must be two sides of at least 1 pixel, at most 2 ** 28 in all, got (16,)"),
        ({"mean": (float("nan"),)}, "model.mean must be tuple[float, ...], got (nan,)"),
        ({"gelu": "relu"}, "model.gelu must be one of erf, tanh, quick, got 'relu'"),
        ({"pool": "max"}, "model.pool must be one of cls, avg, avg_norm, cls_avg, map, got 'max'"),
        ({"width": 10**6}, "where (1000000,) for class_token was expected"),
        # What the file holds is not left out because a fact has no place for it.
        ({"depth": 1}, "blocks.1.attn.proj.bias unexpected"),
        ({"bias": False}, "blocks.0.attn.proj.bias unexpected"),
        ({"norm": "rms"}, "blocks.0.norm1.bias unexpected"),
        ({"positions": "none"}, "pos_embed unexpected"),
        ({"mixer": ["attention", "pool"]}, "blocks.1.attn.proj.weight unexpected"),
    ],
)
def test_facts_that_cannot_be_are_refused_by_name(fact, expected, foreign_file):
    facts = {"heads": 2, "image": (32, 48)} | fact
    assert expected in refused(foreign_file, lambda path: load_encoder(path, **facts))


def test_names_that_others_chose_are_shown_harmless(foreign_file):
    save_file(load_file(foreign_file) | {"red\x1b[31m": torch.zeros(1)}, foreign_file)
    told = refused(foreign_file, lambda path: load_encoder(path, heads=2, image=(32, 48)))
    assert "red\\x1b[31m unexpected" in told
    assert told.isprintable()


@pytest.mark.parametrize("shape", [(), (0,), (1, 0, 64), (0, 0, 0, 0), (64, 3, 0, 0)])
@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.proj.weight", "cls_token", "blocks.0.mlp.fc2.weight"])
@pytest.mark.parametrize("facts", [{}, {"heads": 2, "image": (32, 48)}])
def test_tensors_of_any_shape_are_refused_in_one_line(facts, name, shape, foreign_file):
    save_file(load_file(foreign_file) | {name: torch.zeros(shape)}, foreign_file)
    refused(foreign_file, lambda path: load_encoder(path, **facts))


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_what_is_loaded_is_in_eval_mode(kind, tmp_path):
    encoder = ViT(tiny_config(dropout=0.5)).train()
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    save_classifier(Classifier(encoder, Head(encoder.width, 2), ("a", "b")), tmp_path / "classifier.safetensors")
    load = {"encoder": load_encoder, "classifier": load_classifier}[kind]
    assert not load(tmp_path).training
