"""The verbs of the command line, their arguments and their help. Nothing here imports torch."""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mpp.cli import commands
from mpp.devices import DEVICES
from mpp.errors import shown, without_secrets
from mpp.eval.probes.protocols import PROTOCOLS, cheap
from mpp.launch import Ended, launched

Group = Any  # what `add_subparsers` gives
Command = Callable[[argparse.Namespace], None]

MOST = 100_000  # GPUs or processes
FORMATS = "timm, huggingface, google (.npz), safetensors (mpp's own), export (torch.export) or onnx"
# Taken out before anything else is parsed, as it adds to what can be chosen: this is for the help alone.
IMPORT: dict[str, Any] = {
    "metavar": "FILE.py",
    "dest": "imports",
    "action": "append",
    "help": "run a file, or import an installed module, that adds parts of your own (docs/extending.md)",
}

IMAGE: dict[str, Any] = {
    "metavar": "PIXELS",
    "type": lambda text: sides(text),
    "help": "side of the images it is fed, or HEIGHTxWIDTH; default: what its weights say",
}


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line's arguments; argparse by itself refuses key=value behind an option (`--from WEIGHTS`)."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(argument.startswith("-") for argument in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors repeat arguments, but not the secrets of addresses."""

    def error(self, message: str) -> NoReturn:
        if launched().local:
            raise Ended  # another process of this machine tells it
        super().error(without_secrets(message))


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser("mpp", description="Masked patch pretraining of Vision Transformers.", allow_abbrev=False)
    top.add_argument("--import", **IMPORT)
    verbs = top.add_subparsers(metavar="VERB", required=True)
    _shards(verbs)
    _training(verbs)
    _probe(verbs)
    _weights(verbs)
    _verb(verbs, "recipes", commands.recipes, "List the recipes with their sources and results.", "mpp recipes")
    return top


def _verb(group: Group, name: str, run: Command, help: str, example: str) -> argparse.ArgumentParser:
    added: argparse.ArgumentParser = group.add_parser(
        name, help=help, description=help, epilog=f"example: {example}", allow_abbrev=False
    )
    added.set_defaults(run=run, shared=run in (commands.pretrain, commands.finetune))  # by several processes
    added.add_argument("--import", **IMPORT)
    return added


def _shards(verbs: Group) -> None:
    what = "make, index, check or measure WebDataset shards"
    group = verbs.add_parser("shards", help=what, description=what).add_subparsers(metavar="VERB", required=True)

    example = "mpp shards make photos/ data/photos --size 256"
    make = _verb(group, "make", commands.shards_make, "Turn images into shards.", example)
    make.add_argument("source", metavar="SOURCE", help="folder or archive of images, torchvision dataset, or `digits`")
    make.add_argument("out", metavar="OUT", type=Path, help="folder for the shards")
    make.add_argument("--labels", choices=("auto", "none"), default="auto", help="auto: folders are classes")
    make.add_argument("--size", type=int, metavar="PIXELS", help="shrink the shorter side to this")
    help = "encode all images so; else files stay as they are"
    make.add_argument("--format", choices=("jpg", "png", "webp"), help=help)
    make.add_argument("--quality", type=int, default=95, help="of jpg and webp that are encoded (default: 95)")
    make.add_argument("--mode", choices=("RGB", "L"), default="RGB", help="L: grey, one channel")
    make.add_argument("--per-shard", type=int, default=5000, metavar="IMAGES", help="at most (default: 5000)")
    make.add_argument("--workers", type=int, metavar="THREADS", help="default: one a core")

    example = "mpp shards index laion/, or: mpp shards index 'https://host/train-{000000..000099}.tar' data/laion"
    help = "Index WebDataset tars that others wrote, in a folder or at URLs."
    index = _verb(group, "index", commands.shards_index, help, example)
    help = "a folder of tars; or URLs of tars, with {0..9} or {a,b}, or ending in / for all that are listed there,"
    index.add_argument("source", metavar="FOLDER", nargs="+", help=f"{help} and a folder for their index")
    index.add_argument("--allow", choices=("pipe",), action="append", default=[], help="pipe: URLs may be pipe:COMMAND")
    index.add_argument("--split", help="name of the split; else what the files' names say, or train")
    help = "cls, json:FIELD, name (folder of the key, or what stands before its last _), name:REGEX (its first group)"
    help += " or none; default: as in the index that is there, or cls"
    index.add_argument("--labels", metavar="CHOICE", help=help)

    example = "mpp shards check data/photos"
    check = _verb(group, "check", commands.shards_check, "Decode every image and list the bad ones.", example)
    check.add_argument("folder", metavar="FOLDER")
    help = "record the bad ones in the index, so that reading skips them"
    check.add_argument("--mark", action="store_true", help=help)

    example = "mpp shards stats data/cifar10 --json cifar10.json"
    help = "What shards hold: sizes, colours, classes, exact duplicates."
    stats = _verb(group, "stats", commands.shards_stats, help, example)
    stats.add_argument("folder", metavar="FOLDER")
    help = "decode a sample of N of each split for formats and colours (default: all)"
    stats.add_argument("--images", type=int, metavar="N", help=help)
    stats.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")


def _training(verbs: Group) -> None:
    example = "mpp pretrain cifar10/mpp train.lr=1e-3"
    pretrain = _verb(verbs, "pretrain", commands.pretrain, "Pretrain an encoder; again, go on.", example)
    example = "mpp finetune cifar10/finetune --from runs/cifar10-mpp data.subset.share=0.1"
    finetune = _verb(verbs, "finetune", commands.finetune, "Train with labels; without --from, from scratch.", example)
    help = "Every arm, seed and protocol of a recipe, and one report."
    compare = _verb(verbs, "compare", commands.compare, help, "mpp compare quickstart")
    help = "What a recipe takes: parameters, FLOPs, memory, time."
    plan = _verb(verbs, "plan", commands.plan, help, "mpp plan paper/vit_b16_mpp")
    for added in (pretrain, finetune, compare, plan):
        added.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a name that `mpp recipes` lists")
        added.add_argument("overrides", metavar="key=value", nargs="*", help="settings that differ from the recipe's")
    for added in (pretrain, finetune):
        added.add_argument("--from", dest="weights", type=Path, metavar="WEIGHTS", help="start from this encoder")
        help = "go on from the whole state of this run, or of a checkpoint of it: longer, or with another rate"
        added.add_argument("--continue", dest="continues", type=Path, metavar="RUN", help=help)
    shared = compare.add_mutually_exclusive_group()
    help = "so many processes, each with one GPU, share the runs (docs/evaluation.md)"
    shared.add_argument("--gpus", type=number, metavar="N", help=help)
    help = "so many processes share the runs and the cores, and take turns on the GPUs if there are any"
    shared.add_argument("--processes", type=number, metavar="N", help=help)
    shared.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # one of those: the file that its failures go to
    plan.add_argument("--measure", action="store_true", help="time a few steps on this machine")
    help = "estimate memory by part, time of a step and length of the run on N of these (docs/scaling.md)"
    plan.add_argument("--device", choices=tuple(DEVICES), help=help)
    plan.add_argument("--gpus", type=number, metavar="N", help="how many; default: one")
    help = "a speed from what --measure --json wrote on one such GPU, instead of an assumed one"
    plan.add_argument("--measured", type=Path, metavar="FILE", help=help)
    plan.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")


def number(text: str) -> int:
    """A number of GPUs or processes."""
    if not text.strip().isdecimal() or not 1 <= (found := int(text)) <= MOST:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {MOST:,}, got {shown(text)!r}")
    return found


def sides(text: str) -> tuple[int, int]:
    """An image's (h, w) of `224` or `224x320`."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip())
    if not found or not min(pair := (int(found[1]), int(found[2] or found[1]))):
        raise argparse.ArgumentTypeError(f"expected PIXELS, or HEIGHTxWIDTH, got {shown(text)!r}")
    return pair


def _probe(verbs: Group) -> None:
    example = "mpp probe runs/cifar10-mpp --data data/cifar10 --protocol all"
    help = "What a classifier reads off frozen features."
    probe = _verb(verbs, "probe", commands.probe, help, example)
    probe.add_argument("weights", metavar="WEIGHTS", type=Path, help="run folder, or file or folder of weights")
    probe.add_argument("--data", required=True, metavar="SHARDS", help="a folder of shards, or its URL")
    help = f"default: all, which are {', '.join(cheap())}"
    if dear := [name for name in PROTOCOLS if name not in cheap()]:
        help += f"; not {', '.join(dear)}, for the time it takes"
    probe.add_argument("--protocol", choices=[*PROTOCOLS, "all"], default="all", help=help)
    probe.add_argument("--train", default="train", metavar="SPLIT", help="split to fit on (default: train)")
    probe.add_argument("--test", default="test", metavar="SPLIT", help="split to score on (default: test)")
    probe.add_argument("--image", **IMAGE)
    help = "the same encoder before training, for comparison"
    probe.add_argument("--untrained", action="store_true", help=help)
    probe.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")


def _weights(verbs: Group) -> None:
    example = "mpp embed runs/cifar10-mpp photos/ photos.npz"
    embed = _verb(verbs, "embed", commands.embed, "Features of shards, or of a folder of images.", example)
    example = "mpp predict runs/cifar10-finetune data/cifar10 --split test --out predictions.csv"
    predict = _verb(verbs, "predict", commands.predict, "Classes of shards, or of a folder of images.", example)
    for added in (embed, predict):
        added.add_argument("weights", metavar="WEIGHTS", type=Path, help="run folder, or file or folder of weights")
        added.add_argument("data", metavar="DATA", help="folder of shards, or its URL; folder or archive of images")
        added.add_argument("--split", help="of the shards, where they have several")
        added.add_argument("--image", **IMAGE)
    embed.add_argument("out", metavar="OUT.npz", type=Path)
    predict.add_argument("--out", type=Path, metavar="FILE", help=".jsonl or .csv; default: print them")
    predict.add_argument("--top", type=int, default=5, help="classes named for each image (default: 5)")
    help = "write the scores there, where images have labels"
    predict.add_argument("--json", type=Path, metavar="FILE", help=help)

    example = "mpp convert runs/cifar10-finetune cifar10-vit --to timm, or: mpp convert mae.pth mae --to huggingface"
    help = "Write weights, ours or others', as another library loads them, with a model card."
    convert = _verb(verbs, "convert", commands.convert, help, f"{example} heads=2")
    convert.add_argument("weights", metavar="WEIGHTS", type=Path, help="run folder, or file or folder of weights")
    convert.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    help = "what another's file can't tell, named as in a recipe's model section: heads=2 image=[96,128]"
    convert.add_argument("overrides", metavar="key=value", nargs="*", help=help)
    convert.add_argument("--to", required=True, metavar="FORMAT", help=FORMATS)
    convert.add_argument("--encoder", action="store_true", help="leave the head for classes away")
