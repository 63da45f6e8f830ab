"""Made-up features that the tests of the frozen-feature protocols share."""

import numpy as np
import torch
from torch import Tensor


def clouds(images: int, classes: int, width: int = 20, seed: int = 0, apart: float = 0.6) -> tuple[Tensor, Tensor]:
    """Overlapping, correlated clouds of features, unevenly scaled and off the centre, and their labels."""
    fixed, random = np.random.default_rng(99), np.random.default_rng(seed)
    centres, mixing = fixed.normal(size=(classes, width)) * apart, fixed.normal(size=(width, width))
    labels = random.integers(0, classes, images)
    features = (centres[labels] + random.normal(size=(images, width))) @ (mixing * np.logspace(0, -2, width)[:, None])
    features = features * np.logspace(0, 3, width) + 5
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)
