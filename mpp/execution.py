"""How training is carried out on this machine: precision, compiling, threads, and how many images a forward pass."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from mpp import draws
from mpp.batch import Batch
from mpp.data.loader import Images
from mpp.devices import ROOM
from mpp.hardware import device_of, multiplies_bfloat16
from mpp.launch import launched
from mpp.objectives.base import Objective
from mpp.ranks import Ranks, here, of_group
from mpp.seeds import seed_of
from mpp.sharding import to_shard
from mpp.split import is_sharded, let_go, uncompiled
from mpp.train_config import Execution, TrainConfig
from mpp.watch import TrainingError

Loss = tuple[Tensor, dict[str, Tensor]]
Once = Callable[[str, Callable[[], Any]], Any]  # gives what a function chooses, under the name of what is chosen
# Tokens of a micro-batch on a CPU: below, throughput grows with the batch; above, activations leave the caches and take
# memory (`python -m benchmarks.step --sizes tiny32 --micro-batches 16 32 128`).
CPU_TOKENS = 8192
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # without it torch refuses CUDA's matrix products in deterministic mode


@contextmanager
def callers_state() -> Iterator[None]:
    """Puts back what training sets for the whole process: torch's generators, threads and deterministic mode."""
    threads, variable = torch.get_num_threads(), os.environ.get(WORKSPACE)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic, warn_only=warns)
            if variable is None:
                os.environ.pop(WORKSPACE, None)


def prepare_cuda(config: TrainConfig) -> None:
    """Asks cuBLAS for reproducible sums where `config` does: before any work on CUDA, as it is asked but once."""
    if config.deterministic:
        os.environ.setdefault(WORKSPACE, ":4096:8")


@contextmanager
def drawing(seed: int, step: int, batch: Batch, number: int = 0) -> Iterator[None]:
    """What is drawn inside is a function of (seed, step) and of each image's place in the whole batch (mpp.draws).

    What a part that is not mpp's draws from torch's generators is one of (seed, step, number), the micro-batch's.
    """
    _seed_generators(seed_of(seed, step, number), batch.images.device)
    keys = draws.keys_of(seed, step, batch.whole_places)
    with draws.drawing(keys.to(batch.images.device, non_blocking=True)):
        yield


def _seed_generators(seed: int, device: torch.device) -> None:
    """Seeds those that a micro-batch may draw from, which takes microseconds; torch.manual_seed sees to all devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def generators(device: torch.device) -> Tensor:
    """The state of torch's generators from which something on a device may draw."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return torch.cat([state.cpu() for state in states])


def sharing(images: Images) -> Ranks:
    """The processes that share each batch: those that `mpp.ranks.together` has joined or, for batches that are read in
    parts, those of a caller's own process group. TrainingError where the parts are not theirs."""
    ranks, part = here(), getattr(images, "part", None)
    if part is not None and part.ranks != ranks.size:
        ranks = of_group() if ranks.size == 1 else ranks
    if part is not None and (part.rank, part.ranks) != (ranks.rank, ranks.size):
        raise TrainingError(
            f"batches are read as part {part.rank} of {part.ranks}, and this is process {ranks.rank} of {ranks.size} "
            f"that train together; read with rank={ranks.rank}, ranks={ranks.size}"
        )
    if ranks.size == 1 and launched().size > 1:
        raise TrainingError(
            f"{launched().size} processes were started together, and each would train by itself, into one folder; "
            "train inside `with mpp.together():`"
        )
    return ranks


def check_shares(objective: Objective, config: TrainConfig, ranks: Ranks) -> None:
    """Raises TrainingError for what several processes can't train together."""
    part, rest = divmod(config.batch, ranks.size)
    if rest:
        raise TrainingError(
            f"train.batch ({config.batch}) must be a multiple of the number of processes, which is {ranks.size}"
        )
    if ranks.size > 1 and objective.needs.pairs and part % 2:
        raise TrainingError(
            f"train.batch ({config.batch}) gives each of {ranks.size} processes {part} images, which must be even: "
            f"{objective.config.name} mixes each with its neighbour"
        )
    if ranks.size > 1 and objective.encoder.looks_across_batch and device_of(config.device).type != "cuda":
        raise TrainingError(
            "batch norm looks across the whole batch, which several processes share on GPUs alone (torch's "
            "SyncBatchNorm); take model.norm: group, or one process"
        )


def at_once(what: str, choose: Callable[[], Any]) -> Any:
    """Makes a choice where it is asked for."""
    return choose()


def forward_pass(objective: Objective, config: TrainConfig, execution: Execution) -> Callable[[Batch], Loss]:
    """The forward pass in the precision of `execution`; parameters and their gradients are float32 in either.

    In bfloat16 on a CPU the parameters are cast once a pass and all activations follow, which is faster than autocast's
    casts of single operations. With `compile`, and on CUDA, it is autocast. Losses are float32 everywhere. Of a sharded
    objective mpp.sharding has seen to all of this.
    """
    objective.encoder.activation_checkpointing = config.activation_checkpointing
    plain = _plain_pass(objective, config, execution)

    def forward(batch: Batch) -> Loss:
        if not is_sharded(objective):  # which it may become only after this function is made
            return plain(batch)
        with nullcontext() if execution.compile else uncompiled():
            outputs = objective(batch)
        if not torch.is_grad_enabled():
            let_go(objective)
        return outputs

    return forward


def _plain_pass(objective: Objective, config: TrainConfig, execution: Execution) -> Callable[[Batch], Loss]:
    """The forward pass of an objective that is not sharded."""
    device = device_of(config.device)
    call: Callable[[Batch], Loss] = objective
    if execution.compile:
        # Not `objective.compile()`, which whoever else calls the objective, such as an evaluation, would compile again.
        call = torch.compile(objective, options={"deterministic": True} if config.deterministic else None)
    if execution.precision == "float32":
        return call
    if device.type == "cpu" and not execution.compile:
        norms = {id(p) for part in objective.modules() if isinstance(part, _BatchNorm) for p in part.parameters()}
        # Batch norm's statistics are float32 buffers, with which PyTorch takes float32 parameters only.
        lowered = [(name, p) for name, p in objective.named_parameters() if id(p) not in norms]

        def cast(batch: Batch) -> Loss:
            low = {name: parameter.bfloat16() for name, parameter in lowered}
            return functional_call(objective, low, (batch,))

        return cast

    def autocast(batch: Batch) -> Loss:
        with torch.autocast(device.type, torch.bfloat16):
            return call(batch)

    return autocast


def choose(objective: Objective, batches: Images, config: TrainConfig, once: Once = at_once) -> Execution:
    """A plain value for whatever `config` leaves to this machine; what it says itself stays.

    once: makes each choice, or gives it as it was made before for other runs of a comparison.

    Raises ValueError for a micro-batch that splits what an objective looks across: the batch, or pairs of neighbours.
    """
    prepare_cuda(config)
    device = device_of(config.device)
    multiplies = multiplies_bfloat16(device)
    precision, compile, micro_batch = config.precision, config.compile, config.micro_batch
    if precision == "auto":
        precision = once("precision", lambda: "bfloat16" if multiplies else "float32")
    if compile is None:
        # Compiled, sums are taken in an order that each process finds out by measuring.
        compile = not config.deterministic and once("compile", lambda: device.type == "cuda")
    threads = config.threads or once("threads", torch.get_num_threads)
    ranks = sharing(batches)
    check_shares(objective, config, ranks)
    part = config.batch // ranks.size  # what this process reads of a batch
    whole = Execution(precision, compile, threads, config.batch if objective.needs.whole_batch else part)
    if objective.needs.whole_batch and micro_batch not in ("auto", config.batch):
        raise ValueError(
            f"train.micro_batch ({micro_batch}) must be train.batch ({config.batch}): "
            f"{objective.config.name} looks across the whole batch"
        )
    if objective.needs.pairs and micro_batch != "auto" and micro_batch % 2 and micro_batch != config.batch:
        raise ValueError(
            f"train.micro_batch ({micro_batch}) must be even or train.batch ({config.batch}): {objective.config.name} "
            "mixes each image with its neighbour"
        )
    if micro_batch == "auto":
        if objective.needs.whole_batch or objective.encoder.looks_across_batch:
            return whole
        micro_batch = once("micro_batch", lambda: _micro_batch(objective, batches, config, whole))
    return replace(whole, micro_batch=micro_batch)


def _micro_batch(objective: Objective, batches: Images, config: TrainConfig, whole: Execution) -> int:
    """The largest part of the batch that fits in a GPU's memory, or in a CPU's caches."""
    part = whole.micro_batch
    sizes = [size for size in range(part, 0, -1) if part % size == 0]
    if objective.needs.pairs:
        sizes = [size for size in sizes if size % 2 == 0] or [part]
    if device_of(config.device).type == "cuda":
        return _largest_that_fits(objective, batches, config, whole, sizes)
    tokens = objective.encoder.tokens
    return next((size for size in sizes if size * tokens <= CPU_TOKENS), sizes[-1])


def _largest_that_fits(
    objective: Objective, batches: Images, config: TrainConfig, whole: Execution, sizes: list[int]
) -> int:
    """The first of falling sizes whose forward and backward pass fits in the GPU's memory."""
    device = device_of(config.device)
    images = batches.at(0).to(device)
    forward = forward_pass(objective.to(device), config, replace(whole, compile=False))  # eager needs the most memory
    # Held while trying: room for Adam's two averages and a running one, which come later, and for all else. Where they
    # are split, there is more than enough without: here weights and gradients are whole.
    held = 0 if to_shard(config, here()) else 3
    room = [torch.empty_like(parameter) for parameter in objective.parameters() for _ in range(held)]
    room.append(torch.empty(int(ROOM * torch.cuda.mem_get_info(device)[1]), dtype=torch.uint8, device=device))
    for size in sizes:
        try:
            forward(next(images.split(size)))[0].backward()
            return size
        except torch.OutOfMemoryError:
            continue
        finally:
            objective.zero_grad()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)  # what is logged is what training takes
    raise TrainingError("train.micro_batch: not even one image fits in the GPU's memory; take a smaller model or image")
