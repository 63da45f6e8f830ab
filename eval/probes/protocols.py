"""The protocols that can be run on frozen features, by name. docs/evaluation.md adds one.

Nothing here imports torch, so that a misspelt name is refused at once.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpp.errors import UserError, shown
from mpp.extend import Table

from .task import Row, Task


class ProtocolError(UserError):
    """A protocol that the table lacks."""


@dataclass(frozen=True)
class Protocol:
    """A way to read something off frozen features: how the report presents it, and what computes it."""

    title: str  # the heading in the report
    text: str  # one sentence on what it does
    rows: str | Callable[[Task], Sequence[Row]]  # the function, or "module:function", which is imported when it runs
    headline: str = "top1"  # the metric that stands for it where there is room for one
    cheap: bool = True  # a part of `mpp probe --protocol all`, and of a comparison unless that names its protocols
    draws_labels: bool = False  # draws the labels that it uses from all of train: run once, not at each label fraction

    def __post_init__(self) -> None:
        for name, kind in {"title": str, "text": str, "headline": str, "cheap": bool, "draws_labels": bool}.items():
            if not isinstance(value := getattr(self, name), kind):
                raise ProtocolError(f"{name} must be {kind.__name__}, got {shown(repr(value)[:80])}")
        if not (isinstance(self.rows, str) or callable(self.rows)):
            raise ProtocolError(f'rows must be a function, or "module:function", got {shown(repr(self.rows)[:80])}')


PROTOCOLS: Table[Protocol] = Table(
    "protocol",
    "mpp.protocols",
    Protocol,
    {
        "linear": Protocol(
            "Linear probe",
            "A linear classifier on features of the frozen encoder.",
            "mpp.eval.probes.linear:rows",
        ),
        "linear-sgd": Protocol(
            "Linear probe by SGD",
            "A linear classifier trained by the published recipe of MAE, encoder frozen.",
            "mpp.eval.probes.linear_sgd:rows",
            cheap=False,  # it trains for 90 epochs
        ),
        "few-shot": Protocol(
            "Few-shot",
            "Least squares on frozen features of a few labelled images a class.",
            "mpp.eval.probes.few_shot:rows",
            headline="5-shot",
            draws_labels=True,
        ),
        "knn": Protocol(
            "Nearest neighbours",
            "The weighted vote of the most similar training images, encoder frozen.",
            "mpp.eval.probes.knn:rows",
        ),
    },
    reserved=("finetune", "all"),  # of a comparison's protocols; of `mpp probe --protocol`
)


def cheap() -> tuple[str, ...]:
    """The protocols that are run where none is named."""
    return tuple(name for name, protocol in PROTOCOLS.items() if protocol.cheap)


def check_names(names: Sequence[str], *others: str) -> None:
    """Raises ProtocolError for a name that is neither in the table nor one of the others, with the nearest there is."""
    known = [*others, *PROTOCOLS]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ProtocolError(f"no protocol {shown(name)!r}; {hint}")
