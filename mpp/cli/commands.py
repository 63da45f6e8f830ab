"""One function a verb. Each imports what it needs when it runs: `mpp --help` is to be there at once, without torch."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from mpp.devices import DEVICES
from mpp.errors import counted, printable
from mpp.launch import launched, told_once

if TYPE_CHECKING:
    from mpp.recipe import Recipe

T = TypeVar("T")


def shards_make(options: argparse.Namespace) -> None:
    from mpp.shards.write import make_shards

    make_shards(
        options.source,
        options.out,
        labels=options.labels,
        size=options.size,
        format=options.format,
        quality=options.quality,
        mode=options.mode,
        per_shard=options.per_shard,
        workers=options.workers,
    )


def shards_index(options: argparse.Namespace) -> None:
    from mpp.remote.urls import is_url
    from mpp.shards.build import index_folder
    from mpp.shards.build_urls import index_urls
    from mpp.shards.tar import ShardError

    *urls, folder = options.source
    if not urls and not is_url(folder):
        index_folder(folder, options.split, options.labels)
    elif not urls or is_url(folder) or not all(map(is_url, urls)):
        raise ShardError(
            f"expected one FOLDER, or URLs and then a folder for their index, got {' '.join(options.source)}"
        )
    else:
        index_urls(urls, folder, options.split, options.labels or "cls", allow=options.allow)


def shards_check(options: argparse.Namespace) -> None:
    from mpp.shards.check import check_folder

    if check_folder(options.folder, mark=options.mark):
        raise SystemExit(1)


def shards_stats(options: argparse.Namespace) -> None:
    from mpp.shards.stats import folder_stats
    from mpp.shards.stats_table import table

    found = folder_stats(options.folder, options.images)
    print(printable(table(found)))
    if options.json:
        found.save(options.json)


def pretrain(options: argparse.Namespace) -> None:
    recipe = recipe_of(options)  # without torch, so that what is misspelt is answered at once
    from mpp.run import run

    out = stoppable(lambda: run(recipe))
    if not launched().leads:
        return
    left = {"encoder.safetensors": "the encoder", "pictures": "what it predicts", "metrics.jsonl": "how it went"}
    print("; ".join(f"{out}/{name}: {what}" for name, what in left.items() if (out / name).exists()))


def finetune(options: argparse.Namespace) -> None:
    recipe = recipe_of(options)
    from mpp.eval.labelled.finetune import finetune

    out, scores = stoppable(lambda: finetune(recipe))
    if not launched().leads:
        return
    if scores:
        print(printable(scores))
    print(f"{out}/classifier.safetensors: encoder and head; {out}/metrics.jsonl: how it went")


def recipe_of(options: argparse.Namespace) -> "Recipe":
    """The recipe that a command names, with its settings from the command line."""
    from mpp.recipe import RecipeError, load_recipe

    weights, continues = (str(path) if path else None for path in (options.weights, options.continues))
    with told_once():
        recipe = load_recipe(options.recipe, options.overrides)
        try:
            return replace(recipe, weights=weights or recipe.weights, continues=continues or recipe.continues)
        except ValueError as error:
            raise RecipeError(f"command line: {error}") from None


def stoppable(work: Callable[[], T]) -> T:
    """What `work` gives; if a signal stops it, says how to go on."""
    from mpp.watch import Interrupted

    try:
        return work()
    except Interrupted as stop:
        if launched().leads:
            print(f"mpp: stopped by {stop}; run the same command again to go on", file=sys.stderr)
        raise SystemExit(128 + stop.number) from None


def plan(options: argparse.Namespace) -> None:
    from mpp.estimate import PlanError, part_of
    from mpp.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if options.device is None and (options.gpus or options.measured):
        given = f"--gpus {options.gpus}" if options.gpus else "--measured"
        raise PlanError(f"{given}: give the kind of GPU as well: --device {', '.join(DEVICES)}")
    part_of(recipe.train.batch, options.gpus or 1)
    from mpp.fleet import Fleet, load_measured
    from mpp.plan import plan

    fleet = None
    if options.device:
        fleet = Fleet(options.gpus or 1, options.device, options.measured and load_measured(options.measured))
    planned = plan(recipe, measure=options.measure, fleet=fleet)
    print(printable(planned))
    if options.json:
        planned.save(options.json)


def probe(options: argparse.Namespace) -> None:
    from mpp.eval.probes.probe import probe

    found = probe(
        options.weights,
        options.data,
        protocols=None if options.protocol == "all" else (options.protocol,),
        train=options.train,
        test=options.test,
        untrained=options.untrained,
        image=options.image,
    )
    print(printable(found))
    if options.json:
        found.save(options.json)


def compare(options: argparse.Namespace) -> None:
    from mpp.eval.compare.arms import load_comparison
    from mpp.eval.compare.processes import leave_with_parent, places

    if options.worker is not None:
        leave_with_parent()
    load_comparison(options.recipe, options.overrides)  # before torch is imported: what is misspelt is answered at once
    from mpp.eval.compare.compare import compare, take_part
    from mpp.eval.compare.summary import table

    if options.worker is not None:
        return stoppable(lambda: take_part(options.recipe, options.overrides, options.worker))
    count = options.gpus or options.processes
    at = places(count, gpus=options.gpus is not None) if count else ()
    out, results = stoppable(lambda: compare(options.recipe, options.overrides, at))
    print(printable(table(results)))
    print(f"{out}/report.html: the report, for a browser; {out}/results.json: every figure")
    if left := results["unfinished"]:
        print(f"mpp: {counted(len(left), 'run')} not done; run the same command again to go on", file=sys.stderr)
    if results["failures"] or left:
        raise SystemExit(1)


def embed(options: argparse.Namespace) -> None:
    from mpp.eval.labelled.embed import embed

    embed(options.weights, options.data, options.out, split=options.split, image=options.image)


def predict(options: argparse.Namespace) -> None:
    from mpp.eval.labelled.predict import predict

    predict(
        options.weights,
        options.data,
        split=options.split,
        image=options.image,
        out=options.out,
        top=options.top,
        scores_out=options.json,
    )


def convert(options: argparse.Namespace) -> None:
    from mpp.export.convert import convert, facts_of

    found = convert(options.weights, options.out, options.to, head=not options.encoder, **facts_of(options.overrides))
    print(printable(found))


def recipes(options: argparse.Namespace) -> None:
    from mpp.recipe import list_recipes

    for name, comment in list_recipes():
        print(name)
        for line in comment.splitlines():
            print(f"    {line}")
