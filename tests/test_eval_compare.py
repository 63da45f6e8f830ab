import json
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import accuracy_score
from test_eval_report import chromium, opened
from tiny_runs import finished, run, small_splits, start

from mpp.data.config import DataConfig
from mpp.data.read import read_shards
from mpp.eval.compare.arms import load_comparison
from mpp.eval.compare.chains import Chains
from mpp.eval.compare.compare import other_than_wanted
from mpp.files import claimed, sealed
from mpp.run.images import make_missing, open_images
from mpp.shards.index import read_index, splits, write_index
from mpp.weights import load_classifier, load_encoder, save_encoder

BASE = """\
data: {path: PATH, val: test, augment: {crop: shift, pad: 1}}
train: {steps: 4, warmup: 1, batch: 8, micro_batch: 4, lr: 1e-3, precision: float32, threads: 1, save_every: 2}
eval: {every: 2}
log: {every: 1, pictures: 2, tensorboard: false}
"""
VIT = "model: {image: 16, patch: 4, width: 32, depth: 1, heads: 2, pool: avg}\n"
RECIPES = {
    "pre": VIT + "objective: {name: mpp}\n",
    "sup": VIT + "objective: {name: labels}\n",
    "tune": VIT + "objective: {name: labels}\n",
    "cnn": "model: {name: resnet, image: 16, depth: 18, width: 4, stem: small}\nobjective: {name: labels}\n",
}
COMPARE = """\
compare:
  arms:
    scratch: {finetune: tune}
    mpp: {pretrain: pre, finetune: tune}
    labels: {pretrain: sup, finetune: tune, upper_bound: true}
    few: {pretrain: sup, finetune: tune, fractions: [0.5]}
    cnn: {finetune: cnn, fractions: [0.5]}
    scratch_total: {finetune: tune, total_of: mpp, fractions: [0.5]}
  seeds: [0, 1]
  fractions: [0.5, 1.0]
  images: [16, 24]
  lrs: [1e-3, 1e-2]
  choose_at: 0.5
  hold_out: 0.25
"""


def recipes(folder: Path, shards: Path) -> Path:
    """The files of a comparison; gives the one that names the others."""
    (folder / "base.yaml").write_text(BASE.replace("PATH", str(shards)))
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text("base: base.yaml\n" + text)
    path = folder / "comparison.yaml"
    path.write_text("base: pre.yaml\n" + COMPARE)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return small_splits(tmp_path_factory.mktemp("splits"))


@pytest.fixture(scope="module")
def done(tmp_path_factory, shards):
    """A comparison that is done: its folder, its recipe and its results."""
    folder = tmp_path_factory.mktemp("done")
    recipe = recipes(folder, shards)
    result = run("compare", recipe, f"out={folder / 'out'}")
    assert result.code == 0, result.err
    assert "report.html" in result.out
    return folder / "out", recipe, json.loads((folder / "out/results.json").read_text())


def rows(results: dict, **wanted) -> list[dict]:
    return [row for row in results["rows"] if all(row[key] == value for key, value in wanted.items())]


def test_every_arm_seed_fraction_and_protocol_has_its_figures(done):
    _, _, results = done
    assert not results["failures"]
    assert not results["unfinished"]
    found = {(row["arm"], row["seed"], row["fraction"]) for row in rows(results, protocol="finetune", metric="top1")}
    both = {(arm, seed, share) for arm in ("scratch", "mpp", "labels") for seed in (0, 1) for share in (0.5, 1.0)}
    assert found == both | {(arm, seed, 0.5) for arm in ("few", "cnn", "scratch_total") for seed in (0, 1)}
    for protocol in ("linear", "knn"):
        found = {(row["arm"], row["fraction"]) for row in rows(results, protocol=protocol)}
        assert found == {(arm, share) for arm in ("scratch", "mpp", "labels") for share in (0.5, 1.0)} | {("few", 0.5)}
    assert not rows(results, arm="few", protocol="few-shot"), "whose draw would hold labels it has been trained with"
    assert {row["metric"] for row in rows(results, protocol="few-shot", arm="mpp")} >= {"1-shot", "5-shot"}


def test_accuracies_are_those_of_the_last_weights_on_all_test_images(done, shards):
    out, _, results = done
    batch = read_shards(shards, 20, split="test", train=False).at(0)
    for arm in ("mpp", "cnn"):
        classifier = load_classifier(out / f"finetune/{arm}/0.5/seed-1")
        with torch.no_grad():
            guess = classifier(batch.images).argmax(1)
        [row] = rows(results, arm=arm, seed=1, protocol="finetune", fraction=0.5, metric="top1")
        assert row["value"] == accuracy_score(batch.labels, guess)


def test_means_deviations_and_intervals_are_those_of_scipy(done):
    _, _, results = done
    assert len(results["summary"]) > 20
    for entry in results["summary"]:
        place = {key: entry[key] for key in ("protocol", "fraction", "metric")}
        values = {row["seed"]: row["value"] for row in rows(results, arm=entry["arm"], **place)}
        numbers = np.array([values[seed] for seed in sorted(values)])
        assert entry["n"] == len(numbers) == 2
        assert (entry["mean"], entry["sd"]) == (pytest.approx(numbers.mean()), pytest.approx(numbers.std(ddof=1)))
        if entry["arm"] == "scratch":
            assert entry["difference"] is None
        elif entry["difference"]:
            base = [row["value"] for row in sorted(rows(results, arm="scratch", **place), key=lambda row: row["seed"])]
            difference = entry["difference"]
            assert difference["mean"] == pytest.approx((numbers - base).mean())
            if (numbers - base).std() > 1e-9:
                low, high = stats.ttest_rel(numbers, base).confidence_interval(0.95)
                assert (difference["low"], difference["high"]) == (pytest.approx(low), pytest.approx(high))


def test_all_arms_fine_tune_on_the_same_budget_but_the_one_that_has_pretrainings_too(done):
    _, _, results = done
    images = {}
    for cost in results["costs"]:
        images.setdefault((cost["arm"], cost["stage"], cost["fraction"]), set()).add(cost["images"])
    assert {images[arm, "finetune", 0.5].pop() for arm in ("scratch", "mpp", "labels", "few", "cnn")} == {16}
    assert {images[arm, "finetune", 1.0].pop() for arm in ("scratch", "mpp", "labels")} == {24}
    assert images["mpp", "pretrain", None] == {32}
    assert images["scratch_total", "finetune", 0.5] == {16 + 32}


def test_seeds_differ_in_weights_and_labels_and_arms_of_a_seed_share_their_labels(done):
    out, _, _ = done
    recipe = "finetune/{}/0.5/seed-{}/recipe.yaml"
    texts = {(arm, seed): (out / recipe.format(arm, seed)).read_text() for arm in ("scratch", "mpp") for seed in (0, 1)}
    for (_, seed), text in texts.items():
        assert f"seed: {seed}" in text
        assert "share: 0.5" in text
    first, second = (load_classifier(out / f"finetune/scratch/0.5/seed-{seed}") for seed in (0, 1))
    assert not torch.equal(first.encoder.stem.project.weight, second.encoder.stem.project.weight)


def test_labels_of_the_same_images_pretrain_within_the_fraction_unless_all_are_allowed(done):
    out, _, results = done
    assert "share: 0.5" in (out / "pretrain/sup-0.5/seed-0/recipe.yaml").read_text()
    assert "share: 1.0" in (out / "pretrain/sup/seed-0/recipe.yaml").read_text()
    weights = (out / "finetune/few/0.5/seed-0/recipe.yaml").read_text()
    assert f"weights: {out / 'pretrain/sup-0.5/seed-0'}" in weights
    bounds = {arm["name"]: arm["upper_bound"] for arm in results["arms"]}
    assert bounds == {name: name == "labels" for name in bounds}


def test_learning_rates_are_chosen_on_held_out_training_images_never_on_test(done):
    out, _, results = done
    arms = {choice["arm"] for choice in results["chosen"]}
    assert arms == {"scratch", "mpp", "labels", "few", "cnn"}, "scratch_total takes that of scratch"
    for choice in results["chosen"]:
        tried = {trial["lr"]: trial["accuracy"] for trial in choice["tried"]}
        assert tried.keys() == {1e-3, 1e-2}
        assert tried[choice["lr"]] == max(tried.values())
        for lr in tried:
            folder = out / f"choose/{choice['arm']}/0.5/lr-{lr:g}"
            last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
            assert last["val/accuracy"] == tried[lr]
            assert (4 * last["val/accuracy"]) % 1 == 0
        assert choice["images_held_out"] == 4, "of 10 images of each class a quarter, rounded to 2"
    chosen = {choice["arm"]: choice["lr"] for choice in results["chosen"]}
    for arm, like in {"mpp": "mpp", "cnn": "cnn", "scratch_total": "scratch"}.items():
        assert f"lr: {chosen[like]}\n" in (out / f"finetune/{arm}/0.5/seed-1/recipe.yaml").read_text()


def test_the_report_has_pictures_curves_recipes_and_says_what_follows(done):
    out, _, results = done
    assert {picture["arm"] for picture in results["pictures"]} == {"mpp"}
    curves = {(curve["arm"], curve["stage"], curve["metric"]) for curve in results["curves"]}
    assert {("mpp", "pretrain", "val/nearest"), ("mpp", "finetune", "val/accuracy")} <= curves
    assert {"mpp pretrain", "mpp finetune", "scratch finetune"} <= results["recipes"].keys()
    assert any("upper bound" in sentence for sentence in results["conclusions"])
    assert any("sees as many images in all" in sentence for sentence in results["conclusions"])
    page = (out / "report.html").read_text()
    assert all(arm["title"] in page for arm in results["arms"])


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine (apt-get install chromium)")
def test_the_report_opens_in_a_real_browser(done, tmp_path):
    page = (done[0] / "report.html").read_text()
    found, log = opened(tmp_path, {"narrow": (page, 360), "wide": (page, 1600)})
    assert "CONSOLE" not in log
    for width, scroll, pictures, loaded, outside, *_ in found.values():
        assert int(scroll) <= int(width)
        assert int(pictures) == int(loaded) > 0
        assert int(outside) == 0


def times(out: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def test_what_is_done_is_not_done_again(done):
    out, recipe, results = done
    before = times(out)
    assert run("compare", recipe, f"out={out}").code == 0
    assert times(out) == before
    again = json.loads((out / "results.json").read_text())
    assert again["rows"] == results["rows"]


def test_more_seeds_add_to_what_is_done_wherever_the_folder_was_moved(done, tmp_path):
    out, recipe, results = done
    copy = shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copy2)
    before = times(copy)
    less = ["compare.protocols=[finetune]", *(f"compare.arms.{name}=null" for name in ("labels", "few", "cnn"))]
    assert run("compare", recipe, f"out={copy}", "compare.seeds=[0, 1, 2]", *less).code == 0
    assert times(copy).items() > before.items(), "nothing done again, and something added"
    more = json.loads((copy / "results.json").read_text())
    old = [row for row in rows(results, protocol="finetune") if row["arm"] in ("scratch", "mpp", "scratch_total")]
    assert [row for row in more["rows"] if row["seed"] < 2] == old
    assert {row["seed"] for row in more["rows"]} == {0, 1, 2}


@pytest.mark.parametrize("change", ["train.weight_decay=0.3", "compare.images=[16, 32]", "data.augment.pad=0"])
def test_runs_of_other_recipes_are_refused_and_left_alone(done, change):
    out, recipe, _ = done
    before = times(out)
    result = run("compare", recipe, f"out={out}", change)
    assert result.code == 2
    assert "holds a run of another recipe" in result.line
    assert times(out) == before


def test_to_look_at_a_folder_takes_up_no_gpu(done, monkeypatch):
    """Where pictures are made on the device, their batches hold it; the one that starts others would all along."""
    out, recipe, _ = done
    asked = []

    def opened(recipe, *more):
        asked.append(recipe.data.prepare)
        return open_images(recipe, *more)

    monkeypatch.setattr("mpp.eval.compare.compare.open_images", opened)
    job = Chains(load_comparison(recipe, [f"out={out}", "data.prepare=device"])).jobs()[0]
    assert "holds a run of another recipe (data.prepare" in (other_than_wanted(job) or "")
    assert asked == ["cpu"]


def test_data_by_another_path_is_the_same_comparison(done, shards, tmp_path, monkeypatch):
    out, recipe, results = done
    copy = shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copy2)
    shutil.copytree(shards, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    before = times(copy)
    for path in ("elsewhere", tmp_path / "elsewhere"):
        result = run("compare", recipe, f"out={copy}", f"data.path={path}")
        assert result.code == 0, result.err
    assert times(copy) == before
    assert json.loads((copy / "results.json").read_text())["rows"] == results["rows"]


def test_figures_of_other_test_images_do_not_pass_for_those_of_these(done, shards, tmp_path):
    out, recipe, _ = done
    others = shutil.copytree(shards, tmp_path / "others")
    index = read_index(others, "test")
    write_index(replace(index, label=index.label[::-1].copy()))
    before = times(out)
    result = run("compare", recipe, f"out={out}", f"data.path={others}")
    assert result.code == 2
    assert "is of other images (" in result.line
    for path, stages in ((others, {"finetune", "probe"}), (shards, set())):
        jobs = Chains(load_comparison(recipe, [f"out={out}", f"data.path={path}"])).jobs()
        assert {job.stage for job in jobs if "is of other images" in (other_than_wanted(job) or "")} == stages
    assert times(out) == before


def test_arms_may_name_the_same_images_by_different_paths(done, shards, tmp_path):
    folder = shutil.copytree(done[1].parent, tmp_path / "recipes", ignore=lambda path, names: {"out"})
    shutil.copytree(shards, tmp_path / "same")
    text = (folder / "sup.yaml").read_text()
    (folder / "sup.yaml").write_text(text + f"data: {{path: {tmp_path / 'same'}}}\n")
    comparison = load_comparison(folder / "comparison.yaml")
    assert comparison.with_labels("labels"), "its pretraining has labels of the images that are fine-tuned on"
    assert comparison.with_labels("few")


def test_weights_trained_anew_under_the_same_name_do_not_pass_for_the_old_ones(done, tmp_path):
    out, recipe, _ = done
    copy = shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copy2)
    path = next(copy.glob("pretrain/pre*/seed-1")) / "encoder.safetensors"
    encoder = load_encoder(path)
    with torch.no_grad():
        encoder.norm.bias.add_(1e-3)
    save_encoder(encoder, path)
    before = times(copy)
    result = run("compare", recipe, f"out={copy}")
    assert result.code == 2
    assert f"holds a run that began from other weights than {path.parent} now holds" in result.line
    assert times(copy) == before
    for checkpoints in copy.glob("finetune/**/checkpoints"):
        shutil.rmtree(checkpoints)
    result = run("compare", recipe, f"out={copy}")
    assert result.code == 2, "scores without checkpoints are of the same weights alone as well"
    assert f"holds a run that began from other weights than {path.parent} now holds" in result.line


def test_a_run_that_is_done_again_in_the_same_comparison_is_looked_at_too(done, tmp_path, monkeypatch):
    """A pretraining that was deleted is done again; what rests on it must be of the weights that it leaves now."""
    out, recipe, _ = done
    copy = shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copy2)
    [folder] = copy.glob("pretrain/pre/seed-1")
    shutil.rmtree(folder)
    assert run("compare", recipe, f"out={copy}").code == 0, "the same weights again, bit for bit"
    shutil.rmtree(folder)
    monkeypatch.setattr("mpp.masks.count_of", lambda share, patches: 1)  # as another version might
    result = run("compare", recipe, f"out={copy}")
    assert result.code == 1
    failures = {one["run"]: one["error"] for one in json.loads((copy / "results.json").read_text())["failures"]}
    assert failures
    assert all("seed 1" in name and "other weights than" in error for name, error in failures.items())


def test_what_is_left_to_the_machine_is_chosen_once_for_all_runs(shards, tmp_path, monkeypatch):
    recipe, out = recipes(tmp_path, shards), tmp_path / "out"
    arms = [f"compare.arms.{name}=null" for name in ("labels", "few", "cnn", "scratch_total")]
    few = ["compare.protocols=[finetune]", "compare.fractions=[0.5]", "compare.images=[16]", "compare.lrs=[]"]
    auto = ["compare.choose_at=null", "train.precision=auto", "train.threads=null", "train.micro_batch=auto"]
    command = ["compare", recipe, f"out={out}", *few, *arms, *auto]
    assert run(*command, "compare.seeds=[0]").code == 0
    choices = json.loads((out / "machine.json").read_text())["choices"]
    assert {"precision", "compile", "threads"} < choices.keys()
    other = choices["precision"] == "float32"
    monkeypatch.setattr("mpp.execution.multiplies_bfloat16", lambda device: other)  # as on another machine
    monkeypatch.setattr("mpp.execution.CPU_TOKENS", 1)
    assert run(*command, "compare.seeds=[0, 1]").code == 0
    found = [json.loads(path.read_text())["execution"] for path in out.rglob("settled.json")]
    assert len(found) == 6
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("choices", [None, ["ab"], {"compile": "no"}, {"threads": 0}, {"precision": "foo"}, {"x": 1}])
def test_a_machine_json_that_is_cut_or_holds_nonsense_is_named(choices, done, tmp_path):
    out, recipe, _ = done
    copy = shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copy2)
    data = b"{" if choices is None else sealed({"format": 2, "choices": choices})
    (copy / "machine.json").write_bytes(data)
    result = run("compare", recipe, f"out={copy}", "compare.seeds=[0, 1, 2]")
    assert result.code == 2
    assert f"{copy / 'machine.json'}: cut, or not as it was written" in result.line


def test_a_failed_arm_is_reported_and_the_rest_finish(shards, tmp_path):
    recipe = recipes(tmp_path, shards)
    (tmp_path / "pre.yaml").write_text("base: base.yaml\n" + RECIPES["pre"] + "train: {lr: 1e30, clip: null}\n")
    few = ["compare.seeds=[0]", "compare.fractions=[0.5]", "compare.images=[16]", "compare.protocols=[finetune]"]
    arms = [f"compare.arms.{name}=null" for name in ("labels", "few", "cnn", "scratch_total")]
    result = run("compare", recipe, f"out={tmp_path / 'out'}", *few, *arms)
    assert result.code == 1
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {row["arm"] for row in results["rows"]} == {"scratch"}
    failures = {failure["run"]: failure["error"] for failure in results["failures"]}
    assert "the loss is" in failures["pre pretraining, seed 0"]
    assert failures["mpp fine-tuning, seed 0, 50 % of the labels"] == "needs what failed: pre pretraining, seed 0"
    assert "Try a lower train.lr" in (tmp_path / "out/report.html").read_text()


def test_two_processes_share_the_work_and_a_stopped_one_goes_on(shards, tmp_path):
    recipe, out = recipes(tmp_path, shards), tmp_path / "out"
    arms = [f"compare.arms.{name}=null" for name in ("labels", "few", "cnn", "scratch_total")]
    few = ["compare.protocols=[finetune]", "compare.fractions=[0.5]", "compare.images=[16]", "compare.lrs=[]"]
    command = ["compare", recipe, f"out={out}", *few, "compare.choose_at=null", *arms]
    stopped = start(*command)
    while not list(out.rglob("checkpoints/step-*")):
        assert stopped.poll() is None, finished(stopped).err
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    assert finished(stopped).code in (143, 130, 0), "while training, between runs, or too late"
    partial = json.loads((out / "results.json").read_text())
    both = [finished(process) for process in [start(*command), start(*command)]]
    assert [one.code for one in both] == [0, 0], [one.err for one in both]
    results = json.loads((out / "results.json").read_text())
    assert len(rows(results, metric="top1")) == 4
    assert len(partial["unfinished"]) + len(rows(partial, metric="top1")) > 0
    alone = tmp_path / "alone"
    assert run("compare", recipe, f"out={alone}", *command[3:]).code == 0
    assert json.loads((alone / "results.json").read_text())["rows"] == results["rows"], "however it was done"


FEW = [
    "compare.protocols=[finetune]",
    "compare.fractions=[0.5]",
    "compare.images=[16]",
    *(f"compare.arms.{name}=null" for name in ("labels", "few", "cnn", "scratch_total")),
]


def test_shards_that_another_process_makes_are_waited_for_and_made_if_it_ends_too_early(tmp_path, caplog):
    caplog.set_level("INFO", "mpp")
    with claimed(tmp_path / "shards", "held"):
        waiting = threading.Thread(target=make_missing, args=[DataConfig(str(tmp_path / "shards"), source="digits")])
        waiting.start()
        while not caplog.messages:
            time.sleep(0.01)
        assert caplog.messages == [f"{tmp_path / 'shards'}: another process is making these shards; waiting for it"]
        assert not splits(tmp_path / "shards")
    waiting.join(60)
    assert splits(tmp_path / "shards") == ["test", "train"]


def test_two_processes_that_start_before_the_shards_exist_make_them_once_and_share_the_work(tmp_path):
    recipe, data = recipes(tmp_path, tmp_path / "shards"), tmp_path / "shards"
    small = ["model.image=8", "model.patch=2", "data.source=digits", f"data.path={data}", "compare.seeds=[0]"]
    command = ["compare", recipe, f"out={tmp_path / 'out'}", *FEW, "compare.lrs=[]", "compare.choose_at=null", *small]
    ended = [finished(process) for process in [start(*command), start(*command)]]
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    assert sum("writing: " in one.out for one in ended) == 1
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (len(rows(results, metric="top1")), results["unfinished"], results["failures"]) == (2, [], [])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def brackets(path: Path) -> None:
    path.write_text("[" * 10**5 + "\n")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_scores_and_logs_that_were_cut_or_changed_are_made_again_or_passed_over_with_a_word(done, tmp_path, caplog):
    out, recipe, results = done
    copy, tuned = shutil.copytree(out, tmp_path / "copy"), "finetune/mpp"
    cut(copy / tuned / "0.5/seed-0/scores.json")
    flip(copy / tuned / "0.5/seed-1/scores.json")
    brackets(copy / tuned / "1/seed-0/scores.json")
    empty(copy / tuned / "1/seed-1/scores.json")
    for seed, harm in enumerate((flip, cut)):
        harm(copy / f"probe/mpp/seed-{seed}/rows.json")
    for share, seed, harm in ((0.5, 0, cut), (0.5, 1, brackets), (1, 0, empty)):
        harm(copy / f"finetune/scratch/{share}/seed-{seed}/metrics.jsonl")
    harmed = run("compare", recipe, f"out={copy}")
    assert harmed.code == 0, harmed.err
    assert json.loads((copy / "results.json").read_text())["rows"] == results["rows"]
    for seed in (0, 1):
        name = copy / f"finetune/scratch/0.5/seed-{seed}/metrics.jsonl"
        assert any(f"{name}: passed over 1 line, cut or changed" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        ("choose/mpp/0.5/lr-0.01/metrics.jsonl", cut, "lacks val/accuracy"),
        ("machine.json", flip, "cut, or not as it was written"),
        ("finetune/mpp/0.5/seed-1/settled.json", flip, "cut, or not as it was written"),
        ("finetune/mpp/0.5/seed-1/settled.json", Path.unlink, "settled.json"),
        ("finetune/mpp/0.5/seed-1/recipe.yaml", Path.unlink, "recipe.yaml: missing"),
    ],
)
def test_what_a_comparison_cannot_do_without_is_one_line(name, harm, words, done, tmp_path):
    out, recipe, _ = done
    copy = shutil.copytree(out, tmp_path / "copy")
    if harm is cut:
        lines = (copy / name).read_text().splitlines(keepends=True)
        (copy / name).write_text("".join(line for line in lines if "val/" not in line))
    else:
        harm(copy / name)
    result = run("compare", recipe, f"out={copy}")
    assert result.code == 2
    assert words in result.line
    assert str(copy / name).rpartition("/")[0] in result.line


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("compare.baseline=none", "compare.baseline must be one of scratch"),
        ("compare.fractions=[0, 1]", "compare.fractions must be in (0, 1]"),
        ("compare.images=[1]", "compare.images needs 2 numbers"),
        ("compare.seeds=[]", "compare.seeds must be"),
        ("compare.seeds=[1, 1]", "compare.seeds must be"),
        ("compare.choose_at=0.3", "compare.choose_at must be one of"),
        ("compare.protocols=[finetoon]", "compare.protocols: no protocol 'finetoon'; did you mean finetune?"),
        ("compare.protocols=[knm]", "compare.protocols: no protocol 'knm'; did you mean knn?"),
        ("compare.protocols=[3]", "compare.protocols: expected"),
        ("compare.arms.mpp.pretrain=nothing", "nothing: neither a recipe file nor a bundled recipe"),
        ("compare.arms.mpp.finetune=pre", "must train with labels"),
        ("compare.arms.mpp.upper_bound=true", "takes no labels of this data"),
        ("compare.arms.scratch_total.total_of=cnn", "total_of must name an arm that pretrains"),
        ("compare.arms.mpp.weights=a", "not both"),
        ("compare.armz=1", "compare.armz: unknown key. Did you mean: arms?"),
        ("compare.arms.mpp.pretrian=pre", "compare.arms.mpp.pretrian: unknown key. Did you mean: pretrain?"),
        ("compare.arms.mpp.zzz=1", "compare.arms.mpp.zzz: unknown key. Expected one of: finetune, pretrain, weights,"),
        ("compare.arms.more={pretrain: pre}", "comparison.yaml: compare.arms.more.finetune: missing; expected the rec"),
        ("compare.arms.more={}", "compare.arms.more.finetune: missing; expected the recipe that trains it with labels"),
        ("train.lrr=1", "train.lrr: unknown key"),
        ("model.width=33", "model.width (33)"),
        ("data.path=nowhere", "nowhere: no such folder"),
    ],
)
def test_what_cannot_be_compared_is_one_line(override, said, shards, tmp_path):
    result = run("compare", recipes(tmp_path, shards), f"out={tmp_path / 'out'}", override)
    assert result.code == 2
    assert said in result.line
    assert not (tmp_path / "out").exists()
