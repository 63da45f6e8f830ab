"""`mpp.train` in a used folder, what it is given to train on, and what it leaves of the caller's process."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config
from tiny_runs import FEW, Cut, PowerCut, digests, losses, masked
from torch.utils.data import DataLoader, TensorDataset

import mpp
from mpp.batch import Batch
from mpp.checkpoint import CheckpointError
from mpp.data.loader import BatchesError, as_batch
from mpp.files import sealed, unsealed
from mpp.objectives.masked_patch import MaskedPatchPrediction
from mpp.objectives.masked_patch_config import MaskedPatchConfig
from mpp.train_config import LogConfig, TrainConfig
from mpp.watch import TrainingError

QUIET = LogConfig(every=1, pictures=0, tensorboard=False)


@pytest.fixture(scope="module")
def images(small_shards):
    return mpp.read_shards(small_shards, 20, seed=5)


@pytest.fixture(scope="module")
def done(images, tmp_path_factory):
    """A folder of a finished training; tests may look, and train in it again."""
    out = tmp_path_factory.mktemp("done") / "run"
    fit(out, images)
    return out


def fit(out, images, config=FEW, **options):
    objective = options.pop("objective", None) or masked()
    mpp.train(objective, images, config, out=out, log=QUIET, **options)
    return objective


# A used folder


CHANGED = {
    "train.lr: 0.001 there, 0.002 here": {"lr": 2e-3},
    "train.steps: 6 there, 3 here": {"steps": 3},
    "train.steps: 6 there, 9 here": {"steps": 9},
    "train.schedule: \"cosine\" there, \"wsd\" here": {"schedule": "wsd"},
    "train.micro_batch: 10 there, 20 here": {"micro_batch": 20},
}  # fmt: skip


@pytest.mark.parametrize("words", CHANGED)
def test_another_config_in_a_used_folder_is_refused_by_its_key(words, done, images):
    with pytest.raises(CheckpointError) as refused:
        fit(done, images, replace(FEW, **CHANGED[words]))
    assert str(refused.value).startswith(f"{done}: holds a training with other settings (")
    assert words in str(refused.value)


def test_another_seed_objective_model_or_other_images_are_refused_too(done, images, small_shards):
    def refusal(images=images, **options) -> str:
        with pytest.raises(CheckpointError) as refused:
            fit(done, images, **options)
        return str(refused.value)

    assert "seed: 0 there, 1 here" in refusal(seed=1)
    assert "model.drop_path: 0.0 there, 0.1 here" in refusal(objective=masked(drop_path=0.1))
    objective = MaskedPatchPrediction(masked().encoder, MaskedPatchConfig(share=0.25))
    assert "objective.share: 0.5 there, 0.25 here" in refusal(objective=objective)
    others = mpp.read_shards(small_shards, 20, split="train")
    others.index.crc32[:] += 1
    assert 'images: "53 images' in refusal(images=others)


def test_the_same_goes_on_and_what_changes_nothing_may_change(done, images):
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    first = fit(done, images)
    again = fit(str(done), images, replace(FEW, save_every=2, keep=1))
    assert {path: path.read_bytes() for path in done.rglob("*") if path.is_file()} == before
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_what_the_machine_chose_is_kept(images, tmp_path):
    open_ = replace(FEW, micro_batch="auto", precision="auto", threads=None, steps=2, warmup=0)
    fit(tmp_path, images, open_)
    path = tmp_path / "checkpoints/began.json"
    facts = unsealed(path)
    assert facts["settings"]["train.micro_batch"] == 20
    assert facts["settings"]["train.threads"] == torch.get_num_threads()
    facts["settings"]["train.micro_batch"] = 5
    path.write_bytes(sealed(facts))
    fit(tmp_path, images, open_)
    with pytest.raises(CheckpointError, match="train.micro_batch: 5 there, 10 here"):
        fit(tmp_path, images, replace(open_, micro_batch=10))
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"began\.json: cut, or not as it was written"):
        fit(tmp_path, images, open_)


def test_a_folder_whose_training_never_saved_takes_another(images, tmp_path):
    with pytest.raises(PowerCut):
        fit(tmp_path, Cut(images, after=1))
    fit(tmp_path, images, replace(FEW, lr=2e-3))


@pytest.mark.parametrize("length", [{"epochs": 1}, {"images": 100}, {}])
def test_a_config_without_steps_is_refused(length, images, tmp_path):
    with pytest.raises(ValueError, match=r"train.steps must be at least 1 .* epochs and images are for recipes"):
        fit(tmp_path / "run", images, TrainConfig(batch=20, **length))
    assert not (tmp_path / "run").exists()


# The caller's process


def test_the_process_is_the_callers_again_afterwards(images, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for name, deterministic in (("a", False), ("b", True)):
            torch.manual_seed(11)
            expected = torch.rand(3)
            torch.manual_seed(11)
            fit(
                tmp_path / name,
                images,
                replace(FEW, deterministic=deterministic, threads=threads + 1),
                objective=made(),
            )
            assert torch.equal(torch.rand(3), expected)
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled()
            assert torch.get_num_threads() == threads
            assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
            assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        with pytest.raises(PowerCut):
            fit(tmp_path / "c", Cut(images, after=2), objective=made())
        assert torch.are_deterministic_algorithms_enabled(), "after an error too"
    finally:
        torch.use_deterministic_algorithms(False)


def made() -> MaskedPatchPrediction:
    """An objective whose making draws nothing from the caller's generator."""
    with torch.random.fork_rng():
        return masked()


# What is trained on


@pytest.fixture(scope="module")
def pairs(images):
    return [(batch.images, torch.arange(20)) for batch in map(images.at, range(6))]


def test_pairs_of_images_and_labels_train_as_batches_of_the_same(pairs, images, done, tmp_path):
    fit(tmp_path, pairs)
    assert losses(tmp_path) == losses(done)
    assert digests(tmp_path, 6) == digests(done, 6)


@pytest.mark.parametrize("kind", ["iterator", "tensors", "batches", "lists"])
def test_other_iterables_do_the_same(kind, pairs, done, tmp_path):
    given = {
        "iterator": lambda: iter(pairs),
        "tensors": lambda: [images for images, _ in pairs],
        "batches": lambda: [Batch(images) for images, _ in pairs],
        "lists": lambda: [[images, labels.int()] for images, labels in pairs],
    }[kind]()
    mpp.train(masked(), given, FEW, out=tmp_path, log=replace(QUIET, pictures=2))
    assert digests(tmp_path, 6) == digests(done, 6)


def test_a_torch_loader_is_read_again_and_again_and_a_stop_says_what_is_lost(tmp_path, caplog):
    images = torch.randint(0, 256, (45, 3, 16, 16), dtype=torch.uint8)
    loader = DataLoader(TensorDataset(images, torch.zeros(45, dtype=torch.int64)), batch_size=20, shuffle=True)
    fit(tmp_path, loader, replace(FEW, steps=7, save_every=3))
    assert sorted(losses(tmp_path)) == list(range(1, 8))
    (tmp_path / "checkpoints/step-00000007/state.json").unlink()
    fit(tmp_path, loader, replace(FEW, steps=7, save_every=3))
    assert "step 6: goes on with other images than without the stop" in caplog.text


def test_an_iterator_that_ends_too_soon_is_named(pairs, tmp_path):
    with pytest.raises(TrainingError, match="the batches ended before train.steps"):
        fit(tmp_path, iter(pairs[:3]))


WRONG = {
    "found Ungiven; give it to a torch.utils.data.DataLoader": lambda: Ungiven(),
    "found int": lambda: 3,
    "found dict": lambda: [{"image": 1}],
    "expected images (b, c, h, w) or (images, labels), found uint8 (3, 16, 16)": lambda: [
        torch.zeros(3, 16, 16, dtype=torch.uint8)
    ],
    "expected labels as whole numbers (4,), one an image, found float32 (4,)": lambda: [
        (torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.zeros(4))
    ],
    "expected labels as whole numbers (4,), one an image, found int64 (5,)": lambda: [
        (torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64))
    ],
    "expected at least one, found none": list,
}


class Ungiven(torch.utils.data.Dataset):
    def __getitem__(self, number):
        return number


@pytest.mark.parametrize("words", WRONG)
def test_what_are_no_batches_is_one_line(words, tmp_path):
    with pytest.raises((BatchesError, TrainingError)) as refused:
        fit(tmp_path, WRONG[words]())
    found = str(refused.value)
    assert words in found
    assert "\n" not in found


def test_images_alone_may_stand_in_a_list():
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    given = next(iter(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), 4)))
    for item in (given, images):
        assert torch.equal(as_batch(item).images, images)
        assert as_batch(item).labels is None


def test_the_public_names_are_there():
    assert mpp.__version__.split(".")[0].isdecimal()
    for name in dir(mpp):
        assert getattr(mpp, name) is not None, name
    assert mpp.TrainConfig is TrainConfig
    assert mpp.MaskedPatchPrediction(mpp.ViT(tiny_config())).config == mpp.MaskedPatchConfig()
