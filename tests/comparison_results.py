"""Made-up results of `mpp compare`, as eval/compare.py would write them: what the report is tested on."""

import base64
import io
import math
from typing import Any

import numpy as np
from PIL import Image
from scipy import stats

from mpp.eval.compare.confusion import confusions

ARMS = ("scratch", "mpp", "labels", "scratch_total", "cnn")
TITLES = {
    "scratch": "From scratch",
    "mpp": "Masked patch prediction",
    "labels": "Pretrained with all labels",
    "scratch_total": "From scratch, total budget",
    "cnn": "ResNet-18 from scratch",
}
LEVEL = {"scratch": (0.31, 0.55, 0.81), "mpp": (0.4, 0.63, 0.84), "labels": (0.71, 0.79, 0.86)}
LEVEL |= {"scratch_total": (0.33, 0.585, 0.835), "cnn": (0.29, 0.61, 0.88)}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FROZEN = {"linear": ("top1",), "few-shot": ("1-shot", "5-shot", "10-shot", "25-shot"), "knn": ("top1",)}
ACCURACY = {"accuracy": {"title": "Accuracy", "share": True, "guess": False}}
GUESSES = {
    "nearest": "Guess without learning: the nearest visible patch",
    "commonest": "Guess without learning: the commonest answer",
}
PAINTED = {
    "input": "the image",
    "corrupted": "what the model is given (grey: masked)",
    "predicted": "what it paints into the corrupted patches",
    "truth": "what would have been right",
}


def comparison(
    arms: tuple[str, ...] = ARMS,
    seeds: int = 3,
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0),
    classes: tuple[str, ...] = CLASSES,
    protocols: tuple[str, ...] = ("finetune", *FROZEN),
    **changes: Any,
) -> dict[str, Any]:
    """Results of arms x seeds x protocols x fractions; `changes` replaces top-level keys."""
    random = np.random.default_rng(0)
    rows = [row for arm in arms for seed in range(seeds) for row in _rows(random, arm, seed, fractions, protocols)]
    return {
        "format": 2,
        "name": "cifar10-compare",
        "command": "mpp compare cifar10/compare",
        "created": "2026-11-22T14:00:00+00:00",
        "versions": {"mpp": "0.1.0", "python": "3.12.3", "torch": "2.15.0", "torchvision": "0.30.0"},
        "hardware": {"processor": "AMD EPYC 9454", "cores": 2, "memory_gib": 24, "gpu": None},
        "data": {
            "path": "data/cifar10",
            "train_images": 50_000,
            "test_images": 10_000,
            "test_split": "test",
            "classes": list(classes),
        },
        "baseline": arms[0],
        "compare": {
            "protocols": ["finetune", "linear", "knn", "few-shot"],
            "seeds": list(range(seeds)),
            "fractions": list(fractions),
            "lrs": [3e-4, 1e-3, 3e-3],
        },
        "protocols": [_protocol(name) for name in protocols if name != "finetune"],
        "recipes": {"mpp pretrain": "objective: {name: mpp}\ntrain: {epochs: 100, lr: 1.0e-3}", "finetune": "seed: 0"},
        "arms": [_arm(arm) for arm in arms],
        "rows": rows,
        "summary": summary(rows, arms[0]),
        "conclusions": [
            "At 1 % of the labels masked patch prediction gains 9.0 points over training from scratch.",
            "At 100 % of the labels it gains 3.0 points; the total budget without pretraining gains 2.5.",
            "What this does not show: how other data sets, sizes or longer training would come out.",
        ],
        "per_class": [
            _classes(random, arm, seed, f, len(classes)) for arm in arms for seed in range(seeds) for f in fractions
        ],
        "confusion": _confusion(arms, seeds, fractions, classes),
        "costs": [run for arm in arms for seed in range(seeds) for run in _costs(arm, seed, fractions)],
        "chosen": [_chosen(arm, fraction) for arm in arms for fraction in fractions],
        "captions": {arm: _captions(arm) for arm in arms},
        "curves": [curve for arm in arms for seed in range(seeds) for curve in _curves(random, arm, seed, fractions)],
        "pictures": [
            {"arm": "mpp", "seed": 0, "png": png(random), "rows": ["input", "corrupted", "predicted", "truth"]}
        ],
        "failures": [],
        "unfinished": [],
    } | changes


def _confusion(arms: Any, seeds: int, fractions: Any, classes: Any) -> list[dict[str, Any]]:
    """As `mpp compare` gathers it of the scores of runs, which here are draws."""
    random, scored = np.random.default_rng(1), []
    for arm in arms:
        for fraction in fractions:
            for _ in range(seeds if classes else 0):
                pairs = np.unique(random.integers(0, len(classes), (60, 2)), axis=0)
                images = random.integers(1, 50, len(pairs)).tolist()
                found = {"true": pairs[:, 0].tolist(), "predicted": pairs[:, 1].tolist(), "images": images}
                scored.append((arm, fraction, {"classes": list(classes), "confusion": found}))
    return confusions(scored, classes)


def _arm(name: str) -> dict[str, Any]:
    pretrained = name.startswith(("mpp", "labels"))
    encoder = "ResNet-18, small-image stem" if name == "cnn" else "ViT, patch 4, width 128, depth 4, 4 heads"
    return {
        "name": name,
        "title": TITLES.get(name, f"Arm {name}"),
        "pretrain": name if pretrained else None,
        "upper_bound": name == "labels",
        "total_budget": name == "scratch_total",
        "parameters": 11_173_962 if name == "cnn" else 814_000,
        "encoder": encoder,
    }


def _protocol(name: str) -> dict[str, Any]:
    few = name == "few-shot"
    words = {"title": name.capitalize(), "text": f"What {name} is.", "headline": "5-shot" if few else "top1"}
    return {"name": name, **words, "draws_labels": few}


def _captions(arm: str) -> dict[str, Any]:
    labelled = {"metrics": ACCURACY, "pictures": {}}
    guesses = {name: {"title": title, "share": True, "guess": True} for name, title in GUESSES.items()}
    if arm.startswith("mpp"):
        return {"pretrain": {"metrics": ACCURACY | guesses, "pictures": PAINTED}, "finetune": labelled}
    return {"pretrain": labelled, "finetune": labelled} if arm.startswith("labels") else {"finetune": labelled}


def _level(arm: str, fraction: float) -> float:
    low, middle, high = LEVEL.get(arm, (0.3 + 0.01 * len(arm), 0.6, 0.8))
    return float(np.interp(math.log10(fraction), [-2, -1, 0], [low, middle, high]))


def _rows(random: Any, arm: str, seed: int, fractions: tuple[float, ...], protocols: tuple[str, ...]) -> list[dict]:
    rows = []
    for protocol in protocols:
        for fraction in (1.0,) if protocol == "few-shot" else fractions:
            top1 = _level(arm, fraction) + random.normal() * 0.005
            if protocol == "finetune":
                values = {"top1": top1, "top5": 0.7 + 0.3 * top1, "ece": 0.2 - 0.15 * top1, "loss": 2.3 * (1 - top1)}
            else:
                names = FROZEN[protocol]
                values = {name: 0.6 * top1 - 0.04 * (len(names) - 1 - place) for place, name in enumerate(names)}
            key = {"arm": arm, "seed": seed, "protocol": protocol, "fraction": fraction}
            rows += [key | {"metric": metric, "value": float(value)} for metric, value in values.items()]
    return rows


def summary(rows: list[dict], baseline: str) -> list[dict[str, Any]]:
    """Means, standard deviations and paired differences with Student's interval, as the schema describes them."""
    groups: dict[tuple, dict[int, float]] = {}
    for row in rows:
        key = (row["arm"], row["protocol"], row["fraction"], row["metric"])
        groups.setdefault(key, {})[row["seed"]] = row["value"]
    found = []
    for (arm, *rest), by_seed in groups.items():
        values, base = list(by_seed.values()), groups.get((baseline, *rest), {})
        paired = [value - base[seed] for seed, value in by_seed.items() if seed in base]
        found.append(
            dict(zip(("arm", "protocol", "fraction", "metric"), (arm, *rest), strict=True))
            | {
                "n": len(values),
                "mean": float(np.mean(values)),
                "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            }
            | {"difference": _difference(paired, baseline) if arm != baseline and paired else None}
        )
    return found


def _difference(paired: list[float], baseline: str) -> dict[str, Any]:
    n, mean = len(paired), float(np.mean(paired))
    half = float(stats.t.ppf(0.975, n - 1) * np.std(paired, ddof=1) / math.sqrt(n)) if n > 1 else None
    ends = {"low": mean - half, "high": mean + half} if half is not None else {"low": None, "high": None}
    return {"to": baseline, "n": n, "mean": mean, **ends}


def _classes(random: Any, arm: str, seed: int, fraction: float, classes: int) -> dict[str, Any]:
    level = _level(arm, fraction)
    own = (
        np.random.default_rng(5).normal(size=classes) * 0.08
        + np.random.default_rng(len(arm)).normal(size=classes) * 0.03
    )
    accuracy: list[Any] = np.clip(level + own + random.normal(size=classes) * 0.01, 0, 1).tolist()
    return {"arm": arm, "seed": seed, "fraction": fraction, "accuracy": accuracy}


def _costs(arm: str, seed: int, fractions: tuple[float, ...]) -> list[dict[str, Any]]:
    each = 3.1e8 if arm != "cnn" else 1.6e9  # FLOPs a training image
    stages = [("pretrain", None, 500_000 * 10)] if arm.startswith(("mpp", "labels")) else []
    more = 5_000_000 if arm == "scratch_total" else 0
    stages += [("finetune", fraction, int(1_000_000 * fraction) + more) for fraction in fractions]
    return [
        {"arm": arm, "seed": seed, "stage": stage, "fraction": fraction, "images": images}
        | {"flops": images * each, "seconds": images / 450 + seed}
        for stage, fraction, images in stages
    ]


def _chosen(arm: str, fraction: float) -> dict[str, Any]:
    tried = [
        {"lr": lr, "accuracy": _level(arm, fraction) - loss} for lr, loss in ((3e-4, 0.02), (1e-3, 0.0), (3e-3, 0.04))
    ]
    return {
        "arm": arm,
        "fraction": fraction,
        "lr": 1e-3,
        "tried": tried,
        "images_held_out": max(10, int(5000 * fraction)),
    }


def _curves(random: Any, arm: str, seed: int, fractions: tuple[float, ...]) -> list[dict[str, Any]]:
    def rising(end: float, images: int) -> list[list[float]]:
        noise = random.normal(size=20) * 0.006
        return [[images * step // 20, end * (1 - 0.8 * math.exp(-step / 5)) + noise[step - 1]] for step in range(1, 21)]

    curves = []
    if arm.startswith(("mpp", "labels")):
        metrics = {"val/accuracy": 0.46 if arm.startswith("mpp") else 0.86}
        curves = [("pretrain", None, metric, rising(end, 5_000_000)) for metric, end in metrics.items()]
        if arm.startswith("mpp"):
            for metric, level in (("val/nearest", 0.27), ("val/commonest", 0.066)):
                flat = [[250_000 * step, level + random.normal() * 0.001] for step in range(1, 21)]
                curves.append(("pretrain", None, metric, flat))
    more = 5_000_000 if arm == "scratch_total" else 0
    for fraction in fractions:
        curves.append(
            ("finetune", fraction, "val/accuracy", rising(_level(arm, fraction), int(1_000_000 * fraction) + more))
        )
    names = ("stage", "fraction", "metric", "points")
    return [{"arm": arm, "seed": seed} | dict(zip(names, curve, strict=True)) for curve in curves]


def png(random: Any, images: int = 8, side: int = 32) -> str:
    """Four rows of pictures, the second with grey patches, as base64."""
    coarse = random.integers(0, 256, (images, 3, 3, 3), dtype=np.uint8)
    resize = Image.Resampling.BICUBIC
    row = np.concatenate([np.asarray(Image.fromarray(one).resize((side, side), resize)) for one in coarse], axis=1)
    hidden = np.kron(random.random((side // 4, images * side // 4)) < 0.5, np.ones((4, 4)))[..., None] > 0
    blurred = row.reshape(side // 4, 4, -1, 4, 3).mean((1, 3)).repeat(4, 0).repeat(4, 1)
    pictures = [
        row,
        np.where(hidden, 128, row),
        np.where(hidden, blurred // 32 * 32 + 16, row),
        np.where(hidden, blurred, row),
    ]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(pictures).astype(np.uint8)).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()
