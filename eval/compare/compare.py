"""`mpp compare`: carries out the runs of a comparison, and leaves what they show in one page."""

import os
import shlex
import sys
import time
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mpp.data.chosen import chosen
from mpp.errors import UserError, cause, counted, out_of_memory, terminable
from mpp.execution import at_once, callers_state, prepare_cuda
from mpp.extend import imported
from mpp.files import BusyError, claimed, write_atomically
from mpp.jsons import encoded
from mpp.recipe.settled import RunError
from mpp.run.images import check_classes, make_missing, open_images
from mpp.run.start import earlier, same_run, same_weights
from mpp.weights import WeightsError

from ..report.report import write_report
from .arms import load_comparison
from .chains import Chains, Job, identity, images_of_result, probed_weights
from .gather import gather
from .processes import Place, say, share_out

POLL = 2.0  # seconds between looks at runs that other processes are doing
JOB = ".job.lock"  # held as long as a job takes, where a run by itself holds its folder until it is trained
NEEDS = "needs what failed: "


class CompareError(UserError):
    """A comparison can't go on in its folder."""


def compare(
    path: str | Path, overrides: Sequence[str] = (), places: Sequence[Place] = ()
) -> tuple[Path, dict[str, Any]]:
    """Carries out a comparison, or goes on with it: its folder and its results, which stand there as results.json.

    Runs that are done are never repeated; one that fails is reported, and the rest go on. Several processes may share a
    folder, on one machine or on several with a common disk: each takes runs that no other is doing. Raises CompareError
    if the folder holds runs of other recipes.

    places: those of the processes that are started to do the runs; none, and this process does them.
    """
    comparison = load_comparison(path, overrides)
    baseline = comparison.finetune[comparison.config.baseline]
    make_missing(baseline.data)
    [train, *_], scored = chosen(baseline.data, baseline.seed, labelled=True)
    if scored is not None:
        check_classes(train, scored)
    chains = Chains(comparison)
    jobs, failures = chains.jobs(), dict[str, str]()
    imports = [word for what in imported for word in ("--import", what)]
    words = ["compare", str(path), *overrides, *imports]
    chains.machine.known()  # before any run that would fail by it
    check_folder(jobs)
    try:
        with terminable(), callers_state():
            for recipe in (*comparison.pretrain.values(), *comparison.finetune.values()):
                prepare_cuda(recipe.train)  # a probing, or scores, may be what first computes on CUDA
            if places:
                share(jobs, failures, places, words)
            else:
                carry_out(jobs, failures)
    finally:  # what is known so far, also of a comparison that was stopped
        results = gather(chains, jobs, failures, shlex.join(["mpp", *words]))
        comparison.out.mkdir(parents=True, exist_ok=True)
        write_atomically(comparison.out / "results.json", encoded(results, indent=1))
        write_report(results, comparison.out / "report.html")
    return comparison.out, results


def share(jobs: Sequence[Job], failures: dict[str, str], places: Sequence[Place], words: Sequence[str]) -> None:
    """Has processes do all jobs; `failures` gets what none of them could do. words: of the command line."""
    say(f"mpp: {len(places)} processes share {counted(len(jobs), 'run')}: " + "; ".join(map(described, places)))
    told: dict[str, str] = {}
    try:
        share_out(places, words, told)
    finally:
        for job in jobs:
            if needed := failed_need(job, failures):
                failures[job.name] = NEEDS + needed
            elif job.name in told and (why := other_than_wanted(job) if job.done else told[job.name]):
                failures[job.name] = why


def described(place: Place) -> str:
    """A process, and what it has of the machine."""
    gpu = f" on GPU {place.gpu}" if place.gpu is not None and place.name.startswith("process") else ""
    return f"{place.name}{gpu} with {counted(len(place.cores), 'core')}"


def take_part(path: str | Path, overrides: Sequence[str], journal: int) -> None:
    """Does runs of a comparison for the process that started this one and has looked at its folder.

    What failed by itself is written to that open file at the end, as a line of JSON.
    """
    failures = dict[str, str]()
    try:
        with terminable():
            carry_out(Chains(load_comparison(path, overrides)).jobs(), failures)
    finally:
        os.write(journal, encoded({name: why for name, why in failures.items() if not why.startswith(NEEDS)}))


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
            looked_at = replace(recipe, data=replace(recipe.data, prepare="cpu"))  # without room taken up on a GPU
            images = open_images(looked_at, before.settled, at_once)
            same_run(before, recipe, images)
            images.close()
            same_weights(before, recipe)
    except RunError as error:
        return str(error)
    return None


def carry_out(jobs: Sequence[Job], failures: dict[str, str]) -> None:
    """Does all jobs, each after those that it needs; `failures` gets the name and cause of each that can't be done."""
    todo, told, anew, waiting = list(jobs), set[str](), set[str](), False
    while todo:
        for job in todo:
            if failed := failed_need(job, failures):
                failures[job.name] = NEEDS + failed
            elif job.done:
                if anew.intersection(job.needs) and (wrong := other_than_wanted(job)):  # of what was trained again
                    failures[job.name] = wrong
            else:
                waits = any(other.name in job.needs for other in todo)
                if waits or not attempt(job, failures, told):
                    continue
                anew.add(job.name)
                waiting = False
                over = sum(one.name in failures or one.done for one in jobs)
                print(f"mpp: {over} of {len(jobs)} runs done", file=sys.stderr)
            todo.remove(job)
            break  # what could not be done before may be possible now, and comes first
        else:
            if not waiting:
                print(f"mpp: {counted(len(todo), 'run')} left, which wait for other processes", file=sys.stderr)
            waiting = True
            time.sleep(POLL)


def failed_need(job: Job, failures: Container[str]) -> str | None:
    """What a job needs that failed, if anything did."""
    return next((name for name in job.needs if name in failures), None)


def attempt(job: Job, failures: dict[str, str], told: set[str]) -> bool:
    """Does a job, unless another process is doing it; whether nothing of it is left to do. told: jobs already named."""
    try:
        with claimed(job.result.parent, "another process of the comparison does it", JOB):
            if job.done:  # by now
                return False
            if job.name not in told:
                print(f"mpp: {job.name}", file=sys.stderr)
                told.add(job.name)
            forget_compiled()
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


def forget_compiled() -> None:
    """Drops what torch has compiled for the runs before.

    It keeps 8 graphs of a function (`torch._dynamo.config.recompile_limit`), whatever run they are of, and carries out
    what would be the ninth, as of an arm of another width, uncompiled and slower.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
