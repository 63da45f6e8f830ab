"""`mpp ...`: parses the command line and calls one function a verb."""

import argparse
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import NoReturn

from mpp.cli.parser import parsed
from mpp.errors import Terminated, UserError, out_of_memory, printable, refusal, terminable, without_secrets
from mpp.extend import ExtensionError, import_parts
from mpp.launch import Ended, LaunchError, launched, told_once
from mpp.workers import end_soon


class Discreet(logging.Formatter):
    """What anybody logs, libraries and their tracebacks too, without secrets; names in it may be anybody's."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(without_secrets(super().format(record)))


def _told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The traceback of a bug, which libraries' messages may be part of."""
    print(without_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Discreet("mpp: %(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("mpp").setLevel(logging.INFO)  # of others, such as torch, warnings alone
    if arguments is None:  # else the process is somebody else's
        sys.excepthook = _told
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # class names may hold what the terminal can't show
    try:
        with terminable():
            with told_once():
                options = parsed(import_first(sys.argv[1:] if arguments is None else arguments))
            _refuse_together(options)
            options.run(options)
            sys.stdout.flush()
    except BrokenPipeError:  # of `mpp plan RECIPE | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        raise SystemExit(1) from None
    except (MemoryError, RuntimeError) as error:
        if not (words := out_of_memory(error)):
            raise
        _refuse(error, f"{words}; take a smaller model, smaller images, or a machine with more")
    except Ended:
        raise SystemExit(1) from None
    except UserError as error:
        _refuse(error, str(error))
    except OSError as error:
        if (words := refusal(error)) is None:
            raise
        _refuse(error, words)
    except KeyboardInterrupt as stop:
        if launched().leads:
            print("mpp: stopped", file=sys.stderr)
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        raise SystemExit(128 + number) from None
    finally:
        if remote := sys.modules.get("mpp.remote.cache"):
            remote.close_caches()  # what still waits for a server would keep Python from exiting
        if arguments is None:  # a process of its own
            end_soon(_status(sys.exc_info()[1]))


def _refuse_together(options: argparse.Namespace) -> None:
    """Raises LaunchError for a verb that several processes were started with, and that one process carries out."""
    if launched().size > 1 and not options.shared:
        with told_once():
            raise LaunchError(
                f"{launched().size} processes were started together; pretrain and finetune train so, every other verb "
                "is one process: start it without torchrun"
            )


def _status(ended: BaseException | None) -> int:
    """The exit status of a process that ends by an exception, or by none."""
    if not isinstance(ended, SystemExit):
        return int(ended is not None)
    return ended.code if isinstance(ended.code, int) else int(ended.code is not None)


def _refuse(error: Exception, words: str) -> NoReturn:
    if os.environ.get("MPP_TRACEBACK"):
        _told(type(error), error, error.__traceback__)
    print(f"mpp: {printable(without_secrets(' '.join(words.split())))}", file=sys.stderr)
    raise SystemExit(2) from None
