"""A model as an ONNX file, which onnxruntime and many others run without torch: uint8 images in, logits or vectors out.

`onnx`, `onnxscript` and `onnxruntime` come with the extra `onnx`.
"""

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpp import jsons
from mpp.errors import UserError, cause
from mpp.export.origin import Given
from mpp.files import sync, write_atomically

FILE = "model.onnx"
OPSET = 20  # the first in which a GELU, exact or by tanh, is one operation; onnxruntime 1.17 (January 2024) knows it
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# A protobuf holds 2 GiB at most: larger weights lie in a second file beside it.
ONE_FILE = 1 << 30  # bytes of weights
BATCHES = (1, 2, 7)  # at which onnxruntime's numbers are compared
CLOSE = 2e-5  # of the largest magnitude: other kernels sum in another order


class OnnxError(UserError):
    """A model that can't be exported, or without the packages for it."""


def check_packages() -> None:
    """Raises OnnxError, which says what to install, where the extra is missing."""
    for package in PACKAGES:
        try:
            with _hushed():
                importlib.import_module(package)
        except ImportError as error:
            way = f"pip install {' '.join(PACKAGES)} (the extra `onnx` of mpp)"
            raise OnnxError(f"--to onnx needs the package {package} ({cause(error)}); {way}") from error


def write(given: Given, images: Tensor, folder: Path) -> None:
    """Writes the model into a folder, for images of that shape and any number of them.

    The graph is written as it was traced: each tensor keeps its name, and whoever runs the file simplifies the graph
    when it is loaded.
    """
    check_packages()
    with _hushed():
        # Without `strict`, len() of a tensor would fix the batch to the example's.
        batch = {"images": {0: torch.export.Dim("batch", min=1)}}
        try:
            traced = torch.export.export(_Whole(given), (images,), dynamic_shapes=batch, strict=True)
            made = torch.onnx.export(
                traced,
                input_names=["images"],
                output_names=[output_name(given)],
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise OnnxError(f"onnx: torch can't export this model: {cause(error)}") from error
        assert made is not None, "the exporter by dynamo gives a program"
        for node in made.model.graph.all_nodes():
            node.metadata_props.clear()  # where in the source each came from, more than the weights of a small model
        made.model.metadata_props.update(metadata(given))
        if sum(tensor.numel() * tensor.element_size() for tensor in given.model.state_dict().values()) < ONE_FILE:
            write_atomically(folder / FILE, made.model_proto.SerializeToString())
        else:
            made.save(folder / FILE, external_data=True)
            for file in folder.iterdir():
                sync(file)


class _Whole(nn.Module):
    """The model, in which an encoder by itself has the name that it has in a classifier.

    A name with a dot in it can't meet one that the exporter makes up for what is computed, such as "mean".
    """

    def __init__(self, given: Given) -> None:
        super().__init__()
        self.encoder, self.head = given.encoder, given.head

    def forward(self, images: Tensor) -> Tensor:
        vectors = self.encoder(images)
        return vectors if self.head is None else self.head(vectors)


def output_name(given: Given) -> str:
    return "vectors" if given.head is None or given.projects else "logits"


def metadata(given: Given) -> dict[str, str]:
    """What the file says of itself beside its graph; JSON where it is more than a word."""
    config = given.encoder.config
    found: dict[str, Any] = {
        "model": config.describe(),
        "image": list(config.image),  # (h, w) pixels
        "input": asdict(given.encoder.input),  # how a picture becomes one: the fields of mpp.Input
        "channels": config.channels,
        # Done inside: the input is pixels as they are, 0 to 255.
        "mean": list(config.mean),
        "std": list(config.std),
    }
    if given.classes and not given.projects:
        found["classes"] = list(given.classes)
    return {
        f"mpp.{name}": value if isinstance(value, str) else jsons.text(value, ensure_ascii=False)
        for name, value in found.items()
    }


def pairs(given: Given, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's weights and those in the file, by name, as far as the graph uses them."""
    import onnx

    found = {tensor.name: tensor for tensor in onnx.load(folder / FILE).graph.initializer}
    own = {name: value for name, value in _Whole(given).state_dict().items() if name in found}
    # onnx's arrays may be views that can't be written to, of which torch warns
    return own, {name: torch.from_numpy(np.array(onnx.numpy_helper.to_array(found[name]))) for name in own}


class Session(nn.Module):
    """The written model as onnxruntime runs it, on the CPU."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        # By path, as weights beside the file are found so.
        self.session = onnxruntime.InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {"images": images.numpy()})[0])


def usage(given: Given) -> str:
    """Python that runs the file with onnxruntime."""
    config, name = given.encoder.config, output_name(given)
    count = given.encoder.width if given.head is None else given.head.linear.out_features
    shape = f"1, {config.channels}, {config.image[0]}, {config.image[1]}"
    classes = ', and the classes of the logits in "mpp.classes"' if given.classes and not given.projects else ""
    return f"""\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{FILE}")
images = np.random.randint(0, 256, ({shape}), dtype=np.uint8)  # normalised inside; any number at once
({name},) = session.run(None, {{"images": images}})  # (1, {count})
about = session.get_modelmeta().custom_metadata_map  # JSON: size, mean and std{classes}
"""


@contextmanager
def _hushed() -> Iterator[None]:
    """Without what exporters say of themselves: what was written is read back and compared."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
