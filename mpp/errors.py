"""The errors that a user can mend, and how causes and names are put on one line."""


class UserError(ValueError):
    """One line that names the file or key, what was found and what was expected.

    The command line prints it and exits with status 2; any other exception is a bug and shows its traceback.
    """


def cause(error: BaseException) -> str:
    """Why something failed, on one line: the system's words alone, without number and file name, where it has some."""
    words = error.strerror if isinstance(error, OSError) else None
    return " ".join((words or str(error)).split()) or type(error).__name__


def shown(name: object) -> str:
    """A name or path that others chose, safe to print on one line."""
    return str(name) if str(name).isprintable() else ascii(str(name))


def counted(number: int, thing: str, things: str = "") -> str:
    """1 shard, 2 shards. things: where several have a name of their own, 2 classes."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"
