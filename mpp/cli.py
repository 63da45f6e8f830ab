"""`mpp ...`: parses the command line and calls one function a verb."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mpp.errors import UserError
from mpp.extend import ExtensionError, import_parts

if TYPE_CHECKING:
    from mpp.recipe import Recipe

T = TypeVar("T")
Command = Callable[[argparse.Namespace], None]

# Each command imports what it needs when it runs: `mpp --help` is to be there at once, without torch.


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

    found = folder_stats(options.folder, options.images)
    print(found)
    if options.json:
        found.save(options.json)


def pretrain(options: argparse.Namespace) -> None:
    recipe = recipe_of(options)  # without torch, so that what is misspelt is answered at once
    from mpp.run import run

    out = stoppable(lambda: run(recipe))
    left = {"encoder.safetensors": "the encoder", "pictures": "what it predicts", "metrics.jsonl": "how it went"}
    print("; ".join(f"{out}/{name}: {what}" for name, what in left.items() if (out / name).exists()))


def finetune(options: argparse.Namespace) -> None:
    recipe = recipe_of(options)
    from mpp.eval.labelled.finetune import finetune

    out, scores = stoppable(lambda: finetune(recipe))
    if scores:
        print(scores)
    print(f"{out}/classifier.safetensors: encoder and head; {out}/metrics.jsonl: how it went")


def recipe_of(options: argparse.Namespace) -> "Recipe":
    """The recipe that a command names, with its settings from the command line."""
    from mpp.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    return replace(recipe, weights=str(options.weights)) if options.weights else recipe


def stoppable(work: Callable[[], T]) -> T:
    """What `work` gives; if a signal stops it, says how to go on."""
    from mpp.watch import Interrupted

    try:
        return work()
    except Interrupted as stop:
        print(f"mpp: stopped by {stop}; run the same command again to go on", file=sys.stderr)
        raise SystemExit(128 + stop.number) from None


def plan(options: argparse.Namespace) -> None:
    from mpp.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from mpp.plan import plan

    print(plan(recipe, measure=options.measure))


def probe(options: argparse.Namespace) -> None:
    from mpp.eval.probes.probe import probe

    found = probe(
        options.weights,
        options.data,
        protocols=None if options.protocol == "all" else (options.protocol,),
        train=options.train,
        test=options.test,
        untrained=options.untrained,
    )
    print(found)
    if options.json:
        found.save(options.json)


def compare(options: argparse.Namespace) -> None:
    from mpp.eval.compare.compare import compare
    from mpp.eval.compare.summary import table

    out, results = stoppable(lambda: compare(options.recipe, options.overrides))
    print(table(results))
    print(f"{out}/report.html: the report, for a browser; {out}/results.json: every figure")
    if results["failures"]:
        raise SystemExit(1)


def embed(options: argparse.Namespace) -> None:
    from mpp.eval.labelled.embed import embed

    embed(options.weights, options.data, options.out, split=options.split)


def predict(options: argparse.Namespace) -> None:
    from mpp.eval.labelled.predict import predict

    predict(
        options.weights, options.data, split=options.split, out=options.out, top=options.top, scores_out=options.json
    )


def convert(options: argparse.Namespace) -> None:
    from mpp.export.convert import convert, facts_of

    print(convert(options.weights, options.out, options.to, head=not options.encoder, **facts_of(options.overrides)))


def recipes(options: argparse.Namespace) -> None:
    from mpp.recipe import list_recipes

    for name, comment in list_recipes():
        print(name)
        for line in comment.splitlines():
            print(f"    {line}")


# Taken out before anything else is parsed, as it adds to what can be chosen: here for the help alone.
IMPORT: dict[str, Any] = {
    "metavar": "FILE.py",
    "dest": "imports",
    "help": "run a file, or import an installed module, that adds objectives or protocols of your own "
    "(docs/extending.md); anywhere on the line, more than once if needed",
}


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser("mpp", description="Masked patch pretraining of Vision Transformers.")
    verbs = top.add_subparsers(metavar="VERB", required=True)
    top.add_argument("--import", action="append", **IMPORT)

    def verb(
        group: "argparse._SubParsersAction", name: str, run: Command, help: str, example: str
    ) -> argparse.ArgumentParser:
        added = group.add_parser(name, help=help, description=help, epilog=f"example: {example}")
        added.set_defaults(run=run)
        return added

    def recipe(added: argparse.ArgumentParser) -> None:
        added.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a name that `mpp recipes` lists")
        added.add_argument("overrides", metavar="key=value", nargs="*", help="settings that differ from the recipe's")

    shards = verbs.add_parser("shards", help="make, index, check or measure WebDataset shards").add_subparsers(
        metavar="VERB", required=True
    )
    make = verb(
        shards, "make", shards_make, "Turn images into shards.", "mpp shards make photos/ data/photos --size 256"
    )
    make.add_argument("source", metavar="SOURCE", help="folder or archive of images, torchvision dataset, or `digits`")
    make.add_argument("out", metavar="OUT", type=Path, help="folder for the shards")
    make.add_argument("--labels", choices=("auto", "none"), default="auto", help="auto: folders are classes")
    make.add_argument("--size", type=int, metavar="PIXELS", help="shrink the shorter side to this")
    make.add_argument(
        "--format", choices=("jpg", "png", "webp"), help="encode all images so; else files stay as they are"
    )
    make.add_argument("--quality", type=int, default=95, help="of jpg and webp that are encoded (default: 95)")
    make.add_argument("--mode", choices=("RGB", "L"), default="RGB", help="L: grey, one channel")
    make.add_argument("--per-shard", type=int, default=5000, metavar="IMAGES", help="at most (default: 5000)")
    make.add_argument("--workers", type=int, metavar="THREADS", help="default: one a core")
    index = verb(
        shards,
        "index",
        shards_index,
        "Index WebDataset tars that others wrote, in a folder or at URLs.",
        "mpp shards index laion/, or: mpp shards index 'https://host/train-{000000..000099}.tar' data/laion",
    )
    index.add_argument(
        "source",
        metavar="FOLDER",
        nargs="+",
        help="a folder of tars; or URLs of tars, with {0..9} or {a,b}, or ending in / for all that are listed there,"
        " and a folder for their index",
    )
    index.add_argument("--allow", choices=("pipe",), action="append", default=[], help="pipe: URLs may be pipe:COMMAND")
    index.add_argument("--split", help="name of the split; else what the files' names say, or train")
    index.add_argument(
        "--labels",
        metavar="CHOICE",
        help="cls, json:FIELD, name (folder of the key, or what stands before its last _), name:REGEX (its first group)"
        " or none; default: as in the index that is there, or cls",
    )
    check = verb(
        shards, "check", shards_check, "Decode every image and list the bad ones.", "mpp shards check data/photos"
    )
    check.add_argument("folder", metavar="FOLDER")
    check.add_argument(
        "--mark", action="store_true", help="record the bad ones in the index, so that reading skips them"
    )

    stats = verb(
        shards,
        "stats",
        shards_stats,
        "What shards hold: sizes, colours, classes, exact duplicates.",
        "mpp shards stats data/cifar10 --json cifar10.json",
    )
    stats.add_argument("folder", metavar="FOLDER")
    stats.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="decode a sample of N of each split for formats and colours (default: all)",
    )
    stats.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")

    pre = verb(
        verbs, "pretrain", pretrain, "Pretrain an encoder; again, go on.", "mpp pretrain cifar10/mpp train.lr=1e-3"
    )
    recipe(pre)
    pre.add_argument("--from", dest="weights", type=Path, metavar="WEIGHTS", help="start from this encoder")
    tune = verb(
        verbs,
        "finetune",
        finetune,
        "Train with labels; without --from, from scratch.",
        "mpp finetune cifar10/finetune --from runs/cifar10-mpp data.subset.share=0.1",
    )
    recipe(tune)
    compared = verb(
        verbs, "compare", compare, "Every arm, seed and protocol of a recipe, and one report.", "mpp compare quickstart"
    )
    recipe(compared)
    tune.add_argument("--from", dest="weights", type=Path, metavar="WEIGHTS", help="start from this encoder")
    planned = verb(
        verbs, "plan", plan, "What a recipe takes: parameters, FLOPs, memory, time.", "mpp plan paper/vit_b16_mpp"
    )
    recipe(planned)
    planned.add_argument("--measure", action="store_true", help="time a few steps on this machine")
    probed = verb(
        verbs,
        "probe",
        probe,
        "What a classifier reads off frozen features.",
        "mpp probe runs/cifar10-mpp --data data/cifar10 --protocol all",
    )
    probed.add_argument("weights", metavar="WEIGHTS", type=Path, help="run folder, checkpoint or encoder.safetensors")
    probed.add_argument("--data", required=True, metavar="SHARDS", help="a folder of shards, or its URL")
    probed.add_argument(
        "--protocol",
        choices=("linear", "few-shot", "knn", "linear-sgd", "all"),
        default="all",
        help="default: all but linear-sgd, which trains for 90 epochs as MAE's linear probe does",
    )
    probed.add_argument("--train", default="train", metavar="SPLIT", help="split to fit on (default: train)")
    probed.add_argument("--test", default="test", metavar="SPLIT", help="split to score on (default: test)")
    probed.add_argument("--untrained", action="store_true", help="the same encoder before training, for comparison")
    probed.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    embedded = verb(
        verbs,
        "embed",
        embed,
        "Features of shards, or of a folder of images.",
        "mpp embed runs/cifar10-mpp photos/ photos.npz",
    )
    predicted = verb(
        verbs,
        "predict",
        predict,
        "Classes of shards, or of a folder of images.",
        "mpp predict runs/cifar10-finetune data/cifar10 --split test --out predictions.csv",
    )
    for added in (embedded, predicted):
        added.add_argument("weights", metavar="WEIGHTS", type=Path, help="run folder, or file of weights")
        added.add_argument("data", metavar="DATA", help="folder of shards, or its URL; folder or archive of images")
        added.add_argument("--split", help="of the shards, where they have several")
    embedded.add_argument("out", metavar="OUT.npz", type=Path)
    predicted.add_argument("--out", type=Path, metavar="FILE", help=".jsonl or .csv; default: print them")
    predicted.add_argument("--top", type=int, default=5, help="classes named for each image (default: 5)")
    predicted.add_argument("--json", type=Path, metavar="FILE", help="write the scores there, where images have labels")
    converted = verb(
        verbs,
        "convert",
        convert,
        "Write weights, ours or others', as another library loads them, with a model card.",
        "mpp convert runs/cifar10-finetune cifar10-vit --to timm, or: mpp convert mae.pth mae --to huggingface heads=2",
    )
    converted.add_argument("weights", metavar="WEIGHTS", type=Path, help="run folder, or file or folder of weights")
    converted.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    converted.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="what another's file can't tell, named as in a recipe's model section: heads=2 image=[96,128]",
    )
    formats = "timm, huggingface, google (.npz), safetensors (mpp's own) or export (torch.export)"
    converted.add_argument("--to", required=True, metavar="FORMAT", help=formats)
    converted.add_argument("--encoder", action="store_true", help="leave the head for classes away")
    verb(verbs, "recipes", recipes, "List the recipes with their sources and results.", "mpp recipes")
    return top


def import_first(arguments: Sequence[str]) -> list[str]:
    """Carries out every `--import` of a command line, and gives the rest of it."""
    rest, words = [], iter(arguments)
    for word in words:
        if word == "--import" or word.startswith("--import="):
            what = word.partition("=")[2] or next(words, "")
            if not what:
                raise ExtensionError("--import: expected a .py file or an installed module behind it")
            import_parts(what)
        else:
            rest.append(word)
    return rest


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line's arguments; argparse by itself refuses key=value behind an option (`--from WEIGHTS`)."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(argument.startswith("-") for argument in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. Errors that a user can mend are one line on stderr, with exit status 2."""
    logging.basicConfig(level=logging.INFO, format="mpp: %(message)s", stream=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # class names may hold what the terminal can't show
    try:
        options = parsed(import_first(sys.argv[1:] if arguments is None else arguments))
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # of `mpp plan RECIPE | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        raise SystemExit(1) from None
    except UserError as error:
        print(f"mpp: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("mpp: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if remote := sys.modules.get("mpp.remote.cache"):
            remote.close_caches()  # what still waits for a server would keep Python from exiting
