"""Tables of parts by name: those that mpp brings, those of a file that the user names, those of installed packages.

Nothing here imports torch. What a recipe names is looked up in such a table and never imported by its path, so that
recipes from anybody stay safe to open: code comes in by `--import` on the command line or by installing a package.
"""

import functools
import importlib
import importlib.util
import re
import sys
import types
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mpp.errors import UserError, cause, shown

T = TypeVar("T")

PLAIN = (int, float, bool, str, type(None))
OF_THE_CLASS = ("needs", "results", "metrics", "pictures")  # what a class of settings says of itself
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
imported: list[str] = []  # what `--import` has run in this process
_importing: list[str] = []  # what `--import` is running now, by the name that the user gave it


class ExtensionError(UserError):
    """A user's own part that can't be had: its file, its name, or the package that offers it."""


@dataclass(frozen=True)
class Kind:
    """A kind of encoder or objective: the settings that recipes give it, and what is made with them.

    maker: the class, or "module:name" of it, which is imported when one is first made: settings need no torch.
    """

    config: type[Any]
    maker: str | Callable[..., Any]

    def __post_init__(self) -> None:
        """Raises ExtensionError for settings that could not stand in a recipe."""
        if not (isinstance(self.config, type) and is_dataclass(self.config)):
            raise ExtensionError(f"{shown(self.config)}: expected the dataclass of the settings")
        hints = get_type_hints(self.config)
        for field in fields(self.config):
            place = f"{self.config.__name__}.{field.name}"
            if field.name in OF_THE_CLASS:
                raise ExtensionError(
                    f"{place}: belongs to the class; write it without a type, and no setting of that name"
                )
            if not _plain(hints[field.name]):
                allowed = "settings are int, float, bool, str, None, Literal and tuples of these"
                raise ExtensionError(f"{place}: is {hints[field.name]}; {allowed}")

    def make(self, *arguments: Any) -> Any:
        """The part itself."""
        return resolve(self.maker)(*arguments)


def _plain(hint: Any) -> bool:
    """Whether values of that type can stand in YAML and come back equal."""
    if hint in PLAIN or get_origin(hint) is Literal or (isinstance(hint, type) and is_dataclass(hint)):
        return True
    composed = get_origin(hint) in (tuple, Union, types.UnionType)
    return composed and all(part is ... or _plain(part) for part in get_args(hint))


def resolve(home: str | Callable[..., Any]) -> Callable[..., Any]:
    """What "module:name" means; anything else is it already."""
    if not isinstance(home, str):
        return home
    module, _, name = home.partition(":")
    return getattr(_imported(module), name)


def _imported(module: str) -> Any:
    """A module whose constants are plain tensors, whatever the default device is where it is first needed.

    Sizes are checked on torch's "meta" device: what is imported there would keep tensors without numbers for good.
    """
    torch = sys.modules.get("torch")
    with torch.device("cpu") if torch else nullcontext():
        return importlib.import_module(module)


class Table(Mapping[str, T], Generic[T]):
    """Parts of one sort by name.

    A package that offers more names them in its metadata, as entry points of the table's group. They are listed from
    there, and imported only when one is used: the module that such an entry point names then calls `add`.
    """

    def __init__(
        self, noun: str, group: str, sort: Callable[..., T], own: Mapping[str, T], reserved: Sequence[str] = ()
    ) -> None:
        """noun: for messages; group: of entry points; sort: makes a part of the arguments of `add`.

        reserved: words that mean something else where these names stand.
        """
        self.noun, self.group, self._sort, self._reserved = noun, group, sort, tuple(reserved)
        self._own, self._added = dict(own), dict[str, T]()
        self._origins: dict[str, str] = {}

    def add(self, name: str, *arguments: Any, **more: Any) -> T:
        """Adds a part under a name that is free; the arguments are those of the table's sort (Kind, Protocol).

        Raises ExtensionError for a name that is taken, or that could not stand in a recipe.
        """
        if not NAME.fullmatch(name):
            raise ExtensionError(
                f"{self._where()}{self.noun} {shown(name)!r}: a name is made of a-z, 0-9, - and _, expected such a one"
            )
        if name in self._reserved:
            raise ExtensionError(f"{self._where()}{self.noun} {name}: this word means something else; choose another")
        if name in self._own or name in self._added:
            whose = "mpp's own" if name in self._own else f"taken by {self._origins.get(name) or 'another part'}"
            raise ExtensionError(f"{self._where()}{self.noun} {name}: this name is {whose}; choose another")
        try:
            part = self._added[name] = self._sort(*arguments, **more)
        except UserError as error:
            raise ExtensionError(f"{self._where()}{self.noun} {name}: {error}") from None
        if _importing:
            self._origins[name] = _importing[-1]
        return part

    def is_own(self, name: str) -> bool:
        """Whether a part is one that mpp brings."""
        return name in self._own

    def origin(self, name: str) -> str | None:
        """The argument of `--import` by which a part came; None if it is mpp's, a package's, or was added in Python."""
        return self._origins.get(name)

    def __getitem__(self, name: str) -> T:
        offered = self._offered().get(name, [])
        if offered and name in self._own:
            raise ExtensionError(f"package {_package(offered[0])} offers the {self.noun} {name}, which mpp has itself")
        if len(offered) > 1:
            both = " and ".join(map(_package, offered[:2]))
            raise ExtensionError(f"packages {both} both offer the {self.noun} {name}; uninstall one")
        if offered and name not in self._added:
            self._import(name, offered[0])
        return {**self._own, **self._added}[name]

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._added or name in self._offered()

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._own, *self._added, *self._offered()]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _offered(self) -> dict[str, list[EntryPoint]]:
        return _offered_in(self.group, tuple(sys.path))

    def _import(self, name: str, point: EntryPoint) -> None:
        try:
            _imported(point.module)
        except (Exception, SystemExit) as error:  # another's code: whatever it raises is that package's fault
            raise ExtensionError(f"package {_package(point)}: {self.noun} {name}: {cause(error)}") from error
        if name not in self._added:
            raise ExtensionError(
                f"package {_package(point)}: its module {point.module} adds no {self.noun} {name}, as its metadata says"
            )

    def _where(self) -> str:
        return f"{_importing[-1]}: " if _importing else ""


@functools.lru_cache(maxsize=16)
def _offered_in(group: str, path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    """What installed packages offer, read once: to look through all metadata takes milliseconds."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, []).append(point)
    return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value


def import_parts(what: str) -> None:
    """Runs a Python file, or imports an installed module, that adds parts to the tables: `--import`.

    Neither its folder nor the current one is put on sys.path, where a `torch.py` among the images would be run.
    Raises ExtensionError, one line that names it.
    """
    path, is_file = Path(what), what.endswith(".py") or "/" in what
    if is_file and not path.is_file():
        raise ExtensionError(f"--import {shown(what)}: no such file")
    if is_file and path.suffix != ".py":
        raise ExtensionError(f"--import {shown(what)}: expected a .py file, or the name of an installed module")
    imported.append(what)
    with _origin(str(path.resolve()) if is_file else what):
        try:
            if is_file:
                _run_file(path.resolve())
            else:
                importlib.import_module(what)
        except ExtensionError:
            raise
        except ModuleNotFoundError as error:
            hint = "" if is_file else "; give an installed module, or the path of a .py file"
            raise ExtensionError(f"--import {shown(what)}: {cause(error)}{hint}") from error
        except (Exception, SystemExit) as error:  # the user's own code: whatever it raises is theirs to mend
            raise ExtensionError(f"--import {shown(what)}: {_place(error, path)}{cause(error)}") from error


@contextmanager
def _origin(what: str) -> Iterator[None]:
    _importing.append(what)
    try:
        yield
    finally:
        _importing.pop()


def _run_file(path: Path) -> None:
    name = f"mpp_import_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return  # given twice
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader  # noqa: PT018 (it ends in .py)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _place(error: BaseException, path: Path) -> str:
    """The line of the file that an error comes from, as far as it can be told."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == path.resolve():
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"line {line}: " if line else ""
