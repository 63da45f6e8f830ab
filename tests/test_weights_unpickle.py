"""The machine that reads torch's pickles: it reads what torch reads, and refuses at once what would never end."""

import pickle
import struct
import time
import tracemalloc
import zipfile
from collections import Counter, OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from test_weights_files import legacy, refused, rewritten, saved

from mpp.weights import unpickle
from mpp.weights.files import WeightsError, read
from mpp.weights.torch_files import from_legacy, from_zip

TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16,
]  # fmt: skip

UNTYPED = ("torch.float8_e4m3fn", "torch.uint16")


def loaded(path: Path):
    if not zipfile.is_zipfile(path):
        return from_legacy(path)
    with zipfile.ZipFile(path) as archive:
        [pickled] = [member for member in archive.infolist() if member.filename.endswith("/data.pkl")]
        return from_zip(path, archive, pickled)


def alike(found, expected) -> bool:
    if isinstance(expected, torch.Tensor):
        same = found.dtype == expected.dtype and found.shape == expected.shape and found.stride() == expected.stride()
        bits = [one.contiguous().reshape(-1).view(torch.uint8) for one in (found, expected)]
        return same and torch.equal(*bits)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(alike(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return type(found) is type(expected) and all(map(alike, found, expected)) and len(found) == len(expected)
    return found == expected


def content() -> dict:
    """What checkpoints hold: tensors of every type, views, shared numbers, parameters, and values around them."""
    numbers = torch.arange(24.0)
    kinds = {str(kind): (torch.rand(3, 4) * 9).to(kind) for kind in TYPES}
    views = {
        "turned": numbers.reshape(4, 6).t(), "part": numbers[5:11], "step": numbers[::5], "one": numbers[3],
        "same": numbers,
        "repeated": numbers[:3].expand(5, 3), "none": torch.empty(0, 3), "empty": torch.empty(4, 0)[:, :0],
    }  # fmt: skip
    values = [1, -1, 2**40, -(2**70), 1.5, True, None, "ü", "a" * 300, b"bytes", (1, (2,)), [], {}, {1: 2, (1, "a"): 3}]
    state = OrderedDict(a=torch.ones(2))
    state._metadata = {"": {"version": 1}}
    return {"kinds": kinds, "views": views, "values": values, "state": state, "counts": Counter("aab")}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("write", [saved, legacy])
def test_it_reads_what_torch_reads(write, protocol, tmp_path):
    expected = content()
    if write is legacy:  # of which torch itself reads none without a storage of their own
        expected["kinds"] = {name: found for name, found in expected["kinds"].items() if name not in UNTYPED}
    path = write(tmp_path / "x", expected, pickle_protocol=protocol)
    assert alike(loaded(path), torch.load(path, weights_only=False))


@pytest.mark.parametrize("write", [saved, legacy])
def test_parameters_and_tensors_of_other_types_are_their_numbers(write, tmp_path):
    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.mark = 3
    buffer = torch.nn.Buffer(torch.arange(4.0))
    path = write(tmp_path / "x", {"p": parameter, "b": buffer, "q": torch.nn.Parameter(torch.ones(1), False)})
    found = loaded(path)
    assert torch.equal(found["p"], torch.arange(3.0))
    assert torch.equal(found["b"], torch.arange(4.0))
    assert not any(tensor.requires_grad for tensor in found.values())


def test_numbers_in_the_other_order_of_bytes_are_turned(tmp_path):
    numbers = {
        str(kind): torch.arange(5).to(kind) for kind in (torch.float32, torch.int64, torch.uint8, torch.complex64)
    }
    path = saved(tmp_path / "x", numbers)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    widths = [4, 8, 1, 4]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            if "/data/" in name:
                width = widths[int(name.rpartition("/")[2])]
                data = np.frombuffer(data, f"V{width}").view(np.uint8).reshape(-1, width)[:, ::-1].tobytes()
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)
    assert alike(loaded(path), numbers)


# What would take for ever


NESTED = b")q\1" + b"h\1h\1\x86q\1" * 60  # a tuple of twice the one before, 60 times: to hash it takes 2^60 steps


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("key", b"}" + NESTED + b"K\1s."),
        ("keys", b"}(" + NESTED + b"K\1u."),
        ("set", b"c__builtin__\nset\n](" + NESTED + b"e\x85R."),
        ("set of protocol 4", b"\x8f(" + NESTED + b"\x90."),
        ("counter", b"ccollections\nCounter\n}" + NESTED + b"K\1s\x85R."),
        ("ordered", b"ccollections\nOrderedDict\n](" + NESTED + b"K\1\x86e\x85R."),
        ("key of numbers", b"(X\7\0\0\0storagectorch\nFloatStorage\n" + NESTED + b"X\3\0\0\0cpuK\1tQ."),
        ("count of numbers", b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\3\0\0\0cpu" + NESTED + b"tQ."),
        ("shape", b"ctorch._utils\n_rebuild_tensor\n(N" + NESTED + b"h\1h\1tR."),
        ("type of numpy", b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(" + NESTED + b"tRC\1xtR."),
        ("name", NESTED + b"X\1\0\0\0a\x93."),
        ("attribute", b"cargparse\nNamespace\n)\x81}" + NESTED + b"K\1sb."),
        ("many bytes", b"c__builtin__\nbytearray\n\x8a\6\0\0\0\0\0\1\x85R."),
        ("many numbers", b"ctorch\nFloatTensor\n\x8a\6\0\0\0\0\0\1\x85R."),
        ("mark", b"(" * 1000 + b"t."),
        ("text", b"X\xff\xff\xff\x7fa."),
        ("text of 8 bytes", b"\x8d" + b"\xff" * 8 + b"a."),
        ("empty stack", b"\x86."),
        ("nothing", b""),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_few_bytes_cost_little(name, code, old, tmp_path):
    began = time.process_time()
    if old:
        path = tmp_path / "x"
        head = b"".join(pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        path.write_bytes(head + b"\x80\2" + code + pickle.dumps([], 2))
    else:
        path = rewritten(saved(tmp_path / "x", {}), lambda _: b"\x80\2" + code)
    tracemalloc.start()
    assert refused(path).isprintable()
    assert tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()
    assert time.process_time() - began < 30  # the alarm: what is bounded is the work


def test_keys_of_the_numbers_of_an_old_file_are_plain(tmp_path):
    """What fuzzing found: texts were made of the keys, which for nested tuples never ends."""
    path = legacy(tmp_path / "x", {"w": torch.ones(2)})
    data = path.read_bytes()
    start = data.rfind(b"\x80\2]q\0")
    assert start > 0
    end = data.index(b".", start) + 1
    path.write_bytes(data[:start] + b"\x80\2](" + NESTED + b"e." + data[end:])
    refused(path, "not whole")


def test_opcodes_are_counted(tmp_path, monkeypatch):
    path = saved(tmp_path / "x", {"w": torch.ones(2), "history": [float(i) for i in range(1000)]})
    assert "w" in read(path).tensors
    monkeypatch.setattr(unpickle, "MOST_OPCODES", 1000)
    refused(path, "more than 1000 opcodes of a pickle, the limit")


def test_a_small_file_of_a_huge_pickle_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\2" + b"]0" * 2**24 + b"}.")
    assert (tmp_path / "x").stat().st_size < 2**17
    refused(tmp_path / "x", "opcodes of a pickle")


# Numbers that are not there


def tensor(count: int, offset: int, size: int, stride: int) -> bytes:
    """A pickle of a dictionary with one tensor, as torch writes it."""
    whole = lambda number: b"\x8a\x08" + struct.pack("<q", number)  # noqa: E731
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\3\0\0\0cpu" + whole(count) + b"tQ"
    shape = whole(offset) + whole(size) + b"\x85" + whole(stride) + b"\x85"
    return b"\x80\2}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(" + storage + shape + b"\x89)tRs."


@pytest.mark.parametrize(
    "claim",
    [
        (5, 0, 5, 1), (2**40, 0, 4, 1), (4, 1, 4, 1), (4, 4, 1, 1), (4, 0, 4, 2), (4, 0, 2**40, 1), (4, -1, 4, 1),
        (4, 0, 4, -1), (4, 0, -4, 1), (-4, 0, 4, 1), (4, 2**62, 4, 1), (4, 0, 2, 2**62), (2**62, 0, 2**62, 1),
    ],
)  # fmt: skip
def test_a_tensor_that_goes_beyond_its_numbers_is_refused(claim, tmp_path):
    path = saved(tmp_path / "x", {"w": torch.arange(4.0)})
    assert read(rewritten(path, lambda _: tensor(4, 0, 4, 1))).tensors["w"].tolist() == [0, 1, 2, 3]
    assert read(rewritten(path, lambda _: tensor(4, 1, 2, 2))).tensors["w"].tolist() == [1, 3]
    refused(rewritten(path, lambda _: tensor(*claim)), "not whole")


def test_two_members_of_one_name_are_refused(tmp_path):
    path = saved(tmp_path / "x", {"w": torch.arange(4.0)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y/data.pkl", pickle.dumps({}))
    refused(path, "data.pkl twice")


def test_an_archive_with_bytes_in_front_of_it_is_read_or_refused_as_one(tmp_path):
    path = saved(tmp_path / "x", {"w": torch.arange(4.0)})
    path.write_bytes(b"PK\3\4" + bytes(26) + path.read_bytes())
    with suppress(WeightsError):
        assert read(path).tensors["w"].tolist() == [0, 1, 2, 3]


def test_it_never_calls_what_is_not_in_its_table():
    machine = unpickle.Machine(memoryview(b""), 0, lambda storage: torch.empty(0))
    for named in (unpickle.Name("torch.float32"), unpickle.Name("torch.Tensor"), print, "print", None):
        with pytest.raises(pickle.UnpicklingError, match="nothing in it was run"):
            machine.called(named, ())
