"""The errors that a user can mend, and how causes and names are put on one line."""

import errno

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
    """One line that names the file or key, what was found and what was expected.

    The command line prints it and exits with status 2; any other exception is a bug and shows its traceback.
    """


def cause(error: BaseException) -> str:
    """Why something failed, on one line: the system's words alone, without number and file name, where it has some.

    Libraries repeat what a file holds: characters that are no text are escaped, and long causes cut in the middle.
    """
    words = error.strerror if isinstance(error, OSError) else None
    text = printable(" ".join((words or str(error)).split())) or type(error).__name__
    return text if len(text) <= LONGEST_CAUSE else f"{text[: LONGEST_CAUSE // 2]}[...]{text[-LONGEST_CAUSE // 2 :]}"


def refusal(error: OSError) -> str | None:
    """What the system refused, on one line that names the file where that is known; None for any other error."""
    if error.errno not in REFUSALS:
        return None
    names = [shown(name) for name in (error.filename, error.filename2) if name is not None and type(name) is not int]
    return ": ".join([*(" to ".join(names),) * bool(names), cause(error)])


def shown(name: object) -> str:
    """A name or path that others chose, safe to print on one line: escaped, and cut in the middle if it is long."""
    text = str(name) if len(str(name)) <= LONGEST else f"{str(name)[: LONGEST // 2]}[...]{str(name)[-LONGEST // 2 :]}"
    return text if text.isprintable() else ascii(text)


def printable(text: object) -> str:
    """What a terminal shows as it stands: lines, with all characters that would steer it or turn its text escaped."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))


def counted(number: int, thing: str, things: str = "") -> str:
    """1 shard, 2 shards. things: where several have a name of their own, 2 classes."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"
