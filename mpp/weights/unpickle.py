"""torch's pickles, read by a machine of our own, which makes plain values and calls nothing but what stands here.

Python's pickle calls what a file names. torch's own safe unpickler does not, but believes what a file says of sizes
and places, and hashes whatever it finds. This one knows the opcodes of protocols 2 to 5 that torch's files use, and
makes of them dictionaries, lists, tuples, texts, numbers and tensors within the file's bounds. Its work is counted in
opcodes.
"""

import pickle
import re
import struct
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpp.budget import Work
from mpp.errors import shown

# A tensor takes some 40 opcodes: 100,000 tensors of a model and its optimizer, or a list of four million numbers.
MOST_OPCODES = 2**22
MOST_NUMBERS = 2**62
# No text is ever made of a value that is not known to be plain: to print nested tuples may never end, as to hash them.
PLAIN = str | bytes | int | float | None  # what a key may be, alone or in a tuple: hashing nested tuples may never end
MARK = object()


@dataclass(frozen=True)
class Storage:
    """Numbers of a file, as a pickle claims them: found by their key."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass
class Name:
    """A function or type that a pickle names."""

    name: str


class NumpyType:
    """Stands for numpy.dtype: the real one takes a state that can make it read and free any memory."""

    def __init__(self, code: str, *_: object):
        self.code, self.order = code, "="


def foreign(name: str) -> pickle.UnpicklingError:
    """The error for a pickle of something else."""
    expected = "expected tensors, plain values and argparse.Namespace"
    return pickle.UnpicklingError(f"{expected}, found a pickle of {shown(name)}; nothing in it was run")


def reason(error: BaseException) -> str:
    """Why a reader failed, in its first words: torch's errors run over paragraphs."""
    text = str(error).strip() or type(error).__name__
    return shown(text.splitlines()[0][:160])


class Machine:
    """Reads one pickle that stands at a place of some bytes; `end` is then where the next one begins.

    numbers: gives a storage's numbers (count,), of its dtype. Raises pickle.UnpicklingError, one line without the
    file's name, for what is no pickle of weights; Overrun; and whatever a damaged pickle leads to.
    """

    def __init__(self, data: memoryview, place: int, numbers: Callable[[Storage], Tensor]) -> None:
        self.data, self.end, self.numbers = data, place, numbers
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        work = Work(MOST_OPCODES, "opcodes of a pickle")
        while True:
            work.spend()
            code = self._bytes(1)[0]
            if code == pickle.STOP[0]:
                return self.stack.pop()
            if code not in OPCODES:
                raise pickle.UnpicklingError(f"a pickle with the opcode {bytes([code])!r}, which torch does not write")
            OPCODES[code](self)

    # What stands in the pickle

    def _bytes(self, count: int) -> memoryview:
        piece = self.data[self.end : self.end + count]
        if len(piece) < count:
            raise EOFError("a pickle that is cut")
        self.end += count
        return piece

    def _number(self, count: int) -> int:
        return int.from_bytes(self._bytes(count), "little")

    def _text(self, width: int) -> str:
        return str(self._bytes(self._number(width)), "utf-8", "surrogatepass")

    def _line(self) -> str:
        line = bytes(self.data[self.end : self.end + 1000]).split(b"\n", 1)[0]
        self.end += len(line) + 1
        return line.decode()

    # What is done with the stack

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _above_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise ValueError("a pickle without a mark")
        self.stack, found = self.stack[:at], self.stack[at + 1 :]
        return found

    def _tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("a pickle with too few values")
        at = len(self.stack) - count
        self.stack[at:] = [tuple(self.stack[at:])]

    def _remember(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def _append(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError("a pickle that appends to what is no list")
        self.stack[-1].extend(values)

    def _set(self, pairs: list[Any]) -> None:
        if type(self.stack[-1]) is not dict:
            raise TypeError("a pickle that sets items of what is no dictionary")
        self.stack[-1].update(by_key(zip(pairs[::2], pairs[1::2], strict=True)))

    def _pair(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _name(self, module: str, name: str) -> None:
        found = f"{module}.{name}"
        if found.replace("__builtin__", "builtins") not in KNOWN:
            raise foreign(found)
        self.stack.append(Name(found.replace("__builtin__", "builtins")))

    def _stack_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a pickle that names something by what is no text")
        self._name(module, name)

    def _call(self) -> None:
        arguments, named = self.stack.pop(), self.stack.pop()
        self._push(self.called(named, arguments))

    def called(self, named: Any, arguments: Any) -> Any:
        if not isinstance(named, Name) or named.name not in CALLS:
            raise foreign(f"a call of {named.name if isinstance(named, Name) else type(named).__name__}")
        if type(arguments) is not tuple:
            raise TypeError("a pickle that calls without arguments")
        return CALLS[named.name](self, *arguments)

    def _build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Namespace) and type(state) is dict:
            vars(made).update({name: value for name, value in state.items() if isinstance(name, str)})
        elif isinstance(made, NumpyType) and type(state) is tuple:
            made.order = state[1]
        # Of anything else, as the hooks and version of a state dict, there is nothing that matters here.

    def _storage(self) -> None:
        """The persistent id ("storage", type, key, place, count) of some numbers, and in old files a view of them."""
        kind, named, key, _, count, *view = self.stack.pop()
        if kind not in ("storage", b"storage") or not isinstance(named, Name) or named.name not in STORAGES:
            raise ValueError("a persistent id of something else than numbers")
        if type(count) is not int or not 0 <= count < MOST_NUMBERS or not isinstance(key, str | int):
            raise ValueError("a storage of impossible size, or without a key")
        numbers = self.numbers(Storage(str(key), STORAGES[named.name], count))
        if view and view[0] is not None:
            _, start, count = view[0]
            if type(start) is not int or type(count) is not int or not 0 <= start <= start + count <= len(numbers):
                raise ValueError("a view beyond a storage")
            numbers = numbers[start : start + count]
        self._push(numbers)

    # What may be called

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Tensor:
        """torch._utils._rebuild_tensor and _v2, (..., requires_grad, hooks, metadata)."""
        if not isinstance(storage, Tensor) or (more[2:] and more[2]):
            raise ValueError("a tensor without numbers, or with more than numbers")
        if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride) or len(size) > 64:
            raise ValueError("a tensor without shape and strides")
        if not all(type(number) is int and 0 <= number < MOST_NUMBERS for number in (offset, *size, *stride)):
            raise ValueError("a tensor of impossible shape or strides")
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if 0 not in size and last >= len(storage):
            raise ValueError(f"a tensor of shape {size} that goes to number {last} of {len(storage)}")
        return torch.as_strided(storage, size, stride, storage.storage_offset() + offset)

    def tensor_v3(self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *more: Any) -> Tensor:  # fmt: skip  # noqa: E501
        """Of types without a storage of their own: it is one of bytes."""
        if not isinstance(storage, Tensor) or not isinstance(dtype, Name) or dtype.name not in DTYPES:
            raise ValueError("a tensor without numbers")
        return self.tensor(storage.view(torch.uint8).view(DTYPES[dtype.name]), offset, size, stride, grad, hooks, *more)

    def of_type(self, named: Any, kind: Any, arguments: Any, state: Any) -> Any:
        """A tensor of a type of its own, as buffers are, or with attributes."""
        return self.called(named, arguments)

    def dictionary(self, pairs: Any = ()) -> dict[Any, Any]:
        return dict(pairs) if isinstance(pairs, dict) else by_key(pairs)

    def scalar(self, kind: Any, data: Any) -> float | int | bool:
        """numpy's scalars, as an optimizer's state or a best accuracy holds them."""
        if not isinstance(kind, NumpyType) or not isinstance(data, bytes):
            raise ValueError("a scalar of numpy without a type of numpy")
        if not isinstance(kind.order, str) or not isinstance(kind.code, str):
            raise ValueError("a type of numpy without a code")
        if not re.fullmatch(r"[<>=|][biuf][1248]", kind.order + kind.code):
            raise foreign(f"a scalar of numpy of type {kind.code!r}")
        return np.frombuffer(data, f"{kind.order}{kind.code}".replace("|", "="), count=1).item()

    def values(self, found: Any = ()) -> list[Any]:
        """A set, of which only is seen that it is no tensor."""
        return list(found) if isinstance(found, list | tuple) else []

    def data_of(self, found: Any = b"", *_: Any) -> bytes:
        """bytearray of bytes; of a number it would take that many."""
        if not isinstance(found, bytes):
            raise ValueError("a bytearray of something else than bytes")
        return found

    def encoded(self, text: Any, encoding: Any = "latin1") -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
            raise ValueError("bytes in an unknown encoding")
        return text.encode(encoding)


def by_key(pairs: Any) -> dict[Any, Any]:
    """Pairs as a dictionary; ValueError for keys that are no plain values, nor a tuple of some."""
    made = {}
    for key, value in pairs:
        if not isinstance(key, PLAIN) and not (type(key) is tuple and all(isinstance(part, PLAIN) for part in key)):
            raise ValueError(f"a key that is no plain value, but {type(key).__name__}")
        made[key] = value
    return made


def sparse(machine: Machine, *_: object) -> Tensor:
    """Stands for any sparse tensor, of which nothing is read."""
    return torch.empty(0, layout=torch.sparse_coo)


def elsewhere(machine: Machine, *_: object) -> Tensor:
    """Stands for a tensor that is none of plain numbers on the CPU."""
    return torch.empty(0, device="meta")


DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
STORAGES = {
    f"torch.{kind}Storage": getattr(torch, dtype)
    for kind, dtype in {
        "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
        "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64",
        "ComplexDouble": "complex128", "QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32", "Untyped": "uint8",
    }.items()
} | {"torch.storage.UntypedStorage": torch.uint8}  # fmt: skip
CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": Machine.tensor,
    "torch._utils._rebuild_tensor_v2": Machine.tensor,
    "torch._utils._rebuild_tensor_v3": Machine.tensor_v3,
    "torch._utils._rebuild_parameter": lambda machine, data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda machine, data, *_: data,
    "torch.nn.parameter.Parameter": lambda machine, data, *_: data,
    "torch._tensor._rebuild_from_type_v2": Machine.of_type,
    "torch._utils._rebuild_qtensor": elsewhere,
    "torch._utils._rebuild_sparse_tensor": sparse,
    "torch._utils._rebuild_nested_tensor": elsewhere,
    "torch._utils._rebuild_meta_tensor_no_storage": elsewhere,
    "torch.serialization._get_layout": lambda machine, *parts: None,
    "torch.Size": lambda machine, found=(): tuple(found),
    "torch.device": lambda machine, *parts: Name("torch.device"),
    "collections.OrderedDict": Machine.dictionary,
    "collections.Counter": Machine.dictionary,
    "builtins.set": Machine.values,
    "builtins.frozenset": Machine.values,
    "builtins.bytearray": Machine.data_of,
    "builtins.complex": lambda machine, *parts: complex(*parts),
    "_codecs.encode": Machine.encoded,
    "argparse.Namespace": lambda machine: Namespace(),
    "numpy.dtype": lambda machine, *arguments: NumpyType(*arguments),
    "numpy.core.multiarray.scalar": Machine.scalar,
    "numpy._core.multiarray.scalar": Machine.scalar,
    "pathlib.PosixPath": lambda machine, *parts: str(Path(*parts)),  # settings here, not places
    "pathlib._local.PosixPath": lambda machine, *parts: str(Path(*parts)),
}
TYPES = {
    "torch.Tensor",
    "torch.nn.parameter.Buffer",
    "torch.per_tensor_affine",
    "torch.per_channel_affine",
}  # named, never called
KNOWN = CALLS.keys() | DTYPES.keys() | STORAGES.keys() | TYPES


def _opcodes() -> dict[int, Callable[[Machine], Any]]:
    """By the byte: Python's Lib/pickletools.py says what each does."""
    double = struct.Struct(">d")
    table: dict[bytes, Callable[[Machine], Any]] = {
        pickle.PROTO: lambda m: m._bytes(1),
        pickle.FRAME: lambda m: m._bytes(8),
        pickle.MARK: lambda m: m._push(MARK),
        pickle.POP: lambda m: m.stack.pop(),
        pickle.POP_MARK: lambda m: m._above_mark(),
        pickle.NONE: lambda m: m._push(None),
        pickle.NEWTRUE: lambda m: m._push(True),
        pickle.NEWFALSE: lambda m: m._push(False),
        pickle.BININT: lambda m: m._push(int.from_bytes(m._bytes(4), "little", signed=True)),
        pickle.BININT1: lambda m: m._push(m._number(1)),
        pickle.BININT2: lambda m: m._push(m._number(2)),
        pickle.LONG1: lambda m: m._push(int.from_bytes(m._bytes(m._number(1)), "little", signed=True)),
        pickle.BINFLOAT: lambda m: m._push(double.unpack(m._bytes(8))[0]),
        pickle.BINUNICODE: lambda m: m._push(m._text(4)),
        pickle.SHORT_BINUNICODE: lambda m: m._push(m._text(1)),
        pickle.BINUNICODE8: lambda m: m._push(m._text(8)),
        pickle.SHORT_BINSTRING: lambda m: m._push(str(m._bytes(m._number(1)), "latin1")),  # of Python 2
        pickle.BINSTRING: lambda m: m._push(str(m._bytes(m._number(4)), "latin1")),
        pickle.SHORT_BINBYTES: lambda m: m._push(bytes(m._bytes(m._number(1)))),
        pickle.BINBYTES: lambda m: m._push(bytes(m._bytes(m._number(4)))),
        pickle.BINBYTES8: lambda m: m._push(bytes(m._bytes(m._number(8)))),
        pickle.EMPTY_TUPLE: lambda m: m._push(()),
        pickle.TUPLE1: lambda m: m._tuple(1),
        pickle.TUPLE2: lambda m: m._tuple(2),
        pickle.TUPLE3: lambda m: m._tuple(3),
        pickle.TUPLE: lambda m: m._push(tuple(m._above_mark())),
        pickle.EMPTY_LIST: lambda m: m._push([]),
        pickle.EMPTY_SET: lambda m: m._push([]),
        pickle.APPEND: lambda m: m._append([m.stack.pop()]),
        pickle.APPENDS: lambda m: m._append(m._above_mark()),
        pickle.ADDITEMS: lambda m: m._append(m._above_mark()),
        pickle.EMPTY_DICT: lambda m: m._push({}),
        pickle.SETITEM: lambda m: m._pair(),
        pickle.SETITEMS: lambda m: m._set(m._above_mark()),
        pickle.BINGET: lambda m: m._push(m.memo[m._number(1)]),
        pickle.LONG_BINGET: lambda m: m._push(m.memo[m._number(4)]),
        pickle.BINPUT: lambda m: m._remember(m._number(1)),
        pickle.LONG_BINPUT: lambda m: m._remember(m._number(4)),
        pickle.MEMOIZE: lambda m: m._remember(len(m.memo)),
        pickle.GLOBAL: lambda m: m._name(m._line(), m._line()),
        pickle.STACK_GLOBAL: lambda m: m._stack_name(),
        pickle.REDUCE: lambda m: m._call(),
        pickle.NEWOBJ: lambda m: m._call(),
        pickle.BUILD: lambda m: m._build(),
        pickle.BINPERSID: lambda m: m._storage(),
    }
    return {code[0]: deed for code, deed in table.items()}


OPCODES = _opcodes()
