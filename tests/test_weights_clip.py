"""CLIP's image towers, against timm, transformers, and what OpenAI published, which tests/openai_clip.py computes."""

import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import openai_clip
import pytest
import torch
from conftest import picture_folder, shaken, tiny_config
from safetensors.torch import load_file, save_file
from tiny_runs import LABELS, run, small_splits, write_recipe
from torch import Tensor, nn

import mpp
from mpp import load_classifier, load_encoder
from mpp.export.convert import convert
from mpp.models.classifier import Classifier, Head
from mpp.models.vit import ViT
from mpp.weights import WeightsError, save_classifier, save_encoder
from mpp.weights.format import joint

timm: Any = pytest.importorskip("timm")
transformers: Any = pytest.importorskip("transformers")

CLOSE = 2e-5  # of the largest magnitude
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LARGER = (40, 56)  # neither square nor a multiple of the native 32
VISION = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"image_size": 32, "patch_size": 8, "projection_dim": 6},
}
TEXT = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"vocab_size": 50, "max_position_embeddings": 7, "projection_dim": 6, "bos_token_id": 1, "eos_token_id": 2},
}


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= CLOSE * theirs.abs().max()


def moved(model: Any) -> Any:
    """A model none of whose parameters is zero or alike, but for a projection's bias, which is zeros."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "head.bias":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def encoded(encoder: ViT, images: Tensor) -> Tensor:
    return encoder.encode(encoder.embed(images), grid=encoder.grid(images))


def saved(tensors: dict[str, Tensor], path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    return path


# timm


def of_timm(name: str, **changes: Any) -> Any:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 6}
    return moved(timm.create_model(name, **sizes | changes))


def pushed(model: Any, folder: Path) -> Path:
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return folder


@torch.no_grad()
def assert_timms(encoder: ViT, head: nn.Module | None, model: Any, size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size)
    tokens = model.forward_features(images)
    assert_close(encoded(encoder, images), tokens)
    assert_close(encoder(images), model.forward_head(tokens, pre_logits=True))
    if head is not None:
        assert_close(head(encoder(images)), model(images))


@pytest.mark.parametrize("name", ["vit_base_patch32_clip_224", "vit_base_patch16_clip_quickgelu_224"])
def test_a_folder_of_timm_computes_what_timm_does(name, tmp_path):
    model = of_timm(name)
    given = load_classifier(pushed(model, tmp_path))
    config = given.encoder.config
    assert (config.mean, config.std, config.norm_eps) == (MEAN, STD, 1e-5)
    assert (config.pre_norm, config.stem_bias, config.gelu) == (True, False, "quick" if "quick" in name else "erf")
    assert given.classes == joint(6)
    assert_timms(given.encoder, given.head, model, (32, 32))
    model.set_input_size(img_size=LARGER)
    assert_timms(given.encoder, given.head, model, LARGER)


def untold(message: str) -> set[str]:
    """What a warning says that it was guessed."""
    return set(message.partition("the file does not tell ")[2].partition(";")[0].split(", "))


def test_a_bare_file_of_timms_names_is_taken_for_clips_and_says_so(tmp_path, caplog):
    model = of_timm("vit_base_patch32_clip_quickgelu_224")
    path = saved(model.state_dict(), tmp_path / "model.safetensors")
    with caplog.at_level(logging.INFO):
        given = load_classifier(path, heads=4, gelu="quick")
    assert_timms(given.encoder, given.head, model, (32, 32))
    assert (given.encoder.config.mean, given.encoder.config.std) == (MEAN, STD)
    guess, projection = caplog.messages
    assert untold(guess) == {"norm_eps", "mean", "std", "resize", "image", "pool"}
    assert "norm_eps=1e-05 (" in guess
    assert f"mean=({','.join(map(str, MEAN))}) (" in guess
    assert "no scores of classes" in projection
    caplog.clear()
    with caplog.at_level(logging.INFO):
        load_encoder(path, heads=4, norm_eps=1e-5, mean=(0.5,), std=(0.5,))
    assert untold(*caplog.messages) == {"gelu", "resize", "image", "pool"}
    assert "gelu=erf (" in caplog.messages[0]


def test_a_folder_whose_weights_were_trained_with_another_gelu_says_so(tmp_path, caplog):
    path = pushed(of_timm("vit_base_patch32_clip_224"), tmp_path)
    about = json.loads((path / "config.json").read_text())
    about["pretrained_cfg"]["notes"] = ["natively QuickGELU, use quickgelu model variant for original results"]
    (path / "config.json").write_text(json.dumps(about))
    with caplog.at_level(logging.INFO):
        assert load_encoder(path).config.gelu == "erf"  # as timm computes it
        assert load_encoder(path, gelu="quick").config.gelu == "quick"
    assert untold(*caplog.messages) == {"gelu"}
    assert "gelu=erf (" in caplog.messages[0]


def test_a_trained_head_is_one_for_classes(tmp_path):
    model = of_timm("vit_base_patch32_clip_224")
    nn.init.normal_(model.head.bias)
    assert load_classifier(pushed(model, tmp_path)).classes == tuple("012345")


def test_a_norm_before_the_blocks_of_another_architecture_keeps_its_epsilon(tmp_path):
    model = of_timm("vit_base_patch16_224", pre_norm=True)
    encoder = load_encoder(pushed(model, tmp_path))
    assert encoder.config.norm_eps == 1e-6
    assert_timms(encoder, None, model, (32, 32))
    convert(tmp_path, tmp_path / "out", "timm")
    assert_timms(encoder, None, timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval(), (32, 32))


# transformers


def of_transformers(kind: str, folder: Path, **changes: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind.startswith(("CLIPVision", "MetaClip2Vision")):
            config = getattr(transformers, f"{kind.split('Vision')[0]}VisionConfig")(**VISION | changes)
        else:
            whole = {"vision_config": VISION | changes, "text_config": TEXT, "projection_dim": 6, "num_labels": 3}
            config = getattr(transformers, "MetaClip2Config" if kind.startswith("Meta") else "CLIPConfig")(**whole)
        model = moved(getattr(transformers, kind)(config))
        model.save_pretrained(folder)
    return model


@torch.no_grad()
def assert_transformers(encoder: ViT, head: nn.Module | None, model: Any, size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size)
    tower = getattr(model, "vision_model", model)
    found = tower(images, interpolate_pos_encoding=True)
    assert_close(encoded(encoder, images), tower.post_layernorm(found.last_hidden_state))
    assert_close(encoder(images), found.pooler_output)
    if head is not None:
        assert_close(head(encoder(images)), model.visual_projection(found.pooler_output))


KINDS = {  # whether there is a projection
    "CLIPVisionModel": False,
    "CLIPVisionModelWithProjection": True,
    "CLIPModel": True,
    "CLIPForImageClassification": False,
    "MetaClip2VisionModelWithProjection": True,
    "MetaClip2Model": True,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_transformers_computes_what_transformers_does(kind, tmp_path):
    model = of_transformers(kind, tmp_path)
    if KINDS[kind]:
        given = load_classifier(tmp_path)
        encoder, head = given.encoder, given.head
        assert given.classes == joint(6)
    else:
        encoder, head = load_encoder(tmp_path), None
        with pytest.raises(WeightsError, match="without a head for classes"):
            load_classifier(tmp_path)
    config = encoder.config
    assert (config.image, config.mean, config.std, config.gelu) == ((32, 32), MEAN, STD, "quick")
    tower = {name for name in load_file(tmp_path / "model.safetensors") if name.startswith(("vision_", "visual_"))}
    rest = load_file(tmp_path / "model.safetensors").keys() - tower if kind != "CLIPVisionModel" else set()
    assert set(encoder.left_aside) == rest
    for size in ((32, 32), LARGER):
        assert_transformers(encoder, head, model, size)


def test_tensors_alone_are_taken_for_openais_and_say_so(tmp_path, caplog):
    model = of_transformers("CLIPModel", tmp_path / "whole")
    before = load_file(tmp_path / "whole/model.safetensors")
    before["vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # of early releases
    path = saved(before, tmp_path / "bare/model.safetensors")
    with caplog.at_level(logging.INFO):
        encoder = load_encoder(path, heads=4)
    assert_transformers(encoder, None, model, (32, 32))
    assert untold(*[message for message in caplog.messages if "guessed" in message]) == {"gelu", "mean", "std"}
    assert "gelu=quick (" in caplog.text
    assert "vision_model.embeddings.position_ids" in encoder.left_aside


def test_settings_that_a_file_leaves_out_are_those_of_transformers(tmp_path):
    model = of_transformers("CLIPVisionModel", tmp_path, hidden_act="gelu", num_attention_heads=2)
    about = json.loads((tmp_path / "config.json").read_text())
    assert load_encoder(tmp_path).config.gelu == "erf"
    assert_transformers(load_encoder(tmp_path), None, model, (32, 32))
    del about["hidden_act"], about["layer_norm_eps"]
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert (load_encoder(tmp_path).config.gelu, load_encoder(tmp_path).config.norm_eps) == ("quick", 1e-5)
    del about["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(WeightsError, match="heads"):  # 12, which do not divide 32
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(about | {"model_type": "clipseg"}))
    with pytest.raises(WeightsError, match="model_type must be one of clip, .*, found 'clipseg'"):
        load_encoder(tmp_path)


def test_what_preprocessor_config_says_counts(tmp_path, caplog):
    of_transformers("CLIPVisionModel", tmp_path)
    says = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3, "size": 32, "crop_size": 32}
    about = says | {"feature_extractor_type": "CLIPFeatureExtractor"}  # as beside OpenAI's
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    with caplog.at_level(logging.INFO):
        encoder = load_encoder(tmp_path)
    assert (encoder.config.mean, encoder.config.std, caplog.messages) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), [])
    assert (encoder.input.fit, encoder.input.centre, encoder.input.filter) == ("crop", 1.0, "bicubic")


# SigLIP in transformers' names


def of_siglip(kind: str, folder: Path, **changes: Any) -> Any:
    vision = {name: value for name, value in VISION.items() if name != "projection_dim"} | changes
    text = {"projection_size": 32, "pad_token_id": 1, **TEXT}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "SiglipVisionModel":
            config = transformers.SiglipVisionConfig(**vision)
        else:
            config = transformers.SiglipConfig(vision_config=vision, text_config=text, num_labels=3)
        model = moved(getattr(transformers, kind)(config))
        model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["SiglipVisionModel", "SiglipModel", "SiglipForImageClassification"])
def test_siglips_tower_computes_what_transformers_does(kind, tmp_path):
    model = of_siglip(kind, tmp_path)
    labelled = kind == "SiglipForImageClassification"
    if labelled:
        given = load_classifier(tmp_path)
        encoder, head = given.encoder, given.head
        assert given.classes == ("LABEL_0", "LABEL_1", "LABEL_2")
    else:
        encoder, head = load_encoder(tmp_path), None
    config = encoder.config
    assert (config.mean, config.gelu, config.norm_eps, config.class_token) == ((0.5,), "tanh", 1e-6, False)
    for size in ((32, 32), LARGER):
        images = torch.randn(2, 3, *size)
        found = getattr(model, "vision_model", model)(images, interpolate_pos_encoding=True)
        assert_close(encoded(encoder, images), found.last_hidden_state)
        if head is None:
            assert_close(encoder(images), found.pooler_output)
        else:
            assert_close(head(encoder(images)), model(images, interpolate_pos_encoding=True).logits)
    names = load_file(tmp_path / "model.safetensors")
    used = ("vision_model.embed", "vision_model.enc", "vision_model.post", "vision_model.head", "classifier")
    rest = {name for name in names if not name.startswith(used[:3] + used[4:] if labelled else used[:4])}
    assert set(encoder.left_aside) == (rest if kind != "SiglipVisionModel" else set())
    convert(tmp_path, tmp_path / "out", "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert_close(theirs(images), encoder(images) if head is None else head(encoder(images)))


# OpenAI's names


@torch.no_grad()
def assert_openais(path: Path, tensors: dict[str, Tensor], heads: int = 2, quick: bool = True, **facts: Any) -> ViT:
    given = load_classifier(path, **facts)
    encoder = given.encoder
    tower = {name.removeprefix("visual."): value for name, value in tensors.items()}
    tower |= {name.removeprefix("visual."): value for name, value in tensors.items() if name.startswith("visual.")}
    for size in ((32, 32), LARGER):
        images = torch.randn(2, 3, *size)
        hidden = openai_clip.tokens(tower, images, heads, quick)
        last = openai_clip.normed(tower, "ln_post", hidden, 1e-5)
        assert_close(encoded(encoder, images), last)
        pooled = last[:, 0] if encoder.config.pool == "cls" else last[:, 1:].mean(1)
        assert_close(encoder(images), pooled)
        assert_close(given(images), pooled @ tower["proj"])
    return encoder


@pytest.mark.parametrize("prefix", ["visual.", ""])
def test_a_state_dict_of_openais_computes_what_its_code_does(prefix, tmp_path, caplog):
    tensors = openai_clip.state_dict(prefix=prefix)
    with caplog.at_level(logging.INFO):
        encoder = assert_openais(saved(tensors, tmp_path / "clip.safetensors"), tensors)
    assert set(encoder.left_aside) == {name for name in tensors if not name.startswith(prefix)}
    assert (encoder.config.mean, encoder.config.std) == (MEAN, STD)
    assert "gelu=quick (" in caplog.text


def test_a_checkpoint_of_open_clips_training_is_read(tmp_path):
    tensors = openai_clip.state_dict(scaled=True)
    kept = {"epoch": 1, "name": "x", "state_dict": {f"module.{name}": value for name, value in tensors.items()}}
    torch.save(kept, tmp_path / "epoch_1.pt")
    assert_openais(tmp_path / "epoch_1.pt", tensors, quick=False, gelu="erf")


def open_clips(folder: Path, tensors: dict[str, Tensor], vision: dict[str, Any], **model: Any) -> Path:
    """A folder as open_clip writes it for the hub, with transformers' config beside, as some have."""
    saved(tensors, folder / "open_clip_model.safetensors")
    about = {
        "model_cfg": {"embed_dim": 6, "vision_cfg": {"image_size": 32, "layers": 2, "width": 128} | vision} | model,
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    (folder / "config.json").write_text('{"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}')
    return folder


@pytest.mark.parametrize("quick", [True, False])
def test_a_folder_of_open_clip_tells_what_its_tensors_do_not(quick, tmp_path, caplog):
    tensors = openai_clip.state_dict()
    folder = open_clips(tmp_path, tensors, {"head_width": 32}, **({"quick_gelu": True} if quick else {}))
    with caplog.at_level(logging.INFO):
        encoder = assert_openais(folder, tensors, heads=4, quick=quick)
    assert (encoder.config.mean, encoder.config.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert "nothing in it tells" not in caplog.text


def test_a_tower_without_the_norm_before_its_blocks_says_how_it_pools(tmp_path):
    tensors = openai_clip.state_dict(pre=False)
    with pytest.raises(WeightsError, match='visual.ln_pre.weight missing; .* say pool="cls"'):
        load_encoder(saved(tensors, tmp_path / "clip.safetensors"))
    assert_openais(tmp_path / "clip.safetensors", tensors, pool="cls")
    folder = open_clips(tmp_path / "avg", tensors, {"no_ln_pre": True, "pool_type": "avg"}, quick_gelu=True)
    assert assert_openais(folder, tensors).config.pool == "avg"
    folder = open_clips(tmp_path / "map", tensors, {"pool_type": "none"})
    with pytest.raises(WeightsError, match="pool_type must be tok or avg, found 'none'"):
        load_encoder(folder)


def test_torchscript_is_refused_with_a_way_that_works(tmp_path):
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in tensors.items():
                place = self
                *parents, last = name.split(".")
                for parent in parents:
                    if not hasattr(place, parent):
                        place.add_module(parent, nn.Module())
                    place = getattr(place, parent)
                place.register_buffer(last, value)

        def forward(self, images: Tensor) -> Tensor:
            return images

    tensors, path = openai_clip.state_dict(), tmp_path / "ViT-B-32.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(Whole()).save(path)
        with pytest.raises(WeightsError, match="found TorchScript, which is code; nothing was run") as refused:
            load_encoder(path)
        line = str(refused.value)
        assert "\n" not in line
        exec(line.split("`")[1].replace("FILE", repr(str(path))).replace("weights.pth", str(tmp_path / "weights.pth")))
    assert_openais(tmp_path / "weights.pth", tensors)


# In commands


def test_a_recipe_takes_the_settings_that_the_refusal_names(towers, tmp_path):
    recipe = write_recipe(tmp_path, small_splits(tmp_path), LABELS)
    size = ("model.image=32", "model.patch=8")
    refused = run("finetune", recipe, "--from", towers, f"out={tmp_path / 'run'}", *size)
    assert refused.code == 2
    line = refused.err.strip().splitlines()[-1]
    named = re.findall(r"(\w+) (\([^)]*\)|\S+) there, ", line)
    assert {name for name, _ in named} >= {"pre_norm", "stem_bias", "gelu", "norm_eps", "mean", "std"}
    settings = [f"model.{name}={value.replace('(', '[').replace(')', ']').replace(' ', '')}" for name, value in named]
    assert run("finetune", recipe, "--from", towers, f"out={tmp_path / 'run'}", *size, *settings).code == 0
    assert load_classifier(tmp_path / "run").encoder.config.pre_norm


def test_predictions_of_a_projection_are_refused(towers, tmp_path):
    picture_folder(tmp_path / "photos", 2)
    found = run("predict", towers, tmp_path / "photos")
    assert found.code == 2
    assert "its head is CLIP's projection, which tells no classes apart; `mpp embed" in found.err
    assert run("embed", towers, tmp_path / "photos", tmp_path / "vectors.npz").code == 0


# Out again


@pytest.fixture
def towers(tmp_path: Path) -> Path:
    of_transformers("CLIPModel", tmp_path / "given")
    return tmp_path / "given"


@pytest.mark.parametrize("to", ["timm", "huggingface", "safetensors"])
@pytest.mark.parametrize("head", [True, False])
def test_what_we_write_computes_the_same_in_the_other_library(to, head, towers, tmp_path):
    given = load_classifier(towers) if head else load_encoder(towers)
    done = convert(towers, tmp_path / "out", to, head=head)
    assert done.difference == 0
    images = torch.randn(2, 3, 32, 32)
    if to == "timm":
        theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    elif to == "huggingface":
        kind = transformers.CLIPVisionModelWithProjection if head else transformers.CLIPVisionModel
        model, problems = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(problems.values())
        theirs = lambda images: model(images)["image_embeds" if head else "pooler_output"]  # noqa: E731
    else:
        theirs = (load_classifier if head else load_encoder)(tmp_path / "out")
    with torch.no_grad():
        assert_close(theirs(images), given(images))
    again = (load_classifier if head else load_encoder)(tmp_path / "out")
    if head:
        assert again.classes == joint(6)
    assert ("CLIPVision" in (tmp_path / "out/README.md").read_text()) == (to == "huggingface")


HELD: list[tuple[str, dict[str, Any], str]] = [
    ("timm", {"stem_bias": False}, "stem_bias False with pre_norm False"),
    ("timm", {"pre_norm": True}, "stem_bias True with pre_norm True"),
    ("timm", {"norm_eps": 1e-5, "swiglu": True}, "norm_eps 1e-05"),
    ("huggingface", {"stem_bias": False}, "stem_bias False"),
    ("huggingface", {"pre_norm": True, "image": (32, 32)}, "stem_bias True"),
    ("huggingface", {"pre_norm": True, "stem_bias": False, "pool": "avg", "registers": 2}, "pool avg, registers 2"),
    ("huggingface", {"pre_norm": True, "stem_bias": False}, "which is not square"),
    ("google", {"gelu": "tanh", "stem_bias": False}, "model.stem_bias False"),
    ("google", {"gelu": "tanh", "pre_norm": True}, "model.pre_norm True"),
    ("google", {"gelu": "quick"}, "model.gelu quick"),
]


@pytest.mark.parametrize(("to", "changes", "named"), HELD)
def test_what_a_format_has_no_place_for_is_named(to, changes, named, tmp_path):
    save_encoder(ViT(tiny_config(**changes)), tmp_path / "encoder.safetensors")
    with pytest.raises(mpp.export.convert.ConvertError, match=named):
        convert(tmp_path / "encoder.safetensors", tmp_path / "out", to)


def test_a_head_for_classes_has_no_place_in_transformers_clip(tmp_path):
    encoder = ViT(tiny_config(pre_norm=True, stem_bias=False, image=(32, 32)))
    save_classifier(Classifier(encoder, Head(64, 2), ("cat", "dog")), tmp_path / "classifier.safetensors")
    with pytest.raises(mpp.export.convert.ConvertError, match="a head for classes.*--encoder"):
        convert(tmp_path / "classifier.safetensors", tmp_path / "out", "huggingface")
    convert(tmp_path / "classifier.safetensors", tmp_path / "out", "huggingface", head=False)
    convert(tmp_path / "classifier.safetensors", tmp_path / "timm", "timm")


@pytest.mark.parametrize("gelu", ["erf", "tanh", "quick"])
@pytest.mark.parametrize(("pre_norm", "norm_eps"), [(True, 1e-5), (True, 1e-6), (False, 1e-5)])
def test_what_we_write_of_our_own_timm_computes(gelu, pre_norm, norm_eps, tmp_path):
    changes = {"pre_norm": pre_norm, "stem_bias": not pre_norm, "norm_eps": norm_eps, "gelu": gelu, "pool": "map"}
    encoder = shaken(ViT(tiny_config(**changes, registers=1, class_token=True, resize="bicubic_antialias"))).eval()
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    convert(tmp_path / "encoder.safetensors", tmp_path / "out", "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert_timms(encoder, None, theirs, (32, 48))
