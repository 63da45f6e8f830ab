"""Whether tensors hold numbers alone, of the right kind: with a NaN or infinity in its weights every answer is none."""

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


def same_kind(found: Tensor, ours: Tensor) -> bool:
    """Whether a tensor of a file can be ours: both of floating-point numbers, of any precision, or both of others."""
    return found.is_floating_point() == ours.is_floating_point() and not found.is_complex()


def of_kind(found: Tensor) -> str:
    """What is wrong with a tensor of another kind, in words."""
    return f"holds {str(found.dtype).removeprefix('torch.')}, and not plain numbers as weights are (quantized?)"
