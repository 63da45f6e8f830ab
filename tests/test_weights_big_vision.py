"""big_vision's .npz, against a plain numpy forward of what they hold."""

from pathlib import Path

import numpy as np
import numpy_vit
import pytest
import torch

from mpp.weights import big_vision, files, foreign
from mpp.weights.files import WeightsError

SIZES = {"grid": (3, 3), "side": 8, "width": 32, "depth": 2, "heads": 4, "hidden": 80, "classes": 5}
KINDS = {
    "gap, sine-cosine, pre-logits": {**SIZES, "pool": "gap", "grid": None, "pre_logits": 32},
    "gap, learned": {**SIZES, "pool": "gap"},
    "map, learned": {**SIZES, "pool": "map"},
    "map, sine-cosine, no head": {**SIZES, "pool": "map", "grid": None, "classes": 0},
    "tok, learned": {**SIZES, "pool": "tok"},
    "tok, sine-cosine": {**SIZES, "pool": "tok", "grid": None},
}


def saved(arrays: numpy_vit.Arrays, folder: Path, prefix: str = "params/") -> Path:
    path = folder / "model.npz"
    np.savez(path, **{f"{prefix}{name}": array for name, array in arrays.items()})
    return path


def loaded(path: Path, **facts) -> foreign.Foreign:
    return foreign.load(files.read(path), facts)


def error_of(arrays: numpy_vit.Arrays, folder: Path, **facts) -> str:
    with pytest.raises(WeightsError) as error:
        loaded(saved(arrays, folder), **facts)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_equal_outputs(found: foreign.Foreign, images: np.ndarray, expected: numpy_vit.Outputs) -> None:
    """Tokens, vectors and logits of images (b, h, w, c)."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        tokens = found.encoder.encode(found.encoder.embed(pixels), grid=found.encoder.grid(pixels))
        vectors = found.encoder.pool(tokens)
        logits = None if found.head is None else found.head(vectors)
    for ours, theirs in zip((tokens, vectors, logits), expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.shape == theirs.shape
            assert np.abs(ours.numpy() - theirs).max() <= 2e-5 * np.abs(theirs).max()


def pictures_of(grid: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (2, grid[0] * 8, grid[1] * 8, 3)).astype(np.float32)


@pytest.mark.parametrize("grid", [(3, 3), (5, 7)], ids=["native", "higher and not square"])
@pytest.mark.parametrize("scan", [False, True], ids=["blocks", "scan"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_big_visions(kind: str, scan: bool, grid: tuple[int, int], tmp_path: Path) -> None:
    arrays = numpy_vit.drawn(numpy_vit.big_vision_shapes(**KINDS[kind]))
    found = loaded(saved(numpy_vit.stacked(arrays) if scan else arrays, tmp_path))
    assert found.format == "big_vision"
    images = pictures_of(grid)
    assert_equal_outputs(found, images, numpy_vit.big_vision(arrays, images, (3, 3)))


def test_positions_that_are_not_square_need_the_image(tmp_path: Path) -> None:
    arrays = numpy_vit.drawn(numpy_vit.big_vision_shapes(**{**KINDS["tok, learned"], "grid": (2, 4)}))
    found = loaded(saved(arrays, tmp_path), image=(16, 32))
    for grid in ((2, 4), (4, 5)):
        images = pictures_of(grid)
        assert_equal_outputs(found, images, numpy_vit.big_vision(arrays, images, (2, 4)))
    arrays = numpy_vit.drawn(numpy_vit.big_vision_shapes(**{**KINDS["gap, learned"], "grid": (2, 3)}))
    assert "image=(h, w)" in error_of(arrays, tmp_path)


@pytest.mark.parametrize("pool", ["tok", "gap"])
@pytest.mark.parametrize("place", ["pos_embedding", "Transformer/pos_embedding"])
def test_positions_until_2022_had_a_row_for_the_class_token(place: str, pool: str, tmp_path: Path) -> None:
    arrays = numpy_vit.drawn(numpy_vit.big_vision_shapes(**{**SIZES, "pool": pool}))
    old = dict(arrays)
    token = np.random.default_rng(3).standard_normal((1, 1, 32)).astype(np.float32)
    old[place] = np.concatenate([token, old.pop("pos_embedding")], axis=1)
    if pool == "tok":  # big_vision adds it to the class token when it loads such a file
        arrays["cls"] = arrays["cls"] + token
    for grid in ((3, 3), (5, 7)):
        images = pictures_of(grid)
        assert_equal_outputs(loaded(saved(old, tmp_path)), images, numpy_vit.big_vision(arrays, images, (3, 3)))


def test_blocks_of_the_old_numbering_load(tmp_path: Path) -> None:
    arrays = numpy_vit.drawn(numpy_vit.big_vision_shapes(**KINDS["gap, sine-cosine, pre-logits"]))
    old = {}
    for name, array in arrays.items():
        for today, before in zip(numpy_vit.LINEN, numpy_vit.GOOGLE, strict=True):
            if f"/{today}/" in name:
                name = name.replace(f"/{today}/", f"/{before}/")
                break
        old[name] = array
    images = pictures_of((3, 3))
    found = loaded(saved(old, tmp_path, "opt/target/"))
    assert_equal_outputs(found, images, numpy_vit.big_vision(arrays, images, (3, 3)))


def test_of_two_towers_the_images_is_read(tmp_path: Path) -> None:
    arrays = numpy_vit.drawn(numpy_vit.big_vision_shapes(**{**SIZES, "pool": "map", "classes": 0}))
    both = {f"img/{name}": array for name, array in arrays.items()}
    text = {"txt/Embed_0/embedding": (9, 4), "txt/Encoder_0/encoder_norm/bias": (4,), "txt/head/kernel": (4, 4)}
    both |= {name: np.zeros(shape, np.float32) for name, shape in {**text, "t": (1,), "b": (1,)}.items()}
    found = loaded(saved(both, tmp_path))
    assert set(found.aside) == {*text, "t", "b"}
    images = pictures_of((5, 7))
    assert_equal_outputs(found, images, numpy_vit.big_vision(arrays, images, (3, 3)))
    del both["img/MAPHead_0/probe"]
    assert "img/MAPHead_0/probe missing" in error_of(both, tmp_path)


def test_settings_are_big_visions(tmp_path: Path) -> None:
    shapes = numpy_vit.big_vision_shapes(**KINDS["gap, sine-cosine, pre-logits"])
    found = loaded(saved(numpy_vit.drawn(shapes), tmp_path)).encoder.config
    assert (found.positions, found.pool, found.gelu, found.norm_eps) == ("sincos2d", "avg", "tanh", 1e-6)
    assert (found.heads, found.hidden, found.image, found.mean, found.std) == (4, 80, (224, 224), (0.5,), (0.5,))


@pytest.mark.parametrize("scan", [False, True], ids=["blocks", "scan"])
def test_what_is_missing_unexpected_or_of_another_shape_is_named(scan: bool, tmp_path: Path) -> None:
    arrays = numpy_vit.drawn(numpy_vit.big_vision_shapes(**KINDS["map, learned"]))
    arrays = numpy_vit.stacked(arrays) if scan else arrays
    for name in arrays:
        if name != "pos_embedding":  # without which positions are sine-cosine
            without = {other: array for other, array in arrays.items() if other != name}
            assert f"{name} missing" in error_of(without, tmp_path), name
            longer = np.concatenate([arrays[name], arrays[name]])
            assert name in error_of({**arrays, name: longer}, tmp_path), name
        error_of({**arrays, name: np.float32(1.0)}, tmp_path)
    assert "more unexpected" in error_of({**arrays, "more": np.zeros(3, np.float32)}, tmp_path)


def test_heads_that_contradict_the_file_are_refused(tmp_path: Path) -> None:
    arrays = numpy_vit.drawn(numpy_vit.big_vision_shapes(**KINDS["gap, learned"]))
    assert "heads=2, where the file has 4" in error_of(arrays, tmp_path, heads=2)


def test_it_is_recognised_by_its_blocks() -> None:
    names = {"params": False, "blocks.0.norm1.weight": False, "Transformer/encoderblock/LayerNorm_0/scale": True}
    for name, expected in names.items():
        source = files.Source(Path("x"), {name: torch.zeros(1)})
        assert big_vision.recognises(source) == expected
