"""Parameter groups, and schedules as pure functions of the step."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mpp.split import own_part, whole

Schedule = Callable[[float], float]  # of the share of the run that is done, in [0, 1]
KERNELS = (nn.Linear, nn.Conv2d)  # layers whose weights decay


class Layered(Protocol):
    """What layer-wise decay asks of an encoder."""

    layers: int

    def layer_of(self, parameter: str) -> int: ...


class Scale(NamedTuple):
    """Factors of the learning rate and the weight decay of a parameter: numbers, or functions of progress."""

    lr: float | Schedule = 1.0
    weight_decay: float | Schedule = 1.0

    def at(self, progress: float) -> tuple[float, float]:
        """Both when that share of the run is done."""
        lr, decay = (factor(progress) if callable(factor) else factor for factor in self)
        return lr, decay


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    layer_decay: float = 1.0,
    encoder: Layered | None = None,
    *,
    scale: Callable[[str], Scale] = lambda name: Scale(),
) -> list[dict[str, Any]]:
    """Groups trained parameters by what they get of the learning rate and of the weight decay, for `set_rates`.

    Weights of linear and convolution layers decay, all else does not: biases, norms, positions and tokens, whatever
    they are called (big_vision's rule: only kernels decay). Layer l of an encoder with n layers, whose parameters are
    named `encoder.*` in the module, gets layer_decay ** (n + 1 - l) of the rate, all else the whole of it (BEiT, arXiv
    2106.08254; MAE's util/lr_decay.py). Groups of the whole rate come first. scale: further factors by name.
    """
    kernels = {id(part.weight) for part in module.modules() if isinstance(part, KERNELS)}
    groups: dict[tuple[float, bool, Scale], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        above = 0
        if encoder is not None and name.startswith("encoder."):
            above = encoder.layers + 1 - encoder.layer_of(name.removeprefix("encoder."))
        key = layer_decay**above, id(parameter) in kernels, scale(name)
        groups.setdefault(key, []).append(parameter)
    ordered = sorted(groups.items(), key=lambda group: group[0][:2], reverse=True)
    found = []
    for (layer, decays, factors), parameters in ordered:
        decay = weight_decay if decays else 0.0
        group = {"params": parameters, "weight_decay": decay, "decay": decay, "scale": layer, "factors": factors}
        found.append(group)
    return found


def set_rates(optimizer: torch.optim.Optimizer, rate: float, progress: float) -> None:
    """Gives each group its part of a learning rate and of the weight decay when that share of the run is done."""
    for group in optimizer.param_groups:
        lr, decay = group["factors"].at(progress)
        group["lr"], group["weight_decay"] = rate * group["scale"] * lr, group["decay"] * decay


def learning_rate(
    step: int, *, peak: float, steps: int, warmup: int, end: float = 0.0, constant: int | None = None
) -> float:
    """The rate of update `step` (from 0): linear from 0 up to the peak, then half a cosine down to `end`.

    As in MAE's util/lr_sched.py and, with end 0, the ViT paper's code.

    constant: of a schedule with a constant phase the update at which it ends (warm-up, stable, decay: MiniCPM, arXiv
        2404.06395). From there on the rate falls as 1 - sqrt(share of the decay that is done), which Hägele et al.
        (arXiv 2405.18392, section 3) found better than a line.
    """
    if step < warmup:
        return peak * step / warmup
    if constant is not None:
        return end + (peak - end) * (1 - math.sqrt(max(0, step - constant) / max(1, steps - constant)))
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def ema_decay(step: int, decay: float) -> float:
    """The decay of update `step` of a running average: lower at first, so that the initial weights fade soon."""
    return min(decay, (1 + step) / (10 + step))


def gradient_norm(parameters: Iterable[nn.Parameter], clip: float | None) -> Tensor:
    """The norm of all gradients together, which are scaled down to `clip` where they exceed it."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    if clip is not None:
        scale = torch.clamp(clip / (norm + 1e-6), max=1.0)  # 1e-6 as torch's clip_grad_norm_
        torch._foreach_mul_([own_part(gradient) for gradient in gradients], scale)
    return norm
