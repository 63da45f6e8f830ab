"""Writing files so that nothing half written or changed passes for whole, and holding a folder for one process."""

import errno
import fcntl
import functools
import glob
import hashlib
import itertools
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mpp import budget, jsons
from mpp.errors import UserError, cause

SEAL = "checksum"  # the last entry of a sealed file: the SHA-256 of the others as JSON
LONGEST = 40  # characters of a file's name that its temporary one repeats: names may have 255 bytes
ATTEMPTS = 100  # to lock a folder that others give up and delete at the same moment
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


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


def write_atomically(path: Path, data: bytes, *, private: bool = False) -> None:
    """Readers see the old file or the whole new one, also after a power cut and with several writers at once.

    private: for this user's eyes alone, from the first byte on.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        return _write_through(path, data)
    try:
        _sweep(path)
        with temporary(path.parent, _prefix(path)) as file:
            if private:
                os.fchmod(file.fileno(), 0o600)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        sync(path.parent)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {cause(error)}") from None


def _write_through(path: Path, data: bytes) -> None:
    """Into a pipe or a device such as /dev/stdout, in whose place no file may come."""
    try:
        with open(path, "wb") as file:
            file.write(data)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {cause(error)}") from None


def _prefix(path: Path) -> str:
    return f".{path.name[:LONGEST]}."


@functools.cache
def _sweep(path: Path) -> None:
    """Removes what writers of a file left that were killed; once a process, as it looks through the folder."""
    remove_left_over(path.parent, _prefix(path))


@contextmanager
def temporary(folder: Path, prefix: str) -> Iterator[IO[bytes]]:
    """A new file of a name of its own, deleted at the end unless it was renamed.

    Its lock tells it from one of a process that was killed, which `remove_left_over` deletes.
    """
    while True:
        path = folder / f"{prefix}{secrets.token_hex(6)}.part"
        with open(path, "x+b") as file:
            try:
                _lock(file, fcntl.LOCK_EX)
                if is_at(file, path):  # else it was taken for a left over one in the moment before it was locked
                    yield file
                    return
            finally:
                path.unlink(missing_ok=True)


def remove_left_over(folder: Path, prefix: str) -> None:
    """Deletes the temporary files of a prefix whose processes were killed."""
    for path in folder.glob(f"{glob.escape(prefix)}*.part"):
        with suppress(OSError), open(path, "r+b") as file:
            if _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) and is_at(file, path):
                path.unlink()


def _lock(file: IO[bytes], how: int) -> bool:
    """Whether the lock of an open file was got; not on a disk that knows no locks."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def is_at(file: IO[Any], path: Path) -> bool:
    """Whether an open file is still the one of that name, neither renamed nor deleted."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def sealed(facts: dict[str, Any], indent: int | None = 1) -> bytes:
    """JSON with a checksum of itself as its last entry, so that `unsealed` notices any change of any byte."""
    digest = hashlib.sha256(jsons.text(facts).encode()).hexdigest()
    return jsons.encoded({**facts, SEAL: digest}, indent=indent)


def unsealed(path: Path, indent: int | None = 1) -> dict[str, Any]:
    """What a sealed file holds; ValueError if a byte is not as it was written, OSError if it can't be read."""
    data = budget.content(path, budget.MOST_JSON)
    facts = budget.json_of(data)
    if not isinstance(facts, dict) or SEAL not in facts:
        raise ValueError("it has no checksum")
    del facts[SEAL]
    if sealed(facts, indent) != data:
        raise ValueError("its checksum is of something else")
    return facts


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
def claimed(folder: Path, busy: str, name: str = ".lock") -> Iterator[None]:
    """Holds a folder for this process, however it ends; makes it where needed, and removes it if it stayed empty.

    name: of the lock's file; by another name it is another lock. Raises BusyError, with the text `busy`, if another
    process holds it.
    """
    made = missing_folders(folder)
    with _claim(folder / name, busy):
        try:
            yield
        finally:
            with suppress(OSError):
                (folder / name).unlink()
                for one in made:
                    one.rmdir()  # goes only if it stayed empty


def missing_folders(folder: Path) -> list[Path]:
    """A folder and those above it, as far as they are not there; the innermost first."""
    return list(itertools.takewhile(lambda one: not one.exists(), (folder, *folder.parents)))


def _claim(lock: Path, busy: str) -> IO[str]:
    """A folder's lock file, locked; one that its last holder has just deleted is made anew."""
    folder = lock.parent
    for attempt in range(ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = lock.open("w")
        except OSError as error:
            gone = isinstance(error, (FileNotFoundError, FileExistsError))  # the folder, between two looks at it
            if gone and attempt < ATTEMPTS - 1:
                continue
            raise FileError(f"{folder}: cannot be written to: {cause(error)}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise BusyError(f"{folder}: {busy}") from None
        except OSError as error:
            file.close()
            raise FileError(f"{folder}: cannot be locked: {cause(error)}") from None
        if is_at(file, lock):
            return file
        file.close()
    raise BusyError(f"{folder}: {busy}")


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
