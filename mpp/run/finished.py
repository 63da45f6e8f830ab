"""The end of a run whose checkpoints are not kept: finished.json says what it left in their place."""

import hashlib
import shutil
from collections.abc import Collection
from pathlib import Path

from mpp import budget, jsons
from mpp.errors import cause
from mpp.files import write_atomically
from mpp.recipe.settled import NOT_OURS, RunError

FILE = "finished.json"
FORMAT = 1


def drop_state(out: Path, results: Collection[str]) -> None:
    """Deletes the checkpoints of a run whose results, files of its folder, are on the disk."""
    facts = {"format": FORMAT, "sha256": {name: _digest(out / name) for name in results}}
    write_atomically(out / FILE, jsons.encoded(facts, indent=1))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def is_finished(out: Path) -> bool:
    """Whether a run left its results alone; RunError if one of them is not as it was then."""
    path = out / FILE
    if not path.exists():
        return False
    try:
        facts = budget.json_file(path)
        if facts["format"] != FORMAT:
            raise RunError(f"{path}: has format {facts['format']}, this version of mpp reads {FORMAT}")
        digests = {str(name): str(digest) for name, digest in facts["sha256"].items()}
    except RunError:
        raise
    except NOT_OURS as error:
        raise RunError(f"{path}: cut, or not as it was written ({cause(error)})") from None
    for name, digest in digests.items():
        if not (out / name).is_file() or _digest(out / name) != digest:
            raise RunError(
                f"{out / name}: missing, or not as it was written, and the checkpoints were deleted at the run's end "
                "(train.keep_state: false); restore it, or choose another folder with out="
            )
    return True


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
