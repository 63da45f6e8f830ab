"""Model cards: what they say is so, and what others chose can do nothing in them."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from conftest import shaken, tiny_config
from safetensors.torch import load_file, save_file
from tiny_runs import LABELS, RECIPE, run, small_splits, write_recipe

from mpp.export.card import WRITERS
from mpp.export.convert import CHOICES, convert
from mpp.export.markdown import block, code, table
from mpp.models.classifier import Classifier, Head
from mpp.models.vit import ViT
from mpp.weights import save_classifier, save_encoder

HOSTILE = (
    "a`b",
    "``",
    "|x|",
    "\n\n# Title",
    "---\nlicense: mit",
    "<script>alert(1)</script>",
    "[x](http://y)",
    "\u202e",
    " ",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders, one with labels and one without, with the results of a probe in it."""
    folder = tmp_path_factory.mktemp("runs")
    shards = small_splits(folder)
    assert run("finetune", write_recipe(folder, shards, LABELS), f"out={folder / 'labels'}").code == 0
    assert run("pretrain", write_recipe(folder, shards, RECIPE), f"out={folder / 'plain'}").code == 0
    probe = folder / "plain/probe.json"
    assert run("probe", folder / "plain", "--data", shards, "--protocol", "knn", "--json", probe).code == 0
    return folder


def card_of(weights: Path, out: Path, to: str = "safetensors", **options) -> str:
    convert(weights, out, to, **options)
    return (out / "README.md").read_text(encoding="utf-8")


def front_matter(text: str) -> dict:
    """What the hub reads: YAML between the first two lines of ---."""
    start, middle, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(middle)


def body(text: str) -> str:
    return text.split("---\n", 2)[2]


def tiny(**changes) -> ViT:
    return shaken(ViT(tiny_config(**{"width": 32, "depth": 1} | changes)))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("name", "task"), [("labels", "image-classification"), ("plain", "image-feature-extraction")])
def test_the_front_matter_says_task_and_library_and_leaves_the_licence_open(name, task, runs, tmp_path):
    for to, library in {"timm": "timm", "safetensors": "mpp"}.items():
        text = card_of(runs / name, tmp_path / to, to)
        found = front_matter(text)
        assert found["library_name"] == library
        assert found["pipeline_tag"] == task
        assert {"masked-patch-pretraining", "vision-transformer"} <= set(found["tags"])
        assert "license" not in found


def test_it_gives_recipe_data_and_results_of_a_run(runs, tmp_path):
    text = card_of(runs / "labels", tmp_path / "out")
    [recipe] = blocks(text, "yaml")
    assert recipe == (runs / "labels/recipe.yaml").read_text()
    assert f"Data: `{runs / 'shards'}`, split `train`, `40 images`." in text
    assert "Objective: `labels`; 6 steps of 8 images a batch." in text
    lines = [json.loads(line) for line in (runs / "labels/metrics.jsonl").read_text().splitlines()]
    loss = [line["val/loss"] for line in lines if "val/loss" in line][-1]
    assert f"| `val/loss` | `{loss:.4g}` | `6` |" in text
    scores = json.loads((runs / "labels/scores.json").read_text())
    assert f"| `top1` | `{scores['top1']:.4g}` |" in text
    assert "`scores.json`: 20 images" in text
    assert "Classes, in the order of the logits: `class0`, `class1`." in text
    assert "3 x 16 x 16 (channels, height, width)" in text
    assert "27,552 parameters" in text


def test_it_gives_the_figures_of_a_probe_in_the_run_folder(runs, tmp_path):
    text = card_of(runs / "plain", tmp_path / "out")
    rows = json.loads((runs / "plain/probe.json").read_text())["rows"]
    assert rows
    for row in rows:
        assert f"| `{row['protocol']}` | `{row['metric']}` | `{row['value']:.4g}` |" in text
    assert (
        f"`probe.json`: `{runs / 'plain'}`, frozen, on `{runs / 'shards'}` (`40 of train and 20 of test` images)"
        in text
    )


def test_of_a_checkpoint_later_results_are_not_its_own(runs, tmp_path):
    text = card_of(runs / "plain/checkpoints/step-00000004", tmp_path / "out")
    assert "the weights at step 4" in text
    lines = [json.loads(line) for line in (runs / "plain/metrics.jsonl").read_text().splitlines()]
    assert f"| `loss` | `{lines[3]['loss']:.4g}` | `4` |" in text
    assert "`6` |" not in text
    assert "probe.json" not in text


def test_without_results_it_says_so_and_invents_none(tmp_path):
    save_encoder(tiny(), tmp_path / "encoder.safetensors")
    text = card_of(tmp_path / "encoder.safetensors", tmp_path / "out")
    assert "## Results\n\nNone came with these weights.\n" in text
    assert "its training is not known" in text
    assert blocks(text, "yaml") == []


def test_of_anothers_file_it_names_format_and_what_was_left_aside(tmp_path):
    save_encoder(tiny(), tmp_path / "encoder.safetensors")
    convert(tmp_path / "encoder.safetensors", tmp_path / "given", "huggingface")
    file = tmp_path / "given/model.safetensors"
    save_file(load_file(file) | {"pooler.dense.weight": torch.ones(32, 32), "pooler.dense.bias": torch.ones(32)}, file)
    text = card_of(tmp_path / "given", tmp_path / "out", "timm")
    assert "Converted from `given`, weights in the format `huggingface`." in text
    assert re.search(r"Left aside, as no part of this model: `pooler\.dense\.\w+`, `pooler\.dense\.\w+`\.", text)
    assert "None came with these weights." in text


@pytest.mark.parametrize(
    "text", ["", "not JSON", "[1]", '{"rows": 3, "weights": 1}', '{"n": "x", "top1": 1}', "[" * 10**5]
)
def test_files_in_a_run_folder_that_hold_no_results_are_passed_over(text, runs, tmp_path):
    folder = shutil.copytree(runs / "plain", tmp_path / "run")
    (folder / "probe.json").write_text(text)
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('3\n{"step": "x"}\n{"step": 6, "odd": "text", "tru')
    found = card_of(folder, tmp_path / "out")
    assert "probe.json" not in found
    assert "| `loss` |" in found
    assert "`odd`" not in found


def test_a_recipe_of_another_version_is_shown_as_it_stands(runs, tmp_path):
    folder = shutil.copytree(runs / "plain", tmp_path / "run")
    with (folder / "recipe.yaml").open("a") as recipe:
        recipe.write("future: {key: 3}\n")
    text = card_of(folder, tmp_path / "out")
    assert blocks(text, "yaml")[0].endswith("future: {key: 3}\n")
    assert "- Data:" not in text


def test_secrets_of_urls_stay_at_home(runs, tmp_path):
    folder = shutil.copytree(runs / "plain", tmp_path / "run")
    recipe = folder / "recipe.yaml"
    url = "https://me:secret1@host/shards?token=secret2"
    recipe.write_text(recipe.read_text().replace(f"path: {runs / 'shards'}", f"path: {url}"))
    text = card_of(folder, tmp_path / "out")
    assert "https://host/shards?..." in text
    assert "secret" not in text


# How to load


@pytest.mark.parametrize("to", [pytest.param(to, marks=pytest.mark.slow) if to == "onnx" else to for to in CHOICES])
def test_each_library_has_a_snippet_a_command_or_a_reason(to, tmp_path):
    encoder = tiny(gelu="tanh") if to == "google" else tiny()
    save_encoder(encoder, tmp_path / "given.safetensors")
    text = card_of(tmp_path / "given.safetensors", tmp_path / "out", to)
    for title in ("timm", "transformers", "Plain torch", "onnxruntime"):
        assert f"### {title}\n" in text
    for snippet in blocks(text, "python"):
        compile(snippet, "README.md", "exec")
    if to in WRITERS:
        assert WRITERS[to].usage(encoder, None).strip() in text
    commands = re.findall(r"`mpp convert (\S+) OUT --to (\w+) ?([^`]*)` writes", text)
    assert {name for _, name, _ in commands} == {"timm", "huggingface", "export", "onnx"} - {to}
    source = dict.fromkeys(("export", "onnx"), tmp_path / "given.safetensors")
    for place, name, facts in commands:
        if name == "onnx" or (name == "export" and to != "google"):
            continue  # takes seconds, and is alike
        weights = source.get(to, tmp_path / "out" / place)
        assert run("convert", weights, tmp_path / f"to-{name}", "--to", name, *facts.split()).code == 0


def test_a_library_without_a_place_for_the_model_has_the_reason(tmp_path):
    save_encoder(tiny(registers=4, positions="rope", pool="avg"), tmp_path / "given.safetensors")
    text = card_of(tmp_path / "given.safetensors", tmp_path / "out")
    assert "### timm\n\nNot possible: timm has no place for positions rope.\n" in text
    assert re.search(r"### transformers\n\nNot possible: transformers' ViT cannot hold .*registers 4.*\.\n", text)


@pytest.mark.parametrize("to", ["timm", "safetensors", "export", "google"])
@pytest.mark.parametrize("with_head", [True, False])
def test_the_snippets_run_in_the_folder(to, with_head, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    encoder = tiny(gelu="tanh") if to == "google" else tiny()
    save_classifier(Classifier(encoder, Head(32, 3), ["a", "b", "c"]), tmp_path / "given.safetensors")
    text = card_of(tmp_path / "given.safetensors", tmp_path / "out", to, head=with_head)
    snippets = [snippet for snippet in blocks(text, "python") if "vit_jax" not in snippet]
    assert snippets
    monkeypatch.chdir(tmp_path / "out")
    for snippet in snippets:
        names: dict = {}
        exec(compile(snippet, "README.md", "exec"), names)
        assert names["outputs"].shape == (1, 3 if with_head else 32)


# What others chose


def parsed(text: str) -> list:
    markdown = pytest.importorskip("markdown_it")
    return markdown.MarkdownIt("commonmark").enable("table").parse(text)


def inlines(text: str) -> list:
    return [child for token in parsed(text) for child in token.children or ()]


def visible(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@pytest.mark.parametrize("text", [*HOSTILE, "plain", "`", " `", "a\\", "\ud800", "\x1b[2J"])
def test_a_code_span_shows_exactly_its_text(text):
    [span] = inlines(code(text))
    assert span.type == "code_inline"
    assert span.content.strip(" ") == visible(text).strip(" ")
    assert code(text).isprintable()


def test_a_code_block_ends_where_it_should():
    text = "a: 1\n```\n# Title\n````\n~~~\n\x1b[2J\u2028b\n"
    [token] = parsed(block(text, "yaml"))
    assert token.type == "fence"
    assert token.content == "a: 1\n```\n# Title\n````\n~~~\n\\x1b[2J\nb\n"


def test_a_table_has_the_cells_it_was_given():
    rows = [(name, "x") for name in HOSTILE]
    tokens = parsed(table(("name", "value"), rows))
    cells = [after for token, after in pairwise(tokens) if token.type == "td_open"]
    assert len(cells) == 2 * len(rows)
    for name, cell in zip(HOSTILE, cells[::2], strict=True):
        [span] = cell.children
        assert (span.type, span.content.strip(" ")) == ("code_inline", visible(name).strip(" "))


def test_hostile_names_change_nothing_but_their_own_spans(runs, tmp_path):
    folder = tmp_path / "run`\n# Title\n---\n<b>"
    shutil.copytree(runs / "labels", folder)
    encoder = tiny()
    save_classifier(Classifier(encoder, Head(32, len(HOSTILE)), HOSTILE), folder / "classifier.safetensors")
    metrics = {"step": 6, **dict.fromkeys(HOSTILE, 1.5)}
    (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    (folder / "`|x.json").write_text(
        json.dumps({"rows": [{"protocol": "|`", "metric": "\n", "value": 1}], "weights": "`"})
    )
    with (folder / "recipe.yaml").open("a") as recipe:
        recipe.write("# ```\n# </pre><script>\n")
    for to in ("safetensors", "timm", "huggingface"):
        text = card_of(folder, tmp_path / to, to)
        assert front_matter(text).keys() == {"library_name", "pipeline_tag", "tags"}
        tokens = parsed(body(text))
        titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
        assert titles[1:5] == ["Where the weights come from", "Results", "How to load them", "timm"]
        assert len(titles) == 10
        kinds = {token.type for token in tokens} | {child.type for token in tokens for child in token.children or ()}
        assert not kinds & {"html_block", "html_inline", "link_open", "image", "hr"}
        spans = [child.content for token in tokens for child in token.children or () if child.type == "code_inline"]
        assert {visible(name).strip() for name in HOSTILE} <= {span.strip() for span in spans}


def test_many_classes_are_counted_and_not_all_named(tmp_path):
    names = [f"class {number}" for number in range(1000)]
    save_classifier(Classifier(tiny(), Head(32, 1000), names), tmp_path / "given.safetensors")
    text = card_of(tmp_path / "given.safetensors", tmp_path / "out")
    assert "`class 49` and 950 more." in text
    assert "`class 50`" not in text
