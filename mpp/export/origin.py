"""Weights to convert, and for their card where they come from and what was measured of them, in Markdown."""

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mpp import budget
from mpp.errors import UserError, counted, without_secrets
from mpp.export.markdown import block, code, table
from mpp.models.classifier import Classifier, Head
from mpp.models.encoder import Encoder
from mpp.recipe import Recipe, load_recipe
from mpp.recipe.settled import Settled, load_settled
from mpp.weights.format import joint

NO_RESULTS = {"step", "lr", "norm", "images/s", "waiting", "memory"}  # of metrics.jsonl: how training went
MOST_JSON = 1 << 24  # bytes of a file of results that is looked at


@dataclass(frozen=True)
class Given:
    """Weights to convert."""

    path: Path  # what the user named
    file: Path  # where they were found: below a run folder for instance
    format: str  # "mpp", or another's as mpp.weights.foreign calls it
    encoder: Encoder
    head: Head | None = None
    classes: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()  # tensors of the file that are no part of encoder or head

    @property
    def model(self) -> nn.Module:
        """What maps uint8 images to logits or, without a head, to vectors."""
        return self.encoder if self.head is None else Classifier(self.encoder, self.head, self.classes).eval()

    @property
    def projects(self) -> bool:
        """Whether the head is no head for classes but CLIP's projection."""
        return self.head is not None and self.classes == joint(self.head.linear.out_features)

    def describe(self) -> str:
        parameters = f"{sum(parameter.numel() for parameter in self.encoder.parameters()):,} parameters"
        head = "" if self.head is None else f", and a head for {self.head.linear.out_features} classes"
        if self.head is not None and self.projects:
            head = f", and a projection to {self.head.linear.out_features} numbers"
        return f"{self.encoder.config.describe()}, {parameters}{head}"


def run_of(file: Path) -> tuple[Path | None, int | None]:
    """The run folder that a file lies in, if any, and the step of its checkpoint; None at the run's end."""
    file = file.absolute()
    step = re.fullmatch(r"step-(\d+)", file.parent.name)
    folder = file.parent.parent.parent if step else file.parent
    return (folder, int(step[1]) if step else None) if (folder / "recipe.yaml").is_file() else (None, None)


def origin(given: Given) -> Iterator[str]:
    if given.format != "mpp":
        yield f"Converted from {code(given.path.resolve().name)}, weights in the format `{given.format}`."
        if given.aside:
            yield f"Left aside, as no part of this model: {', '.join(map(code, given.aside))}."
        return
    folder, step = run_of(given.file)
    if folder is None:
        yield f"Converted from {code(given.file.name)}, which lay in no run folder: its training is not known."
        return
    at = "at its end" if step is None else f"at step {step}"
    yield f"Trained with mpp in the run {code(folder.resolve().name)}; the weights {at}."
    recipe = folder / "recipe.yaml"
    with suppress(UserError):  # of another version: it is shown all the same
        yield _trained(load_recipe(recipe), load_settled(folder))
    yield "The recipe, with every setting:"
    yield block(without_secrets("\n".join(_lines(recipe))), "yaml")


def _trained(recipe: Recipe, settled: Settled) -> str:
    data, train = recipe.data, recipe.train
    found = code(settled.images.rpartition(" ")[0] or settled.images)
    lines = [f"Data: {code(without_secrets(data.path))}, split {code(data.train)}, {found}."]
    for name, part in data.mix.items():
        if part is not None:
            lines.append(f"Mixed in: {code(name)}, {code(without_secrets(part.path))}.")
    lines.append(f"Objective: {code(recipe.objective.name)}; {settled.steps} steps of {train.batch} images a batch.")
    if recipe.weights:
        lines.append(f"Started from the weights of {code(without_secrets(recipe.weights))}.")
    return "\n".join(f"- {line}" for line in lines)


def results(given: Given) -> Iterator[str]:
    folder, step = run_of(given.file) if given.format == "mpp" else (None, None)
    found = [] if folder is None else [*_metrics(folder, step), *_measured(folder, step)]
    if found:
        yield from found
    else:
        yield "None came with these weights."


def _metrics(folder: Path, step: int | None) -> Iterator[str]:
    """The last value of each metric, up to that step."""
    last: dict[str, tuple[float, int]] = {}
    for line in _lines(folder / "metrics.jsonl"):
        values = _parsed(line)
        at = values.get("step") if isinstance(values, dict) else None
        if type(at) is int and (step is None or at <= step):
            last |= {name: (value, at) for name, value in values.items() if name not in NO_RESULTS and _number(value)}
    if last:
        yield "Last values of the run's metrics; those of `val/` are of the images that the recipe scores on:"
        rows = [(name, f"{value:.4g}", str(at)) for name, (value, at) in last.items()]
        yield table(("metric", "value", "step"), rows)


def _lines(path: Path) -> list[str]:
    try:
        return [line.rstrip("\r\n") for line in budget.lines(path)]
    except OSError:
        return []


def _measured(folder: Path, step: int | None) -> Iterator[str]:
    """What `mpp finetune`, `mpp predict` and `mpp probe` left as JSON in a run folder, which its last weights gave."""
    for path in sorted(folder.glob("*.json")) if step is None else ():
        found = _parsed("\n".join(_lines(path))) if path.stat().st_size < MOST_JSON else None
        if not isinstance(found, dict):
            continue
        if isinstance(found.get("rows"), list) and "weights" in found:
            rows = [row for row in found["rows"] if isinstance(row, dict) and _number(row.get("value"))]
            before = " before training" if found.get("untrained") else ""
            images = " and ".join(f"{found.get(f'{of}_images')} of {found.get(of)}" for of in ("train", "test"))
            on = code(without_secrets(str(found.get("data"))))
            yield f"{code(path.name)}: {code(found['weights'])}{before}, frozen, on {on} ({code(images)} images):"
            cells = [(str(row.get("protocol")), str(row.get("metric")), f"{row['value']:.4g}") for row in rows]
            yield table(("protocol", "metric", "accuracy"), cells)
        elif type(found.get("n")) is int and "top1" in found:
            names = [name for name in ("top1", "top5", "loss", "ece") if _number(found.get(name))]
            yield f"{code(path.name)}: {counted(found['n'], 'image')} with labels (accuracies as shares):"
            yield table(("score", "value"), [(name, f"{found[name]:.4g}") for name in names])


def _parsed(text: str) -> Any:
    try:
        return budget.json_of(text)
    except ValueError:  # a line that a power cut left, or a file of something else
        return None


def _number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) <= sys.float_info.max
