"""The errors that a user can mend, signals to stop, and how causes and names are put on one line without secrets."""

import errno
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# An address begins here; one slash is what pathlib leaves of two.
SCHEME = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]+:/{1,2}(?=[^\s/])")
# What holds a secret by its name, wherever it stands: the query of a signed address, or a command's arguments.
NAMED = re.compile(
    r"(\b(?:(?i:\w*(?:secret|passw(?:or)?d|signature|credential|api_?key|access_?key)\w*|(?:access_|auth_)?token|sig)|"
    r"[A-Z0-9_]*_TOKEN)=)[^\s'\"&]+"
)
SENT = re.compile(r"""(authorization:\s*(?:\w+\s+)?|\s(?:-u|--user|--password|--token)[\s=])[^\s'"]+""", re.I)

LONGEST = 400  # characters of a name in a message; paths that people make have fewer
LONGEST_CAUSE = 1500  # characters of a cause; our own errors, which may be causes, have fewer
# What the system refuses whatever a program does: rights, disks, limits, and network file systems that fail.
REFUSALS = frozenset(
    getattr(errno, name)
    for name in (
        "EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "ESTALE", "EREMOTEIO", "ENOTCONN", "ETIMEDOUT",
        "EHOSTDOWN", "ENODEV", "ENXIO", "EMFILE", "ENFILE", "ENOMEM", "ELOOP", "ENAMETOOLONG", "ENOLCK", "EBUSY",
        "ETXTBSY", "ENOTSUP", "ESHUTDOWN",
    )
    if hasattr(errno, name)
)  # fmt: skip


class UserError(ValueError):
    """One line that names the file or key, what was found and what was expected, without the secrets of addresses.

    The command line prints it and exits with status 2; any other exception is a bug and shows its traceback.
    """

    def __init__(self, *words: object) -> None:
        super().__init__(*(without_secrets(word) if isinstance(word, str) else word for word in words))


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised as Ctrl-C is, so that work can be left in order."""


@contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM raise Terminated, and SIGUSR1, by which schedulers say that the time is nearly up."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    try:
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def cause(error: BaseException) -> str:
    """Why something failed, on one line: the system's words alone, without number and file name, where it has some.

    Libraries repeat what a file holds: characters that are no text are escaped, and long causes cut in the middle.
    """
    words = error.strerror if isinstance(error, OSError) else None
    text = printable(" ".join((words or str(error)).split())) or type(error).__name__
    return text if len(text) <= LONGEST_CAUSE else f"{text[: LONGEST_CAUSE // 2]}[...]{text[-LONGEST_CAUSE // 2 :]}"


ALLOCATOR = re.compile(r"allocate memory|not enough memory|out of memory|bad_alloc", re.I)  # in RuntimeErrors of torch
ASKED = re.compile(r"(?:tried to allocate|allocate) (\d+(?:\.\d+)?) (bytes|[KMGT]iB)", re.I)


def out_of_memory(error: BaseException) -> str | None:
    """What to say where memory ran out, of Python, numpy, or torch on a CPU or a GPU; None for any other error."""
    kind = type(error).__name__
    known = isinstance(error, MemoryError) or kind == "OutOfMemoryError"
    if not known and not (isinstance(error, RuntimeError) and ALLOCATOR.search(str(error))):
        return None
    asked = ASKED.search(str(error))
    if not asked:
        return "out of memory"
    size = f"{int(asked[1]) / 2**30:.3g} GiB" if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
    return f"out of memory, {size} asked for at once"


class OutOfMemory(UserError):
    """Memory ran out; the line says where, and what to lower."""


@contextmanager
def within_memory(doing: str, remedy: str) -> Iterator[None]:
    """Makes one line of memory that runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if words := out_of_memory(error):
            raise OutOfMemory(f"{doing}: {words}; {remedy}") from error
        raise


def refusal(error: OSError) -> str | None:
    """What the system refused, on one line that names the file where that is known; None for any other error."""
    if error.errno not in REFUSALS:
        return None
    names = [shown(name) for name in (error.filename, error.filename2) if name is not None and type(name) is not int]
    return ": ".join([*(" to ".join(names),) * bool(names), cause(error)])


def shown(name: object) -> str:
    """A name or path that others chose, safe to print on one line: escaped, and cut in the middle if it is long."""
    text = without_secrets(str(name))
    text = text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}[...]{text[-LONGEST // 2 :]}"
    return text if text.isprintable() else ascii(text)


def without_secrets(text: str) -> str:
    """A text whose addresses have no user and password, and nothing behind a `?` or `#`: these sign private objects.

    An address in quotes ends with them, any other one with a blank or where the next one begins.
    """
    starts = [match.start() for match in SCHEME.finditer(text)]
    parts = [text[start:end] for start, end in zip([0, *starts], [*starts, len(text)], strict=True)]
    for i in range(1, len(parts)):
        quote = parts[i - 1][-1:]
        ends = re.escape(quote) if quote and quote in "'\"" else r"""\s'">"""
        address, rest = re.fullmatch(rf"([^{ends}]*)(.*)", parts[i], re.S).groups()  # type: ignore[union-attr]
        parts[i] = bare_address(address) + rest
    return SENT.sub(r"\1...", NAMED.sub(r"\1...", "".join(parts)))


def bare_address(url: str) -> str:
    """One address without user and password, and with `?...` and `#...` for what stands behind these."""
    scheme, slashes, rest = re.fullmatch(r"([^:]*:)(/*)(.*)", url, re.S).groups()  # type: ignore[union-attr]
    inside = re.match(r"[^/?#]*@", rest, re.S)  # to the last @ before the path: a password may hold some
    if not inside and re.match(r"[^/?#@]*:(?!\d*(?:[/?#]|$))", rest):  # nor may one with / or # in it be seen
        inside = re.match(r".*@", rest, re.S)
    rest = rest[inside.end() :] if inside else rest
    place, mark, behind = re.fullmatch(r"([^?#]*)([?#]?)(.*)", rest, re.S).groups()  # type: ignore[union-attr]
    return f"{scheme}{slashes}{place}{mark}{'...' if behind else ''}"


def printable(text: object) -> str:
    """What a terminal shows as it stands: lines, with all characters that would steer it or turn its text escaped."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))


def counted(number: int, thing: str, things: str = "") -> str:
    """1 shard, 2 shards. things: where several have a name of their own, 2 classes."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"
