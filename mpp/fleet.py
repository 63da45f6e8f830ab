"""The plan of a recipe for many GPUs: memory, time of a step and length of the run, under DDP and under FSDP2."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from mpp import budget
from mpp.counts import activations_on_cuda, blocks_of, on_meta
from mpp.devices import DEVICES, GIB, NODE, Device
from mpp.errors import cause, shown
from mpp.estimate import BYTES, LINKS, Estimate, PlanError, Work, ddp, fsdp, link, part_of, rate
from mpp.models.vit_config import ViTConfig
from mpp.recipe import Recipe
from mpp.train_config import Precision, TrainConfig

LAUNCHED = 0.02  # seconds: shorter forward and backward passes may wait for the launching of their kernels
ALIKE = 0.01  # by which FLOPs may differ: versions of PyTorch count some operations otherwise


@dataclass(frozen=True)
class Measured:
    """How fast one GPU trains, as `mpp plan --measure` timed it."""

    device: str  # as PyTorch names it
    speed: float  # images/s
    flops: float  # of an image
    source: str  # file


def load_measured(path: Path) -> Measured:
    """What `mpp plan RECIPE --measure --json FILE` wrote; PlanError if that is not it."""
    try:
        found = budget.json_file(path)
        name, speed, flops = found["measured"]["device"], found["measured"]["images/s"], found["flops_an_image"]
        good = isinstance(name, str) and all(type(one) in (int, float) and 0 < one < 1e30 for one in (speed, flops))
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"{shown(str(error.args[0]))} is missing" if isinstance(error, KeyError) else cause(error)
        raise PlanError(f"{path}: expected what `mpp plan --measure --json` writes ({said})") from None
    if not good:
        raise PlanError(f"{path}: expected a device and figures above 0, as `mpp plan --measure --json` writes them")
    return Measured(name, float(speed), float(flops), str(path))


@dataclass(frozen=True)
class Fleet:
    """GPUs to plan for."""

    gpus: int
    name: str  # of DEVICES
    measured: Measured | None = None  # instead of an assumed speed

    @property
    def device(self) -> Device:
        return DEVICES[self.name]

    @property
    def size(self) -> str:
        """How many of what on how many nodes."""
        nodes = ceil(self.gpus / NODE)
        where = "one node" if nodes == 1 else f"{nodes} nodes of up to {NODE}"
        return f"{self.gpus:,} {self.device.title} on {where}"

    def check_device(self, device: str, source: str) -> None:
        """Raises PlanError if a source's speed is not of these GPUs. device: as PyTorch names it."""
        if self.name not in device.lower():
            raise PlanError(f"{source}: measured on {shown(device)}, expected a GPU of --device {self.name}")

    def check(self, measured: Measured, flops: float) -> None:
        """Raises PlanError if a speed is not of these GPUs and of a recipe with as many FLOPs an image."""
        self.check_device(measured.device, measured.source)
        if abs(measured.flops - flops) > ALIKE * flops:
            raise PlanError(
                f"{measured.source}: was measured at {measured.flops / 1e9:.4g} GFLOP an image, and this recipe has "
                f"{flops / 1e9:.4g}; measure it with `mpp plan RECIPE --measure --json FILE`"
            )


def work_of(recipe: Recipe, gpus: int, precision: Precision, totals: dict[str, int]) -> Work:
    """What the recipe asks of each of some GPUs. totals: numbers of parameters."""
    objective, train = on_meta(recipe), recipe.train
    images = part_of(train.batch, gpus)
    micro_batch = None if train.micro_batch == "auto" else train.micro_batch
    if objective.needs.whole_batch or (micro_batch is None and objective.encoder.looks_across_batch):
        micro_batch = images  # not split
    if micro_batch is not None:
        micro_batch = min(micro_batch, images)  # a smaller part is one piece
    if micro_batch is not None and images % micro_batch:
        raise PlanError(
            f"--gpus {gpus}: train.micro_batch ({micro_batch}) must divide each GPU's {images} images of train.batch "
            f"({train.batch}); give train.micro_batch=auto"
        )
    casts, activations = activations_on_cuda(recipe, precision)
    return Work(
        images=images,
        micro_batch=micro_batch,
        pairs=objective.needs.pairs,
        trained=totals["parameters"],
        others=totals["not_trained"],
        blocks=blocks_of(recipe),
        averages=averages(train),
        running=train.ema > 0,
        gathered=BYTES[precision],
        casts=casts,
        activations=activations,
    )


def averages(train: TrainConfig) -> int:
    """Float32 numbers that the optimizer keeps for each parameter: Adam's two averages, or sgd's momentum."""
    return 2 if train.optimizer != "sgd" else int(train.betas[0] > 0)


def planned(
    recipe: Recipe, fleet: Fleet, totals: dict[str, int], images: int, length: Callable[[float], str]
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Rows of the plan's table, and its figures.

    totals: parameters, and FLOPs of an image. images: of the whole run, 0 if not known. length: says seconds.

    Raises PlanError if the batch can't be divided so.
    """
    device, flops = fleet.device, totals["flops_an_image"]
    precision: Precision = "bfloat16" if recipe.train.precision == "auto" else recipe.train.precision
    work = work_of(recipe, fleet.gpus, precision, totals)
    width = recipe.model.width if isinstance(recipe.model, ViTConfig) else None
    assumed, peak = rate(device, precision, width), getattr(device, precision)
    speed, bases = assumed / flops, {}
    if fleet.measured:
        fleet.check(fleet.measured, flops)
        speed = fleet.measured.speed
        bases["measured"] = f"{speed:,.0f} images/s on one {shown(fleet.measured.device)} ({fleet.measured.source})"
    else:
        bases["assumed"] = f"{_per_cent(assumed / peak)} of {peak / 1e12:,.3g} TFLOP/s"
    columns = {"one GPU": ddp(work, device, 1, speed)}
    if fleet.gpus > 1:
        columns = {"DDP": ddp(work, device, fleet.gpus, speed), "FSDP2": fsdp(work, device, fleet.gpus, speed)}
        between = f"{_per_cent(LINKS)} of {link(device, fleet.gpus) / 1e9:,.0f} GB/s between GPUs"
        bases["assumed"] = ", ".join([*filter(None, [bases.get("assumed")]), between])
    rows = [("estimate for", f"{fleet.size}, in {precision}"), *((f"  {name}", said) for name, said in bases.items())]
    if (passing := max(column.micro_batch for column in columns.values()) / speed) < LAUNCHED:
        rows.append(
            ("  not counted", f"launching kernels, which can take longer than the {_ms(passing)} of a micro-batch")
        )
    table = {"": list(columns), **_table(list(columns.values()), recipe.train.batch, fleet, images, length)}
    wide = max(len(cell) for cells in table.values() for cell in cells)
    rows += [(name, "  ".join(f"{cell:>{wide}}" for cell in cells)) for name, cells in table.items()]
    estimates = {name: _figures(column, recipe.train.batch, images) for name, column in columns.items()}
    return rows, {"gpus": fleet.gpus, "device": fleet.name, "basis": bases, "estimates": estimates}


def _figures(column: Estimate, batch: int, images: int) -> dict[str, Any]:
    """An estimate as plain values: bytes and seconds."""
    speed = {"step": column.step, "images/s": batch / column.step}
    run = {"run": images / batch * column.step} if images else {}
    return asdict(column) | speed | run


def _table(
    columns: Sequence[Estimate], batch: int, fleet: Fleet, images: int, length: Callable[[float], str]
) -> dict[str, list[str]]:
    """A line for each part: its name, and what each column says."""
    part, memory = batch // fleet.gpus, fleet.device.memory
    lines = {"micro-batch": [f"{column.micro_batch} of {part}" for column in columns]}
    for name in columns[0].memory:
        lines[name] = [_gib(column.memory[name]) for column in columns]
    totals = [sum(column.memory.values()) for column in columns]
    lines["memory"] = [_gib(total) for total in totals]
    lines[f"fits {memory / GIB:.0f} GiB"] = [
        f"yes, {_per_cent(1 - total / memory)} free" if column.fits else "no"
        for column, total in zip(columns, totals, strict=True)
    ]
    times: dict[str, Callable[[Estimate], str]] = {
        "compute": lambda column: _ms(column.compute),
        "update": lambda column: _ms(column.optimizer),
        "step": lambda column: _ms(column.step),
        "images/s": lambda column: f"{batch / column.step:,.0f}",
    }
    if fleet.gpus > 1:
        times = {
            "compute": times.pop("compute"),
            "communication": lambda column: _ms(column.communication) + ("" if column.waits else " beside"),
            **times,
            "  read by each": lambda column: f"{part / column.step:,.0f}",
        }
    if images:
        times["whole run"] = lambda column: length(images / batch * column.step)
    for name, say in times.items():
        lines[name] = [say(column) if column.fits else "-" for column in columns]
    return lines


def _three(value: float) -> str:
    """Three digits, or as many as the whole number has."""
    return f"{value:,.3g}" if value < 999.5 else f"{value:,.0f}"


def _ms(seconds: float) -> str:
    return f"{_three(1000 * seconds)} ms"


def _gib(size: float) -> str:
    return f"{_three(size / GIB)} GiB"


def _per_cent(share: float) -> str:
    return f"{100 * share:.0f} %"
