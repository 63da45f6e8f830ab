import copy
import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict
from html import escape, unescape
from html.parser import HTMLParser
from statistics import fmean, stdev

import numpy as np
import pytest
from comparison_results import comparison

from mpp.errors import UserError
from mpp.eval.compare.confusion import confusions
from mpp.eval.report.report import report, write_report
from mpp.objectives.config import NEIGHBOURS

VOID = {"meta", "img", "br"}
SECTIONS = ("answer", "arms", "accuracy", "frozen", "curves", "cost", "classes", "pictures", "rates", "repeat")
HOSTILE = "<script>alert(1)</script>\" onload='x' & ]]>"
HUNDREDS = tuple(f"class {number}" for number in range(1000))
ODD = {
    "one seed": {"seeds": 1},
    "one fraction": {"fractions": (0.1,)},
    "one arm": {"arms": ("scratch",)},
    "one of everything": {"arms": ("scratch",), "seeds": 1, "fractions": (1.0,), "protocols": ("finetune",)},
    "two seeds": {"seeds": 2},
    "nothing but scores": {"curves": [], "pictures": [], "chosen": [], "costs": [], "per_class": [], "conclusions": []},
    "nothing at all": {
        "rows": [],
        "summary": [],
        "curves": [],
        "pictures": [],
        "chosen": [],
        "costs": [],
        "per_class": [],
    },
    "only frozen features": {"protocols": ("linear", "knn")},
    "1000 classes": {"classes": HUNDREDS, "arms": ("scratch", "mpp"), "seeds": 2},
    "20 arms": {"arms": ("scratch", *(f"mpp{number}" for number in range(19))), "seeds": 2},
    "30 arms": {"arms": ("scratch", *(f"mpp{number}" for number in range(29))), "seeds": 1},
    "no classes": {"classes": ()},
    "unfinished": {
        "unfinished": ["mpp finetune, seed 2"],
        "failures": [{"run": "cnn finetune", "error": "loss is nan"}],
    },
}


class Page(HTMLParser):
    """The elements of a page with their attributes and texts; fails where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[dict] = []
        self.elements: list[dict] = []
        self.feed(html)
        self.close()
        assert not self.open, f"{self.open[-1]['tag']} is never closed"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice: {names}"
        parent = self.open[-1] if self.open else None
        element = {"tag": tag, "attributes": dict(attrs), "text": "", "parent": parent}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1]["tag"] == tag, f"</{tag}> closes {self.open[-1]['tag']}"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag: str) -> list[dict]:
        return [element for element in self.elements if element["tag"] == tag]


def keyed(page: Page, *names: str) -> list[tuple[tuple, dict]]:
    """Table cells with a value, under the given data attributes."""
    cells = [
        cell
        for cell in page.all("td")
        if {f"data-{name}" for name in names} | {"data-value"} <= cell["attributes"].keys()
    ]
    return [(tuple(cell["attributes"][f"data-{name}"] for name in names), cell) for cell in cells]


def stats(page: Page, cell: dict) -> dict[str, tuple[float, str]]:
    """The figures in a cell: what each is, its exact value and what is shown."""
    found = {}
    for element in page.elements:
        if "data-stat" in element["attributes"] and element["parent"] and _within(element, cell):
            found[element["attributes"]["data-stat"]] = (float(element["attributes"]["data-value"]), element["text"])
    return found


def _within(element: dict, ancestor: dict) -> bool:
    while element is not None:
        if element is ancestor:
            return True
        element = element["parent"]
    return False


def shown(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


def check_figures(results: dict) -> None:
    """Every figure in the tables is one of the results, exactly and as shown, and none of them is missing."""
    page = Page(report(results))
    expected = {(row["arm"], row["protocol"], str(row["fraction"]), row["metric"]): row for row in results["summary"]}
    cells = dict(keyed(page, "arm", "protocol", "fraction", "metric"))
    assert cells.keys() == expected.keys()
    for key, cell in cells.items():
        row, found = expected[key], stats(page, cell)
        gain = row["difference"] or {}
        wanted = {"mean": row["mean"], "sd": row["sd"], "n": row["n"], "difference": gain.get("mean")}
        wanted |= {"low": gain.get("low"), "high": gain.get("high")}
        assert {stat: value for stat, (value, _) in found.items()} == {k: v for k, v in wanted.items() if v is not None}
        assert float(cell["attributes"]["data-value"]) == row["mean"]
        for stat, (value, text) in found.items():
            scale, off = (1, 0.0005) if key[3] == "loss" else (100, 0.005)
            assert shown(text) == pytest.approx(value if stat == "n" else scale * value, abs=off * 1.001)


def test_every_figure_in_the_tables_equals_the_results():
    check_figures(comparison())


def test_a_sign_says_whether_the_interval_excludes_zero():
    results = comparison(arms=("scratch", "better", "worse", "same"), seeds=2, protocols=("finetune",))
    ends = {"better": (0.001, 0.02), "worse": (-0.02, -0.001), "same": (-0.001, 0.02)}
    for row in results["summary"]:
        if row["difference"]:
            low, high = ends[row["arm"]]
            row["difference"] |= {"mean": (low + high) / 2, "low": low, "high": high}
    texts = [(key[0], key[1], cell["text"]) for key, cell in keyed(Page(report(results)), "arm", "metric", "protocol")]
    signs = {"better": "▲", "worse": "▼", "same": ""}
    assert len([arm for arm, _, _ in texts if arm in ends]) == 3 * 3 * 4
    for arm, _, text in texts:
        assert "".join(re.findall("[▲▼]", text)) == signs.get(arm, ""), (arm, text)


def test_costs_are_means_over_seeds_with_pretraining_included():
    results = comparison()
    cells = {
        key: float(cell["attributes"]["data-value"])
        for key, cell in keyed(Page(report(results)), "arm", "fraction", "metric")
    }
    for arm in ("scratch", "mpp", "scratch_total", "cnn"):
        for fraction in (0.01, 0.1, 1.0):
            runs = [run for run in results["costs"] if run["arm"] == arm and run["fraction"] in (None, fraction)]
            totals = {name: sum(run[name] for run in runs) / 3 for name in ("flops", "seconds")}
            before = sum(run["images"] for run in runs if run["stage"] == "pretrain") / 3
            found = {name: cells[arm, str(fraction), name] for name in ("flops", "seconds", "pretraining", "labelled")}
            after = sum(run["images"] for run in runs) / 3 - before
            assert found == pytest.approx(totals | {"pretraining": before, "labelled": after})


def test_gains_of_classes_are_paired_by_seed():
    results = comparison(arms=("scratch", "mpp"))
    results["per_class"][0]["accuracy"][4] = None  # the baseline's, seed 0 at 0.01
    page = Page(report(results))
    rows = [row for row in page.all("tr") if row["attributes"].get("data-metric") == "class"]
    scored = {(one["arm"], one["seed"], one["fraction"]): one["accuracy"] for one in results["per_class"]}
    assert len(rows) == 3 * 10
    for row in rows:
        fraction, number = float(row["attributes"]["data-fraction"]), int(row["attributes"]["data-class"])
        pairs = [
            (scored["mpp", seed, fraction][number], scored["scratch", seed, fraction][number]) for seed in range(3)
        ]
        gains = [ours - theirs for ours, theirs in pairs if theirs is not None]
        found = stats(page, row)
        assert found["mean"][0] == pytest.approx(fmean(gains))
        assert found["sd"][0] == pytest.approx(stdev(gains))
        assert row["text"].startswith(results["data"]["classes"][number])


def test_of_1000_classes_the_15_best_and_worst_are_shown():
    results = comparison(arms=("scratch", "mpp"), seeds=1, fractions=(1.0,), classes=HUNDREDS)
    gains = {one["arm"]: one["accuracy"] for one in results["per_class"]}
    order = sorted(range(1000), key=lambda number: gains["scratch"][number] - gains["mpp"][number])
    rows = [row for row in Page(report(results)).all("tr") if row["attributes"].get("data-metric") == "class"]
    assert [int(row["attributes"]["data-class"]) for row in rows] == order[:15] + order[-15:]


def slow_confusion(scored, arm, fraction, classes) -> np.ndarray:
    """The table of all pairs of an arm, summed over its runs."""
    table = np.zeros((len(classes), len(classes)), np.int64)
    for name, share, scores in scored:
        if (name, share) == (arm, fraction):
            found, numbers = scores["confusion"], [list(classes).index(one) for one in scores["classes"]]
            for true, predicted, images in zip(found["true"], found["predicted"], found["images"], strict=True):
                table[numbers[true], numbers[predicted]] += images
    return table


def drawn_scores(classes, runs=3) -> list:
    """Scores of runs that each number their classes in another order."""
    random, scored = np.random.default_rng(5), []
    for arm in ("scratch", "mpp"):
        for fraction in (0.1, 1.0):
            for _ in range(runs):
                own = [classes[i] for i in random.permutation(len(classes))]
                pairs = np.unique(random.integers(0, len(classes), (200, 2)), axis=0)
                images = random.integers(1, 50, len(pairs)).tolist()
                found = {"true": pairs[:, 0].tolist(), "predicted": pairs[:, 1].tolist(), "images": images}
                scored.append((arm, fraction, {"classes": own, "confusion": found}))
    return scored


@pytest.mark.parametrize("count", [3, 12, 13, 1000])
def test_what_classes_are_taken_for_is_summed_by_name_and_shown_in_bounds(count):
    classes = HUNDREDS[:count]
    scored = drawn_scores(classes)
    confusion = json.loads(json.dumps(confusions(scored, classes)))
    page = Page(report(comparison(arms=("scratch", "mpp"), classes=classes, confusion=confusion)))
    for arm in ("scratch", "mpp"):
        table = slow_confusion(scored, arm, 1.0, classes)
        cells = {
            (int(cell["attributes"]["data-true"]), int(cell["attributes"]["data-predicted"])): cell
            for cell in page.all("td")
            if cell["attributes"].get("data-metric") == "confusion" and cell["attributes"]["data-arm"] == arm
        }
        for (true, predicted), cell in cells.items():
            assert int(cell["attributes"]["data-value"]) == table[true, predicted] == int(cell["text"].replace(",", ""))
        mistakes = table * (1 - np.eye(count, dtype=np.int64))
        shown = sum(mistakes[pair] for pair in cells)
        words = f"{mistakes.sum():,} mistakes on {table.sum():,} images of 3 seeds"
        [caption] = [one["text"] for one in page.all("caption") if words in one["text"]]
        if count <= 12:
            assert len(cells) == (table > 0).sum()
        else:
            assert len(cells) == 30
            assert sorted(mistakes[pair] for pair in cells) == sorted(mistakes[mistakes > 0])[-30:]
            left = f"left out: {(mistakes > 0).sum() - 30:,} more pairs with {mistakes.sum() - shown:,} images"
            assert left in caption


def test_a_long_recipe_is_cut_on_the_page():
    results = comparison() | {"recipes": {"finetune": "a" * 20_000 + "b" * 1_234_567}}
    html = report(results)
    assert "a" * 20_000 + "\n... and 1,234,567 more characters" in html
    assert "b" * 50 not in html


def test_names_of_classes_stand_where_they_belong_whatever_they_are():
    names = ("<b>", "caf\u00e9", "cafe\u0301", "a\u202eb", "\ud800", "${x}", " ", "x\n", "\U0001f408", "w" * 256)
    results = comparison(arms=("scratch", "mpp"), classes=names)
    page = Page(report(results).encode().decode())
    shown = [row["text"] for row in page.all("tr") if row["attributes"].get("data-metric") == "class"]
    escaped = ("'caf\\xe9'", "'cafe\\u0301'", "'a\\u202eb'", "'\\ud800'")
    expected = ("<b>", *escaped, "${x}", "' '", "'x\\n'", *names[8:])
    for name in expected:
        assert [line for line in shown if line.startswith(name)], name
        assert [head for head in page.all("th") if head["text"] == name], name


@pytest.mark.parametrize("odd", ODD)
def test_all_sections_appear_whatever_is_missing(odd):
    results = comparison(**ODD[odd])
    page = Page(report(results))
    assert tuple(section["attributes"]["id"] for section in page.all("section")) == SECTIONS
    headings = [heading for heading in page.all("h2") if heading["parent"]["tag"] == "section"]
    for heading in headings:
        assert len(heading["parent"]["text"]) > len(heading["text"]) + 15, "each says something"
    ids = [element["attributes"]["id"] for element in page.elements if "id" in element["attributes"]]
    assert len(ids) == len(set(ids))
    drawn = " ".join(str(value) for element in page.elements for value in element["attributes"].values())
    assert "nan" not in drawn.split()
    text = page.all("body")[0]["text"]
    for one in [*results["unfinished"], *(one["error"] for one in results["failures"])]:
        assert one in text


@pytest.mark.parametrize("change", [{}, ODD["20 arms"], ODD["one of everything"]])
def test_nothing_outside_the_page_is_loaded(change):
    results = comparison(**change) | {"recipes": {"paper": "# https://arxiv.org/abs/2010.11929\nurl(http://a) @import"}}
    html = report(results)
    page = Page(html)
    [style] = page.all("style")
    assert "url(" not in style["text"]
    assert "@import" not in style["text"]
    assert not {element["tag"] for element in page.elements} & {
        "script",
        "link",
        "iframe",
        "object",
        "base",
        "use",
        "image",
    }
    for element in page.elements:
        for name, value in element["attributes"].items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "xlink:href", "action", "data"):
                assert value.startswith(("#", "data:image/png;base64,"))
            if name == "style":
                assert re.fullmatch(r"left:-?[\d.]+%", value)
    [policy] = [one for one in page.all("meta") if one["attributes"].get("http-equiv") == "Content-Security-Policy"]
    assert policy["attributes"]["content"].startswith("default-src 'none'")
    anchors = {one["attributes"]["href"] for one in page.all("a")}
    assert anchors == {f"#{section}" for section in SECTIONS}


def test_every_picture_is_there():
    pictures = [comparison(seeds=1)["pictures"][0] | {"seed": seed} for seed in range(3)]
    images = Page(report(comparison(seeds=1, pictures=pictures))).all("img")
    assert [image["attributes"]["src"] for image in images] == [
        f"data:image/png;base64,{one['png']}" for one in pictures
    ]
    assert all("corrupted" in image["attributes"]["alt"] for image in images)
    assert {(image["attributes"]["width"], image["attributes"]["height"]) for image in images} == {("768", "384")}, (
        "3 x"
    )


def hostile(value):
    """Results with a hostile tail at every text that is not a key of something else."""
    if isinstance(value, dict):
        kept = ("arm", "name", "baseline", "png", "created", "protocol", "metric", "stage", "to")
        return {key: one if key in kept else hostile(one) for key, one in value.items()}
    if isinstance(value, list):
        return [hostile(one) for one in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_hostile_texts_are_escaped():
    plain = comparison(**ODD["unfinished"], seeds=2, fractions=(0.1, 1.0))
    results = hostile(copy.deepcopy(plain))
    results["recipes"] = {f"{name}{HOSTILE}": text for name, text in results["recipes"].items()}
    results["versions"][HOSTILE] = HOSTILE
    results["name"] += HOSTILE
    html = report(results)
    page, ordinary = Page(html), Page(report(plain))
    assert "<script" not in html
    new = {name for element in page.elements for name in element["attributes"]}
    assert new == {name for element in ordinary.elements for name in element["attributes"]}, "no attribute slipped in"
    assert {one["tag"] for one in page.elements} == {one["tag"] for one in ordinary.elements}
    body = page.all("body")[0]["text"]
    for text in (
        "airplane",
        "Masked patch prediction",
        "loss is nan",
        "seed: 0",
        "mpp compare cifar10/compare",
        "truth",
    ):
        assert text + HOSTILE in body


def test_hostile_names_of_arms_protocols_and_metrics_are_escaped():
    results = comparison(seeds=2)
    for protocol in results["protocols"]:
        protocol["name"] += HOSTILE * (protocol["name"] in ("linear", "few-shot"))
    for row in [*results["rows"], *results["summary"], *results["curves"]]:
        if row.get("protocol") in ("linear", "few-shot"):
            row["protocol"] += HOSTILE
            row["metric"] += HOSTILE
        if row["metric"] == "val/nearest":
            row["metric"] = HOSTILE
    html = report(results)
    Page(html)
    assert "<script" not in html
    assert escape(HOSTILE) in html
    assert HOSTILE in unescape(html)


def test_curves_and_pictures_are_named_as_their_objective_says():
    results = comparison(arms=("scratch", "mpp"))
    results["captions"]["mpp"]["pretrain"] = {
        "metrics": {
            "accuracy": {"title": "Views that agree", "share": False, "guess": False},
            "nearest": {"title": "Agreement by chance", "share": False, "guess": True},
        },
        "pictures": {"input": "the first view"},
    }
    page = Page(report(results))
    [section] = [one for one in page.all("section") if one["attributes"]["id"] == "curves"]
    for words in ("Views that agree", "Agreement by chance", "commonest"):
        assert words in section["text"], "without a caption a figure has its own name"
    assert "Views that agree, %" not in section["text"]
    [caption] = [one for one in page.all("figcaption") if "Rows from the top" in one["text"]]
    assert "input: the first view; corrupted; predicted; truth." in caption["text"]


def test_the_score_of_neighbours_has_a_panel_of_its_own_in_per_cent():
    results = comparison(arms=("scratch", "mpp"))
    plain = Page(report(results))
    results["captions"]["mpp"]["pretrain"]["metrics"]["knn"] = asdict(NEIGHBOURS["knn"])
    curve = {"arm": "mpp", "seed": 0, "stage": "pretrain", "fraction": None, "metric": "val/knn"}
    results["curves"].append({**curve, "points": [[1000, 0.25], [2000, 0.375]]})
    page = Page(report(results))
    names = [[one["text"] for one in found.all("svg") if "images seen" in one["text"]] for found in (plain, page)]
    added = [text for text in names[1] if text not in names[0]]
    assert len(names[1]) == len(names[0]) + 1
    [panel] = added
    assert "k-NN accuracy of the encoder, %" in panel
    assert "Accuracy" not in panel.replace("k-NN accuracy", "")


def test_guesses_have_lines_of_their_own():
    html = report(comparison(arms=("scratch", "mpp")))
    drawn = r'<svg class="swatch (\w+)"[^>]*><path class="line" d="M1 6H29" stroke-dasharray="([^"]*)"/></svg>Guess'
    assert re.findall(drawn, html) == [("neutral", "7 4"), ("neutral", "2 3")], "and no marker"


@pytest.mark.parametrize("format", [1, 3, None])
def test_results_of_another_format_are_refused_in_one_line(format, tmp_path):
    with pytest.raises(UserError, match=f"these results are of format {format}, expected 2") as caught:
        write_report(comparison(seeds=1, format=format), tmp_path / "report.html")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_it_is_written_whole_or_not_at_all(tmp_path):
    write_report(comparison(seeds=1), tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report(comparison(seeds=1))


def chromium() -> str | None:
    """Its path, where this machine has one."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for path in map(shutil.which, names) if path), None)


PROBE = """<script>
addEventListener("load", () => {
  const page = document.documentElement, images = [...document.images];
  const outside = [...document.querySelectorAll("svg text")].filter(text => {
    const box = text.getBoundingClientRect();
    return box.width && (box.left < -0.5 || box.right > innerWidth + 0.5);
  });
  parent.postMessage(["FOUND", name, innerWidth, page.scrollWidth, images.length,
    images.filter(one => one.complete && one.naturalWidth > 0).length, outside.length,
    matchMedia("(prefers-color-scheme: dark)").matches,
    getComputedStyle(document.body).backgroundColor].join(" "), "*");
});
</script>"""


def opened(folder, pages: dict[str, tuple[str, int]], dark: bool = False) -> tuple[dict[str, list[str]], str]:
    """What headless Chromium finds in pages (HTML, width in pixels), and its log."""
    frames = ""
    for name, (html, width) in pages.items():
        html, replaced = re.subn("<meta http-equiv=[^>]*>", PROBE, html)  # the page's policy would stop the script
        assert replaced == 1
        (folder / f"{name}.html").write_text(html, encoding="utf-8")
        frames += f'<iframe name="{name}" src="{name}.html" width="{width}" height="800"></iframe>'
    listen = '<script>addEventListener("message", e => document.body.append(e.data + "\\n"))</script>'
    (folder / "frames.html").write_text(f"<!DOCTYPE html><body>{listen}{frames}</body>", encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1700,900", "--dump-dom"]
    done = subprocess.run(
        [chromium(), *options, (folder / "frames.html").as_uri()],
        capture_output=True, text=True, timeout=60, check=True, env=os.environ | {"HOME": str(folder)},
    )  # fmt: skip
    return {line.split()[0]: line.split(maxsplit=7)[1:] for line in re.findall("FOUND (.*)", done.stdout)}, done.stderr


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine (apt-get install chromium)")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_opens_in_a_real_browser(tmp_path, dark):
    kinds = {"usual": {}, "many": ODD["20 arms"], "least": ODD["one of everything"], "hostile": {}}
    pages = {}
    for kind, change in kinds.items():
        results = comparison(**change)
        html = report(hostile(results) if kind == "hostile" else results)
        pages |= {f"{kind}-{width}": (html, width) for width in (360, 900, 1600)}
    found, log = opened(tmp_path, pages, dark)
    assert found.keys() == pages.keys()
    assert "CONSOLE" not in log
    for name, (width, needed, images, good, outside, scheme, paper) in found.items():
        assert int(width) == pages[name][1]
        assert int(needed) <= int(width), f"{name} scrolls sideways"
        assert images == good == "1"
        assert outside == "0", f"{name}: a chart's text is cut"
        assert scheme == str(dark).lower()
        assert paper == ("rgb(22, 24, 26)" if dark else "rgb(252, 252, 251)")


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine (apt-get install chromium)")
def test_the_browser_check_sees_what_is_broken(tmp_path):
    html = report(comparison(seeds=1))
    broken = {
        "picture": html.replace("base64,iVBOR", "base64,AAAAA"),
        "wide": html.replace("<main>", '<main><div style="width: 2000px">wide</div>'),
        "script": html.replace("</main>", "<script>throw new Error('on purpose')</script></main>"),
    }
    found, log = opened(tmp_path, {name: (page, 900) for name, page in broken.items()})
    assert found["picture"][2:4] == ["1", "0"]
    assert int(found["wide"][1]) > 900
    assert "on purpose" in log
    assert "CONSOLE" in log
