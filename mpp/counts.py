"""What a recipe costs, counted on stand-ins for tensors: parameters, FLOPs, and what a forward pass keeps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from mpp.batch import Batch
from mpp.execution import forward_pass
from mpp.hardware import device_of
from mpp.models.encoders import build_encoder
from mpp.models.trunk import Block
from mpp.objectives import build_objective
from mpp.objectives.base import Objective
from mpp.recipe import Recipe
from mpp.train_config import Execution, Precision

COUNTED = 2  # images on which costs are counted: batch norm takes no single one


def on_meta(recipe: Recipe) -> Objective:
    """The recipe's objective on torch's "meta" device, which has shapes and no numbers."""
    with torch.device("meta"):
        return build_objective(build_encoder(recipe.model), recipe.objective)


def parameters(recipe: Recipe, *, trained: bool = True) -> dict[str, int]:
    """Parameters of each part of the encoder and of the objective: those that are trained, or the others."""
    counts: dict[str, int] = {}
    for name, parameter in on_meta(recipe).named_parameters():
        if parameter.requires_grad == trained:
            part = ".".join(name.split(".")[: 2 if name.startswith("encoder.") else 1])
            counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def cost(recipe: Recipe) -> int:
    """FLOPs of one image, forward and backward, with what activation checkpointing computes twice.

    Counted, not computed: the objective runs on torch's "meta" device, which has shapes and no numbers.
    """
    objective = on_meta(recipe)
    objective.encoder.activation_checkpointing = recipe.train.activation_checkpointing
    with torch.device("meta"), FlopCounterMode(display=False, custom_mapping=COUNTERS) as counter:
        loss, _ = objective(noise(recipe, COUNTED))
        loss.backward()
    return counter.get_total_flops() // COUNTED


def convolution_backward_flops(
    gradient: Sequence[int], images: Sequence[int], weight: Sequence[int], *settings: Any, **shapes: Any
) -> int:
    """FLOPs of the gradients of a convolution: those of its forward pass for each that is wanted.

    PyTorch's own count takes a depthwise convolution for a whole one.
    """
    return 2 * math.prod(gradient) * math.prod(weight[1:]) * sum(settings[7][:2])


COUNTERS = {torch.ops.aten.convolution_backward: convolution_backward_flops}


def activation_bytes(recipe: Recipe, execution: Execution) -> int:
    """Bytes that the forward pass of a micro-batch keeps for the backward pass, on the device of the recipe."""
    config, eager = replace(recipe.train, activation_checkpointing=False), replace(execution, compile=False)
    return _kept(
        recipe,
        execution.micro_batch,
        device_of(recipe.train.device),
        lambda objective: forward_pass(objective, config, eager),
    )


def activations_on_cuda(recipe: Recipe, precision: Precision) -> tuple[int, int]:
    """The same on a GPU that need not be there: bytes whatever the images, which are casts of weights, and of an image.

    It is what an eager forward pass keeps; a compiled one keeps less.
    """

    def forward(objective: Objective) -> Callable[[Batch], object]:
        return _as_on_cuda(objective, precision)

    few, more = (_kept(recipe, images, torch.device("cuda"), forward) for images in (COUNTED, 2 * COUNTED))
    image = (more - few) // COUNTED
    return few - COUNTED * image, image


def _kept(
    recipe: Recipe, images: int, device: torch.device, forward: Callable[[Objective], Callable[[Batch], object]]
) -> int:
    """Bytes that a forward pass keeps.

    The objective runs on stand-ins for the device's tensors, on which PyTorch chooses the kernels that it would
    choose there: a fused one keeps no scores of attention. With activation checkpointing a block keeps its input, and
    the largest block all else too, once.
    """
    blocks: dict[str, int] = {}  # bytes first kept in a block
    inputs = 0
    seen: set[int] = set()
    tensors: list[Tensor] = []  # alive, so that no two have the same address
    inside = ""

    def keep(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        if (key := id(tensor.untyped_storage())) not in seen:
            seen.add(key)
            blocks[inside] = blocks.get(inside, 0) + tensor.untyped_storage().nbytes()
        return tensor

    def enter(name: str, block: nn.Module, given: tuple[Any, ...]) -> None:
        nonlocal inside, inputs
        inside, inputs = name, inputs + given[0].untyped_storage().nbytes()

    def leave(block: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        nonlocal inside
        inside = ""

    objective = on_meta(recipe)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        objective.to_empty(device=device)
        for name, block in objective.encoder.named_modules():
            if isinstance(block, Block):
                block.register_forward_pre_hook(partial(enter, name))
                block.register_forward_hook(leave)
        seen.update(id(parameter.untyped_storage()) for parameter in objective.parameters())
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            forward(objective)(noise(recipe, images))
    outside = blocks.pop("", 0)
    if recipe.train.activation_checkpointing:
        return outside + inputs + max(blocks.values(), default=0)
    return outside + sum(blocks.values())


def _as_on_cuda(objective: Objective, precision: Precision) -> Callable[[Batch], object]:
    """The forward pass of `mpp.execution` on CUDA, where PyTorch may have been built without: `torch.autocast` and the
    choice of attention's kernel would then do otherwise."""

    def forward(batch: Batch) -> object:
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", precision == "bfloat16")
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            with FusedAttention(precision):
                return objective(batch)
        finally:
            torch.clear_autocast_cache()
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])

    return forward


class FusedAttention(TorchFunctionMode):
    """Attention by the kernels that CUDA has: flash attention, or the memory-efficient one for a bias or in float32."""

    def __init__(self, precision: Precision) -> None:
        super().__init__()
        self.dtype = getattr(torch, precision)

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, k, v = (tensor.to(self.dtype) for tensor in args[:3])  # as autocast does
        bias = args[3] if len(args) > 3 else None
        if bias is None and self.dtype == torch.bfloat16:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        bias = None if bias is None else bias.to(self.dtype).expand(*q.shape[:3], k.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]


def blocks_of(recipe: Recipe) -> tuple[int, ...]:
    """Parameters of each block of the objective, its encoder's and others'."""
    blocks = [part for part in on_meta(recipe).modules() if isinstance(part, Block)]
    return tuple(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)


def noise(recipe: Recipe, images: int, make: Callable[..., Tensor] = torch.empty) -> Batch:
    """A batch of that many images in the shapes that the recipe reads; by default nothing is written to it."""
    shapes = [(images, recipe.model.channels, *size) for size in (recipe.model.image, *recipe.view_sizes)]
    first, *views = (make(shape, dtype=torch.uint8) for shape in shapes)
    return Batch(first, torch.zeros(images, dtype=torch.int64), tuple(views))
