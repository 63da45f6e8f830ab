"""Attention by plain products against PyTorch's fused kernel, forward and backward on the CPU.

    python -m benchmarks.attention [--rounds 5] [--threads 2]

`mpp.models.mixers.attend` chooses by what this shows.
"""

import argparse
import time
from collections.abc import Callable
from typing import Literal

from benchmarks import harness
from benchmarks.harness import Contender, Timing
from benchmarks.step import settle

TOKENS = {65: 128, 197: 16, 577: 4}  # -> images a batch: tiny32, ViT at 224 and at 384
HEADS, SIDE = 6, 64  # of queries and keys
PASSES, WARM_UP = 20, 3  # per round
Kernel = Literal["plain", "fused"]


def prepare(kernel: Kernel, dtype: str, tokens: int, threads: int) -> Callable[[], Timing]:
    import torch
    import torch.nn.functional as F

    settle(threads)
    shape = TOKENS[tokens], HEADS, tokens, SIDE
    q, k, v = (torch.randn(shape, dtype=getattr(torch, dtype), requires_grad=True) for _ in range(3))

    def once() -> None:
        if kernel == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = ((q * SIDE**-0.5) @ k.transpose(2, 3)).softmax(-1) @ v
        mixed.sum().backward()

    def run() -> Timing:
        for _ in range(WARM_UP):
            once()
        start = time.perf_counter()
        for _ in range(PASSES):
            once()
        return Timing(PASSES * TOKENS[tokens], time.perf_counter() - start)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    tables = {}
    for dtype in ("float32", "bfloat16"):
        for tokens in TOKENS:
            shared = {"dtype": dtype, "tokens": tokens, "threads": options.threads}
            contenders = [Contender(kernel, prepare, {"kernel": kernel, **shared}) for kernel in ("plain", "fused")]
            timings = harness.interleave(contenders, options.rounds)
            ratios = [harness.speed(timings, "plain", "fused")]
            harness.table(f"attention, {dtype}, {tokens} tokens", timings, ratios)
            tables[f"{dtype}-{tokens}"] = harness.summary(shared, timings, ratios)
    harness.write("attention-cpu", options.threads, "cpu", tables)


if __name__ == "__main__":
    main()
