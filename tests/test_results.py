"""The comparisons that RESULTS.md reports: docs/results/*.json, as `mpp compare` wrote them."""

import json
from pathlib import Path

import pytest
from test_eval_report import Page, check_figures, chromium, opened

from mpp.eval.compare.summary import Figure, summarise
from mpp.eval.report.report import report

RESULTS = sorted(Path(__file__).parent.parent.glob("docs/results/*.json"))


@pytest.fixture(params=RESULTS, ids=lambda path: path.stem)
def results(request) -> dict:
    return json.loads(request.param.read_text())


def test_there_are_some():
    assert RESULTS


def test_every_figure_on_the_page_equals_the_results(results):
    check_figures(results)


def test_means_and_intervals_follow_from_the_single_runs(results):
    rows = [Figure(**row) for row in results["rows"]]
    assert json.loads(json.dumps(summarise(rows, results["baseline"]))) == results["summary"]


def test_every_picture_is_on_the_page(results):
    images = Page(report(results)).all("img")
    sources = {image["attributes"]["src"] for image in images}
    assert sources == {f"data:image/png;base64,{picture['png']}" for picture in results["pictures"]}


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine (apt-get install chromium)")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_opens_in_a_real_browser(results, tmp_path, dark):
    page = report(results)
    found, log = opened(tmp_path, {f"page-{width}": (page, width) for width in (360, 900, 1600)}, dark)
    assert "CONSOLE" not in log
    for width, needed, images, good, outside, *_ in found.values():
        assert int(needed) <= int(width), "scrolls sideways"
        assert int(images) == int(good) == len(results["pictures"])
        assert outside == "0", "a chart's text is cut"
