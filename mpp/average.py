"""The running average of what is trained, which is the result where `train.ema` is above 0."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mpp.objectives.base import Objective
from mpp.split import own_part


def averaged(objective: Objective) -> dict[str, Tensor]:
    """What a running average is taken of: the parameters, and statistics such as batch norm's."""
    return {name: value for name, value in objective.state_dict().items() if value.is_floating_point()}


@torch.no_grad()
def average(ema: list[Tensor], objective: Objective, decay: float) -> None:
    """Moves the running average towards the parameters."""
    if ema:
        own = [own_part(value) for value in averaged(objective).values()]
        torch._foreach_lerp_([own_part(value) for value in ema], own, 1 - decay)


@torch.no_grad()
def adopt(objective: Objective, values: Iterable[Tensor]) -> None:
    """Copies values into the parameters, if there are any."""
    for own, value in zip(averaged(objective).values(), values, strict=False):
        own_part(own).copy_(own_part(value))


@contextlib.contextmanager
def swapped(objective: Objective, ema: list[Tensor]) -> Iterator[None]:
    """Puts the running average in the parameters' place, if there is one."""
    own = [value.clone() for value in averaged(objective).values()] if ema else []
    adopt(objective, ema)
    try:
        yield
    finally:
        adopt(objective, own)
