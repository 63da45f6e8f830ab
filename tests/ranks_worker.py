"""One of several processes: `python ranks_worker.py FOLDER OUT` carries out all recipes of a folder in turn.

It has an objective that looks across its whole batch, and one that draws from torch's generator.
"""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import mpp
from mpp.ranks import together
from mpp.recipe import load_recipe
from mpp.run import run


@dataclass(frozen=True)
class AcrossConfig(mpp.ObjectiveConfig):
    name: str = "across"

    @property
    def needs(self) -> mpp.Needs:
        return mpp.Needs(whole_batch=True)


class Across(mpp.Objective):
    """Tells apart the images of a batch, of which a share of the patches is dropped: each from all others."""

    def __init__(self, encoder: mpp.ViT, config: AcrossConfig) -> None:
        super().__init__(encoder, config)
        self.head = nn.Linear(encoder.width, 8)

    def forward(self, batch: mpp.Batch) -> tuple[Tensor, dict[str, Tensor]]:
        views = []
        for _ in range(2):
            kept = mpp.masks.random_index(len(batch), 16, 8, batch.images.device)
            tokens = self.encoder.encode(self.encoder.embed(batch.images), kept)
            views.append(nn.functional.normalize(self.head(self.encoder.pool(tokens)), dim=1))
        scores = 10 * views[0] @ views[1].T
        return nn.functional.cross_entropy(scores.float(), torch.arange(len(scores))), {}


@dataclass(frozen=True)
class LuckyConfig(mpp.ObjectiveConfig):
    name: str = "lucky"


class Lucky(Across):
    """Draws from torch's generator."""

    def forward(self, batch: mpp.Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().forward(batch)
        return loss * torch.rand(()), metrics


def add_parts() -> None:
    mpp.OBJECTIVES.add("across", AcrossConfig, Across)
    mpp.OBJECTIVES.add("lucky", LuckyConfig, Lucky)


def carry_out(folder: Path, out: Path) -> None:
    for path in sorted(folder.glob("*.yaml")):
        run(load_recipe(path, [f"out={out / path.stem}"]))


def by_hand(shards: Path, out: Path, rank: int = 0, ranks: int = 1) -> None:
    """Training by `mpp.train`, on batches read in parts."""
    torch.manual_seed(0)
    config = mpp.ViTConfig(image=(8, 8), patch=2, width=32, depth=2, heads=2, drop_path=0.2)
    objective = mpp.MaskedPatchPrediction(mpp.ViT(config))
    batches = mpp.read_shards(shards, 24, seed=2, rank=rank, ranks=ranks)
    train = mpp.TrainConfig(steps=8, batch=24, micro_batch=6, lr=1e-2, optimizer="sgd", device="cpu", threads=1)
    mpp.train(objective, batches, train, out=out, log=mpp.LogConfig(every=1, pictures=0, tensorboard=False))
    if rank == 0:
        torch.save([value.detach() for value in objective.parameters()], out / "weights.pt")


if __name__ == "__main__":
    add_parts()
    with together("cpu", 2) as processes:
        told = processes.gathered([math.nan, math.inf, processes.rank])
        assert [str(one) for one in told] == [f"[nan, inf, {rank}]" for rank in range(processes.size)]
        carry_out(Path(sys.argv[1]), Path(sys.argv[2]))
    if len(sys.argv) > 3:
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.distributed.init_process_group("gloo")
        by_hand(Path(sys.argv[3]), Path(sys.argv[2]) / "by hand", rank, ranks)
        torch.distributed.destroy_process_group()
