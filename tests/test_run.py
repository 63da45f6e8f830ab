import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import LABELS, digests, finished, metrics, run, small_disk, small_splits, start, write_recipe

from mpp.execution import WORKSPACE
from mpp.files import sealed, unsealed
from mpp.recipe import load_recipe
from mpp.recipe.settled import RunError, load_settled
from mpp.run.start import with_threads
from mpp.shards.build import index_folder
from mpp.shards.index import read_index, write_index
from mpp.weights import load_encoder

LIVES = Path(__file__).with_name("many_lives.py")


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return small_splits(tmp_path_factory.mktemp("splits"))


@pytest.fixture(scope="module")
def done(splits, tmp_path_factory):
    """A run that is at its end; tests may look, not touch."""
    folder = tmp_path_factory.mktemp("done")
    recipe = write_recipe(folder, splits)
    assert run("pretrain", recipe, f"out={folder / 'run'}").code == 0
    return folder / "run"


@pytest.fixture
def recipe(splits, tmp_path):
    """A recipe on shards that the test may damage."""
    return write_recipe(tmp_path, shutil.copytree(splits, tmp_path / "shards"))


def refused(*arguments: object) -> str:
    """The one line of a command that must exit with status 2."""
    result = run(*arguments)
    assert result.code == 2, result
    return result.line


# On a GPU, for which a CPU stands


@pytest.mark.usefixtures("no_workspace")
def test_cuda_is_prepared_before_images_are_opened(tmp_path, monkeypatch):
    """cuBLAS reads the variable once, and where pictures are made may be found out on the GPU."""

    def opened(*_: object):
        raise RunError(f"opened with {os.environ.get(WORKSPACE)}")

    monkeypatch.setattr("mpp.run.open_images", opened)
    path = write_recipe(tmp_path, tmp_path)
    assert refused("pretrain", path, f"out={tmp_path}/a").endswith("opened with None")
    assert refused("pretrain", path, f"out={tmp_path}/b", "train.deterministic=true").endswith("opened with :4096:8")


def test_scoring_makes_no_graphs_of_its_own(tmp_path, monkeypatch):
    """Compiled in place, an objective would be compiled again without gradients, and for the last, smaller batch."""
    graphs, compile = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda module, **_: compile(module, backend=backend))
    torch.compiler.reset()
    recipe, out = write_recipe(tmp_path, small_splits(tmp_path), LABELS), tmp_path / "run"
    options = ("train.compile=true", "train.batch=24", "train.micro_batch=12")  # 20 images are scored
    assert run("pretrain", recipe, f"out={out}", *options).code == 0
    assert len([line for line in metrics(out) if "val/loss" in line]) == 3
    assert len(graphs) == 1


# The whole path


def test_the_quickstart_makes_shards_and_leaves_an_encoder_and_pictures(tmp_path):
    out, small = tmp_path / "run", ["model.width=32", "model.depth=1", "train.device=cpu", "eval.every=6"]
    process = start(
        "pretrain",
        "quickstart",
        f"out={out}",
        f"data.path={tmp_path / 'digits'}",
        "train.epochs=0.2",
        "train.warmup=0.1",
        "train.batch=32",
        "log.every=3",
        "log.pictures=5",
        *small,
    )
    result = finished(process)
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    assert "step/s" in result.err or "s/step" in result.err, "a progress bar"
    names = {path.name for path in out.iterdir() if not path.name.startswith(("events", "."))}
    assert names == {"recipe.yaml", "settled.json", "metrics.jsonl", "checkpoints", "pictures", "encoder.safetensors"}
    assert any(out.glob("events*"))
    assert [path.name for path in (out / "pictures").iterdir()] != []
    assert load_encoder(out).config.width == 32
    lines = metrics(out)
    last = lines[-1]["step"]
    assert last == 10, "0.2 epochs of 1441 digits in batches of 32"
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 10]
    scored = [line for line in lines if "val/loss" in line]
    assert [line["step"] for line in scored] == [6, 10]
    assert {"val/loss", "val/accuracy", "val/commonest", "val/nearest"} < scored[0].keys()
    assert all(str(name) in result.out for name in (f"{out}/encoder.safetensors", "pictures", "metrics.jsonl"))


def test_a_finished_run_started_again_does_nothing_more(done, splits, tmp_path):
    out = shutil.copytree(done, tmp_path / "run")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and "events" not in path.name}
    result = run("pretrain", write_recipe(tmp_path, splits), f"out={out}")
    assert result.code == 0
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and "events" not in path.name}
    assert after == before


def settled(out: Path) -> dict:
    return json.loads((out / "settled.json").read_text())


def test_what_was_asked_and_what_was_chosen_stand_side_by_side(splits, tmp_path):
    recipe, out = write_recipe(tmp_path, splits), tmp_path / "run"
    auto = ["train.precision=auto", "train.micro_batch=auto", "train.compile=null", "train.steps=1", "train.warmup=0"]
    assert run("pretrain", recipe, *auto, f"out={out}").code == 0
    asked = yaml.safe_load((out / "recipe.yaml").read_text())["train"]
    assert (asked["precision"], asked["micro_batch"], asked["compile"], asked["threads"]) == (
        "auto",
        "auto",
        None,
        None,
    )
    chosen = settled(out)["execution"]
    assert chosen["precision"] in ("float32", "bfloat16")
    assert (chosen["micro_batch"], chosen["compile"], chosen["threads"]) == (8, False, torch.get_num_threads())
    assert run("pretrain", recipe, *auto, f"out={out}").code == 0, "and auto again agrees with it"
    plain = [*auto, "train.micro_batch=8", f"train.precision={chosen['precision']}"]
    assert run("pretrain", recipe, *plain, f"out={out}").code == 0, "as does what was chosen, said outright"
    assert "train.micro_batch: 8 there, 4 here" in refused(
        "pretrain", recipe, *auto, "train.micro_batch=4", f"out={out}"
    )


def test_what_was_chosen_once_is_kept_where_the_machine_would_choose_otherwise(splits, tmp_path):
    recipe, out = write_recipe(tmp_path, splits), tmp_path / "run"
    auto = ["train.micro_batch=auto", "train.steps=2", "train.warmup=0"]
    assert run("pretrain", recipe, *auto, f"out={out}").code == 0
    found, began = (unsealed(out / name) for name in ("settled.json", "checkpoints/began.json"))
    found["execution"]["micro_batch"] = began["settings"]["train.micro_batch"] = 2
    (out / "settled.json").write_bytes(sealed(found))
    (out / "checkpoints/began.json").write_bytes(sealed(began))
    assert run("pretrain", recipe, *auto, f"out={out}").code == 0
    assert settled(out)["execution"]["micro_batch"] == 2


def test_threads_are_kept_unless_another_number_of_processes_goes_on(done, splits, tmp_path):
    recipe, out = write_recipe(tmp_path, splits), shutil.copytree(done, tmp_path / "run")
    found, more = unsealed(out / "settled.json"), torch.get_num_threads() + 6
    assert found["processes"] == 1
    found["execution"]["threads"] = more
    for processes in (1, 3):
        (out / "settled.json").write_bytes(sealed({**found, "processes": processes}))
        open_, three = load_recipe(recipe), load_recipe(recipe, ["train.threads=3"])
        settled = load_settled(out)
        kept = with_threads(settled, open_).execution.threads
        if processes == 1:
            assert kept == more
            said = refused("pretrain", recipe, "train.threads=3", f"out={out}")
            assert f"train.threads: {more} there, 3 here" in said
        else:
            assert kept == torch.get_num_threads()
            assert with_threads(settled, three).execution.threads == 3
            assert run("pretrain", recipe, "train.threads=3", f"out={out}").code == 0
            said = refused("pretrain", recipe, "train.lr=3e-3", "train.threads=3", f"out={out}")
            assert "train.lr" in said
            assert "train.threads" not in said


def test_epochs_become_steps_once(splits, tmp_path):
    recipe, out = write_recipe(tmp_path, splits), tmp_path / "run"
    half = ["train.epochs=0.5", "train.warmup=0.2"]
    assert run("pretrain", recipe, *half, f"out={out}").code == 0
    train = load_recipe(out / "recipe.yaml").train
    assert (train.steps, train.epochs, train.warmup) == (None, 0.5, 0.2), "as it was asked"
    assert (settled(out)["steps"], settled(out)["warmup"]) == (3, 1), "20 of 40 images in batches of 8, rounded up"
    assert run("pretrain", recipe, "train.steps=3", "train.warmup=1", f"out={out}").code == 0, "the same in steps"
    assert "train.steps: 3 there, 4 here" in refused(
        "pretrain", recipe, "train.steps=4", "train.warmup=1", f"out={out}"
    )


def test_a_folder_whose_run_never_saved_takes_another_recipe(splits, tmp_path):
    recipe, out = write_recipe(tmp_path, splits), tmp_path / "run"
    failed = run("pretrain", recipe, "train.lr=1e20", "train.clip=null", "train.warmup=0", f"out={out}")
    assert failed.code == 2
    assert "Try a lower train.lr" in failed.err
    assert not (out / "checkpoints").exists()
    assert run("pretrain", recipe, f"out={out}").code == 0
    assert load_recipe(out / "recipe.yaml").train.lr < 1


def test_weights_to_start_from_are_those_given(done, splits, tmp_path):
    recipe = write_recipe(tmp_path, splits)
    still = ["train.lr=1e-30", "train.steps=1", "train.warmup=0"]
    arguments = ["pretrain", recipe, "--from", done, *still, "seed=99", f"out={tmp_path / 'a'}"]
    result = run(*arguments)
    assert result.code == 0, result.err
    given, found = load_encoder(done).state_dict(), load_encoder(tmp_path / "a").state_dict()
    assert all((given[name] == found[name]).all() for name in given)
    assert run("pretrain", recipe, *still, "seed=99", f"out={tmp_path / 'b'}").code == 0
    assert (load_encoder(tmp_path / "b").stem.project.weight != given["stem.project.weight"]).any()


def test_weights_of_another_shape_are_refused_with_what_differs(done, splits, tmp_path):
    recipe = write_recipe(tmp_path, splits)
    line = refused("pretrain", recipe, "--from", done, "model.width=64", f"out={tmp_path / 'run'}")
    assert str(done) in line
    assert "width 32 there, 64 here" in line


# Folders


def test_another_recipe_in_the_same_folder_is_refused_with_the_keys(done, splits, tmp_path):
    out = shutil.copytree(done, tmp_path / "run")
    line = refused("pretrain", write_recipe(tmp_path, splits), "train.lr=2e-3", "model.pool=avg", f"out={out}")
    assert "train.lr: 0.001 there, 0.002 here" in line
    assert 'model.pool: "cls" there, "avg" here' in line
    assert "choose another folder with out=" in line
    assert load_recipe(out / "recipe.yaml") == load_recipe(done / "recipe.yaml")


def test_a_batch_that_the_parts_chosen_before_do_not_fill_is_another_recipe(done, splits, tmp_path):
    out = shutil.copytree(done, tmp_path / "run")
    batch = load_settled(out).execution.micro_batch + 1
    line = refused(
        "pretrain", write_recipe(tmp_path, splits), f"train.batch={batch}", "train.micro_batch=auto", f"out={out}"
    )
    assert "train.batch: " in line
    assert f" there, {batch} here" in line


def test_how_often_to_log_and_save_may_change(done, splits, tmp_path):
    out = shutil.copytree(done, tmp_path / "run")
    arguments = ["log.every=5", "train.save_every=77", "data.threads=1", "data.reader=indexed"]
    assert run("pretrain", write_recipe(tmp_path, splits), *arguments, f"out={out}").code == 0


def test_a_folder_in_use_by_a_live_run_is_refused(splits, tmp_path):
    recipe, out = write_recipe(tmp_path, splits), tmp_path / "run"
    process = start("pretrain", recipe, "train.steps=1000000", f"out={out}")
    try:
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        line = refused("pretrain", recipe, "train.steps=1000000", f"out={out}")
        assert line.startswith(f"mpp: {out}: in use by a run that is still going")
        assert process.poll() is None, "the live one is left alone"
    finally:
        process.kill()
        process.communicate()
    assert run("pretrain", recipe, "train.steps=1", "train.warmup=0", f"out={tmp_path / 'other'}").code == 0


def test_a_killed_run_does_not_hold_its_folder(splits, tmp_path):
    recipe, out = write_recipe(tmp_path, splits), tmp_path / "run"
    process = start("pretrain", recipe, "train.steps=100000", f"out={out}")
    while not (out / "recipe.yaml").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert run("pretrain", recipe, f"out={out}").code == 0


def test_out_may_not_be_a_file(recipe, tmp_path):
    (tmp_path / "file").write_text("mine")
    line = refused("pretrain", recipe, f"out={tmp_path / 'file'}")
    assert str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "mine"


# Bad input


def test_a_misspelt_key_is_named_with_the_nearest(recipe, tmp_path):
    line = refused("pretrain", recipe, "train.batchsize=3", f"out={tmp_path / 'run'}")
    assert "train.batchsize: unknown key. Did you mean: batch" in line
    recipe.write_text(recipe.read_text().replace("width: 32", "widht: 32"))
    line = refused("pretrain", recipe, f"out={tmp_path / 'run'}")
    assert "tiny.yaml: model.widht: unknown key. Did you mean: width" in line
    assert not (tmp_path / "run").exists()


def test_a_patch_that_does_not_divide_the_image_is_refused_before_anything_is_made(recipe, tmp_path):
    line = refused("pretrain", recipe, "model.patch=5", f"out={tmp_path / 'run'}")
    assert "model.image (16, 16) must be a multiple of model.patch (5)" in line
    assert not (tmp_path / "run").exists()


def test_missing_shards_are_named(recipe, tmp_path):
    shutil.rmtree(tmp_path / "shards")
    assert f"{tmp_path / 'shards'}: no such folder" in refused("pretrain", recipe, f"out={tmp_path / 'run'}")


def test_an_empty_folder_is_named(recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    line = refused("pretrain", recipe, f"data.path={tmp_path / 'empty'}", f"out={tmp_path / 'run'}")
    assert f"{tmp_path / 'empty'}: no shards" in line
    assert "mpp shards make" in line


def test_a_missing_shard_is_named(recipe, tmp_path):
    (tmp_path / "shards/train-000001.tar").unlink()
    line = refused("pretrain", recipe, f"out={tmp_path / 'run'}")
    assert f"{tmp_path / 'shards/train-000001.tar'}: missing" in line


def test_a_tar_cut_in_half_is_named_with_both_sizes(recipe, tmp_path):
    tar = tmp_path / "shards/train-000000.tar"
    size = tar.stat().st_size
    os.truncate(tar, size // 2)
    line = refused("pretrain", recipe, f"out={tmp_path / 'run'}")
    assert f"{tar}: {size // 2} bytes, the index says {size}" in line


def test_an_index_that_does_not_match_its_tar_is_named(recipe, tmp_path):
    shards = tmp_path / "shards"
    (shards / "train-000000.tar").write_bytes((shards / "train-000001.tar").read_bytes())
    line = refused("pretrain", recipe, f"out={tmp_path / 'run'}")
    assert "train-000000.tar" in line
    assert "the index says" in line


def test_a_split_that_is_not_there_is_named(recipe, tmp_path):
    line = refused("pretrain", recipe, "data.train=trian", f"out={tmp_path / 'run'}")
    assert "no split 'trian'; it holds test, train" in line


def test_shards_whose_every_image_is_damaged_are_refused(recipe, tmp_path):
    index = read_index(tmp_path / "shards", "train")
    for i in range(len(index)):
        path = tmp_path / "shards" / index.shards[index.shard[i]]
        data = bytearray(path.read_bytes())
        data[index.offset[i] : index.offset[i] + index.size[i]] = bytes(int(index.size[i]))
        path.write_bytes(data)
    assert "and every image that could take its place is damaged" in refused(
        "pretrain", recipe, f"out={tmp_path / 'run'}"
    )


def test_an_unknown_recipe_is_named(tmp_path):
    assert "quikstart: neither a recipe file nor a bundled recipe. Did you mean: quickstart" in refused(
        "pretrain", "quikstart", f"out={tmp_path / 'run'}"
    )


def test_weights_that_are_not_there_are_named(recipe, tmp_path):
    line = refused("pretrain", recipe, "--from", tmp_path / "none.safetensors", f"out={tmp_path / 'run'}")
    assert str(tmp_path / "none.safetensors") in line


def test_a_real_process_says_one_line_and_exits_with_2(recipe, tmp_path):
    (tmp_path / "shards/train-000000.tar").unlink()
    result = finished(start("pretrain", recipe, f"out={tmp_path / 'run'}"))
    assert result.code == 2
    assert result.err == f"{result.line}\n"
    assert result.out == ""


# Checkpoints


def test_a_checkpoint_cut_in_half_is_passed_over_and_the_end_is_the_same(done, splits, tmp_path):
    out = shutil.copytree(done, tmp_path / "run")
    (out / "encoder.safetensors").unlink()
    os.truncate(out / "checkpoints/step-00000006/model.safetensors", 1000)
    expected = {name: (done / name).read_bytes() for name in ("encoder.safetensors",)}
    result = finished(start("pretrain", write_recipe(tmp_path, splits), f"out={out}"))
    assert result.code == 0
    [said] = [line for line in result.err.splitlines() if line.startswith("mpp: ")]
    assert "step-00000006/model.safetensors: not as it was written" in said
    assert "going back to the checkpoint before it" in said
    assert {name: (out / name).read_bytes() for name in expected} == expected
    assert digests(out, 6) == digests(done, 6)
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_fills_up_while_training_is_one_line_and_loses_nothing(splits, tmp_path):
    recipe = write_recipe(tmp_path, splits)
    size = 0
    plain = tmp_path / "plain"
    assert run("pretrain", recipe, "log.tensorboard=false", f"out={plain}").code == 0
    size = sum(path.stat().st_size for path in (plain / "checkpoints/step-00000006").iterdir()) // 1024
    with small_disk(tmp_path / "disk", kib=int(2.6 * size)) as disk:  # room for two checkpoints, not for a third
        settings = ["log.tensorboard=false", "train.keep=2", f"out={disk / 'run'}"]
        line = refused("pretrain", recipe, *settings)
        assert re.match(rf"mpp: {disk}/run/checkpoints/step-00000006: could not be saved \(.*No space left", line)
        assert sorted(digests(disk / "run", 4)) == ["model.safetensors", "optimizer.safetensors"]
        shutil.copytree(disk / "run", tmp_path / "larger")
    assert run("pretrain", recipe, *settings[:2], f"out={tmp_path / 'larger'}").code == 0
    assert digests(tmp_path / "larger", 6) == digests(plain, 6), "with more room it goes on"


@pytest.mark.parametrize("tensorboard", [False, True])
@pytest.mark.parametrize("room", [0, 8, 64, 256, 300])
def test_a_full_disk_is_one_line_wherever_it_is_met(room, tensorboard, splits, tmp_path):
    recipe = write_recipe(tmp_path, splits)
    with small_disk(tmp_path / "disk", kib=512) as disk:
        (disk / "other").write_bytes(bytes(1024 * (512 - room)))
        line = refused(
            "pretrain", recipe, f"log.tensorboard={str(tensorboard).lower()}", "log.pictures=1", f"out={disk / 'run'}"
        )
    assert str(disk) in line
    assert "No space left on device" in line


# Kill -9


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_as_one_never_killed(splits, tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"random seed {seed}")
    command = [sys.executable, str(LIVES), str(write_recipe(tmp_path, splits)), str(tmp_path), str(seed)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stderr[-3000:]
    killed = [int(step) for step in re.findall(r"killed after step (\d+)", result.stdout)]
    assert len(killed) >= 20
    assert len(set(killed)) >= 6, "kills land all over the run"
    folders = sorted(path for path in tmp_path.glob("run*"))
    encoders = {(path / "encoder.safetensors").read_bytes() for path in folders}
    assert len(folders) >= 2
    assert len(encoders) == 1
    for path in folders:
        assert [line["step"] for line in metrics(path)] == list(range(1, 301))
        assert [line["loss"] for line in metrics(path)] == [line["loss"] for line in metrics(folders[0])]
        assert digests(path, 300) == digests(folders[0], 300)


def test_sigkill_is_what_the_driver_sends():
    assert "signal.SIGKILL" in LIVES.read_text()
    assert signal.SIGKILL == 9


# The images and weights that a run began with are known by their content


def test_a_run_goes_on_with_the_images_that_it_began_with_alone(recipe, tmp_path):
    out = f"out={tmp_path / 'run'}"
    assert run("pretrain", recipe, out, "train.steps=4").code == 0
    found = settled(tmp_path / "run")["images"]
    index = read_index(tmp_path / "shards", "train")
    keys = b"".join(index.key(i).encode() for i in range(len(index)))
    assert found == f"{len(index)} images {zlib.crc32(index.crc32.tobytes(), zlib.crc32(keys)):08x}"
    (tmp_path / "shards" / index.shards[-1]).unlink()
    index_folder(tmp_path / "shards", report=lambda line: None)
    line = refused("pretrain", recipe, out, "train.steps=4")
    assert f"it began with {found}, now there are " in line


def test_moved_folders_and_other_ways_to_name_them_are_the_same_run(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("pretrain", recipe, "out=run", "data.path=shards", "train.steps=4").code == 0
    weights = (tmp_path / "run/encoder.safetensors").read_bytes()
    assert run("pretrain", recipe, "out=run", f"data.path={tmp_path / 'shards'}", "train.steps=4").code == 0
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").rename(tmp_path / "elsewhere/moved")
    (tmp_path / "shards").rename(tmp_path / "elsewhere/images")
    out = tmp_path / "elsewhere/moved"
    (out / "encoder.safetensors").unlink()
    shutil.rmtree(out / "checkpoints/step-00000004")
    assert run("pretrain", recipe, f"out={out}", "data.path=elsewhere/images", "train.steps=4").code == 0
    assert (out / "encoder.safetensors").read_bytes() == weights, "it goes on from step 2, as if nothing had been moved"


def test_a_runs_own_recipe_means_that_run_wherever_it_was_moved(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("pretrain", recipe, "out=run", "train.steps=4").code == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "moved/encoder.safetensors").unlink()
    assert run("pretrain", "moved/recipe.yaml").code == 0
    assert (tmp_path / "moved/encoder.safetensors").exists()
    assert not (tmp_path / "run").exists()
    assert run("pretrain", "moved/recipe.yaml", "out=another", "train.steps=2").code == 0
    assert (tmp_path / "another/encoder.safetensors").exists()


def test_labels_that_changed_are_other_images_where_the_objective_learns_them(splits, tmp_path):
    shards = shutil.copytree(splits, tmp_path / "shards")
    recipe = write_recipe(tmp_path, shards, LABELS)
    out = f"out={tmp_path / 'run'}"
    assert run("finetune", recipe, out).code == 0
    index = read_index(shards, "train")
    write_index(replace(index, label=(1 - index.label).astype(index.label.dtype)))
    assert "but with other labels" in refused("finetune", recipe, out)


@pytest.fixture
def begun(done, splits, tmp_path):
    """A run that began from the weights of another, of which it has a copy."""
    start = shutil.copytree(done, tmp_path / "start")
    arguments = ["pretrain", write_recipe(tmp_path, splits), "seed=99", f"out={tmp_path / 'run'}"]
    assert run(*arguments, "--from", start).code == 0
    return start, arguments


def test_starting_weights_may_be_moved_or_named_otherwise(begun, tmp_path, monkeypatch):
    start, arguments = begun
    monkeypatch.chdir(tmp_path)
    assert run(*arguments, "--from", "start").code == 0
    assert run(*arguments, "--from", start / "encoder.safetensors").code == 0
    start.rename(tmp_path / "archived")
    assert run(*arguments, "--from", "archived").code == 0
    assert run(*arguments, "--from", start).code == 0, "its checkpoint holds all that it needs"
    assert "nowhere: is not there" in refused(*arguments, "--from", "nowhere")


def test_starting_weights_that_are_gone_must_be_in_a_whole_checkpoint(begun, tmp_path):
    start, arguments = begun
    shutil.rmtree(start)
    for step in (4, 6):
        os.truncate(tmp_path / f"run/checkpoints/step-{step:08d}/model.safetensors", 100)
    line = run(*arguments, "--from", start).err.splitlines()[-1]
    assert line.startswith(f"mpp: {start}: gone, and {tmp_path / 'run'} holds no whole checkpoint to go on from")


def test_weights_trained_anew_under_the_same_name_are_not_the_same(begun, splits, tmp_path):
    start, arguments = begun
    shutil.rmtree(start)
    assert run("pretrain", write_recipe(tmp_path, splits), "seed=5", f"out={start}").code == 0
    line = refused(*arguments, "--from", start)
    assert f"{tmp_path / 'run'}: holds a run that began from other weights than {start} now holds" in line
    assert "began from weights" in refused(*arguments), "nor is a run that begins from none"


# Folders of other versions, and files that are cut


def test_a_run_folder_from_before_settled_json_gets_one_line(done, splits, tmp_path):
    out = shutil.copytree(done, tmp_path / "run")
    (out / "settled.json").unlink()
    with (out / "recipe.yaml").open("a") as file:
        file.write("old_key: 3\n")
    line = refused("pretrain", write_recipe(tmp_path, splits), f"out={out}")
    assert line.startswith(f"mpp: {out}: holds a run of an earlier version of mpp (it has no settled.json)")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 2}', '{"format": 2, "steps": [', "[" * 100_000, "\x00\xff"]
)
def test_a_settled_json_that_is_cut_is_named(text, done, splits, tmp_path):
    out = shutil.copytree(done, tmp_path / "run")
    (out / "settled.json").write_bytes(text.encode("latin-1"))
    line = refused("pretrain", write_recipe(tmp_path, splits), f"out={out}")
    assert line.startswith(f"mpp: {out / 'settled.json'}: cut, or not as it was written")


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps", "x"), ("steps", 0), ("warmup", None), ("warmup", 99), ("objective", [1]), ("objective", {"foo": 1}),
     ("shuffle", "foo"), ("prepare", 3), ("imports", 5), ("images", 7),
     ("execution", {"precision": "foo", "compile": False, "threads": 1, "micro_batch": 4}),
     ("execution", {"precision": "float32", "compile": "yes", "threads": 1, "micro_batch": 4}),
     ("execution", {"precision": "float32", "compile": False, "threads": None, "micro_batch": 4}),
     ("execution", {"precision": "float32", "compile": False, "threads": 1, "micro_batch": "a"}),
     ("processes", 0), ("processes", "2")],
)  # fmt: skip
def test_a_settled_json_with_a_value_that_none_can_have_chosen_is_named(key, value, done, splits, tmp_path):
    out = shutil.copytree(done, tmp_path / "run")
    (out / "settled.json").write_bytes(sealed({**unsealed(out / "settled.json"), key: value}))
    assert str(out / "settled.json") in refused("pretrain", write_recipe(tmp_path, splits), f"out={out}")


def test_a_settled_json_of_a_later_version_is_named(done, splits, tmp_path):
    out = shutil.copytree(done, tmp_path / "run")
    text = (out / "settled.json").read_text()
    (out / "settled.json").write_text(text.replace('"format": 2', '"format": 3'))
    line = refused("pretrain", write_recipe(tmp_path, splits), f"out={out}")
    assert "settled.json: has format 3, this version of mpp reads 2" in line
