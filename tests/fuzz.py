"""Spoils files of every kind that mpp reads and looks what its readers make of them.

    python tests/fuzz.py --inputs 100000 [--seed 1] [--reader NAME] [--counts tests/fuzz.json] [--found FOLDER]

A spoilt file may be read or refused by a UserError of one line. Found is: any other exception, a line that can't be
printed, a warning or a print of another library, a file written outside, a connection or a process that is started,
memory over the limit, CPU time over the limit, the end of the process. Each input follows from seed, reader and number
alone; those that found something are kept with what it was. Counts are added to a file, from whose numbers the next run
goes on.
"""

import argparse
import json
import logging
import os
import platform
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
sys.dont_write_bytecode = True

import fuzz_mutations as ways  # noqa: E402
from fuzz_readers import READERS  # noqa: E402

from mpp.errors import UserError  # noqa: E402

ADDRESSES = 2**33  # bytes of addresses that it may take
SECONDS = 20  # of CPU; the readers' own limits are of work
PATIENCE = 60  # seconds without an answer; the machine may be busy with other things
LIFE = 500  # inputs of one worker
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.rmdir", "os.truncate", "shutil.rmtree")
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn")


def spoilt(seeds: list[bytes], reader: str, seed: int, number: int) -> bytes:
    """The input of that number."""
    drawn = random.Random(f"{seed} {reader} {number}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zipfile, about what it is told to write
        return ways.several(drawn, drawn.choice(seeds), tuple(READERS[reader].ways))


class Watch:
    """Looks in one process at what reading an input does beside its answer."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen, self.on = str(folder), [], False
        self.clear = os.open("/proc/self/clear_refs", os.O_WRONLY)
        self.printed = os.open(folder / "printed", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(self.printed, 2)
        sys.addaudithook(self.event)
        warnings.resetwarnings()
        logging.getLogger().addHandler(handler := logging.Handler(logging.WARNING))
        handler.emit = lambda record: None if record.name.startswith("mpp") else self.seen.append(f"log: {record.name}")
        logging.getLogger("mpp").propagate = True

    def event(self, name: str, arguments: tuple) -> None:
        if not self.on:
            return
        writes = name == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        if writes or name in CHANGES:
            self.change(name, arguments[0])
        elif name in STARTS:
            self.seen.append(f"started: {name}")
        elif name == "socket.connect" and arguments[1][0] != "127.0.0.1":
            self.seen.append("connected")

    def change(self, name: str, path: object) -> None:
        place = os.path.abspath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else self.folder
        if not place.startswith(self.folder) and place != os.devnull:
            self.seen.append(f"changed outside: {name} {place}")

    def memory(self) -> int:
        text = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+)", text)[1]) * 1024  # type: ignore[index]

    def read(self, reader: str, data: bytes, place: Path) -> tuple[str, str]:
        """What became of an input: read, refused or found, and what was found."""
        os.write(self.clear, b"5")  # the highest memory so far starts anew
        before, began, self.seen, self.on = self.memory(), time.process_time(), [], True
        what, words = "read", ""
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always", append=True)  # behind what mpp switches off itself
                READERS[reader].read(place, data)
        except (UserError, *READERS[reader].answers) as error:
            what, words = "refused", str(error)
            if not words.isprintable() or len(words) > 3000:
                self.seen.append(f"message: not one printable line: {words[:200]!r}")
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)
            own = next(
                (frame for frame in reversed(last) if "/mpp/" in frame.filename or "/eval/" in frame.filename), last[-1]
            )
            self.seen.append(f"{type(error).__name__} in {Path(own.filename).name} {own.name}: {str(error)[:200]}")
        finally:
            self.on = False
        self.seen += [f"warning: {one.category.__name__}: {str(one.message)[:200]}" for one in warned]
        if (grown := self.memory() - before) > READERS[reader].memory:
            self.seen.append(f"memory: {grown >> 20} MiB")
        if (took := time.process_time() - began) > SECONDS:
            self.seen.append(f"time: {took:.0f} s of CPU")
        text = re.sub(rb"\rindex: .*\n?", b"", os.pread(self.printed, 2**20, 0))  # our own progress
        if text and reader != "tiff":  # libtiff complains there, which Pillow doesn't keep it from
            self.seen.append(f"printed: {text[:200]!r}")
        os.ftruncate(self.printed, 0)
        return ("found", "; ".join(self.seen)) if self.seen else (what, words)


def work(reader: str, seeds: list[bytes], seed: int, numbers: range, pipe: int, folder: Path) -> None:
    """Reads inputs in this process and tells of each before and after."""
    watch, place = Watch(folder), folder / "place"
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    place.mkdir()
    os.chdir(place)
    for number in numbers:
        data = spoilt(seeds, reader, seed, number)
        os.write(pipe, json.dumps([number]).encode() + b"\n")
        os.write(pipe, json.dumps([number, *watch.read(reader, data, place)]).encode() + b"\n")


def answers(reader: str, seeds: list[bytes], seed: int, numbers: range):
    """Yields (number, what became of it, words) of inputs, which workers read one after another."""
    left = numbers
    while left:
        folder = Path(tempfile.mkdtemp(prefix="mpp-fuzz-"))
        receive, send = os.pipe()
        if not (child := os.fork()):
            os.close(receive)
            try:
                work(reader, seeds, seed, left[:LIFE], send, folder)
            except BaseException:
                os.write(send, json.dumps([-1, "found", traceback.format_exc()]).encode() + b"\n")
            os._exit(0)
        os.close(send)
        current, buffer, killed = left[0], b"", False
        done = left[0]
        while True:
            if not select.select([receive], [], [], PATIENCE)[0]:
                os.kill(child, signal.SIGKILL)
                killed = True
            if not (piece := os.read(receive, 2**16)):
                break
            *rows, buffer = (buffer + piece).split(b"\n")
            for number, *answer in map(json.loads, rows):
                current = number if number >= 0 else current
                if answer:
                    done = current + 1
                    yield current, *answer
        os.close(receive)
        status = os.waitpid(child, 0)[1]
        shutil.rmtree(folder, ignore_errors=True)
        if status:
            yield current, "found", f"the process hung for {PATIENCE} s" if killed else f"the process ended: {status}"
            done = current + 1
        left = range(done, numbers.stop)


def kind(words: str) -> str:
    """What was found, without what differs from input to input."""
    return re.sub(r"0x[0-9a-f]+|\d+|'[^']*'|\"[^\"]*\"", "#", words)[:150]


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return os.environ.get("FUZZED_COMMIT") or done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reader", choices=READERS, action="append")
    parser.add_argument("--number", type=int, help="this input alone, of the one reader")
    parser.add_argument("--counts", type=Path, help="a JSON file of counts, which this run adds to")
    parser.add_argument("--found", type=Path, default=Path(tempfile.gettempdir()) / "mpp-fuzz-found")
    given = parser.parse_args()
    readers = given.reader or list(READERS)
    counts = json.loads(given.counts.read_text()) if given.counts and given.counts.exists() else {}
    began, found, total = time.time(), Counter(), Counter()
    run = {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "command": f"python tests/fuzz.py --inputs {given.inputs} --seed {given.seed}",
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    counts.setdefault("runs", []).append(run)
    weights = sum(READERS[reader].share for reader in readers)
    for reader in readers:
        with tempfile.TemporaryDirectory() as folder:
            seeds = list(READERS[reader].seeds(Path(folder)))
        # Good files are read, and what is imported late is there before anything is watched. A server's answers are no
        # such files, and the thread that fetches would not live on in the workers.
        for one in seeds if reader != "server" else ():
            with tempfile.TemporaryDirectory() as folder:
                READERS[reader].read(Path(folder), one)
        if given.number is not None:
            sys.stdout.buffer.write(spoilt(seeds, reader, given.seed, given.number))
            return 0
        row = counts.setdefault("readers", {}).setdefault(
            reader, {"inputs": 0, "read": 0, "refused": 0, "found": 0, "next": {}}
        )
        start = row["next"].get(str(given.seed), 0)
        share = given.inputs * READERS[reader].share // weights
        for number, what, words in answers(reader, seeds, given.seed, range(start, start + share)):
            row["inputs"] += 1
            row[what] += 1
            row["next"][str(given.seed)] = number + 1
            total[what] += 1
            if what == "found":
                found[f"{reader}: {kind(words)}"] += 1
                if found[f"{reader}: {kind(words)}"] == 1:
                    print(f"{reader} {number}: {words}", flush=True)
                    given.found.mkdir(exist_ok=True, parents=True)
                    name = f"{reader.replace(' ', '-')}-{given.seed}-{number}"
                    (given.found / name).write_bytes(spoilt(seeds, reader, given.seed, number))
                    (given.found / f"{name}.txt").write_text(words + "\n")
        print(f"{reader}: {share} inputs, {time.time() - began:.0f} s", flush=True)
        run |= {"seconds": round(time.time() - began), "inputs": total.total(), "kinds found": dict(found)}
        counts["inputs"] = sum(row["inputs"] for row in counts["readers"].values())
        if given.counts:
            given.counts.write_text(json.dumps(counts, indent=1) + "\n")
    print(f"{total.total()} inputs: {total['read']} read, {total['refused']} refused, {total['found']} found something")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
