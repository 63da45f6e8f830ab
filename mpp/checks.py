"""What a training is looked at for: its objective, its first outputs, its batches, and numbers before they are kept."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mpp.average import averaged
from mpp.batch import Batch
from mpp.data.loader import Images
from mpp.errors import shown
from mpp.execution import Loss, generators
from mpp.models.encoder import Encoder
from mpp.models.encoders import facts_of
from mpp.objectives.base import Objective
from mpp.objectives.calls import called
from mpp.ranks import ALONE, Ranks
from mpp.shards.classes import translation
from mpp.shards.index import Index
from mpp.split import own_part
from mpp.watch import TrainingError


def refuse_other_numbers(objective: Objective, batches: Images) -> None:
    """Raises TrainingError where shards give a class another number than the objective does: all would be learned
    wrong, without a sign of it. Names that only one of them has may be a translation of the other's, and stay."""
    index, classes = getattr(batches, "index", None), objective.needs.classes
    if isinstance(index, Index) and objective.needs.labels and index.classes != classes:
        numbers = translation(index.classes, classes).tolist()
        if wrong := [(one, other) for one, other in enumerate(numbers[:-1]) if other not in (-1, one)]:
            theirs, ours = wrong[0]
            raise TrainingError(
                f"{objective.config.name}: class {shown(classes[ours])} is {ours} of its classes and {theirs} of those "
                f"of {index.origin}; give its classes to mpp.read_shards(..., classes=...)"
            )


def checked_batch(objective: Objective, batch: Batch, step: int) -> Batch:
    """The batch of a step, if the objective can learn from it; TrainingError, one line, if not."""
    try:
        objective.check_batch(batch)
    except ValueError as error:
        raise TrainingError(f"step {step}: {objective.config.name}: {error}") from None
    return batch


def facts_of_result(objective: Objective) -> dict[str, object]:
    """What a checkpoint says of the encoder that is the result, and under which names its tensors stand there.

    Raises TrainingError, before the first step, if the results are not those that the objective's config names.
    """
    name, results = objective.config.name, objective.results()
    if not isinstance(results, dict) or set(results) != set(objective.config.results) or "encoder" not in results:
        found, expected = ", ".join(results or ()) or "none", ", ".join(objective.config.results)
        raise TrainingError(f"{name}: results() gives {found}; its config says {expected}, among them an encoder")
    own = {id(tensor) for tensor in (*objective.parameters(), *objective.buffers())}
    for key, module in results.items():
        tensors = module.state_dict(keep_vars=True).values() if isinstance(module, nn.Module) else ()
        if not isinstance(module, nn.Module) or not own.issuperset(map(id, tensors)):
            raise TrainingError(f"{name}: results() must be parts of the objective, as checkpoints are; {key} is not")
        if not key.isidentifier():
            raise TrainingError(f"{name}: results() are files of the run folder; {key!r} is no name for one")
    encoder: Any = results["encoder"]
    place = next((place for place, module in objective.named_modules() if module is encoder), None)
    if place is None or not isinstance(encoder, Encoder):
        raise TrainingError(f"{name}: results()['encoder'] must be an mpp.Encoder that is a part of the objective")
    return {**facts_of(encoder), "place": f"{place}."}


def checked(objective: Objective, forward: Callable[[Batch], Loss], ranks: Ranks = ALONE) -> Callable[[Batch], Loss]:
    """The forward pass, whose first outputs are looked at: what is wrong with an objective is best told at once.

    Of several processes none may draw from torch's generators, whose numbers depend on how a batch is shared.
    """
    seen = False

    def first_checked(batch: Batch) -> Loss:
        nonlocal seen
        if not seen and batch.images.is_floating_point():
            objective.encoder.look(batch.images)  # one wait for the device, and none for uint8
        before = None if seen or ranks.size == 1 else generators(batch.images.device)
        with called(objective.config.name, "forward()"):
            outputs = forward(batch)
        if not seen:
            _check_outputs(objective.config.name, outputs)
            if before is not None and not torch.equal(before, generators(batch.images.device)):
                raise TrainingError(
                    f"{objective.config.name}: draws from torch's generator, by other numbers in each of {ranks.size} "
                    "processes than in one; draw by mpp.draws (docs/extending.md), or train in one process"
                )
            seen = True
        return outputs

    return first_checked


def _check_outputs(name: str, outputs: Any) -> None:
    if not (isinstance(outputs, tuple) and len(outputs) == 2 and isinstance(outputs[1], dict)):
        raise TrainingError(
            f"{name}: forward() must give a loss and a dictionary of metrics, got {type(outputs).__name__}"
        )
    loss, metrics = outputs
    if not (isinstance(loss, Tensor) and loss.shape == () and loss.dtype == torch.float32 and loss.requires_grad):
        found = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TrainingError(f"{name}: the loss must be a float32 scalar with a gradient, got {found}")
    for key, value in metrics.items():
        if not (isinstance(key, str) and isinstance(value, Tensor) and value.shape == ()):
            raise TrainingError(f"{name}: metrics must be scalar tensors by name, got {key!r}: {type(value).__name__}")


def lasting(objective: Objective, ema: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """By name what is trained and what results are made of, and the running average; nothing else of an objective."""
    lasts = {id(parameter) for parameter in objective.parameters()}
    lasts |= {id(one) for part in objective.results().values() for one in part.state_dict(keep_vars=True).values()}
    average = dict(zip(averaged(objective), ema, strict=False))
    for name, tensor in objective.state_dict(keep_vars=True).items():
        if id(tensor) in lasts:
            yield name, own_part(tensor)
            if name in average:
                yield f"the running average of {name}", own_part(average[name])
