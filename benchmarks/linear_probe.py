"""The linear probe's whole grid of regularisations and features, ours against a loop over scikit-learn.

    python -m benchmarks.linear_probe [--images 10000] [--rounds 3] [--threads 2] [--write]
    python -m benchmarks.linear_probe --images 50000 --weights RUN --data SHARDS    # features of images

Both hold out the same tenth of the training images, fit every choice of features at every l2 to the rest, take the
best and fit it to all. scikit-learn gets standardised float32 features, L-BFGS and its default tolerance, at which the
weakest regularisations are not solved yet; ours goes on until its gradient is small (mpp/eval/probes/logistic.py).
"""

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.harness import Bar, Contender, Timing

if TYPE_CHECKING:
    from torch import Tensor

Choices = dict[str, list["Tensor"]]

OURS, PEER = "mpp, linear_probe", "scikit-learn, a loop"
BAR = Bar(5)  # issue 3
WIDTH, CLASSES, TEST = 384, 10, 10_000
DECAY = 1.5  # standard deviations of the principal axes fall as rank ** -DECAY; trained ViTs' fall faster
MAX_ITER = 10_000


def made_up(images: int) -> tuple[Choices, "Tensor", Choices, "Tensor"]:
    """Features as correlated as an encoder's, made from no image: a class token, an average patch, and both."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> "Tensor":
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(0, CLASSES, (images + TEST,), generator=generator)
    found: dict[str, Tensor] = {}
    for name in ("class token", "average patch"):
        spread = torch.arange(1, WIDTH + 1) ** -DECAY
        turn = torch.linalg.qr(normal(WIDTH, WIDTH)).Q
        inner = 0.12 * normal(CLASSES, WIDTH)[labels] + normal(images + TEST, WIDTH)
        found[name] = (inner * spread) @ turn
    choices = {**{name: [part] for name, part in found.items()}, "both": list(found.values())}
    train, test = ({name: [part[rows] for part in parts] for name, parts in choices.items()}
                   for rows in (slice(images), slice(images, None)))  # fmt: skip
    return train, labels[:images], test, labels[images:]


def of_images(weights: Path, data: Path, images: int) -> tuple[Choices, "Tensor", Choices, "Tensor"]:
    """The features that `mpp probe` chooses among, of the first images of a data set."""
    import numpy as np

    from mpp.eval.features.extract import extract
    from mpp.eval.probes.linear import choices
    from mpp.files import cache_folder
    from mpp.weights import load_encoder

    encoder = load_encoder(weights)
    train, test = (extract(encoder, data, split, cache=cache_folder("features")) for split in ("train", "test"))
    train = train.choose(np.arange(images))
    return choices(train.parts), train.labels, choices(test.parts), test.labels


def features_of(images: int, weights: Path | None, data: Path | None) -> tuple[Choices, "Tensor", Choices, "Tensor"]:
    return made_up(images) if weights is None or data is None else of_images(weights, data, images)


def prepare_ours(images: int, threads: int, weights: Path | None, data: Path | None) -> Callable[[], Timing]:
    import torch

    from mpp.eval.probes.linear import linear_probe

    torch.set_num_threads(threads)
    given = features_of(images, weights, data)

    def run() -> Timing:
        start = time.perf_counter()
        found = linear_probe(*given)
        return Timing(images, time.perf_counter() - start, {"accuracy": found.accuracy, "l2": found.l2})

    return run


def prepare_peer(images: int, threads: int, weights: Path | None, data: Path | None) -> Callable[[], Timing]:
    import numpy as np
    import torch
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    from mpp.eval.probes.linear import L2, tenths

    train, y, test, truth = features_of(images, weights, data)
    labels, answers = y.numpy(), truth.numpy()
    folds = [fold.numpy() for fold in tenths(y)]

    def fitted(x: np.ndarray, rows: np.ndarray, l2: float) -> LogisticRegression:
        return LogisticRegression(C=1 / (l2 * len(rows)), max_iter=MAX_ITER).fit(x[rows], labels[rows])

    def loop() -> dict[str, float]:
        scores: dict[tuple[str, float], float] = {}
        for name, parts in train.items():
            features = torch.cat(parts, 1).float().numpy()
            for fold in folds:
                rest = np.setdiff1d(np.arange(images), fold)
                x = StandardScaler().fit(features[rest]).transform(features)
                for l2 in L2:
                    right = (fitted(x, rest, l2).predict(x[fold]) == labels[fold]).mean()
                    scores[name, l2] = scores.get((name, l2), 0.0) + float(right) / len(folds)
        name, l2 = max(scores, key=lambda key: scores[key])
        scaler = StandardScaler()
        x = scaler.fit_transform(torch.cat(train[name], 1).float().numpy())
        model = fitted(x, np.arange(images), l2)
        seen = scaler.transform(torch.cat(test[name], 1).float().numpy())
        return {"accuracy": float((model.predict(seen) == answers).mean()), "l2": l2}

    def run() -> Timing:
        start = time.perf_counter()
        with threadpool_limits(threads), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            facts = loop()
        return Timing(images, time.perf_counter() - start, facts)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="of training (the issue's bar is at 50000)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", type=Path, help="of an encoder whose features to take; with --data")
    parser.add_argument("--data", type=Path, help="shards with labels, and splits train and test")
    parser.add_argument("--write", action="store_true", help="keep the figures in results/")
    options = parser.parse_args()
    if (options.weights is None) != (options.data is None):
        parser.error("--weights and --data go together")
    settings: dict[str, Any] = {name: getattr(options, name) for name in ("images", "threads", "weights", "data")}
    contenders = [Contender(OURS, prepare_ours, settings), Contender(PEER, prepare_peer, settings)]
    timings = harness.interleave(contenders, options.rounds)
    ratios = [harness.speed(timings, OURS, PEER, BAR)]
    title = f"linear probe, {options.images} training images, {options.weights or f'{WIDTH} made-up features'}"
    harness.table(title, timings, ratios)
    if options.write:
        plain = {name: value if isinstance(value, int | None) else str(value) for name, value in settings.items()}
        harness.write("linear-probe", options.threads, "cpu", {title: harness.summary(plain, timings, ratios)})


if __name__ == "__main__":
    main()
