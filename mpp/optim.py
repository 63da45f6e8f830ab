"""Parameter groups, and schedules as pure functions of the step."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Splits trained parameters in two groups: weights of linear and convolution layers decay, all else does not.

    So biases, norms, positions and tokens do not, whatever they are called (big_vision's rule: only kernels decay).
    """
    kernels = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in kernels], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in kernels], "weight_decay": 0.0},
    ]


def learning_rate(step: int, *, peak: float, steps: int, warmup: int) -> float:
    """The rate of update `step` (from 0): linear from peak / warmup up to the peak, then half a cosine down to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def ema_decay(step: int, decay: float) -> float:
    """The decay of update `step` of a running average: lower at first, so that the initial weights fade soon."""
    return min(decay, (1 + step) / (10 + step))


def gradient_norm(parameters: Iterable[nn.Parameter], clip: float | None) -> Tensor:
    """The norm of all gradients together, which are scaled down to `clip` where they exceed it."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if clip is not None:
        torch._foreach_mul_(gradients, torch.clamp(clip / (norm + 1e-6), max=1.0))  # 1e-6 as torch's clip_grad_norm_
    return norm
