"""Recipe files of the working directory, which the fixture `inside_tmp` makes an empty one."""

from pathlib import Path

from mpp.recipe import Recipe, load_recipe

WHOLE = """
objective: {name: mpp}
data: {path: shards}
train: {steps: 10}
model: {image: 8, patch: 2, width: 8, heads: 2}
"""


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def load(text: str = "", *overrides: str, whole: str = WHOLE) -> Recipe:
    """A recipe from a text over a whole one."""
    write("whole.yaml", whole)
    write("r.yaml", f"base: whole.yaml\n{text}")
    return load_recipe("r.yaml", overrides)
