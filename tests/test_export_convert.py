"""`mpp convert`, against the libraries that it writes for."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import numpy_vit
import pytest
import torch
from conftest import shaken, tiny_config
from safetensors.torch import load_file, save_file
from tiny_runs import LABELS, RECIPE, run, small_disk, small_splits, write_recipe
from torch import Tensor, nn

import mpp
from mpp.errors import UserError
from mpp.export import convert as module
from mpp.export.convert import CHOICES, ConvertError, convert, facts_of
from mpp.models import encoders
from mpp.models.classifier import Classifier, Head
from mpp.models.cnn import ResNet
from mpp.models.resnet_config import ResNetConfig
from mpp.models.vit import ViT
from mpp.weights import load_classifier, load_encoder, save_classifier, save_encoder

NAMES = ("cat", "dög", '"')
# What the three formats can hold, each in its own way.
HELD = {"timm": {"registers": 2, "pool": "avg_norm", "layer_scale": 0.1}, "huggingface": {}, "google": {"gelu": "tanh"}}


def tiny(**changes) -> ViT:
    return shaken(ViT(tiny_config(**{"width": 32, "depth": 1, "mean": (0.1, 0.2, 0.3)} | changes))).eval()


def classifier(encoder: nn.Module, hidden: int = 0) -> Classifier:
    return Classifier(encoder, shaken(Head(encoder.width, len(NAMES), hidden)), NAMES).eval()


def holding(to: str, **changes) -> ViT:
    """An encoder that a format can hold."""
    return tiny(**HELD.get(to, {}), **({"mean": (0.5,)} if to == "google" else {}), **changes)


def saved(model: nn.Module, folder: Path) -> Path:
    path = folder / "given.safetensors"
    save_classifier(model, path) if isinstance(model, Classifier) else save_encoder(model, path)
    return path


def pictures(count: int, height: int = 32, width: int = 48) -> Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


def equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 2e-5 * expected.abs().max())


def refused(folder: Path, *arguments: object, **options) -> str:
    """The one line with which a conversion is refused; it leaves nothing in the folder."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as caught:
        convert(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before
    return str(caught.value)


# Round trips


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("to", ["timm", "huggingface", "google", "safetensors"])
def test_what_is_written_loads_here_with_each_bit_as_it_was(to, with_head, tmp_path):
    encoder = holding(to)
    given = classifier(encoder) if with_head else encoder
    done = convert(saved(given, tmp_path), tmp_path / "out", to)
    facts = {"heads": 2, "image": (32, 48)} if to == "google" else {}
    place = tmp_path / "out" / ("model.npz" if to == "google" else "")
    again = load_classifier(place, **facts) if with_head else load_encoder(place, **facts)
    assert equal(again, given)
    assert done.difference == 0
    if with_head and to != "google":  # which has no names
        assert again.classes == NAMES
    images = pictures(2)
    assert torch.equal(again(images), given(images))


@pytest.mark.parametrize("to", ["timm", "huggingface", "google", "safetensors", "export"])
def test_a_head_can_be_left_away(to, tmp_path):
    given = classifier(holding(to))
    convert(saved(given, tmp_path), tmp_path / "out", to, head=False)
    if to == "export":
        assert torch.export.load(tmp_path / "out/model.pt2").module()(pictures(2)).shape == (2, 32)
    else:
        place = tmp_path / "out" / ("model.npz" if to == "google" else "")
        with pytest.raises(UserError, match=r"classifier.safetensors|without a head"):
            load_classifier(place, **({"heads": 2, "image": (32, 48)} if to == "google" else {}))


@pytest.mark.parametrize("positions", ["sincos2d", "learned2d", "none"])
def test_positions_that_become_a_table_add_the_same(positions, tmp_path):
    given = tiny(positions=positions)
    for to in ("timm", "huggingface"):
        convert(saved(given, tmp_path), tmp_path / to, to)
        images = pictures(2)
        assert torch.equal(load_encoder(tmp_path / to).eval()(images), given(images)), to


def test_others_weights_become_ours_and_what_is_no_part_of_them_is_named(tmp_path):
    given = tiny()
    convert(saved(given, tmp_path), tmp_path / "hf", "huggingface")
    file = tmp_path / "hf/model.safetensors"
    save_file(load_file(file) | {"pooler.dense.weight": torch.ones(32, 32), "pooler.dense.bias": torch.ones(32)}, file)
    done = convert(tmp_path / "hf", tmp_path / "out", "safetensors")
    assert set(done.aside) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert "left aside, as no part of it: 2 of the file's parts (pooler.dense." in str(done)
    again = load_encoder(tmp_path / "out")
    assert equal(again, given)


# In the other libraries


@torch.no_grad()
@pytest.mark.parametrize("with_head", [True, False])
def test_timm_gives_the_same_numbers(with_head, tmp_path):
    timm = pytest.importorskip("timm")
    encoder = holding("timm")
    given = classifier(encoder) if with_head else encoder
    convert(saved(given, tmp_path), tmp_path / "out", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = pictures(2)
    assert near(model(encoder.normalise(images)), given(images))


@torch.no_grad()
@pytest.mark.parametrize("with_head", [True, False])
def test_transformers_gives_the_same_numbers(with_head, tmp_path):
    transformers = pytest.importorskip("transformers")
    encoder = holding("huggingface")
    given = classifier(encoder) if with_head else encoder
    convert(saved(given, tmp_path), tmp_path / "out", "huggingface")
    images = pictures(2)
    pixels = encoder.normalise(images)
    if with_head:
        model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
        assert near(model(pixels).logits, given(images))
        assert tuple(model.config.id2label.values()) == NAMES
    else:
        model = transformers.ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
        assert near(model(pixels).last_hidden_state[:, 0], given(images))


@torch.no_grad()
@pytest.mark.parametrize("with_head", [True, False])
def test_transformers_dinov2_gives_the_same_numbers(with_head, tmp_path):
    """From an encoder trained here with LayerScale and registers: written, read back, its card followed."""
    transformers = pytest.importorskip("transformers")
    pool = "cls_avg" if with_head else "cls"
    encoder = tiny(image=(32, 32), layer_scale=0.1, registers=2, swiglu=True, pool=pool)
    given = classifier(encoder) if with_head else encoder
    written = convert(saved(given, tmp_path), tmp_path / "out", "huggingface")
    assert written.difference < 1e-6
    images = pictures(2, 32, 32)
    kind = "Dinov2WithRegistersForImageClassification" if with_head else "Dinov2WithRegistersModel"
    model = getattr(transformers, kind).from_pretrained(tmp_path / "out").eval()
    outputs = model(encoder.normalise(images))
    assert near(outputs.logits if with_head else outputs.last_hidden_state[:, 0], given(images))
    assert f"import AutoImageProcessor, {kind}" in (tmp_path / "out/README.md").read_text()
    back = load_classifier(tmp_path / "out") if with_head else load_encoder(tmp_path / "out")
    assert equal(back, given)


@torch.no_grad()
def test_a_plain_numpy_forward_of_googles_file_gives_the_same_numbers(tmp_path):
    given = classifier(holding("google"), hidden=6)
    convert(saved(given, tmp_path), tmp_path / "out", "google")
    images = pictures(2)
    pixels = given.encoder.normalise(images).permute(0, 2, 3, 1).numpy()
    with np.load(tmp_path / "out/model.npz") as arrays:
        outputs = numpy_vit.google(dict(arrays), pixels, (4, 6))
    assert near(torch.from_numpy(np.asarray(outputs[-1])).float(), given(images))


EXPORTED = {
    **{f"stem {name}": {"stem": name} for name in ("linear", "overlap", "conv")},
    "stem hybrid": {"stem": "hybrid", "stages": (1, 1)},
    **{f"mixer {name}": {"mixer": (name,), "pool": "avg"} for name in ("mlp", "pool", "conv", "identity")},
    **{
        f"positions {name}": {"positions": name}
        for name in ("learned2d", "sincos2d", "sincos2d_mae", "sincos2d_timm", "relative", "rope", "rope_capi", "none")
    },
    **{f"pool {name}": {"pool": name} for name in ("avg", "avg_norm", "map")},
    "causal": {"causal": True, "pool": "avg"},
    "mixers by layer": {"mixer": ("pool", "attention"), "depth": 2, "pool": "avg"},
    "everything else": {
        **{"norm": "rms", "swiglu": True, "qk_norm": True, "qkv_bias": False, "bias": False},
        **{"layer_scale": 0.1, "registers": 4, "class_token": True, "pool": "avg", "gelu": "tanh"},
        **{"dropout": 0.1, "drop_path": 0.1},
    },
}
QUICK = ("stem linear", "positions rope", "pool map")
SOME = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in EXPORTED]


def assert_exported_equal(given: nn.Module, folder: Path) -> None:
    done = convert(saved(given, folder), folder / "out", "export")
    assert done.difference == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch 2.11's about its own buffers
        model = torch.export.load(folder / "out/model.pt2").module()
    for count in (1, 2, 5):
        images = pictures(count)
        with torch.no_grad():
            assert torch.equal(model(images), given(images)), count
    with pytest.raises((AssertionError, RuntimeError)):
        model(pictures(1, 40, 48))


@pytest.mark.parametrize("name", SOME)
def test_an_exported_encoder_gives_equal_numbers_for_any_batch(name, tmp_path):
    assert_exported_equal(tiny(**EXPORTED[name]), tmp_path)


def test_an_exported_classifier_gives_equal_logits(tmp_path):
    assert_exported_equal(classifier(tiny(), hidden=6), tmp_path)


@pytest.mark.slow
def test_an_exported_model_needs_no_mpp(tmp_path):
    given = tiny(positions="sincos2d")
    convert(saved(given, tmp_path), tmp_path / "out", "export")
    images = pictures(3)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch; model = torch.export.load('out/model.pt2').module();"
        "torch.save(model(torch.load('images.pt')).detach(), 'vectors.pt');"
        "assert not any(name.split('.')[0] == 'mpp' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True, capture_output=True)
    with torch.no_grad():
        assert near(torch.load(tmp_path / "vectors.pt"), given(images))  # threads may differ there


# ResNets


def resnet(norm: str) -> ResNet:
    encoder = shaken(ResNet(ResNetConfig(image=(32, 48), depth=18, width=4, stem="small", norm=norm)))
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.2, 0.2)
            part.running_var.uniform_(0.5, 1.5)
            part.num_batches_tracked.fill_(17)
    return encoder.eval()


@pytest.mark.parametrize("norm", ["batch", pytest.param("group", marks=pytest.mark.slow)])
def test_a_resnet_is_exported(norm, tmp_path):
    assert_exported_equal(classifier(resnet(norm)), tmp_path)


def test_a_causal_encoder_is_refused_by_formats_of_others(tmp_path):
    path = saved(tiny(causal=True, pool="avg"), tmp_path)
    for to in ("timm", "huggingface", "google"):
        line = refused(tmp_path, path, tmp_path / "out", to)
        assert line == f"{path}: {to}: model.causal has no place there; export and onnx keep it"


def test_a_resnet_is_written_for_mpp_and_refused_by_the_others(tmp_path):
    given = classifier(resnet("batch"))
    path = saved(given, tmp_path)
    for to in ("timm", "huggingface", "google"):
        line = refused(tmp_path, path, tmp_path / "out", to)
        assert line == f"{path}: {to}: model.name resnet has no place there, expected vit"
    convert(path, tmp_path / "out", "safetensors")
    assert equal(load_classifier(tmp_path / "out"), given)


# Errors


def test_an_unknown_format_is_named_with_the_nearest(tmp_path):
    path = saved(tiny(), tmp_path)
    assert refused(tmp_path, path, tmp_path / "out", "tim") == "--to tim: no format; did you mean timm?"
    line = refused(tmp_path, path, tmp_path / "out", "x\n")
    assert line == f"--to 'x\\n': no format; expected one of {', '.join(CHOICES)}"


def test_a_folder_that_is_not_empty_stays_as_it_is(tmp_path):
    path, out = saved(tiny(), tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert refused(tmp_path, path, out, "timm") == f"{out}: not empty; choose a new folder"
    (out / "mine.txt").unlink()
    convert(path, out, "timm")
    assert "not empty" in refused(tmp_path, path, out, "timm")
    assert "cannot be written to" in refused(tmp_path, path, path, "timm")


def test_the_working_directory_is_not_replaced(inside_tmp, tmp_path):
    path = saved(tiny(), tmp_path)
    (tmp_path / "here").mkdir()
    os.chdir(tmp_path / "here")
    assert refused(tmp_path, path, ".", "timm") == ".: is the working directory; choose a new folder"


def test_what_a_format_cannot_hold_is_named_by_field(tmp_path):
    path = saved(tiny(registers=4), tmp_path)
    assert "registers 4" in refused(tmp_path, path, tmp_path / "out", "huggingface")
    assert "positions rope" in refused(tmp_path, saved(tiny(positions="rope"), tmp_path), tmp_path / "out", "timm")
    assert "model.gelu erf" in refused(tmp_path, saved(tiny(), tmp_path), tmp_path / "out", "google")


def test_weights_that_cannot_be_read_are_refused(tmp_path):
    assert "none.npz" in refused(tmp_path, tmp_path / "none.npz", tmp_path / "out", "timm")
    (tmp_path / "cut.safetensors").write_bytes(saved(tiny(), tmp_path).read_bytes()[:-9])
    step = tmp_path / "run/checkpoints/step-00000004"
    step.mkdir(parents=True)
    (step / "model.safetensors").write_bytes(b"x" * 100)
    (step / "state.json").write_text("{}")
    assert "step-00000004" in refused(tmp_path, tmp_path / "run", tmp_path / "out", "timm")
    assert "cut.safetensors" in refused(tmp_path, tmp_path / "cut.safetensors", tmp_path / "out", "timm")


def test_a_damaged_classifier_does_not_pass_for_an_encoder(tmp_path):
    path = saved(classifier(tiny()), tmp_path)
    about = {"encoder": json.dumps(encoders.facts_of(tiny()) | {"classes": []})}
    save_file(load_file(path), path, about)
    assert "names no classes" in refused(tmp_path, path, tmp_path / "out", "timm")


def test_facts_are_for_files_that_do_not_tell(tmp_path):
    path = saved(tiny(), tmp_path)
    assert "heads can't be given" in refused(tmp_path, path, tmp_path / "out", "timm", heads=2)


def test_facts_on_the_command_line_are_yaml(tmp_path):
    found = facts_of(["heads=2", "image=[96,128]", "norm_eps=1e-5", "gelu=tanh", "mean=[0.1, 0.2, 0.3]"])
    assert found == {"heads": 2, "image": (96, 128), "norm_eps": 1e-5, "gelu": "tanh", "mean": (0.1, 0.2, 0.3)}
    assert facts_of(["image=96"]) == {"image": (96, 96)}
    assert facts_of([]) == {}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("heads", "expected KEY=VALUE, found heads"),
        ("=2", "expected KEY=VALUE"),
        ("haeds=2", r"haeds: unknown key\. Did you mean: heads"),
        ("heads=two", "two"),
        ("gelu=tan", 'gelu: expected one of erf, tanh, quick, found "tan"'),
        ("heads=${oc.env:HOME}", "heads: expected a plain value"),
        ("heads=[", "command line: "),
        ("image=[1,2,3]", "command line: "),
    ],
)
def test_odd_facts_are_refused_in_one_line(setting, expected, tmp_path):
    found = run("convert", tmp_path, tmp_path / "out", "--to", "timm", setting)
    assert found.code == 2
    assert found.line.startswith("mpp: command line: ")
    with pytest.raises(UserError, match=expected):
        facts_of([setting])


# Whole or not at all


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError("No space left on device")])
@pytest.mark.parametrize("at", ["write", "check", "card"])
def test_a_conversion_that_fails_leaves_nothing(error, at, tmp_path, monkeypatch):
    def fail(*arguments):
        raise error

    path = saved(tiny(), tmp_path)
    monkeypatch.setattr(module, at, fail)
    with pytest.raises(UserError if isinstance(error, OSError) else error):
        convert(path, tmp_path / "out", "timm")
    assert list(tmp_path.iterdir()) == [path]


def test_a_conversion_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path):
    path = saved(tiny(width=64, depth=2), tmp_path)
    with small_disk(tmp_path / "disk", kib=200) as disk:
        for to in ("timm", "safetensors", "export"):
            with pytest.raises(UserError, match="No space left on device"):
                convert(path, disk / "out", to)
            assert list(disk.iterdir()) == []


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_folder_that_looks_whole(tmp_path):
    path, out = saved(tiny(), tmp_path), tmp_path / "out"
    code = (
        "import mpp, time; from mpp.export import convert as module;"
        "module.check = lambda *_: time.sleep(60);"
        f"mpp.convert({str(path)!r}, {str(out)!r}, 'timm')"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 60
    while not (tmp_path / ".out.partial/model.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.05)
    with pytest.raises(UserError, match="another `mpp convert` is writing there"):
        convert(path, out, "timm")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not any(file.name != ".lock" for file in out.iterdir())
    convert(path, out, "timm")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["given.safetensors", "out"]
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("to", ["timm", "huggingface"])
def test_a_tensor_that_comes_back_otherwise_is_an_error(to, tmp_path, monkeypatch):
    from safetensors.torch import load, save

    path, writer = saved(tiny(), tmp_path), module.WRITERS[to]
    right = writer.write

    def wrong(*arguments):
        contents = right(*arguments)
        tensors = load(contents["model.safetensors"])
        name = next(name for name in tensors if name.endswith("bias"))
        tensors[name][0] += 1e-6
        return contents | {"model.safetensors": save(tensors, {"format": "pt"})}

    monkeypatch.setattr(writer, "write", wrong)
    assert "did not come back as written" in refused(tmp_path, path, tmp_path / "out", to)


def test_a_setting_that_comes_back_otherwise_is_an_error(tmp_path, monkeypatch):
    path, writer = saved(tiny(), tmp_path), module.WRITERS["timm"]
    right = writer.write

    def wrong(*arguments):
        contents = right(*arguments)
        about = json.loads(contents["config.json"])
        about["model_args"]["num_heads"] = 4  # no tensor shows it
        return contents | {"config.json": json.dumps(about).encode()}

    monkeypatch.setattr(writer, "write", wrong)
    with pytest.raises(ConvertError, match=r"timm: outputs differ by .* from the model's"):
        convert(path, tmp_path / "out", "timm")


# The command


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders, one with labels and one without."""
    folder = tmp_path_factory.mktemp("runs")
    shards = small_splits(folder)
    assert run("finetune", write_recipe(folder, shards, LABELS), f"out={folder / 'labels'}").code == 0
    assert run("pretrain", write_recipe(folder, shards, RECIPE), f"out={folder / 'pretrained'}").code == 0
    return folder


def test_the_command_says_what_it_wrote(runs, tmp_path):
    out = tmp_path / "out"
    found = run("convert", runs / "labels", out, "--to", "timm")
    assert (found.code, found.err) == (0, "")
    assert found.out == (
        f"{out}: README.md, config.json, model.safetensors\n"
        "timm: ViT, patch 4, width 32, depth 2, 2 heads, 27,552 parameters, and a head for 2 classes; "
        "31 tensors, read back: each bit equal, numbers equal\n"
    )
    assert equal(load_classifier(out), load_classifier(runs / "labels"))
    found = run("convert", runs / "labels", tmp_path / "encoder", "--to", "timm", "--encoder")
    assert found.code == 0
    assert equal(load_encoder(tmp_path / "encoder"), load_encoder(runs / "labels"))


def test_a_checkpoint_and_a_run_without_labels_give_their_encoder(runs, tmp_path):
    for place in ("pretrained", "pretrained/checkpoints/step-00000004"):
        out = tmp_path / Path(place).name
        assert run("convert", runs / place, out, "--to", "safetensors").code == 0
        assert equal(load_encoder(out), load_encoder(runs / place))


def test_the_command_takes_facts_behind_options(tmp_path):
    given = holding("google")
    convert(saved(given, tmp_path), tmp_path / "google", "google")
    file, facts = tmp_path / "google/model.npz", ("heads=2", "image=[32,48]")
    found = run("convert", file, tmp_path / "out", "--to", "safetensors", *facts)
    assert found.code == 0, found.err
    assert equal(load_encoder(tmp_path / "out"), given)
    missing = run("convert", file, tmp_path / "again", "--to", "safetensors")
    assert missing.code == 2
    assert "heads" in missing.line or "image" in missing.line


def test_the_command_refuses_in_one_line(runs, tmp_path):
    for arguments in (["--to", "onxn"], ["--to", "google"]):
        found = run("convert", runs / "labels", tmp_path / "out", *arguments)
        assert found.code == 2
        assert found.line
        assert list(tmp_path.iterdir()) == []


def test_the_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        mpp_help()
    assert "example: mpp convert " in capsys.readouterr().out


def mpp_help() -> None:
    from mpp.cli import main

    main(["convert", "--help"])


def test_verbs_that_load_others_weights_say_what_they_leave_aside(runs, tmp_path):
    convert(runs / "pretrained", tmp_path / "hf", "huggingface")
    file = tmp_path / "hf/model.safetensors"
    save_file(load_file(file) | {"pooler.dense.weight": torch.ones(32, 32), "pooler.dense.bias": torch.ones(32)}, file)
    command = [sys.executable, "-m", "mpp", "embed", tmp_path / "hf", runs / "shards", tmp_path / "v.npz"]
    done = subprocess.run([*command, "--split", "test"], capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("mpp: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"mpp: {tmp_path / 'hf'}: huggingface: left aside 2 of its parts: pooler.dense.")


def test_it_is_one_of_the_names_of_mpp(tmp_path):
    assert mpp.convert is convert
    assert "convert" in dir(mpp)
