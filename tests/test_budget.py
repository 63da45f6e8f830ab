"""What files of strangers may cost: each reader refuses them by its own line before the work is done."""

import io
import json
import os
import struct
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import save_file
from shard_files import three_shards

import mpp
from mpp import budget, checkpoint
from mpp.budget import Overrun
from mpp.cli import main
from mpp.errors import UserError
from mpp.models.vit import ViT
from mpp.recipe.settled import RunError, load_settled
from mpp.shards.index import read_index
from mpp.weights import own
from mpp.weights.files import WeightsError, read


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


NEVER = pytest.mark.parametrize("put", [pipe, endless])


@NEVER
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"])
def test_what_lies_beside_weights_is_opened_only_as_a_regular_file(put, name, tmp_path):
    file = "model.safetensors" if "index" not in name else "part.safetensors"
    save_file({"w": torch.ones(2)}, tmp_path / file)
    put(tmp_path / name)
    with pytest.raises(WeightsError, match=f"{name}: .*no regular file"):
        read(tmp_path)


@NEVER
def test_weights_themselves_are_regular_files(put, tmp_path):
    put(tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="x.pth: is no file"):
        read(tmp_path / "x.pth")
    put(tmp_path / "encoder.safetensors")
    with pytest.raises(UserError, match="no regular file"):
        mpp.load_encoder(tmp_path)


@NEVER
def test_files_of_runs_and_of_shards_are_regular_files(put, tmp_path):
    put(tmp_path / "settled.json")
    with pytest.raises(RunError, match="no regular file"):
        load_settled(tmp_path)
    put(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="neither a recipe file nor"):
        mpp.load_recipe(tmp_path / "x.yaml")
    put(tmp_path / "train-index.safetensors")
    with pytest.raises(UserError):
        read_index(tmp_path, "train")
    put(tmp_path / "train-000000.tar")
    with pytest.raises(SystemExit):
        main(["shards", "index", str(tmp_path)])


# JSON


@pytest.mark.parametrize("text", ["[" * 70 + "]" * 70, '{"a":' * 70 + "1" + "}" * 70, "[" * 10**6])
def test_json_is_as_deep_as_ours_at_most(text):
    with pytest.raises(ValueError, match="JSON nested deeper than the limit of 64"):
        budget.json_of(text)


def test_json_holds_as_many_values_as_the_limit(monkeypatch):
    assert budget.json_of("[" * 60 + "]" * 60)
    assert budget.json_of(b'{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    with pytest.raises(Overrun, match=r"values in JSON, more than the limit of 4194304"):
        budget.json_of("[" + "[]," * 2**22 + "[]]")
    monkeypatch.setattr(budget, "MOST_JSON", 100)
    with pytest.raises(Overrun, match="101 bytes of JSON, more than the limit of 100"):
        budget.json_of('"' + "a" * 99 + '"')


def test_a_config_of_gigabytes_is_not_read(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**33)
    with pytest.raises(WeightsError, match=f"{2**33} bytes, more than the limit of {2**27}"):
        read(tmp_path)


# Zips


@contextmanager
def rewritten(path: Path, data: bytearray | None = None):
    data = bytearray(path.read_bytes())
    yield data
    path.write_bytes(data)


def test_members_that_share_their_bytes_are_refused(tmp_path):
    """A zip bomb without nesting: all members have one and the same packed data."""
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in "ab":
            archive.writestr(f"{name}.npy", bytes(2**16))
    with rewritten(path) as data:
        first, second = (data.find(b"PK\1\2"), data.rfind(b"PK\1\2"))
        data[second + 42 : second + 46] = data[first + 42 : first + 46]
    with pytest.raises(WeightsError, match="members that lie over each other"):
        read(path)


def test_a_list_of_members_is_as_long_as_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("mpp.weights.files.MOST_DIRECTORY", 2**12)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for number in range(200):
            archive.writestr(f"{number}.npy", b"")
    with pytest.raises(WeightsError, match="bytes of a list of members, more than the limit of 4096"):
        read(tmp_path / "x.npz")


def test_an_archive_is_unpacked_to_a_multiple_of_its_size_at_most(tmp_path, monkeypatch):
    import gzip

    monkeypatch.setattr(budget, "RATIO_FREE", 2**16)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(bytes(2**24)))
    with pytest.raises(SystemExit):
        main(["shards", "make", str(tmp_path / "x.tar.gz"), str(tmp_path / "out")])
    assert not any(path.suffix == ".part" for path in (tmp_path / "out").glob("*"))


def test_an_npz_of_many_arrays_is_read_in_linear_time(tmp_path):
    """As the case safety-12, smaller: quadratic is 16 times the time for 4 times the arrays."""
    import numpy as np

    np.save(one := io.BytesIO(), np.float32(1))
    took = []
    for count in (1500, 6000):
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            for number in range(count):
                archive.writestr(f"a{number:06d}.npy", one.getvalue())
        began = time.process_time()
        assert len(read(tmp_path / "x.npz").tensors) == count
        took.append(time.process_time() - began)
    assert took[1] < 8 * took[0]


# safetensors


@pytest.mark.parametrize("load", [read, mpp.load_encoder])
def test_a_header_of_very_many_tensors_is_refused(load, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "MOST_TENSORS", 50)
    save_file({str(number): torch.ones(1) for number in range(51)}, tmp_path / "x", {"encoder": "{}"})
    with pytest.raises(UserError, match="51 tensors, more than the limit of 50"):
        load(tmp_path / "x")


def test_a_header_longer_than_the_library_reads_is_refused(tmp_path):
    with open(tmp_path / "encoder.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 2**40) + b"{")
        file.truncate(2**41)
    with pytest.raises(UserError, match=f"{2**40} bytes of header, more than the limit of 100000000"):
        mpp.load_encoder(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"std": [2**64]}, {"mean": [1e300]}, {"std": [2**62]}, {"width": 10**9}, {"depth": 10**9},
        {"image": [2**31, 1]}, {"name": 3},
        {"channels": 2**40}, {"patch": -1}, {"registers": 10**9}, {"heads": 0}, {"mlp": 2**62}, {"mixer": [[]]},
        {"stages": [10**9] * 9, "stem": "hybrid"}, {"std": []}, {"norm_eps": 1e400}, {"name": ["x"]}, {"name": {}},
    ],
)  # fmt: skip
def test_an_encoder_of_absurd_size_is_refused_before_anything_is_made(changes, tmp_path):
    own.save_encoder(ViT(tiny_config()), tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    facts = json.loads(header["__metadata__"]["encoder"]) | changes
    header["__metadata__"]["encoder"] = json.dumps(facts)
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    with pytest.raises(UserError, match="x: ") as caught:
        mpp.load_encoder(tmp_path / "x")
    assert str(caught.value).isprintable()


def test_metadata_that_is_no_object_is_one_line(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "x", {"encoder": "[1]"})
    with pytest.raises(UserError, match="expected a JSON object|a JSON object was expected"):
        mpp.load_encoder(tmp_path / "x")
    with pytest.raises(UserError):
        mpp.load_classifier(tmp_path / "x")


# Rules and sizes of an index


def test_an_expression_of_an_index_is_not_run_unasked(tmp_path, capsys):
    folder = three_shards(tmp_path)
    main(["shards", "index", str(folder), "--labels", r"name:^(\d)"])
    with pytest.raises(SystemExit):
        main(["shards", "index", str(folder)])
    line = capsys.readouterr().err.splitlines()[-1]
    assert r"--labels 'name:^(\d)'" in line
    main(["shards", "index", str(folder), "--labels", r"name:^(\d)"])
    main(["shards", "index", str(folder), "--labels", "cls"])
    main(["shards", "index", str(folder)])


@pytest.mark.parametrize("size", [2**31 - 1, -1, 2**15, 0])
def test_an_index_with_impossible_sizes_of_images_is_refused(size, tmp_path):
    from dataclasses import replace

    from mpp.shards.index import write_index

    index = read_index(three_shards(tmp_path), "train")
    height, width = index.height.copy(), index.width.copy()
    height[0] = width[0] = size
    write_index(replace(index, height=height, width=width))
    with pytest.raises(UserError, match="its images have impossible sizes"):
        read_index(tmp_path, "train")


# What `tests/fuzz.py` found, by kind


def line_of(capsys, *arguments: str) -> str:
    """The one line with which the command line refuses something."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.isprintable()
    assert len(line) < 3000
    return line


def archive_of(path: Path, name: str, old: bytes, new: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"x")
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


def test_a_zip_whose_names_are_no_text_is_one_line(tmp_path, capsys):
    path = archive_of(tmp_path / "x.zip", "ü.png", "ü".encode(), b"\xbb\xbb")
    assert "its list of members is damaged" in line_of(capsys, "shards", "make", str(path), str(tmp_path / "out"))


def test_a_member_without_a_name_is_no_image(tmp_path, capsys):
    path = archive_of(tmp_path / "x.zip", "a", b"\1\0\0\0a", b"\0\0\1\0a")  # its name counts as something else
    with rewritten(path) as data:
        place = data.find(b"PK\1\2") + 28
        data[place : place + 4] = b"\0\0\1\0"
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == [""]
    assert "no images found" in line_of(capsys, "shards", "make", str(path), str(tmp_path / "out"))


def test_a_tar_with_a_name_of_gigabytes_takes_no_memory(tmp_path, capsys):
    header = bytearray(512)
    header[0:1], header[156:157], header[257:263] = b"x", b"L", b"ustar\0"
    header[124:136] = b"77777777777\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(bytes(header) + bytes(2048))
    assert "cut" in line_of(capsys, "shards", "make", str(tmp_path / "x.tar"), str(tmp_path / "out"))


def test_a_base_with_a_name_that_no_file_has_is_one_line(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text(f"base: {'b' * 5000}\n")
    assert "base: expected a file beside" in line_of(capsys, "plan", str(tmp_path / "x.yaml"))


def test_a_result_that_no_float_holds_is_left_out_of_the_card(tmp_path):
    from mpp.export import origin

    rows = [{"protocol": "knn", "metric": "top1", "value": value} for value in (10**400, 0.5, True)]
    (tmp_path / "probe.json").write_text(json.dumps({"weights": "x", "rows": rows}))
    assert [line.count("knn") for line in origin._measured(tmp_path, None) if "protocol" in line] == [1]


@pytest.mark.parametrize(
    "state",
    [
        '{"step": 1e999, "sha256": {}}', '{"step": 10, "sha256": {"../x.safetensors": ""}}',
        '{"step": 10, "sha256": {"' + "a" * 5000 + '": ""}}', '{"step": 10, "sha256": {"a\\u202e\\n": ""}}',
        "[" * 10**6,
    ],
)  # fmt: skip
def test_a_strange_state_of_a_checkpoint_is_one_line(state, tmp_path):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 3000


def test_a_cause_that_repeats_a_file_is_cut(tmp_path):
    header = json.dumps({"a" * 10**5: {"dtype": "b\u202e" * 10**5, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "train-index.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(UserError) as caught:
        read_index(tmp_path, "train")
    assert len(str(caught.value)) < 3000
    assert str(caught.value).isprintable()
