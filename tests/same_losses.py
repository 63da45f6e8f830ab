"""Whether this work tree trains as another commit does: the same losses on this machine, bit for bit.

    python tests/same_losses.py REF             # a commit's code, in a second work tree, beside this one's
    python tests/same_losses.py --record FILE   # this tree's losses in float32 as JSON (with REF: as well)

Short runs of the command line on scikit-learn's digits, on one thread, in float32 and in bfloat16: masked patch
prediction with each target, labels, the CNN, and a run that is killed with -9 and started again. Between them they use
dropout, stochastic depth, registers, layer decay, a running average, clipping, micro-batches, mixup, augmentations and
given weights. Both trees read the same recipes. Compared are all figures of all steps in metrics.jsonl, but for those
that measure time and memory, and the tensors that a run leaves. One line a case; exit status 1 if anything differs.
"""

import argparse
import contextlib
import datetime
import hashlib
import importlib
import json
import os
import platform
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
STEPS, SAVED = 20, 10  # of a run; of the checkpoint that the killed run goes on from
LINES = 13  # of metrics that the killed run has written at least: 10 steps, the score at step 10, and 2 steps to forget
TRIES = 10  # to kill a run between its checkpoint and its end
PRECISIONS = ("float32", "bfloat16")
MEASURED = ("images/s", "waiting", "memory")  # of time and memory: no two runs agree
HEAVY = ("torch", "torchvision", "torch.utils.tensorboard", "sklearn.datasets", "cv2")
WEIGHTS = ("encoder.safetensors", "classifier.safetensors")

COMMON = """\
seed: 5
data: {path: data/digits, source: digits, val: test, threads: 1, augment: {crop: none, flip: false}}
model: {image: 8}
train: {steps: 20, warmup: 4, batch: 32, device: cpu, threads: 1, save_every: 10}
eval: {every: 10, images: 64}
log: {every: 1, pictures: 0, tensorboard: false}
"""
MEAN_COLOUR = """\
base: common.yaml
model: {patch: 2, width: 48, depth: 3, heads: 3, registers: 2, dropout: 0.1, drop_path: 0.2}
objective: {name: mpp, target: mean_colour}
train: {micro_batch: 16, lr: 3e-3, weight_decay: 0.1, clip: 0.2}
"""
PIXELS = """\
base: common.yaml
data: {augment: {crop: inception, flip: true, jitter: [0.4, 0.4, 0.2, 0.1], grey: 0.2, randaugment: 2, erase: 0.2}}
model: {patch: 2, width: 48, depth: 4, heads: 3, mixer: [conv, attention], positions: rope, pool: map, norm: rms,
  swiglu: true, qk_norm: true, layer_scale: 0.1}
objective: {name: mpp, target: pixels, share: 0.6, split: [0.7, 0.2, 0.1]}
train: {batch: 48, micro_batch: 12, lr: 3e-3, weight_decay: 0.05, layer_decay: 0.8, activation_checkpointing: true}
"""
SMALL = """\
base: common.yaml
model: {patch: 4, width: 48, depth: 2, heads: 3, stem: conv, positions: learned2d, pool: avg, drop_path: 0.1}
"""
LABELS = """\
objective: {name: labels, mixup: 0.4, cutmix: 0.5, smoothing: 0.1}
train: {batch: 64, micro_batch: 32, lr: 1e-2, weight_decay: 0.05, layer_decay: 0.75, clip: 0.8}
"""
COLOUR_GRID = """\
data: {augment: {crop: shift, pad: 1, flip: true}}
objective: {name: mpp, target: colour_grid, grid: 2}
train: {optimizer: adam, lr: 3e-3, min_lr: 1e-4, betas: [0.9, 0.99], weight_decay: 1e-3, ema: 0.9, clip: 0.5}
"""
CNN = """\
base: common.yaml
data: {val: null, hold_out: 0.2, subset: {share: 0.5}, sampling: classes}
model: {name: resnet, depth: 18, width: 8, stem: small}
objective: {name: labels, mixup: 0.4, smoothing: 0.1}
train: {optimizer: sgd, lr: 0.1, weight_decay: 1e-3, clip: 1.5, ema: 0.8}
"""

Steps = dict[int, dict[str, float]]  # what metrics.jsonl says of each step


@dataclass(frozen=True)
class Case:
    """A run of the command line."""

    name: str
    verb: str
    recipe: str
    weights: str | None = None  # the case whose encoder it starts from
    killed: str | None = None  # the case that it is, but for being killed on its way and started again


CASES = (
    Case("mean_colour", "pretrain", MEAN_COLOUR),
    Case("pixels", "pretrain", PIXELS),
    Case("labels", "finetune", SMALL + LABELS),
    Case("colour_grid", "pretrain", SMALL + COLOUR_GRID, weights="labels"),
    Case("resumed", "pretrain", SMALL + COLOUR_GRID, weights="labels", killed="colour_grid"),
    Case("cnn", "finetune", CNN),
)


class Failed(Exception):
    """A command did not come to its end; the last of what it said."""


@dataclass(frozen=True)
class Side:
    """A tree of code, and the folder in which it runs."""

    name: str  # in what is printed
    tree: Path
    folder: Path

    def out(self, case: str, precision: str) -> Path:
        return self.folder / "runs" / f"{case}-{precision}"

    def train(self, case: Case, precision: str) -> None:
        """Carries out a case; raises Failed."""
        out, recipe = self.out(case.name, precision), self.folder.parent / "recipes" / f"{case.name}.yaml"
        arguments = [case.verb, str(recipe), f"out={out.relative_to(self.folder)}", f"train.precision={precision}"]
        if case.weights:
            arguments += ["--from", str(self.out(case.weights, precision).relative_to(self.folder))]
        if case.killed:
            self._kill(arguments, out)
        self._check(waited(self._start(arguments)))

    def _check(self, status: int) -> None:
        """Raises Failed with the last line that a command said, if it did not end well."""
        if status:
            lines = (self.folder / "said.txt").read_text(errors="replace").replace("\r", "\n").split("\n")
            raise Failed(next((line for line in reversed(lines) if line.strip()), f"status {status}"))

    def _kill(self, arguments: list[str], out: Path) -> None:
        """Starts a run and kills it some steps after its checkpoint, again if it was faster than we."""
        checkpoint, metrics = out / f"checkpoints/step-{SAVED:08d}", out / "metrics.jsonl"
        for _ in range(TRIES):
            shutil.rmtree(out, ignore_errors=True)

            def late() -> bool:
                return checkpoint.exists() and metrics.read_bytes().count(b"\n") >= LINES

            status = waited(self._start(arguments), late)
            if status == -signal.SIGKILL:
                return
            self._check(status)
        raise Failed(f"was not killed in time in any of {TRIES} tries")

    def _start(self, arguments: list[str]) -> int:
        """`mpp ARGUMENTS` in a fork, which has all but mpp imported already; its process id."""
        child = os.fork()
        if child:
            return child
        status: Any = 1
        try:
            said = os.open(self.folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.chdir(self.folder)
            sys.path.insert(0, str(self.tree))
            sys.argv = ["mpp", *arguments]
            found = importlib.import_module("mpp").__file__
            assert Path(found or "").is_relative_to(self.tree), f"{found} is not of {self.tree}"
            runpy.run_module("mpp", run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status if isinstance(status, int) else 1)


def waited(child: int, enough: Callable[[], bool] = lambda: False) -> int:
    """Waits for a child, and kills it with -9 once it is enough; its status, negative for a signal."""
    try:
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if enough():
                os.kill(child, signal.SIGKILL)
            time.sleep(0.002)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


def metrics(out: Path) -> Steps:
    """What a run's metrics.jsonl says of each step, figures of time and memory left out."""
    steps: Steps = {}
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        values = steps.setdefault(line.pop("step"), {})
        assert not values.keys() & line.keys() - set(MEASURED), "each step is logged once"
        values.update({name: float(value) for name, value in line.items() if name not in MEASURED})
    return steps


def losses(steps: Steps) -> list[float]:
    return [values["loss"] for _, values in sorted(steps.items())]


def metrics_differ(there: Steps, here: Steps) -> str | None:
    """The first figure of `there` that is another one `here`, or lacking, down to the last bit."""
    for step in sorted(there.keys() | here.keys()):
        if step not in there or step not in here:
            return f"step {step}: only {'here' if step in here else 'there'}"
        for name, value in there[step].items():
            found = here[step].get(name)
            if found is None or found.hex() != value.hex():
                return f"step {step}: {name} {value!r} there, {found!r} here"
    return None


def tensors(path: Path) -> dict[str, str]:
    """Each tensor of a safetensors file: its type, shape and the SHA-256 of its bytes."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in sorted(header.items()):
        first, last = entry["data_offsets"]
        found[name] = f"{entry['dtype']} {entry['shape']} {hashlib.sha256(data[end + first : end + last]).hexdigest()}"
    return found


def tensors_differ(there: dict[str, str], here: dict[str, str]) -> str | None:
    """The first tensor that differs or that only one side has."""
    for name in [*there, *(name for name in here if name not in there)]:
        if there.get(name) != here.get(name):
            return f"{name}: {there.get(name)} there, {here.get(name)} here"
    return None


def differ(there: Path, here: Path) -> str | None:
    """The first difference between two run folders."""
    if found := metrics_differ(metrics(there), metrics(here)):
        return found
    for file in WEIGHTS:
        if (there / file).exists() and (found := tensors_differ(tensors(there / file), tensors(here / file))):
            return f"{file}: {found}"
    return None


def compare(case: Case, precision: str, sides: list[Side]) -> bool:
    """Runs a case on all sides and says how they compare; whether all is equal."""
    start, problems = time.perf_counter(), []
    for side in sides:
        try:
            side.train(case, precision)
            out = side.out(case.name, precision)
            if (count := len(metrics(out))) != STEPS:
                problems.append(f"{side.name}: {count} steps were logged, not {STEPS}")
            elif case.killed and (found := differ(side.out(case.killed, precision), out)):
                problems.append(f"{side.name}: not what {case.killed} is, which was never killed: {found}")
        except (Failed, OSError) as error:
            problems.append(f"{side.name}: failed: {error}")
    if not problems and len(sides) == 2:
        found = differ(*(side.out(case.name, precision) for side in sides))
        problems += [found] if found else []
    verdict = "; ".join(problems) or ("equal" if len(sides) == 2 else "ran")
    if not problems:
        all_losses = losses(metrics(sides[-1].out(case.name, precision)))
        verdict += f"  (loss {all_losses[0]:.4f} to {all_losses[-1]:.4f})"
    say(f"{case.name:<12} {precision:<9} {time.perf_counter() - start:5.1f} s  {verdict}")
    return not problems


def draws() -> str:
    """A digest of what torch's generator gives for a seed, which changes between versions: 2.11 to 2.14 for one."""
    import torch

    torch.manual_seed(0)
    uniform, normal, whole = torch.rand(99), torch.randn(99), torch.randint(1000, (99,))
    truncated = torch.nn.init.trunc_normal_(torch.empty(99), std=0.1, a=-0.2, b=0.2)
    shares = torch.distributions.Gamma(torch.tensor(1.8).expand(9), torch.tensor(1.0)).sample()
    values = [*uniform.tolist(), *normal.tolist(), *whole.tolist(), *truncated.tolist(), *shares.tolist()]
    return hashlib.sha256(" ".join(f"{value:.4f}" for value in values).encode()).hexdigest()[:16]


def record(file: Path, side: Side) -> None:
    """Writes the losses of all cases in float32, with where and with what they were computed."""
    import torch

    plain = [case.name for case in CASES if not case.killed]
    facts = {
        "commit": git("describe", "--always", "--abbrev=12", "--dirty"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "draws": draws(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "precision": PRECISIONS[0],
        "losses": {name: losses(metrics(side.out(name, PRECISIONS[0]))) for name in plain},
    }
    file.write_text(json.dumps(facts, indent=1) + "\n")
    say(f"written: {file}")


def git(*arguments: object) -> str:
    """What git says in this tree. In a session of its own: Ctrl-C is for us alone, who then clean up."""
    command = ["git", "-C", str(HERE), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if done.returncode:
        raise SystemExit(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def second_tree(ref: str) -> Iterator[Path]:
    """The code of a commit in a work tree of its own, which is gone at the end, also of an interrupted run."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    commit = git("rev-parse", "--verify", f"{ref}^{{commit}}")
    folder = Path(tempfile.mkdtemp(prefix="mpp-tree-"))
    tree = folder / commit[:12]
    try:
        git("worktree", "add", "--detach", tree, commit)
        yield tree
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        git("worktree", "remove", "--force", tree)


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", metavar="REF", nargs="?", help="the commit to compare with")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write this tree's losses there")
    options = parser.parse_args()
    if not options.ref and not options.record:
        parser.error("give a commit REF, or --record FILE, or both")
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for module in HEAVY:
        importlib.import_module(module)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mpp-losses-")))
        sides = [Side("here", HERE, scratch / "here")]
        if options.ref:
            sides.insert(0, Side("there", stack.enter_context(second_tree(options.ref)), scratch / "there"))
        for folder in (scratch / "recipes", *(side.folder for side in sides)):
            folder.mkdir()
        for name, text in {"common": COMMON, **{case.name: case.recipe for case in CASES}}.items():
            (scratch / "recipes" / f"{name}.yaml").write_text(text)
        precisions = PRECISIONS if options.ref else PRECISIONS[:1]
        equal = [compare(case, precision, sides) for precision in precisions for case in CASES]
        if options.record and all(equal[: len(CASES)]):
            record(options.record, sides[-1])
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
