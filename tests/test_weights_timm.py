"""Weights of timm, against timm itself."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import shaken, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpp.models.classifier import Head
from mpp.models.vit import ViT
from mpp.weights import files, foreign
from mpp.weights import timm as format
from mpp.weights.timm_config import IMPLIED

timm = pytest.importorskip("timm")
transformer = pytest.importorskip("timm.models.vision_transformer")
layers = pytest.importorskip("timm.layers")

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
CLOSE = 2e-5  # of the largest magnitude
HEADS = {"heads": 4}
REGISTERS = {"reg_tokens": 2, "init_values": 0.1}
KINDS: dict[str, tuple[dict, dict]] = {  # timm's arguments, and the facts that a bare file needs
    "class token": ({}, {}),
    "registers": (REGISTERS, {}),
    "registers apart": (REGISTERS | {"no_embed_class": True}, {}),
    "class token apart": ({"no_embed_class": True, "qkv_bias": False}, {}),
    "average": ({"global_pool": "avg", "qk_norm": True}, {}),
    "average of normed": ({"global_pool": "avg", "fc_norm": False}, {"pool": "avg"}),
    "average alone": ({"global_pool": "avg", "class_token": False, "fc_norm": False}, {}),
    "average and registers": ({"global_pool": "avg", "class_token": False, "reg_tokens": 3}, {}),
    "attention pool and registers": (
        {"global_pool": "map", "class_token": False, "reg_tokens": 2, "no_embed_class": True},
        {},
    ),
    "attention pool": ({"global_pool": "map", "class_token": False, "mlp_ratio": 3.0, "qkv_bias": False}, {}),
    "swiglu": ({"mlp_layer": layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 5.0}, {}),
    "swiglu in two": ({"mlp_layer": layers.SwiGLU, "act_layer": nn.SiLU, "mlp_ratio": 2.5}, {}),
    "tanh": ({"act_layer": "gelu_tanh"}, {"gelu": "tanh"}),
    "no positions": ({"pos_embed": "none"}, {"image": (32, 32), "positions": "none"}),
    "not square": ({"img_size": (32, 48), "in_chans": 2}, {"image": (32, 48)}),
    "root mean square": ({"norm_layer": "rmsnorm", "qk_norm": True, "proj_bias": False}, {}),
    "no head": ({"num_classes": 0}, {}),
}


def small(**changes) -> nn.Module:
    """A model of timm none of whose parameters is zero or alike."""
    model = transformer.VisionTransformer(**SIZES | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(model: nn.Module, path: Path) -> Path:
    save_file(model.state_dict(), path)
    return path


def loaded(path: Path, **facts) -> foreign.Foreign:
    return foreign.load(files.read(path), facts)


def folder_of(found: foreign.Foreign, folder: Path) -> Path:
    """What we write of a model."""
    folder.mkdir()
    for name, content in format.write(found.encoder, found.head, found.classes).items():
        (folder / name).write_bytes(content)
    return folder


def from_folder(folder: Path, **changes) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **changes).eval()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= CLOSE * theirs.abs().max()


@torch.no_grad()
def assert_alike(found: foreign.Foreign, model: nn.Module, size: tuple[int, int]) -> None:
    """Tokens, pooled vectors and logits of images of a size are the same."""
    images = torch.randn(2, found.encoder.config.channels, *size)
    encoder = found.encoder.eval()
    tokens, theirs = encoder.encode(encoder.embed(images), grid=encoder.grid(images)), model.forward_features(images)
    assert_close(tokens, theirs)
    assert_close(encoder(images), model.forward_head(theirs, pre_logits=True))
    if found.head is not None:
        assert_close(found.head(encoder(images)), model(images))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bare_state_dict_computes_what_timm_does(kind: str, tmp_path: Path) -> None:
    arguments, facts = KINDS[kind]
    model = small(**arguments)
    found = loaded(saved(model, tmp_path / "model.safetensors"), **HEADS, **facts)
    assert found.format == "timm"
    assert (found.head is None) == (kind == "no head")
    assert_alike(found, model, found.encoder.config.image)
    model.set_input_size(img_size=(40, 56))
    assert_alike(found, model, (40, 56))


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_write_timm_loads_bit_by_bit(kind: str, tmp_path: Path) -> None:
    arguments, facts = KINDS[kind]
    model = small(**arguments)
    found = loaded(saved(model, tmp_path / "model.safetensors"), **HEADS, **facts)
    theirs = from_folder(folder_of(found, tmp_path / "written"))
    before, after = copy.deepcopy(model.state_dict()), theirs.state_dict()
    images = torch.randn(2, found.encoder.config.channels, *found.encoder.config.image)
    with torch.no_grad():
        if kind == "swiglu in two":  # timm's architecture with SwiGLU has it in one
            assert_close(theirs(images), model(images))
            for block in range(2):
                for end in ("weight", "bias"):
                    pieces = [before.pop(f"blocks.{block}.mlp.fc1_{part}.{end}") for part in "gx"]
                    before[f"blocks.{block}.mlp.fc1.{end}"] = torch.cat(pieces)
        else:
            assert torch.equal(theirs(images), model(images))
    if kind == "registers":  # what was added to them is in them now
        before["reg_token"] = before["reg_token"] + before["pos_embed"][:, 1:3]
        before["pos_embed"][:, 1:3] = 0
    if kind == "average and registers":
        before["reg_token"] = before["reg_token"] + before["pos_embed"][:, :3]
        before["pos_embed"] = before["pos_embed"][:, 3:]
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_write_we_read_without_facts(kind: str, tmp_path: Path) -> None:
    arguments, facts = KINDS[kind]
    found = loaded(saved(small(**arguments), tmp_path / "model.safetensors"), **HEADS, **facts)
    again = loaded(folder_of(found, tmp_path / "written"))
    channels = found.encoder.config.channels  # each has a number of its own in timm's files
    expected = replace(found.encoder.config, mean=(0.5,) * channels, std=(0.5,) * channels)
    assert again.encoder.config == expected
    for name, value in found.encoder.state_dict().items():
        assert torch.equal(value, again.encoder.state_dict()[name]), name


@pytest.mark.parametrize("size", [(32, 32), (40, 56)])
def test_other_resolutions_are_timms_dynamic_ones(size: tuple[int, int], tmp_path: Path) -> None:
    model = small(dynamic_img_size=True, **REGISTERS)
    assert_alike(loaded(saved(model, tmp_path / "model.safetensors"), heads=4), model, size)


@pytest.mark.parametrize(("patch", "image"), [(4, (32, 32)), (16, (32, 48)), (10, (40, 30))])
def test_another_patch_is_resampled_as_timm_does(patch: int, image: tuple[int, int], tmp_path: Path) -> None:
    model = small()
    theirs = small(patch_size=patch, img_size=image)
    theirs.load_state_dict(transformer.checkpoint_filter_fn(model.state_dict(), theirs))
    found = loaded(saved(model, tmp_path / "model.safetensors"), heads=4)
    encoder = found.encoder.resized(image=image, patch=patch)
    assert_alike(foreign.Foreign("timm", encoder, found.head, (), ()), theirs, image)


def hub_folder(folder: Path, name: str = "vit_base_patch16_224", **changes) -> nn.Module:
    """A folder as timm writes it for the hub, and the model in it."""
    config = changes.pop("model_config", None)
    model = timm.create_model(name, **SIZES | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    timm.models.save_for_hf(model, str(folder), model_config=config, safe_serialization=True)
    return model


@pytest.mark.parametrize(
    "arguments",
    [
        {"global_pool": "avg", "fc_norm": False, "act_layer": "gelu_tanh"},
        {"img_size": (32, 48), "global_pool": "avg", "qk_norm": True},
        {"reg_tokens": 3, "no_embed_class": True, "img_size": (24, 40)},
        {"pos_embed": "none", "in_chans": 1, "init_values": 0.2},
        {"global_pool": "map", "reg_tokens": 1},
        {"name": "vit_giant_patch14_dinov2"},
    ],
)
def test_a_folder_of_timm_tells_what_its_tensors_do_not(arguments: dict, tmp_path: Path) -> None:
    model = hub_folder(tmp_path, **arguments)
    found = loaded(tmp_path)
    assert found.encoder.config.image == model.patch_embed.img_size
    assert_alike(found, model, found.encoder.config.image)
    model.set_input_size(img_size=(40, 56))
    assert_alike(found, model, (40, 56))
    theirs = from_folder(folder_of(found, tmp_path / "written"))
    theirs.set_input_size(img_size=(40, 56))
    assert_alike(found, theirs, (40, 56))


def test_normalisation_and_names_of_classes_come_from_the_folder(tmp_path: Path) -> None:
    about = {"label_names": list("abcde"), "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    hub_folder(tmp_path, model_config=about)
    found = loaded(tmp_path)
    assert (found.encoder.config.mean, found.encoder.config.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert found.classes == tuple("abcde")
    theirs = from_folder(folder_of(found, tmp_path / "written"))
    assert theirs.pretrained_cfg["label_names"] == list("abcde")
    told = timm.data.resolve_model_data_config(theirs)
    assert [list(told[name]) for name in ("mean", "std", "input_size")] == [
        [0.1, 0.2, 0.3],
        [0.4, 0.5, 0.6],
        [3, 32, 32],
    ]
    assert loaded(tmp_path / "written").classes == tuple("abcde")


def test_without_a_folder_images_are_normalised_by_one_half(tmp_path: Path) -> None:
    path = saved(small(), tmp_path / "model.safetensors")
    found = format.layout(files.read(path), HEADS)
    assert (found.config.mean, found.config.std, found.classes) == ((0.5,), (0.5,), ())
    # numbers stand in for names that are not told, and are not written as names
    encoder = loaded(path, **HEADS).encoder
    for names in (tuple("01234"), ()):
        assert "label_names" not in json.loads(format.write(encoder, Head(32, 5), names)["config.json"])


def test_a_checkpoint_of_torch_is_read_as_well(tmp_path: Path) -> None:
    model = small()
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "model.pth")
    assert_alike(loaded(tmp_path / "model.pth", heads=4), model, (32, 32))


def test_attention_pooling_may_be_left_aside(tmp_path: Path) -> None:
    model = small(global_pool="map", class_token=False)
    found = loaded(saved(model, tmp_path / "model.safetensors"), heads=4, pool="avg")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_close(found.encoder(images), model.forward_features(images).mean(1))
    assert "attn_pool.latent" in found.aside


@pytest.mark.parametrize("start", [start for start, _ in IMPLIED])
def test_names_of_architectures_imply_what_timm_builds(start: str) -> None:
    names = timm.list_models(f"{start}*", exclude_filters=["*rope*"])
    name = min(names, key=lambda name: "_clip_" in name)  # the first, of CLIPs alone where there are no others
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    source = files.Source(Path("here"), model.state_dict(), {"architecture": f"{name}.tag"})
    config = format.layout(source, {}).config
    block = model.blocks[0]
    assert config.heads == block.attn.num_heads
    assert (config.gelu == "tanh") == isinstance(block.mlp.act, layers.GELUTanh)


@pytest.mark.parametrize(
    ("arguments", "facts", "reason"),
    [
        ({}, {}, "the file does not tell its heads, and none are known here for width 32 and depth 2"),
        ({"embed_norm_layer": "layernorm"}, HEADS, "patch_embed.norm.weight unexpected"),
        ({"global_pool": "avg"}, HEADS | {"pool": "cls"}, "fc_norm is of the patches' average"),
        ({}, HEADS | {"pool": "avg_norm"}, "norm is of each token"),
        ({"img_size": (24, 32)}, HEADS | {"image": (32, 48)}, r"13 rows, expected 25 or 24 for image=\(32, 48\)"),
        (
            {},
            HEADS | {"image": (32, 44)},
            r"image=32x44: model.image \(32, 44\) must be a multiple of model.patch \(8\)",
        ),
        ({"img_size": (24, 32)}, HEADS, "12 positions are no square grid"),
        (
            {"pos_embed": "none"},
            HEADS,
            'no pos_embed; of a model with no positions at all, of any kind, say positions="none"',
        ),
        ({"pos_embed": "none"}, HEADS | {"positions": "none"}, "no pos_embed, so that nothing tells for which image"),
        ({"patch_size": (8, 4)}, HEADS, "expected square patches, got 8x4"),
        ({"img_size": 24, "reg_tokens": 4, "no_embed_class": True}, HEADS, "9 rows of pos_embed fit two grids"),
        ({"scale_mlp_norm": True}, HEADS, "blocks.0.mlp.norm.weight unexpected"),
        ({"final_norm": False}, HEADS, "norm.weight missing"),
    ],
)
def test_what_a_file_cannot_tell_or_we_cannot_hold_is_refused(
    arguments: dict, facts: dict, reason: str, tmp_path: Path
) -> None:
    path = saved(small(**arguments), tmp_path / "model.safetensors")
    with pytest.raises(files.WeightsError, match=reason) as error:
        loaded(path, **facts)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_each_wrong_tensor_is_named(tmp_path: Path) -> None:
    tensors = small().state_dict()
    del tensors["blocks.1.norm2.bias"]
    tensors["extra"] = torch.zeros(3)
    tensors["head.weight"] = torch.zeros(5, 31)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(files.WeightsError) as error:
        loaded(tmp_path / "model.safetensors", heads=4)
    for part in ("blocks.1.norm2.bias missing", "extra unexpected", "head.weight (5, 31)"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"global_pool": "max"}, "global_pool 'max', expected token, avg, map"),
        ({"global_pool": "avg", "fc_norm": False, "pool_include_prefix": True}, "pool_include_prefix"),
        ({"act_layer": "relu"}, "act_layer 'relu'"),
        ({"norm_layer": "simplenorm"}, "norm_layer 'simplenorm'"),
        ({"name": "vit_base_patch16_rpn_224"}, "vit_base_patch16_rpn_224 has norms after the branches"),
    ],
)
def test_settings_that_tensors_do_not_show_are_refused(changes: dict, reason: str, tmp_path: Path) -> None:
    hub_folder(tmp_path, **changes)
    with pytest.raises(files.WeightsError, match=reason):
        loaded(tmp_path)


@pytest.mark.parametrize(
    "about", [{"model_args": 3}, {"model_args": {"act_layer": []}}, {"pretrained_cfg": {"mean": 1}}]
)
def test_a_config_of_nonsense_is_one_line(about: dict, tmp_path: Path) -> None:
    saved(small(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_224"} | about))
    with pytest.raises(files.WeightsError, match=str(tmp_path)):
        loaded(tmp_path, heads=4)


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "sincos2d"},
        {"positions": "sincos2d_timm", "pool": "avg", "class_token": True, "registers": 2},
        {"positions": "learned2d", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)},
        {"pool": "avg_norm", "mlp": 101},
        {"pool": "map", "class_token": True, "registers": 1, "gelu": "tanh"},
        {"registers": 2, "layer_scale": 0.1},
        {"norm": "rms", "swiglu": True, "bias": False},
    ],
)
def test_our_own_encoders_compute_the_same_in_timm(changes: dict, tmp_path: Path) -> None:
    encoder = shaken(ViT(tiny_config(**changes)))
    head = Head(64, 3)
    nn.init.normal_(head.linear.weight)
    ours = foreign.Foreign("mpp", encoder, head, ("a", "b", "c"), ())
    folder = folder_of(ours, tmp_path / "written")
    assert_alike(ours, from_folder(folder), (32, 48))
    again = loaded(folder)
    assert again.classes == ours.classes
    for name, value in encoder.state_dict().items():
        if not name.startswith("positions.") or encoder.config.positions == "learned":
            assert torch.equal(value, again.encoder.state_dict()[name]), name
    bare = folder_of(foreign.Foreign("mpp", encoder, None, (), ()), tmp_path / "bare")
    assert_alike(foreign.Foreign("mpp", encoder, None, (), ()), from_folder(bare), (32, 48))
    assert from_folder(bare).num_classes == 0
    assert "head.weight" not in load_file(bare / "model.safetensors")


def test_every_width_of_an_mlp_can_be_written(tmp_path: Path) -> None:
    for hidden in range(1, 3000):
        ratio = format.about(tiny_config(width=96, mlp=hidden), 0, (), 1)["model_args"]["mlp_ratio"]
        assert int(96 * ratio) == hidden


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stem": "overlap"}, "stem overlap"),
        ({"mixer": ("pool", "attention"), "pool": "avg"}, "mixer pool/attention"),
        ({"positions": "rope", "norm_eps": 1e-4}, "positions rope, norm_eps 0.0001"),
        ({"positions": "relative"}, "positions relative"),
        ({"pool": "map", "swiglu": True}, "pool map with swiglu"),
        ({"pool": "map", "norm": "rms"}, "pool map with norm rms"),
        ({"pool": "map", "bias": False}, "pool map without bias"),
    ],
)
def test_what_timm_cannot_hold_is_refused_by_name(changes: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^timm has no place for {reason}$"):
        format.write(ViT(tiny_config(**changes)), None, ())


def test_a_hidden_layer_in_the_head_is_refused() -> None:
    with pytest.raises(ValueError, match="a hidden layer in the head"):
        format.write(ViT(tiny_config()), Head(64, 3, hidden=16), ("a", "b", "c"))


@pytest.mark.parametrize("classes", [0, 3])
def test_the_snippet_runs_and_gives_our_numbers(classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = shaken(ViT(tiny_config(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))).eval()
    head = Head(64, classes) if classes else None
    if head is not None:
        nn.init.normal_(head.linear.weight)
    found = foreign.Foreign("mpp", encoder, head, tuple(map(str, range(classes))), ())
    monkeypatch.chdir(folder_of(found, tmp_path / "written"))
    names: dict = {}
    exec(format.usage(encoder, head), names)
    with torch.no_grad():
        vectors = encoder((names["images"] - encoder.mean) / encoder.std)
        assert_close(vectors if head is None else head(vectors), names["outputs"])


def test_writing_leaves_the_encoder_as_it_is(tmp_path: Path) -> None:
    encoder = shaken(ViT(tiny_config(registers=2)))
    before = copy.deepcopy(encoder.state_dict())
    format.write(encoder, None, ())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
