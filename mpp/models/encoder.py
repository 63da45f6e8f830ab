"""What every encoder has in common: images of any kind in, one vector an image out."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from mpp.augment.input import Input
from mpp.errors import counted
from mpp.models.pictures import prepared


class PixelWarning(UserWarning):
    """Float images, which count as normalised, that look like pixels."""


class Encoder(nn.Module):
    """`forward(images)` maps images (b, c, h, w) to vectors (b, width).

    Images are uint8, which the encoder normalises with the mean and std of its config, or float of any precision if
    they are normalised already. `input` says how pictures become such images, and `prepare` makes them so.
    """

    mean: Tensor
    std: Tensor
    width: int  # of the vectors
    layers: int  # that layer-wise decay counts: what comes before them is layer 0, what follows is layers + 1
    tokens: int  # of an image: what a CPU's micro-batch is measured by
    left_aside: tuple[str, ...] = ()  # tensors of the file it came from that are no part of it
    activation_checkpointing = False  # recompute a block in the backward pass instead of keeping what it computed
    _looked = False  # whether float images have been looked at for good
    looks_across_batch = False  # whether an image's vector depends, in training, on the others of its micro-batch

    def __init__(self, config: Any) -> None:
        nn.Module.__init__(self)  # not super(): a ViT is a trunk as well, which it puts together itself
        self.config = config
        self.input = Input(config.image)  # what it is fed in evaluation; goes with the weights
        for name in ("mean", "std"):
            self.register_buffer(name, self._by_channel(name), persistent=False)  # kept in the config

    def _by_channel(self, name: str) -> Tensor:
        value = torch.tensor(getattr(self.config, name)).expand(self.config.channels).reshape(-1, 1, 1)
        return value.contiguous()

    def normalise(self, images: Tensor) -> Tensor:
        """Maps uint8 images to float32 with the encoder's mean and std; leaves the values of float images as they are.

        Other types are refused, a ValueError. In eval mode it warns (PixelWarning) where float images look like pixels:
        on a CPU it looks at each batch, elsewhere, where that waits for the device, at the first one.
        """
        if images.dtype == torch.uint8:
            return (images.float() - 255 * self.mean) / (255 * self.std)
        if not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype}, expected uint8 pixels of 0 to 255 (images.to(torch.uint8) if these are), "
                "or floats if they are normalised already"
            )
        if not (self.training or self._looked or torch.compiler.is_compiling() or torch.jit.is_tracing()):
            self.look(images)
        return images if images.dtype == torch.float32 else images.to(self.mean.dtype)

    def normalise_pixels(self, pixels: Tensor) -> Tensor:
        """The same for uint8 pixels (..., pixels * c), channels last, as patches are given."""
        times = pixels.shape[-1] // self.config.channels
        mean, std = self.mean.flatten().repeat(times), self.std.flatten().repeat(times)
        return (pixels.float() - 255 * mean) / (255 * std)

    def denormalise(self, images: Tensor) -> Tensor:
        """Maps normalised images of any value to the nearest uint8 ones."""
        return (255 * (images * self.std + self.mean)).round().clamp(0, 255).to(torch.uint8)

    def look(self, images: Tensor) -> None:
        """Warns if float images look like pixels of [0, 1] or of 0 to 255: see `PixelWarning`. Waits for the device."""
        if images.device.type == "meta" or not images.numel():
            return
        self._looked = images.device.type != "cpu"
        low, high = (float(value) for value in images.detach().aminmax())
        black = min(mean / std for mean, std in self._normalisation())  # how far below 0 it is, normalised
        white = max((1 - mean) / std for mean, std in self._normalisation())
        if low == high or low < 0 or not (high > 2 * white or (high <= 1 and black > 0)):
            return  # a single value is a stand-in for images; normalised ones hold values below 0
        what = "[0, 1]" if high <= 1 else "0 to 255"
        warnings.warn(
            f"float images count as normalised already, and these look like pixels on {what} (the least is {low:.3g}, "
            f"the largest {high:.3g}); give uint8, or what encoder.normalise makes of uint8; to switch this off: "
            "warnings.filterwarnings('ignore', category=mpp.PixelWarning)",
            PixelWarning,
            stacklevel=2,
        )

    def _normalisation(self) -> list[tuple[float, float]]:
        """Mean and std of each channel, or once for all."""
        mean, std = self.config.mean, self.config.std
        count = max(len(mean), len(std))
        return list(zip(mean * (count // len(mean)), std * (count // len(std)), strict=True))

    def check(self, images: Tensor) -> None:
        """Raises ValueError, which says what to do, unless these are images (b, c, h, w) of the encoder's channels."""
        channels = self.config.channels
        expected = f"expected a tensor of images (b, {channels}, h, w), uint8 or normalised"
        if not isinstance(images, Tensor):
            shape = f" of shape {tuple(images.shape)}" if hasattr(images, "shape") else ""
            raise ValueError(
                f"{expected}, got {type(images).__name__}{shape}; encoder.prepare(*pictures) makes one of files, PIL's "
                "images and arrays (h, w, c)"
            )
        shape, way = tuple(images.shape), ""
        if len(shape) == 3 and shape[0] == channels:
            way = "; a single image is images.unsqueeze(0)"
        elif len(shape) == 3 and shape[2] == channels:
            way = "; a single image with its channels last is images.permute(2, 0, 1).unsqueeze(0)"
        elif len(shape) == 4 and shape[1] != channels == shape[3]:
            way = "; with the channels last these are images.permute(0, 3, 1, 2)"
        if way or len(shape) != 4:
            raise ValueError(f"{expected}, got shape {shape}{way}")
        if shape[1] != channels:
            raise ValueError(f"the encoder takes {counted(channels, 'channel')}, got images with {shape[1]}")

    def prepare(self, *pictures: Any) -> Tensor:
        """Pictures of any size as the encoder is fed them in evaluation, by `input`: uint8 (b, c, h, w), on the CPU.

        pictures: paths of image files, PIL's images, and uint8 arrays (h, w, c) or (h, w). ValueError names others.
        """
        return prepared(pictures, self.config.channels, self.input)

    def resized(self, image: tuple[int, int] | None = None) -> Self:
        """A copy for images (h, w) of another size."""
        return self._copied(replace(self.config, image=image or self.config.image))

    def _copied(self, config: Any) -> Self:
        """An encoder of another config with these weights, fed as this one, but with images of its own size."""
        copy = type(self)(config)
        copy.adopt(self)
        copy.input, copy.left_aside = replace(self.input, image=config.image), self.left_aside
        return copy.train(self.training)

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
            alike = " ".join(f"model.{name}={in_yaml(there)}" for name, (there, _) in pairs.items())
            advice = "" if "name" in pairs else f"; to have it as there: {alike}"  # else nearly all is to be set
            raise ValueError(f"model: {'; '.join(wrong)}{advice}")


def in_yaml(value: Any) -> str:
    """A setting's value as a recipe or the command line takes it."""
    if isinstance(value, tuple):
        return f"[{','.join(map(in_yaml, value))}]"
    return "null" if value is None else str(value).lower() if type(value) is bool else str(value)


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives a module that was made on the "meta" device, as an encoder with its head, memory on the CPU and weights."""
    module.to_empty(device="cpu")
    for part in module.modules():
        if isinstance(part, Encoder):
            for name in ("mean", "std"):
                part.get_buffer(name).copy_(part._by_channel(name))
    module.load_state_dict(tensors)


def feed(module: nn.Module, input: Input) -> None:
    """Says of all encoders within a module that this is what they are fed, each with images of its own size."""
    for part in module.modules():
        if isinstance(part, Encoder):
            part.input = replace(input, image=part.config.image)
