"""Parameter groups, and schedules as pure functions of the step."""

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

KERNELS = (nn.Linear, nn.Conv2d)  # layers whose weights decay


class Layered(Protocol):
    """What layer-wise decay asks of an encoder."""

    layers: int

    def layer_of(self, parameter: str) -> int: ...


def parameter_groups(
    module: nn.Module, weight_decay: float, layer_decay: float = 1.0, encoder: Layered | None = None
) -> list[dict[str, Any]]:
    """Groups trained parameters by weight decay and by `scale`, the share of the learning rate that they get.

    Weights of linear and convolution layers decay, all else does not: biases, norms, positions and tokens, whatever
    they are called (big_vision's rule: only kernels decay). Layer l of an encoder with n layers, whose parameters are
    named `encoder.*` in the module, gets layer_decay ** (n + 1 - l) of the rate, all else the whole of it (BEiT, arXiv
    2106.08254; MAE's util/lr_decay.py). Groups of the whole rate come first.
    """
    kernels = {id(part.weight) for part in module.modules() if isinstance(part, KERNELS)}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        above = 0
        if encoder is not None and name.startswith("encoder."):
            above = encoder.layers + 1 - encoder.layer_of(name.removeprefix("encoder."))
        groups.setdefault((layer_decay**above, id(parameter) in kernels), []).append(parameter)
    ordered = sorted(groups.items(), reverse=True)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "scale": scale}
        for (scale, decays), parameters in ordered
    ]


def learning_rate(step: int, *, peak: float, steps: int, warmup: int, end: float = 0.0) -> float:
    """The rate of update `step` (from 0): linear from 0 up to the peak, then half a cosine down to `end`.

    As in MAE's util/lr_sched.py and, with end 0, the ViT paper's code.
    """
    if step < warmup:
        return peak * step / warmup
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


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
