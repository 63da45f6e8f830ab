"""Markdown in which names, paths and texts that others chose can do nothing but stand there."""

import re
from collections.abc import Sequence


def code(text: object) -> str:
    """A code span of one line with exactly these characters, those that can't be seen escaped."""
    line = _visible(str(text)) or " "
    fence = "`" * (1 + _longest_run(line))
    space = " " if line.startswith("`") or line.endswith("`") or line != line.strip() else ""
    return f"{fence}{space}{line}{space}{fence}"


def block(text: str, language: str) -> str:
    """A code block."""
    lines = "\n".join(_visible(line) for line in text.strip("\n").splitlines())
    fence = "`" * max(3, 1 + _longest_run(lines))
    return f"{fence}{language}\n{lines}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of code spans; in one, a | has to be escaped even inside code."""
    cells = [" | ".join(code(cell).replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in [" | ".join(head), " | ".join("---" for _ in head), *cells])


def _visible(line: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
