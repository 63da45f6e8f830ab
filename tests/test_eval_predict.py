import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture_folder, shaken, tiny_config
from PIL import Image
from shard_files import write_files

import mpp.eval.labelled.images
from mpp.errors import UserError
from mpp.eval.labelled.predict import logits_of, predict, score_split
from mpp.models.classifier import Classifier, Head
from mpp.models.vit import ViT
from mpp.shards.index import read_index
from mpp.shards.write import make_shards
from mpp.weights import save_classifier, save_encoder

COUNT = 12  # images of a folder


def shards_of(source: Path, out: Path) -> Path:
    make_shards(source, out, per_shard=5, report=lambda line: None, progress=False)
    return out


def classifier_of(classes=("class0", "class1", "class2"), **config) -> Classifier:
    encoder = ViT(tiny_config(image=(16, 24)) if not config else tiny_config(**config))
    return shaken(Classifier(encoder, Head(encoder.width, len(classes)), classes)).eval()


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 on any machine, so that results compare closely."""
    monkeypatch.setattr("mpp.hardware.multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr(mpp.eval.labelled.images, "BATCH", 5)  # so that there are several


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return picture_folder(tmp_path / "photos", COUNT, (16, 24), classes=3)


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, Classifier]:
    classifier = classifier_of()
    save_classifier(classifier, tmp_path / "classifier.safetensors")
    return tmp_path / "classifier.safetensors", classifier


@torch.no_grad()
def slow(classifier: Classifier, path: Path) -> torch.Tensor:
    """The logits of one image file of the encoder's own size, by Pillow."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return classifier(torch.tensor(pixels).permute(2, 0, 1).unsqueeze(0))[0]


def sources(shards: Path) -> list[str]:
    """Where each image of the shards came from, in the index's order."""
    index, found = read_index(shards, "train"), []
    for i in range(len(index)):
        tar = (index.folder / index.shards[index.shard[i]]).read_bytes()
        key = index.key(i)
        start = tar.index(f"{key}.json".encode()) + 512
        found.append(json.loads(tar[start : tar.index(b"\0", start)])["source"])
    return found


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        predict(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folders_predictions_are_those_of_one_image_at_a_time(folder, weights, tmp_path):
    path, classifier = weights
    predict(path, folder, out=tmp_path / "out.jsonl", top=2, report=lambda line: None)
    lines = lines_of(tmp_path / "out.jsonl")
    assert [line["key"] for line in lines] == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.jpg"))
    for line in lines:
        shares = slow(classifier, folder / line["key"]).softmax(0)
        order = shares.argsort(descending=True)[:2].tolist()
        assert [name for name, _ in line["top"]] == [classifier.classes[number] for number in order]
        assert [score for _, score in line["top"]] == pytest.approx(shares[order].tolist(), abs=1e-5)
        assert (line["class"], line["score"]) == tuple(line["top"][0])
        assert line["label"] == line["key"].split("/")[0]


def test_shards_give_the_predictions_of_the_folder_they_were_made_of(folder, weights, tmp_path):
    path, classifier = weights
    shards = shards_of(folder, tmp_path / "shards")
    logits, labels = logits_of(classifier, shards, "train")
    for found, label, source in zip(logits, labels.tolist(), sources(shards), strict=True):
        torch.testing.assert_close(found, slow(classifier, folder / source), rtol=1e-4, atol=1e-5)
        assert f"class{label}" == source.split("/")[0]
    by_shards = predict(path, shards, out=tmp_path / "a.csv", report=lambda line: None)
    by_folder = predict(path, folder, out=tmp_path / "b.csv", report=lambda line: None)
    assert by_shards.n == by_folder.n == COUNT
    assert by_shards.confusion == by_folder.confusion
    assert by_shards.loss == pytest.approx(by_folder.loss, rel=1e-5)
    assert score_split(classifier, shards, "train") == by_shards


def test_bfloat16_gives_nearly_the_same_logits_in_float32(folder, weights, tmp_path, monkeypatch):
    shards = shards_of(folder, tmp_path / "shards")
    exact, _ = logits_of(weights[1], shards, "train")
    monkeypatch.setattr("mpp.hardware.multiplies_bfloat16", lambda device: True)
    low, _ = logits_of(weights[1], shards, "train")
    assert low.dtype == torch.float32
    assert not torch.equal(low, exact)
    torch.testing.assert_close(low, exact, rtol=0.05, atol=0.05)


def test_labels_are_matched_by_name(folder, tmp_path):
    classifier = classifier_of(("other", "class2", "class0", "class1"))
    shards = shards_of(folder, tmp_path / "shards")
    _, labels = logits_of(classifier, shards, "train")
    assert [classifier.classes[label] for label in labels] == [source.split("/")[0] for source in sources(shards)]


def test_a_class_of_shards_that_the_classifier_lacks_is_an_error(folder, tmp_path):
    shards = shards_of(folder, tmp_path / "shards")
    with pytest.raises(UserError, match=r"has images of class2; the classifier's classes are class0, class1$"):
        logits_of(classifier_of(("class0", "class1")), shards, "train")


def test_folders_of_other_names_give_no_labels(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save_classifier(classifier_of(("class1", "dog")), tmp_path / "classifier.safetensors")
    found = predict(tmp_path / "classifier.safetensors", folder, out=tmp_path / "out.jsonl", report=lambda line: None)
    assert found.n == COUNT / 3
    assert {line.get("label") for line in lines_of(tmp_path / "out.jsonl")} == {"class1", None}
    assert "has images of class0, class2, which the classifier does not know" in caplog.text
    save_classifier(classifier_of(("cat", "dog")), tmp_path / "classifier.safetensors")
    assert predict(tmp_path / "classifier.safetensors", folder, report=lambda line: None) is None


def test_damaged_images_are_named_and_left_out_of_a_folder(folder, weights, tmp_path, caplog):
    good = (folder / "class0/0000.jpg").read_bytes()
    write_files(folder, {"class1/cut.jpg": good[: len(good) // 2], "deep/er/text.png": b"none", "note.txt": b"hello"})
    predict(weights[0], folder, out=tmp_path / "out.jsonl", report=lambda line: None)
    keys = [line["key"] for line in lines_of(tmp_path / "out.jsonl")]
    assert len(keys) == COUNT
    assert not {"class1/cut.jpg", "deep/er/text.png"} & set(keys)
    for name in ("class1/cut.jpg is damaged", "deep/er/text.png is damaged", "damaged images left out: 2"):
        assert name in caplog.text


def test_damaged_images_of_shards_do_not_shift_the_keys_of_others(folder, weights, tmp_path, caplog):
    _, classifier = weights
    shards = shards_of(folder, tmp_path / "shards")
    index = read_index(shards, "train")
    for number in (1, 6):
        with open(shards / index.shards[index.shard[number]], "r+b") as tar:
            tar.seek(index.offset[number] + index.size[number] // 2)
            tar.write(bytes(64))
    predict(weights[0], shards, out=tmp_path / "out.jsonl", report=lambda line: None)
    lines = lines_of(tmp_path / "out.jsonl")
    source = dict(zip((index.key(i) for i in range(COUNT)), sources(shards), strict=True))
    assert [line["key"] for line in lines] == [index.key(i) for i in range(COUNT) if i not in (1, 6)]
    for line in lines:
        expected = slow(classifier, folder / source[line["key"]]).softmax(0).max().item()
        assert line["score"] == pytest.approx(expected, abs=1e-5)
    assert "damaged images left out: 2" in caplog.text


def test_images_without_a_label_are_predicted_but_not_counted(folder, weights, tmp_path):
    write_files(folder, {"loose.jpg": (folder / "class0/0000.jpg").read_bytes()})
    shards = shards_of(folder, tmp_path / "shards")
    logits, labels = logits_of(weights[1], shards, "train")
    assert (len(logits), int((labels == -1).sum())) == (COUNT + 1, 1)
    assert score_split(weights[1], shards, "train").n == COUNT


def test_scores_need_a_label(folder, weights, tmp_path):
    make_shards(folder, tmp_path / "shards", labels="none", report=lambda line: None, progress=False)
    with pytest.raises(UserError, match="split train holds no image with a label"):
        score_split(weights[1], tmp_path / "shards", "train")
    assert predict(weights[0], tmp_path / "shards", report=lambda line: None) is None
    scores_out = tmp_path / "scores.json"
    assert "no image has a label" in refused(weights[0], tmp_path / "shards", scores_out=scores_out)
    assert not scores_out.exists()


def test_without_a_file_each_image_is_a_line_and_the_scores_follow(folder, weights, tmp_path):
    lines: list[str] = []
    found = predict(weights[0], folder, top=9, scores_out=tmp_path / "scores.json", report=lines.append)
    assert len(lines) == COUNT + 1
    assert lines[0].startswith("class0/0000.jpg: class")
    assert lines[0].count("%") == 3  # as many classes as there are
    assert lines[-1].startswith(str(found))
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written == {"classes": ["class0", "class1", "class2"], **found.to_json()}


def test_the_csv_holds_what_the_jsonl_holds(folder, weights, tmp_path):
    for name in ("out.csv", "out.jsonl"):
        predict(weights[0], folder, out=tmp_path / name, top=2, report=lambda line: None)
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, line in zip(rows, lines_of(tmp_path / "out.jsonl"), strict=True):
        assert [row["key"], row["label"]] == [line["key"], line["label"]]
        assert [[row["class"], float(row["score"])], [row["class_2"], float(row["score_2"])]] == line["top"]


def test_no_cell_of_the_csv_is_a_formula(tmp_path):
    names = ["=1+1", "+1", "-1", "@SUM(1)", "\tx", "\rx", "'=1", "plain", "1-2"]
    classifier = Classifier(ViT(tiny_config()), Head(64, len(names)), names)
    save_classifier(classifier, tmp_path / "classifier.safetensors")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "photos/=cmd.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "photos/-x.png")
    for name in ("out.csv", "out.jsonl"):
        out = tmp_path / name
        predict(tmp_path / "classifier.safetensors", tmp_path / "photos", out=out, top=9, report=lambda line: None)
    with open(tmp_path / "out.csv", newline="") as file:
        _, *rows = csv.reader(file)
    texts = [cell for row in rows for cell in [row[0], *row[2::2]]]
    assert not [text for text in texts if text[:1] in ("=", "+", "-", "@", "\t", "\r")]
    # The rule of docs/evaluation.md: one ' in front of a text comes off.
    lines = lines_of(tmp_path / "out.jsonl")
    assert {text.removeprefix("'") for text in texts} == {*names, "=cmd.png", "-x.png"}
    assert [row[0].removeprefix("'") for row in rows] == [line["key"] for line in lines]


def test_evaluation_sees_the_centre_in_the_encoders_size(tmp_path):
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 20:80] = (200, 30, 90)  # the centre of the encoder's shape, 2 : 3
    (tmp_path / "photos").mkdir()
    Image.fromarray(wide).save(tmp_path / "photos/wide.png")
    Image.fromarray(wide[:16, 40:64]).save(tmp_path / "small.png")
    classifier = classifier_of()
    save_classifier(classifier, tmp_path / "classifier.safetensors")
    predict(tmp_path / "classifier.safetensors", tmp_path / "photos", out=tmp_path / "o.jsonl", report=str)
    [line] = lines_of(tmp_path / "o.jsonl")
    assert line["score"] == pytest.approx(slow(classifier, tmp_path / "small.png").softmax(0).max().item(), abs=1e-5)


def test_grey_encoders_take_folders_but_not_colour_shards(folder, tmp_path):
    save_classifier(classifier_of(image=(16, 24), channels=1), tmp_path / "classifier.safetensors")
    assert predict(tmp_path / "classifier.safetensors", folder, report=lambda line: None).n == COUNT
    shards = shards_of(folder, tmp_path / "shards")
    assert "holds colour images, the encoder takes grey ones" in refused(tmp_path / "classifier.safetensors", shards)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_of_several_splits_one_must_be_named(kind, weights, tmp_path):
    for split, count in (("train", 6), ("test", 4)):
        picture_folder(tmp_path / "data" / split, count, (16, 24))
    data = tmp_path / "data" if kind == "folder" else shards_of(tmp_path / "data", tmp_path / "shards")
    assert predict(weights[0], data, split="test", report=lambda line: None).n == 4
    assert "holds the splits test, train; name one with --split" in refused(weights[0], data)
    assert "no split 'val'; it holds test, train" in refused(weights[0], data, split="val")


def test_wrong_places_are_one_line_each(folder, weights, tmp_path):
    (tmp_path / "empty").mkdir()
    write_files(tmp_path / "bad", {"a.jpg": b"none", "b.png": b"none"})
    write_files(tmp_path / "tars", {"train-000000.tar": b"none"})
    save_encoder(weights[1].encoder, tmp_path / "encoder.safetensors")
    assert refused(weights[0], tmp_path / "none") == f"{tmp_path / 'none'}: no such folder"
    assert refused(weights[0], tmp_path / "empty") == f"{tmp_path / 'empty'}: no images in it"
    assert refused(weights[0], tmp_path / "bad") == f"{tmp_path / 'bad'}: every image is damaged"
    assert "tars without an index" in refused(weights[0], tmp_path / "tars")
    assert "its folder does not exist" in refused(weights[0], folder, out=tmp_path / "none/out.csv")
    one = {"out": tmp_path / "one.csv", "scores_out": tmp_path / "one.csv"}
    assert "expected two files" in refused(weights[0], folder, **one)
    assert "ends in .jsonl or .csv" in refused(weights[0], folder, out=tmp_path / "out.txt")
    assert "--top must be at least 1" in refused(weights[0], folder, top=0)
    assert "holds no classifier" in refused(tmp_path / "encoder.safetensors", folder)


def test_an_archive_is_read_as_a_folder(folder, weights, tmp_path):
    import shutil

    archive = shutil.make_archive(str(tmp_path / "photos"), "gztar", folder)
    found = predict(weights[0], archive, report=lambda line: None)
    assert found == predict(weights[0], folder, report=lambda line: None)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "photos.tar.gz", "classifier.safetensors"}
