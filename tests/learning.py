"""What is asked of every objective: that it learns, leaves nothing idle, compiles as a whole, and bears bfloat16."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpp.execution import Loss


def trained(objective: nn.Module, forward: Callable[[], Loss], steps: int = 25) -> list[float]:
    """Trains by Adam, which leaves the last gradients; the losses."""
    optimizer, losses = torch.optim.Adam(objective.parameters(), lr=3e-3), []
    for _ in range(steps):
        loss, _ = forward()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses


def idle(objective: nn.Module) -> list[str]:
    """The parameters that got no gradient."""
    return [name for name, part in objective.named_parameters() if part.grad is None or not part.grad.any()]


def check_compiled(compute: Callable[..., Any], *arguments: Tensor) -> None:
    """One graph without a break gives the same numbers."""
    compiled = torch.compile(compute, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), compute(*arguments))


def check_bfloat16(compute: Callable[..., Loss], *arguments: Tensor) -> None:
    """Under autocast the loss is nearly the same, in float32."""
    exact, _ = compute(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = compute(*arguments)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
