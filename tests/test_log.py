import json

import numpy as np
import pytest
import torch
from PIL import Image

from mpp.log import GAP, PICTURE_SIDE, Log, _forget_after, picture_grid
from mpp.train_config import LogConfig


def test_a_grid_has_a_row_for_each_name_and_a_column_for_each_image():
    pictures = {name: torch.randint(0, 255, (3, 3, 100, 120), dtype=torch.uint8) for name in ("input", "truth")}
    grid = picture_grid(pictures)
    assert grid.shape == (2 * (100 + 2 * GAP), 3 * (120 + 2 * GAP), 3)
    assert grid.dtype == np.uint8
    expected = np.full(grid.shape, 255, np.uint8)
    for row, images in enumerate(pictures.values()):
        for column, image in enumerate(images):
            top, left = row * (100 + 2 * GAP) + GAP, column * (120 + 2 * GAP) + GAP
            expected[top : top + 100, left : left + 120] = image.permute(1, 2, 0).numpy()
    assert (grid == expected).all()


@pytest.mark.parametrize(("size", "zoom"), [((8, 8), 12), ((32, 48), 2), ((95, 10), 2), ((96, 96), 1), ((224, 224), 1)])
def test_small_images_are_enlarged_by_whole_numbers(size, zoom):
    image = torch.randint(0, 255, (1, 3, *size), dtype=torch.uint8)
    grid = picture_grid({"input": image})[GAP:-GAP, GAP:-GAP]
    assert grid.shape == (zoom * size[0], zoom * size[1], 3)
    assert max(grid.shape[:2]) >= PICTURE_SIDE
    assert (grid == np.kron(image[0].permute(1, 2, 0), np.ones((zoom, zoom, 1), np.uint8))).all()


def test_grey_images_are_shown_in_grey():
    image = torch.arange(96 * 96, dtype=torch.uint8).view(1, 1, 96, 96)
    grid = picture_grid({"input": image})[GAP:-GAP, GAP:-GAP]
    assert (grid == image[0, 0].numpy()[..., None]).all()


def line(step: int) -> str:
    return json.dumps({"step": step, "loss": 1.5}) + "\n"


def test_lines_of_later_steps_are_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(map(line, [1, 2, 3, 3, 4, 5])))
    _forget_after(path, 3)
    assert path.read_text() == "".join(map(line, [1, 2, 3, 3]))
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "cut", ['{"step": 2, "lo', '{"step": 2, "loss": 1.5}', "\0\0\0\0\n", "{}\n", "3\n", "\udcff\n"]
)
def test_a_line_that_was_cut_is_forgotten(cut, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + cut, errors="surrogateescape")
    _forget_after(path, 9)
    assert path.read_text() == line(1)


def test_without_metrics_there_is_nothing_to_forget(tmp_path):
    _forget_after(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_a_log_goes_on_behind_the_step_that_is_done(tmp_path):
    for start in (0, 2, 1):
        with Log(tmp_path, start, 4, tensorboard=False) as log:
            for step in range(start + 1, 5):
                log.advance()
                log.scalars(step, {"loss": float(step)})
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": float(step)} for step in (1, 2, 3, 4)]


def test_pictures_are_files_by_step(tmp_path):
    with Log(tmp_path, 0, 4, tensorboard=False) as log:
        log.pictures(2, {"input": torch.full((2, 3, 100, 100), 7, dtype=torch.uint8)})
        log.pictures(3, {})
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["step-00000002.png"]
    with Image.open(tmp_path / "pictures/step-00000002.png") as picture:
        shown = np.asarray(picture)
    pictures = shown[GAP:-GAP, -2 * (100 + 2 * GAP) :]  # the row's name is at their left
    assert (pictures == 7).all(-1).sum() == 2 * 100 * 100


@pytest.mark.parametrize("settings", [{"every": 0}, {"pictures": -1}])
def test_impossible_settings_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=f"log.{next(iter(settings))}"):
        LogConfig(**settings)
