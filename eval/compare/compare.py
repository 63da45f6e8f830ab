"""`mpp compare`: carries out the runs of a comparison, and leaves what they show in one page."""

import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mpp.data.chosen import chosen
from mpp.errors import UserError, cause, out_of_memory, terminable
from mpp.execution import at_once
from mpp.extend import imported
from mpp.files import BusyError, write_atomically
from mpp.jsons import encoded
from mpp.recipe.settled import RunError
from mpp.run.images import check_classes, make_missing, open_images
from mpp.run.start import earlier, same_run, same_weights
from mpp.weights import WeightsError

from ..report.report import write_report
from .arms import load_comparison
from .chains import Chains, Job, identity, images_of_result, probed_weights
from .gather import gather

POLL = 2.0  # seconds between looks at runs that other processes are doing


class CompareError(UserError):
    """A comparison can't go on in its folder."""


def compare(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Path, dict[str, Any]]:
    """Carries out a comparison, or goes on with it: its folder and its results, which stand there as results.json.

    Runs that are done are never repeated; one that fails is reported, and the rest go on. Several processes may share a
    folder, on one machine or on several with a common disk: each takes runs that no other is doing. Raises CompareError
    if the folder holds runs of other recipes.
    """
    comparison = load_comparison(path, overrides)
    baseline = comparison.finetune[comparison.config.baseline]
    make_missing(baseline.data)
    [train, *_], scored = chosen(baseline.data, baseline.seed, labelled=True)
    if scored is not None:
        check_classes(train, scored)
    chains = Chains(comparison)
    jobs, failures = chains.jobs(), dict[str, str]()
    chains.machine.known()  # before any run that would fail by it
    check_folder(jobs)
    try:
        with terminable():
            carry_out(jobs, failures)
    finally:  # what is known so far, also of a comparison that was stopped
        imports = [word for what in imported for word in ("--import", what)]
        results = gather(chains, jobs, failures, shlex.join(["mpp", "compare", str(path), *overrides, *imports]))
        comparison.out.mkdir(parents=True, exist_ok=True)
        write_atomically(comparison.out / "results.json", encoded(results, indent=1))
        write_report(results, comparison.out / "report.html")
    return comparison.out, results


def check_folder(jobs: Sequence[Job]) -> None:
    """Raises CompareError if a run that has begun is not the one that is wanted: of another recipe, or other content.

    Its folder, the data's and those of weights may have moved: what lies there counts.
    """
    done = {job.name for job in jobs if job.done}
    for job in jobs:
        if done.issuperset(job.needs) and (wrong := other_than_wanted(job)):
            raise CompareError(wrong)


def other_than_wanted(job: Job) -> str | None:
    """Why what a job's folder holds is not of this job; None if it is, or holds nothing yet."""
    folder = job.result.parent
    then = images_of_result(job.result) if job.images and job.done else None
    if job.images and then is not None and then != job.images():
        now = f"is of other images ({then}) than there are now ({job.images()})"
        return f"{job.result}: {now}; restore them, or choose another out="
    if job.encoder and (weights := probed_weights(job.result)) is not None:
        with suppress(WeightsError):  # gone: what was read off them stays
            if identity(job.encoder()) != weights:
                return f"{job.result}: was read off other weights than there are now; delete it, or choose another out="
    try:
        if job.recipe is not None and (before := earlier(folder, done=job.done)) is not None:
            recipe = job.recipe()
            images = open_images(recipe, before.settled, at_once)
            same_run(before, recipe, images)
            images.close()
            same_weights(before, recipe)
    except RunError as error:
        return str(error)
    return None


def carry_out(jobs: Sequence[Job], failures: dict[str, str]) -> None:
    """Does all jobs, each after those that it needs; `failures` gets the name and cause of each that can't be done."""
    todo, told, anew = list(jobs), set[str](), set[str]()
    while todo:
        for job in todo:
            failed = next((name for name in job.needs if name in failures), None)
            if failed:
                failures[job.name] = f"needs what failed: {failed}"
            elif job.done:
                if anew.intersection(job.needs) and (wrong := other_than_wanted(job)):  # of what was trained again
                    failures[job.name] = wrong
            else:
                waits = any(other.name in job.needs for other in todo)
                if waits or not attempt(job, failures, told):
                    continue
                anew.add(job.name)
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
    except (UserError, MemoryError, RuntimeError) as error:
        words = out_of_memory(error) or cause(error)
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise  # a bug
        failures[job.name] = words
        print(f"mpp: {job.name} failed: {words}", file=sys.stderr)
    return True
