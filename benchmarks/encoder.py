"""A ViT's forward and backward pass, and its forward pass alone, ours against timm's of the same size.

    python -m benchmarks.encoder [--sizes S/16@224 B/16@224] [--rounds 15] [--threads 1] [--uint8] [--write]

One batch of normalised float images in memory, from pictures to one vector each. timm stands there in each way that its
users might run it, and ours has to be at least as fast as the fastest of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

from benchmarks import harness
from benchmarks.harness import Bar, Contender, Ratio, Timing
from benchmarks.step import Size, images_of, settle

if TYPE_CHECKING:
    from torch import Tensor, nn

Precision = Literal["float32", "autocast", "bfloat16"]  # bfloat16: of parameters and, with them, of all activations
Attention = Literal["fused", "plain"]

OURS, OURS_BF16 = "mpp, float32", "mpp, bfloat16"
FLOAT32: dict[str, Attention] = {"timm, float32, fused attention": "fused", "timm, float32, plain attention": "plain"}
BFLOAT16: dict[str, tuple[Precision, Attention]] = {
    "timm, bf16 autocast, fused attention": ("autocast", "fused"),
    "timm, bf16 autocast, plain attention": ("autocast", "plain"),
    "timm, bf16 parameters, fused attention": ("bfloat16", "fused"),
    "timm, bf16 parameters, plain attention": ("bfloat16", "plain"),
}
BAR = Bar(1.0)  # issue 5, against the fastest peer


SIZES = {
    "Ti/4@32": Size(32, 4, 192, 12, 3, 16),
    "S/4@32": Size(32, 4, 384, 12, 6, 8),
    "Ti/16@224": Size(224, 16, 192, 12, 3, 4),
    "S/16@224": Size(224, 16, 384, 12, 6, 2),
    "B/16@224": Size(224, 16, 768, 12, 12, 2),
}


def our_model(size: Size) -> "nn.Module":
    from mpp.models.vit import ViT
    from mpp.models.vit_config import ViTConfig

    image = (size.image, size.image)
    return ViT(ViTConfig(image=image, patch=size.patch, width=size.width, depth=size.depth, heads=size.heads))


def timm_model(size: Size, attention: Attention) -> "nn.Module":
    import timm
    from timm.models.vision_transformer import VisionTransformer

    timm.layers.set_fused_attn(attention == "fused")
    return VisionTransformer(
        size.image, size.patch, num_classes=0, embed_dim=size.width, depth=size.depth, num_heads=size.heads
    )


def prepare(
    size: Size, threads: int, precision: Precision, peer: Attention | None = None, uint8: bool = False
) -> Callable[[], Timing]:
    """Of ours, or with `peer` of timm's with that attention."""
    import torch
    import torch.nn.functional as F
    from torch.func import functional_call

    settle(threads)
    model = our_model(size) if peer is None else timm_model(size, peer)
    images = images_of(size, "cpu")  # uint8, as our readers deliver them
    if not uint8:
        images = (images.float() / 127.5 - 1).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    target = torch.randn(size.batch, size.width)

    def lowered() -> "dict[str, Tensor]":
        return {name: parameter.bfloat16() for name, parameter in model.named_parameters()}

    def forward(parameters: "dict[str, Tensor]") -> "Tensor":
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            vectors: Tensor = functional_call(model, parameters, (images,))  # (b, d)
            return vectors

    def step() -> None:
        """Forward and backward pass; the parameters and their gradients are float32 in every precision."""
        loss = F.mse_loss(forward(lowered() if precision == "bfloat16" else {}).float(), target)
        model.zero_grad()
        loss.backward()

    once = lowered() if precision == "bfloat16" else {}  # for the forward pass alone they are cast beforehand

    @torch.inference_mode()
    def infer() -> None:
        forward(once)

    step()
    return lambda: timed(model, step, infer, size.batch)


def timed(model: "nn.Module", step: Callable[[], None], infer: Callable[[], None], batch: int) -> Timing:
    """One round: a forward pass to warm up, one on the clock, then one with its backward pass."""
    model.eval()
    infer()
    wall, busy = clock(infer)
    model.train()
    seconds, cpu = clock(step)
    facts = {"cpu_us": 1e6 * cpu / batch, "forward_s": wall, "forward_cpu_us": 1e6 * busy / batch}
    return Timing(batch, seconds, facts)


def clock(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and CPU seconds of this process, of one call."""
    start, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - busy


def forward_alone(timings: Mapping[str, Sequence[Timing]]) -> dict[str, list[Timing]]:
    """The same rounds' forward passes."""
    return {
        name: [
            replace(run, seconds=run.facts["forward_s"], facts={"cpu_us": run.facts["forward_cpu_us"]}) for run in runs
        ]
        for name, runs in timings.items()
    }


def contenders(size: Size, threads: int, uint8: bool) -> list[Contender]:
    shared: dict[str, Any] = {"size": size, "threads": threads}
    ours = {OURS: "float32", OURS_BF16: "bfloat16"}
    all_ours = [Contender(name, prepare, {**shared, "precision": precision}) for name, precision in ours.items()]
    if uint8:
        all_ours += [
            Contender(f"{part.name}, uint8 images", prepare, {**part.arguments, "uint8": True}) for part in all_ours
        ]
    peers: dict[str, tuple[Precision, Attention]] = {name: ("float32", how) for name, how in FLOAT32.items()}
    return all_ours + [
        Contender(name, prepare, {**shared, "precision": precision, "peer": attention})
        for name, (precision, attention) in (peers | BFLOAT16).items()
    ]


def compare(timings: Mapping[str, Sequence[Timing]]) -> list[Ratio]:
    """Ours over every peer of the same precision; the bar is set against the one that took the least CPU time."""
    ratios = []
    for ours, peers in ((OURS, FLOAT32), (OURS_BF16, BFLOAT16)):
        best = min(peers, key=lambda name: statistics.median(run.facts["cpu_us"] for run in timings[name]))
        for peer in sorted(peers, key=lambda name: name != best):
            bar = BAR if peer == best else None
            ratios.append(harness.speed(timings, ours, peer, bar))
            ratios.append(replace(harness.processor_time(timings, ours, peer), bar=bar))
    return ratios + [
        harness.processor_time(timings, f"{ours}, uint8 images", ours)
        for ours in (OURS, OURS_BF16)
        if f"{ours}, uint8 images" in timings
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), metavar="SIZE")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--uint8", action="store_true", help="also ours from uint8 images, which it normalises itself")
    parser.add_argument("--write", action="store_true", help="keep the tables in results/encoder-cpu.json")
    options = parser.parse_args()
    tables = {}
    for name in options.sizes:
        size = SIZES[name]
        steps = harness.interleave(contenders(size, options.threads, options.uint8), options.rounds)
        for kind, timings in {"forward and backward": steps, "forward": forward_alone(steps)}.items():
            ratios = compare(timings)
            harness.table(f"{name}, batch {size.batch}, {kind}", timings, ratios)
            tables[f"{name} {kind}"] = harness.summary(asdict(size) | {"threads": options.threads}, timings, ratios)
    if options.write:
        harness.write("encoder-cpu", options.threads, "cpu", tables)


if __name__ == "__main__":
    main()
