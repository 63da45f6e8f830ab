"""Multinomial logistic regression for a whole grid of regularisations at once, to convergence.

For each l2 of a grid it minimises, over weights W (d, classes) and an unpenalised intercept,

    mean over images of cross-entropy + l2 / 2 * |W|^2

which is scikit-learn's LogisticRegression with C = 1 / (l2 * images). (Of two classes scikit-learn fits one weight
vector instead of two that mirror each other; there C = 2 / (l2 * images) means the same.)

What makes it fast: features are turned to their principal axes and scaled by the curvature there, so that L-BFGS needs
tens of steps instead of the hundreds or thousands that correlated features cost it; and all l2 go forward together, as
the columns of one matrix product, each with its own memory, step length and end.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 5e-4  # of the gradient's norm where curvature is one: the objective is within about its square of the least
STEPS = 20  # of L-BFGS a round; then the curvature, which falls where images are fitted well, is looked at again
ROUNDS = 50  # at most; two to four are usual
FLAT = 1e-9  # curvature below this counts as this
TINY = 1e-300  # in the place of 0 where something is divided by it
MEMORY = 10  # pairs that L-BFGS remembers, as scikit-learn's
ARMIJO = 1e-4  # share of the promised decrease that a step must bring
ROUNDING = 1e-7  # of the objective: what float32 logits leave uncertain
CONSTANT = 1e-6  # a feature whose spread is this share of its size is constant but for rounding
BLOCK = 2**22  # logits computed at a time
WHOLE = 2**27  # numbers that L-BFGS may remember for the l2 that go forward together (1 GiB)


@dataclass(frozen=True)
class Axes:
    """The standardised features' principal axes: features (m, d) become (m, r + 1) coordinates, the last of them 1."""

    mean: Tensor  # (d,)
    turn: Tensor  # (d, r): divides by the standard deviation and turns
    curvature: Tensor  # (r + 1,) float64, mean square of each coordinate over the images that the axes were made from

    def coordinates(self, parts: Sequence[Tensor], rows: Tensor | slice) -> Tensor:
        """Of some rows of features (n, d), given as parts side by side: float32 (rows, r + 1), in blocks of rows."""
        numbers = torch.arange(len(parts[0]))[rows]
        size = max(1, BLOCK // len(self.mean))
        found = torch.empty(len(numbers), self.turn.shape[1] + 1, device=self.turn.device)
        for start in range(0, len(numbers), size):
            block = beside(parts, numbers[start : start + size], self.turn.device)
            found[start : start + size, :-1] = block.sub_(self.mean) @ self.turn
        found[:, -1] = 1
        return found


def beside(parts: Sequence[Tensor], rows: Tensor, device: torch.device) -> Tensor:
    """Some rows of features given as parts (n, d_i): a new float32 (rows, sum of d_i)."""
    return torch.cat([part[rows].to(device, torch.float32) for part in parts], dim=1)


def principal_axes(parts: Sequence[Tensor], rows: Tensor, device: torch.device) -> Axes:
    """The principal axes of the standardised features of some images; no more of them than images."""
    features = beside(parts, rows, device)
    std, mean = torch.std_mean(features, 0, correction=0)
    alive = std > CONSTANT * mean.abs().clamp(min=CONSTANT)
    scale = torch.where(alive, 1 / std, 0.0)
    features = features.sub_(mean).mul_(scale)
    images, width = features.shape
    if images >= width:
        values, vectors = torch.linalg.eigh((features.T @ features).div_(images))
    else:  # in float64, which is affordable here, because small values are divided by
        values, left = torch.linalg.eigh(features.double() @ features.double().T / images)
        vectors = (features.double().T @ left) * values.clamp(min=1e-12).mul(images).rsqrt()
    kept = values > 1e-7 * values.max().clamp(min=1e-12)  # the others are rounding
    turn = vectors[:, kept].float() * scale.unsqueeze(1)
    return Axes(mean, turn, torch.cat([values[kept], values.new_ones(1)]).double())


def fit(x: Tensor, labels: Tensor, classes: int, curvature: Tensor, l2s: Sequence[float]) -> Tensor:
    """The weights (l2, r + 1, classes), float64, for coordinates x (n, r + 1) and labels (n,), one for each l2.

    Each of the classes must have an image: the best intercept of one that has none is minus infinity.
    """
    share = torch.bincount(labels, minlength=classes).double() / len(labels)  # (classes,)
    start = share.new_zeros(x.shape[1], classes)
    start[-1] = share.log()
    # The Hessian's diagonal where all that is known of an image is the classes' shares: there coordinates do not mix.
    at_start = curvature.unsqueeze(1) * share * (1 - share)
    together = max(1, WHOLE // (2 * MEMORY * start.numel()))
    found = []
    for first in range(0, len(l2s), together):
        penalty = share.new_tensor(l2s[first : first + together]).view(-1, 1, 1).repeat(1, x.shape[1], 1)
        penalty[:, -1] = 0  # of the intercept
        found.append(_fit(x, labels, penalty, start.repeat(len(penalty), 1, 1), at_start))
    return torch.cat(found)


def _fit(x: Tensor, labels: Tensor, penalty: Tensor, weights: Tensor, curvature: Tensor) -> Tensor:
    """Goes on from `weights` (l2, r + 1, classes) in rounds of L-BFGS, each scaled by the curvature where it starts."""
    left = torch.arange(len(weights), device=weights.device)
    for _ in range(ROUNDS):
        scale = (curvature + penalty[left]).clamp(min=FLAT).rsqrt()
        points, slopes = _minimise(_Objective(x, labels, penalty[left], scale), weights[left] / scale)
        weights[left] = points * scale
        left = left[slopes > TOLERANCE]
        if not len(left):
            break
        curvature = curvature_at(x, weights[left])
    return weights


def curvature_at(x: Tensor, weights: Tensor) -> Tensor:
    """The diagonals (k, r + 1, classes) of the cross-entropy's Hessians at weights of that shape, float64."""
    count, columns, classes = weights.shape
    matrix, total = weights.float().permute(1, 0, 2).reshape(columns, -1), torch.zeros_like(weights)
    size = max(1, BLOCK // matrix.shape[1])
    for start in range(0, len(x), size):
        rows = x[start : start + size]
        p = (rows @ matrix).view(-1, count, classes).softmax(2)
        total += (rows.square().T @ (p * (1 - p)).flatten(1)).view(columns, count, classes).permute(1, 0, 2)
    return total / len(x)


class _Objective:
    """The objectives of some l2 and their gradients, as functions of the weights over `scale` (l2, r + 1, classes)."""

    def __init__(self, x: Tensor, labels: Tensor, penalty: Tensor, scale: Tensor) -> None:
        self.x, self.labels, self.penalty, self.scale = x, labels, penalty, scale

    def __call__(self, points: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Values (k,) and gradients (k, r + 1, classes) at points of the l2 numbered `chosen` (k,)."""
        weights = points * self.scale[chosen]
        loss, gradient = cross_entropy(self.x, self.labels, weights)
        penalty = self.penalty[chosen]
        value = loss + _dot(penalty * weights, weights) / 2
        return value, (gradient + penalty * weights) * self.scale[chosen]


def cross_entropy(x: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropies (k,) and their gradients for weights (k, r + 1, classes), float64.

    Logits are float32, in blocks of rows; sums over images are float64.
    """
    count, columns, classes = weights.shape
    matrix = weights.float().permute(1, 0, 2).reshape(columns, -1)
    loss = weights.new_zeros(count)
    gradient = torch.zeros_like(weights)
    size = max(1, BLOCK // matrix.shape[1])
    for start in range(0, len(x), size):
        rows, truth = x[start : start + size], labels[start : start + size]
        logits = (rows @ matrix).view(-1, count, classes)
        index = truth.view(-1, 1, 1).expand(-1, count, 1)
        total = logits.logsumexp(2, keepdim=True)
        loss += (total - logits.gather(2, index)).sum((0, 2), dtype=torch.float64)
        logits.sub_(total).exp_().scatter_add_(2, index, torch.full_like(total, -1))  # probabilities minus truth
        gradient += (rows.T @ logits.flatten(1)).view(columns, count, classes).permute(1, 0, 2)
    return loss / len(x), gradient / len(x)


def _minimise(objective: _Objective, start: Tensor) -> tuple[Tensor, Tensor]:
    """Some steps of L-BFGS on several objectives at once: points (k, r + 1, classes), and their gradients' norms (k,).

    Each evaluation serves all that are left: those whose last step was good try a new direction, the others a shorter
    step in the old one.
    """
    result = start.clone()
    norms = start.new_zeros(len(start))
    chosen = torch.arange(len(start), device=start.device)  # the objectives that are left
    point = start
    value, gradient = objective(point, chosen)
    memory: deque[tuple[Tensor, Tensor]] = deque(maxlen=MEMORY)
    direction, length = -gradient, torch.ones_like(value)
    for _ in range(STEPS):
        slope = _dot(direction, gradient)
        step = length.view(-1, 1, 1) * direction
        new_value, new_gradient = objective(point + step, chosen)
        good = new_value <= value + ARMIJO * length * slope + ROUNDING * value.abs()
        mask = good.view(-1, 1, 1)
        # A pair of zeros where there was no step: it changes nothing.
        memory.append((torch.where(mask, step, 0.0), torch.where(mask, new_gradient - gradient, 0.0)))
        point, gradient = torch.where(mask, point + step, point), torch.where(mask, new_gradient, gradient)
        # Where a step was too long, the least point of the parabola through what is known.
        shorter = -slope * length / (2 * ((new_value - value) / length - slope)).clamp(min=TINY)
        length = torch.where(good, 1.0, torch.clamp(shorter, 0.1 * length, 0.5 * length))
        value = torch.where(good, new_value, value)
        direction = torch.where(mask, _direction(gradient, memory), direction)
        result[chosen], norms[chosen] = point, _dot(gradient, gradient).sqrt()
        left = norms[chosen] > TOLERANCE
        if not left.any():
            break
        if not left.all():
            chosen, point, value, gradient = chosen[left], point[left], value[left], gradient[left]
            direction, length = direction[left], length[left]
            memory = deque(((moved[left], change[left]) for moved, change in memory), maxlen=MEMORY)
    return result, norms


def _direction(gradient: Tensor, memory: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """L-BFGS's two loops (Nocedal and Wright, algorithm 7.4), for each objective (k, ...) by itself.

    A pair without curvature, such as one of zeros, is passed over.
    """
    direction, kept = -gradient, []
    scale = torch.zeros_like(gradient[:, :1, :1])
    for moved, change in reversed(memory):
        curvature = _dot(moved, change).view(-1, 1, 1)
        inverse = torch.where(curvature > 0, 1 / curvature.clamp(min=TINY), 0.0)
        alpha = inverse * _dot(moved, direction).view(-1, 1, 1)
        direction = direction - alpha * change
        kept.append((moved, change, inverse, alpha))
        latest = curvature.clamp(min=0) / _dot(change, change).view(-1, 1, 1).clamp(min=TINY)
        scale = torch.where(scale > 0, scale, latest)  # of the newest pair that has any
    direction = direction * torch.where(scale > 0, scale, 1.0)
    for moved, change, inverse, alpha in reversed(kept):
        direction = direction + (alpha - inverse * _dot(change, direction).view(-1, 1, 1)) * moved
    return direction


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """The inner products (k,) of tensors (k, r + 1, classes)."""
    return (one * other).sum((1, 2))
