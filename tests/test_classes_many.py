"""100,000 classes, through everything that holds a value a class: tests/many_classes.py does it and measures."""

import json
import subprocess
import sys
from pathlib import Path

MANY = 100_000
SQUARED = MANY**2 / 2**20  # MiB of a table of all pairs of classes, at a single byte each


def test_a_hundred_thousand_classes_take_memory_in_proportion():
    script = Path(__file__).with_name("many_classes.py")
    done = subprocess.run([sys.executable, script, str(MANY), "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert max(peak for _, peak in figures.values()) < 2048 < SQUARED / 4
