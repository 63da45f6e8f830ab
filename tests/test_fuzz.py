"""Some hundred spoilt files of every kind; `python tests/fuzz.py --inputs 100000` tries many (docs/reliability.md)."""

import json
import random
import subprocess
import sys
from pathlib import Path

import fuzz_mutations as ways

TESTS = Path(__file__).parent


def test_spoilt_files_of_every_kind_are_read_or_refused_by_one_line(tmp_path):
    arguments = ["--inputs", "220", "--seed", "0", "--counts", "counts.json", "--found", "found"]
    command = [sys.executable, str(TESTS / "fuzz.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["inputs"] > 200
    assert all(row["inputs"] == row["read"] + row["refused"] > 0 for row in counts["readers"].values())
    assert all(row["next"] == {"0": row["inputs"]} for row in counts["readers"].values())


BAD = """
import os, subprocess, sys, warnings, zlib
sys.path.insert(0, {tests!r})
import fuzz
def read(folder, data):
    deeds = (
        lambda: 1 / 0,
        lambda: open({outside!r}, "w").close(),
        lambda: os.write(2, b"words"),
        lambda: warnings.warn("a warning"),
        lambda: subprocess.run(["true"]),
        lambda: os._exit(3),
        lambda: bytearray(2**30 + 2**27),
        lambda: (_ for _ in ()).throw(fuzz.UserError("two\\nlines")),
        lambda: (_ for _ in ()).throw(fuzz.UserError("one line")),
    )
    data in good or deeds[zlib.crc32(data) % len(deeds)]()
good = fuzz.READERS["metrics"].seeds(None)
fuzz.READERS["metrics"] = fuzz.READERS["metrics"]._replace(read=read)
sys.argv[1:] = ["--inputs", "60", "--reader", "metrics", "--found", {found!r}]
sys.exit(fuzz.main())
"""


def test_what_a_bad_reader_does_is_found_and_its_inputs_kept(tmp_path):
    code = BAD.format(tests=str(TESTS), outside=str(tmp_path / "outside"), found=str(tmp_path / "found"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    for words in (
        "ZeroDivisionError", "changed outside: open", "printed: b'words'", "warning: UserWarning: a warning",
        "started: subprocess.Popen", "the process ended", "memory: ", "not one printable line",
    ):  # fmt: skip
        assert words in done.stdout, words
    kept = [path for path in (tmp_path / "found").iterdir() if path.suffix != ".txt"]
    assert len(kept) >= 8
    assert all(path.with_name(f"{path.name}.txt").read_text() for path in kept)


def test_an_input_follows_from_its_number():
    data = json.dumps({"a": [1, {"b": "c"}], "d": '{"e": 1}'}).encode()
    made = [[ways.json_text(random.Random(number), data) for number in range(50)] for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made[0])) > 30
