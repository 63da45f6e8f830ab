"""`mpp ...`: parses the command line and calls one function a verb."""

import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from mpp.cli.parser import parsed
from mpp.errors import UserError, printable, refusal
from mpp.extend import ExtensionError, import_parts
from mpp.workers import end_soon


def import_first(arguments: Sequence[str]) -> list[str]:
    """Carries out every `--import` of a command line, and gives the rest of it."""
    rest, words = [], iter(arguments)
    for word in words:
        if word == "--import" or word.startswith("--import="):
            what = word.partition("=")[2] or next(words, "")
            if not what:
                raise ExtensionError("--import: expected a .py file or an installed module behind it")
            import_parts(what)
        else:
            rest.append(word)
    return rest


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. Errors that a user can mend are one line on stderr, with exit status 2.

    With MPP_TRACEBACK=1 in the environment the traceback comes before that line.
    """
    (handler := logging.StreamHandler(sys.stderr)).setFormatter(_Printable("mpp: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # class names may hold what the terminal can't show
    try:
        options = parsed(import_first(sys.argv[1:] if arguments is None else arguments))
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # of `mpp plan RECIPE | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        raise SystemExit(1) from None
    except UserError as error:
        _refuse(error, str(error))
    except OSError as error:
        if (words := refusal(error)) is None:
            raise
        _refuse(error, words)
    except KeyboardInterrupt:
        print("mpp: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if remote := sys.modules.get("mpp.remote.cache"):
            remote.close_caches()  # what still waits for a server would keep Python from exiting
        if arguments is None:  # a process of its own
            end_soon(_status(sys.exc_info()[1]))


class _Printable(logging.Formatter):
    """Names and causes may come from anybody's file."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _status(ended: BaseException | None) -> int:
    """The exit status of a process that ends by an exception, or by none."""
    if not isinstance(ended, SystemExit):
        return int(ended is not None)
    return ended.code if isinstance(ended.code, int) else int(ended.code is not None)


def _refuse(error: Exception, words: str) -> NoReturn:
    if os.environ.get("MPP_TRACEBACK"):
        traceback.print_exception(error)
    print(f"mpp: {printable(' '.join(words.split()))}", file=sys.stderr)
    raise SystemExit(2) from None
