"""torch's files of weights: where their numbers lie, in a zip and as torch wrote them before 1.6."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpp.weights.unpickle import Machine, Storage

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # torch/serialization.py


def from_zip(path: Path, archive: zipfile.ZipFile, pickled: zipfile.ZipInfo) -> Any:
    """What `data.pkl` of an archive holds. Numbers that are not packed stay in the file until they are used."""
    folder = pickled.filename.removesuffix("data.pkl")
    members = {member.filename: member for member in archive.infolist()}
    order = f"{folder}byteorder"
    turned = order in members and archive.read(order) == b"big"
    mapped = _mapped(path)
    found: dict[Storage, Tensor] = {}

    def numbers(storage: Storage) -> Tensor:
        if storage not in found:
            found[storage] = read(storage)
        return found[storage]

    def read(storage: Storage) -> Tensor:
        member = members[f"{folder}data/{storage.key}"]
        size = storage.count * storage.dtype.itemsize
        if size > member.file_size:
            raise ValueError(
                f"{storage.count} numbers claimed of {member.filename}, which has {member.file_size} bytes"
            )
        if member.compress_type == zipfile.ZIP_STORED:
            start = member.header_offset + 30  # a member's own header: 26 bytes, the lengths of its name and of more
            name, more = (int(mapped[at]) + 256 * int(mapped[at + 1]) for at in (start - 4, start - 2))
            data = mapped[start + name + more : start + name + more + size]
        else:
            data = torch.frombuffer(bytearray(archive.read(member)) or bytearray(1), dtype=torch.uint8)[:size]
        return _typed(data, storage, turned)

    data = memoryview(archive.read(pickled))
    return Machine(data, 0, numbers).load()


def from_legacy(path: Path) -> Any:
    """What a file holds as torch wrote it before 1.6: pickles one after another, then the numbers, each with its count.

    The pickle comes before it is known where its numbers lie; so it is read a second time.
    """
    mapped = _mapped(path)
    data, place, head = memoryview(mapped.numpy()), 0, []
    for expected in (MAGIC, VERSION, None):
        machine = Machine(data, place, _refused)
        head.append(machine.load())
        place = machine.end
        if expected is not None and head[-1] != expected:
            raise pickle.UnpicklingError("expected a pickle that torch wrote, found another one; nothing in it was run")
    if not isinstance(head[2], dict) or head[2].get("little_endian") is not True:
        raise ValueError("numbers of another order of bytes")
    claimed: dict[str, Storage] = {}

    def claim(storage: Storage) -> Tensor:
        if claimed.setdefault(storage.key, storage) != storage:
            raise ValueError("a storage that is named twice, with other sizes")
        return torch.empty(storage.count, dtype=storage.dtype, device="meta")

    machine = Machine(data, place, claim)
    machine.load()
    keys, places = Machine(data, machine.end, _refused), {}
    order = keys.load()
    at = keys.end
    if not isinstance(order, list) or not all(isinstance(key, str | int) for key in order):
        raise ValueError("no keys of its numbers")
    for key in map(str, order):
        storage, size = claimed[key], int.from_bytes(data[at : at + 8], "little")
        if size != storage.count:
            raise ValueError(f"{storage.count} numbers claimed where {size} are")
        places[key], at = at + 8, at + 8 + size * storage.dtype.itemsize
    if at > len(data) or claimed.keys() - places.keys():
        raise EOFError("its numbers are cut")

    def numbers(storage: Storage) -> Tensor:
        start = places[storage.key]
        return _typed(mapped[start : start + storage.count * storage.dtype.itemsize], storage, False)

    return Machine(data, place, numbers).load()


def _refused(storage: Storage) -> Tensor:
    raise ValueError("numbers where there are none")


def _mapped(path: Path) -> Tensor:
    """All bytes of a file, read only where they are used."""
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def _typed(data: Tensor, storage: Storage, turned: bool) -> Tensor:
    """Bytes as numbers (count,); they are copied where they lie at an odd place or in the other order of bytes."""
    size = storage.dtype.itemsize
    if len(data) < storage.count * size:
        raise EOFError("its numbers are cut")
    if not len(data):
        return torch.empty(0, dtype=storage.dtype)
    if turned:
        size = size // 2 if storage.dtype.is_complex else size
        data = data.reshape(-1, size).flip(1).reshape(-1)
    elif data.storage_offset() % size:
        data = data.clone()
    return data.view(storage.dtype)
