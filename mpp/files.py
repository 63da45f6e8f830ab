"""Writing files so that nothing half written passes for whole, and holding a folder for one process."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mpp.errors import UserError, cause


class FileError(UserError):
    """A file or folder can't be written."""


class BusyError(FileError):
    """Another process holds the folder."""


def cache_folder(kind: str) -> Path:
    """Where things are kept that can be made again: below what MPP_CACHE names, else below ~/.cache/mpp.

    Raises FileError where that is nowhere: as in containers, whose users may have neither HOME nor a name.
    """
    try:
        return Path(os.environ.get("MPP_CACHE") or "~/.cache/mpp").expanduser() / kind
    except RuntimeError as error:
        raise FileError(f"{kind} cannot be kept, as this user has no home folder; set MPP_CACHE to a folder") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the whole new one, also after a power cut."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise FileError(f"{path}: cannot be written: {cause(error)}") from None


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """So many bytes of an open file, fewer only where it ends: network file systems may give a part at a time."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


def refuse_unreadable(path: Path) -> None:
    """Raises OSError in the system's words: safetensors says of a file that may not be read that it is not there."""
    os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # opening a pipe would wait for a writer


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def claimed(folder: Path, busy: str) -> Iterator[None]:
    """Holds a folder for this process, however it ends; makes it where needed, and removes it if it stayed empty.

    Raises BusyError, with the text `busy`, if another process holds it.
    """
    lock, made = folder / ".lock", not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise FileError(f"{folder}: cannot be written to: {cause(error)}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:
                raise BlockingIOError  # its holder has just ended and deleted it
        except BlockingIOError:
            raise BusyError(f"{folder}: {busy}") from None
        except OSError as error:
            raise FileError(f"{folder}: cannot be locked: {cause(error)}") from None
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()
                if made:
                    folder.rmdir()  # goes only if it stayed empty


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Waits until no other process holds this lock; for moments, where `claimed` is for as long as a run lasts."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = file.open("w")
    except OSError as error:
        raise FileError(f"{file}: cannot be written: {cause(error)}") from None
    with held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
