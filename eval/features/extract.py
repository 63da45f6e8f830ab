"""Frozen features of the images of a split: extracted once, kept on disk, shared by all protocols.

They are kept as float16, in memory too, so that a result does not depend on whether they came from the disk: computed
in bfloat16 they carry 8 bits, averages over patches a few more, float16 holds 11 in half the bytes of float32. What
float16 has no room for (magnitudes of 6e4 and more) stays float32.
"""

import hashlib
import logging
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from mpp import budget, jsons
from mpp.data.read import read_shards
from mpp.errors import UserError, cause, shown
from mpp.files import FileError, refuse_unreadable, write_atomically
from mpp.hardware import autocast, device_of, multiplies_bfloat16
from mpp.models.encoder import Encoder
from mpp.models.vit import ViT
from mpp.shards.index import Index, ShardError, read_index

BATCH = 256  # images
FORMAT = 1  # of the files; raised when the same key would hold something else
LAST = 4  # blocks; what DINOv2's linear evaluation reads
SHALLOW = 12  # blocks up to which all are kept: in small encoders, and after masking, earlier ones are often best
MOST = 8 * 2**30  # bytes; where the features of all blocks would take more, only the last four are kept
HALF = 6e4  # float16 ends at 65504
NO_CACHE = (SafetensorError, OSError, ValueError, LookupError, TypeError)  # what cut and foreign files cause

logger = logging.getLogger("mpp.eval")


class ProbeError(UserError):
    """Shards or weights that nothing can be read off."""


@dataclass(frozen=True)
class Features:
    """What a frozen encoder makes of the labelled images of a split, in the shards' order."""

    parts: dict[str, Tensor]  # "class 6" and "average 6" after block 6, and "output": (n, d), float16 or float32
    output: str  # the part that is the encoder's own output vector
    labels: Tensor  # (n,) int64
    numbers: np.ndarray  # (n,) which images of the split these are, rising
    classes: tuple[str, ...]  # names by label

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def vectors(self) -> Tensor:
        """The encoder's own output of each image (n, d), float32."""
        return self.parts[self.output].float()

    @property
    def vector_parts(self) -> list[str]:
        """The parts that stand for an image as a whole: the output and, of a ViT, the last block's average patch."""
        averages = [name for name in self.parts if name.startswith("average ")]
        return list(dict.fromkeys([self.output, *sorted(averages, key=lambda name: int(name.split()[1]))[-1:]]))

    def choose(self, numbers: np.ndarray) -> "Features":
        """Those of some images of the split alone."""
        rows = torch.from_numpy(np.flatnonzero(np.isin(self.numbers, numbers)))
        parts = {name: part[rows] for name, part in self.parts.items()}
        return replace(self, parts=parts, labels=self.labels[rows], numbers=self.numbers[rows.numpy()])


def kept_blocks(encoder: Encoder, images: int) -> list[int]:
    """The blocks whose outputs are features, from 1: all of a shallow encoder, else the last four; none of a CNN."""
    if not isinstance(encoder, ViT):
        return []
    depth = encoder.config.depth
    bytes_of_all = 2 * images * depth * (1 + encoder.config.has_class_token) * encoder.config.width
    return list(range(1 if depth <= SHALLOW and bytes_of_all <= MOST else max(1, depth - LAST + 1), depth + 1))


def extract(
    encoder: Encoder, shards: str | Path, split: str, *, blocks: Sequence[int] | None = None, cache: Path | None = None
) -> Features:
    """The features of all images of a split that are whole and have a label, each centred as in evaluation.

    blocks: those of `kept_blocks` where not given. cache: a folder that keeps features; a file there that is cut, or
    not what its name says, is made anew.

    Of a ViT: the class token, if it has one, and the average patch after each of these blocks, after the last one with
    the encoder's final norm as in `forward`; and what `forward` gives where that is neither. Of any other encoder that.
    """
    index = read_index(shards, split)
    if not (index.label >= 0).any():
        raise ProbeError(f"{shards}: split {split} has no labels, and a probe needs them")
    if index.channels != encoder.config.channels:
        expected = encoder.config.channels
        raise ShardError(f"{shards}: images have {index.channels} channels, the encoder takes {expected}")
    chosen = kept_blocks(encoder, len(index)) if blocks is None else list(blocks)
    path = None if cache is None else cache / f"{key(encoder, index, chosen)}.safetensors"
    found = None if path is None else _load(path, len(index))
    if found is None:
        found = _compute(encoder, shards, split, chosen)
        if path is not None:
            _keep(path, found)
    numbers = found.pop("numbers").numpy()
    labels = torch.from_numpy(index.label[numbers].astype(np.int64))
    everything = Features(found, output_part(encoder), labels, numbers, index.classes)
    return everything if (labels >= 0).all() else everything.choose(numbers[labels.numpy() >= 0])


def output_part(encoder: Encoder) -> str:
    """The name of the part that is the encoder's own output vector."""
    if not isinstance(encoder, ViT):
        return "output"
    part = {"cls": "class", "avg": "average"}.get(encoder.config.pool)
    return f"{part} {encoder.config.depth}" if part else "output"


def key(encoder: Encoder, index: Index, blocks: Sequence[int]) -> str:
    """A digest of all that features depend on: weights, images, preprocessing, precision, and which blocks."""
    facts = {
        "format": FORMAT,
        "encoder": type(encoder).__name__,
        "config": asdict(encoder.config),
        "input": asdict(encoder.input),
        "mode": index.mode,
        "bfloat16": multiplies_bfloat16(device_of("auto")),
        "blocks": list(blocks),
    }
    digest = hashlib.sha256(jsons.text(facts, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for array in (index.key_bytes, index.key_ends, index.crc32, index.shard, index.offset, index.size, index.damaged):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def vectors(encoder: Encoder, images: Tensor, blocks: Sequence[int]) -> dict[str, Tensor]:
    """The features of images (b, c, h, w) on the encoder's device, each (b, d) float32, by the names of `Features`."""
    if not isinstance(encoder, ViT):
        return {"output": encoder(images).float()}
    outputs = encoder.encode(encoder.embed(images), layers=[block - 1 for block in blocks])
    found = {}
    for block, tokens in zip(blocks, outputs, strict=True):
        if block == encoder.config.depth:
            tokens = encoder.finish(tokens)
            if encoder.config.pool in ("avg_norm", "cls_avg", "map"):
                found["output"] = encoder.pool(tokens).float()
        if encoder.config.has_class_token:
            found[f"class {block}"] = tokens[:, 0].float()
        found[f"average {block}"] = encoder.patches(tokens).float().mean(1)
    return found


@torch.no_grad()
def _compute(encoder: Encoder, shards: str | Path, split: str, blocks: Sequence[int]) -> dict[str, Tensor]:
    """The parts (n, d) of all whole images of a split, and their numbers."""
    device, training = device_of("auto"), encoder.training
    encoder.to(device).eval()
    batches = read_shards(shards, BATCH, split=split, input=encoder.input, train=False)
    collected: dict[str, list[Tensor]] = {}
    for batch in tqdm(batches.iterate(), f"features of {split}", len(batches), unit="batch"):
        if not len(batch):
            continue  # all of its images are damaged
        with autocast(device):
            found = vectors(encoder, batch.images.to(device), blocks)
        for name, part in found.items():
            collected.setdefault(name, []).append(part.half().cpu() if part.abs().max() < HALF else part.cpu())
    encoder.train(training)
    good = ~batches.index.damaged
    good[list(batches.damaged)] = False
    if not good.any():
        raise ShardError(f"{shards}: every image of split {split} is damaged")
    parts = {name: torch.cat(collected.pop(name)) for name in list(collected)}  # one float32 batch makes a part float32
    if broken := [name for name, part in parts.items() if not part.isfinite().all()]:
        raise ProbeError(f"the encoder's features of split {split} are not finite ({', '.join(broken[:3])})")
    return {**parts, "numbers": torch.from_numpy(np.flatnonzero(good))}


def _keep(path: Path, found: dict[str, Tensor]) -> None:
    """Writes a file of the cache, whole or not at all; where that is not possible, the log says so once."""
    sums = {name: _checksum(tensor) for name, tensor in found.items()}
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"{path.parent}: cannot be made: {cause(error)}") from None
        write_atomically(path, save(found, {"mpp": jsons.text({"key": path.stem, "crc32": sums})}))
    except FileError as error:
        logger.warning("features are not kept: %s", error)


def _load(path: Path, images: int) -> dict[str, Tensor] | None:
    """The features of a file of the cache, or None where there is none that is whole and what its name says."""
    try:
        refuse_unreadable(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s: cannot be read: %s; computed anew", shown(path), cause(error))
        return None
    try:
        budget.check_safetensors(path)
        with safe_open(path, "pt") as file:
            facts = budget.json_of((file.metadata() or {})["mpp"])
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        numbers = found["numbers"]
        if facts["key"] != path.stem or {name: _checksum(tensor) for name, tensor in found.items()} != facts["crc32"]:
            raise ValueError("not what it was when it was written")
        if numbers.dtype != torch.int64 or not 0 <= int(numbers.min()) <= int(numbers.max()) < images:
            raise ValueError("of other images")
    except NO_CACHE as error:
        logger.warning("%s: made anew: cut, or no features of mpp (%s)", shown(path), cause(error))
        return None
    return found


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
