"""What classes are taken for, summed over the seeds of an arm: all of it for few classes, else the pairs with the most
images. A table of all pairs would be as large as the number of classes squared."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mpp.shards.classes import translation

FULL = 12  # classes up to which all pairs are kept
MOST_PAIRS = 30  # that are kept of more classes


def confusions(scored: Sequence[tuple[str, float, dict[str, Any]]], classes: Sequence[str]) -> list[dict[str, Any]]:
    """For each arm and label fraction: `pairs` of [true class, predicted class, images], numbered as `classes`.

    scored: arm, fraction and scores.json of each run. With many classes the pairs are the most frequent mistakes, and
    `left_out` says how many there are beside them, and of how many images.
    """
    groups: dict[tuple[str, float], list[Counter[tuple[int, int]]]] = {}
    for arm, fraction, scores in scored:
        found = scores["confusion"]
        if isinstance(found, dict):  # an earlier version wrote a table of all pairs, which is not read
            numbers = translation(scores["classes"], classes)
            true, predicted = numbers[found["true"]].tolist(), numbers[found["predicted"]].tolist()
            pairs = zip(true, predicted, found["images"], strict=True)
            known = Counter({(one, other): images for one, other, images in pairs if min(one, other) >= 0})
            groups.setdefault((arm, fraction), []).append(known)
    return [_summed(arm, fraction, runs, len(classes)) for (arm, fraction), runs in groups.items()]


def _summed(arm: str, fraction: float, runs: Sequence[Counter[tuple[int, int]]], classes: int) -> dict[str, Any]:
    total = sum(runs, Counter[tuple[int, int]]())
    wrong = {pair: images for pair, images in total.items() if pair[0] != pair[1]}
    pairs = sorted(total) if classes <= FULL else sorted(wrong, key=lambda pair: (-wrong[pair], pair))[:MOST_PAIRS]
    left = wrong.keys() - set(pairs)
    return {
        "arm": arm,
        "fraction": fraction,
        "runs": len(runs),
        "images": total.total(),
        "mistakes": sum(wrong.values()),
        "whole": classes <= FULL,
        "pairs": [[*pair, total[pair]] for pair in pairs],
        "left_out": {"pairs": len(left), "images": sum(wrong[pair] for pair in left)},
    }
