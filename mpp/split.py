"""Tensors that are split among processes, torch's DTensors: one's own part, the whole, and parts of a whole again.

Nothing here imports torch.distributed.tensor, which takes a second, before there are such tensors.
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def is_split(tensor: Tensor) -> bool:
    """Whether each process has a part of the tensor alone; `tensor.shape` is that of the whole even so."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which shares its memory and may be empty; all of one that is not split."""
    split: Any = tensor
    return split.to_local() if is_split(tensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on its device; of a split one every process has to ask for it, at the same moment."""
    split: Any = tensor
    return split.full_tensor() if is_split(tensor) else tensor


@torch.no_grad()
def split_as(other: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, split as the other one is; each keeps a copy of its part."""
    if not is_split(other) or other.shape != tensor.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    split: Any = other
    return distribute_tensor(tensor, split.device_mesh, split.placements, src_data_rank=None)


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's weights are split, and gathered around its calls (mpp.sharding): whoever has a part of them
    must call it when the others do."""
    return hasattr(module, "set_requires_gradient_sync")  # FSDPModule's


def let_go(module: nn.Module) -> None:
    """Frees what a sharded module still holds gathered after a call without a backward pass."""
    sharded: Any = module
    if is_sharded(module):
        sharded.reshard()


def uncompiled() -> AbstractContextManager[object]:
    """Lets what is compiled of a sharded module run as it is: to compile it once more takes longer than a few calls."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
