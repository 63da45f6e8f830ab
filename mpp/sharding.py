"""`train.shard: full`: weights, gradients, averages and optimizer state split among the processes by PyTorch's FSDP2.

A block's weights are gathered before it computes and let go afterwards, in the backward pass again; its gradients are
averaged over the processes as soon as they are there, after each micro-batch, and each process keeps its part of them.
What stands in no block, such as the stem and heads, is gathered for the whole of a pass.
"""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.modules.batchnorm import _BatchNorm

from mpp.hardware import device_of
from mpp.models.trunk import Block
from mpp.objectives.base import Objective
from mpp.ranks import Ranks
from mpp.train_config import Execution, TrainConfig


def to_shard(config: TrainConfig, ranks: Ranks) -> bool:
    """Whether weights are split: one process has all of them, whatever the recipe asks of many."""
    return config.shard == "full" and ranks.size > 1


def shard(objective: Objective, config: TrainConfig, execution: Execution) -> None:
    """Splits all parameters of an objective among all processes, and moves them to the device block by block.

    All processes have the same weights before. In bfloat16 it is weights that are cast, as they are gathered, and
    activations follow; batch norm's stay float32, as its statistics. Gradients are averaged in float32. From here on
    every call of the objective is one of all processes.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    device = device_of(config.device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    same = MixedPrecisionPolicy(cast_forward_inputs=False)  # angles of positions stay float32
    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = low if execution.precision == "bfloat16" else same
    parts = list(objective.modules())
    blocks = [part for part in parts if isinstance(part, Block)]
    for block in blocks if execution.compile else ():  # by themselves, as between them weights are gathered
        options = {"deterministic": True} if config.deterministic else None
        block.forward = torch.compile(block.forward, options=options)  # type: ignore
    for norm in parts if policy is low else ():
        if isinstance(norm, _BatchNorm):
            fully_shard(norm, mesh=mesh, mp_policy=same)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy)
    for method in ("pictures", "vectors"):
        register_fsdp_forward_method(objective, method)
