"""What pretraining runs of several lengths came to: a table, and JSON of it.

mpp probe runs/wsd-5 --data data/cifar10 --json runs/wsd-5/probe.json      # and so on for each run
python -m benchmarks.lengths runs/wsd-5 runs/wsd-10 --json benchmarks/results/cifar10-wsd.json
"""

import argparse
import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml

from mpp.jsons import encoded, read_lines


def figures(run: Path) -> dict[str, Any]:
    """Of one run: its schedule and length, the last scores of the objective, and what probes read off its encoder.

    Read as plain files, so that runs of other versions can be told of too.
    """
    train = yaml.safe_load((run / "recipe.yaml").read_text())["train"]
    settled = json.loads((run / "settled.json").read_text())
    scored = [row for row in read_lines(run / "metrics.jsonl") if "val/loss" in row][-1]
    begun = settled["continued"]["at"] if settled.get("continued") else 0
    found: dict[str, Any] = {
        "run": run.name,
        "schedule": train["schedule"],
        "epochs": train["epochs"],
        "steps": settled["steps"],
        "steps trained here": settled["steps"] - begun,
        "at the end": scored["step"] == settled["steps"],
        "val/loss": scored["val/loss"],
        "val/accuracy": scored["val/accuracy"],
    }
    probe = run / "probe.json"
    rows = json.loads(probe.read_text())["rows"] if probe.exists() else []
    return found | {f"{row['protocol']} {row['metric']}": row["value"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [figures(run) for run in options.runs]
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        print(f"{name:24}", *(f"{row.get(name, '-')!s:>12.12}" for row in rows))
    if options.json:
        facts = {"date": date.today().isoformat(), "torch": torch.__version__, "cores": os.cpu_count()}
        options.json.write_bytes(encoded({**facts, "machine": platform.machine(), "runs": rows}, indent=1))


if __name__ == "__main__":
    main()
