"""Files of weights that others wrote: what is read of them, what is refused, and that nothing in them is run."""

import argparse
import hashlib
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mpp.weights.files import WeightsError, read

STATE = {"cls_token": torch.arange(6.0).reshape(1, 1, 6), "blocks.0.attn.qkv.weight": torch.randn(18, 6)}


class Hostile:
    """A pickle of it makes a file when it is loaded with pickle.load."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


class Custom:
    pass


def refused(path, *parts: str) -> str:
    """The one line with which a path is refused."""
    with pytest.raises(WeightsError) as caught:
        read(path)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    for part in (Path(path).name, *parts):
        assert part in text, text
    return text


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def saved(path: Path, content, **how) -> Path:
    torch.save(content, path, **how)
    return path


def legacy(path: Path, content, **how) -> Path:
    return saved(path, content, _use_new_zipfile_serialization=False, **how)


def arrays(path: Path, /, **content) -> Path:
    with path.open("wb") as file:
        np.savez(file, **content)
    return path


def folder(path: Path, config=None, **content) -> Path:
    """A folder as transformers and timm leave them: name=content, '.' of the name as '__'."""
    path.mkdir()
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    for name, value in content.items():
        file = path / name.replace("__", ".")
        if file.suffix == ".json":
            file.write_text(json.dumps(value))
        else:
            (save_file if file.suffix == ".safetensors" else torch.save)(value, file)
    return path


# Formats


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "npz", "bin", "none of these", "ü"])
@pytest.mark.parametrize("write", [saved, legacy, lambda path, state: save_file(state, path) or path])
def test_a_file_is_known_by_its_content_whatever_its_name(write, suffix, tmp_path):
    path = write(tmp_path / f"weights.{suffix}", STATE)
    source = read(str(path))
    assert source.path == path
    assert same(source.tensors, STATE)
    assert (source.config, source.metadata, source.args, source.preprocessing, source.aside) == ({}, {}, {}, {}, ())


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pth"])
def test_an_npz_keeps_its_names_shapes_and_order_of_axes(suffix, tmp_path):
    kernel = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)
    content = {
        "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel": np.asfortranarray(kernel),
        "cls": np.float16(1.5) * np.ones((1, 1, 6), np.float16),
        "double": np.linspace(0, 1, 5),
        "swapped": np.arange(3, dtype=">f4"),
        "steps": np.array(7),
        "none": np.zeros((0, 3), np.float32),
    }
    tensors = read(arrays(tmp_path / f"vit.{suffix}", **content)).tensors
    assert list(tensors) == list(content)
    for name, array in content.items():
        assert tensors[name].numpy().shape == array.shape
        assert np.array_equal(tensors[name].numpy(), array.astype(np.float32)), name
        assert tensors[name].dtype == (torch.int64 if name == "steps" else torch.float32)
        assert tensors[name].is_contiguous()


def test_a_packed_npz_is_read_too(tmp_path):
    np.savez_compressed(tmp_path / "vit.npz", **{name: value.numpy() for name, value in STATE.items()})
    assert same(read(tmp_path / "vit.npz").tensors, STATE)


def test_of_a_big_vision_checkpoint_the_parameters_count_and_bfloat16_is_told_by_its_width(tmp_path):
    values = torch.randn(3, 5).bfloat16()
    stored = values.view(torch.int16).numpy().view("V2")  # numpy has no name for bfloat16
    content = {"params/head/kernel": stored, "opt/0/mu/head/kernel": np.ones((3, 5)), "extra": np.array(3)}
    source = read(arrays(tmp_path / "vit.npz", **content))
    assert same(source.tensors, {"head/kernel": values.float()})
    assert source.aside == ("extra", "opt")
    source = read(arrays(tmp_path / "old.npz", **{"opt/target/head/bias": np.ones(3, np.float32), "opt/state": stored}))
    assert same(source.tensors, {"head/bias": torch.ones(3)})


@pytest.mark.parametrize("write", [saved, legacy, lambda path, state: save_file(state, path) or path])
def test_floating_tensors_come_as_contiguous_float32_and_others_as_they_are(write, tmp_path):
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.float32, torch.float8_e4m3fn]
    if write is legacy:
        kinds.pop()  # younger than that format
    state = {str(kind): torch.tensor([[0.5, -2.0, 3.0]]).to(kind) for kind in kinds}
    state |= {"num_batches_tracked": torch.tensor(17), "mask": torch.tensor([True, False])}
    tensors = read(write(tmp_path / "x", state)).tensors
    for name, value in state.items():
        assert tensors[name].dtype == (torch.float32 if value.is_floating_point() else value.dtype)
        assert torch.equal(tensors[name], value.float() if value.is_floating_point() else value)
    turned = read(saved(tmp_path / "y", {"turned": nn.Parameter(torch.arange(6.0).reshape(2, 3).T)})).tensors["turned"]
    assert turned.is_contiguous()
    assert not turned.requires_grad
    assert type(turned) is torch.Tensor
    assert torch.equal(turned, torch.arange(6.0).reshape(2, 3).T)


def test_the_metadata_of_safetensors_is_told(tmp_path):
    save_file(STATE, tmp_path / "x", {"format": "pt", "more": "ü"})
    assert read(tmp_path / "x").metadata == {"format": "pt", "more": "ü"}


def test_a_large_file_is_not_copied_into_memory_and_another_models_state_not_read(tmp_path):
    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10

    path = saved(tmp_path / "x.pth", {"model": {"w": torch.ones(8_000_000)}, "optimizer": {"m": torch.ones(8_000_000)}})
    before = anonymous()
    source = read(path)
    assert anonymous() - before < 8_000_000
    assert source.tensors["w"].sum() == 8_000_000


# Checkpoints


@pytest.mark.parametrize("write", [saved, legacy])
def test_an_mae_checkpoint_gives_its_model_and_its_settings(write, tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(
        model="mae_vit_base_patch16",
        input_size=224,
        mask_ratio=0.75,
        norm_pix_loss=True,
        resume=None,
        betas=(0.9, 0.95),
    )
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "scaler": {}, "args": args}
    source = read(write(tmp_path / "checkpoint-3.pth", content))
    assert same(source.tensors, {name: value.detach() for name, value in model.state_dict().items()})
    assert source.args == vars(args)
    assert source.aside == ("optimizer", "scaler")


def test_settings_are_plain_values_only(tmp_path):
    args = argparse.Namespace(
        lr=np.float64(0.1),
        epochs=np.int32(3),
        flag=np.bool_(True),
        half=np.float16(0.5),
        out=Path("/a/b"),
        nested={"depth": 12, "more": argparse.Namespace(x=1)},
        tensor=torch.ones(2),
        sizes=[224, 384],
        mixed=[object, 1][1:],
        device=torch.device("cpu"),
    )
    expected = {"lr": 0.1, "epochs": 3, "flag": True, "half": 0.5, "out": "/a/b", "sizes": [224, 384], "mixed": [1]}
    expected["nested"] = {"depth": 12, "more": {"x": 1}}
    source = read(saved(tmp_path / "x", {"model": STATE, "args": args, "best_acc": np.float64(81.3)}))
    assert source.args == expected
    assert all(type(value) in (float, int, bool, str, list, dict) for value in source.args.values())
    assert read(saved(tmp_path / "y", {"model": STATE, "config": {"heads": 3}})).args == {"heads": 3}


@pytest.mark.parametrize("name", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize(("code", "order", "value"), [("f8", ">", 0.25), ("i4", "<", -3), ("u1", "|", 255)])
def test_numbers_of_both_numpys_are_read_without_numpys_own_unpickling(name, code, order, value, tmp_path):
    path = saved(tmp_path / "x", {"model": STATE, "args": argparse.Namespace(value=np.dtype(order + code).type(value))})
    own = "numpy._core.multiarray" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "numpy.core.multiarray"
    replaced = rewritten(path, lambda data: data.replace(f"c{own}\n".encode(), f"c{name}\n".encode()))
    assert read(replaced).args == {"value": value}


def rewritten(path: Path, change) -> Path:
    """A torch file whose pickle is changed, uncompressed as it was."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith("/data.pkl") else data)
    return path


@pytest.mark.parametrize(
    "keys", [["model"], ["state_dict"], ["model_state"], ["module"], ["teacher"], ["model", "module"]]
)
def test_the_model_is_found_in_what_is_wrapped_around_it(keys, tmp_path):
    content = OrderedDict(STATE)
    for key in reversed(keys):
        content = {key: content, "epoch": 3}
    assert same(read(saved(tmp_path / "x", content)).tensors, STATE)


@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema"])
@pytest.mark.parametrize("model", ["state_dict", "model"])
def test_a_running_average_wins_as_in_timm(average, model, tmp_path):
    timm = pytest.importorskip("timm.models")
    other = {name: value + 1 for name, value in STATE.items()}
    path = saved(tmp_path / "x.pth", {model: other, average: STATE, "arch": "vit"})
    assert same(read(path).tensors, STATE)
    assert same(read(path).tensors, timm.load_state_dict(str(path)))
    assert read(path).aside == (model,)
    assert same(read(saved(path, {model: other, average: None})).tensors, other)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_wrappers_go_where_all_tensors_have_them(prefix, tmp_path):
    state = {prefix + name: value for name, value in STATE.items()}
    assert same(read(saved(tmp_path / "x", {"model": state})).tensors, STATE)
    mixed = state | {"head.weight": torch.ones(3)}
    assert same(read(saved(tmp_path / "y", mixed)).tensors, mixed)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_of_a_whole_dino_checkpoint_the_teachers_backbone_counts(prefix, tmp_path):
    teacher = {f"{prefix}backbone.{name}": value for name, value in STATE.items()}
    teacher[f"{prefix}head.last_layer.weight_v"] = torch.ones(4)
    student = {f"module.backbone.{name}": value + 1 for name, value in STATE.items()}
    content = {
        "student": student,
        "teacher": teacher,
        "optimizer": {"state": {}},
        "epoch": 3,
        "dino_loss": {"c": STATE["cls_token"]},
    }
    content["args"] = argparse.Namespace(arch="vit_small", patch_size=16)
    source = read(saved(tmp_path / "x", content))
    assert same(source.tensors, STATE)
    assert source.args == {"arch": "vit_small", "patch_size": 16}
    assert source.aside == ("student", "optimizer", "dino_loss", "head")


def test_nested_dictionaries_are_joined_by_dots(tmp_path):
    content = {
        "encoder": {"blocks": [{"w": torch.ones(1)}, {"w": torch.ones(2)}], 3: torch.ones(3)},
        "step": 4,
        "x": "y",
    }
    tensors = read(saved(tmp_path / "x", content)).tensors
    expected = {"encoder.blocks.0.w": torch.ones(1), "encoder.blocks.1.w": torch.ones(2), "encoder.3": torch.ones(3)}
    assert same(tensors, expected)
    refused(saved(tmp_path / "y", {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}), "two tensors", "a.b")


# Folders


def test_a_folder_gives_weights_config_and_preprocessing(tmp_path):
    config, pictures = {"model_type": "vit", "hidden_size": 6}, {"image_mean": [0.5, 0.5, 0.5]}
    path = folder(tmp_path / "vit", config, model__safetensors=STATE, preprocessor_config__json=pictures)
    source = read(path)
    assert source.path == path
    assert same(source.tensors, STATE)
    assert (source.config, source.preprocessing) == (config, pictures)
    alone = read(path / "model.safetensors")
    assert (alone.path, alone.config, alone.preprocessing) == (path / "model.safetensors", config, pictures)


def test_of_a_folder_safetensors_come_before_pickles(tmp_path):
    path = folder(tmp_path / "a", {}, model__safetensors=STATE, pytorch_model__bin={"x": Custom()})
    assert same(read(path).tensors, STATE)
    assert same(read(folder(tmp_path / "b", {}, pytorch_model__bin=STATE)).tensors, STATE)


def test_a_folder_that_transformers_wrote_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **sizes))
    for size in ("5GB", "20KB"):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        source = read(tmp_path / size)
        expected = {}
        for file in (tmp_path / size).glob("*.safetensors"):
            expected |= load_file(file)
        assert same(source.tensors, expected)
        assert sum(value.numel() for value in source.tensors.values()) == model.num_parameters()
        assert source.config["hidden_size"] == 32
    assert len(list((tmp_path / "20KB").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_put_together_and_must_hold_what_the_index_says(suffix, tmp_path):
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    parts = [{name: value} for name, value in STATE.items()]
    names = [f"{stem}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = f"{stem}.{suffix}.index.json"
    content = {name.replace(".", "__"): part for name, part in zip(names, parts, strict=True)}
    path = folder(tmp_path / "vit", {"a": 1}, **content, **{index.replace(".", "__"): {"weight_map": places}})
    assert same(read(path).tensors, STATE)
    assert read(path / index).config == {"a": 1}
    (path / index).write_text(json.dumps({"weight_map": places | {"head.weight": names[0]}}))
    with pytest.raises(WeightsError, match="head.weight"):
        read(path)
    (path / names[1]).unlink()
    (path / index).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(WeightsError, match=f"{names[1]}: is not there"):
        read(path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "c:x", "a\0b"])
def test_an_index_reads_only_its_own_folder(name, tmp_path):
    save_file(STATE, tmp_path / "x")
    path = folder(tmp_path / "vit", model__safetensors__index__json={"weight_map": dict.fromkeys(STATE, name)})
    with pytest.raises(WeightsError, match="outside its folder") as caught:
        read(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": None}])
def test_an_index_without_places_is_refused(content, tmp_path):
    with pytest.raises(WeightsError, match="index.json: expected 'weight_map'"):
        read(folder(tmp_path / "vit", model__safetensors__index__json=content))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'"x"', b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": 1} x', b"<html>"]
)
def test_a_broken_config_is_refused(name, content, tmp_path):
    path = folder(tmp_path / "vit", model__safetensors=STATE)
    (path / name).write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        read(path)
    assert str(path / name) in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_config_beside_an_npz_is_anothers(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert read(arrays(tmp_path / "vit.npz", a=np.ones(2))).config == {}


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    refused(folder(tmp_path / "vit", {}), "model.safetensors", "pytorch_model.bin", "index.json")


# What is no file of weights


def test_what_is_not_there_is_said(tmp_path):
    refused(tmp_path / "none.pth", "is not there")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is no file")
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop")
    refused(tmp_path / ("x" * 300))
    (tmp_path / "plain").write_text("x")
    refused(tmp_path / "plain" / "below")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 330\n", "git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html>", "web page"),
        (b"<html><body>404", "web page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "web page"),
        (b"\x93NUMPY\x01\x00", "none of these"),
        (b"hello\nworld", "none of these"),
        (b"cos\nsystem\n(S'touch x'\ntR.", "none of these"),
        (b"\0" * 5000, "none of these"),
        (b"\x80", "none of these"),
        (b"PK\5\6" + b"\0" * 18, "none of these"),
        (b"PK\3\4", "not whole"),
        (b"\x80\x02" + b"\xff" * 90, "weights.pth"),
        (b"\x80\x04", "weights.pth"),
        (b"\x05\0\0\0\0\0\0\0{bad}", "not whole"),
        (b"\x02\0\0\0\0\0\0\0{}", "holds no tensors"),
        (b"\x02\0\0\0\0\0\0\x70{}", "none of these"),
    ],
)
def test_other_bytes_are_refused(content, expected, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    assert refused(tmp_path / "weights.pth", expected).isprintable()


def test_random_bytes_behind_every_beginning_are_refused(tmp_path):
    random = np.random.default_rng(0)
    for start in (b"PK\3\4", b"\x80\2", b"\x80\4", b"\x40\0\0\0\0\0\0\0{", b""):
        for size in (1, 20, 300, 5000):
            (tmp_path / "x").write_bytes(start + random.bytes(size))
            refused(tmp_path / "x")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {"a": 1}}, {"model": {}}, {"a": [], "b": {}}])
def test_a_checkpoint_without_tensors_is_refused(content, tmp_path):
    refused(saved(tmp_path / "x", content), "holds no tensors")


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], 3, None, "x", argparse.Namespace(a=torch.ones(2))])
def test_a_checkpoint_that_names_no_tensors_is_refused(content, tmp_path):
    refused(saved(tmp_path / "x", content), "expected tensors by name", type(content).__name__)


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.ones(2, 2).to_sparse(), "sparse"),
        (torch.ones(3, device="meta"), "meta"),
    ],
)
def test_tensors_without_plain_numbers_are_refused(tensor, found, tmp_path):
    refused(saved(tmp_path / "x", {"some.weight": tensor}), "some.weight", found)


def test_a_file_that_claims_much_more_than_it_holds_is_refused(tmp_path):
    refused(saved(tmp_path / "a", {"w": torch.ones(1).expand(1 << 40)}), "claims")
    with zipfile.ZipFile(tmp_path / "b", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("w.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (100 << 20,)})
        for _ in range(400):
            file.write(bytes(1 << 20))
    refused(tmp_path / "b", "claims")
    with zipfile.ZipFile(tmp_path / "c", "w") as archive, archive.open("w.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 50,)})
    refused(tmp_path / "c", "0 bytes for shape")
    save_file({"w": torch.zeros(2)}, tmp_path / "d")
    data = (tmp_path / "d").read_bytes().replace(b"[2]", b"[9]")
    (tmp_path / "d").write_bytes(data)
    refused(tmp_path / "d", "not whole")


def test_endless_and_very_deep_nesting_is_refused(tmp_path):
    endless: dict = {"w": torch.ones(1)}
    endless["below"] = endless
    refused(saved(tmp_path / "a", endless), "without end")
    wrapped: dict = {"w": torch.ones(1)}
    wrapped["model"] = wrapped
    refused(saved(tmp_path / "b", wrapped), "without end")
    doubled: dict = {"w": torch.ones(1)}
    for _ in range(30):
        doubled = {"a": doubled, "b": doubled}
    refused(saved(tmp_path / "c", doubled), "without end")
    refused(saved(tmp_path / "d", {"model": STATE, "args": doubled}), "without end")
    deep = b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 50_000 + b"}" + b"s" * 50_000 + b"."
    refused(rewritten(saved(tmp_path / "e", {}), lambda _: deep), "without end")


# Cut files


def whole(tmp_path) -> dict[str, Path]:
    """A file of each format, of real length; that of the safetensors in several tensors."""
    torch.manual_seed(0)
    state = {f"blocks.{i}.weight": torch.randn(40, 50) for i in range(3)} | {"step": torch.tensor(3)}
    save_file(state, tmp_path / "safetensors")
    arrays(tmp_path / "npz", **{name: value.numpy() for name, value in state.items()})
    np.savez_compressed(tmp_path / "packed.npz", **{name: value.numpy() for name, value in state.items()})
    content = {"model": state, "epoch": 3, "args": argparse.Namespace(model="vit")}
    saved(tmp_path / "zip", content)
    legacy(tmp_path / "legacy", content)
    return {path.name: path for path in tmp_path.iterdir()}


FORMATS = ("safetensors", "npz", "packed.npz", "zip", "legacy")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", [0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.999])
def test_a_file_that_was_cut_is_refused(kind, part, tmp_path):
    path = whole(tmp_path)[kind]
    assert len(read(path).tensors) == 4
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    refused(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_lacks_a_few_bytes_or_has_only_a_few_is_refused(kind, tmp_path):
    path = whole(tmp_path)[kind]
    data = path.read_bytes()
    for length in [
        *range(1, 80, 3),
        *range(80, 1200, 61),
        *(len(data) - n for n in (1, 2, 3, 7, 8, 21, 22, 23, 100, 999)),
    ]:
        path.write_bytes(data[:length])
        refused(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_whose_middle_was_never_written_is_refused_or_read_as_it_stands_without_a_crash(kind, tmp_path):
    path = whole(tmp_path)[kind]
    data = bytearray(path.read_bytes())
    random = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 8):
            damaged[place] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        with suppress(WeightsError):
            read(path)


@pytest.mark.parametrize("kind", ["npz", "packed.npz"])
def test_numbers_that_changed_in_an_npz_are_noticed(kind, tmp_path):
    path = whole(tmp_path)[kind]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(path, "not whole")


# Hostile files


def contents(mark: Path) -> dict[str, object]:
    return {
        "top": Hostile(mark),
        "model": {"model": {**STATE, "x": Hostile(mark)}},
        "args": {"model": STATE, "args": Hostile(mark)},
        "in args": {"model": STATE, "args": argparse.Namespace(a=Hostile(mark))},
        "key": {"model": STATE, "optimizer": {"state": [(Hostile(mark),)]}},
        "last": {**STATE, "z": Hostile(mark)},
        "in an OrderedDict": OrderedDict(a=Hostile(mark)),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("write", [saved, legacy])
@pytest.mark.parametrize("place", list(contents(Path())))
def test_code_in_a_pickle_is_refused_by_its_name_and_not_run(place, write, protocol, tmp_path):
    mark = tmp_path / "mark"
    path = write(tmp_path / "x.pth", contents(mark)[place], pickle_protocol=protocol)
    refused(path, "mkdir", "nothing in it was run")
    assert not mark.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", list(contents(Path())))
def test_a_plain_pickle_is_refused_and_not_run(place, protocol, tmp_path):
    mark = tmp_path / "mark"
    content = contents(mark)[place]
    (tmp_path / "x").write_bytes(pickle.dumps(content, protocol))
    text = refused(tmp_path / "x")
    assert not mark.exists()
    assert protocol < 2 or "pickle" in text


def test_the_hostile_pickles_of_these_tests_would_run_elsewhere(tmp_path):
    pickle.loads(pickle.dumps(Hostile(tmp_path / "mark")))
    assert (tmp_path / "mark").is_dir()


@pytest.mark.parametrize(
    ("code", "named"),
    [
        (b"cposix\nsystem\nX\x06\x00\x00\x00touch m\x85R.", "posix.system"),
        (b"c__builtin__\neval\nX\x01\x00\x00\x001\x85R.", "eval"),
        (b"cbuiltins\nexec\nX\x01\x00\x00\x001\x85R.", "exec"),
        (b"cbuiltins\ngetattr\n)R.", "getattr"),
        (b"ctorch.hub\nload\n)R.", "torch.hub.load"),
        (b"ctorch\nload\n)R.", "torch.load"),
        (b"cnumpy\nload\n)R.", "numpy.load"),
        (b"cnumpy\nndarray\n)R.", "numpy.ndarray"),
        (b"cargparse\nFileType\n)R.", "argparse.FileType"),
        (b"cpathlib\nPosixPath.unlink\n)R.", "pathlib.PosixPath.unlink"),
        (b"cmpp.weights.files\nread\n)R.", "mpp.weights.files.read"),
    ],
)
def test_functions_are_refused_by_name(code, named, tmp_path):
    refused(rewritten(saved(tmp_path / "x", {}), lambda _: b"\x80\x02" + code), named, "nothing in it was run")


def test_a_numpy_type_cannot_carry_a_hostile_state(tmp_path):
    """The state of a real numpy.dtype says which bytes are pointers: here it would free address 0x4141..."""
    real = np.dtype([("a", "O")])
    dtype = pickle.dumps(real, 2)[2:-1]
    number = (
        b"cnumpy._core.multiarray\nscalar\n"
        + dtype
        + b"c_codecs\nencode\nX\x08\x00\x00\x00AAAAAAAAX\x06\x00\x00\x00latin1\x86R\x86R."
    )
    refused(rewritten(saved(tmp_path / "x", {}), lambda _: b"\x80\x02" + number), "numpy")


@pytest.mark.parametrize("write", [saved, legacy])
def test_a_type_of_anothers_library_is_named(write, tmp_path):
    refused(write(tmp_path / "x", {"model": STATE, "config": Custom()}), f"{__name__}.Custom")
    refused(write(tmp_path / "y", nn.Linear(2, 2)), "torch.nn.modules.linear.Linear")
    refused(write(tmp_path / "z", {"a": np.ones(3)}), "numpy._core.multiarray._reconstruct")


def test_a_name_with_line_breaks_and_colours_stays_on_one_line(tmp_path):
    path = rewritten(saved(tmp_path / "x", {}), lambda _: b"\x80\x02ca\x1b[31m\nb\r\x0bc\n)R.")
    assert refused(path).isprintable()
    assert refused(arrays(tmp_path / "y", **{"a\nb": np.array([Custom()], dtype=object)})).isprintable()


def test_torchscript_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:  # as torch.jit.save lays it out
        for name in ("x/data.pkl", "x/constants.pkl", "x/code/__torch__.py"):
            archive.writestr(name, b"")
    refused(tmp_path / "x.pt", "TorchScript")


def test_a_tar_of_torch_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.pth", "w:") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(Hostile(tmp_path / "mark"))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    refused(tmp_path / "x.pth", "tar archive")
    assert not (tmp_path / "mark").exists()


def test_arrays_of_objects_are_refused_and_not_unpickled(tmp_path):
    mark = tmp_path / "mark"
    objects = np.array([Hostile(mark), 1], dtype=object)
    refused(arrays(tmp_path / "x.npz", a=np.ones(2), b=objects), "b.npy", "nothing in it was run")
    assert not mark.exists()
    refused(arrays(tmp_path / "y.npz", a=np.zeros(2, [("x", "f4"), ("y", "O")])), "a.npy")


@pytest.mark.parametrize(
    "array",
    [np.array(["text"]), np.array([b"x"]), np.array(["2020-01-01"], "M8[D]"), np.ones(2, "c8"), np.zeros(2, "V3")],
)
def test_arrays_that_are_no_numbers_are_refused(array, tmp_path):
    refused(arrays(tmp_path / "x.npz", a=np.ones(2), b=array), "b.npy", "expected numbers")


def test_an_archive_of_other_things_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "x")
    refused(tmp_path / "a.zip", "without arrays")
    path = arrays(tmp_path / "b.npz", a=np.ones(2))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("readme.txt", "x")
    refused(path, "readme.txt")
    path = arrays(tmp_path / "c.npz", a=np.ones(2))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.npy", b"x")
    refused(path, "each once")


def test_a_packed_checkpoint_is_not_read_as_it_lies(tmp_path):
    """Someone zipped a checkpoint anew: what is mapped would be packed bytes in place of numbers."""
    path = saved(tmp_path / "x", {"w": torch.arange(1000.0)})
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert torch.equal(read(path).tensors["w"], torch.arange(1000.0))


def test_nothing_is_written_and_no_type_stays_allowed(tmp_path, monkeypatch):
    class Mine:
        pass

    def digest() -> dict:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}

    content = {"model": STATE, "args": argparse.Namespace(x=np.float64(1))}
    good, bad = saved(tmp_path / "good", content), saved(tmp_path / "bad", {"x": Custom()})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    files = digest()
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([Mine, np.dtype, argparse.Namespace, Custom]):
        allowed = set(torch.serialization.get_safe_globals())
        assert read(good).args == {"x": 1.0}
        refused(bad, "Custom")  # allowed by the program for its own files, not for these
        assert set(torch.serialization.get_safe_globals()) == allowed
    assert read(good).args == {"x": 1.0}
    assert set(torch.serialization.get_safe_globals()) == before
    assert digest() == files
