"""A ridge classifier on frozen features: closed form, so that nothing but the features differs between encoders."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mpp.errors import UserError
from mpp.eval.features import extract
from mpp.models.vit import ViT
from mpp.recipe import load_recipe
from mpp.run import build
from mpp.seeds import permutation
from mpp.weights import load_encoder

L2 = tuple(10.0**exponent for exponent in range(-6, 3))  # times the number of images
HOLD_OUT = 10  # one in so many training images chooses l2 and the block
HOLD_OUT_SEED = 0


class ProbeError(UserError):
    """Shards that no classifier can be fitted to."""


@dataclass(frozen=True)
class Ridge:
    """What a ridge classifier reached, and what was chosen for it without the test split."""

    accuracy: float  # on the test split, in [0, 1]
    held_out: float  # on the held-out training images that chose block and l2
    block: int  # whose output it reads, from 1; the last one is the encoder's depth
    l2: float

    def __str__(self) -> str:
        return (
            f"ridge: {100 * self.accuracy:.2f} % on the test split "
            f"(held-out part of train {100 * self.held_out:.2f} %; block {self.block}, l2 {self.l2:g} an image)"
        )


def ridge(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Ridge:
    """Fits one-against-all least squares on +-1 targets to the features (n, blocks, d) of the best block.

    Block and l2 are chosen on a tenth of the training images, then all of them are fitted.
    """
    order = torch.from_numpy(permutation(len(train), HOLD_OUT_SEED))
    held, rest = order[: len(order) // HOLD_OUT], order[len(order) // HOLD_OUT :]
    best = max(
        (
            (score, block, l2)
            for block in range(train.shape[1])
            for score, l2 in _scores(train[rest, block], train_labels[rest], train[held, block], train_labels[held], L2)
        ),
        key=lambda found: found[0],
    )
    score, block, l2 = best
    [(accuracy, _)] = _scores(train[:, block], train_labels, test[:, block], test_labels, (l2,))
    return Ridge(accuracy, score, block + 1, l2)


def _scores(x: Tensor, y: Tensor, test: Tensor, truth: Tensor, grid: tuple[float, ...]) -> list[tuple[float, float]]:
    """The accuracy on `test` for each l2 of a grid, from one decomposition of the features' covariance, in float64."""
    x, test = x.double(), test.double()
    mean, std = x.mean(0), x.std(0, correction=0) + 1e-5
    x, test = (x - mean) / std, (test - mean) / std
    classes = int(max(y.max(), truth.max())) + 1
    target = 2.0 * F.one_hot(y, classes).double() - 1
    offset = target.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    projected = vectors.T @ (x.T @ (target - offset)) / len(x)
    found = []
    for l2 in grid:
        weight = vectors @ (projected / (values.clamp(min=0) + l2).unsqueeze(1))
        guess = (test @ weight + offset).argmax(1)
        found.append(((guess == truth).double().mean().item(), l2))
    return found


def probe(weights: Path, shards: Path, *, train: str = "train", test: str = "test", untrained: bool = False) -> Ridge:
    """The ridge classifier on the features of an encoder, or with `untrained` of the same one before its training."""
    encoder = _before_training(weights) if untrained else load_encoder(weights)
    x, y = extract(encoder, shards, train)
    test_x, test_y = extract(encoder, shards, test)
    for split, labels in ((train, y), (test, test_y)):
        if labels is None or (labels < 0).any():
            raise ProbeError(f"{shards}: split {split} has images without labels; a probe needs them all")
    assert y is not None
    assert test_y is not None
    if len(y) < HOLD_OUT:
        raise ProbeError(f"{shards}: split {train} has {len(y)} images; a probe needs at least {HOLD_OUT}")
    return ridge(x, y, test_x, test_y)


def _before_training(run: Path) -> ViT:
    """The encoder that a run started with."""
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise ProbeError(f"{run}: no run folder (it has no recipe.yaml), so what it was before training is not known")
    return build(load_recipe(recipe)).encoder
