"""What this machine can do, and the choices that follow from it."""

import os
import resource

import torch

from mpp.errors import UserError
from mpp.launch import launched
from mpp.train_config import DeviceName


class HardwareError(UserError):
    """A recipe asks for what this machine does not have."""


def device_kind(name: DeviceName) -> str:
    """The kind of the device a recipe names; "auto" is the fastest there is. HardwareError if this machine has none."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind, there in present.items() if there) if name == "auto" else name
    if not present[kind]:
        has = ", ".join(kind for kind, there in present.items() if there)
        raise HardwareError(f"train.device: this machine has no {kind}; it has {has}")
    return kind


def device_of(name: DeviceName) -> torch.device:
    """The device a recipe names; of several GPUs the one of this process. HardwareError if it has none."""
    kind, launch = device_kind(name), launched()
    if kind != "cuda" or launch.size == 1:
        return torch.device(kind)
    if launch.local >= (count := torch.cuda.device_count()):
        raise HardwareError(
            f"train.device: process {launch.local} of {launch.local_size} on this machine has no GPU of its own, as it "
            f"has {count}; start as many processes as it has GPUs (torchrun --nproc-per-node {count})"
        )
    return torch.device(kind, launch.local)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: by that itself where it is set."""
    count = torch.cuda.device_count()  # takes none of them up
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(count)]
    return [name.strip() for name in named.split(",")][:count]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; elsewhere float32 is as fast or faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def autocast(device: torch.device) -> torch.autocast:
    """Operations in bfloat16 where the device multiplies it in hardware, else in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device))


def peak_memory(device: torch.device) -> float:
    """The most memory used so far, MiB: of the device on CUDA, elsewhere of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts it in KiB
