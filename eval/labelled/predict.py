"""What a classifier says of images, and how often it is right where they have labels: `mpp predict`."""

import csv
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mpp.errors import UserError, shown
from mpp.files import write_atomically
from mpp.jsons import encoded
from mpp.models.classifier import Classifier
from mpp.shards.classes import displayed, listed, remark, translation
from mpp.weights import load_classifier
from mpp.weights.format import joint

from .images import Images, open_images, outputs
from .scores import Answers, Scores, answers, scored

logger = logging.getLogger("mpp.eval")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")  # what cells begin with that are no plain text (OWASP, CSV injection)


class PredictError(UserError):
    """Labels that do not fit the classifier, or a file that predictions can't be written to."""


@dataclass(frozen=True)
class Prediction:
    """What the classifier says of one image."""

    key: str  # of the sample in shards, or the path in a folder
    top: list[tuple[str, float]]  # the likeliest classes with their probabilities, falling
    label: str | None  # the true class, where it is known

    def __str__(self) -> str:
        [first, *rest] = [f"{shown(name)} {100 * score:.1f} %" for name, score in self.top]
        others = f" ({', '.join(rest)})" if rest else ""
        wrong = f"; it is {shown(self.label)}" if self.label not in (None, self.top[0][0]) else ""
        return f"{shown(self.key)}: {first}{others}{wrong}"


def predict(
    weights: str | Path,
    data: str | Path,
    *,
    split: str | None = None,
    image: tuple[int, int] | None = None,
    out: str | Path | None = None,
    top: int = 5,
    scores_out: str | Path | None = None,
    report: Callable[[str], None] = print,
) -> Scores | None:
    """Predicts the class of each image of shards or of a plain folder; the scores, if any image has a label.

    image: (h, w) of the images that it is fed; what its weights say where not given.
    out: a .jsonl or .csv file with a line for each image; without it `report` gets the lines.
    top: classes named for each image.
    scores_out: a JSON file for the scores.
    """
    if top < 1:
        raise PredictError(f"--top must be at least 1, got {top}")
    out, scores_out = (None if path is None else Path(path) for path in (out, scores_out))
    if out is not None and out.suffix not in FORMATS:
        raise PredictError(f"{out}: expected a name that ends in {' or '.join(FORMATS)}")
    for path in (out, scores_out):
        if path is not None and not path.absolute().parent.is_dir():
            raise PredictError(f"{path}: its folder does not exist")
    if out is not None and scores_out is not None and out.absolute() == scores_out.absolute():
        raise PredictError(f"{out}: expected two files, got one for the predictions and for the scores")
    classifier = load_classifier(weights, image=image)
    if classifier.classes == joint(len(classifier.classes)):
        way = f"`mpp embed {weights} ...` gives vectors"
        raise PredictError(f"{weights}: its head is CLIP's projection, which tells no classes apart; {way}")
    with open_images(data, classifier.encoder, split) as images:
        numbers = label_numbers(images, classifier.classes)
        labelled = bool((numbers[images.labels] >= 0).any())
        if scores_out is not None and not labelled:
            raise PredictError(f"{images.place}: no image has a label, so there are no scores for {scores_out}")
        names = classifier.classes if out is not None else displayed(classifier.classes)
        made: list[Prediction] = []
        seen: list[Answers] = []
        for logits, labels, keys in outputs(classifier, images, "predictions", progress=out is not None):
            truth = _renumbered(labels, numbers, len(keys))
            for prediction in _predictions(logits, truth, keys, names, top):
                made.append(prediction) if out is not None else report(str(prediction))
            if labelled:
                seen.append(answers(logits, truth))
    if out is not None:
        write_atomically(out, FORMATS[out.suffix](made).encode("utf-8", "surrogateescape"))
        report(f"{out}: the predictions for {len(made)} images")
    return _scored(seen, classifier.classes, scores_out, report) if seen else None


def _scored(
    seen: Sequence[Answers], classes: Sequence[str], out: Path | None, report: Callable[[str], None]
) -> Scores | None:
    """Scores what was seen, says so and writes it; None if all images with labels were damaged."""
    if not any(len(part.labels) for part in seen):
        return None
    found = scored(seen)
    report(found.table(classes))
    if out is not None:
        write_atomically(out, encoded({"classes": list(classes), **found.to_json()}))
    return found


def logits_of(classifier: Classifier, shards: str | Path, split: str) -> tuple[Tensor, Tensor]:
    """Logits float32 (n, classes) and labels (n,), as the classifier numbers them, of all good images of a split.

    Images are centred and in the shards' order; those without a label have -1.
    """
    found = _judged(classifier, shards, split)
    logits, labels = (torch.cat(part) for part in zip(*found, strict=True))
    return logits, labels


def _judged(classifier: Classifier, shards: str | Path, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The same, batch by batch."""
    with open_images(shards, classifier.encoder, split) as images:
        numbers = label_numbers(images, classifier.classes)
        for logits, labels, keys in outputs(classifier, images, f"predictions for {split}"):
            yield logits, _renumbered(labels, numbers, len(keys))


def score_split(classifier: Classifier, shards: str | Path, split: str) -> Scores:
    """Scores a classifier on the images of a split that have labels."""
    found = [answers(logits, labels) for logits, labels in _judged(classifier, shards, split)]
    if not any(len(part.labels) for part in found):
        raise PredictError(f"{shards}: split {split} holds no image with a label; scores need some")
    return scored(found)


def label_numbers(images: Images, classes: Sequence[str]) -> Tensor:
    """The classifier's number for each label of `images`, by name, and for -1 (no label) the last entry: -1.

    Folders that are not named as a class give no label; a class of shards that the classifier lacks is an error.
    """
    numbers = torch.from_numpy(translation(images.classes, classes))
    present = sorted(set(images.labels.tolist()) - {-1})
    if unknown := [images.classes[label] for label in present if numbers[label] < 0]:
        of, why = f"{images.place} has images of {listed(unknown)}", remark(unknown, classes)
        if not images.guessed:
            raise PredictError(f"{of}; the classifier's classes are {listed(classes)}{why}")
        logger.info("%s, which the classifier does not know%s; they count as images without labels", of, why)
    return numbers


def _renumbered(labels: Tensor | None, numbers: Tensor, count: int) -> Tensor:
    return torch.full((count,), -1) if labels is None else numbers[labels]


def _predictions(
    logits: Tensor, labels: Tensor, keys: Sequence[str], classes: Sequence[str], top: int
) -> list[Prediction]:
    best, which = logits.softmax(1).topk(min(top, len(classes)), dim=1)  # (b, k)
    made = []
    for key, shares, numbers, label in zip(keys, best.tolist(), which.tolist(), labels.tolist(), strict=True):
        ranked = [(classes[number], share) for number, share in zip(numbers, shares, strict=True)]
        made.append(Prediction(key, ranked, classes[label] if label >= 0 else None))
    return made


def _jsonl(made: Sequence[Prediction]) -> str:
    lines = []
    for one in made:
        [name, score], label = one.top[0], {} if one.label is None else {"label": one.label}
        lines.append(encoded({"key": one.key, "class": name, "score": score, **label, "top": one.top}).decode())
    return "".join(lines)


def _csv(made: Sequence[Prediction]) -> str:
    """Columns key, label (empty where not known), class, score, class_2, score_2, ..."""
    places = range(1, len(made[0].top) + 1)
    names = [f"{kind}_{place}" if place > 1 else kind for place in places for kind in ("class", "score")]
    rows = (
        [_cell(one.key), _cell(one.label or ""), *(part for name, score in one.top for part in (_cell(name), score))]
        for one in made
    )
    return _csv_line(["key", "label", *names]) + "".join(_csv_line(row) for row in rows)


def _cell(text: str) -> str:
    """A text that a spreadsheet would take for a formula gets a ' in front, as does one that begins with a '."""
    return f"'{text}" if text.startswith(FORMULA) else text


def _csv_line(cells: Sequence[object]) -> str:
    """One line; a cell with a carriage return is quoted too, which the module does only where lines end in one."""
    csv.writer(text := io.StringIO(), lineterminator="\r\n").writerow(cells)
    return text.getvalue().removesuffix("\r\n") + "\n"


FORMATS: dict[str, Callable[[Sequence[Prediction]], str]] = {".jsonl": _jsonl, ".csv": _csv}
