"""Weights of transformers read and written, measured by what transformers computes itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shaken
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpp.models.classifier import Classifier, Head
from mpp.models.vit import ViT
from mpp.models.vit_config import ViTConfig
from mpp.weights import files, foreign, huggingface

transformers: Any = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
VIT = SIZES | {"intermediate_size": 48}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
LARGER = (40, 56)  # neither square nor a multiple of the native 32
FIRST = "vit.encoder.layer.0."  # block of a classifier


def made(kind: str, settings: dict[str, Any], **options: Any) -> Any:
    """A random model of transformers none of whose parameters is zero or alike."""
    config = getattr(transformers, CONFIGS[kind])(**settings, **options)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


CONFIGS = {
    "ViTModel": "ViTConfig",
    "ViTForImageClassification": "ViTConfig",
    "ViTForMaskedImageModeling": "ViTConfig",
    "ViTMAEModel": "ViTMAEConfig",
    "ViTMAEForPreTraining": "ViTMAEConfig",
    "Dinov2Model": "Dinov2Config",
    "Dinov2ForImageClassification": "Dinov2Config",
    "Dinov2WithRegistersModel": "Dinov2WithRegistersConfig",
    "Dinov2WithRegistersForImageClassification": "Dinov2WithRegistersConfig",
}


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def loaded(path: Path, **facts: Any) -> foreign.Foreign:
    found = foreign.load(files.read(path), facts)
    assert found.format == "huggingface"
    found.encoder.eval()
    return found


def near(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= 2e-5 * theirs.abs().max())


def tokens_of(encoder: ViT, images: Tensor) -> Tensor:
    return encoder.encode(encoder.embed(images), grid=encoder.grid(images))


@torch.no_grad()
def same_tokens(encoder: ViT, model: Any, *sizes: tuple[int, int], **options: Any) -> bool:
    for size in sizes:
        images = torch.randn(2, encoder.config.channels, *size)
        theirs = model(images, **options).last_hidden_state
        if not near(tokens_of(encoder, images), theirs) or not near(encoder(images), theirs[:, 0]):
            return False
    return True


def changed(folder: Path, change: Any) -> Path:
    """Rewrites the folder's tensors."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})
    return folder


def with_settings(folder: Path, **settings: Any) -> Path:
    """Sets values of config.json; None takes them away."""
    values = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


# Reading


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"qkv_bias": False, "layer_norm_eps": 1e-3},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "gelu_fast", "num_channels": 1},
        {"hidden_act": "gelu_pytorch_tanh", "patch_size": [8, 8], "image_size": (32, 32)},
    ],
)
def test_vit_gives_its_tokens_and_leaves_the_pooler_aside(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = made("ViTModel", VIT | settings)
    found = loaded(saved(model, tmp_path))
    assert same_tokens(found.encoder, model, (32, 32))
    if not isinstance(model.config.patch_size, list):  # of which transformers resizes no positions
        assert same_tokens(found.encoder, model, (32, 32), LARGER, (64, 64), interpolate_pos_encoding=True)
    assert found.head is None
    assert sorted(found.aside) == ["pooler.dense.bias", "pooler.dense.weight"]
    assert found.encoder.config.mean == (0.5,)


def test_an_image_that_is_not_square_keeps_its_rows_and_columns(tmp_path: Path) -> None:
    model = made("ViTModel", VIT | {"image_size": [16, 40]})
    found = loaded(saved(model, tmp_path))
    assert found.encoder.config.image == (16, 40)
    assert same_tokens(found.encoder, model, (16, 40))


@torch.no_grad()
@pytest.mark.parametrize("classes", [2, 3])  # the names of two are transformers' own, and not in config.json
def test_a_classifier_gives_its_logits_and_its_names(tmp_path: Path, classes: int) -> None:
    names = {0: "LABEL_0", 1: "LABEL_1"} if classes == 2 else {2: "zebra", 0: "cat", 1: "ant"}
    model = made("ViTForImageClassification", VIT, id2label=names)
    found = loaded(saved(model, tmp_path))
    assert found.head is not None
    assert not found.aside
    assert found.classes == (("LABEL_0", "LABEL_1") if classes == 2 else ("cat", "ant", "zebra"))
    for size in ((32, 32), LARGER):
        images = torch.randn(2, 3, *size)
        ours = Classifier(found.encoder, found.head, found.classes)(images)
        assert near(ours, model(images, interpolate_pos_encoding=True).logits)


def test_masked_image_modelling_leaves_decoder_and_mask_token_aside(tmp_path: Path) -> None:
    model = made("ViTForMaskedImageModeling", VIT, encoder_stride=8)
    found = loaded(saved(model, tmp_path))
    assert same_tokens(found.encoder, model.vit, (32, 32), LARGER, interpolate_pos_encoding=True)
    assert sorted(found.aside) == ["decoder.0.bias", "decoder.0.weight", "vit.embeddings.mask_token"]


def mae_tokens(model: Any, images: Tensor) -> Tensor:
    """Its tokens when it masks none, in the picture's order, that of growing noise."""
    patches = images.shape[2] * images.shape[3] // 64
    noise = torch.arange(patches).float().expand(len(images), -1)
    return model(images, noise=noise, interpolate_pos_encoding=True).last_hidden_state


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ViTMAEModel", "ViTMAEForPreTraining"])
def test_mae_gives_its_tokens(tmp_path: Path, kind: str) -> None:
    model = made(kind, VIT | DECODER, mask_ratio=0.0)
    found = loaded(saved(model, tmp_path))
    decoder = {name for name in load_file(tmp_path / "model.safetensors") if name.startswith("decoder.")}
    assert set(found.aside) == decoder
    assert (len(decoder) > 10) == (kind == "ViTMAEForPreTraining")
    assert found.encoder.config.mean == (0.485, 0.456, 0.406)
    for size in ((32, 32), LARGER):
        images = torch.randn(2, 3, *size)
        theirs = mae_tokens(getattr(model, "vit", model), images)
        assert near(tokens_of(found.encoder, images), theirs)


@torch.no_grad()
def test_maes_published_names_and_those_of_release_5s_files_and_modules_are_one(tmp_path: Path) -> None:
    model = made("ViTMAEForPreTraining", VIT | DECODER, mask_ratio=0.0)
    files_of_5 = load_file(saved(model, tmp_path / "files") / "model.safetensors")
    assert "decoder.decoder_encoder.layer.0.output.dense.bias" in files_of_5  # 5.23's
    # facebook/vit-mae-base has the decoder's blocks under this name
    named = {name.replace("decoder_encoder.layer", "decoder_layers"): value for name, value in files_of_5.items()}
    modules = model.state_dict()
    assert {"vit.layers.0.mlp.fc2.bias", "decoder.decoder_layers.0.attention.q_proj.weight"} <= modules.keys()
    images = torch.randn(2, 3, *LARGER)
    theirs = mae_tokens(model.vit, images)
    for name, tensors in {"published": named, "modules": modules}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes((tmp_path / "files/config.json").read_bytes())
        torch.save(tensors, folder / "pytorch_model.bin")
        found = loaded(folder)
        assert near(tokens_of(found.encoder, images), theirs)
        assert set(found.aside) == {name for name in tensors if name.startswith("decoder.")}


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ViTForImageClassification", {"intermediate_size": 48}),
        ("Dinov2Model", {}),
        ("Dinov2Model", {"use_swiglu_ffn": True}),
    ],
)
def test_state_dicts_of_release_5s_modules_load(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    model = made(kind, SIZES | settings)
    tensors = model.state_dict()
    assert tensors.keys() != load_file(saved(model, tmp_path) / "model.safetensors").keys()
    changed(tmp_path, lambda _: tensors)
    assert same_tokens(loaded(tmp_path).encoder, getattr(model, "vit", model), (32, 32))


@pytest.mark.parametrize(
    "settings", [{}, {"use_swiglu_ffn": True, "hidden_size": 48}, {"qkv_bias": False, "mlp_ratio": 2}]
)
@pytest.mark.parametrize("kind", ["Dinov2Model", "Dinov2WithRegistersModel"])
def test_dinov2_gives_its_tokens(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    model = made(kind, SIZES | settings)
    found = loaded(saved(model, tmp_path))
    assert found.aside == ("embeddings.mask_token",)
    assert found.encoder.config.mean == (0.485, 0.456, 0.406)
    assert same_tokens(found.encoder, model, (32, 32), LARGER, (16, 24))


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"use_swiglu_ffn": True, "hidden_size": 48}])
@pytest.mark.parametrize("kind", ["Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification"])
def test_dinov2s_classifier_gives_its_logits(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    model = made(kind, SIZES | settings, id2label={0: "cat", 1: "ant", 2: "zebra"})
    found = loaded(saved(model, tmp_path))
    assert found.head is not None
    assert found.classes == ("cat", "ant", "zebra")
    classifier = Classifier(found.encoder, found.head, found.classes)
    for size in ((32, 32), LARGER, (16, 24)):
        images = torch.randn(2, 3, *size)
        assert near(classifier(images), model(images).logits)


def test_of_dinov2s_classifier_the_class_token_alone_can_be_had(tmp_path: Path) -> None:
    model = made("Dinov2ForImageClassification", SIZES)
    found = loaded(saved(model, tmp_path), pool="cls")
    assert found.head is None
    assert found.classes == ()
    assert {"classifier.weight", "classifier.bias", "dinov2.embeddings.mask_token"} == set(found.aside)
    assert same_tokens(found.encoder, model.dinov2, (32, 32), LARGER)


@torch.no_grad()
def test_the_average_of_the_patches_serves_as_well_as_the_class_token(tmp_path: Path) -> None:
    model = made("ViTModel", VIT)
    encoder = loaded(saved(model, tmp_path), pool="avg").encoder
    images = torch.randn(2, 3, 32, 32)
    assert near(encoder(images), model(images).last_hidden_state[:, 1:].mean(1))


def test_a_file_alone_needs_only_what_its_tensors_do_not_tell(tmp_path: Path) -> None:
    model = made("ViTModel", VIT)
    saved(model, tmp_path)
    (tmp_path / "config.json").unlink()
    path = tmp_path / "model.safetensors"
    with pytest.raises(files.WeightsError, match="heads="):
        loaded(path)
    assert same_tokens(loaded(path, heads=4).encoder, model, (32, 32))
    registers = made("Dinov2WithRegistersModel", SIZES)
    saved(registers, tmp_path)
    (tmp_path / "config.json").unlink()
    assert same_tokens(loaded(path, heads=4).encoder, registers, (32, 32), LARGER)


def test_settings_that_an_old_config_lacks_are_transformers_own(tmp_path: Path) -> None:
    model = made("ViTModel", VIT)
    with_settings(saved(model, tmp_path), qkv_bias=None, layer_norm_eps=None, hidden_act=None, num_channels=None)
    found = loaded(tmp_path)
    assert found.encoder.config.norm_eps == 1e-12
    assert same_tokens(found.encoder, model, (32, 32))


def test_pictures_are_normalised_as_the_preprocessor_says(tmp_path: Path) -> None:
    saved(made("ViTModel", VIT), tmp_path)
    says = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_rescale": True}
    place = tmp_path / "preprocessor_config.json"
    place.write_text(json.dumps(says))
    config = loaded(tmp_path).encoder.config
    assert (config.mean, config.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    place.write_text(json.dumps(says | {"do_normalize": False}))
    config = loaded(tmp_path).encoder.config
    assert (config.mean, config.std) == ((0.0,), (1.0,))
    for other in ({"do_rescale": False}, {"rescale_factor": 1 / 127.5}):
        place.write_text(json.dumps(says | other))
        with pytest.raises(files.WeightsError, match="1/255"):
            loaded(tmp_path)
        assert loaded(tmp_path, mean=(0.0,), std=(0.5,)).encoder.config.std == (0.5,)


def without(name: str) -> Any:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize("name", ["layernorm_after.bias", "attention.attention.key.weight", "output.dense.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    saved(made("ViTForImageClassification", VIT), tmp_path)
    changed(tmp_path, without(FIRST + name))
    with pytest.raises(files.WeightsError, match=f"{FIRST}{name} missing") as error:
        loaded(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vit.embeddings.cls_token", "vit.embeddings.patch_embeddings.projection.weight"])
def test_a_missing_embedding_or_head_is_named(tmp_path: Path, name: str) -> None:
    saved(made("ViTForImageClassification", VIT), tmp_path)
    changed(tmp_path, without(name))
    with pytest.raises(files.WeightsError, match=f"{name} missing"):
        loaded(tmp_path)
    saved(made("ViTForImageClassification", VIT), tmp_path)
    changed(tmp_path, without("classifier.bias"))
    with pytest.raises(files.WeightsError, match=r"classifier\.bias missing"):
        loaded(tmp_path)


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    saved(made("ViTModel", VIT), tmp_path)
    changed(tmp_path, lambda tensors: tensors | {"encoder.layer.0.lora.weight": torch.zeros(3)})
    with pytest.raises(files.WeightsError, match=r"encoder\.layer\.0\.lora\.weight unexpected"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    "name", ["layernorm.weight", "embeddings.position_embeddings", "encoder.layer.1.attention.attention.value.weight"]
)
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, name: str) -> None:
    saved(made("ViTModel", VIT), tmp_path)
    changed(tmp_path, lambda tensors: tensors | {name: torch.zeros(3, 3)})
    with pytest.raises(files.WeightsError, match=rf"{name}.* \(3, 3\)"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "perceiver"}, "model_type must be one of vit, .*'perceiver'"),
        ({"model_type": ["vit"]}, r"model_type must be one of vit, .*\['vit'\]"),
        ({"hidden_act": "relu"}, "hidden_act must be one of gelu, .*'relu'"),
        ({"patch_size": [8, 4]}, "patch_size must be square"),
        ({"patch_size": 16}, r"patch_size is 16, but 8 by vit\.embeddings"),
        ({"hidden_size": 10**9}, r"hidden_size is 1000000000, but 32 by vit\.embeddings"),
        ({"num_hidden_layers": 900}, r"num_hidden_layers is 900, but 2 by vit\.encoder\.layer\.1"),
        ({"intermediate_size": "48"}, "intermediate_size must be a whole number above 0, found '48'"),
        ({"image_size": [32]}, r"image_size must be .*\[32\]"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label must name classes 0 to 1"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "id2label must name classes 0 to 1"),
        ({"num_attention_heads": 5}, "heads"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_its_key(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    saved(made("ViTForImageClassification", VIT), tmp_path)
    with pytest.raises(files.WeightsError, match=words) as error:
        loaded(with_settings(tmp_path, **settings))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


# Writing

OURS: dict[str, Any] = {"image": (32, 32), "patch": 8, "width": 32, "depth": 2, "heads": 4}


def ours(**changes: Any) -> ViT:
    return shaken(ViT(ViTConfig(**(OURS | {"resize": "bicubic"} | changes)))).eval()


def a_head(classes: int = 3) -> Head:
    head = Head(32, classes)
    nn.init.normal_(head.linear.weight)
    nn.init.normal_(head.linear.bias)
    return head


def written(folder: Path, encoder: ViT, head: Head | None = None, classes: tuple[str, ...] = ()) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in huggingface.write(encoder, head, classes).items():
        (folder / name).write_bytes(content)
    return folder


def theirs(kind: str, folder: Path, **options: Any) -> Any:
    """The folder as transformers loads it, without anything left over or drawn anew."""
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gelu": "tanh", "norm_eps": 1e-12, "mlp": 48},
        {"qkv_bias": False, "channels": 1},
        {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "dropout": 0.1, "drop_path": 0.1},
    ],
)
def test_transformers_loads_what_is_written_and_computes_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    encoder, head = ours(**changes), a_head()
    model = theirs("ViTModel", written(tmp_path / "encoder", encoder), add_pooling_layer=False)
    assert same_tokens(encoder, model, (32, 32), LARGER, interpolate_pos_encoding=True)
    model = theirs("ViTForImageClassification", written(tmp_path / "head", encoder, head, ("b", "a", "ü")))
    assert model.config.id2label == {0: "b", 1: "a", 2: "ü"}
    images = torch.randn(2, encoder.config.channels, *LARGER)
    assert near(head(encoder(images)), model(images, interpolate_pos_encoding=True).logits)


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"swiglu": True},
        {"swiglu": True, "mlp": 64, "width": 48},
        {"mlp": 64, "gelu": "tanh", "norm_eps": 1e-12, "qkv_bias": False, "channels": 1},
        {"positions": "sincos2d"},
    ],
)
def test_transformers_loads_dinov2_as_it_is_written_and_computes_the_same(
    tmp_path: Path, changes: dict[str, Any], registers: int
) -> None:
    resize: Any = "bicubic_antialias" if registers else "bicubic"
    encoder = ours(layer_scale=0.5, registers=registers, resize=resize, **changes)
    sizes = [(32, 32), LARGER] if encoder.config.positions == "learned" else [(32, 32)]
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    assert same_tokens(encoder, theirs(f"{kind}Model", written(tmp_path / "encoder", encoder)), *sizes)
    both = ViT(replace(encoder.config, pool="cls_avg")).eval()
    both.load_state_dict(encoder.state_dict())
    head = Head(both.width, 3)
    nn.init.normal_(head.linear.weight)
    model = theirs(f"{kind}ForImageClassification", written(tmp_path / "head", both, head, ("b", "a", "ü")))
    assert model.config.id2label == {0: "b", 1: "a", 2: "ü"}
    for size in sizes:
        images = torch.randn(2, encoder.config.channels, *size)
        assert near(head(both(images)), model(images).logits)


@pytest.mark.parametrize("positions", ["learned", "learned2d", "sincos2d", "sincos2d_mae", "sincos2d_timm", "none"])
def test_positions_that_are_added_become_a_table(tmp_path: Path, positions: Any) -> None:
    encoder = ours(positions=positions, resize="bilinear", image=(16, 40))
    model = theirs("ViTModel", written(tmp_path, encoder), add_pooling_layer=False)
    assert same_tokens(encoder, model, (16, 40))


@pytest.mark.parametrize("with_head", [False, True])
def test_what_we_write_comes_back_bit_for_bit(tmp_path: Path, with_head: bool) -> None:
    encoder, head = ours(gelu="tanh", mean=(0.1, 0.2, 0.3), image=(16, 40)), a_head() if with_head else None
    found = loaded(written(tmp_path, encoder, head, ("x", "y", "z") if head else ()))
    expected = replace(encoder.config, class_token=True, mlp=128, std=(0.5, 0.5, 0.5))
    assert found.encoder.config == expected
    assert found.aside == ()
    assert found.classes == (("x", "y", "z") if head else ())
    pairs = [(encoder, found.encoder), *([(head, found.head)] if head else [])]
    for before, after in pairs:
        assert after is not None
        assert before.state_dict().keys() == after.state_dict().keys()
        assert all(torch.equal(before.state_dict()[name], value) for name, value in after.state_dict().items())


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTModel"])
def test_what_transformers_wrote_goes_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    model = made(kind, VIT)
    found = loaded(saved(model, tmp_path / "theirs"))
    written(tmp_path / "ours", found.encoder, found.head, found.classes)
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert before.keys() - after.keys() == set(found.aside)
    assert all(torch.equal(before[name], value) for name, value in after.items())
    was, now = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("theirs", "ours"))
    for added in ("id2label", "label2id"):  # of two classes transformers leaves them out
        now.pop(added, None)
    assert now.items() <= was.items()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pool": "avg"}, "pool avg"),
        ({"pool": "map"}, "pool map"),
        ({"registers": 2}, "registers 2"),
        ({"mixer": ("pool", "attention")}, "mixer pool/attention"),
        ({"stem": "overlap"}, "stem overlap"),
        ({"swiglu": True, "norm": "rms"}, "norm rms, swiglu True"),
        ({"positions": "rope"}, "positions rope"),
        ({"positions": "relative"}, "positions relative"),
        ({"qk_norm": True}, "qk_norm True"),
        ({"bias": False}, "bias False"),
    ],
)
def test_what_vit_has_no_place_for_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^transformers' ViT cannot hold {words}$"):
        huggingface.write(ours(**changes), None, ())


@pytest.mark.parametrize(
    ("changes", "head", "words"),
    [
        ({"pool": "avg"}, None, r"pool avg without a head \(it has cls\)"),
        ({"pool": "cls_avg"}, None, r"pool cls_avg without a head \(it has cls\)"),
        ({"pool": "cls"}, Head(32, 3), r"pool cls with a head \(it has cls_avg\)"),
        ({"pool": "cls_avg", "layer_scale": None}, Head(64, 3), "layer_scale None"),
        ({"image": (16, 40)}, None, r"image \(16, 40\), which is not square"),
        ({"mlp": 48}, None, "mlp 48, which is not a whole multiple of the width"),
        ({"mlp": 41, "swiglu": True}, None, "mlp 41, which is not a whole multiple of the width times two thirds"),
        ({"norm": "rms", "bias": False, "qk_norm": True}, None, "norm rms, bias False, qk_norm True"),
        ({"positions": "rope"}, None, "positions rope"),
    ],
)
def test_what_dinov2_has_no_place_for_is_refused_by_name(changes: dict[str, Any], head: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^transformers' DINOv2 cannot hold {words}$"):
        huggingface.write(ours(**{"layer_scale": 1e-5} | changes), head, ())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Dinov2ForImageClassification", {}),
        ("Dinov2Model", {"use_swiglu_ffn": True}),
        ("Dinov2WithRegistersModel", {"num_register_tokens": 3, "mlp_ratio": 2}),
        ("Dinov2WithRegistersForImageClassification", {"use_swiglu_ffn": True}),
    ],
)
def test_dinov2_of_transformers_goes_back_bit_for_bit(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    model = made(kind, SIZES | settings)
    found = loaded(saved(model, tmp_path / "theirs"))
    written(tmp_path / "ours", found.encoder, found.head, found.classes)
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items() if not name.endswith("mask_token"))
    again = loaded(tmp_path / "ours")
    assert again.encoder.config == replace(found.encoder.config, layer_scale=1.0)
    assert again.classes == found.classes


def test_a_head_with_a_hidden_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head\.hidden 8"):
        huggingface.write(ours(), Head(32, 3, hidden=8), ("a", "b", "c"))


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize(
    ("image", "channels", "dinov2"),
    [((32, 32), 3, False), ((16, 40), 3, False), ((32, 32), 1, False), ((32, 32), 3, True)],
)
def test_the_snippet_gives_the_same_numbers_of_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_head: bool, image: Any, channels: int, dinov2: bool
) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    encoder = ours(image=image, channels=channels, mean=mean[:channels], std=std[:channels])
    head = a_head() if with_head else None
    if dinov2:
        pool: Any = "cls_avg" if with_head else "cls"
        encoder = ours(mean=mean, std=std, layer_scale=0.1, registers=2, pool=pool)
        head = Head(encoder.width, 3) if with_head else None
    written(tmp_path, encoder, head, ("a", "b", "c") if head else ())
    pixels = torch.randint(0, 256, (1, channels, *image), dtype=torch.uint8)
    Image.fromarray(pixels[0].permute(1, 2, 0).squeeze(2).numpy()).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(huggingface.usage(encoder, head).replace("picture.jpg", "picture.png"), names)
    with torch.no_grad():
        vector = encoder(pixels)
        assert near(vector if head is None else head(vector), names["output"])
