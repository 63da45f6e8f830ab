"""`python -m benchmarks.objectives`: how rates are chosen, and that RESULTS.md shows what was measured."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import objectives, objectives_shown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "objectives-cifar10.json"


class Scored(objectives.Work):
    """Runs that need no training: a rate's score falls with its distance from `peak`, on a logarithmic axis."""

    def pretrained(self, row, name, rate, seed=0, images=objectives.IMAGES):
        return Path(f"{rate}")

    def held_out(self, run):
        return 0.5 - abs(math.log2(float(run.name) / float(self.data.name)))


@pytest.mark.parametrize("peak", [6e-5, 1e-3, 7e-3])
def test_the_rate_that_is_taken_is_the_best_and_not_at_the_edge(peak, tmp_path):
    rate, scores = objectives.best_rate(Scored(Path(f"{peak}"), tmp_path), "mae", objectives.ROWS["mae"])
    tried = sorted(map(float, scores))
    assert tried[0] < rate < tried[-1]
    assert abs(math.log2(rate / peak)) <= 0.5 + 1e-9  # the nearest of those, which are a factor of two apart
    assert scores[f"{rate:g}"] == max(scores.values())


def test_what_a_stage_found_is_not_computed_again(tmp_path):
    work = objectives.Work(tmp_path, tmp_path)
    assert work.kept("a/b", lambda: {"x": 0.25}) == work.kept("a/b", pytest.fail) == {"x": 0.25}


def test_every_table_of_results_md_is_what_the_command_prints():
    found, page = json.loads(RESULTS.read_text()), (ROOT / "RESULTS.md").read_text()
    for part, show in {
        "lines": objectives_shown.every,
        "seeds": objectives_shown.seeds,
        "times": objectives_shown.times,
    }.items():
        assert not found[part] or "\n".join(show(found)) in page, part


def test_intervals_are_students():
    # Three differences of 1, 2 and 3: mean 2, deviation 1, and t of two degrees is 4.3027 at 97.5 %.
    assert (
        objectives_shown.difference([2, 4, 6], [1, 2, 3])
        == f"+2.0 ({2 - 4.3027 / 3**0.5:+.1f} to {2 + 4.3027 / 3**0.5:+.1f})"
    )
