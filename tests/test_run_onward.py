"""Runs that go on from the whole state of another one, and runs whose checkpoints are deleted at their end."""

import json
import logging
import math
import os
import shutil

import numpy as np
import pytest
from conftest import picture_folder
from tiny_runs import LABELS, RECIPE, PowerCut, digests, losses, metrics, run, small_splits, write_recipe

import mpp.run
from mpp import checkpoint
from mpp.data.config import position_of, step_from
from mpp.data.read import read_shards
from mpp.run import finished
from mpp.shards.write import make_shards
from mpp.weights import load_encoder

WSD = ("train.schedule=wsd", "train.decay=0.25", "train.steps=8", "log.tensorboard=false")  # constant until step 6


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return small_splits(tmp_path_factory.mktemp("splits"))


@pytest.fixture(scope="module")
def recipe(splits, tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"), splits)


@pytest.fixture(scope="module")
def short(recipe, tmp_path_factory):
    """A finished run of eight steps with a constant phase; tests may look, not touch."""
    out = tmp_path_factory.mktemp("short") / "run"
    assert run("pretrain", recipe, *WSD, f"out={out}").code == 0
    return out


@pytest.fixture(scope="module")
def cosine(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("cosine") / "run"
    assert run("pretrain", recipe, "log.tensorboard=false", f"out={out}").code == 0
    return out


@pytest.fixture(autouse=True)
def said(caplog):
    """All that is said beside the bar."""
    caplog.set_level(logging.INFO, "mpp")
    return caplog


def refused(*arguments: object) -> str:
    """The one line of a command that must exit with status 2."""
    result = run(*arguments)
    assert result.code == 2, result
    return result.line


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Longer


@pytest.mark.parametrize(("verb", "ema"), [("pretrain", 0), ("pretrain", 0.9), ("finetune", 0)])
def test_twice_the_length_in_one_go_is_half_of_it_and_then_on_from_before_its_decay(verb, ema, splits, tmp_path, said):
    recipe = write_recipe(tmp_path, splits, LABELS if verb == "finetune" else RECIPE)
    arguments = [verb, recipe, *WSD, f"train.ema={ema}", "train.save_every=4", "train.keep=1"]
    assert run(*arguments, "train.steps=16", f"out={tmp_path / 'whole'}").code == 0
    assert run(*arguments, f"out={tmp_path / 'half'}").code == 0
    went = run(*arguments, "train.steps=16", f"out={tmp_path / 'on'}", "--continue", tmp_path / "half")
    assert went.code == 0, went.err
    assert f"goes on from {tmp_path / 'half'} at its step 6, here 6" in said.messages
    whole, on = losses(tmp_path / "whole"), losses(tmp_path / "on")
    assert on == {step: loss for step, loss in whole.items() if step > 6}
    assert digests(tmp_path / "on", 16) == digests(tmp_path / "whole", 16)
    assert digests(tmp_path / "on", 12) == digests(tmp_path / "whole", 12), "that before the decay is kept again"
    for name in ("encoder.safetensors", *(["classifier.safetensors", "scores.json"] if verb == "finetune" else [])):
        assert (tmp_path / "on" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_run_that_goes_on_and_is_killed_ends_as_one_that_was_not(short, recipe, tmp_path, monkeypatch):
    arguments = ["pretrain", recipe, *WSD, "train.steps=12", "train.save_every=2", "--continue", short]
    assert run(*arguments, f"out={tmp_path / 'never'}").code == 0
    real, saved = checkpoint.save, []

    def dies(folder, step, *rest):
        saved.append(step)
        if len(saved) in (1, 3):  # of its first checkpoint, the copy, and of the second that it makes
            raise PowerCut
        return real(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "save", dies)
    for _ in range(2):
        with pytest.raises(PowerCut):
            run(*arguments, f"out={tmp_path / 'often'}")
    assert saved == [6, 6, 8]
    assert run(*arguments, f"out={tmp_path / 'often'}").code == 0
    assert losses(tmp_path / "often") == losses(tmp_path / "never")
    assert digests(tmp_path / "often", 12) == digests(tmp_path / "never", 12)


def test_a_chain_of_runs_serves_several_lengths(short, recipe, tmp_path):
    assert run("pretrain", recipe, *WSD, "train.steps=32", f"out={tmp_path / 'whole'}").code == 0
    before = contents(short)
    assert run("pretrain", recipe, *WSD, "train.steps=16", f"out={tmp_path / 'a'}", "--continue", short).code == 0
    assert (
        run("pretrain", recipe, *WSD, "train.steps=32", f"out={tmp_path / 'b'}", "--continue", tmp_path / "a").code == 0
    )
    assert contents(short) == before
    assert min(losses(tmp_path / "b")) == 13
    assert digests(tmp_path / "b", 32) == digests(tmp_path / "whole", 32)


def test_what_it_went_on_from_stands_in_its_folder(short, recipe, tmp_path):
    arguments = ["pretrain", recipe, *WSD, "train.steps=10", f"out={tmp_path / 'on'}"]
    assert run(*arguments, "--continue", short).code == 0
    settled = json.loads((tmp_path / "on/settled.json").read_text())
    assert (settled["continued"]["step"], settled["continued"]["at"], settled["steps"]) == (6, 6, 10)
    assert settled["continued"]["state"] == checkpoint.digest(short / "checkpoints/step-00000006")
    assert f"continues: {short}" in (tmp_path / "on/recipe.yaml").read_text()
    before = contents(tmp_path / "on")
    assert run("pretrain", tmp_path / "on/recipe.yaml").code == 0
    assert contents(tmp_path / "on") == before, "its own recipe means it, and it is done"
    assert "holds a run that goes on from" in refused(*arguments)


def test_a_cosine_goes_on_from_its_end_and_says_how_the_rate_jumps(cosine, recipe, tmp_path, said):
    went = run("pretrain", recipe, "train.steps=9", f"out={tmp_path / 'on'}", "--continue", cosine)
    assert went.code == 0, went.err
    last, first = (1e-3 * 0.5 * (1 + math.cos(math.pi * share)) for share in (3 / 4, 4 / 7))
    assert f"at its step 6, here 6; the rate jumps from {last:.3g} to {first:.3g}" in said.text
    assert [line["step"] for line in metrics(tmp_path / "on")] == [7, 8, 9]
    assert metrics(tmp_path / "on")[0]["lr"] == pytest.approx(first)
    first_loss = metrics(tmp_path / "on")[0]["loss"]
    assert first_loss < losses(cosine)[1], "head and mask token go on too"


def test_an_interrupted_run_goes_on_elsewhere_as_it_would_have_gone_on_itself(short, recipe, tmp_path, said):
    half = shutil.copytree(short, tmp_path / "half")
    shutil.rmtree(half / "checkpoints/step-00000008")
    result = run("pretrain", recipe, *WSD, f"out={tmp_path / 'on'}", "--continue", half)
    assert result.code == 0
    assert "the rate" not in said.text
    assert digests(tmp_path / "on", 8) == digests(short, 8)


def test_the_checkpoint_may_be_named(short, recipe, tmp_path, said):
    place = short / "checkpoints/step-00000008"
    went = run("pretrain", recipe, *WSD, "train.steps=12", f"out={tmp_path / 'on'}", "--continue", place)
    assert went.code == 0
    assert "at its step 8, here 8; the rate jumps from 0.000293 to 0.001" in said.text


def test_a_damaged_checkpoint_is_passed_over(short, recipe, tmp_path, said):
    harmed = shutil.copytree(short, tmp_path / "harmed")
    os.truncate(harmed / "checkpoints/step-00000006/model.safetensors", 100)
    went = run("pretrain", recipe, *WSD, "train.steps=12", f"out={tmp_path / 'on'}", "--continue", harmed)
    assert went.code == 0
    assert "step-00000006/model.safetensors: not as it was written" in said.text
    assert "at its step 4, here 4" in said.text


# What may change, and what not


def test_rate_augmentation_and_much_else_may_change(short, recipe, tmp_path, said):
    other = ["train.lr=5e-4", "train.clip=null", "train.weight_decay=0.1", "train.optimizer=adam", "train.ema=0.9"]
    other += ["train.schedule=cosine", "train.decay=null", "data.augment.flip=true", "objective.share=0.25"]
    other += ["model.drop_path=0.1"]
    went = run("pretrain", recipe, *WSD, *other, "train.steps=10", f"out={tmp_path / 'on'}", "--continue", short)
    assert went.code == 0, went.err
    assert "its running average begins with the weights of then; the rate jumps from 0.001 to " in said.text
    assert [line["step"] for line in metrics(tmp_path / "on")] == [7, 8, 9, 10]
    less = ["train.steps=12", f"out={tmp_path / 'less'}", "--continue", tmp_path / "on"]
    went = run("pretrain", recipe, *WSD, *other, "train.ema=0", *less)
    assert "it goes on with the weights that were trained, without their running average" in said.text


def test_another_batch_goes_on_behind_the_last_image(short, recipe, tmp_path, said):
    on = ["train.batch=12", "train.steps=10", f"out={tmp_path / 'on'}", "--continue", short]
    went = run("pretrain", recipe, *WSD, *on)
    assert went.code == 0, went.err
    assert "at its step 6, here 4" in said.text, "6 batches of 8 images are 4 of 12"


@pytest.mark.parametrize("last", ["chained", "kept", "dropped"])
@pytest.mark.parametrize(("batch", "other"), [(8, 8), (8, 12), (12, 5), (7, 40)])
def test_no_image_is_seen_twice_where_the_batch_changes(last, batch, other, splits):
    images, old, new = 40, *(read_shards(splits, size, last_batch=last) for size in (batch, other))
    for step in range(1, 3 * images // batch):
        position = position_of(step, images, batch, last)
        assert position == old._positions(step)[0]
        on = step_from(position, images, other, last)
        seen = np.concatenate([old._positions(done) for done in range(step)])
        assert new._positions(on)[0] > seen.max()
        if on:
            assert new._positions(on - 1)[0] <= (position - 1), "and none is passed over that a batch could begin with"
        assert batch != other or on == step


REFUSED = {
    "model.width=64": "model.width: 32 there, 64 here",
    "objective.target=pixels": 'objective.target: "mean_colour" there, "pixels" here',
    "objective.name=labels": 'objective.name: "mpp" there, "labels" here',
    "seed=4": "seed: 3 there, 4 here",
    "train.optimizer=sgd": 'train.optimizer: "adamw" there, "sgd" here',
    "data.subset.share=0.5": "data.subset.share: 1.0 there, 0.5 here",
    "train.steps=6": "has done 8 steps of 8 images; expected a longer run, got one of 6",
    "train.steps=3": "expected a longer run, got one of 3",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_a_run_cannot_go_on_with_is_one_line_that_names_it(change, short, recipe, tmp_path):
    copy = shutil.copytree(short, tmp_path / "source")
    if change == "train.steps=6":
        shutil.rmtree(copy / "checkpoints/step-00000004")
    out = tmp_path / "on"
    line = refused("pretrain", recipe, *WSD, "train.steps=12", change, f"out={out}", "--continue", copy)
    assert line.startswith(f"mpp: {copy}: ")
    assert REFUSED[change] in line
    assert not out.exists()


def test_other_images_are_refused(short, recipe, tmp_path):
    picture_folder(tmp_path / "source/train", 30, classes=2)
    make_shards(tmp_path / "source", tmp_path / "shards", report=lambda line: None, progress=False)
    arguments = [*WSD, "train.steps=12", f"data.path={tmp_path / 'shards'}", f"out={tmp_path / 'on'}"]
    line = refused("pretrain", recipe, *arguments, "--continue", short)
    assert "a run can't go on from it with other images or labels (it began with 40 images" in line


def test_what_is_no_run_is_named(short, recipe, tmp_path):
    arguments = ["pretrain", recipe, *WSD, "train.steps=12", f"out={tmp_path / 'on'}", "--continue"]
    assert "none: no such folder; expected that of a run" in refused(*arguments, tmp_path / "none")
    assert "holds no checkpoint of a run to go on from" in refused(*arguments, tmp_path)
    line = refused(*arguments, short / "checkpoints/step-00000007")
    assert "no such checkpoint" in line
    assert "holds step-00000004, step-00000006, step-00000008" in line
    assert "weights" in refused(*arguments, short, "--from", short)
    for name in ("step-00000006.bak", "step-6", "step-", "step-٦"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        assert "is no name of a checkpoint" in refused(*arguments, tmp_path / "checkpoints" / name)
    assert not (tmp_path / "on").exists()


def test_the_refusal_of_another_length_names_the_command_that_does_it(short, recipe, tmp_path):
    line = refused("pretrain", recipe, *WSD, "train.steps=12", f"out={short}")
    assert "train.steps: 8 there, 12 here" in line
    assert line.endswith(
        f"choose another folder with out=, there with --continue {short} to go on from this one's state"
    )
    assert "--continue" not in refused("pretrain", recipe, *WSD, "model.width=64", f"out={short}")


# The other run is known by its content


def test_the_other_run_may_be_moved_or_gone_but_not_be_trained_anew(short, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(short, "a")
    arguments = ["pretrain", recipe, *WSD, "train.steps=10", "out=b", "--continue"]
    assert run(*arguments, "a").code == 0
    assert run(*arguments, tmp_path / "a").code == 0
    assert run(*arguments, "a/checkpoints/step-00000006").code == 0
    os.rename("a", "moved")
    assert run(*arguments, "a").code == 0, "its own checkpoints hold all that it needs"
    assert run(*arguments, "moved").code == 0
    assert run("pretrain", recipe, *WSD, "seed=8", "out=a").code == 0
    assert "b: holds a run that went on from another state than a holds" in refused(*arguments, "a")


# Weights alone


def test_the_checkpoints_of_a_finished_run_can_be_deleted_and_it_is_still_done(short, recipe, tmp_path):
    out = tmp_path / "run"
    arguments = ["pretrain", recipe, *WSD, "train.keep_state=false", f"out={out}"]
    assert run(*arguments).code == 0
    assert not (out / "checkpoints").exists()
    assert (out / "encoder.safetensors").read_bytes() == (short / "encoder.safetensors").read_bytes()
    before = contents(out)
    assert run(*arguments).code == 0
    assert run("pretrain", recipe, *WSD, f"out={out}").code == 0
    assert contents(out) == before
    assert load_encoder(out).config.width == 32
    line = refused("pretrain", recipe, *WSD, "train.steps=16", f"out={tmp_path / 'on'}", "--continue", out)
    assert f"{out}: its checkpoints were deleted at its end (train.keep_state: false)" in line
    assert "--continue" not in refused(*arguments, "train.lr=5e-3"), "which would be refused"
    assert f"--from {out}" in line
    line = refused("pretrain", recipe, *WSD, "train.steps=16", f"out={out}")
    assert "train.steps: 8 there, 16 here" in line
    os.truncate(out / "encoder.safetensors", 100)
    assert f"{out / 'encoder.safetensors'}: missing, or not as it was written" in refused(*arguments)
    (out / "finished.json").write_text("{")
    assert f"{out / 'finished.json'}: cut, or not as it was written" in refused(*arguments)


def test_they_can_be_deleted_later(short, recipe, tmp_path):
    out = shutil.copytree(short, tmp_path / "run")
    assert run("pretrain", recipe, *WSD, "train.keep_state=false", f"out={out}").code == 0
    assert not (out / "checkpoints").exists()


def test_nothing_is_deleted_before_all_results_are_written(splits, tmp_path, monkeypatch):
    recipe, out = write_recipe(tmp_path, splits, LABELS), tmp_path / "run"
    arguments = ["finetune", recipe, "train.keep_state=false", f"out={out}"]
    real = mpp.run.save_result

    def dies(module, path, *rest):
        if path.name == "classifier.safetensors":
            raise PowerCut
        real(module, path, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(mpp.run, "save_result", dies)
        with pytest.raises(PowerCut):
            run(*arguments)
    assert checkpoint.steps(out / "checkpoints") == [6]

    def cut(folder, **options):
        (folder / "step-00000006/model.safetensors").unlink()
        raise PowerCut

    with monkeypatch.context() as patched:
        patched.setattr(finished.shutil, "rmtree", cut)
        with pytest.raises(PowerCut):
            run(*arguments)
    assert (out / "classifier.safetensors").exists()
    result = run(*arguments)
    assert result.code == 0, result.err
    assert (out / "scores.json").exists()
    assert run("predict", out, splits, "--split", "test").code == 0
