"""What every encoder has in common: images of any kind in, one vector an image out."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn


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
        nn.Module.__init__(self)  # not super(): a ViT is a trunk as well, which it puts together itself
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

    @property
    def undroppable(self) -> str | None:
        """Why the encoder can't do without some of the patches, by setting, or None if it can."""
        return self.config.undroppable

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
        pairs = {name: (there, here) for name, (there, here) in pairs.items() if there != here}
        if pairs:
            wrong = [f"{name} {there} there, {here} here" for name, (there, here) in pairs.items()]
            alike = " ".join(f"model.{name}={_in_yaml(there)}" for name, (there, _) in pairs.items())
            advice = "" if "name" in pairs else f"; to have it as there: {alike}"  # else nearly all is to be set
            raise ValueError(f"model: {'; '.join(wrong)}{advice}")


def _in_yaml(value: Any) -> str:
    """A setting's value as a recipe or the command line takes it."""
    if isinstance(value, tuple):
        return f"[{','.join(map(_in_yaml, value))}]"
    return "null" if value is None else str(value).lower() if type(value) is bool else str(value)


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives a module that was made on the "meta" device, as an encoder with its head, memory on the CPU and weights."""
    module.to_empty(device="cpu")
    for part in module.modules():
        if isinstance(part, Encoder):
            for name in ("mean", "std"):
                part.get_buffer(name).copy_(part._by_channel(name))
    module.load_state_dict(tensors)
