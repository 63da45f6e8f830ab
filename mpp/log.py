"""What a run tells: a progress bar, metrics.jsonl, TensorBoard, and pictures."""

import functools
import io
import logging
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mpp.errors import cause, counted
from mpp.files import FileError, write_atomically
from mpp.jsons import encoded, read_lines

PICTURE_SIDE = 96  # pixels that an image of a picture grid has at least, so that small ones can be seen
LABEL_WIDTH = 64  # pixels, at least
FONT = 12  # pixels high
GAP = 2  # pixels between images of a grid
METRICS = "metrics.jsonl"

logger = logging.getLogger("mpp.log")


@functools.cache
def _hush_tensorboard() -> None:
    """Lets TensorBoard's thread end without a traceback on a full disk: its next write says it, in one line."""
    hook = threading.excepthook

    def hushed(failed: threading.ExceptHookArgs) -> None:
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__name__ == "_AsyncWriterThread"):
            hook(failed)

    threading.excepthook = hushed


class Log:
    """Writes metrics and pictures of a run that has done `start` of `steps` steps.

    What an earlier, interrupted run wrote about later steps is taken back first: those steps are done again. Raises
    FileError if the disk is full.
    """

    def __init__(self, out: Path, start: int, steps: int, tensorboard: bool, beside_bar: Sequence[str] = ()) -> None:
        """beside_bar: names of the scalars that stand beside the progress bar."""
        self.out, self._beside_bar = out, beside_bar
        self._left_out: set[str] = set()  # scalars that were not finite
        _hush_tensorboard()
        with self._writing():
            out.mkdir(parents=True, exist_ok=True)
            _forget_after(out / METRICS, start)
            self._board = SummaryWriter(str(out), purge_step=start + 1) if tensorboard else None
            self._metrics = (out / METRICS).open("a", encoding="utf-8")
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=start, desc=out.name, unit="step", mininterval=0.2 if terminal else 10)

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        for file in (self._metrics, self._board):
            with suppress(FileError) if error else nullcontext(), self._writing():  # the first error is the one to tell
                if file:
                    file.close()

    def advance(self) -> None:
        """Moves the bar on by a step."""
        self._bar.update()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same to TensorBoard and beside the bar; of finite values alone."""
        for name, value in values.items():
            if not math.isfinite(value) and name not in self._left_out:
                self._left_out.add(name)
                logger.warning("%s: step %d: %s is %g; left out where it is not finite", self.out, step, name, value)
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        with self._writing():
            self._metrics.write(encoded({"step": step, **values}).decode())
            self._metrics.flush()
            if self._board:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
        self._bar.set_postfix(
            {name: f"{values[name]:.4g}" for name in self._beside_bar if name in values}, refresh=False
        )

    def pictures(self, step: int, pictures: dict[str, Tensor]) -> None:
        """One PNG, pictures/step-*.png: a row for each name, a column for each image."""
        if not pictures:
            return
        grid = labelled(picture_grid(pictures), list(pictures))
        Image.fromarray(grid).save(png := io.BytesIO(), "PNG")
        with self._writing():
            (self.out / "pictures").mkdir(exist_ok=True)
            write_atomically(self._picture(step), png.getvalue())
            if self._board:
                self._board.add_image("/".join(pictures), grid, step, dataformats="HWC")

    def scored(self, step: int) -> bool:
        """Whether metrics.jsonl has what scoring gave at a step; the lines of training have a rate."""
        return any(row["step"] == step and "lr" not in row for row in read_metrics(self.out))

    def pictured(self, step: int) -> bool:
        """Whether the pictures of a step are there."""
        return self._picture(step).exists()

    def _picture(self, step: int) -> Path:
        return self.out / "pictures" / f"step-{step:08d}.png"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Makes one line of what a full disk causes."""
        try:
            yield
        except OSError as error:
            raise FileError(f"{self.out}: cannot be written to: {cause(error)}") from error


class Unlogged:
    """The log of a process that leaves it to another one."""

    def __enter__(self) -> "Unlogged":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def advance(self) -> None:
        pass

    def scalars(self, step: int, values: dict[str, float]) -> None:
        pass

    def pictures(self, step: int, pictures: dict[str, Tensor]) -> None:
        pass

    def scored(self, step: int) -> bool:
        return False

    def pictured(self, step: int) -> bool:
        return False


def picture_grid(pictures: dict[str, Tensor]) -> np.ndarray:
    """Puts pictures, name -> uint8 (b, c, h, w), into one (height, width, 3): a row for each name, on white."""
    rows = []
    for images in pictures.values():
        images = images.cpu()
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        images = torch.nn.functional.pad(images[:, :3], (0, 0, 0, 0, 0, max(0, 3 - images.shape[1])))  # of two channels
        zoom = -(-PICTURE_SIDE // max(images.shape[-2:]))
        images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
        images = torch.nn.functional.pad(images, (GAP, GAP, GAP, GAP), value=255)
        rows.append(torch.cat(list(images), dim=2))
    return torch.cat(rows, dim=1).permute(1, 2, 0).numpy()


def labelled(grid: np.ndarray, names: list[str]) -> np.ndarray:
    """Puts each row's name at its left."""
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widths = [math.ceil(measure.textlength(name, font_size=FONT)) + 2 * GAP for name in names]
    left = max(LABEL_WIDTH, *widths)
    canvas = Image.new("RGB", (grid.shape[1] + left, grid.shape[0]), "white")
    canvas.paste(Image.fromarray(grid), (left, 0))
    for row, name in enumerate(names):
        middle = (row + 0.5) * grid.shape[0] / len(names)
        ImageDraw.Draw(canvas).text((left - GAP, middle), name, "black", anchor="rm", font_size=FONT)
    return np.asarray(canvas)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; says how many are cut or changed, and passes over those."""
    path = folder / METRICS
    try:
        rows = [row for row in read_lines(path) if type(row.get("step")) is int]
        lines = len(path.read_bytes().splitlines())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {cause(error)}") from None
    if len(rows) < lines:
        logger.warning("%s: passed over %s, cut or changed", path, counted(lines - len(rows), "line"))
    return rows


def _forget_after(metrics: Path, step: int) -> None:
    """Drops the lines of later steps, and a line that was cut, from metrics.jsonl."""
    if not metrics.exists():
        return
    rows = [row for row in read_lines(metrics) if isinstance(row.get("step"), int) and row["step"] <= step]
    write_atomically(metrics, b"".join(map(encoded, rows)))
