"""The report's tables of what classes are taken for."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mpp.shards.classes import displayed

from .tables import CHOSEN, NONE_CELL, Results, attributes, boxed, share, titles


def confusion_tables(results: Results) -> str:
    """For each arm, at the largest share of labels: true by predicted class or, of many, the most frequent mistakes."""
    found = results.get("confusion", ())  # results of earlier versions have none
    names, title = displayed(list(map(str, results["data"]["classes"]))), titles(results)
    parts = []
    for arm in results["arms"]:
        own = [one for one in found if one["arm"] == arm["name"]]
        if own:
            one = max(own, key=lambda one: one["fraction"])
            table = (_whole if one["whole"] else _pairs)(one, names)
            parts.append(f"<details><summary>{escape(title[arm['name']])}</summary>{table}</details>")
    return "".join(parts)


def _words(one: Mapping[str, Any]) -> str:
    runs = f" of {one['runs']} seeds" if one["runs"] > 1 else ""
    return f"At {share(one['fraction'])} of the labels: {one['mistakes']:,} mistakes on {one['images']:,} images{runs}"


def _cell(one: Mapping[str, Any], true: int, predicted: int, images: int) -> str:
    keys = {"arm": one["arm"], "fraction": one["fraction"], "metric": "confusion"}
    kind = CHOSEN if true == predicted else ""
    return f"<td{kind}{attributes(**keys, true=true, predicted=predicted, value=images)}>{images:,}</td>"


def _whole(one: Mapping[str, Any], names: Sequence[str]) -> str:
    images = {(true, predicted): count for true, predicted, count in one["pairs"]}
    head = "".join(f'<th scope="col"><bdi>{escape(name)}</bdi></th>' for name in ("True class", *names))
    rows = []
    for true, name in enumerate(names):
        cells = (
            _cell(one, true, predicted, images[true, predicted]) if (true, predicted) in images else NONE_CELL
            for predicted in range(len(names))
        )
        rows.append(f'<tr><th scope="row"><bdi>{escape(name)}</bdi></th>{"".join(cells)}</tr>')
    return boxed(f"{_words(one)}, by true class (rows) and predicted class (columns)", head, [rows])


def _pairs(one: Mapping[str, Any], names: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in ("True class", "Taken for", "Images"))
    rows = [
        f'<tr><th scope="row"><bdi>{escape(names[true])}</bdi></th>'
        f'<td class="long"><bdi>{escape(names[predicted])}</bdi></td>{_cell(one, true, predicted, images)}</tr>'
        for true, predicted, images in one["pairs"]
    ]
    left = one["left_out"]
    more = f"; left out: {left['pairs']:,} more pairs with {left['images']:,} images" if left["pairs"] else ""
    return boxed(f"{_words(one)}; the most frequent{more}", head, [rows], "words")
