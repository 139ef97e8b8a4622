"""One line per file for docs/files.md: the first line of each docstring.

    python -m experiments.tools.file_map
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDERS = (
    "minir1", "minir1/model", "minir1/ops", "minir1/tasks", "kernels", "experiments", "experiments/variants",
    "experiments/studies", "experiments/benchmarks", "experiments/tools",
)


def first_line(path: Path) -> str:
    """The first line of a module's docstring, without its last full stop."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0].rstrip(".")


def page() -> str:
    """The map as Markdown, one folded list per folder."""
    parts = []
    for folder in FOLDERS:
        files = [path for path in sorted((ROOT / folder).glob("*.py")) if path.name != "__init__.py"]
        lines = [f"- [{path.name}](../{path.relative_to(ROOT)}): {first_line(path)}" for path in files]
        summary = f"<summary><code>{folder}/</code>, {len(files)} files</summary>"
        parts.append("\n".join(["<details>", summary, "", *lines, "", "</details>"]))
    return "\n".join(parts)


if __name__ == "__main__":
    print(page())
