"""What trainers put in front of the names of tensors: the model is found behind it, and never silently one of two."""

import json
import logging
import time
from pathlib import Path

import pytest
import torch
from conftest import shaken
from safetensors.torch import load, save_file

import mpp
from mpp.export.convert import convert, facts_of
from mpp.models.vit_config import ViTConfig
from mpp.weights import WeightsError, huggingface, prefixes
from mpp.weights import timm as format

CONFIG = ViTConfig(image=(16, 16), patch=8, width=32, depth=1, heads=2, resize="bicubic_antialias")
Tensors = dict[str, torch.Tensor]


def tensors_of(seed: int, module=format) -> Tensors:
    """A random ViT under the names of a format, with a head."""
    torch.manual_seed(seed)
    encoder = shaken(mpp.ViT(CONFIG)).eval()
    return load(module.write(encoder, None, ())["model.safetensors"])


ONE, OTHER = tensors_of(1), tensors_of(2)


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value.clone() for name, value in tensors.items()}


def saved(path: Path, content) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    elif path.suffix == ".index":  # two files and the index that names each tensor's
        path = path.with_name("model.safetensors.index.json")
        names = sorted(content)
        parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
        for file, inside in parts.items():
            save_file({name: content[name] for name in inside}, path.parent / file)
        places = {name: file for file, inside in parts.items() for name in inside}
        path.write_text(json.dumps({"weight_map": places}))
    else:
        torch.save(content, path)
    return path


def is_of(encoder, tensors: Tensors) -> bool:
    """Whether an encoder has these weights."""
    return torch.equal(encoder.norm.weight, tensors["norm.weight"]) and torch.equal(
        encoder.class_token, tensors["cls_token"].reshape(-1)
    )


PREFIXES = [
    "model.",
    "net.",
    "encoder.",
    "backbone.",
    "module.",
    "_orig_mod.",
    "student.",
    "model_ema.module.",
    "momentum_encoder.",
    "module.base_encoder.",
    "module._orig_mod.model.",
    "a.b.c.d.whatever_one_likes.",
    "vit.",
]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".index"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_in_any_container(prefix, suffix, tmp_path):
    beside = {"head_of_mine.weight": torch.ones(3), "loss.weight": torch.ones(2)}
    path = saved(tmp_path / f"x{suffix}", under(prefix, ONE) | beside)
    encoder = mpp.load_encoder(path, heads=2)
    assert is_of(encoder, ONE)
    assert set(encoder.left_aside) == {"head_of_mine", "loss"}


@pytest.mark.parametrize("prefix", ["", "model.", "module._orig_mod.net."])
@pytest.mark.parametrize(
    "keys", ["state_dict", "model_state_dict", "model", "weights.mine", "checkpoint.model.teacher"]
)
def test_any_prefix_in_any_dictionary(keys, prefix, tmp_path):
    content = under(prefix, ONE)
    for key in reversed(keys.split(".")):
        content = {key: content, "epoch": 1, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}]}
    assert is_of(mpp.load_encoder(saved(tmp_path / "x.ckpt", content), heads=2), ONE)


@pytest.mark.parametrize("prefix", ["", "model.", "module.net."])
@pytest.mark.parametrize("own", ["", "vit."])
def test_transformers_names_behind_a_prefix(prefix, own, tmp_path):
    theirs = tensors_of(1, huggingface)
    names = under(prefix + own, theirs) | under(
        prefix, {"classifier.weight": torch.ones(3, 32), "classifier.bias": torch.ones(3)}
    )
    classifier = mpp.load_classifier(saved(tmp_path / "x.safetensors", names), heads=2)
    assert torch.equal(classifier.encoder.norm.weight, theirs["layernorm.weight"])
    assert classifier.head.linear.weight.shape == (3, 32)


@pytest.mark.parametrize(
    ("taken", "left"),
    [
        ("teacher.", "student."),
        ("teacher.backbone.", "student.backbone."),
        ("model_teacher.", "model."),
        ("state_dict_ema.", "state_dict."),
        ("ema.", ""),
        ("ema_model.module.", "online_model."),
        ("module.base_encoder.", "module.momentum_encoder."),
        ("backbone.", "backbone_momentum."),
        ("encoder_q.", "encoder_k."),
        ("target_encoder.module.", "encoder.module."),
        ("encoder.", "decoder."),
        ("", "momentum_encoder."),
    ],
)
def test_of_two_models_the_published_one_is_taken_and_it_is_said(taken, left, tmp_path, caplog):
    names = under(left, OTHER) | under(taken, ONE)
    path = saved(tmp_path / "x.safetensors", names)
    with caplog.at_level(logging.WARNING):
        encoder = mpp.load_encoder(path, heads=2)
    assert is_of(encoder, ONE)
    told = next(record.getMessage() for record in caplog.records if "left aside" in record.getMessage())
    assert f"under {taken or '.'}" in told
    assert left or "." in told
    assert "prefix=" in told
    assert is_of(mpp.load_encoder(path, heads=2, prefix=left or "."), OTHER)  # as it says
    assert is_of(mpp.load_encoder(path, heads=2, prefix=taken.rstrip(".") or "."), ONE)


def test_a_prefix_is_found_behind_what_a_container_puts_in_front(tmp_path):
    content = {"state_dict": under("model.student.net.", OTHER) | under("model.teacher.net.", ONE)}
    path = saved(tmp_path / "x.ckpt", content)
    for word in ("student.", "student", "student.net.", "model.student."):
        assert is_of(mpp.load_encoder(path, heads=2, prefix=word), OTHER)
    assert is_of(mpp.load_encoder(path, heads=2, prefix="teacher."), ONE)
    for word in ("dent.", "stud", "net.student."):  # whole names between dots, in their order
        with pytest.raises(WeightsError, match="no tensor's name begins so; models in the file: .*model.student.net"):
            mpp.load_encoder(path, heads=2, prefix=word)


def test_of_one_model_nothing_is_said(tmp_path, caplog):
    mpp.load_encoder(saved(tmp_path / "x.pth", {"state_dict": under("model.", ONE)}), heads=2)
    assert "prefix" not in caplog.text


@pytest.mark.parametrize("pair", [("left.", "right."), ("", "extra."), ("ema.", "teacher."), ("model.", "state_dict.")])
def test_two_that_fit_are_refused_and_prefix_chooses(pair, tmp_path):
    path = saved(tmp_path / "x.safetensors", under(pair[0], ONE) | under(pair[1], OTHER))
    with pytest.raises(WeightsError) as caught:
        mpp.load_encoder(path, heads=2)
    text = str(caught.value)
    assert "\n" not in text
    assert all((prefix or ".") in text for prefix in pair)
    advice = text.partition("prefix=")[2].split()[0]
    assert is_of(mpp.load_encoder(path, heads=2, prefix=advice), ONE if advice == (pair[0] or ".") else OTHER)
    assert is_of(mpp.load_encoder(path, heads=2, prefix=pair[0] or "."), ONE)
    convert(path, tmp_path / "out", "safetensors", **facts_of(["heads=2", f"prefix={pair[1]}"]))
    assert is_of(mpp.load_encoder(tmp_path / "out"), OTHER)


def test_a_timm_model_with_teacher_and_student_is_no_dino(tmp_path):
    """Published sizes and a head, as timm writes them: DINO's own checkpoints have none, and other means."""
    tensors = ONE | {"head.weight": torch.ones(5, 32), "head.bias": torch.zeros(5)}
    content = {"state_dict": under("student.", tensors) | under("teacher.", tensors)}
    classifier = mpp.load_classifier(saved(tmp_path / "x.ckpt", content), heads=2)
    assert classifier.encoder.config.resize == "bicubic_antialias"
    assert classifier.head.linear.weight.shape == (5, 32)


def test_one_model_under_two_names_is_one(tmp_path):
    names = under("model.backbone.", ONE) | under("backbone.", ONE)
    assert is_of(mpp.load_encoder(saved(tmp_path / "x.safetensors", names), heads=2), ONE)
    names["backbone.norm.weight"] = names["backbone.norm.weight"] + 1
    with pytest.raises(WeightsError, match="several models"):
        mpp.load_encoder(saved(tmp_path / "x.safetensors", names), heads=2)


@pytest.mark.parametrize("prefix", ["studen", "", 3])
def test_a_prefix_that_is_not_there_is_named_with_those_that_are(prefix, tmp_path):
    path = saved(tmp_path / "x.safetensors", under("student.", ONE) | under("teacher.", OTHER))
    with pytest.raises(WeightsError, match=r"x.safetensors: prefix"):
        mpp.load_encoder(path, heads=2, prefix=prefix)


def test_the_search_takes_linear_time():
    names = {f"{i}.a.b.patch_embed.proj.weightx": 0 for i in range(200_000)}
    before = time.process_time()
    assert prefixes.choose(names, None, lambda one, other: False) is None
    assert time.process_time() - before < 3


def test_a_checkpoint_of_moco_v3_gives_its_base_encoder(tmp_path):
    """facebookresearch/moco-v3: an MLP in the place of the head, with batch norm, and a predictor beside."""
    head = {"head.0.weight": torch.ones(8, 32), "head.1.weight": torch.ones(8), "head.1.running_mean": torch.ones(8)}
    content = under("module.base_encoder.", ONE | head) | under("module.momentum_encoder.", OTHER | head)
    content |= {"module.predictor.0.weight": torch.ones(3)}
    path = saved(tmp_path / "vit-b.pth.tar", {"epoch": 300, "arch": "vit_base", "state_dict": content, "optimizer": {}})
    encoder = mpp.load_encoder(path, heads=2)
    assert is_of(encoder, ONE)
    assert set(head) <= set(encoder.left_aside)
