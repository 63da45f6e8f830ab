"""What the finished runs of a comparison show, as one dictionary: results.json, from which the report is made."""

import base64
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mpp.counts import cost
from mpp.data.config import SubsetConfig
from mpp.data.subset import drawn
from mpp.errors import cause, without_secrets
from mpp.log import read_metrics
from mpp.loop import steps_of
from mpp.models.encoders import build_encoder
from mpp.objectives.config import NEIGHBOURS
from mpp.recipe import load_recipe
from mpp.recipe.settled import FILE as SETTLED
from mpp.recipe.settled import RunError, load_settled
from mpp.remote.urls import kept_url
from mpp.shards.classes import translation, union
from mpp.shards.index import read_index
from mpp.workers import cores

from ..probes.protocols import PROTOCOLS
from ..report.report import FORMAT
from .arms import FINETUNE, ArmConfig, Comparison
from .chains import Asked, Chains, Job, read_rows, read_scores
from .confusion import confusions
from .summary import Figure, conclusions, summarise

PACKAGES = ("mpp", "torch", "torchvision", "numpy", "scikit-learn")


def gather(chains: Chains, jobs: Sequence[Job], failures: dict[str, str], command: str) -> dict[str, Any]:
    """All figures of what is done, and the names of what failed or is not done yet."""
    comparison, config = chains.comparison, chains.config
    done = [job for job in jobs if job.done and job.name not in failures]  # one that failed may hold other content
    rows = [row for job in done for row in _rows(job)]
    scored = {job: scores for job in done if job.stage == "finetune" and (scores := read_scores(job.result))}
    data = _data(comparison, [scores.get("classes", ()) for scores in scored.values()])
    classes = data["classes"]
    titles, known = {arm: comparison.title(arm) for arm in config.arms}, dict[Any, int]()
    return {
        "format": FORMAT,
        "name": comparison.name,
        "command": without_secrets(command),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "hardware": _hardware(),
        "data": data,
        "baseline": config.baseline,
        "compare": {**asdict(config), "arms": {arm: _settings(own) for arm, own in config.arms.items()}},
        "protocols": [_protocol(name) for name in config.frozen],
        "recipes": _recipes(done),
        "arms": [_arm(comparison, arm) for arm in config.arms],
        "rows": [row._asdict() for row in rows],
        "summary": summarise(rows, config.baseline),
        "conclusions": conclusions(rows, titles, config.arms, config.baseline),
        "per_class": [_per_class(job, scores, classes) for job, scores in scored.items()],
        "confusion": confusions(
            [(job.arm, job.fraction, scores) for job, scores in scored.items() if job.fraction is not None], classes
        ),
        "costs": [entry for arm in config.arms for entry in _costs(chains, arm, known, {job.name for job in done})],
        "chosen": _chosen(chains, {job.name for job in done}),
        "captions": {arm: _captions(comparison, arm) for arm in config.arms},
        "curves": [curve for job in done if job.stage in ("pretrain", "finetune") for curve in _curves(job)],
        "pictures": [picture for arm in config.arms for picture in _pictures(chains, arm)],
        "failures": [{"run": name, "error": error} for name, error in failures.items()],
        "unfinished": [job.name for job in jobs if not job.done and job.name not in failures],
    }


def _rows(job: Job) -> list[Figure]:
    """What a job found of all that the comparison asks for."""
    if job.stage == "finetune":
        scores = read_scores(job.result)
        assert scores
        assert job.fraction is not None
        figures = {name: scores[name] for name in ("top1", "top5", "ece", "loss") if scores[name] is not None}
        return [Figure(job.arm, job.seed, FINETUNE, job.fraction, name, value) for name, value in figures.items()]
    if job.stage == "probe":
        return [
            Figure(job.arm, job.seed, row["protocol"], row["fraction"], row["metric"], row["value"])
            for row in read_rows(job.result)[1]
            if Asked(row["fraction"], row["protocol"]) in job.asked
        ]
    return []


def _protocol(name: str) -> dict[str, Any]:
    """What the report and the table need to know of a protocol."""
    kept, protocol = ("title", "text", "headline", "draws_labels"), PROTOCOLS[name]
    return {"name": name, **{key: getattr(protocol, key) for key in kept}}


def _captions(comparison: Comparison, arm: str) -> dict[str, Any]:
    """How the figures and pictures of an arm's training are to be named, as its objectives say."""
    recipes = {"pretrain": comparison.pretrain.get(arm), "finetune": comparison.finetune[arm]}
    return {
        stage: {
            "metrics": {name: asdict(metric) for name, metric in {**recipe.objective.metrics, **NEIGHBOURS}.items()},
            "pictures": dict(recipe.objective.pictures),
        }
        for stage, recipe in recipes.items()
        if recipe
    }


def _per_class(job: Job, scores: dict[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """A run's accuracy on each class, in the order of `classes`, whatever its own is."""
    accuracy: list[float | None] = [None] * len(classes)
    for number, value in zip(translation(scores.get("classes", classes), classes), scores["per_class"], strict=False):
        if number >= 0:
            accuracy[number] = value
    return {"arm": job.arm, "seed": job.seed, "fraction": job.fraction, "accuracy": accuracy}


def _arm(comparison: Comparison, arm: str) -> dict[str, Any]:
    settings, recipe = comparison.config.arms[arm], comparison.finetune[arm]
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_encoder(recipe.model).parameters())
    return {
        "name": arm,
        "title": comparison.title(arm),
        "pretrain": kept_url(settings.pretrain or settings.weights or "") or None,
        "upper_bound": settings.upper_bound,
        "total_budget": settings.total_of is not None,
        "parameters": parameters,
        "encoder": recipe.model.describe(),
    }


def _settings(arm: ArmConfig) -> dict[str, Any]:
    return {key: kept_url(value) if isinstance(value, str) else value for key, value in asdict(arm).items()}


def _costs(chains: Chains, arm: str, known: dict[Any, int], done: set[str]) -> list[dict[str, Any]]:
    """Images, FLOPs and seconds of each finished run that an arm rests on, runs shared with other arms included.

    Trials of learning rates are left out. known: FLOPs of an image by model and objective, as counting takes a second.
    """
    found = {}
    for seed in chains.config.seeds:
        for job in chains.of_arm(arm, seed):
            if job.name in done and job.stage in ("pretrain", "finetune"):
                images, flops, seconds = _cost(job.result.parent, known)
                entry = {"arm": arm, "seed": seed, "stage": job.stage, "fraction": job.fraction}
                found[job.name] = {**entry, "images": images, "flops": flops, "seconds": seconds}
    return list(found.values())


def _cost(folder: Path, known: dict[Any, int]) -> tuple[int, int, float]:
    """Of a finished run: images seen, FLOPs, and seconds of training by its log, interruptions left out."""
    recipe = load_settled(folder).fill(load_recipe(folder / "recipe.yaml"))
    images = steps_of(recipe.train) * recipe.train.batch
    seconds, before = 0.0, 0
    for row in read_metrics(folder):
        if "images/s" in row:
            seconds += (row["step"] - before) * recipe.train.batch / row["images/s"]
            before = row["step"]
    kind = recipe.model, recipe.objective
    if kind not in known:
        known[kind] = cost(recipe)
    return images, images * known[kind], seconds


def _chosen(chains: Chains, done: set[str]) -> list[dict[str, Any]]:
    """The learning rate that each arm chose, where all that it tried is done."""
    config, found = chains.config, []
    held_out = cache(partial(_held_out, chains.comparison))
    for arm in config.arms:
        for fraction in [config.choose_at] if config.choose_at else config.fractions:
            if chains.chooser(arm) != arm or not all(job.name in done for job in chains.trials(arm, fraction)):
                continue
            if choice := chains.chosen(arm, fraction):
                found.append({**choice, "images_held_out": held_out(fraction)})
    return found


def _held_out(comparison: Comparison, fraction: float) -> int:
    """Images that the trials of learning rates were scored on, as `Chains.trials` draws them."""
    shards, train, _ = comparison.data
    subset = SubsetConfig(share=fraction, hold_out=comparison.config.hold_out)
    return len(drawn(read_index(shards, train), subset, comparison.config.seeds[0])[1])


def _curves(job: Job) -> list[dict[str, Any]]:
    """Each figure on the scored split against the images seen."""
    folder = job.result.parent
    batch = load_recipe(folder / "recipe.yaml").train.batch
    points: dict[str, list[list[float]]] = {}
    for row in read_metrics(folder):
        for name, value in row.items():
            if name.startswith("val/"):
                points.setdefault(name, []).append([row["step"] * batch, value])
    place = {"arm": job.arm, "seed": job.seed, "stage": job.stage, "fraction": job.fraction}
    return [{**place, "metric": name, "points": found} for name, found in points.items()]


def _pictures(chains: Chains, arm: str) -> list[dict[str, Any]]:
    """What the first seed's pretraining painted last."""
    for job in chains.pretraining(arm, chains.config.seeds[0], max(chains.config.fractions)):
        found = sorted((job.result.parent / "pictures").glob("step-*.png"))
        if job.done and found:
            png = base64.b64encode(found[-1].read_bytes()).decode()
            rows = list(chains.comparison.pretrain[arm].objective.pictures)
            return [{"arm": arm, "seed": job.seed, "png": png, "rows": rows}]
    return []


def _recipes(done: Sequence[Job]) -> dict[str, str]:
    """The recipe of one run of each stage of each arm, with every setting, and what its first start settled.

    Seeds and fractions differ between the runs of a stage, no more.
    """
    found: dict[str, str] = {}
    for job in done:
        if job.stage in ("pretrain", "finetune"):
            asked, settled = (job.result.parent / name for name in ("recipe.yaml", SETTLED))
            text = f"{_text(asked)}\n# What the first start found and chose ({SETTLED}):\n{_text(settled)}"
            found.setdefault(f"{job.arm} {job.stage}", text)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: cannot be read: {cause(error)}; restore it, or delete {path.parent}") from None


def _data(comparison: Comparison, named: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What was fine-tuned and tested on. named: the classes of each run's scores, which may name more of them."""
    shards, train, test = comparison.data
    index, scored = read_index(shards, train), read_index(shards, test)
    sizes = {"train_images": len(index), "test_images": len(scored)}
    return {
        "path": kept_url(shards),
        **sizes,
        "test_split": test,
        "classes": list(union([index.classes, *named])),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _hardware() -> dict[str, Any]:
    """This machine, as far as it decides speed."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": processor, "cores": cores(), "memory_gib": round(memory), "gpu": gpu}
