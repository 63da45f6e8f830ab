import numpy as np
import pytest
from scipy import stats

from mpp.eval.compare.arms import ArmConfig
from mpp.eval.compare.summary import Figure, conclusions, interval, mean_sd, summarise, table


def rows(arm: str, values: list[float], fraction: float = 0.1) -> list[Figure]:
    return [Figure(arm, seed, "finetune", fraction, "top1", value) for seed, value in enumerate(values)]


def test_means_deviations_and_intervals_are_numpys_and_scipys():
    values = [0.4, 0.55, 0.43, 0.6]
    assert mean_sd(values) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values) == (pytest.approx(low), pytest.approx(high))


def test_a_single_seed_has_neither_deviation_nor_interval():
    assert mean_sd([0.3]) == (0.3, None)
    assert interval([0.3]) == (None, None)


def test_differences_are_paired_by_seed_and_count_pairs_alone():
    scratch = [row for row in rows("scratch", [0.1, 0.2, 0.3]) if row.seed != 1]
    [_, entry] = summarise(scratch + rows("mpp", [0.2, 0.9, 0.5]), "scratch")
    assert entry["n"] == 3
    assert entry["difference"]["n"] == 2
    assert entry["difference"]["mean"] == pytest.approx((0.1 + 0.2) / 2), "seed 1 has no partner"


ARMS = {"scratch": ArmConfig("f"), "mpp": ArmConfig("f", pretrain="p"), "long": ArmConfig("f", total_of="mpp")}
TITLES = {"scratch": "From scratch", "mpp": "Masked patches", "long": "Longer"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.50, 0.51, 0.50], "better, +10.0 points (95 % interval +7.5 to +12.5, n = 3)"),
        ([0.30, 0.31, 0.30], "worse, -10.0 points (95 % interval -12.5 to -7.5, n = 3)"),
        ([0.40, 0.50, 0.33], "no difference shown, +0.7 points"),
        ([0.50], "+10.0 points (one seed)"),
    ],
)
def test_a_sentence_says_what_the_interval_shows(values, said):
    base = rows("scratch", [0.40, 0.40, 0.41][: len(values)])
    [sentence, *rest] = conclusions(base + rows("mpp", values), TITLES, ARMS, "scratch")
    assert sentence.startswith("Masked patches against “From scratch”: with 10 % of the labels ")
    assert said in sentence
    assert any("single seed" in one for one in rest) == (len(values) == 1)
    assert "does not show that there is none" in rest[-1]


def test_the_same_number_of_images_in_all_is_its_own_sentence():
    found = conclusions(rows("mpp", [0.5, 0.6]) + rows("long", [0.55, 0.65]), TITLES, ARMS, "scratch")
    expected = "Masked patches against “Longer”, which sees as many images in all: with 10 % of the labels worse, -5.0"
    assert any(sentence.startswith(expected) for sentence in found)


def test_the_table_has_protocols_and_fractions_in_order():
    found = summarise([*rows("mpp", [0.5, 0.6], 1.0), *rows("mpp", [0.2, 0.3], 0.1)], "scratch")
    arms = [{"name": "mpp", "title": "Masked patches"}]
    protocols = [{"name": "linear", "headline": "top1", "draws_labels": False}]
    text = table({"summary": found, "arms": arms, "conclusions": [], "failures": [], "protocols": protocols})
    head, line, *rest = text.splitlines()
    assert "linear: no figure top1, by which it is compared; it gave none" in rest
    assert head.index("10 %") < head.index("all labels")
    assert line.index("25.0 +- 7.1 (n = 2)") < line.index("55.0 +- 7.1 (n = 2)")
