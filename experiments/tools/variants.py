"""What each variant of an algorithm changes in the script it is a copy of.

    python -m experiments.tools.variants rloo

Prints the difference of the code, without the docstrings.
"""

from __future__ import annotations

import ast
import difflib
from pathlib import Path
from typing import Annotated

import tyro

SCRIPTS = Path(__file__).parent.parent
COPIES = {  # in experiments/variants -> what it is a copy of, in experiments
    "rloo": "reinforce",
    "reinforce_pp": "reinforce",
    "dr_grpo": "r1_zero",
    "dapo": "r1_zero",
    "gspo": "r1_zero",
    "sequence_grpo": "r1_zero",
    "cispo": "r1_zero",
    "tis": "r1_zero",
}


def code(path: Path) -> list[str]:
    """The lines of a script behind its docstring."""
    text = path.read_text(encoding="utf-8")
    docstring = ast.parse(text).body[0].end_lineno
    return text.splitlines()[docstring:]


def difference(name: str) -> list[str]:
    """The lines of the unified difference between a variant and its original, a line of context around each change."""
    original, copy = (SCRIPTS / f"{COPIES[name]}.py", SCRIPTS / "variants" / f"{name}.py")
    lines = difflib.unified_diff(code(original), code(copy), lineterm="", n=1)
    return [line for line in lines if not line.startswith(("---", "+++"))]


def changed(name: str) -> int:
    """How many lines a variant adds or replaces, blank ones left out."""
    lines = difference(name)
    removed, added = (sum(line.startswith(sign) and len(line.strip()) > 1 for line in lines) for sign in "-+")
    return max(removed, added)


def page(name: str) -> str:
    """The difference as a block of a document."""
    script = f"experiments/variants/{name}.py"
    return f"[{script}](../{script}) against {COPIES[name]}.py:\n\n```diff\n" + "\n".join(difference(name)) + "\n```"


def main(name: Annotated[str, tyro.conf.Positional]) -> None:
    """Print the difference of one variant. ValueError for an unknown name."""
    if name not in COPIES:
        raise ValueError(f"unknown variant {name!r}; known are {', '.join(COPIES)}")
    print("\n".join(difference(name)))


if __name__ == "__main__":
    tyro.cli(main)
