"""torch's pickles, read without calling anything but what torch allows of itself and a few harmless stand-ins."""

import io
import pickle
import pickletools
import re
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpp.errors import shown


def load(path: Path, mapped: bool, pickles: Callable[[], bytes]) -> Any:
    """What torch's unpickler makes of a file, which calls nothing but what torch allows and HARMLESS.

    mapped: whether the numbers stay in the file until they are used. pickles: gives the file's pickles, to say what is
    in one that is refused. Raises pickle.UnpicklingError, one line, without the file's name.
    """
    try:
        with path.open("rb") as file, _only(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another protocol: what can't be read is an error anyway
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        found = [foreign[1].removesuffix(".")] if foreign else _named(pickles())[:3]
        what = f"of {', '.join(map(shown, found))}" if found else f"that can't be read so ({reason(error)})"
        expected = "expected tensors, plain values and argparse.Namespace"
        raise pickle.UnpicklingError(f"{expected}, found a pickle {what}; nothing in it was run") from error


def reason(error: BaseException) -> str:
    """Why a reader failed, in its first words: torch's errors run over paragraphs."""
    text = str(error).split("WeightsUnpickler error: ")[-1].strip() or type(error).__name__
    return shown(text.splitlines()[0][:160])


_lock = threading.Lock()


@contextmanager
def _only(harmless: list[Callable | tuple[Callable, str]]) -> Iterator[None]:
    """Lets torch's unpickler call these beside its own and nothing else, whatever the program has allowed before."""
    with _lock:
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            with torch.serialization.safe_globals(harmless):
                yield
        finally:
            torch.serialization.add_safe_globals(before)


class _NumpyType:
    """Stands for numpy.dtype in pickles: the real one takes a state that can make it read and free any memory."""

    def __init__(self, code: str, *_: object):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def _number(kind: _NumpyType, data: bytes) -> float | int | bool:
    """Stands for numpy's scalars, as an optimiser's state or a best accuracy holds them."""
    if not re.fullmatch(r"[<>=|][biuf][1248]", f"{kind.order}{kind.code}"):
        raise pickle.UnpicklingError(f"a scalar of numpy of type {kind.code!r}")
    return np.frombuffer(data, f"{kind.order}{kind.code}".replace("|", "="), count=1).item()


def _path(*parts: str) -> str:
    """Stands for paths, which are settings here, not places."""
    return str(Path(*parts))


# What published checkpoints hold beside what torch allows of itself (tensors, dictionaries, lists, plain values).
HARMLESS: list[Callable | tuple[Callable, str]] = [
    (Namespace, "argparse.Namespace"),
    (_NumpyType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
    (_path, "pathlib.PosixPath"),
    (_path, "pathlib._local.PosixPath"),
]


OWN = r"torch\._utils\._rebuild_|torch(\.storage)?\.\w*Storage$|collections\.OrderedDict$|argparse\.Namespace$"


def _named(data: bytes) -> list[str]:
    """The types and functions that pickles name beside tensors, without loading them."""
    stream, texts, found = io.BytesIO(data), [""], []
    with suppress(Exception):  # the first byte that is no pickle any more
        while True:
            for code, value, _ in pickletools.genops(stream):
                if code.name == "GLOBAL":
                    found.append(str(value).replace(" ", "."))
                elif code.name == "STACK_GLOBAL":
                    found.append(".".join(texts[-2:]))
                elif isinstance(value, str):
                    texts.append(value)
    return [name for name in dict.fromkeys(found) if not re.match(OWN, name)]
