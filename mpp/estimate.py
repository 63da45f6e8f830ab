"""Memory and time of a training step on many GPUs, from what it computes and what the GPUs can do. No torch.

DDP: every GPU holds all, and sums its gradients with the others' once a step, after the last micro-batch; it waits for
that. FSDP2: every GPU holds an Nth of weights, gradients, averages and state of the optimizer, and gathers a block's
weights when it needs them, which goes on beside the computing (PyTorch's `fully_shard`, with weights gathered in the
precision of the forward pass and gradients summed in float32).
"""

from bisect import bisect
from dataclasses import dataclass
from math import ceil

from mpp.devices import NODE, ROOM, Device
from mpp.errors import UserError
from mpp.train_config import Precision

BYTES: dict[Precision, int] = {"bfloat16": 2, "float32": 4}
BFLOAT16, FLOAT32 = BYTES.values()
# Share of the peak that a compiled training step of a ViT is thought to reach, by width: those of S/16, B/16 and L/16
# are estimated for an H100 from the bytes that its kernels move; none is measured (`mpp plan --measure` measures).
# Narrower ones are bound by memory, so that the share falls with the width.
SHARES = {0: 0.0, 384: 0.28, 768: 0.41, 1024: 0.48}
# Convolutions and batch norm are bound by memory: FLOPs for each byte that it could move, from ResNet-50 v1.5 in mixed
# precision on an A100 80GB: 2,470 images/s (NVIDIA DeepLearningExamples, PyTorch, README) of 24.5 GFLOP, by 2,039 GB/s.
CONVOLUTIONS = 29.7
# Share of the links' bandwidth that sums over large tensors reach: 230 to 250 of 300 GB/s on 8 A100 by nccl-tests. On
# H100 it can be more, where the switches add (NVLS).
LINKS = 0.8


class PlanError(UserError):
    """A recipe can't be carried out on that many GPUs, or what was measured is of another one."""


@dataclass(frozen=True)
class Work:
    """What a recipe asks of each GPU, whichever that is."""

    images: int  # a step
    micro_batch: int | None  # images a forward pass, which divide those of a step; None for the most that fit
    pairs: bool  # micro-batches are even, or all that a GPU has
    trained: int  # parameters
    others: int  # parameters that are not trained
    blocks: tuple[int, ...]  # parameters of each block, gathered one by one by FSDP2; what is in none is gathered first
    averages: int  # float32 numbers that the optimizer keeps for each trained parameter
    running: bool  # a running average of all parameters
    gathered: int  # bytes of a weight in the forward pass: 2 for bfloat16
    casts: int  # bytes of weights' casts to bfloat16, kept for the backward pass
    activations: int  # bytes of an image, kept for the backward pass


@dataclass(frozen=True)
class Estimate:
    """A step on one of many GPUs that all do the same."""

    micro_batch: int
    memory: dict[str, int]  # bytes by part
    fits: bool
    compute: float  # seconds
    optimizer: float  # seconds
    communication: float  # seconds
    waits: bool  # for the communication, or computes beside it

    @property
    def step(self) -> float:
        """Seconds."""
        computing = self.compute + self.communication if self.waits else max(self.compute, self.communication)
        return computing + self.optimizer


def rate(device: Device, precision: Precision, width: int | None) -> float:
    """FLOP/s that a training step is assumed to reach. width: of the ViT; None for convolutions."""
    peak: float = getattr(device, precision)
    if width is None:
        return min(peak, CONVOLUTIONS * device.bandwidth * BFLOAT16 / BYTES[precision])
    widths = list(SHARES)
    above = min(bisect(widths, width), len(widths) - 1)
    low, high = widths[above - 1], widths[above]
    along = min(1.0, (width - low) / (high - low))
    return peak * (SHARES[low] + along * (SHARES[high] - SHARES[low]))


def link(device: Device, gpus: int) -> float:
    """Bytes/s, in one direction, by which a sum over GPUs is bound: of the slowest link of its rings.

    There is a ring for each GPU of a node, which enters and leaves the node by that GPU's network card, so that all
    cards share what crosses a border (NCCL; nccl-tests' PERFORMANCE.md calls it the bus bandwidth).
    """
    nodes = ceil(gpus / NODE)
    return device.link if nodes == 1 else min(device.link, gpus // nodes * device.network)


def ddp(work: Work, device: Device, gpus: int, speed: float) -> Estimate:
    """A step where every GPU holds all. speed: images/s of one GPU, forward and backward."""
    gradients = FLOAT32 * work.trained
    state = {part: FLOAT32 * count for part, count in _kept(work).items()}
    state["copies"] = work.casts + (gradients if gpus > 1 else 0)  # what is summed is one flat copy of all gradients
    waiting = 2 * (gpus - 1) / gpus * gradients / (LINKS * link(device, gpus))
    micro_batch, fits = _micro_batch(work, device, sum(state.values()))
    memory = state | {"activations": work.activations * micro_batch}
    compute, optimizer = work.images / speed, _update(work) / device.bandwidth
    return Estimate(micro_batch, memory, fits, compute, optimizer, waiting, waits=True)


def fsdp(work: Work, device: Device, gpus: int, speed: float) -> Estimate:
    """A step where every GPU holds its part and gathers the rest. speed: images/s of one GPU, forward and backward.

    At the most there are the weights outside of blocks, those of a block and of the next one, and float32 gradients of
    what is summed at the time. Each micro-batch gathers blocks forward and again backward, the rest once, and sums
    gradients.
    """
    rest, largest = work.trained + work.others - sum(work.blocks), max(work.blocks, default=0)
    state = {part: ceil(FLOAT32 * count / gpus) for part, count in _kept(work).items()}
    state["copies"] = work.gathered * (rest + 2 * largest) + FLOAT32 * max(rest, largest)
    sent = work.gathered * (rest + 2 * sum(work.blocks)) + FLOAT32 * work.trained
    micro_batch, fits = _micro_batch(work, device, sum(state.values()))
    passes = work.images // micro_batch
    beside = passes * (gpus - 1) / gpus * sent / (LINKS * link(device, gpus))
    memory = state | {"activations": work.activations * micro_batch}
    compute, optimizer = work.images / speed, _update(work) / gpus / device.bandwidth
    return Estimate(micro_batch, memory, fits, compute, optimizer, beside, waits=False)


def part_of(batch: int, gpus: int) -> int:
    """Each GPU's images of a batch; PlanError if they can't all have as many."""
    if batch % gpus:
        raise PlanError(f"--gpus {gpus}: train.batch ({batch}) must be a multiple of the number of GPUs")
    return batch // gpus


def _kept(work: Work) -> dict[str, int]:
    """Float32 numbers that are kept from step to step, by part."""
    kept = {"weights": work.trained + work.others}
    if work.running:
        kept["running average"] = work.trained + work.others
    return kept | {"gradients": work.trained, "optimizer": work.averages * work.trained}


def _update(work: Work) -> int:
    """Bytes that an optimizer step reads and writes: gradients for their norm and to clip them; then gradients, weights
    and averages, of which all but the gradients are written; and a running average with its weights."""
    numbers = (3 + 3 + 2 * work.averages) * work.trained
    return FLOAT32 * (numbers + 3 * work.running * (work.trained + work.others))


def _micro_batch(work: Work, device: Device, state: int) -> tuple[int, bool]:
    """The recipe's micro-batch, or the largest that fits beside the state, and whether it does."""
    room = (1 - ROOM) * device.memory - state
    sizes = [size for size in range(work.images, 0, -1) if work.images % size == 0]
    if work.pairs:
        sizes = [size for size in sizes if size % 2 == 0] or [work.images]
    if work.micro_batch is not None:
        sizes = [work.micro_batch]
    return next(((size, True) for size in sizes if size * work.activations <= room), (sizes[-1], False))
