"""One of several processes: `python sharding_worker.py JOBS.json` carries out runs, each a recipe and what to set.

It has an objective with a teacher, and batch norm in a head.
"""

import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

import mpp
from mpp.ranks import together
from mpp.recipe import load_recipe
from mpp.run import run
from mpp.split import own_part


@dataclass(frozen=True)
class TaughtConfig(mpp.ObjectiveConfig):
    name: str = "taught"

    metrics: ClassVar = {"similarity": mpp.Metric("Cosine of prediction and teacher")}
    pictures: ClassVar = {"said": "a brightness for each image"}


class Taught(mpp.Objective):
    """Predicts what a teacher, a running average of the encoder, says of the mirrored image; both see it twice."""

    def __init__(self, encoder: mpp.ViT, config: TaughtConfig) -> None:
        super().__init__(encoder, config)
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        width = encoder.width
        self.head = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.GELU(), nn.Linear(width, width))
        self.scale_of_head = nn.Parameter(torch.ones(1))  # fewer rows than processes

    def train(self, mode: bool = True) -> "Taught":
        super().train(mode)
        self.head[1].eval()  # in which it does not look across the batch
        return self

    def forward(self, batch: mpp.Batch) -> tuple[Tensor, dict[str, Tensor]]:
        views = [batch.images, batch.images.flip(-1)]
        said = [
            nn.functional.normalize(self.head(self.encoder(view)).float() * self.scale_of_head.float())
            for view in views
        ]
        with torch.no_grad():
            true = [nn.functional.normalize(self.teacher(view).float()) for view in reversed(views)]
        similarity = sum((one * other).sum(1).mean() for one, other in zip(said, true, strict=True)) / 2
        return 2 - 2 * similarity, {"similarity": similarity.detach()}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        if progress == 1:  # the last step
            held, whole = (
                sum(map(Tensor.numel, some)) for some in (map(own_part, self.parameters()), self.parameters())
            )
            print(f"holds {held} of {whole} numbers", file=sys.stderr)
        for own, student in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
            own.lerp_(student, 0.1)

    def results(self) -> dict[str, nn.Module]:
        return {"encoder": self.teacher}

    def pictures(self, batch: mpp.Batch) -> dict[str, Tensor]:
        brightness = self.head(self.encoder(batch.images)).mean(1)  # with gradients, for whoever does not think of them
        return {"said": (255 * brightness.sigmoid()).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8)}


mpp.OBJECTIVES.add("taught", TaughtConfig, Taught)


def carry_out(jobs: list[list[str]]) -> None:
    for recipe, *overrides in jobs:
        run(load_recipe(Path(recipe), overrides))


if __name__ == "__main__":
    with together("cpu", 2):
        carry_out(json.loads(Path(sys.argv[1]).read_text()))
