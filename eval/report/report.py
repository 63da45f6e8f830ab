"""One self-contained HTML page of a comparison: no network, no script, light and dark, narrow and wide."""

import re
from collections.abc import Iterable
from datetime import datetime
from html import escape
from pathlib import Path

from mpp import jsons
from mpp.errors import UserError
from mpp.files import write_atomically

from .confusion import confusion_tables
from .report_charts import class_charts, fraction_chart, gain_chart, learning_curves, pictures, unlabelled
from .tables import (
    TOTAL_BUDGET,
    UPPER_BOUND,
    Column,
    Results,
    arms_table,
    cost_table,
    rates_table,
    score_table,
    share,
    titles,
)

FORMAT = 2  # of the results
MOST_TEXT = 20_000  # characters of a recipe
STYLE = Path(__file__).with_name("report.css")
# Nothing is loaded and no script runs, whatever stands in class names or error texts.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

DETAILS = {
    "top5": "Top-5 accuracy in %: the true class is among the five likeliest",
    "ece": "Expected calibration error in %: how far confidence is from accuracy (less is better)",
    "loss": "Cross-entropy on the test images (less is better)",
}


class ReportError(UserError):
    """Results that this version can't show."""


def write_report(results: Results, path: Path) -> None:
    write_atomically(path, report(results).encode())


def report(results: Results) -> str:
    """The page, as text. `results` is what compare.py writes to results.json; nothing else is read."""
    if results.get("format") != FORMAT:
        raise ReportError(
            f"these results are of format {results.get('format')}, expected {FORMAT}; the same `mpp compare` in their "
            "folder writes them anew and repeats no run"
        )
    sections = (
        ("answer", "What follows", _answer(results)),
        ("arms", "What was compared", _arms(results)),
        ("accuracy", "Accuracy after fine-tuning", _accuracy(results)),
        ("frozen", "Frozen features", _frozen(results)),
        ("curves", "Learning curves", _curves(results)),
        ("cost", "Cost beside gain", _cost(results)),
        ("classes", "Class by class", _classes(results)),
        ("pictures", "Pictures of pretraining", _pictures(results)),
        ("rates", "How learning rates were chosen", _rates(results)),
        ("repeat", "How to repeat this", _repeat(results)),
    )
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{heading}</h2>{content}</section>' for name, heading, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(results['name'])}: did pretraining help?</title>"
        f"<style>{STYLE.read_text(encoding='utf-8')}</style></head>"
        f'<body><nav aria-label="Sections"><ul>{links}</ul></nav><main>{_header(results)}{body}</main></body></html>\n'
    )


def _fractions(results: Results, protocol: str = "finetune") -> list[float]:
    return sorted({row["fraction"] for row in results["summary"] if row["protocol"] == protocol})


def _paragraph(text: str) -> str:
    return f"<p>{text}</p>"


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>" if content else ""


def _header(results: Results) -> str:
    data = results["data"]
    created = datetime.fromisoformat(results["created"])
    parts = (results["name"], data["path"], f"{created:%Y-%m-%d %H:%M %Z}")
    seeds, arms = len({row["seed"] for row in results["rows"]}), len(results["arms"])
    ways = "One way" if arms == 1 else f"{arms} ways"
    lead = (
        f"{ways} to train an image classifier. In the last step each learns from the same labelled images; it is then "
        f"scored on the same {data['test_images']:,} images in {len(data['classes']):,} classes of the split "
        f"“{escape(data['test_split'])}”, with {seeds} seed{'s' * (seeds != 1)}. A seed is a whole chain, from first "
        "weights to score."
    )
    return (
        f'<header><p class="kicker">{" · ".join(escape(str(part)) for part in parts)}</p>'
        f'<h1>Did pretraining on unlabelled images help?</h1><p class="lead">{lead}</p>{_notices(results)}</header>'
    )


def _notices(results: Results) -> str:
    """What failed and what is missing, before anything is concluded."""
    notices = ""
    if results["unfinished"]:
        missing = _list(escape(run) for run in results["unfinished"])
        notices += f'<div class="notice"><h2>This comparison is not finished</h2><p>Missing:</p>{missing}</div>'
    if results["failures"]:
        failed = _list(f"{escape(one['run'])}: <code>{escape(one['error'])}</code>" for one in results["failures"])
        notices += (
            f'<div class="notice"><h2>Some runs failed</h2>{failed}<p>The rest is reported without them.</p></div>'
        )
    return notices


def _finetunes(results: Results) -> bool:
    """Whether the comparison asked for fine-tuning, beside what is read off frozen features."""
    return "finetune" in results["compare"]["protocols"]


def _answer(results: Results) -> str:
    if not _finetunes(results):
        return _paragraph("Fine-tuning was not among the protocols. What the frozen features show stands below.")
    said = [escape(sentence) for sentence in results["conclusions"]]
    text = f'<div class="conclusions">{_list(said)}</div>' if said else _paragraph("Nothing can be concluded yet.")
    chart = gain_chart(results, _fractions(results))
    if not chart:
        return text + _paragraph("There is no arm to compare with the baseline yet.")
    return text + chart + _marks(results)


def _notes(results: Results) -> str:
    """How to read the tables."""
    base = escape(titles(results)[results["baseline"]])
    note = (
        f"Below each score: its difference to “{base}”, paired by seed, in percentage points, and in brackets the 95 % "
        "interval of that difference (Student's t)."
    )
    return f'<div class="notes">{_paragraph(note)}</div>{_marks(results)}'


def _marks(results: Results) -> str:
    """What the marks mean that appear."""
    notes = []
    if any(row["difference"] and row["difference"]["low"] is not None for row in results["summary"]):
        notes.append("▲ ▼ the interval excludes zero: luck of the seeds hardly explains it. Without a sign, it may.")
    if any(arm["upper_bound"] for arm in results["arms"]):
        notes.append(f"{UPPER_BOUND} an upper bound: its pretraining saw labels that the other arms never see.")
    if any(arm["total_budget"] for arm in results["arms"]):
        notes.append(
            f"{TOTAL_BUDGET} from scratch with the budget of another arm's pretraining and fine-tuning together."
        )
    if any(row["n"] == 1 for row in results["summary"]):
        notes.append("Where n = 1 there is no spread and no interval: such a difference may be luck.")
    return f'<div class="notes">{"".join(_paragraph(note) for note in notes)}</div>'


def _arms(results: Results) -> str:
    data = results["data"]
    text = f"The training split has {data['train_images']:,} images; label fractions are shares of it."
    return _paragraph(text) + arms_table(results)


def _accuracy(results: Results) -> str:
    fractions = _fractions(results)
    if not fractions:
        done = "has finished" if _finetunes(results) else "was asked for"
        return _paragraph(f"No fine-tuning {done}.")
    images = results["data"]["train_images"]
    heads = {
        fraction: (f"{share(fraction)} of the labels", f"{'about ' * (fraction < 1)}{fraction * images:,.0f} images")
        for fraction in fractions
    }
    columns = [Column(fraction, "top1", *heads[fraction]) for fraction in fractions]
    caption = "Top-1 accuracy on the test images in %: mean ± standard deviation over n seeds"
    metrics = {row["metric"] for row in results["summary"] if row["protocol"] == "finetune"} - {"top1"}
    more = "".join(
        score_table(results, DETAILS.get(metric, metric), "finetune", [Column(f, metric, *heads[f]) for f in fractions])
        for metric in sorted(metrics, key=[*DETAILS, *sorted(metrics)].index)
    )
    table = score_table(results, caption, "finetune", columns) + _notes(results)
    return table + fraction_chart(results, fractions) + _details("Top-5 accuracy, calibration and loss", more)


def _frozen(results: Results) -> str:
    """A table for each protocol other than fine-tuning."""
    tables = []
    for protocol in results["protocols"]:
        name, title, own = protocol["name"], protocol["title"], protocol["draws_labels"]
        keys = {(row["fraction"], row["metric"]) for row in results["summary"] if row["protocol"] == name}
        order = sorted(keys, key=lambda key: (key[0], _natural(key[1])))
        columns = [
            Column(f, metric, metric if own else f"{share(f)} of the labels", "" if own or metric == "top1" else metric)
            for f, metric in order
        ]
        table = score_table(results, f"{title}: accuracy on the test images in %", name, columns) if columns else ""
        tables.append(f"<h3>{escape(title)}</h3><p>{escape(protocol['text'])}</p>{table or _paragraph('No figures.')}")
    if not tables:
        return _paragraph("No protocol on frozen features was run.")
    text = "Here the encoder stays as it is and only a small classifier on its output learns."
    return _paragraph(text) + "".join(tables)


def _natural(name: str) -> list[tuple[int, str]]:
    """For sorting: 5-shot before 10-shot."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _curves(results: Results) -> str:
    before, after = learning_curves(results, "pretrain"), learning_curves(results, "finetune")
    if not before + after:
        return _paragraph("No curves were recorded.")
    groups = (("Pretraining", before), ("Training with labels", after))
    text = "Lines are means over seeds, thin lines single seeds."
    return _paragraph(text) + "".join(f"<h3>{title}</h3>{charts}" for title, charts in groups if charts)


def _cost(results: Results) -> str:
    table = cost_table(results, _fractions(results))
    if not table:
        return _paragraph("No costs were recorded.")
    names = {arm["name"]: escape(arm["title"]) for arm in results["arms"]}
    total = [names[arm["name"]] for arm in results["arms"] if arm["total_budget"]]
    helped = [names[arm["name"]] for arm in unlabelled(results)]
    text = "Pretraining is paid once, whatever is trained from it later; here each arm is charged for all of it. "
    if total and helped:
        text += (
            f"The honest comparison is of {_quoted(helped)} with {_quoted(total)}, trained from scratch with the "
            "budget of pretraining and fine-tuning together. It shows what pretraining gains over training longer."
        )
    elif helped:
        text += (
            "No arm was trained from scratch with the budget of pretraining and fine-tuning together, so this page "
            "cannot tell how much of a gain simply training for longer would have brought."
        )
    return _paragraph(text) + table


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(f"“{name}”" for name in names)


def _classes(results: Results) -> str:
    charts, confusion = class_charts(results, _fractions(results)), confusion_tables(results)
    text = "Which classes gain and which lose against the baseline, by accuracy after fine-tuning."
    none = "No accuracies of single classes to compare with the baseline."
    taken = f"<h3>What classes are taken for</h3>{confusion}" if confusion else ""
    return _paragraph(text if charts else none) + charts + taken


def _pictures(results: Results) -> str:
    shown = pictures(results)
    if not shown:
        return _paragraph("No arm of this comparison paints pictures.")
    text = "What the model was given in pretraining and what it made of it, at the end."
    return _paragraph(text) + shown


def _rates(results: Results) -> str:
    table = rates_table(results)
    if not table:
        return _paragraph("No learning rates were chosen: each recipe's own was used.")
    text = (
        "Each rate was tried on part of the labelled training images and scored on the rest, held out for this. "
        "The test images had no part in it."
    )
    return _paragraph(text) + table


def _shortened(text: str) -> str:
    """A recipe that names many classes, cut for a page that people read."""
    left = len(text) - MOST_TEXT
    return text if left <= 0 else f"{text[:MOST_TEXT]}\n... and {left:,} more characters, which stand in results.json"


def _repeat(results: Results) -> str:
    facts = ""
    for name, value in {**results["versions"], **results["hardware"]}.items():
        shown = "none" if value is None else str(value)
        facts += f"<div><dt>{escape(name.replace('_gib', ', GiB'))}</dt><dd>{escape(shown)}</dd></div>"
    recipes = "".join(
        _details(f"Recipe: {escape(name)}", f'<pre tabindex="0">{escape(_shortened(text))}</pre>')
        for name, text in results["recipes"].items()
    )
    settings = f'<pre tabindex="0">{escape(jsons.text(results["compare"], indent=1, ensure_ascii=False))}</pre>'
    return (
        f'<pre class="command" tabindex="0">{escape(results["command"])}</pre><dl>{facts}</dl>'
        f"{_details('Settings of the comparison', settings)}{recipes}"
    )
