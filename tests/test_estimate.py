from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from mpp.counts import noise, on_meta
from mpp.devices import DEVICES, Device
from mpp.estimate import PlanError, Work, ddp, fsdp, link, part_of, rate
from mpp.fleet import work_of
from mpp.models.trunk import Block
from mpp.recipe import load_recipe

GIB = 2**30
# Round numbers: 1 GiB, 1 GB/s of memory, 100 MB/s to others of a node, 10 MB/s to other nodes.
SMALL = Device("a small one", GIB, 1e12, 1e11, 1e9, 1e8, 1e7)
WORK = Work(
    images=64,
    micro_batch=None,
    pairs=False,
    trained=1_000_000,
    others=0,
    blocks=(200_000, 300_000),
    averages=2,
    running=False,
    gathered=2,
    casts=1_500_000,
    activations=10_000_000,
)


def test_ddp_holds_all_on_every_gpu():
    memory = ddp(WORK, SMALL, 4, speed=100).memory
    assert memory.pop("activations") % WORK.activations == 0
    assert memory == {
        "weights": 4_000_000,
        "gradients": 4_000_000,
        "optimizer": 8_000_000,
        "copies": 1_500_000 + 4_000_000,
    }
    assert ddp(WORK, SMALL, 1, speed=100).memory["copies"] == 1_500_000, "one GPU sums nothing"


def test_fsdp_holds_a_part_and_gathers_two_blocks_and_what_is_in_none():
    memory = fsdp(WORK, SMALL, 4, speed=100).memory
    del memory["activations"]
    gathered = 2 * (500_000 + 300_000 + 300_000)
    assert memory == {
        "weights": 1_000_000,
        "gradients": 1_000_000,
        "optimizer": 2_000_000,
        "copies": gathered + 4 * 500_000,
    }


def test_what_is_not_trained_has_weights_and_an_average_only():
    memory = ddp(replace(WORK, others=500_000, running=True), SMALL, 2, speed=100).memory
    assert (memory["weights"], memory["running average"]) == (6_000_000, 6_000_000)
    assert (memory["gradients"], memory["optimizer"]) == (4_000_000, 8_000_000)


def test_the_largest_micro_batch_that_leaves_8_per_cent_free_is_taken():
    found = ddp(WORK, SMALL, 4, speed=100)
    left = 0.92 * GIB - 21_500_000
    assert left // 10_000_000 == 96
    assert (found.micro_batch, found.fits) == (64, True)
    tight = ddp(replace(WORK, images=300), SMALL, 4, speed=100)
    assert (tight.micro_batch, tight.fits) == (75, True), "the largest divisor of 300 up to 96"
    assert ddp(replace(WORK, images=300, pairs=True), SMALL, 4, speed=100).micro_batch == 60, "the largest even one"
    assert ddp(replace(WORK, images=75, pairs=True), SMALL, 4, speed=100).micro_batch == 75, "not split"
    assert ddp(replace(WORK, activations=2 * GIB), SMALL, 4, speed=100).fits is False


def test_a_recipes_own_micro_batch_is_kept_and_may_not_fit():
    assert ddp(replace(WORK, micro_batch=16), SMALL, 4, speed=100).micro_batch == 16
    found = ddp(replace(WORK, images=128, micro_batch=128), SMALL, 4, speed=100)
    assert (found.micro_batch, found.fits) == (128, False)


def test_ddp_waits_for_one_ring_of_all_gradients():
    gpus = 4
    found = ddp(WORK, SMALL, gpus, speed=100)
    chunk = 4 * WORK.trained / gpus
    ring = sum(chunk / (0.8 * 1e8) for _ in range(2 * (gpus - 1)))  # rounds: summing, then sending round
    assert found.communication == pytest.approx(ring)
    assert found.compute == pytest.approx(0.64)
    # Gradients are read for their norm, read and written to scale them, then read with weights and two averages, which
    # are written.
    assert found.optimizer == pytest.approx(4 * 1_000_000 * (1 + 2 + 4 + 3) / 1e9)
    assert found.step == pytest.approx(found.compute + found.communication + found.optimizer)
    assert ddp(WORK, SMALL, 1, speed=100).communication == 0


def test_fsdp_communicates_for_every_micro_batch_beside_the_computing():
    once, twice = (fsdp(replace(WORK, micro_batch=size), SMALL, 4, speed=100) for size in (64, 32))
    assert twice.communication == pytest.approx(2 * once.communication)
    assert once.step == pytest.approx(once.compute + once.optimizer), "it ends before"
    assert once.optimizer == pytest.approx(ddp(WORK, SMALL, 4, speed=100).optimizer / 4)
    slow = fsdp(replace(WORK, micro_batch=2), SMALL, 4, speed=100)
    assert slow.communication > slow.compute
    assert slow.step == pytest.approx(slow.communication + slow.optimizer)


def test_more_gpus_take_less_memory_under_fsdp_and_no_less_under_ddp():
    counts = [2, 4, 8, 16, 64]
    parts = [sum(fsdp(replace(WORK, micro_batch=1), SMALL, gpus, speed=100).memory.values()) for gpus in counts]
    whole = {sum(ddp(replace(WORK, micro_batch=1), SMALL, gpus, speed=100).memory.values()) for gpus in counts}
    assert parts == sorted(parts, reverse=True)
    assert len(set(parts)) == len(counts)
    assert len(whole) == 1


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [(2, 1e8), (8, 1e8), (16, 8e7), (64, 8e7), (12, 6e7), (9, 4e7)],
)
def test_between_nodes_the_network_cards_of_a_node_share_what_crosses(gpus, expected):
    assert link(SMALL, gpus) == pytest.approx(expected)
    assert link(replace(SMALL, network=1e9), gpus) == 1e8, "never faster than within a node"


def test_the_assumed_share_of_the_peak_grows_with_the_width_up_to_that_of_l():
    shares = [rate(SMALL, "bfloat16", width) / 1e12 for width in (192, 384, 576, 768, 1024, 1280)]
    assert shares == pytest.approx([0.14, 0.28, 0.345, 0.41, 0.48, 0.48])
    assert rate(SMALL, "float32", 768) == pytest.approx(0.41 * 1e11)


def test_convolutions_are_assumed_to_be_bound_by_memory():
    a100 = rate(DEVICES["a100"], "bfloat16", None)
    assert a100 == pytest.approx(2470 * 24.5e9, rel=0.01), "ResNet-50's published speed on that GPU"
    assert rate(DEVICES["h200"], "bfloat16", None) / a100 == pytest.approx(4.8 / 2.039)
    assert rate(SMALL, "float32", None) == rate(SMALL, "bfloat16", None) / 2


def test_a_batch_that_gpus_cannot_share_is_refused():
    assert part_of(4096, 8) == 512
    with pytest.raises(PlanError, match=r"^--gpus 3: train.batch \(4096\) must be a multiple of the number of GPUs$"):
        part_of(4096, 3)


class Sent(TorchDispatchMode):
    """Bytes that are gathered from all ranks, and summed over all."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.summed = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.c10d._allgather_base_.default:
            self.gathered += args[0].nbytes
        if function is torch.ops.c10d._reduce_scatter_base_.default:
            self.summed += args[1].nbytes
        return function(*args, **(kwargs or {}))


@pytest.fixture
def four_ranks():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def test_fsdp2_itself_sends_as_many_bytes_as_are_counted(four_ranks):
    settings = ["model.preset=Ti/16", "model.depth=3", "model.image=64", "train.batch=32", "train.micro_batch=8"]
    recipe = load_recipe("paper/vit_b16_mpp", settings)
    objective = on_meta(recipe).to_empty(device="cpu")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in [part for part in objective.modules() if isinstance(part, Block)]:
        fully_shard(block, mesh=four_ranks, mp_policy=policy)
    fully_shard(objective, mesh=four_ranks, mp_policy=policy)
    with Sent() as sent:
        objective(noise(recipe, 8, torch.zeros))[0].backward()
    parameters = sum(parameter.numel() for parameter in on_meta(recipe).parameters())
    work = work_of(recipe, 4, "bfloat16", {"parameters": parameters, "not_trained": 0})
    expected = 3 / 4 * (sent.gathered + sent.summed) / (0.8 * SMALL.link)
    assert fsdp(work, SMALL, 4, speed=100).communication == pytest.approx(expected, rel=0.005), "parts are padded"
    assert sent.summed == pytest.approx(4 * parameters, rel=0.005)
