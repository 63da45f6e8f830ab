"""MAE's linear probe as published (arXiv 2111.06377, appendix A.1; main_linprobe.py, util/lars.py).

Batch norm without affine parameters, which stays in training mode, then a linear head, trained by LARS without weight
decay for 90 epochs on random crops and flips. The crops differ in every epoch, so features cannot be kept: the frozen
encoder runs 90 times over the images. Where MAE reports the best epoch on the test images, this reports the last.
Crops follow the same shares (0.08 to 1), drawn as GoogLeNet's, which tries again where MAE's takes what it gets.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mpp.augment.config import AugmentConfig
from mpp.batch import Batch
from mpp.data.read import Batches, read_shards
from mpp.hardware import autocast, device_of
from mpp.models.encoder import Encoder
from mpp.optim import learning_rate
from mpp.seeds import seed_of

from ..features.extract import BATCH, Features, ProbeError, output_part, vectors
from .task import Row, Task

AREA = (0.08, 1.0)  # share of the picture that a crop holds; RandomResizedCrop's default
MOMENTUM = 0.9  # of LARS
TRUST = 0.001  # LARS's trust coefficient
NORM_EPS = 1e-6
HEAD_STD = 0.01  # of the head's truncated normal


@dataclass(frozen=True)
class SGDConfig:
    """The published settings (table 10)."""

    epochs: int = 90
    warmup: int = 10  # epochs
    batch: int = 16384  # images, or the whole split where it has fewer
    blr: float = 0.1  # base learning rate; times batch / 256
    seed: int = 0


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv 1708.03888) as MAE's: vectors such as biases are not scaled."""

    def __init__(self, params: Sequence[nn.Parameter], lr: float, momentum: float = MOMENTUM, trust: float = TRUST):
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                update = parameter.grad
                if parameter.ndim > 1:
                    size, change = parameter.norm(), update.norm()
                    both = (size > 0) & (change > 0)
                    update = update * torch.where(both, group["trust"] * size / change, 1.0)
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].mul_(group["momentum"]).add_(update)
                parameter.sub_(group["lr"] * state["momentum"])


def build_head(width: int, classes: int, seed: int) -> nn.Sequential:
    """Batch norm without affine parameters and a linear map."""
    linear = nn.Linear(width, classes)
    generator = torch.Generator().manual_seed(seed_of(seed))
    nn.init.trunc_normal_(linear.weight, std=HEAD_STD, generator=generator)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=NORM_EPS), linear)


def rows(task: Task) -> list[Row]:
    """The accuracy of the head on the encoder's own output."""
    config, train = task.settings.get("linear-sgd") or SGDConfig(), task.train
    classes = len(train.classes)
    value = linear_sgd(task.encoder, task.shards, task.train_split, train.numbers, classes, task.test, config)
    return [Row("linear-sgd", "top1", value, {"features": train.output, **asdict(config)})]


def linear_sgd(
    encoder: Encoder,
    shards: str | Path,
    train: str,
    numbers: np.ndarray,
    classes: int,
    test: Features,
    config: SGDConfig | None = None,
) -> float:
    """The accuracy on `test` of a head trained on the images `numbers` of split `train`, all of which have labels.

    It reads the encoder's own output vector.
    """
    config = config or SGDConfig()
    if len(numbers) < 2:
        raise ProbeError(f"linear-sgd: batch norm needs at least 2 training images, split {train} has {len(numbers)}")
    device, training = device_of("auto"), encoder.training
    encoder.to(device).eval()
    micro = min(BATCH, len(numbers))
    parts = max(1, min(config.batch, len(numbers)) // micro)  # micro-batches a batch; what does not fill one is dropped
    batches = read_shards(
        shards,
        micro,
        split=train,
        image=encoder.input.image,
        seed=config.seed,
        train=True,
        augment=AugmentConfig(crop="inception", area=AREA),
        numbers=numbers,
    )
    head = build_head(encoder.width, classes, config.seed).to(device)
    _train(head, encoder, batches, parts, max(1, len(numbers) // (parts * micro)), config)
    encoder.train(training)
    head.eval()
    with torch.no_grad():
        guess = head(test.parts[test.output].float().to(device)).argmax(1).cpu()
    return (guess == test.labels).double().mean().item()


def _train(
    head: nn.Sequential, encoder: Encoder, batches: Batches, parts: int, steps_per_epoch: int, config: SGDConfig
) -> None:
    """Trains the head on batches of so many micro-batches; the batch norm sees each whole."""
    peak = config.blr * parts * batches.batch / 256
    optimizer = LARS(list(head.parameters()), lr=peak)
    steps, warmup = config.epochs * steps_per_epoch, config.warmup * steps_per_epoch
    stream = batches.iterate()
    for step in tqdm(range(steps), "linear-sgd", unit="step"):
        found = [_output(encoder, next(stream)) for _ in range(parts)]  # images of one micro-batch at a time
        features, labels = (torch.cat(both) for both in zip(*found, strict=True))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=peak, steps=steps, warmup=warmup)
        loss = F.cross_entropy(head(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _output(encoder: Encoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """The encoder's own output vectors (b, d) and the labels (b,), on the encoder's device."""
    device = encoder.mean.device
    assert batch.labels is not None, "the caller chose images with labels"
    with autocast(device):
        found = vectors(encoder, batch.images.to(device), [encoder.config.depth])
    return found[output_part(encoder)], batch.labels.to(device)
