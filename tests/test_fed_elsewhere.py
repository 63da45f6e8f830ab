"""What other libraries feed an encoder: read from their files, and written so that they do as mpp does.

The references are timm's and transformers' own processing, on pictures that are not square.
"""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture_folder, shaken, tiny_config
from PIL import Image
from tiny_runs import run

import mpp
from mpp.augment.input import Input
from mpp.export import card
from mpp.export.origin import Given
from mpp.models.classifier import Classifier, Head
from mpp.models.vit import ViT
from mpp.weights import WeightsError, load_classifier, load_encoder, save_classifier, save_encoder

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

SHAPES = [(300, 300), (200, 300), (480, 160), (256, 640)]  # (h, w) of pictures
ALLOWED = 0.02  # of a probability, by rounding to whole pixels and the edge of the box


def picture(shape: tuple[int, int], seed: int = 0) -> Image.Image:
    """A smooth picture with structure at several scales, so that crops matter more than single pixels."""
    random, out = np.random.default_rng(seed), np.zeros((*shape, 3))
    for cells in (3, 6, 12):
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        out += np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC)) / 3
    return Image.fromarray(out.round().astype(np.uint8))


PICTURES = [picture(shape, seed) for seed, shape in enumerate(SHAPES)]


def classifier(fed: Input, **changes) -> Classifier:
    """One whose probabilities are far from alike."""
    torch.manual_seed(1)
    config = tiny_config(**{"image": fed.image, "resize": "bicubic", "depth": 1} | changes)
    encoder = shaken(ViT(config))
    encoder.input = fed
    head = Head(encoder.width, 3)
    torch.nn.init.normal_(head.linear.weight, std=0.1)
    return Classifier(encoder, head, ("a", "b", "c")).eval()


def converted(ours: Classifier, to: str, folder: Path) -> Path:
    save_classifier(ours, folder / "classifier.safetensors")
    mpp.convert(folder / "classifier.safetensors", folder / to, to)
    return folder / to


@torch.no_grad()
def shares(model, images: torch.Tensor) -> torch.Tensor:
    found = model(images)
    return getattr(found, "logits", found).softmax(1)


@torch.no_grad()
def by_timm(folder: Path) -> torch.Tensor:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return shares(model, torch.stack([transform(one) for one in PICTURES]))


@torch.no_grad()
def by_transformers(folder: Path) -> torch.Tensor:
    model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    process = transformers.AutoImageProcessor.from_pretrained(folder)
    images = torch.cat([process(one, return_tensors="pt")["pixel_values"] for one in PICTURES])
    return shares(model, images)


FEDS = [
    Input((64, 64)),
    Input((64, 64), centre=0.7),
    Input((64, 64), centre=0.8, filter="bicubic"),
    Input((64, 96), fit="squeeze"),
    Input((64, 64), centre=0.8, fit="squeeze", filter="bicubic"),
]


@pytest.mark.parametrize("fed", [*FEDS, Input((64, 96)), Input((64, 96), centre=0.8)])
def test_timm_does_with_pictures_as_predict(fed, tmp_path):
    ours = classifier(fed)
    expected = shares(ours, ours.prepare(*PICTURES))
    assert (by_timm(converted(ours, "timm", tmp_path)) - expected).abs().max() < ALLOWED
    back = load_classifier(tmp_path / "timm")
    assert back.input == fed
    assert torch.equal(back.prepare(*PICTURES), ours.prepare(*PICTURES))


@pytest.mark.parametrize("fed", FEDS)
def test_transformers_does_with_pictures_as_predict(fed, tmp_path):
    ours = classifier(fed, norm_eps=1e-12)
    expected = shares(ours, ours.prepare(*PICTURES))
    assert (by_transformers(converted(ours, "huggingface", tmp_path)) - expected).abs().max() < ALLOWED
    back = load_classifier(tmp_path / "huggingface")
    assert back.input == fed
    # Without our own note of it, what the processor says is the same but for whole pixels.
    path = tmp_path / "huggingface/preprocessor_config.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "mpp_input"})
    )
    read = load_classifier(tmp_path / "huggingface").input
    assert read.centre == pytest.approx(fed.centre, abs=0.01)
    assert (read.image, read.fit, read.filter) == (fed.image, fed.fit, fed.filter)


def test_what_is_seen_matters_to_these_pictures():
    """Else the tests above would show nothing: squeezed, or with another centre, they get other probabilities."""
    ours = classifier(Input((64, 64), centre=0.7))
    expected = shares(ours, ours.prepare(*PICTURES))
    for other in (Input((64, 64)), Input((64, 64), centre=0.7, fit="squeeze")):
        ours.encoder.input = other
        assert (shares(ours, ours.prepare(*PICTURES)) - expected).abs().max() > 0.1


def test_where_transformers_can_not_crop_the_folder_says_so(tmp_path):
    ours = classifier(Input((32, 48)), norm_eps=1e-12)
    folder = converted(ours, "huggingface", tmp_path)
    assert "squeezes every picture, which mpp crops, to 32x48" in (folder / "README.md").read_text()
    square = Image.fromarray(np.asarray(picture((64, 96))))  # of the encoder's own aspect it is the same
    process = transformers.AutoImageProcessor.from_pretrained(folder)
    found = process(square, return_tensors="pt")["pixel_values"]
    assert (found - ours.encoder.normalise(ours.prepare(square))).abs().max() < 0.05


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour_pictures_pass_through_the_processor(channels, tmp_path):
    ours = classifier(Input((32, 32), centre=0.7), norm_eps=1e-12, channels=channels, mean=(0.4,), std=(0.2,))
    folder = converted(ours, "huggingface", tmp_path)
    one = picture((70, 140)).convert({1: "L", 3: "RGB"}[channels])
    found = transformers.AutoImageProcessor.from_pretrained(folder)(one, return_tensors="pt")["pixel_values"]
    assert found.shape == (1, channels, 32, 32)
    assert (found - ours.encoder.normalise(ours.prepare(one))).abs().mean() < 0.1


def ran(snippet: str, given: Path, names: dict) -> None:
    """Runs Python of a README, with another picture."""
    start = snippet.index("picture = Image.new")
    exec(snippet[:start] + f"picture = Image.open({str(given)!r})" + snippet[snippet.index("\n", start) :], names)


def test_the_exported_programs_readme_prepares_a_picture_as_predict(tmp_path, monkeypatch):
    fed = Input((32, 32), centre=0.7)
    ours, one = classifier(fed), picture((70, 140))
    one.save(tmp_path / "picture.png")
    monkeypatch.chdir(converted(ours, "export", tmp_path))
    [snippet] = [block for block in Path("README.md").read_text().split("```python\n") if "tall, wide" in block]
    ran(snippet.split("```")[0], tmp_path / "picture.png", names := {})
    assert (names["images"].int() - ours.prepare(one).int()).abs().max() <= 1
    torch.testing.assert_close(names["outputs"], ours(ours.prepare(one)), atol=0.02, rtol=0)
    torch.export.load("model.pt2", extra_files=(extra := {"input.json": ""}))
    said = json.loads(extra["input.json"])
    assert Input(**said | {"image": tuple(said["image"])}) == fed


@pytest.mark.parametrize("fed", [Input((32, 48)), Input((32, 48), 0.9, "squeeze", "bicubic"), Input((32, 32), 0.3)])
@pytest.mark.parametrize("shape", [(70, 140), (33, 21)])
def test_python_for_one_picture_is_what_predict_does(fed, shape, tmp_path):
    ours, one = classifier(fed), picture(shape)
    one.save(tmp_path / "picture.png")
    given = Given(tmp_path, tmp_path, "mpp", ours.encoder, ours.head, ours.classes)
    ran(f"import numpy, torch\nfrom PIL import Image\n{card.prepared(given)}", tmp_path / "picture.png", names := {})
    assert (names["images"].int() - ours.prepare(one).int()).abs().max() <= 1


def test_predict_of_what_was_converted_is_predict(tmp_path):
    folder = picture_folder(tmp_path / "photos", 6, (40, 64), classes=3)
    ours = classifier(Input((32, 32), centre=0.7))
    written = {}
    for to in ("timm", "safetensors"):
        converted(ours, to, tmp_path)
        assert run("predict", tmp_path / to, folder, "--out", tmp_path / f"{to}.csv").code == 0
        written[to] = (tmp_path / f"{to}.csv").read_text()
    assert run("predict", tmp_path / "classifier.safetensors", folder, "--out", tmp_path / "ours.csv").code == 0
    assert (tmp_path / "ours.csv").read_text() == written["safetensors"] == written["timm"]


def test_google_keeps_it_by_what_the_readme_says_to_tell(tmp_path):
    fed = Input((32, 32), centre=0.7, filter="bicubic")
    ours = classifier(fed, gelu="tanh", norm_eps=1e-6)
    folder = converted(ours, "google", tmp_path)
    assert "centre=0.7" in (folder / "README.md").read_text()
    assert load_encoder(folder / "model.npz", heads=2, centre=0.7, filter="bicubic").input == fed


# What files say


def timm_folder(folder: Path, **told) -> Path:
    """A folder of timm's whose pretrained_cfg says what it is fed."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, num_heads=2, depth=1, num_classes=3
    )
    from timm.models import save_for_hf

    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": 1}
    save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"] |= {"input_size": [3, 32, 32], **told}
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "told",
    [
        {"crop_pct": 0.8, "interpolation": "bicubic", "crop_mode": "center"},
        {"crop_pct": 1.0, "interpolation": "bilinear", "crop_mode": "squash"},
        {"crop_pct": 0.8, "interpolation": "bicubic", "crop_mode": "squash"},
    ],
)
def test_timms_pictures_are_made_as_timm_makes_them(told, tmp_path):
    folder = timm_folder(tmp_path / "timm", **told)
    assert (load_classifier(folder).prepare(*PICTURES).float() - timms(folder)).abs().mean() < 4  # grey levels


def timms(folder: Path) -> torch.Tensor:
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    names = ("input_size", "interpolation", "crop_pct", "crop_mode")
    told = {name: config[name] for name in names} | {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    transform = timm.data.create_transform(**told)
    return 255 * torch.stack([transform(one) for one in PICTURES])


@pytest.mark.parametrize(
    ("told", "said", "fed"),
    [
        (
            {"interpolation": "lanczos"},
            "interpolation lanczos is not done here; bicubic is",
            Input((32, 32), 0.9, filter="bicubic"),
        ),
        (
            {"crop_mode": "border"},
            "crop_mode border is not done here; center is",
            Input((32, 32), 0.9, filter="bicubic"),
        ),
        (
            {"crop_pct": 1.14},
            "crop_pct 1.14, a frame around the picture, is not done here",
            Input((32, 32), filter="bicubic"),
        ),
    ],
)
def test_what_timm_does_and_we_do_not_is_said(told, said, fed, tmp_path, caplog):
    folder = timm_folder(tmp_path / "timm", **{"crop_pct": 0.9, "interpolation": "bicubic"} | told)
    with caplog.at_level(logging.WARNING):
        assert load_encoder(folder).input == fed
    assert [said in line for line in caplog.messages] == [True]


def hf_folder(folder: Path, processor, dinov2: bool = False) -> Path:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    if dinov2:
        transformers.Dinov2Model(transformers.Dinov2Config(mlp_ratio=2, **sizes)).save_pretrained(folder)
    else:
        transformers.ViTModel(transformers.ViTConfig(intermediate_size=64, **sizes)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


PROCESSORS = {
    "vit": lambda: transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
    "bit": lambda: transformers.BitImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}, resample=3
    ),
    "clip": lambda: transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "convnext": lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
    "convnext large": lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": 384}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_transformers_pictures_are_made_as_it_makes_them(name, tmp_path, caplog):
    processor = PROCESSORS[name]()
    folder = hf_folder(tmp_path / "hf", processor, dinov2=name == "convnext large")
    with caplog.at_level(logging.WARNING):
        encoder = load_encoder(folder)
    assert not caplog.messages
    made = torch.cat([processor(one, return_tensors="pt")["pixel_values"] for one in PICTURES])
    assert made.shape[2:] == encoder.input.image
    ours = (encoder.prepare(*PICTURES) / 255 - torch.tensor(processor.image_mean).reshape(-1, 1, 1)) / torch.tensor(
        processor.image_std
    ).reshape(-1, 1, 1)
    assert (ours - made).abs().mean() < 0.05


def test_a_dinov2_folder_is_fed_images_of_its_processors_size_and_keeps_its_positions(tmp_path):
    folder = hf_folder(tmp_path / "dinov2", transformers.BitImageProcessor(size=20, crop_size=16), dinov2=True)
    encoder = load_encoder(folder)
    assert (encoder.config.image, encoder.input) == ((32, 32), Input((16, 16), 0.8, filter="bicubic"))
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    assert load_encoder(tmp_path / "encoder.safetensors").input == encoder.input
    theirs = transformers.Dinov2Model.from_pretrained(folder).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = theirs(pixels).last_hidden_state[:, 0]
        for way in (encoder, load_encoder(folder, image=16)):
            torch.testing.assert_close(way(pixels), expected, rtol=2e-5, atol=2e-5)
    assert load_encoder(folder, image=32).input.image == (32, 32)
    photos = picture_folder(tmp_path / "photos", 4, (40, 64))
    for size in ((), ("--image", "24"), ("--image", "16x32")):
        assert run("embed", folder, photos, tmp_path / "e.npz", *size).code == 0
    assert run("convert", folder, tmp_path / "timm", "--to", "timm").code == 2 or (tmp_path / "timm").is_dir()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"resample": 1}, "resample lanczos is not done here; bicubic is, in its place"),
        ({"do_resize": False}, "pictures are not resized there"),
        ({"size": {"shortest_edge": 32}}, "pictures that are not square stay so there"),
        ({"size": {"height": 48, "width": 48}}, "it makes images of 48x48, the model takes 32x32, which are made here"),
    ],
)
def test_what_transformers_does_and_we_do_not_is_said(changes, said, tmp_path, caplog):
    folder = hf_folder(tmp_path / "hf", PROCESSORS["vit"]())
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with caplog.at_level(logging.WARNING):
        assert load_encoder(folder).input.image == (32, 32)
    assert [said in line for line in caplog.messages] == [True]


@pytest.mark.parametrize("size", [{"longest_edge": 32}, "large", [32, 32], -1, {"height": 32}])
def test_a_processors_size_that_can_not_be_is_one_line(size, tmp_path):
    folder = hf_folder(tmp_path / "hf", PROCESSORS["vit"]())
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": size}))
    with pytest.raises(WeightsError, match="preprocessor_config.json: expected a size of height and width"):
        load_encoder(folder)


# A size that is asked for


def test_our_own_files_take_a_size_and_a_centre(tmp_path):
    encoder = shaken(ViT(tiny_config(resize="bicubic"))).eval()
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    found = load_encoder(tmp_path / "encoder.safetensors", image=(16, 64), centre=0.5)
    assert (found.config.image, found.input) == ((16, 64), Input((16, 64), centre=0.5))
    images = torch.randint(0, 256, (2, 3, 16, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(found(images), encoder(images), rtol=1e-5, atol=1e-5)
    assert load_encoder(tmp_path / "encoder.safetensors", image=64).config.image == (64, 64)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"image": 30}, r"image=30x30: model.image \(30, 30\) must be a multiple of model.patch \(8\)"),
        ({"image": 0}, "image must be two sides of at least 1 pixel"),
        ({"image": (8, 8, 8)}, "image must be two sides"),
        ({"image": "224"}, "image must be two sides"),
        ({"image": 8.0}, "image"),
        ({"centre": 2}, "centre must be in"),
        ({"heads": 2}, "heads can't be given"),
    ],
)
def test_a_size_that_can_not_be_is_one_line(asked, said, tmp_path):
    save_encoder(ViT(tiny_config()), tmp_path / "encoder.safetensors")
    with pytest.raises(WeightsError, match=said) as caught:
        load_encoder(tmp_path / "encoder.safetensors", **asked)
    assert "\n" not in str(caught.value)
    assert "encoder.safetensors" in str(caught.value)


def test_a_mixer_that_has_weights_for_one_size_says_so(tmp_path):
    save_encoder(ViT(tiny_config(mixer=("mlp",), pool="avg")), tmp_path / "encoder.safetensors")
    with pytest.raises(WeightsError, match="image=16x16: model: image"):
        load_encoder(tmp_path / "encoder.safetensors", image=16)


@pytest.mark.parametrize("size", ["48", "32x64"])
def test_timm_at_another_size_is_timm(size, tmp_path):
    folder = timm_folder(tmp_path / "timm")
    sides = tuple(map(int, (size + "x" + size).split("x")[:2]))
    theirs = timm.create_model(
        f"local-dir:{folder}", pretrained=True, img_size=sides, pretrained_cfg_overlay={"input_size": (3, *sides)}
    ).eval()
    ours = load_classifier(folder, image=sides)
    pixels = torch.randn(2, 3, *sides)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), theirs(pixels), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("verb", ["probe", "embed", "predict"])
def test_a_size_on_the_command_line_is_checked(verb, tmp_path):
    save_classifier(classifier(Input((32, 32))), tmp_path / "classifier.safetensors")
    picture_folder(tmp_path / "photos", 2)
    place = ("--data", tmp_path / "photos") if verb == "probe" else (tmp_path / "photos",)
    out = (tmp_path / "e.npz",) if verb == "embed" else ()
    done = run(verb, tmp_path / "classifier.safetensors", *place, *out, "--image", "30")
    assert (done.code, "image=30x30: model.image (30, 30) must be a multiple" in done.err) == (2, True)
    assert "expected PIXELS, or HEIGHTxWIDTH" in run(verb, tmp_path, *place, *out, "--image", "big").err


def test_a_bare_file_of_as_many_patches_is_taken_at_the_users_word_and_says_so(tmp_path, caplog):
    ours = classifier(Input((16, 64)), gelu="tanh", norm_eps=1e-6)  # 2 x 8 patches, as a square of 4 x 4
    folder = converted(ours, "google", tmp_path)
    with caplog.at_level(logging.WARNING):
        found = load_encoder(folder / "model.npz", heads=2, image=(16, 64))
    assert "its positions are taken to be for 2x8 patches, as image= says" in caplog.text
    images = torch.randint(0, 256, (2, 3, 16, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(found(images), ours.encoder(images), rtol=1e-5, atol=1e-5)
