"""Write the measured numbers into README.md and docs/*.md, so that text and results stay the same.

    python -m experiments.tools.render_docs
    python -m experiments.tools.render_docs --check

The text between `<!-- begin: NAME -->` and `<!-- end -->` is made from docs/results/*.json by the function of that name
in BLOCKS (doc_blocks.py). With --check nothing is written, and a block that differs is an error.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from experiments.tools.doc_blocks import BLOCKS
from minir1 import cli
from minir1.files import replace_text

MARKS = re.compile(r"<!-- (?:begin: (?P<name>\S+)|(?P<end>end)) -->")


@dataclass(frozen=True)
class Config:
    """Which documents, and whether to write them."""

    check: bool = False  # compare only
    root: Path = Path(__file__).parent.parent.parent  # holds README.md and docs/


def documents(root: Path) -> list[Path]:
    """README.md and docs/*.md, as far as they exist."""
    return [path for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if path.exists()]


def spans(text: str, where: str) -> list[tuple[str, int, int]]:
    """(name, start, end) of the text between each pair of marks. ValueError for unknown names and unpaired marks."""
    blocks, name, start = [], None, 0
    for mark in MARKS.finditer(text):
        if bool(mark["end"]) != bool(name):
            raise ValueError(f"{where}: {mark[0]} is out of place; blocks are <!-- begin: NAME --> … <!-- end -->")
        if mark["end"]:
            blocks.append((name, start, mark.start()))
            name = None
        elif mark["name"] not in BLOCKS:
            raise ValueError(f"{where}: unknown block {mark['name']!r}; known are {', '.join(BLOCKS)}")
        else:
            name, start = mark["name"], mark.end()
    if name:
        raise ValueError(f"{where}: block {name!r} has no <!-- end -->")
    return blocks


def content(name: str, folder: Path) -> str:
    """The text of one block. ValueError if its results are missing, or lack a key that it reads."""
    file, function = BLOCKS[name]
    if file is None:
        return f"\n{function()}\n"
    path = folder / file
    if not path.exists():
        raise ValueError(f"{path} does not exist, and block {name!r} is made from it")
    try:
        return f"\n{function(json.loads(path.read_text(encoding='utf-8')))}\n"
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}, which block {name!r} needs") from error


def render(path: Path, root: Path) -> tuple[str, list[str]]:
    """A document with its blocks made again, and the names of those that were different."""
    text = path.read_text(encoding="utf-8")
    different = []
    for name, start, end in reversed(spans(text, str(path.relative_to(root)))):
        new = content(name, root / "docs" / "results")
        if text[start:end] != new:
            different.insert(0, name)
        text = text[:start] + new + text[end:]
    return text, different


def main(config: Config) -> list[str]:
    """Write, or check, every document; returns "file: block" for each that differed."""
    changed = []
    if not documents(config.root):
        raise ValueError(f"root = {config.root} holds neither README.md nor docs/*.md")
    for path in documents(config.root):
        text, different = render(path, config.root)
        changed += [f"{path.relative_to(config.root)}: {name}" for name in different]
        if different and not config.check:
            replace_text(path, text)
    if config.check and changed:
        raise ValueError(f"differ from docs/results: {', '.join(changed)}; run python -m experiments.tools.render_docs")
    print("\n".join(f"wrote {name}" for name in changed) or "all blocks agree with docs/results")
    return changed


if __name__ == "__main__":
    cli.run(main, Config)
