"""What the first start of a run found and chose, in plain values: settled.json beside the recipe.yaml that was asked.

A run goes on as it began, whatever the machine would choose now, and on the images and weights that it began with.
"""

from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mpp import budget
from mpp.data.config import PrepareName, ShuffleName
from mpp.errors import UserError, cause
from mpp.files import sealed, unsealed, write_atomically
from mpp.recipe.check import tupled
from mpp.recipe.recipe import Recipe
from mpp.train_config import Execution

FILE = "settled.json"
FORMAT = 2
NOT_OURS = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)  # what cut files cause


class RunError(UserError):
    """A run can't start where it was asked to."""


@dataclass(frozen=True)
class Continued:
    """From which state of another run one goes on."""

    step: int  # of the checkpoint, there
    at: int  # the same place in the data in steps of this run: another number where `train.batch` changed
    state: str  # a digest of the checkpoint
    run: str  # a digest of what that run computes

    def __post_init__(self) -> None:
        """Raises ValueError for what no start can have settled: the values may come from a file."""
        if not all(type(number) is int and number >= 1 for number in (self.step, self.at)):
            raise ValueError(f"continued: step {self.step!r} or at {self.at!r}")
        if not all(isinstance(text, str) for text in (self.state, self.run)):
            raise ValueError("continued: expected texts")


@dataclass(frozen=True)
class Settled:
    """What a recipe left open, as the first start of its run found or chose it."""

    images: str  # how many there are to train on, and a checksum of their keys and contents
    labels: str | None  # a checksum of their labels, where the objective needs some
    weights: str | None  # a digest of the encoder's tensors that it began with; None for random ones
    objective: dict[str, Any]  # settings of the objective that follow from the images
    steps: int
    warmup: int  # steps
    shuffle: ShuffleName
    prepare: PrepareName  # where pictures are made: cpu or device
    execution: Execution
    imports: dict[str, str]  # key of the recipe, such as objective.name -> what `--import` its part came by
    continued: Continued | None = None  # the state of another run that it goes on from
    processes: int = 1  # that trained together; another number of them takes its threads anew

    def __post_init__(self) -> None:
        """Raises ValueError for what no start can have settled: the values may come from a file."""
        texts = {"images": self.images, "labels": self.labels or "", "weights": self.weights or ""}
        if wrong := [name for name, value in texts.items() if not isinstance(value, str)]:
            raise ValueError(f"{wrong[0]}: expected a text")
        if not (type(self.processes) is int and self.processes >= 1):
            raise ValueError(f"processes {self.processes!r}")
        if not (type(self.steps) is type(self.warmup) is int and self.steps >= 1 and 0 <= self.warmup <= self.steps):
            raise ValueError(f"steps {self.steps!r} or warmup {self.warmup!r}")
        if self.shuffle not in ("all", "window") or self.prepare not in ("cpu", "device"):
            raise ValueError(f"shuffle {self.shuffle!r} or prepare {self.prepare!r}")
        if not all(isinstance(found, dict) for found in (self.objective, self.imports)):
            raise ValueError("objective or imports: expected keys with values")

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes by which labels were numbered; none where the objective has none."""
        names = self.objective.get("classes", ())
        return tuple(map(str, names)) if isinstance(names, list | tuple) else ()

    def fill(self, recipe: Recipe) -> Recipe:
        """A recipe in plain values: what it left open is as settled here."""
        settings: dict[str, Any] = {key: tupled(value) for key, value in self.objective.items()}
        train = replace(recipe.train, steps=self.steps, epochs=None, images=None, warmup=self.warmup)
        return self.for_machine(replace(recipe, objective=replace(recipe.objective, **settings), train=train))

    def for_machine(self, recipe: Recipe) -> Recipe:
        """The recipe with what is left to the machine as it was chosen here.

        Parts that don't fill the recipe's batch stay open: it is then another recipe than was settled.
        """
        chosen = {key: value for key, value in asdict(self.execution).items() if is_open(getattr(recipe.train, key))}
        if recipe.train.batch % self.execution.micro_batch:
            chosen.pop("micro_batch", None)
        reading = {key: getattr(self, key) for key in ("shuffle", "prepare") if is_open(getattr(recipe.data, key))}
        return replace(recipe, train=replace(recipe.train, **chosen), data=replace(recipe.data, **reading))

    def save(self, folder: Path) -> None:
        """Writes settled.json, whole or not at all."""
        write_atomically(folder / FILE, sealed({"format": FORMAT, **asdict(self)}))


def is_open(value: object) -> bool:
    """Whether a setting leaves the choice to the machine."""
    return value is None or value == "auto"


def load_settled(folder: Path) -> Settled:
    """What a run folder's first start settled; RunError, one line, if the folder does not say it."""
    path = folder / FILE
    if not path.exists():
        raise RunError(
            f"{folder}: holds a run of an earlier version of mpp (it has no {FILE}), which can't go on with this one; "
            "choose another folder with out="
        )
    try:
        if (found := budget.json_file(path)["format"]) != FORMAT:
            raise RunError(f"{path}: has format {found}, this version of mpp reads {FORMAT}")
        facts = unsealed(path)
        there = [field.name for field in fields(Settled) if field.name in facts or field.default is MISSING]
        values = {name: facts[name] for name in there}
        state = facts.get("continued")
        continued = None if state is None else Continued(**state)
        return Settled(**{**values, "execution": Execution(**values["execution"]), "continued": continued})
    except RunError:
        raise
    except NOT_OURS as error:
        raise RunError(f"{path}: cut, or not as it was written ({cause(error)})") from None


def imports_of(folder: Path) -> dict[str, str]:
    """By which imports a run had the parts that are not mpp's: key of the recipe -> argument of `--import`."""
    try:
        facts = budget.json_file(folder / FILE)["imports"]
        return {str(key): str(value) for key, value in facts.items()}
    except NOT_OURS:
        return {}
