import json
import logging
import re

import pytest
import torch
from conftest import tiny_config
from tiny_runs import small_disk

from mpp import checkpoint
from mpp.batch import Batch
from mpp.checkpoint import CheckpointError
from mpp.files import sealed
from mpp.models.vit import ViT
from mpp.objectives.masked_patch import MaskedPatchPrediction
from mpp.objectives.masked_patch_config import MaskedPatchConfig


def state(value: float, numbers: int = 5) -> checkpoint.State:
    return {
        "model": {"a": torch.full((numbers,), value), "b": torch.tensor(value)},
        "optimizer": {"a/step": torch.ones(())},
    }


def save(folder, *steps: int, keep: int = 9, numbers: int = 5) -> None:
    for step in steps:
        checkpoint.save(folder, step, state(float(step), numbers), {"about": "x"}, keep)


def equal(first: checkpoint.State, second: checkpoint.State) -> bool:
    return {name: tensors.keys() for name, tensors in first.items()} == {
        name: tensors.keys() for name, tensors in second.items()
    } and all(torch.equal(first[name][key], second[name][key]) for name in first for key in first[name])


def step_folder(folder, step: int):
    return folder / f"step-{step:08d}"


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    written = {"model": {"w": torch.randn(3, 4).T, "n": torch.arange(3)}, "ema": {"w": torch.randn(4, 3).bfloat16()}}
    path = checkpoint.save(tmp_path, 12, written, {}, keep=2)
    step, read = checkpoint.load(path)
    assert step == 12
    assert equal(read, written)


def test_a_checkpoint_is_safetensors_and_json_and_nothing_else(tmp_path):
    save(tmp_path, 7)
    names = sorted(path.name for path in step_folder(tmp_path, 7).iterdir())
    assert names == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert json.loads((step_folder(tmp_path, 7) / "state.json").read_text())["step"] == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000007"], "nothing unfinished is left"


@pytest.mark.parametrize(("keep", "left"), [(1, [40]), (2, [30, 40]), (9, [10, 20, 30, 40])])
def test_the_last_ones_are_kept(keep, left, tmp_path):
    save(tmp_path, 10, 20, 30, 40, keep=keep)
    assert checkpoint.steps(tmp_path) == left


def test_some_are_kept_for_good(tmp_path):
    for step in (10, 20, 30, 40):
        checkpoint.save(tmp_path, step, state(float(step), 5), {}, keep=1, kept=(20, 99))
    assert checkpoint.steps(tmp_path) == [20, 40]


def test_without_a_checkpoint_there_is_none_to_load(tmp_path):
    assert checkpoint.load_latest(tmp_path / "not there") is None


@pytest.mark.parametrize("harm", [cut, flip, lambda path: path.unlink()], ids=["cut", "changed", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_the_one_before_a_damaged_one_is_taken_and_it_is_said(harm, name, tmp_path, caplog):
    save(tmp_path, 10, 20, 30)
    harm(step_folder(tmp_path, 30) / name)
    with caplog.at_level(logging.WARNING, "mpp"):
        step, loaded = checkpoint.load_latest(tmp_path)
    assert step == 20
    assert equal(loaded, state(20.0))
    [message] = caplog.messages
    assert "step-00000030" in message
    assert "going back" in message


def test_a_flipped_bit_in_any_byte_of_any_file_is_noticed(tmp_path):
    save(tmp_path, 10)
    for path in sorted(step_folder(tmp_path, 10).iterdir()):
        data = path.read_bytes()
        for place in range(len(data)):
            flipped = bytearray(data)
            flipped[place] ^= 1 << place % 8
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=re.escape(str(path))):
                checkpoint.load(path.parent)
        path.write_bytes(data)
    assert equal(checkpoint.load(step_folder(tmp_path, 10))[1], state(10.0))


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "3", '"checksum"', "[" * 100_000, '{"checksum": ' * 50_000, "\xff", "1" * 5000]
)
def test_a_state_json_of_something_else_is_one_line(text, tmp_path):
    save(tmp_path, 10)
    (step_folder(tmp_path, 10) / "state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"step-00000010/state.json: not as it was written") as caught:
        checkpoint.load(step_folder(tmp_path, 10))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "facts",
    [{}, {"step": 10}, {"step": "x", "sha256": {}}, {"step": 10, "sha256": 3}, {"step": 10, "sha256": {"gone": "0"}}],
    ids=str,
)
def test_a_sealed_state_json_that_does_not_describe_a_checkpoint_is_one_line(facts, tmp_path):
    save(tmp_path, 10)
    (step_folder(tmp_path, 10) / "state.json").write_bytes(sealed(facts))
    with pytest.raises(CheckpointError, match="step-00000010"):
        checkpoint.load(step_folder(tmp_path, 10))


def test_a_checkpoint_in_the_folder_of_another_step_is_refused(tmp_path):
    save(tmp_path, 10)
    step_folder(tmp_path, 10).rename(step_folder(tmp_path, 20))
    with pytest.raises(CheckpointError, match="is of step 10, which its folder is not named for"):
        checkpoint.load(step_folder(tmp_path, 20))


def test_two_damaged_ones_are_both_passed_over(tmp_path, caplog):
    save(tmp_path, 10, 20, 30)
    cut(step_folder(tmp_path, 30) / "model.safetensors")
    cut(step_folder(tmp_path, 20) / "model.safetensors")
    assert checkpoint.load_latest(tmp_path)[0] == 10
    assert len(caplog.messages) == 2


def test_if_all_are_damaged_it_is_said_that_none_is_left(tmp_path, caplog):
    save(tmp_path, 10)
    cut(step_folder(tmp_path, 10) / "model.safetensors")
    assert checkpoint.load_latest(tmp_path) is None
    assert "from the beginning" in caplog.messages[-1]


def test_unfinished_and_foreign_folders_are_ignored(tmp_path):
    save(tmp_path, 10)
    for name in (".partial-00000020", "step-00000030-backup", "step-", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000040").write_text("a file")
    assert checkpoint.steps(tmp_path) == [10]
    assert checkpoint.load_latest(tmp_path)[0] == 10


def test_what_a_killed_save_left_is_cleared_away_by_the_next(tmp_path):
    (tmp_path / ".partial-00000013").mkdir()
    (tmp_path / ".partial-00000013" / "model.safetensors").write_bytes(b"cut")
    save(tmp_path, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 10)
    cut(step_folder(tmp_path, 10) / "model.safetensors")
    save(tmp_path, 10)
    assert equal(checkpoint.load(step_folder(tmp_path, 10))[1], state(10.0))


def test_a_damaged_later_one_does_not_crowd_out_what_is_saved_after_going_back(tmp_path):
    save(tmp_path, 10, 20)
    cut(step_folder(tmp_path, 20) / "model.safetensors")
    assert checkpoint.load_latest(tmp_path)[0] == 10
    save(tmp_path, 15, keep=1)
    step, loaded = checkpoint.load_latest(tmp_path)
    assert step == 15
    assert equal(loaded, state(15.0))


def test_a_full_disk_is_one_line_and_leaves_older_ones_alone(tmp_path):
    with small_disk(tmp_path / "disk", kib=512) as disk:
        save(disk, 10, numbers=50_000)  # 200 KiB
        save(disk, 20, numbers=50_000)
        with pytest.raises(CheckpointError, match=r"step-00000030: could not be saved .*needs \d+ MiB") as caught:
            save(disk, 30, numbers=50_000)
        assert "\n" not in str(caught.value)
        assert checkpoint.steps(disk) == [10, 20]
        assert equal(checkpoint.load(step_folder(disk, 20))[1], state(20.0, 50_000))
        assert sorted(path.name for path in disk.iterdir()) == ["step-00000010", "step-00000020"]


def objective(**config) -> MaskedPatchPrediction:
    return MaskedPatchPrediction(ViT(tiny_config()), MaskedPatchConfig(**config))


def loaded_then_overwritten(folder) -> checkpoint.State:
    save(folder, 10)
    path = step_folder(folder, 10) / "model.safetensors"
    loaded = checkpoint.load(step_folder(folder, 10))[1]
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    return loaded


def test_what_is_loaded_no_longer_depends_on_the_file(tmp_path):
    assert equal(loaded_then_overwritten(tmp_path), state(10.0))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_goes_on_as_if_it_had_not_stopped(kind, fused, batch: Batch, tmp_path):
    def steps(count, module, optimizer):
        for step in range(count):
            torch.manual_seed(step)
            module(batch)[0].backward()
            optimizer.step()
            optimizer.zero_grad()

    first, second = objective(), objective()
    one = kind(first.parameters(), lr=1e-3, fused=fused)
    two = kind(second.parameters(), lr=1e-3, fused=fused)
    steps(2, first, one)
    saved = {"model": first.state_dict(), "optimizer": checkpoint.optimizer_state(first, one)}
    path = checkpoint.save(tmp_path, 2, saved, {}, keep=1)
    checkpoint.restore(second, two, checkpoint.load(path)[1])
    steps(3, first, one)
    steps(3, second, two)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_checkpoint_of_another_model_is_refused_with_its_keys():
    narrow = objective(bits=2)
    optimizer = torch.optim.Adam(narrow.parameters())
    with pytest.raises(CheckpointError, match=r"another model: head.weight, head.bias .*of another shape"):
        checkpoint.restore(narrow, optimizer, {"model": objective().state_dict(), "optimizer": {}})
    without = {name: value for name, value in narrow.state_dict().items() if name != "mask_token"}
    with pytest.raises(CheckpointError, match="another model: mask_token missing"):
        checkpoint.restore(narrow, optimizer, {"model": without, "optimizer": {}})


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"head.weigth/exp_avg": torch.zeros(3)}, "head.weigth/exp_avg unknown"),
        ({"no slash": torch.zeros(())}, "no slash unknown"),
        ({"mask_token/exp_avg": torch.zeros(3)}, "mask_token/exp_avg unknown or of another shape"),
        (None, "no optimizer.safetensors"),
    ],
    ids=str,
)
def test_an_optimizer_of_another_model_or_none_is_one_line(entries, words):
    module = objective()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    other = {name: torch.zeros_like(value) for name, value in before.items()}
    found = {"model": other} | ({} if entries is None else {"optimizer": entries})
    with pytest.raises(CheckpointError, match=words):
        checkpoint.restore(module, torch.optim.Adam(module.parameters()), found)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items()), "nothing has changed"
