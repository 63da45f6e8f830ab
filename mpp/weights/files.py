"""Files of weights as tensors by name, whoever wrote them, read without running anything that is in them."""

import itertools
import math
import pickle
import re
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from mpp import budget
from mpp.errors import UserError, cause, shown
from mpp.weights import prefixes, torch_files, unpickle


class WeightsError(UserError):
    """A file of weights is not there, not whole or not of a kind this library knows."""


@dataclass(frozen=True)
class Source:
    """What a file or folder of weights holds, on the CPU; every floating tensor in float32 and contiguous.

    Large tensors may be views of the file, which is then read only where they are used: whoever writes to the same
    file replaces it (as mpp.files does) and does not write into it.
    """

    path: Path  # what the user named
    tensors: dict[str, Tensor]  # by the file's names; nested dictionaries joined by '.'
    config: dict[str, Any] = field(default_factory=dict)  # config.json beside it (Hugging Face, timm)
    metadata: dict[str, str] = field(default_factory=dict)  # of safetensors
    args: dict[str, Any] = field(default_factory=dict)  # plain values of the settings that a checkpoint carries
    preprocessing: dict[str, Any] = field(default_factory=dict)  # preprocessor_config.json (Hugging Face)
    aside: tuple[str, ...] = ()  # parts of the file that are not the model's weights, as 'optimizer'
    picked: str = ""  # which of several models was taken, and how to take another: to be said


@dataclass(frozen=True)
class Contents:
    """What a file of torch or safetensors holds, before it is known which tensors are the model's."""

    found: dict[Any, Any]  # tensors by name, in dictionaries and lists of them and of anything else
    metadata: dict[str, str] = field(default_factory=dict)


# Of a folder the first that is there counts: safetensors before pickles.
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
# Where checkpoints keep a model that mpp.weights.prefixes does not know. The running average comes first, as in timm's
# load_checkpoint; the teacher is one too, and what DINO publishes.
MODELS = (
    "state_dict_ema",
    "model_ema",
    "teacher",
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "module",
    "student",
)
WRAPPERS = ("module.", "_orig_mod.", "module.")  # by DistributedDataParallel and compile, in either order
SETTINGS = ("args", "config", "cfg")
MOST_DIRECTORY = 2**25  # bytes of a zip's list of members: half a million arrays
SCALARS = bool | int | float | str


def read(path: str | Path, prefix: str | None = None) -> Source:
    """Reads a file of safetensors, npz or torch, known by its content, or a folder of Hugging Face or timm.

    prefix: what the names of the wanted tensors begin with, where a file holds several models: 'student.'; '.' for
        those that have nothing in front. It is left out of the names, as it is where there is only one model.

    Raises WeightsError, one line that names the file. No code in a file is run, and nothing is written.
    """
    path = Path(path)
    try:
        if path.is_dir():
            source = replace(_folder(path, prefix), path=path)
        elif path.name.endswith(".index.json") and path.is_file():
            source = _shards(path, prefix)
        else:
            source = _file(path, prefix)
    except OSError as error:
        raise WeightsError(f"{shown(path)}: cannot be read: {cause(error)}") from error
    if not source.tensors:
        raise WeightsError(f"{shown(path)}: holds no tensors")
    return source


def _folder(folder: Path, prefix: str | None) -> Source:
    for file in (folder / name for name in FOLDER_FILES):
        if file.exists():
            return _shards(file, prefix) if file.suffix == ".json" else _file(file, prefix)
    looked = f"neither encoder.safetensors nor a checkpoint of mpp, nor another's {', '.join(FOLDER_FILES)}"
    raise WeightsError(f"{shown(folder)}: holds no weights: {looked}")


def _shards(index: Path, prefix: str | None) -> Source:
    """Weights cut into several files, by the index that names each tensor's."""
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise WeightsError(f"{shown(index)}: expected 'weight_map' with a file for each tensor")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if re.search(r"[/\\:\0]", name) or name in ("", ".", ".."):
            raise WeightsError(f"{shown(index)}: names a file outside its folder: {shown(name)}")
        shard = index.parent / name
        with _damage_named(shard):
            contents = _opened(shard)
            found = contents.tensors if isinstance(contents, Source) else _all_tensors(contents.found, shard)
        wrong = sorted(found.keys() ^ {key for key, place in places.items() if place == name})
        if wrong:
            some = ", ".join(map(shown, wrong[:3]))
            raise WeightsError(f"{shown(shard)}: holds other tensors than {index.name} says: {some}")
        tensors |= found
    with _damage_named(index):
        return _beside(_model(Contents(dict(tensors)), index, tensors, prefix))


def _file(path: Path, prefix: str | None) -> Source:
    with _damage_named(path):
        contents = _opened(path)
        if isinstance(contents, Source):  # npz. Google's come without settings: a config.json beside them is another's
            return contents
        return _beside(_model(contents, path, _all_tensors(contents.found, path), prefix))


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Bytes that others chose make torch, numpy and safetensors raise anything; it becomes one line."""
    try:
        yield
    except (WeightsError, OSError):
        raise
    except budget.Overrun as error:
        raise WeightsError(f"{shown(path)}: {error}") from error
    except Exception as error:
        raise WeightsError(f"{shown(path)}: not whole, or damaged ({unpickle.reason(error)})") from error


def _opened(path: Path) -> Source | Contents:
    if not path.exists():
        raise WeightsError(f"{shown(path)}: is not there")
    if not path.is_file():
        raise WeightsError(f"{shown(path)}: is no file")
    with budget.opened(path) as file:
        head = file.read(512)
    return _reader(path, head)(path)


def _beside(source: Source) -> Source:
    folder = source.path.parent
    of_open_clip = source.path.name.startswith("open_clip_")  # beside which transformers' config may lie as well
    config = _json(folder / ("open_clip_config.json" if of_open_clip else "config.json"))
    preprocessing = {} if of_open_clip else _json(folder / "preprocessor_config.json")
    return replace(source, config=config, preprocessing=preprocessing)


def _reader(path: Path, head: bytes) -> Callable[[Path], Source | Contents]:
    """Who reads a file, by its first bytes."""
    text = head.lstrip().lower()
    if head.startswith(b"PK\3\4"):
        with budget.zip_archive(path, MOST_DIRECTORY) as archive:
            arrays = any(name.endswith(".npy") for name in archive.namelist())
        return _npz if arrays else _torch_zip
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27:
        return _safetensors
    if head[257:262] == b"ustar":
        found = "a tar archive, as torch wrote it before 2017, which cannot be read without running code"
    elif head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return _torch_legacy
    elif not head:
        found = "an empty file"
    elif head.startswith(b"version https://git-lfs"):
        found = "a pointer of git-lfs in place of the file: fetch it with 'git lfs pull'"
    elif text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        found = "a web page in place of the file: download it again"
    else:
        found = f"none of these (it begins with {head[:8]!r})"
    raise WeightsError(f"{shown(path)}: expected weights as safetensors, npz or a checkpoint of torch, found {found}")


def _safetensors(path: Path) -> Contents:
    budget.check_safetensors(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Contents(tensors, dict(file.metadata() or {}))


# npz


def _npz(path: Path) -> Source:
    """Arrays as numpy.savez writes them. Of a checkpoint of big_vision the parameters, without its 'params/'."""
    tensors: dict[str, Tensor] = {}
    with budget.zip_archive(path, MOST_DIRECTORY) as archive:
        names = Counter(member.filename for member in archive.infolist())
        prefix = next((p for p in ("params/", "opt/target/") if any(name.startswith(p) for name in names)), "")
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name == member.filename or names[member.filename] > 1:
                raise WeightsError(f"{shown(path)}: expected arrays, each once, found {shown(member.filename)}")
            if name.startswith(prefix):
                tensors[name.removeprefix(prefix)] = _array(archive, member, path)
    parts = {name.removesuffix(".npy").split("/")[0] for name in names if not name.startswith(prefix)}
    return Source(path, tensors, aside=tuple(sorted(parts)))


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> Tensor:
    """One array. numpy.load would make room for what the header claims before it looks what is there."""
    place = f"{shown(path)}: {shown(member.filename)}"
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = header(file)
        if dtype.hasobject:
            raise WeightsError(f"{place}: expected numbers, found a pickle of Python objects; nothing in it was run")
        data = file.read()  # to the end, where zipfile compares the checksum
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise WeightsError(f"{place}: {len(data)} bytes for shape {shape} of {dtype}")
    array = np.ndarray(shape, dtype, data, order="F" if columns_first else "C")
    if dtype == np.dtype("V2"):  # big_vision's bfloat16, which numpy has no name for: the upper half of a float32
        return torch.from_numpy((array.view("<u2").astype(np.uint32, order="C") << 16).view(np.float32))
    if dtype.kind not in "fbiu":
        raise WeightsError(f"{place}: expected numbers, found {dtype}")
    with np.errstate(over="ignore"):  # as torch's own conversion
        return torch.from_numpy(array.astype(np.float32 if dtype.kind == "f" else dtype.newbyteorder("="), order="C"))


# torch


def _torch_zip(path: Path) -> Contents:
    with budget.zip_archive(path, MOST_DIRECTORY) as archive:
        names = Counter(member.filename.split("/", 1)[-1] for member in archive.infolist())
        if "constants.pkl" in names:
            way = "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
            what = f"TorchScript, which is code; nothing was run. Where you trust it, `{way}` takes its weights out"
            raise WeightsError(f"{shown(path)}: expected weights, found {what}")
        if "data.pkl" not in names:
            raise WeightsError(f"{shown(path)}: a zip archive without arrays of numpy and without torch's data.pkl")
        if twice := [name for name, count in names.items() if count > 1]:
            raise WeightsError(f"{shown(path)}: expected a checkpoint of torch, found {shown(twice[0])} twice in it")
        pickled = next(member for member in archive.infolist() if member.filename.split("/", 1)[-1] == "data.pkl")
        return Contents(_unpickled(path, lambda: torch_files.from_zip(path, archive, pickled)))


def _torch_legacy(path: Path) -> Contents:
    return Contents(_unpickled(path, lambda: torch_files.from_legacy(path)))


def _unpickled(path: Path, load: Callable[[], Any]) -> dict[Any, Any]:
    try:
        found = load()
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{shown(path)}: {error}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{shown(path)}: expected tensors by name, found {type(found).__name__}")
    return found


# The model's tensors


def _all_tensors(found: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by its name, those of nested dictionaries joined by '.'."""
    tensors: dict[str, Tensor] = {}
    twice = set()
    for name, tensor in _flat(found, "", _Limit(path)):
        if name in tensors:
            twice.add(name)
        tensors[name] = tensor
    if twice:
        raise WeightsError(f"{shown(path)}: holds two tensors of the name {shown(min(twice))}")
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    budget.hold_expanded(needed, path.stat().st_size)
    return tensors


def _model(contents: Contents, path: Path, tensors: dict[str, Tensor], wanted: str | None) -> Source:
    """Those tensors of a file that are the model's, without what stands in front of their names, and the settings."""

    def same(one: str, other: str) -> bool:
        inside = [name.removeprefix(one) for name in tensors if name.startswith(one)]
        return all(other + name in tensors and tensors[one + name].equal(tensors[other + name]) for name in inside)

    try:
        choice = prefixes.choose(tensors, wanted, same) or prefixes.Choice(_usual(contents.found, tensors, path))
    except prefixes.Ambiguous as error:
        raise WeightsError(f"{shown(path)}: {error}") from error
    prefix = choice.prefix
    longer = tuple(other for other in choice.others if other.startswith(prefix))
    kept = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix) and not n.startswith(longer)}
    args, aside = _around(contents.found, tensors, prefix, path)
    if prefix.endswith("backbone."):
        beside = prefix.removesuffix("backbone.")
        heads = [name for name in tensors if name.startswith(beside + prefixes.HEADS_BESIDE)]
        kept |= {name.removeprefix(beside): tensors[name] for name in heads}
        aside = [name for name in aside if not heads or f"{name}." != prefixes.HEADS_BESIDE]
    picked = ""
    if choice.picked:
        others = ", ".join(shown(other or ".") for other in choice.others)
        picked = f"took the model under {shown(prefix or '.')} and left aside {others}; prefix= takes another"
    aside += sorted({shown(other.rstrip(".")) for other in longer})
    return Source(
        path, _in_float32(kept, path), metadata=contents.metadata, args=args, aside=tuple(aside), picked=picked
    )


def _usual(found: dict[Any, Any], tensors: dict[str, Tensor], path: Path) -> str:
    """What stands in front of the tensors of a model that no format has an anchor for, by the names of usual places."""
    prefix, limit = "", _Limit(path)
    for depth in itertools.count():
        limit.enter(found, depth)
        model = next((key for key in MODELS if isinstance(found.get(key), dict) and found[key]), None)
        if model is None:
            break
        prefix, found = f"{prefix}{model}.", found[model]
    for wrapper in WRAPPERS:
        if all(name.startswith(prefix + wrapper) for name in tensors if name.startswith(prefix)):
            prefix += wrapper
    return f"{prefix}backbone." if any(name.startswith(f"{prefix}backbone.") for name in tensors) else prefix


def _around(
    found: dict[Any, Any], tensors: dict[str, Tensor], prefix: str, path: Path
) -> tuple[dict[str, Any], list[str]]:
    """The settings beside the model that a prefix leads to, and what else is there that holds tensors."""
    args: dict[str, Any] = {}
    aside: list[str] = []
    limit, rest, above = _Limit(path), prefix, ""
    for depth in itertools.count():
        limit.enter(found, depth)
        args = args or next((plain for key in SETTINGS if (plain := _settings(found.get(key), limit))), {})
        key = next((k for k, value in found.items() if isinstance(value, dict) and rest.startswith(f"{k}.")), None)
        if key is None:
            break
        aside += [shown(k) for k, value in found.items() if k != key and isinstance(value, dict | Tensor)]
        found, rest, above = found[key], rest.removeprefix(f"{key}."), f"{above}{key}."
    parts: set[str] = set()
    for name in tensors:
        if name.startswith(above) and not name.startswith(prefix):
            inside, of = name.removeprefix(above).split("."), rest.split(".")
            parts.add(next(theirs for theirs, ours in zip(inside, of, strict=False) if theirs != ours))
    return args, aside + sorted(map(shown, parts))


class _Limit:
    """How deep and how large nested containers may be: those that hold themselves or each other often never end."""

    def __init__(self, path: Path):
        self.path, self.work = path, budget.Work(1_000_000, "values in dictionaries")

    def enter(self, container: Any, depth: int) -> None:
        try:
            self.work.spend(len(container))
            budget.hold(depth, 32, "dictionaries in each other")
        except budget.Overrun as error:
            raise WeightsError(
                f"{shown(self.path)}: holds dictionaries in dictionaries without end ({error})"
            ) from None


def _nests(value: Any) -> bool:
    """Whether a list that begins so is one of tensors, and not of plain values, of which there may be very many."""
    return isinstance(value, dict | list | tuple | Tensor)


def _flat(found: Any, prefix: str, limit: _Limit, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dictionaries and lists by their names, joined by '.'; what is no tensor is left out."""
    limit.enter(found, depth)
    for name, value in found.items() if isinstance(found, dict) else enumerate(found):
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, dict) or (isinstance(value, list | tuple) and any(map(_nests, value[:1]))):
            yield from _flat(value, f"{prefix}{name}.", limit, depth + 1)


def _settings(found: Any, limit: _Limit, depth: int = 0) -> dict[str, Any]:
    """The plain values of a Namespace or dictionary, also of nested ones; {} of anything else."""
    values = vars(found) if isinstance(found, Namespace) else found
    if not isinstance(values, dict):
        return {}
    limit.enter(values, depth)
    plain: dict[str, Any] = {}
    for name, value in values.items():
        if value is None or isinstance(value, SCALARS):
            plain[str(name)] = value
        elif isinstance(value, list | tuple):
            limit.enter(value, depth)
            if all(isinstance(one, SCALARS) for one in value):
                plain[str(name)] = value
        elif isinstance(value, dict | Namespace):
            plain[str(name)] = _settings(value, limit, depth + 1)
    return plain


def _in_float32(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    result = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            kind = "quantised" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
            raise WeightsError(f"{shown(path)}: {shown(name)}: expected a dense tensor, found one that is {kind}")
        tensor = tensor.detach()
        result[name] = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
    return result


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; {} without the file."""
    if not path.exists():
        return {}
    try:
        found = budget.json_file(path)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{shown(path)}: not readable as JSON: {cause(error)}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{shown(path)}: expected a JSON object, found {type(found).__name__}")
    return found
