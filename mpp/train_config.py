"""The `train`, `eval` and `log` sections of a recipe. No torch: recipes are checked without it."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

DeviceName = Literal["auto", "cuda", "mps", "cpu"]
Precision = Literal["bfloat16", "float32"]
UNITS = ("steps", "epochs", "images")  # in which `train` may say how long
LONGEST_WAIT = 10_000  # minutes
DECAY = 0.2  # of a run, at its end, in which the rate of `wsd` falls (Hägele et al., arXiv 2405.18392: 10 to 20 %)


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Exactly one of steps, epochs and images says how long; the warm-up is counted in the same unit."""

    steps: int | None = None  # optimizer updates
    epochs: float | None = None
    images: int | None = None
    warmup: float = 0
    batch: int = 4096  # images an update, over all micro-batches
    micro_batch: int | Literal["auto"] = "auto"  # images a forward pass; divides `batch`
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 2e-4  # peak, for `batch` images; never rescaled
    min_lr: float = 0.0  # that the schedule ends at
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, decay (MiniCPM, arXiv 2404.06395)
    decay: float | None = None  # share of the run in which the rate of wsd falls, at its end; 0.2 where not given
    layer_decay: float = 1.0  # of the rate, from each of the encoder's layers to the one below it
    betas: tuple[float, float] = (0.9, 0.999)  # the first is sgd's momentum
    weight_decay: float = 0.0  # of weights of linear and convolution layers only; adam and sgd add it to the gradient
    clip: float | None = 1.0  # norm of all gradients together
    ema: float = 0.0  # decay of a running average of all parameters, which is then the result; 0 for none
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # of forward and backward passes
    device: DeviceName = "auto"
    threads: int | None = None  # of the CPU's arithmetic, on which its last bits depend; torch's number where not given
    compile: bool | None = None  # where not given: on CUDA
    activation_checkpointing: bool = False  # keep only what goes into each block, and compute the rest again: slower
    deterministic: bool = False  # bit-equal runs on CUDA too, at some cost; on the CPU they always are
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints kept, beside that before the decay of wsd
    shard: Literal["none", "full"] = "none"  # of several processes: full splits all weights and averages among them
    timeout: float = 10.0  # minutes that one of several processes waits for the others: they compile, and shards lag
    keep_state: bool = True  # keep them after the end of a run too; false: once its results are written, these alone

    def __post_init__(self) -> None:
        for name in ("batch", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if self.micro_batch != "auto" and (self.micro_batch < 1 or self.batch % self.micro_batch):
            raise ValueError(f"train.batch ({self.batch}) must be a multiple of train.micro_batch ({self.micro_batch})")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"train.threads must be at least 1, got {self.threads}")
        if self.lr <= 0 or self.weight_decay < 0 or self.warmup < 0:
            raise ValueError("train.lr must be above 0, and train.weight_decay and train.warmup at least 0")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"train.min_lr must be in [0, train.lr], got {self.min_lr}")
        if self.decay is not None and self.schedule != "wsd":
            raise ValueError(f"train.decay ({self.decay:g}) is of train.schedule wsd, and that is {self.schedule}")
        if not 0 <= self.decay_share <= 1:
            raise ValueError(f"train.decay must be in [0, 1], a share of the run, got {self.decay:g}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"train.layer_decay must be in (0, 1], got {self.layer_decay}")
        if not 0 <= self.ema < 1 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.ema and train.betas must be in [0, 1), got {self.ema} and {self.betas}")
        if not 0 < self.timeout <= LONGEST_WAIT:
            raise ValueError(f"train.timeout must be above 0 and at most {LONGEST_WAIT} minutes, got {self.timeout:g}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"train.clip must be above 0, or null for none, got {self.clip}")

    @property
    def decay_share(self) -> float:
        """The share of the run in which the rate of wsd falls."""
        return DECAY if self.decay is None else self.decay

    @property
    def constant_until(self) -> int | None:
        """The last step of the constant phase of wsd, after which the rate falls; None for a cosine.

        For a config in steps. It is the step of warm-up or start where the whole of the rest is decay.
        """
        if self.schedule != "wsd" or self.steps is None:
            return None
        # By way of text, so that 0.1 is one tenth.
        return max(int(self.warmup), self.steps - math.ceil(Fraction(str(self.decay_share)) * self.steps))


@dataclass(frozen=True)
class Execution:
    """What `train` may leave to the machine, in plain values: chosen once, at the first start of a run."""

    precision: Precision
    compile: bool
    threads: int
    micro_batch: int

    def __post_init__(self) -> None:
        """Raises ValueError for what no machine can have chosen: the values may come from a file."""
        if self.precision not in get_args(Precision) or type(self.compile) is not bool:
            raise ValueError(f"precision {self.precision!r} or compile {self.compile!r}")
        if not all(type(number) is int and number >= 1 for number in (self.threads, self.micro_batch)):
            raise ValueError(f"threads {self.threads!r} or micro_batch {self.micro_batch!r}")


@dataclass(frozen=True)
class EvalConfig:
    """Scoring the objective on `data.val` while training."""

    every: int = 1000  # steps
    images: int = 10_000  # of the split, at most
    knn: int = 0  # labelled images to train on whose nearest say the class of those scored, as `val/knn`; 0 for none

    def __post_init__(self) -> None:
        if self.every < 1 or self.images < 1:
            raise ValueError(f"eval.every and eval.images must be at least 1, got {self.every} and {self.images}")
        if self.knn < 0:
            raise ValueError(f"eval.knn must be at least 0, got {self.knn}")


@dataclass(frozen=True)
class LogConfig:
    """How often a run tells what it does. None of this affects results."""

    every: int = 10  # steps between lines of metrics
    pictures: int = 500  # steps between pictures; 0 for none
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.every < 1 or self.pictures < 0:
            raise ValueError(
                f"log.every must be at least 1 and log.pictures at least 0, got {self.every}, {self.pictures}"
            )
