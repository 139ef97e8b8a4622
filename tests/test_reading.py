"""docs/reading.md: the files of each path are there, and have about as many lines as it says."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
BLANK = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def lines_of_code(text: str) -> int:
    """The lines of a source that hold more than a docstring, a comment or nothing."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in BLANK:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def count(link: str) -> int:
    """Of a file, or of all files of a folder."""
    path = ROOT / "docs" / link
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    return sum(lines_of_code(file.read_text(encoding="utf-8")) for file in files)


def sections() -> dict[str, list[tuple[list[str], int]]]:
    """Path -> its rows, each the sources that it links to and the lines that it states."""
    found = {}
    for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S):
        rows = [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", text, re.M)]
        stated = [(i, cell) for row in rows for i, cell in enumerate(row) if cell.strip().isdigit() and i]
        assert len(stated) == len(rows) - 1  # the head
        sources = r"\]\((\.\./(?:minir1|experiments|kernels)[^)#]*)\)"
        files = [re.findall(sources, row[i - 1]) for row, (i, _) in zip(rows[1:], stated)]
        found[title] = list(zip(files, [int(cell) for _, cell in stated]))
    return found


SECTIONS = sections()
ROWS = [row for rows in SECTIONS.values() for row in rows]


@pytest.mark.parametrize("files, stated", ROWS, ids=[Path(files[0]).stem for files, _ in ROWS])
def test_lines_are_about_those_of_the_files(files, stated):
    have = sum(map(count, files))
    assert abs(have - stated) <= max(20, have / 5), f"write {5 * round(have / 5)} for {', '.join(files)}"


def test_the_sums_and_the_order():
    for title, words in (("An hour", r"About ([\d,]+) lines: "), ("An afternoon", r"About ([\d,]+) lines more")):
        stated = int(re.search(words, PAGE)[1].replace(",", ""))
        have = sum(count(file) for files, _ in SECTIONS[title] for file in files)
        assert abs(have - stated) <= have / 10, f"write {10 * round(have / 10)}"
    sums = [sum(stated for _, stated in rows) for rows in SECTIONS.values()]
    assert list(SECTIONS) == ["An hour", "An afternoon", "A week"] and sums == sorted(sums) and sums[0] < 800
    every = [file for files, _ in ROWS for file in files]
    assert len(every) == len(set(every))  # nothing is read twice


def test_lines_of_code_by_hand():
    source = '"""a\n\nb"""\n\nx = """c\nd"""  # e\n\n\ndef f():\n    "g"\n    # h\n    return (\n        1)\n'
    assert lines_of_code(source) == 5
