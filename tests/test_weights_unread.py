"""Files of models that are not read: the line says what they are, and sends nobody after settings that don't help."""

import re

import pytest
import torch
from safetensors.torch import save_file

import mpp
from mpp.export.convert import convert, facts_of
from mpp.weights import WeightsError

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
torchvision = pytest.importorskip("torchvision")

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
HF = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}
HF |= {"patch_size": 8}


def of_timm(name: str, **changes):
    return lambda: timm.create_model(name, **{**TINY, **changes})


def of_transformers(name: str, **changes):
    def make():
        kind = getattr(transformers, f"{name}Config")
        return getattr(transformers, f"{name}Model")(kind(**{**HF, **changes}))

    return make


def of_vit_pytorch():
    return pytest.importorskip("vit_pytorch").ViT(
        image_size=32, patch_size=8, num_classes=3, dim=32, depth=1, heads=2, mlp_dim=32
    )


SWIN = {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
KINDS = {
    "timm dinov3": (of_timm("vit_small_patch16_dinov3", img_size=32), "DINOv3"),
    "timm beit": (of_timm("beit_base_patch16_224"), "BEiT"),
    "timm beit shared": (
        of_timm("beit_base_patch16_224", use_shared_rel_pos_bias=True, use_rel_pos_bias=False),
        "BEiT",
    ),
    "timm relpos": (of_timm("vit_relpos_small_patch16_224"), "relative"),
    "timm relposmlp": (of_timm("vit_relpos_base_patch32_plus_rpn_256"), "relative"),
    "timm deit": (of_timm("deit_tiny_distilled_patch16_224"), "distilled DeiT"),
    "timm eva": (of_timm("eva02_tiny_patch14_224"), "EVA"),
    "timm rope": (of_timm("vit_medium_patch16_rope_reg1_gap_256"), "EVA"),
    "timm differential": (of_timm("vit_dwee_patch16_reg1_gap_256"), "differential attention"),
    "timm parallel": (of_timm("vit_small_patch16_18x2_224"), "parallel blocks"),
    "timm parallel in one": (of_timm("vit_base_patch16_xp_224"), "parallel blocks"),
    "timm naflex": (
        lambda: timm.create_model("naflexvit_base_patch16_gap", embed_dim=32, depth=1, num_heads=2),
        "NaFlexViT",
    ),
    "timm hiera": (lambda: timm.create_model("hiera_tiny_224", embed_dim=16, stages=(1, 1, 1, 1)), "Hiera"),
    "timm swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(2, 2)),
        "Swin",
    ),
    "timm convnext": (lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1)), "ConvNeXt"),
    "timm resnet": (lambda: timm.create_model("resnet18"), "ResNet"),
    "timm mixer": (
        lambda: timm.models.MlpMixer(3, img_size=32, patch_size=8, num_blocks=1, embed_dim=32),
        "MLP-Mixer",
    ),
    "timm hybrid": (lambda: timm.create_model("vit_tiny_r_s16_p8_224", depth=1), "hybrid"),
    "transformers dinov3": (of_transformers("DINOv3ViT"), "DINOv3"),
    "transformers beit": (of_transformers("Beit"), "BEiT"),
    "transformers data2vec": (of_transformers("Data2VecVision"), "BEiT or data2vec"),
    "transformers deit": (of_transformers("DeiT"), "distilled DeiT"),
    "transformers ijepa": (of_transformers("IJepa"), "I-JEPA"),
    "transformers siglip 2": (of_transformers("Siglip2Vision"), "SigLIP 2"),
    "transformers swin": (
        lambda: transformers.SwinModel(transformers.SwinConfig(image_size=32, **SWIN)),
        "Swin",
    ),
    "transformers convnext": (
        of_transformers("ConvNext", depths=[1, 1], hidden_sizes=[8, 16], num_stages=2),
        "ConvNeXt",
    ),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 32, num_classes=3),
        "torchvision's ViT",
    ),
    "torchvision swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [2, 2], [4, 4], num_classes=3),
        "Swin",
    ),
    "torchvision resnet": (lambda: torchvision.models.resnet18(), "ResNet"),
    "vit-pytorch": (of_vit_pytorch, "vit-pytorch"),
}


def refused(path, **facts) -> str:
    with pytest.raises(WeightsError) as caught:
        mpp.load_encoder(path, **facts)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_not_read_is_named_whatever_is_given(kind, prefix, tmp_path):
    make, what = KINDS[kind]
    tensors = {f"{prefix}{name}": value.clone() for name, value in make().state_dict().items()}
    torch.save(tensors, tmp_path / "x.pth")
    for facts in ({}, {"image": 32}, {"heads": 2, "image": 32}):
        text = refused(tmp_path / "x.pth", **facts)
        assert what in text
        assert "which is not read" in text
        assert "image=" not in text, "which would lead nowhere"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("transformers")])
def test_folders_of_transformers_are_named_too(kind, tmp_path):
    make, what = KINDS[kind]
    make().save_pretrained(tmp_path / "x")
    assert what in refused(tmp_path / "x", image=32)


def test_a_model_type_that_nobody_knows_is_said(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "levit"}')
    save_file({"stem.w": torch.ones(3)}, tmp_path / "model.safetensors")
    assert "transformers' model_type levit, which is not read" in refused(tmp_path)


# What the lines send one to instead


def test_ijepas_own_checkpoints_are_read(tmp_path):
    """facebookresearch/ijepa: names of timm's, no class token; its target encoder is what it evaluates."""
    target = timm.models.VisionTransformer(
        **TINY | {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
    )
    other = {f"module.{name}": value + 1 for name, value in target.state_dict().items()}
    names = {f"module.{name}": value for name, value in target.state_dict().items()}
    predictor = {"module.predictor_embed.weight": torch.ones(3, 3)}
    torch.save({"encoder": other, "predictor": predictor, "target_encoder": names}, tmp_path / "x.pth")
    encoder = mpp.load_encoder(tmp_path / "x.pth", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = target.eval()(images)
        torch.testing.assert_close(encoder(images), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "deit_tiny_patch16_224"])
def test_timms_siglip_and_deit_are_read(name, tmp_path):
    model = timm.create_model(name, **TINY | {"num_classes": 0}).eval()
    timm.models.save_for_hf(model, str(tmp_path / "x"), safe_serialization=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(mpp.load_encoder(tmp_path / "x")(images), model(images), atol=2e-5, rtol=2e-5)


# Advice about what a file does not tell, followed as it stands


def plain(**changes):
    return timm.models.VisionTransformer(**{**TINY, **changes}).state_dict()


@pytest.mark.parametrize(
    ("tensors", "fill"),
    [
        (lambda: plain(embed_dim=40), {"N": "2"}),
        (lambda: plain(img_size=(24, 32)), {"h": "24", "w": "32"}),
        (lambda: plain(img_size=24, reg_tokens=4, no_embed_class=True, class_token=True), {"h": "24", "w": "24"}),
    ],
)
def test_advice_is_followed_in_python_and_on_the_command_line(tensors, fill, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(tensors(), path)
    advice = re.search(r"(\w+)=(\([^)]*\)|\w+)", refused(path).partition(": timm: ")[2])
    name, value = advice[1], advice[2]
    for letter, number in fill.items():
        value = re.sub(rf"\b{letter}\b", number, value)
    facts = {name: eval(value)}
    encoder = mpp.load_encoder(path, **facts)
    assert getattr(encoder.config, name) == facts[name]
    convert(path, tmp_path / "out", "safetensors", **facts_of([f"{name}={value.replace('(', '[').replace(')', ']')}"]))
    assert mpp.load_encoder(tmp_path / "out").config == encoder.config


def test_a_model_without_positions_is_said_to_be_one(tmp_path):
    """As rotary positions leave no tensors either, which would be taken for none."""
    path = tmp_path / "x.safetensors"
    save_file(plain(pos_embed="none"), path)
    text = refused(path, image=(24, 32))
    advice = re.search(r'positions="(\w+)"', text)[1]
    assert "image=(h, w)" in refused(path, positions=advice)
    assert mpp.load_encoder(path, image=(24, 32), positions=advice).config.positions == "none"


def test_a_pool_that_the_norm_contradicts_is_named_and_works(tmp_path):
    save_file(plain(global_pool="avg"), tmp_path / "x.safetensors")
    text = refused(tmp_path / "x.safetensors", pool="avg")
    advice = re.search(r'expected pool="(\w+)"', text)[1]
    assert mpp.load_encoder(tmp_path / "x.safetensors", pool=advice).config.pool == advice
