"""A run whose weights are split among processes is the run of one process, but for rounding, and so are its files."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from many_processes import close_weights, figures, left, own_objectives, start
from sharding_worker import add_parts, carry_out

import mpp
from mpp import checkpoint
from mpp.errors import UserError
from mpp.launch import Launch, LaunchError
from mpp.ranks import Ranks
from mpp.shards.write import make_shards

WORKER = Path(__file__).with_name("sharding_worker.py")
ALL = """\
seed: 7
data: {path: DIGITS, val: test, threads: 1, augment: {crop: shift, pad: 1, flip: false}}
model: {image: 8, patch: 2, width: 32, depth: 3, heads: 2, positions: sincos2d, pool: avg, drop_path: 0.3}
train: {steps: 20, warmup: 4, batch: 48, micro_batch: 12, lr: 3e-3, ema: 0.8, device: cpu, threads: 1, save_every: 8,
  keep: 9, precision: float32}
eval: {every: 10, images: 97, knn: 90}
log: {every: 1, pictures: 10, tensorboard: false}
"""
RECIPES = {
    "masked": "objective: {name: mpp}",
    "labels": """objective: {name: labels, mixup: 0.8, cutmix: 1.0, smoothing: 0.1}
model: {dropout: 0.1, registers: 1, layer_scale: 0.1}
train: {clip: 0.5, layer_decay: 0.8, weight_decay: 0.05, activation_checkpointing: true}""",
    "frozen": "objective: {name: labels, freeze: true}\nmodel: {pool: map}\ntrain: {ema: 0, steps: 9}",
    "taught": "objective: {name: taught}\ntrain: {steps: 9, ema: 0, optimizer: sgd, lr: 0.05}",
    "bfloat16": "objective: {name: taught}\ntrain: {precision: bfloat16, steps: 9}",
    "resnet": """objective: {name: labels}
model: null
train: {optimizer: sgd, lr: 0.05, steps: 6}
eval: {images: 96}""",
}
RESNET = "model: {name: resnet, image: 8, depth: 18, width: 4, stem: small, norm: group}"
# A loss is a mean whose terms, and those of the gradients before it, are added in another order: float32 has 6e-8.
LOSS = 1e-6
# SGD moves weights by gradients, which are as close. Adam divides each by its own size: one that is all rounding, as of
# the keys' biases, which softmax does not see, moves as far as any other (BLIND). bfloat16 has 8 bits: weights that
# differ in their last bit may be cast to neighbours that are 0.4 % apart.
WEIGHTS = {"taught": 1e-6, "resnet": 1e-6, "bfloat16": 3e-3}


@pytest.fixture(scope="module", autouse=True)
def parts() -> Iterator[None]:
    with own_objectives(add_parts):
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of one process (1/), of two that split their weights (2/), and ones that went on from either."""
    folder = tmp_path_factory.mktemp("sharding")
    make_shards("digits", folder / "digits", report=lambda line: None, progress=False)
    (folder / "all.yaml").write_text(ALL.replace("DIGITS", str(folder / "digits")))
    for name, text in RECIPES.items():
        base = "all.yaml"
        if name == "resnet":
            without = [line for line in (folder / base).read_text().splitlines() if not line.startswith("model:")]
            base = "resnet-all.yaml"
            (folder / base).write_text("\n".join([*without, RESNET]))
            text = text.replace("model: null\n", "")
        (folder / f"{name}.yaml").write_text(f"base: {base}\n{text}")
    carry_out([[str(folder / f"{name}.yaml"), f"out={folder / '1' / name}"] for name in RECIPES])
    cut(folder / "1/labels", 8, folder / "onto-sharded")
    jobs = [[str(folder / f"{name}.yaml"), f"out={folder / '2' / name}", "train.shard=full"] for name in RECIPES]
    jobs += [[str(folder / "labels.yaml"), f"out={folder / 'onto-sharded'}", "train.shard=full"]]
    said = together(2, jobs, folder)
    (folder / "said.json").write_text(json.dumps(said))
    cut(folder / "2/labels", 8, folder / "onto-one")
    cut(folder / "2/masked", 16, folder / "onto-three")
    carry_out([[str(folder / "labels.yaml"), f"out={folder / 'onto-one'}"]])
    together(3, [[str(folder / "masked.yaml"), f"out={folder / 'onto-three'}", "train.shard=full"]], folder)
    return folder


def together(count: int, jobs: list[list[str]], folder: Path) -> list[str]:
    """What so many processes say that carry out runs one after the other."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    ends = left(start(count, [str(WORKER), "jobs.json"], folder), 400)
    assert [end.status for end in ends] == [0] * count, "\n".join(end.said[-3000:] for end in ends)
    return [end.said for end in ends]


def cut(run: Path, step: int, out: Path) -> None:
    """A copy of a run as it was when it was stopped after a step."""
    shutil.copytree(run, out)
    for result in out.glob("*.safetensors"):
        result.unlink()
    for later in checkpoint.steps(out / "checkpoints"):
        if later > step:
            shutil.rmtree(out / f"checkpoints/step-{later:08d}")


def agree(one: Path, other: Path, weights: float, loss: float = LOSS) -> None:
    here, there = figures(one), figures(other)
    assert here.keys() == there.keys()
    for step, values in here.items():
        for name, value in values.items():
            within = 10 * loss if name == "norm" else loss
            assert there[step][name] == pytest.approx(value, rel=within, abs=within), (step, name)
    names = [path.name for path in one.glob("*.safetensors")]
    assert names == [path.name for path in other.glob("*.safetensors")]
    for name in names:
        close_weights(one / name, other / name, weights)


@pytest.mark.parametrize("name", RECIPES)
def test_split_weights_train_as_whole_ones(name, runs):
    agree(runs / "1" / name, runs / "2" / name, WEIGHTS.get(name, 1e-4), 1e-3 if name == "bfloat16" else LOSS)


def test_each_process_holds_its_part_alone(runs):
    for said in json.loads((runs / "said.json").read_text()):
        found = re.findall(r"holds (\d+) of (\d+) numbers", said)
        assert len(found) == 2  # in float32 and in bfloat16
        for held, whole in found:
            assert int(whole) > 50_000
            assert int(held) == pytest.approx(int(whole) / 2, abs=16), "but for weights of an odd number of rows"


@pytest.mark.parametrize(
    ("went_on", "name"), [("onto-sharded", "labels"), ("onto-one", "labels"), ("onto-three", "masked")]
)
def test_a_run_goes_on_with_weights_split_otherwise(went_on, name, runs):
    agree(runs / "1" / name, runs / went_on, 1e-4)


def layout(path: Path) -> dict[tuple[str, str], tuple[torch.dtype, torch.Size]]:
    """Type and shape of each tensor of a checkpoint, by file and name."""
    _, state = checkpoint.load(path)
    return {(file, key): (one.dtype, one.shape) for file, tensors in state.items() for key, one in tensors.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_checkpoints_say_nothing_of_how_weights_were_split(name, runs):
    one, other = runs / "1" / name / "checkpoints", runs / "2" / name / "checkpoints"
    steps = checkpoint.steps(one)
    assert steps == checkpoint.steps(other)
    assert len(steps) >= 1
    assert layout(one / f"step-{steps[-1]:08d}") == layout(other / f"step-{steps[-1]:08d}")


def test_encoders_are_read_from_a_checkpoint_of_split_weights(runs):
    last = runs / "2/masked/checkpoints/step-00000020"
    encoder = mpp.load_encoder(last)
    for name, value in mpp.load_encoder(runs / "2/masked").state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value)


def test_a_process_that_is_gone_is_told_by_whatever_torch_calls():
    ranks, gone = Ranks(Launch(0, 2)), RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer")
    passed_on = UserError("objective own: forward(): RuntimeError")
    passed_on.__cause__ = gone
    for error in (gone, passed_on):
        told = ranks.told(error)
        assert isinstance(told, LaunchError)
        assert "the others can't be reached" in str(told)
    for other in (RuntimeError("shapes"), told):
        assert ranks.told(other) is other
