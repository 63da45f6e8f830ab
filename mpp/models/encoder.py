"""What every encoder has in common: images of any kind in, one vector an image out."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from mpp.errors import shown
from mpp.hints import fits

MOST_PIXELS = 2**16  # a side


@dataclass(frozen=True)
class EncoderConfig:
    """What images an encoder takes, and the name of its kind."""

    name: str
    image: tuple[int, int] = (224, 224)  # (h, w) pixels
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)  # of each channel, on [0, 1]; a single number serves all channels
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        self.check_types(vars(self))
        if min(self.image) < 1:
            raise ValueError(f"model.image must be at least 1x1 pixels, got {self.image}")
        if max(self.image) > MOST_PIXELS:
            raise ValueError(f"model.image must be at most {MOST_PIXELS} pixels a side, got {self.image}")
        if not 1 <= self.channels <= 1000:
            raise ValueError(f"model.channels must be 1 to 1000, got {self.channels}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(f"model.{name} needs 1 or {self.channels} numbers, got {len(getattr(self, name))}")
        if min(self.std) <= 0:
            raise ValueError(f"model.std must be positive, got {self.std}")

    @classmethod
    def check_types(cls, values: Mapping[str, Any]) -> None:
        """Raises ValueError for the first of some settings that is not of its field's type, or none of its choices."""
        hints = get_type_hints(cls)
        for name, value in values.items():
            if not fits(value, hints[name]):
                hint, found = hints[name], shown(repr(value)[:80])
                plain = hint.__name__ if hint in (int, float, bool, str) else hint
                expected = f"one of {', '.join(map(str, get_args(hint)))}" if get_origin(hint) is Literal else plain
                raise ValueError(f"model.{name} must be {expected}, got {found}")

    def describe(self) -> str:
        """The encoder in a few words, for tables."""
        return self.name


class Encoder(nn.Module):
    """`forward(images)` maps images (b, c, h, w) to vectors (b, width).

    Images are uint8, which the encoder normalises with the mean and std of its config, or float if they are already.
    """

    mean: Tensor
    std: Tensor
    width: int  # of the vectors
    layers: int  # that layer-wise decay counts: what comes before them is layer 0, what follows is layers + 1
    tokens: int  # of an image: what a CPU's micro-batch is measured by
    left_aside: tuple[str, ...] = ()  # tensors of the file it came from that are no part of it
    activation_checkpointing = False  # recompute a block in the backward pass instead of keeping what it computed
    looks_across_batch = False  # whether an image's vector depends, in training, on the others of its micro-batch

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        for name in ("mean", "std"):
            self.register_buffer(name, self._by_channel(name), persistent=False)  # kept in the config

    def _by_channel(self, name: str) -> Tensor:
        value = torch.tensor(getattr(self.config, name)).expand(self.config.channels).reshape(-1, 1, 1)
        return value.contiguous()

    def normalise(self, images: Tensor) -> Tensor:
        """Maps uint8 images to float32 with the encoder's mean and std; leaves float images as they are."""
        if images.dtype != torch.uint8:
            return images
        return (images.float() - 255 * self.mean) / (255 * self.std)

    def layer_of(self, parameter: str) -> int:
        """The layer, 0 to layers + 1, that a parameter of this name belongs to."""
        raise NotImplementedError

    def adopt(self, given: "Encoder") -> None:
        """Takes another encoder's weights, for images of any size; ValueError says which settings differ."""
        there, here = asdict(replace(given.config, image=self.config.image)), asdict(self.config)
        self._refuse({name: (there.get(name), here.get(name)) for name in {**there, **here}})
        self.load_state_dict(given.state_dict())

    def _refuse(self, pairs: dict[str, tuple[Any, Any]]) -> None:
        """Raises ValueError if the settings of another encoder and of this one, by name, are not alike."""
        for name in pairs.keys() & {"mean", "std"}:  # one number for all channels, or each its own: the same
            there, here = pairs[name]
            if set(there) == set(here) and len(set(here)) == 1:
                pairs[name] = here, here
        if wrong := [f"{name} {there} there, {here} here" for name, (there, here) in pairs.items() if there != here]:
            raise ValueError(f"model: {'; '.join(wrong)}")


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives a module that was made on the "meta" device, as an encoder with its head, memory on the CPU and weights."""
    module.to_empty(device="cpu")
    for part in module.modules():
        if isinstance(part, Encoder):
            for name in ("mean", "std"):
                part.get_buffer(name).copy_(part._by_channel(name))
    module.load_state_dict(tensors)
