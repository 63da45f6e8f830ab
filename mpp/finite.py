"""Whether tensors hold numbers alone: with a single NaN or infinity in its weights a model's every answer is none."""

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; one pass without a copy, as minimum and maximum pass NaN on."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    lowest, highest = torch.aminmax(tensor.detach())
    return bool(lowest.isfinite() & highest.isfinite())


def broken(tensor: Tensor) -> str:
    """What is wrong with a tensor that is not finite, in words: 2 of 64 numbers are not finite, such as nan."""
    wrong = ~tensor.detach().isfinite()
    return f"{int(wrong.sum())} of {tensor.numel()} numbers are not finite, such as {tensor[wrong][0].item():g}"
