"""What neither file nor user tells is guessed aloud: each guess by its name and value, and giving it silences it."""

import ast
import json
import logging
import re

import pytest
import torch
from conftest import shaken
from safetensors.torch import save_file

import mpp
from mpp.export.convert import convert, facts_of
from mpp.models.vit_config import ViTConfig
from mpp.weights import huggingface
from mpp.weights import timm as format

timm = pytest.importorskip("timm")
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 12, "num_heads": 6, "num_classes": 0}
BARE = {"mean", "std", "image", "heads", "norm_eps", "resize", "gelu", "pool"}


def told(caplog) -> dict:
    """The guesses of the one warning there is, by name; {} without a warning."""
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    if not lines:
        return {}
    assert len(lines) == 1, lines
    assert "\n" not in lines[0]
    assert "NAME=VALUE" in lines[0]
    text = lines[0].partition("guessed: ")[2].partition(";")[0]
    found = dict(re.findall(r"(\w+)=(\([^)]*\)|[^ ]+) \(", text))
    named = lines[0].partition("does not tell ")[2].partition(";")[0].split(", ")
    assert list(found) == named
    return {name: ast.literal_eval(value) if value[0] in "(0123456789" else value for name, value in found.items()}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A timm ViT of width 192 with 6 heads: published is one with 3."""
    path = tmp_path_factory.mktemp("bare") / "x.safetensors"
    save_file(timm.models.VisionTransformer(**SIZES).state_dict(), path)
    return path


def test_every_guess_of_a_bare_timm_file_is_said_with_its_value(bare, caplog):
    encoder = mpp.load_encoder(bare)
    guesses = told(caplog)
    assert guesses.keys() == BARE
    assert guesses["heads"] == 3
    for name, value in guesses.items():
        assert getattr(encoder.config, name) == value, name


def test_what_is_given_is_no_guess_and_the_advice_works(bare, caplog, tmp_path):
    mpp.load_encoder(bare)
    guesses = told(caplog)
    assert mpp.load_encoder(bare, heads=6).config.heads == 6
    assert told(caplog).keys() == BARE - {"heads"}
    facts = {
        name: list(value) if isinstance(value, tuple) else value for name, value in (guesses | {"heads": 6}).items()
    }
    mpp.load_encoder(bare, **facts)
    assert told(caplog) == {}
    # as the message says for the command line
    settings = [f"{name}={json.dumps(value)}" for name, value in facts.items()]
    convert(bare, tmp_path / "out", "safetensors", **facts_of(settings))
    assert told(caplog) == {}
    assert mpp.load_encoder(tmp_path / "out").config.heads == 6
    assert told(caplog) == {}  # the new file tells everything


def tiny(**changes) -> mpp.ViT:
    sizes = {"image": (32, 32), "patch": 8, "width": 32, "depth": 1, "heads": 2}
    return shaken(mpp.ViT(ViTConfig(**(sizes | changes)))).eval()


def folder(path, module, encoder):
    path.mkdir()
    for name, content in module.write(encoder, None, ()).items():
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("module", [format, huggingface])
@pytest.mark.parametrize("changes", [{}, {"layer_scale": 0.1, "registers": 2, "swiglu": True}])
def test_where_the_files_tell_nothing_is_said(module, changes, tmp_path, caplog):
    mpp.load_encoder(folder(tmp_path / "x", module, tiny(**changes)))
    assert told(caplog) == {}


@pytest.mark.parametrize(
    ("missing", "changes", "expected"),
    [
        (["preprocessor_config.json"], {}, {"mean", "std"}),
        (["config.json"], {}, {"heads", "norm_eps", "gelu", "image"}),
        (["config.json"], {"layer_scale": 0.1}, {"heads", "norm_eps", "gelu"}),
        (["config.json"], {"layer_scale": 0.1, "swiglu": True}, {"heads", "norm_eps"}),
        (["config.json", "preprocessor_config.json"], {}, {"heads", "norm_eps", "gelu", "image", "mean", "std"}),
    ],
)
def test_a_folder_of_transformers_says_what_its_files_would(missing, changes, expected, tmp_path, caplog):
    path = folder(tmp_path / "x", huggingface, tiny(**changes))
    for name in missing:
        (path / name).unlink()
    mpp.load_encoder(path)
    assert told(caplog).keys() == expected


def test_a_dino_checkpoint_guesses_only_its_heads(tmp_path, caplog):
    tensors = {f"backbone.{name}": value for name, value in small_timm().items()}
    content = {"teacher": tensors | {"backbone.mask_token": torch.zeros(1, 32)}, "dino_loss": {"center": torch.ones(1)}}
    torch.save(content, tmp_path / "x.pth")
    mpp.load_encoder(tmp_path / "x.pth")
    assert told(caplog) == {"heads": 2}


def test_an_mae_checkpoint_guesses_only_its_heads(tmp_path, caplog):
    decoder = {"mask_token": torch.zeros(1, 1, 32), "decoder_embed.weight": torch.zeros(4, 32)}
    torch.save({"model": small_timm() | decoder}, tmp_path / "x.pth")
    mpp.load_encoder(tmp_path / "x.pth")
    assert told(caplog) == {"heads": 2}


def small_timm() -> dict[str, torch.Tensor]:
    return timm.models.VisionTransformer(**SIZES | {"embed_dim": 32, "depth": 1, "num_heads": 2}).state_dict()
