"""What each variant changes in the script that it is a copy of.

    python -m experiments.tools.variants rloo

Prints the difference of the code, without docstrings and blank lines, each change under the function or class of the
original that it is in. Options of the original that no variant carries are no difference.
"""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minir1 import cli

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
    "ema_reference": "r1_zero",
    "replayed_routes": "r1_zero",
    "hybrid": "r1_zero",
    "self_check": "r1_zero",
}
OPTIONS = (
    "lora",
    "reference_reset",
    "reference.load_state_dict",
    "difficulty_window",
    "curriculum",
    "Curriculum",
    "language",
)


def code(path: Path) -> list[str]:
    """The lines of a script, without docstrings and blank lines."""
    text = path.read_text(encoding="utf-8")
    lines: list[str] = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
        if documented:
            first, last = node.body[0].lineno - 1, node.body[0].end_lineno
            lines[first:last] = [""] * (last - first)
    return [line for line in lines if line.strip()]


def carried(line: str) -> bool:
    """Whether a line of the original concerns no option that the variants lack."""
    return not any(option in line for option in OPTIONS)


def difference(name: str) -> list[str]:
    """Lines `-` of the original and `+` of the variant; before each change `@@` and the function that it is in."""
    original, copy = code(SCRIPTS / f"{COPIES[name]}.py"), code(SCRIPTS / "variants" / f"{name}.py")
    lines = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, original, copy, autojunk=False).get_opcodes():
        if kind != "equal":
            dropped = [line for line in original[a:b] if carried(line)]
            if dropped or copy[c:d]:
                headers = [line for line in original[:b] if line.startswith(("class ", "def ")) and carried(line)]
                lines.append("@@ " + (headers[-1].split("(")[0].rstrip(":") if headers else "imports"))
            lines += [f"-{line}" for line in dropped] + [f"+{line}" for line in copy[c:d]]
    return lines


def page(name: str) -> str:
    """The difference as a block of a document."""
    script = f"experiments/variants/{name}.py"
    return f"[{script}](../{script}) against {COPIES[name]}.py:\n\n```diff\n" + "\n".join(difference(name)) + "\n```"


@dataclass(frozen=True)
class Config:
    """Which variant."""

    name: Annotated[Literal[tuple(COPIES)], tyro.conf.Positional]


def main(config: Config) -> None:
    """Print the difference of one variant."""
    print("\n".join(difference(config.name)))


if __name__ == "__main__":
    cli.run(main, Config)
