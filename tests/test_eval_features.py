import logging

import numpy as np
import pytest
import torch
from conftest import picture_folder, shaken, tiny_config
from safetensors.torch import save_file
from tiny_runs import small_disk, small_splits

import mpp.eval.features.extract as features
from mpp.data.read import read_shards
from mpp.errors import UserError
from mpp.eval.features.extract import ProbeError, extract, kept_blocks
from mpp.models.cnn import ResNet
from mpp.models.mixers import Places
from mpp.models.resnet_config import ResNetConfig
from mpp.models.vit import ViT
from mpp.shards.index import read_index
from mpp.shards.write import make_shards


def small_vit(**changes) -> ViT:
    return shaken(ViT(tiny_config(**{"image": (16, 16), "patch": 4, "depth": 3} | changes)))


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return small_splits(tmp_path_factory.mktemp("splits"))


def close(found, expected):
    """As close as bfloat16 and float16 get."""
    return (found.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("pool", ["cls", "avg", "cls_avg"])
def test_features_are_class_token_and_average_patch_after_each_block(splits, pool):
    encoder = small_vit(pool=pool)
    found = extract(encoder, splits, "test")
    batch = read_shards(splits, 20, split="test", train=False).at(0)
    tokens, expected = encoder.embed(batch.images), {}
    tokens = tokens + encoder.positions.table[encoder.prefix :]
    if pool != "avg":
        first = (encoder.class_token + encoder.positions.table[:1]).expand(20, 1, -1)
        tokens = torch.cat([first, tokens], dim=1)
    for number, block in enumerate(encoder.blocks, 1):
        tokens = block(tokens, Places((4, 4), encoder.prefix))
        seen = encoder.norm(tokens) if number == 3 else tokens
        expected[f"average {number}"] = seen[:, encoder.prefix :].mean(1).detach()
        if pool != "avg":
            expected[f"class {number}"] = seen[:, 0].detach()
    if pool == "cls_avg":
        expected["output"] = torch.cat([expected["class 3"], expected["average 3"]], 1)
    assert found.parts.keys() == expected.keys()
    assert all(close(found.parts[name], expected[name]) for name in expected)
    assert close(found.parts[found.output], encoder(batch.images).detach())
    assert torch.equal(found.labels, batch.labels)
    assert found.numbers.tolist() == list(range(20))
    assert found.classes == ("class0", "class1")


def test_of_a_cnn_features_are_its_vector(splits):
    encoder = ResNet(ResNetConfig(image=(16, 16), depth=18, width=8, stem="small"))
    encoder.train()
    found = extract(encoder, splits, "test")
    assert encoder.training, "left as it was"
    batch = read_shards(splits, 20, split="test", train=False).at(0)
    assert list(found.parts) == [found.output] == ["output"]
    assert close(found.parts["output"], encoder.eval()(batch.images).detach())


def test_shallow_encoders_keep_all_blocks_deep_or_large_ones_the_last_four():
    assert kept_blocks(small_vit(depth=12, width=8), 1000) == list(range(1, 13))
    assert kept_blocks(small_vit(depth=13, width=8), 1000) == [10, 11, 12, 13]
    assert kept_blocks(small_vit(depth=6, width=8), 10**9) == [3, 4, 5, 6]
    assert kept_blocks(small_vit(depth=2, width=8), 10**9) == [1, 2]


def never(*_):
    raise AssertionError("computed again")


def test_kept_features_are_used_and_are_the_same(splits, tmp_path, monkeypatch):
    encoder = small_vit()
    first, plain = (
        extract(encoder, splits, "train", cache=tmp_path / "new" / "folder"),
        extract(encoder, splits, "train"),
    )
    monkeypatch.setattr(features, "_compute", never)
    again = extract(encoder, splits, "train", cache=tmp_path / "new" / "folder")
    for other in (plain, again):
        assert all(torch.equal(other.parts[name], first.parts[name]) for name in first.parts)
        assert other.parts.keys() == first.parts.keys()
        assert torch.equal(other.labels, first.labels)
        assert np.array_equal(other.numbers, first.numbers)


def test_other_weights_config_images_or_blocks_have_other_keys(splits):
    encoder, train, test = small_vit(), read_index(splits, "train"), read_index(splits, "test")
    reference = features.key(encoder, train, [1, 2])
    other = small_vit()
    other.load_state_dict(encoder.state_dict())
    assert features.key(other, train, [1, 2]) == reference
    with torch.no_grad():
        other.norm.bias[3] += 1e-6
    normed = ViT(tiny_config(image=(16, 16), patch=4, depth=3, norm_eps=1e-5))
    normed.load_state_dict(encoder.state_dict())
    keys = [features.key(other, train, [1, 2]), features.key(normed, train, [1, 2])]
    keys += [features.key(encoder, test, [1, 2]), features.key(encoder, train, [2])]
    keys += [features.key(encoder, train.select(np.arange(39)), [1, 2])]
    assert len({reference, *keys}) == 6


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 64
    path.write_bytes(data)


def damage_foreign(path):
    save_file({"numbers": torch.zeros(3)}, path)


def damage_text(path):
    path.write_text("no such thing")


def damage_none_left(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_foreign, damage_text, damage_none_left])
def test_cut_and_foreign_files_are_made_anew(splits, tmp_path, caplog, damage):
    encoder = small_vit()
    expected = extract(encoder, splits, "train", cache=tmp_path)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    damage(path)
    with caplog.at_level(logging.WARNING):
        found = extract(encoder, splits, "train", cache=tmp_path)
    assert torch.equal(found.parts["average 3"], expected.parts["average 3"])
    assert path.read_bytes() == whole
    [line] = [record.getMessage() for record in caplog.records]
    assert str(path) in line
    assert "\n" not in line


def test_a_file_under_another_key_is_not_taken(splits, tmp_path):
    one, two = small_vit(), small_vit()
    extract(one, splits, "train", cache=tmp_path)
    [path] = tmp_path.iterdir()
    foreign = path.with_name(f"{features.key(two, read_index(splits, 'train'), [1, 2, 3])}.safetensors")
    path.rename(foreign)
    expected = extract(two, splits, "train").parts["average 1"]
    assert torch.equal(extract(two, splits, "train", cache=tmp_path).parts["average 1"], expected)


def test_a_full_disk_costs_the_cache_and_not_the_result(splits, tmp_path, caplog):
    encoder = small_vit()
    with small_disk(tmp_path / "disk", 4) as folder, caplog.at_level(logging.WARNING):
        found = extract(encoder, splits, "train", cache=folder)
        assert list(folder.iterdir()) == []
    assert len(found) == 40
    [line] = [record.getMessage() for record in caplog.records]
    assert "not kept" in line


def test_a_folder_that_cannot_be_made_costs_the_cache_and_not_the_result(splits, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert len(extract(small_vit(), splits, "train", cache=tmp_path / "file" / "folder")) == 40
    assert "not kept" in caplog.text


@pytest.fixture
def partly_labelled(tmp_path):
    source = picture_folder(tmp_path / "source" / "train", 30)
    for number in range(3):
        (source / "class0" / f"{2 * number:04d}.jpg").rename(source / f"{number}.jpg")
    make_shards(tmp_path / "source", tmp_path / "some", report=lambda line: None, progress=False)
    return tmp_path / "some"


def test_images_without_label_and_damaged_ones_are_left_out(partly_labelled, tmp_path):
    index = read_index(partly_labelled, "train")
    unlabelled = set(np.flatnonzero(index.label < 0).tolist())
    assert len(unlabelled) == 3
    damaged = next(i for i in range(30) if i not in unlabelled)
    with open(partly_labelled / index.shards[0], "r+b") as file:
        file.seek(int(index.offset[damaged]) + 100)
        file.write(b"x" * 20)
    expected = [i for i in range(30) if i not in unlabelled and i != damaged]
    for _ in range(2):  # computed, then kept
        found = extract(small_vit(), partly_labelled, "train", cache=tmp_path / "cache")
        assert found.numbers.tolist() == expected
        assert found.labels.tolist() == index.label[expected].tolist()
        assert all(len(part) == len(expected) for part in found.parts.values())


def test_some_images_can_be_chosen(splits):
    found = extract(small_vit(), splits, "train")
    chosen = found.choose(np.array([30, 2, 7, 1000]))
    assert chosen.numbers.tolist() == [2, 7, 30]
    assert torch.equal(chosen.labels, found.labels[[2, 7, 30]])
    assert torch.equal(chosen.parts["average 2"], found.parts["average 2"][[2, 7, 30]])


def test_without_any_label_or_with_other_channels_or_broken_weights_it_says_so(splits, tmp_path):
    make_shards(
        picture_folder(tmp_path / "a", 4), tmp_path / "plain", labels="none", report=lambda _: None, progress=False
    )
    with pytest.raises(ProbeError, match="plain: split train has no labels"):
        extract(small_vit(), tmp_path / "plain", "train")
    with pytest.raises(UserError, match="3 channels, the encoder takes 1"):
        extract(small_vit(channels=1), splits, "train")
    broken = small_vit()
    with torch.no_grad():
        broken.norm.weight[0] = float("nan")
    with pytest.raises(ProbeError, match=r"not finite \(average 3|not finite \(class 3"):
        extract(broken, splits, "train")


def test_what_float16_has_no_room_for_stays_float32(splits):
    encoder = small_vit(pool="avg")
    with torch.no_grad():
        encoder.norm.weight[:] = 1e6
    found = extract(encoder, splits, "test")
    assert found.parts["average 3"].dtype == torch.float32
    assert found.parts["average 3"].abs().max() > 1e5
    assert found.parts["average 2"].dtype == torch.float16
