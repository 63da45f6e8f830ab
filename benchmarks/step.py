"""One training step, ours against vit-pytorch's masked patch prediction and a minimal one on timm.

    python -m benchmarks.step [--sizes tiny32 vit_s] [--rounds 5] [--threads 2] [--device cpu] [--micro-batches 32 128]

Forward, backward and AdamW on one batch in memory, half of the patches corrupted, the same sizes for all. The peers
get their images as float32 made beforehand, ours get uint8 as always: a small advantage for the peers.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from benchmarks import harness
from benchmarks.harness import Bar, Contender, Ratio, Timing

if TYPE_CHECKING:
    from torch import Tensor

    from mpp.batch import Batch
    from mpp.objectives.base import Objective
    from mpp.objectives.masked_patch import MaskedPatchPrediction

Step = Callable[[], "Tensor"]  # one optimizer step; returns the loss

OURS = "mpp, default settings"
OURS_COMPILED = "mpp, compiled"
VIT_PYTORCH = "vit-pytorch MPP, float32"
VIT_PYTORCH_BF16 = "vit-pytorch MPP, bf16 autocast"
TIMM = "timm minimal MPP, bf16 autocast"
TIMM_BEST = "timm minimal MPP at its best"
STEPS, WARM_UP = 3, 1  # per round
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Size:
    image: int
    patch: int
    width: int
    depth: int
    heads: int
    batch: int  # images per step

    def shape(self) -> dict[str, int]:
        return {key: value for key, value in asdict(self).items() if key != "batch"}


SIZES = {
    "cpu": {"tiny32": Size(32, 4, 192, 12, 3, 128), "vit_s": Size(224, 16, 384, 12, 6, 8)},
    "cuda": {
        "tiny32": Size(32, 4, 192, 12, 3, 1024),
        "vit_s": Size(224, 16, 384, 12, 6, 256),
        "vit_b": Size(224, 16, 768, 12, 12, 128),
    },
}
# Issue 2; PERFORMANCE.md section 7 for "timm, bf16 autocast". None is set for CUDA.
BARS = {
    "tiny32": {VIT_PYTORCH: 2.8, VIT_PYTORCH_BF16: 1.35, TIMM: 2.0, TIMM_BEST: 1.25},
    "vit_s": {VIT_PYTORCH: 3.0, VIT_PYTORCH_BF16: 1.45, TIMM: 1.75, TIMM_BEST: 1.4},
}
MEMORY_BAR = Bar(0.6, most=True)


def images_of(size: Size, device: str) -> "Tensor":
    """One batch of uint8 images; smooth, so that colours are not all the same grey as in noise."""
    import torch
    import torch.nn.functional as F

    coarse = torch.rand(size.batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, size=(size.image, size.image), mode="bilinear")
    return (255 * smooth).round().to(torch.uint8).to(device)


def prepare_peer(size: Size, device: str, threads: int, *, name: str) -> Callable[[], Timing]:
    """A peer's step: autocast, backward, AdamW, as its users write it."""
    import torch

    from benchmarks import peers

    settle(threads)
    best = name == TIMM_BEST
    if name in (VIT_PYTORCH, VIT_PYTORCH_BF16):
        model = peers.vit_pytorch_mpp(**size.shape())
    else:
        model = peers.timm_mpp(**size.shape(), fused_attention=not best or device == "cuda")
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=best and device == "cuda")
    loss_of = torch.compile(model) if best and device == "cuda" else model
    images = images_of(size, device).float() / 255

    def step() -> "Tensor":
        with torch.autocast(device, torch.bfloat16, enabled=name != VIT_PYTORCH):
            loss = loss_of(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return lambda: timed(step, size.batch, device)


def our_objective(size: Size) -> "MaskedPatchPrediction":
    from mpp.models.vit import ViT
    from mpp.models.vit_config import ViTConfig
    from mpp.objectives.masked_patch import MaskedPatchPrediction

    shape = size.shape() | {"image": (size.image, size.image)}
    return MaskedPatchPrediction(ViT(ViTConfig(**shape)))


@dataclass(frozen=True)
class SameBatch:
    """One batch in memory where `mpp.train` expects a reader."""

    batch: "Batch"

    def at(self, step: int) -> "Batch":
        return self.batch

    def iterate(self, start: int, stop: Sequence[int] = ()) -> "Iterator[Batch]":
        return itertools.repeat(self.batch)


def prepare_ours(
    size: Size,
    device: str,
    threads: int,
    steps: int = STEPS,
    micro_batch: int | Literal["auto"] = "auto",
    compiled: bool | None = None,
) -> Callable[[], Timing]:
    """Our step by default settings."""
    settle(threads)
    return our_step(our_objective(size), size, device, steps, micro_batch, compiled)


def our_step(
    objective: "Objective",
    size: Size,
    device: str,
    steps: int = STEPS,
    micro_batch: int | Literal["auto"] = "auto",
    compiled: bool | None = None,
) -> Callable[[], Timing]:
    """What `mpp.train` does with each batch."""
    from mpp.batch import Batch
    from mpp.execution import choose, forward_pass
    from mpp.loop import build_optimizer, update
    from mpp.train_config import TrainConfig

    batch = Batch(images_of(size, device))
    objective = objective.to(device).train()
    config = TrainConfig(
        steps=10_000, batch=size.batch, micro_batch=micro_batch, lr=LEARNING_RATE, device=device, compile=compiled
    )
    execution = choose(objective, SameBatch(batch), config)
    optimizer = build_optimizer(objective, config)
    forward = forward_pass(objective, config, execution)
    numbers = itertools.count(1)

    def step() -> "Tensor":
        loss, _norm, _metrics = update(
            forward, objective, optimizer, batch, config, execution.micro_batch, 0, next(numbers)
        )
        return loss

    return lambda: timed(step, size.batch, device, steps)


def settle(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)


def timed(step: Step, batch: int, device: str, steps: int = STEPS) -> Timing:
    """One round: warm-up, then some steps on the clock."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(WARM_UP):
        step()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        loss = step()
    wait()
    seconds = time.perf_counter() - start
    if device == "cuda":
        torch.cuda.empty_cache()  # all contenders share one GPU
    return Timing(steps * batch, seconds, {"loss": loss.item()})


def contenders(size: Size, device: str, threads: int, compiled: bool) -> list[Contender]:
    shared: dict[str, Any] = {"size": size, "device": device, "threads": threads}
    names = (VIT_PYTORCH, VIT_PYTORCH_BF16, TIMM, TIMM_BEST)
    ours = Contender(OURS, prepare_ours, shared)
    extra = [Contender(OURS_COMPILED, prepare_ours, {**shared, "compiled": True})] if compiled else []
    return [ours, *extra, *(Contender(name, prepare_peer, {**shared, "name": name}) for name in names)]


def micro_batches(size: Size, device: str, threads: int, parts: Sequence[int]) -> list[Contender]:
    """Ours at each of these micro-batches, beside the one that it chooses itself."""
    shared: dict[str, Any] = {"size": size, "device": device, "threads": threads}
    ours = [Contender(f"mpp, micro_batch {part}", prepare_ours, {**shared, "micro_batch": part}) for part in parts]
    return [Contender(OURS, prepare_ours, shared), *ours]


def compare(name: str, timings: dict[str, list[Timing]], device: str) -> list[Ratio]:
    bars = {peer: Bar(value) for peer, value in BARS[name].items()} if device == "cpu" else {}
    if VIT_PYTORCH not in timings:  # micro-batches
        return [harness.speed(timings, part, OURS) for part in timings if part != OURS]
    speeds = [harness.speed(timings, OURS, peer, bars.get(peer)) for peer in timings if peer != OURS]
    return [*speeds, harness.memory(timings, OURS, VIT_PYTORCH, MEMORY_BAR)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help="default: all of the device")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="also ours with train.compile")
    parser.add_argument("--micro-batches", nargs="+", type=int, metavar="IMAGES", help="compare these, and no peers")
    options = parser.parse_args()
    sizes = SIZES[options.device]
    if unknown := set(options.sizes or ()) - set(sizes):
        parser.error(f"--sizes {' '.join(sorted(unknown))}: {options.device} has {' '.join(sizes)}")
    tables = {}
    for name in options.sizes or sizes:
        where = sizes[name], options.device, options.threads
        entrants = (
            micro_batches(*where, options.micro_batches)
            if options.micro_batches
            else contenders(*where, options.compiled)
        )
        timings = harness.interleave(entrants, options.rounds)
        ratios = compare(name, timings, options.device)
        harness.table(f"{name} {sizes[name]}", timings, ratios)
        tables[name] = harness.summary(asdict(sizes[name]) | {"steps": STEPS, "warm_up": WARM_UP}, timings, ratios)
    kind = "micro-batches" if options.micro_batches else "step"
    harness.write(f"{kind}-{options.device}", options.threads, options.device, tables)


if __name__ == "__main__":
    main()
