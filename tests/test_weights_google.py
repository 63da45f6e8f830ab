"""Google's .npz, against a plain numpy forward of what they hold."""

import io
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy_vit
import pytest
import torch
from conftest import shaken

from mpp.models.classifier import Head
from mpp.models.vit import ViT
from mpp.models.vit_config import ViTConfig
from mpp.weights import files, foreign, google
from mpp.weights.files import WeightsError

SIZES = {"grid": (3, 3), "side": 8, "width": 32, "depth": 2, "heads": 4, "hidden": 80, "classes": 5}
TINY = {**SIZES, "side": 2, "stages": (1,), "width": 48}  # patches of 8 of a hybrid
KINDS = {
    "token": SIZES,
    "pre_logits": {**SIZES, "pre_logits": 12},
    "no head": {**SIZES, "classes": 0},
    "gap": {**SIZES, "token": False},
    "hybrid": TINY,
    "hybrid of three stages": {**TINY, "side": 1, "stages": (2, 1, 2), "grid": (2, 2), "depth": 1},
    "hybrid of the root alone": {**TINY, "stages": ()},
    "narrow hybrid": {**TINY, "root": 32},
    "wide hybrid": {**TINY, "root": 96, "stages": (1, 1), "side": 1},
    "one channel": {**SIZES, "channels": 1},
    "vit_jax's own checkpoints": {**SIZES, "names": numpy_vit.LINEN},
}


def saved(arrays: numpy_vit.Arrays, folder: Path) -> Path:
    path = folder / "model.npz"
    np.savez(path, **arrays)
    return path


def loaded(path: Path, **facts) -> foreign.Foreign:
    return foreign.load(files.read(path), facts)


def error_of(arrays: numpy_vit.Arrays, folder: Path, **facts) -> str:
    with pytest.raises(WeightsError) as error:
        loaded(saved(arrays, folder), **facts)
    assert "\n" not in str(error.value)
    return str(error.value)


def outputs(found: foreign.Foreign, images: np.ndarray) -> list[np.ndarray | None]:
    """Tokens, vectors and logits of images (b, h, w, c)."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        tokens = found.encoder.encode(found.encoder.embed(pixels), grid=found.encoder.grid(pixels))
        vectors = found.encoder.pool(tokens)
        logits = None if found.head is None else found.head(vectors).numpy()
    return [tokens.numpy(), vectors.numpy(), logits]


def assert_equal_outputs(found: foreign.Foreign, images: np.ndarray, expected: numpy_vit.Outputs) -> None:
    for ours, theirs in zip(outputs(found, images), expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.shape == theirs.shape
            assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()


def pictures_of(grid: tuple[int, int], patch: int, channels: int = 3) -> np.ndarray:
    shape = (2, grid[0] * patch, grid[1] * patch, channels)
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize("grid", [None, (5, 7)], ids=["native", "higher and not square"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_paper(kind: str, grid: tuple[int, int] | None, tmp_path: Path) -> None:
    sizes = KINDS[kind]
    arrays = numpy_vit.drawn(numpy_vit.google_shapes(**sizes))
    found = loaded(saved(arrays, tmp_path))
    assert found.format == "google"
    assert found.encoder.config.grid == sizes["grid"]
    images = pictures_of(grid or sizes["grid"], found.encoder.config.patch, sizes.get("channels", 3))
    expected = numpy_vit.google(arrays, images, sizes["grid"], sizes.get("names", numpy_vit.GOOGLE))
    assert_equal_outputs(found, images, expected)


def test_bytes_are_scaled_as_vit_jax_does(tmp_path: Path) -> None:
    arrays = numpy_vit.drawn(numpy_vit.google_shapes(**SIZES))
    found = loaded(saved(arrays, tmp_path))
    pixels = np.random.default_rng(2).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    _, vectors, _ = numpy_vit.google(arrays, (pixels - 127.5) / 127.5, (3, 3))
    with torch.no_grad():
        ours = found.encoder(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    assert np.abs(ours - vectors).max() <= 2e-5 * np.abs(vectors).max()


def test_group_norms_of_published_files_have_four_axes(tmp_path: Path) -> None:
    arrays = numpy_vit.drawn(numpy_vit.google_shapes(**TINY))
    images = pictures_of((3, 3), 8)
    expected = numpy_vit.google(arrays, images, (3, 3))
    for name in arrays:
        if re.search(r"gn(_root|\d|_proj)/", name):
            arrays[name] = arrays[name].reshape(1, 1, 1, -1)
    assert_equal_outputs(loaded(saved(arrays, tmp_path)), images, expected)


def test_an_image_that_is_not_square_is_a_fact(tmp_path: Path) -> None:
    arrays = numpy_vit.drawn(numpy_vit.google_shapes(**{**SIZES, "grid": (2, 4)}))
    assert "image=(h, w)" in error_of(arrays, tmp_path)
    for grid in ((2, 4), (4, 5)):
        images = pictures_of(grid, 8)
        assert_equal_outputs(
            loaded(saved(arrays, tmp_path), image=(16, 32)), images, numpy_vit.google(arrays, images, (2, 4))
        )


def test_what_is_missing_unexpected_or_of_another_shape_is_named(tmp_path: Path) -> None:
    arrays = numpy_vit.drawn(numpy_vit.google_shapes(**SIZES))
    for name in arrays:
        without = {other: array for other, array in arrays.items() if other != name}
        if name in ("cls", "head/kernel", "head/bias"):
            continue
        assert f"{name} missing" in error_of(without, tmp_path), name
        wrong = np.zeros((*arrays[name].shape, 2), np.float32)
        assert name in error_of({**arrays, name: wrong}, tmp_path), name
        if name != "Transformer/posembed_input/pos_embedding":  # whose length says for which image it is
            longer = np.concatenate([arrays[name], arrays[name]])
            assert name in error_of({**arrays, name: longer}, tmp_path), name
    assert "head/bias missing" in error_of({n: a for n, a in arrays.items() if n != "head/bias"}, tmp_path)
    assert "head/kernel missing" in error_of({n: a for n, a in arrays.items() if n != "head/kernel"}, tmp_path)
    assert "more/kernel unexpected" in error_of({**arrays, "more/kernel": np.zeros(3, np.float32)}, tmp_path)


@pytest.mark.parametrize("name", ["conv_root/kernel", "gn_root/bias", "block1/unit1/gn_proj/scale"])
def test_of_a_hybrid_too(name: str, tmp_path: Path) -> None:
    arrays = numpy_vit.drawn(numpy_vit.google_shapes(**TINY))
    assert f"{name} missing" in error_of({n: a for n, a in arrays.items() if n != name}, tmp_path)
    assert name in error_of({**arrays, name: np.zeros((3, *arrays[name].shape), np.float32)}, tmp_path)


def test_facts_that_contradict_the_file_are_refused(tmp_path: Path) -> None:
    arrays = numpy_vit.drawn(numpy_vit.google_shapes(**SIZES))
    assert "heads=2, where the file has 4" in error_of(arrays, tmp_path, heads=2)
    assert loaded(saved(arrays, tmp_path), heads=4).encoder.config.heads == 4


def test_pre_logits_without_a_head_are_left_aside(tmp_path: Path) -> None:
    arrays = numpy_vit.drawn(numpy_vit.google_shapes(**{**SIZES, "pre_logits": 12, "classes": 0}))
    found = loaded(saved(arrays, tmp_path))
    assert found.head is None
    assert found.aside == ("pre_logits/bias", "pre_logits/kernel")


def test_positions_none_is_a_fact(tmp_path: Path) -> None:
    arrays = numpy_vit.drawn(numpy_vit.google_shapes(**SIZES))
    del arrays["Transformer/posembed_input/pos_embedding"]
    found = loaded(saved(arrays, tmp_path), positions="none")
    arrays["Transformer/posembed_input/pos_embedding"] = np.zeros((1, 10, 32), np.float32)
    images = pictures_of((3, 3), 8)
    assert_equal_outputs(found, images, numpy_vit.google(arrays, images, (3, 3)))


# Published models


PUBLISHED = {  # parameters without the head where known exactly; timm has the same models
    "B/16": ({"side": 16, "grid": (14, 14), "width": 768, "depth": 12, "heads": 12, "hidden": 3072}, 85_798_656),
    "L/16": ({"side": 16, "grid": (14, 14), "width": 1024, "depth": 24, "heads": 16, "hidden": 4096}, 303_301_632),
    "R50+B/16": (
        {"side": 1, "grid": (14, 14), "width": 768, "depth": 12, "heads": 12, "hidden": 3072, "stages": (3, 4, 9)},
        None,
    ),
    "R26+S/32": (
        {"side": 1, "grid": (7, 7), "width": 384, "depth": 12, "heads": 6, "hidden": 1536, "stages": (2, 2, 2, 2)},
        None,
    ),
}
TIMM = {"R50+B/16": "vit_base_r50_s16_224", "R26+S/32": "vit_small_r26_s32_224", "L/16": "vit_large_patch16_224"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_a_place_for_each_tensor(name: str) -> None:
    sizes, count = PUBLISHED[name]
    shapes = numpy_vit.google_shapes(**sizes)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    found = google.layout(files.Source(Path("x.npz"), tensors), {})
    assert found.config.image == (224, 224)
    with torch.device("meta"):
        encoder = ViT(found.config)
    expected = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    assert found.encoder.keys() == expected.keys()
    read = {key: tuple(p.read(*(tensors[n] for n in p.names)).shape) for key, p in found.encoder.items()}
    assert read == expected
    total = sum(value.numel() for value in tensors.values())
    assert sum(parameter.numel() for parameter in encoder.parameters()) == total
    assert count in (None, total)
    if name in TIMM:
        timm = pytest.importorskip("timm")
        with torch.device("meta"):
            theirs = timm.create_model(TIMM[name], num_classes=0)
        assert sum(parameter.numel() for parameter in theirs.parameters()) == total


# Writing

WRITABLE = {
    "token": {},
    "gap": {"pool": "avg"},
    "hybrid": {"stem": "hybrid", "stages": (1, 2), "patch": 16, "image": (48, 48)},
    "wide hybrid": {"stem": "hybrid", "stages": (1,), "stem_width": 128, "patch": 8},
    "mlp": {"mlp": 80},
    "channels": {"channels": 4},
    "other interpolation": {"resize": "bicubic"},
}


def writable(**changes) -> ViT:
    settings = {"image": (24, 24), "patch": 8, "width": 32, "depth": 2, "heads": 4, "gelu": "tanh"} | changes
    return shaken(ViT(ViTConfig(**settings)))


def head_of(width: int, hidden: int) -> Head:
    head = Head(width, 5, hidden)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head


def arrays_of(content: dict[str, bytes]) -> numpy_vit.Arrays:
    assert list(content) == ["model.npz"]
    with np.load(io.BytesIO(content["model.npz"]), allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize("hidden", [None, 0, 12], ids=["no head", "head", "pre-logits"])
@pytest.mark.parametrize("kind", WRITABLE)
def test_what_is_written_reads_back_bit_for_bit(kind: str, hidden: int | None, tmp_path: Path) -> None:
    encoder = writable(**WRITABLE[kind])
    head = None if hidden is None else head_of(encoder.width, hidden)
    path = tmp_path / "model.npz"
    path.write_bytes(google.write(encoder, head, ())["model.npz"])
    found = loaded(path)
    for ours, theirs in ((encoder, found.encoder), (head, found.head)):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            before, after = ours.state_dict(), theirs.state_dict()
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
    same = replace(encoder.config, resize="bilinear", mlp=encoder.config.hidden, class_token=None)
    assert replace(found.encoder.config, class_token=None, stages=same.stages) == same


@pytest.mark.parametrize("hidden", [0, 12])
@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_a_written_file_has_the_names_and_shapes_of_googles(pool: str, hidden: int) -> None:
    arrays = arrays_of(google.write(writable(pool=pool), head_of(32, hidden), ()))
    sizes = {**SIZES, "hidden": 128, "pre_logits": hidden, "token": pool == "cls"}
    assert {name: array.shape for name, array in arrays.items()} == numpy_vit.google_shapes(**sizes)
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    images = pictures_of((3, 3), 8)
    encoder = writable(pool=pool)
    arrays = arrays_of(google.write(encoder, None, ()))
    found = foreign.Foreign("google", encoder, None, (), ())
    assert_equal_outputs(found, images, numpy_vit.google(arrays, images, (3, 3)))


def test_a_written_hybrid_has_the_names_and_shapes_of_googles() -> None:
    encoder = writable(stem="hybrid", stages=(1, 2), patch=16, image=(48, 48))
    sizes = {**SIZES, "side": 2, "hidden": 128, "classes": 0, "stages": (1, 2)}
    arrays = arrays_of(google.write(encoder, None, ()))
    assert {name: array.shape for name, array in arrays.items()} == numpy_vit.google_shapes(**sizes)


@pytest.mark.parametrize("positions", ["sincos2d", "sincos2d_mae", "sincos2d_timm", "learned2d"])
def test_other_positions_are_written_as_a_table(positions: str) -> None:
    encoder = writable(positions=positions)
    arrays = arrays_of(google.write(encoder, None, ()))
    images = pictures_of((3, 3), 8)
    found = foreign.Foreign("google", encoder, None, (), ())
    assert_equal_outputs(found, images, numpy_vit.google(arrays, images, (3, 3)))


def test_no_positions_are_written_as_none(tmp_path: Path) -> None:
    encoder = writable(positions="none")
    path = tmp_path / "model.npz"
    path.write_bytes(google.write(encoder, None, ())["model.npz"])
    found = loaded(path, positions="none", image=(24, 24))
    assert all(torch.equal(value, found.encoder.state_dict()[name]) for name, value in encoder.state_dict().items())


def test_equal_weights_give_equal_bytes() -> None:
    encoder = writable()
    content = google.write(encoder, None, ())["model.npz"]
    assert google.write(encoder, None, ())["model.npz"] == content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:  # no hour of writing
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


REFUSED = {
    "gelu": {"gelu": "erf"},
    "norm_eps": {"norm_eps": 1e-12},
    "norm": {"norm": "rms"},
    "swiglu": {"swiglu": True},
    "qkv_bias": {"qkv_bias": False},
    "bias": {"bias": False},
    "qk_norm": {"qk_norm": True},
    "layer_scale": {"layer_scale": 0.1},
    "registers": {"registers": 2},
    "mixer": {"mixer": ("pool", "attention")},
    "stem": {"stem": "conv"},
    "positions": {"positions": "rope"},
    "pool": {"pool": "map"},
    "class_token": {"pool": "avg", "class_token": True},
    "mean": {"mean": (0.485, 0.456, 0.406)},
    "std": {"std": (0.25,)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_format_cannot_hold_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.{name}\b.*Google's format"):
        google.write(writable(**REFUSED[name]), None, ())


@pytest.mark.parametrize("kind", WRITABLE)
def test_the_usage_is_python_with_the_models_sizes(kind: str) -> None:
    encoder = writable(**WRITABLE[kind])
    text = google.usage(encoder, head_of(32, 12))
    compile(text, "usage", "exec")
    side = {"hybrid": 2, "wide hybrid": 2}.get(kind, 8)
    assert ('"width_factor": 2}' in text) == (kind == "wide hybrid")
    for words in (f'"size": ({side}, {side})', "num_classes=5", "representation_size=12", "hidden_size=32"):
        assert words in text
    assert ('classifier="gap"' in text) == (kind == "gap")
    assert ('"num_layers": (1, 2)' in text) == (kind == "hybrid")
