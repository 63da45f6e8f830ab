"""Indexes, opens and reads so many tars of one image each, and says what that takes: FOLDER [TARS ...].

Open files are limited to 256, as a process of a shared machine may be.
"""

import resource
import shutil
import sys
import time
from pathlib import Path

from shard_files import png, write_tar

from mpp.data.read import read_shards
from mpp.shards.build import index_folder
from mpp.shards.index import read_index

FILES = 256


def made(folder: Path, tars: int) -> Path:
    """A folder of tars `train-000000.tar`, the pictures of which are a few in turn."""
    folder.mkdir(parents=True)
    images = [png(seed, h=8, w=8) for seed in range(16)]
    one = [
        write_tar(folder / "x", [("KEYKEYKEY.png", image), ("KEYKEYKEY.cls", b"1")]).read_bytes() for image in images
    ]
    (folder / "x").unlink()
    for number in range(tars):
        # Names of equal length leave the header's checksum right once it is made anew: write_tar is slow.
        path = folder / f"train-{number:06d}.tar"
        path.write_bytes(_renamed(one[number % len(one)], f"{number:09d}".encode()))
    return folder


def _renamed(tar: bytes, key: bytes) -> bytes:
    data = bytearray(tar)
    for place in (at for at in range(0, len(data), 512) if data[at : at + 9] == b"KEYKEYKEY"):
        data[place : place + 9] = key
        data[place + 148 : place + 156] = b" " * 8
        data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])
    return bytes(data)


def taken(folder: Path) -> dict[str, float]:
    """Seconds of each part, and at its end the most memory so far in MiB."""
    found: dict[str, float] = {}

    def timed(name: str, work) -> None:
        started = time.perf_counter()
        work()
        found[name] = time.perf_counter() - started

    timed("index", lambda: index_folder(folder, report=lambda line: None))
    timed("open", lambda: read_index(folder, "train"))

    def read() -> None:
        for batch, _ in zip(
            read_shards(folder, 512, reader="indexed").iterate(), range(len(index) // 512), strict=False
        ):
            assert batch.labels is not None

    index = read_index(folder, "train")
    timed("read an epoch", read)
    found["MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return found


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    root = Path(sys.argv[1])
    for tars in map(int, sys.argv[2:] or ["10000", "100000"]):
        shutil.rmtree(root, ignore_errors=True)
        made(root, tars)
        print(f"{tars} tars:", ", ".join(f"{name} {value:.1f}" for name, value in taken(root).items()), flush=True)
