"""ONNX files by `mpp convert`, run by onnxruntime and compared with torch."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from test_export_convert import EXPORTED, classifier, pictures, resnet, saved, tiny
from tiny_runs import run
from torch import nn

from mpp.errors import UserError
from mpp.export import convert as module
from mpp.export import onnx as format
from mpp.export.convert import convert
from mpp.export.origin import Given
from mpp.models.classifier import Classifier, Head
from mpp.models.vit import ViT

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CLOSE = 2e-5  # of the largest magnitude
CASES = EXPORTED | {"clip": {"pre_norm": True, "stem_bias": False, "gelu": "quick", "norm_eps": 1e-5}}
SOME = [pytest.param(name, marks=() if name == "everything else" else pytest.mark.slow) for name in CASES]


def ran(folder: Path, images: torch.Tensor) -> tuple[str, np.ndarray]:
    """The name and the numbers of what onnxruntime gives."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (only,) = session.get_inputs()
    assert (only.name, only.type) == ("images", "tensor(uint8)")
    (output,) = session.get_outputs()
    return output.name, session.run([output.name], {"images": images.numpy()})[0]


def assert_exported_close(given: nn.Module, folder: Path, output: str) -> None:
    done = convert(saved(given, folder), folder / "out", "onnx")
    assert done.difference <= CLOSE
    assert done.files == ("README.md", "model.onnx")
    onnx.checker.check_model(folder / "out/model.onnx", full_check=True)
    for count in (1, 2, 7):
        images = pictures(count)
        with torch.no_grad():
            expected = given(images).numpy()
        name, found = ran(folder / "out", images)
        assert name == output
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max(), count
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        ran(folder / "out", pictures(1, 40, 48))


@pytest.mark.parametrize("name", SOME)
def test_an_encoder_gives_the_same_numbers_in_onnxruntime_for_any_batch(name, tmp_path):
    assert_exported_close(tiny(**CASES[name]), tmp_path, "vectors")


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_resnets_classifier_gives_the_same_logits(norm, tmp_path):
    assert_exported_close(classifier(resnet(norm)), tmp_path, "logits")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A classifier with a hidden layer, and the folder that was written of it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("written")
    given = classifier(tiny(), hidden=6)
    return given, convert(saved(given, folder), folder / "out", "onnx")


def test_the_file_says_what_goes_in_and_which_classes_come_out(written):
    given, done = written
    session = onnxruntime.InferenceSession(done.folder / "model.onnx")
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["mpp.classes"]) == list(given.classes)
    assert json.loads(about["mpp.image"]) == [32, 48]
    assert json.loads(about["mpp.mean"]) == [0.1, 0.2, 0.3]
    assert session.get_inputs()[0].shape[1:] == [3, 32, 48]
    assert isinstance(session.get_inputs()[0].shape[0], str)  # a name: any number


def test_each_tensor_is_in_the_file_by_its_name(written):
    given, done = written
    state = given.state_dict()
    assert done.tensors == len(state)
    initializers = onnx.load(done.folder / "model.onnx").graph.initializer
    stored = {one.name: onnx.numpy_helper.to_array(one) for one in initializers}
    for name, value in state.items():
        assert np.array_equal(stored[name], value.numpy()), name


def test_the_card_runs_as_it_stands(written, monkeypatch):
    given, done = written
    text = (done.folder / "README.md").read_text()
    code = text.split("### onnxruntime")[1].split("```python")[1].split("```")[0]
    monkeypatch.chdir(done.folder)
    names: dict = {}
    exec(code, names)
    with torch.no_grad():
        expected = given(torch.from_numpy(names["images"])).numpy()
    assert np.abs(names["logits"] - expected).max() <= CLOSE * np.abs(expected).max()
    assert json.loads(names["about"]["mpp.classes"]) == list(given.classes)
    assert "library_name: onnx" in text


@pytest.mark.slow
def test_weights_too_large_for_one_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(format, "ONE_FILE", 1)
    given = Classifier(ViT(tiny_config(depth=1)), Head(64, 2), "ab").eval()
    nn.init.normal_(given.head.linear.weight)
    done = convert(saved(given, tmp_path), tmp_path / "out", "onnx")
    assert done.files == ("README.md", "model.onnx", "model.onnx.data")
    assert (done.folder / "model.onnx.data").stat().st_size > 4 * sum(p.numel() for p in given.encoder.parameters()) / 2
    images = pictures(2)
    with torch.no_grad():
        expected = given(images).numpy()
    assert np.abs(ran(done.folder, images)[1] - expected).max() <= CLOSE * np.abs(expected).max()


@pytest.mark.parametrize("missing", format.PACKAGES)
def test_without_the_extra_one_line_says_what_to_install(missing, tmp_path, monkeypatch):
    path = saved(tiny(), tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    found = run("convert", path, tmp_path / "out", "--to", "onnx")
    assert found.code == 2
    assert f"--to onnx needs the package {missing}" in found.line
    assert "pip install onnx onnxscript onnxruntime" in found.line
    assert not (tmp_path / "out").exists()


def test_numbers_that_differ_are_an_error(written, monkeypatch):
    class Wrong(format.Session):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) * (1 + 1e-4 * (len(images) == 7))

    given, done = written
    again = Given(done.folder, done.folder, "mpp", given.encoder, given.head, given.classes)
    assert module.check(again, done.folder, "onnx") == (done.tensors, done.difference)
    monkeypatch.setattr(module.onnx, "Session", Wrong)
    with pytest.raises(UserError, match=r"onnx: outputs differ by 1e-04 from the model's"):
        module.check(again, done.folder, "onnx")
    with torch.no_grad():
        given.head.linear.bias[0] += 1e-6
    with pytest.raises(UserError, match=r"onnx: head.linear.bias did not come back as written"):
        module.check(again, done.folder, "onnx")
