"""Checkpoints: safetensors and JSON, written whole or not at all, and checked when they are read.

A checkpoint is a folder `step-00001000` with `model.safetensors`, `optimizer.safetensors`, perhaps `ema.safetensors`,
and `state.json`, which names the step and each file's SHA-256, and holds a checksum of itself: no byte of a checkpoint
can change unnoticed. It is written under another name and renamed when all of it is on the disk, so that a folder of
that name is complete.
"""

import hashlib
import logging
import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpp import jsons
from mpp.errors import UserError, cause, shown
from mpp.files import sealed, sync, unsealed

logger = logging.getLogger("mpp.checkpoint")

STATE = "state.json"
State = dict[str, dict[str, Tensor]]  # file name without ending -> its tensors


class CheckpointError(UserError):
    """A checkpoint can't be written, or does not fit."""


def save(
    folder: Path, step: int, state: State, metadata: dict[str, str], keep: int, kept: Collection[int] = ()
) -> Path:
    """Writes a checkpoint below `folder`, then deletes all but the last `keep`; CheckpointError on a full disk.

    kept: steps whose checkpoints are never deleted.
    """
    final, partial = folder / f"step-{step:08d}", folder / f".partial-{step:08d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        digests = {}
        for name, tensors in state.items():
            path = partial / f"{name}.safetensors"
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
            digests[path.name] = _digest(path)
        (partial / STATE).write_bytes(sealed({"step": step, "sha256": digests}))
        for path in [*partial.iterdir(), partial]:
            sync(path)
        shutil.rmtree(final, ignore_errors=True)  # one of this step that was found damaged
        partial.rename(final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        needed = -(-sum(tensor.nbytes for tensors in state.values() for tensor in tensors.values()) >> 20)
        raise CheckpointError(f"{final}: could not be saved ({error}); it needs {needed} MiB of disk") from error
    _clear(folder, step, keep, kept)
    return final


def _clear(folder: Path, newest: int, keep: int, kept: Collection[int]) -> None:
    """Deletes what is older than the last `keep`, what is later than the newest (it was found damaged and gone back
    from), and what killed saves left."""
    found = steps(folder)
    late = [step for step in found if step > newest]
    passing = [step for step in found if step <= newest and step not in kept]
    for step in passing[:-keep] + late:
        shutil.rmtree(folder / f"step-{step:08d}", ignore_errors=True)
    for partial in folder.glob(".partial-*"):
        shutil.rmtree(partial, ignore_errors=True)


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints below `folder`, rising."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())


def load(path: Path) -> tuple[int, State]:
    """Reads and checks one checkpoint; CheckpointError names the file that is not as it was written."""
    try:
        described = unsealed(path / STATE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / STATE}: not as it was written ({cause(error)})") from error
    try:
        step, digests = described["step"], described["sha256"]
        if path.name != f"step-{step:08d}":
            raise CheckpointError(f"{path / STATE}: is of step {step}, which its folder is not named for")
        state = {}
        for name, digest in digests.items():
            if name != Path(name).name:
                raise CheckpointError(f"{path}: names a file outside of it: {shown(name)}")
            if _digest(path / name) != digest:
                raise CheckpointError(f"{path / shown(name)}: not as it was written (cut or changed)")
            tensors = load_file(path / name)  # only maps the file, which training goes on to delete: hence copies
            state[name.removesuffix(".safetensors")] = {key: tensor.clone() for key, tensor in tensors.items()}
        return step, state
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not a whole checkpoint ({shown(cause(error))})") from error


def digest(path: Path) -> str:
    """A digest of what one checkpoint holds, by what it says of its files; CheckpointError if it does not say it."""
    try:
        digests = unsealed(path / STATE)["sha256"]
        return hashlib.sha256(jsons.text(digests, sort_keys=True).encode()).hexdigest()[:32]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint ({error})") from error


def load_latest(folder: Path) -> tuple[int, State] | None:
    """The newest checkpoint below `folder` that is whole; says which ones were passed over. None if there is none."""
    for step in reversed(steps(folder)):
        try:
            return load(folder / f"step-{step:08d}")
        except CheckpointError as error:
            logger.warning("%s; going back to the checkpoint before it", error)
    if steps(folder):
        logger.warning("%s: no checkpoint is whole; starting from the beginning", folder)
    return None


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as tensors named PARAMETER/ENTRY."""
    return {
        f"{name}/{entry}": value
        for name, parameter in module.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def restore(module: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Puts a checkpoint's tensors back; raises CheckpointError with the keys if they are not the module's."""
    if lacks := [name for name in ("model", "optimizer") if name not in state]:
        raise CheckpointError(f"the checkpoint has no {lacks[0]}.safetensors, which it needs to go on from")
    expected, found = dict(module.state_dict()), state["model"]
    wrong = sorted(expected.keys() ^ found.keys())
    wrong += [key for key in expected if key in found and expected[key].shape != found[key].shape]
    if wrong:
        names = ", ".join(map(shown, wrong[:5]))
        raise CheckpointError(f"the checkpoint is of another model: {names} missing, unknown or of another shape")
    parameters = dict(module.named_parameters())
    entries = [(key, *key.rpartition("/")[::2], value) for key, value in state["optimizer"].items()]
    if foreign := [key for key, name, _, value in entries if not _fits(value, parameters.get(name))]:
        raise CheckpointError(
            f"the checkpoint's optimizer is of another model: {', '.join(map(shown, foreign[:5]))} unknown or of "
            "another shape"
        )
    module.load_state_dict(found)
    # Adam's count of steps stays on the CPU, unless the optimizer is fused: then it is beside the parameter.
    fused = optimizer.defaults.get("fused")
    for _, name, entry, value in entries:
        parameter = parameters[name]
        optimizer.state[parameter][entry] = value.to(parameter.device) if value.ndim or fused else value


def _fits(value: Tensor, parameter: Tensor | None) -> bool:
    """Whether a tensor can be an optimizer's of this parameter: a number, such as a count of steps, or of its shape."""
    return parameter is not None and (not value.ndim or value.shape == parameter.shape)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
