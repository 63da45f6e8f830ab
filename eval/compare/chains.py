"""The runs that a comparison is made of: what each needs, where it lies, and what says that it is done.

OUT/pretrain/RECIPE/seed-0             shared by the arms that pretrain alike
OUT/choose/ARM/0.1/lr-0.001            fine-tuning that a learning rate is chosen by
OUT/finetune/ARM/0.1/seed-0
OUT/probe/ARM/seed-0                   what is read off frozen features
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from mpp.data.config import SubsetConfig
from mpp.data.subset import contents, drawn
from mpp.execution import Once
from mpp.files import sealed, unsealed, write_atomically
from mpp.log import METRICS, read_metrics
from mpp.loop import steps_of
from mpp.models.encoder import Encoder
from mpp.recipe import Recipe
from mpp.recipe.settled import RunError
from mpp.run import run
from mpp.run.start import at_start
from mpp.shards.index import read_index
from mpp.weights import fingerprint, load_encoder

from ..labelled.finetune import finetune
from ..probes.probe import probe_encoder
from ..probes.protocols import PROTOCOLS
from .arms import FINETUNE, ArmConfig, Comparison
from .machine import Machine
from .summary import shown

ENCODER, SCORES, ROWS = "encoder.safetensors", "scores.json", "rows.json"
FORMAT = 2  # of rows.json


class Asked(NamedTuple):
    """A protocol at a label fraction."""

    fraction: float
    protocol: str


@dataclass(frozen=True)
class Job:
    """A run of a comparison."""

    name: str  # for people, and unique
    stage: str  # pretrain, choose, finetune or probe
    arm: str
    seed: int
    fraction: float | None
    needs: tuple[str, ...]  # names of the jobs that come first
    result: Path  # the file that says it is done
    work: Callable[[], object]
    recipe: Callable[[], Recipe] | None = None  # of the run, known once what it needs is done
    encoder: Callable[[], Encoder] | None = None  # of a probing, known then as well
    asked: tuple[Asked, ...] = ()  # of a probing
    images: Callable[[], str] | None = None  # of what its figures are, where they are not only of the images trained on

    @property
    def done(self) -> bool:
        """Whether nothing is left to do. A probing goes on where more fractions or protocols are asked for."""
        if self.asked:
            return set(self.asked) <= set(read_rows(self.result)[0])
        if self.stage == "finetune":
            return read_scores(self.result) is not None
        return self.result.exists()


class Chains:
    """All jobs of a comparison, one seed after the other."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison, self.config, self.out = comparison, comparison.config, comparison.out
        self.machine = Machine(self.out)

    def jobs(self) -> list[Job]:
        """All jobs, each after those that it needs; one that several arms share stands once."""
        found: dict[str, Job] = {}
        for seed in self.config.seeds:
            for arm in self.config.arms:
                for job in self.of_arm(arm, seed):
                    found.setdefault(job.name, job)
        return list(found.values())

    def of_arm(self, arm: str, seed: int) -> Iterator[Job]:
        """The jobs that a seed's figures of an arm rest on."""
        for fraction in self.config.fractions_of(arm):
            pretraining = self.pretraining(arm, seed, fraction)
            yield from pretraining
            if FINETUNE in self.config.protocols:
                trials = self.trials(arm, fraction)
                yield from trials
                yield self.finetuning(arm, seed, fraction, needs=(*pretraining, *trials))
        if self.config.frozen:
            yield from self.probings(arm, seed)

    def pretraining(self, arm: str, seed: int, fraction: float) -> list[Job]:
        """The pretraining of an arm, if it has one; with labels of the same images it gets the fraction's alone."""
        recipe = self.comparison.pretrain.get(arm)
        if recipe is None:
            return []
        name = recipe.name
        if self.comparison.with_labels(arm) and not self.config.arms[arm].upper_bound:
            name = f"{name}-{fraction:g}"
            recipe = replace(recipe, data=replace(recipe.data, subset=replace(recipe.data.subset, share=fraction)))
        out = self.out / "pretrain" / name / f"seed-{seed}"
        recipe = replace(recipe, seed=seed, out=str(out))
        title, work = f"{name} pretraining, seed {seed}", partial(run, recipe, self.machine.once)
        return [Job(title, "pretrain", arm, seed, None, (), out / ENCODER, work, lambda: recipe)]

    def trials(self, arm: str, fraction: float) -> list[Job]:
        """Fine-tuning with the first seed on part of its labels, once with each learning rate."""
        if len(self.config.lrs) < 2:
            return []
        arm, fraction, seed = self.chooser(arm), self.config.choose_at or fraction, self.config.seeds[0]
        before = self.pretraining(arm, seed, fraction)
        jobs = []
        for lr in self.config.lrs:
            out = self._trial(arm, fraction, lr)
            recipe = partial(self.tuned, arm, seed, fraction, out, lr, self.config.hold_out)
            name = f"{arm} trial of learning rate {lr:g}, {shown(fraction)}"
            needs = tuple(job.name for job in before)
            work = partial(self._carry_out, run, recipe)
            jobs.append(Job(name, "choose", arm, seed, fraction, needs, out / ENCODER, work, recipe))
        return [*before, *jobs]

    def chooser(self, arm: str) -> str:
        """The arm whose choice of a learning rate an arm takes: the first that differs in its budget at most."""

        def way(own: ArmConfig) -> tuple[object, ...]:
            return own.pretrain, own.weights, own.upper_bound, own.finetune

        arms = self.config.arms
        return next(name for name, other in arms.items() if way(other) == way(arms[arm]))

    def _trial(self, arm: str, fraction: float, lr: float) -> Path:
        return self.out / "choose" / arm / f"{fraction:g}" / f"lr-{lr:g}"

    def chosen(self, arm: str, fraction: float) -> dict[str, Any] | None:
        """The learning rate of an arm and the held-out accuracy that each one tried gave; None if none was tried."""
        arm, fraction = self.chooser(arm), self.config.choose_at or fraction
        if len(self.config.lrs) < 2:
            return None
        tried = []
        for lr in self.config.lrs:
            trial = self._trial(arm, fraction, lr)
            found = [row["val/accuracy"] for row in read_metrics(trial) if "val/accuracy" in row]
            if not found:
                raise RunError(f"{trial / METRICS}: lacks val/accuracy, which it was tried for; delete {trial}")
            tried.append({"lr": lr, "accuracy": found[-1]})
        best = max(tried, key=lambda trial: trial["accuracy"])
        return {"arm": arm, "fraction": fraction, "lr": best["lr"], "tried": tried}

    def finetuning(self, arm: str, seed: int, fraction: float, needs: tuple[Job, ...]) -> Job:
        """Training with a fraction's labels, from what the arm pretrained."""
        out = self.out / "finetune" / arm / f"{fraction:g}" / f"seed-{seed}"

        def recipe() -> Recipe:
            chosen = self.chosen(arm, fraction)
            lr = chosen["lr"] if chosen else next(iter(self.config.lrs), None)
            return self.tuned(arm, seed, fraction, out, lr)

        name = f"{arm} fine-tuning, seed {seed}, {shown(fraction)}"
        names = tuple(job.name for job in needs)
        work = partial(self._carry_out, finetune, recipe)
        return Job(name, "finetune", arm, seed, fraction, names, out / SCORES, work, recipe, images=self.scored)

    def _carry_out(self, how: Callable[[Recipe, Once], object], recipe: Callable[[], Recipe]) -> None:
        how(recipe(), self.machine.once)

    def tuned(self, arm: str, seed: int, fraction: float, out: Path, lr: float | None, hold_out: float = 0.0) -> Recipe:
        """An arm's fine-tuning recipe with all that the comparison decides."""
        recipe, own = self.comparison.finetune[arm], self.config.arms[arm]
        before = self.pretraining(arm, seed, fraction)
        weights = str(before[0].result.parent) if before else own.weights
        data = replace(recipe.data, subset=SubsetConfig(share=fraction, hold_out=hold_out))
        train = replace(recipe.train, lr=lr or recipe.train.lr)
        recipe = replace(recipe, seed=seed, out=str(out), weights=weights, data=data, train=train)
        labels = len(drawn(read_index(data.path, data.train, data.allow), replace(data.subset, hold_out=0.0), seed)[0])
        images = self.config.images_at(fraction) or images_of(recipe, labels)
        if own.total_of and not hold_out:
            before_it = self.comparison.pretrain[own.total_of]
            images += images_of(
                before_it, len(read_index(before_it.data.path, before_it.data.train, before_it.data.allow))
            )
        return recipe.lasting(images)

    def probings(self, arm: str, seed: int) -> list[Job]:
        """Frozen-feature protocols: of the pretrained encoder, or of the baseline's initial one.

        An arm that pretrains with a fraction's labels is another encoder at each fraction.
        """
        own, fractions = self.config.arms[arm], self.config.fractions
        if not (own.pretrain or own.weights or arm == self.config.baseline):
            return []
        parts, limited = [fractions], self.comparison.with_labels(arm) and not own.upper_bound
        if limited:
            parts = [(fraction,) for fraction in self.config.fractions_of(arm)]
        jobs = []
        for part in parts:
            place = "" if len(parts) == 1 else f"-{part[0]:g}"
            out = self.out / "probe" / f"{arm}{place}" / f"seed-{seed}"
            asked = self.asked(part, draws=not limited or part == (1.0,))
            if not asked:
                continue
            names = tuple(job.name for job in self.pretraining(arm, seed, part[-1]))
            work = partial(self.probe, arm, seed, part[-1], asked, out)
            name, encoder = f"{arm}{place} probing, seed {seed}", partial(self.probed, arm, seed, part[-1])
            jobs.append(
                Job(
                    name,
                    "probe",
                    arm,
                    seed,
                    None,
                    names,
                    out / ROWS,
                    work,
                    encoder=encoder,
                    asked=asked,
                    images=self.read,
                )
            )
        return jobs

    def scored(self) -> str:
        """Which images fine-tuning is scored on, by their content."""
        return self._contents[1]

    def read(self) -> str:
        """Which images frozen features are of, by their content."""
        return "; ".join(self._contents)

    @cached_property
    def _contents(self) -> tuple[str, str]:
        shards, train, test = self.comparison.data
        return contents(read_index(shards, train)), contents(read_index(shards, test))

    def asked(self, fractions: Sequence[float], draws: bool) -> tuple[Asked, ...]:
        """The protocols at fractions; with `draws` also those that draw their own labels from all of train, once."""
        drawing = [name for name in self.config.frozen if PROTOCOLS[name].draws_labels]
        others = [name for name in self.config.frozen if name not in drawing]
        return (
            *(Asked(1.0, name) for name in drawing if draws),
            *(Asked(fraction, name) for fraction in fractions for name in others),
        )

    def probed(self, arm: str, seed: int, fraction: float) -> Encoder:
        """The encoder whose frozen features are looked at: what the arm fine-tunes, before it does."""
        recipe = self.tuned(arm, seed, fraction, self.out, None)
        return load_encoder(recipe.weights) if recipe.weights else at_start(recipe).encoder

    def probe(self, arm: str, seed: int, fraction: float, asked: tuple[Asked, ...], out: Path) -> None:
        """Writes rows of an arm's frozen features, the labels drawn as for fine-tuning; rows of the same weights stay.

        fraction: one at which the arm is pretrained as this encoder was.
        """
        shards, train, test = self.comparison.data
        encoder = self.probed(arm, seed, fraction)
        weights = identity(encoder)
        done, rows = read_rows(out / ROWS) if probed_weights(out / ROWS) == weights else ([], [])
        index, missing = read_index(shards, train), [one for one in asked if one not in done]
        for share in dict.fromkeys(one.fraction for one in missing):
            numbers, _ = drawn(index, SubsetConfig(share=share), seed)
            names = [one.protocol for one in missing if one.fraction == share]
            for row in probe_encoder(encoder, shards, names, train, test, numbers, cache=out / "features"):
                place = {"protocol": row.protocol, "fraction": share, "metric": row.metric}
                rows.append({**place, "value": row.value, "detail": row.detail})
        shutil.rmtree(out / "features", ignore_errors=True)
        results = {
            "format": FORMAT,
            "weights": weights,
            "images": self.read(),
            "asked": [*done, *missing],
            "rows": rows,
        }
        write_atomically(out / ROWS, sealed(results, indent=None))


def read_rows(path: Path) -> tuple[list[Asked], list[dict[str, Any]]]:
    """What a probing was asked for, and the rows it gave; nothing where there is no such file, or it was cut."""
    results = _unsealed(path)
    return ([Asked(*one) for one in results["asked"]], results["rows"]) if results else ([], [])


def identity(encoder: Encoder) -> str:
    """What tells a frozen encoder from another: its weights, and what it is fed."""
    return f"{fingerprint(encoder)} {encoder.input}"


def probed_weights(path: Path) -> str | None:
    """The digest of the weights that a probing read its rows off; None where there is no such file, or it was cut."""
    results = _unsealed(path)
    return results["weights"] if results else None


def read_scores(path: Path) -> dict[str, Any] | None:
    """What a fine-tuning left as scores.json; None where it has to be scored again."""
    try:
        return unsealed(path, indent=None)
    except (OSError, ValueError):
        return None


def _unsealed(path: Path) -> dict[str, Any] | None:
    """A file of rows of this format as it was written, or None."""
    results = read_scores(path)
    return results if results and results.get("format") == FORMAT else None


def images_of_result(path: Path) -> str | None:
    """Which images a result says that it is of, by their content; None where it does not, or is not there."""
    results = read_scores(path)
    return str(results["images"]) if results and "images" in results else None


def images_of(recipe: Recipe, train: int) -> int:
    """Images that a run sees, for a train split of so many."""
    return steps_of(recipe.in_steps(train).train) * recipe.train.batch
