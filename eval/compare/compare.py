"""`mpp compare`: carries out the runs of a comparison, and leaves what they show in one page."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mpp import checkpoint
from mpp.errors import UserError, cause
from mpp.files import BusyError, write_atomically
from mpp.recipe import load_recipe
from mpp.run import as_chosen, changes, check_classes, opened, resolved
from mpp.shards.index import read_index
from mpp.watch import sigterm_as_ctrl_c

from ..report.report import write_report
from .arms import load_comparison
from .chains import Chains, Job
from .gather import gather

POLL = 2.0  # seconds between looks at runs that other processes are doing
FAILURES = (UserError, torch.OutOfMemoryError, MemoryError)  # of a run, that the others survive


class CompareError(UserError):
    """A comparison can't go on in its folder."""


def compare(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Path, dict[str, Any]]:
    """Carries out a comparison, or goes on with it: its folder and its results, which stand there as results.json.

    Runs that are done are never repeated; one that fails is reported, and the rest go on. Several processes may share a
    folder, on one machine or on several with a common disk: each takes runs that no other is doing. Raises CompareError
    if the folder holds runs of other recipes.
    """
    comparison = load_comparison(path, overrides)
    _, train, _ = opened(comparison.finetune[comparison.config.baseline])  # made here if the recipe says from what
    shards, _, test = comparison.data
    check_classes(train.index, read_index(shards, test))
    chains = Chains(comparison)
    jobs, failures = chains.jobs(), dict[str, str]()
    check_folder(jobs)
    try:
        with sigterm_as_ctrl_c():
            carry_out(jobs, failures)
    finally:  # what is known so far, also of a comparison that was stopped
        results = gather(chains, jobs, failures, shlex.join(["mpp", "compare", str(path), *overrides]))
        comparison.out.mkdir(parents=True, exist_ok=True)
        write_atomically(comparison.out / "results.json", json.dumps(results, indent=1).encode())
        write_report(results, comparison.out / "report.html")
    return comparison.out, results


def check_folder(jobs: Sequence[Job]) -> None:
    """Raises CompareError if a run that has begun is of another recipe than the one that is wanted."""
    done = {job.name for job in jobs if job.done}
    for job in jobs:
        folder = job.result.parent
        if job.recipe is None or not done.issuperset(job.needs) or not checkpoint.steps(folder / "checkpoints"):
            continue
        before, recipe = load_recipe(folder / "recipe.yaml"), job.recipe()
        recipe, batches, _ = opened(as_chosen(before, recipe))
        recipe = resolved(recipe, batches.index, batches.epoch)
        if job.needs:
            recipe = replace(recipe, weights=before.weights)  # which is in this folder, wherever that was moved from
        if changed := changes(before, recipe):
            raise CompareError(
                f"{folder}: holds a run of another recipe ({'; '.join(changed)}); choose another folder with out="
            )


def carry_out(jobs: Sequence[Job], failures: dict[str, str]) -> None:
    """Does all jobs, each after those that it needs; `failures` gets the name and cause of each that can't be done."""
    todo, told = list(jobs), set[str]()
    while todo:
        for job in todo:
            failed = next((name for name in job.needs if name in failures), None)
            if failed:
                failures[job.name] = f"needs what failed: {failed}"
            elif not job.done:
                waits = any(other.name in job.needs for other in todo)
                if waits or not attempt(job, failures, told):
                    continue
            todo.remove(job)
            print(f"mpp: {len(jobs) - len(todo)} of {len(jobs)} runs done", file=sys.stderr)
            break  # what could not be done before may be possible now, and comes first
        else:
            time.sleep(POLL)


def attempt(job: Job, failures: dict[str, str], told: set[str]) -> bool:
    """Does a job, unless another process is doing it; whether nothing of it is left to do. told: jobs already named."""
    if job.name not in told:
        print(f"mpp: {job.name}", file=sys.stderr)
        told.add(job.name)
    try:
        job.work()
    except BusyError:
        return False
    except FAILURES as error:
        failures[job.name] = cause(error)
        print(f"mpp: {job.name} failed: {cause(error)}", file=sys.stderr)
    return True
