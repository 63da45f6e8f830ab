"""What any number of classes costs: `python tests/many_classes.py 100000` prints seconds and MiB of each stage.

MiB are the highest resident memory so far, above that at the start, torch loaded: as each stage is run once and frees
what it took, a stage that takes no more than those before adds nothing. With `--json` a line of JSON for the test.
"""

import argparse
import json
import logging
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from comparison_results import comparison
from shard_files import labelled, quiet, write_tar

from mpp.eval import few_shot_accuracy, knn_accuracy
from mpp.eval.labelled.finetune import finetune
from mpp.eval.labelled.predict import predict
from mpp.eval.report.report import report
from mpp.export.convert import convert
from mpp.recipe import load_recipe, save_recipe
from mpp.recipe.settled import load_settled
from mpp.shards.build import index_folder
from mpp.shards.index import read_index, write_index
from mpp.weights import load_classifier

IMAGES = 64  # of each split, which have as many classes of the many
WIDTH = 8
RECIPE = """\
data: {path: PATH, val: test, augment: {crop: none, flip: false}, threads: 1}
model: {image: 8, patch: 4, width: 8, depth: 1, heads: 1}
objective: {name: labels, balance: true, smoothing: 0.1}
train: {steps: 2, batch: 16, micro_batch: 8, lr: 1e-2, threads: 1, device: cpu, precision: float32, save_every: 1}
log: {every: 1, pictures: 0, tensorboard: false}
"""


def shards_of(folder: Path, classes: int) -> Path:
    """Two splits of 64 images, whose classes lie far apart in the list of all; each numbers them its own way."""
    for split in ("train", "test"):
        write_tar(folder / f"{split}-0.tar", labelled(IMAGES, ["x"]))
    index_folder(folder, report=quiet)
    names = [f"n{i:08d}" for i in range(classes)]
    places = np.linspace(0, classes - 1, IMAGES).astype(np.int32)
    for split, order in (("train", 1), ("test", -1)):
        label = places if order == 1 else classes - 1 - places
        write_index(replace(read_index(folder, split), classes=tuple(names[::order]), label=label))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("classes", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    started, figures = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
    folder, count = Path(tempfile.mkdtemp(prefix="mpp-classes-")), options.classes

    def stage(name: str, before: float) -> None:
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started) / 2**10
        figures[name] = [round(time.process_time() - before, 2), round(peak)]
        if not options.json:
            print(f"{name:40} {figures[name][0]:8.2f} s {figures[name][1]:6} MiB", flush=True)

    try:
        now = time.process_time()
        (folder / "shards").mkdir()
        shards = shards_of(folder / "shards", count)
        stage("index written and read", now)
        (folder / "r.yaml").write_text(RECIPE.replace("PATH", str(shards)))
        recipe = load_recipe(folder / "r.yaml", [f"out={folder / 'run'}"])

        now = time.process_time()
        out, scores = finetune(recipe)
        stage("2 steps, evaluation, scores.json", now)
        assert scores is not None
        assert scores.n == IMAGES
        assert json.loads((out / "scores.json").read_text())["classes"][-1] == f"n{count - 1:08d}"

        now = time.process_time()
        full = load_settled(out).fill(recipe)
        save_recipe(full, folder / "full.yaml")
        assert load_recipe(folder / "full.yaml").objective == full.objective
        stage("recipe.yaml with all names, read again", now)

        now = time.process_time()
        before = load_classifier(out)
        shutil.rmtree(out / "checkpoints/step-00000002")
        finetune(recipe)
        after = load_classifier(out)
        assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
        assert len(after.classes) == count
        stage("going on from step 1", now)

        now = time.process_time()
        predict(out, shards, split="test", out=folder / "p.csv", scores_out=folder / "s.json", report=quiet)
        stage("predict, csv and scores", now)

        now = time.process_time()
        made = convert(out, folder / "hf", "huggingface")
        assert len(json.loads((made.folder / "config.json").read_text())["id2label"]) == count
        stage("convert to transformers", now)

        now = time.process_time()
        names = tuple(f"n{i:08d}" for i in range(count))
        results = comparison(arms=("scratch", "mpp"), seeds=1, fractions=(1.0,), classes=names)
        page = report(json.loads(json.dumps(results)))
        assert len(page) < 2**21
        stage("results.json and report", now)

        now = time.process_time()
        x, labels = torch.randn(count, WIDTH), torch.arange(count)
        rows = torch.arange(0, count, max(1, count // 64))
        assert few_shot_accuracy(x, labels, x[rows], labels[rows], l2=1.0) >= 0
        stage("few-shot", now)
        now = time.process_time()
        assert knn_accuracy(x, labels, x[rows], labels[rows], k=1) == 1
        stage("nearest neighbours", now)
    finally:
        shutil.rmtree(folder)
    if options.json:
        print(json.dumps(figures), file=sys.stdout)


if __name__ == "__main__":
    main()
