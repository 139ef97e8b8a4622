"""docs/equations.md: each function and test that it names exists, and each line in code stands in that docstring."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from matplotlib.mathtext import MathTextParser

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "equations.md"
LINK = r"\[([^\]]+)\]\(([^)]+)\)"
GREEK = dict(zip("αβγδεθλμπρστφ", "alpha beta gamma delta epsilon theta lambda mu pi rho sigma tau phi".split()))
OPERATOR = re.compile(r"[=<>≤≥~+·/|⊙(]| - |->")


class Entry(NamedTuple):
    """One idea: the equation in LaTeX, its lines in a docstring, the function that has it, the tests that prove it."""

    title: str
    latex: str
    lines: tuple[str, ...]
    function: tuple[str, str]  # as "FILE: NAME", or "FILE" for the docstring of the file; and the path
    tests: tuple[tuple[str, str], ...]


def entries(text: str) -> list[Entry]:
    """What the page holds. ValueError for an equation without lines, function and test."""
    found = []
    for part in re.split(r"\n(?=\*\*)", text)[1:]:
        title, latex, after = re.fullmatch(r"(?s)\*\*(.+?)\*\*.*?\n\n\$\$(.+)\$\$\n\n(.*)", part).groups()
        after = re.split(r"\n\n?## ", after)[0].strip()
        pairs = re.findall(rf"((?:`[^`]+`[\s·]*)+)→ ({LINK}(?:,\s*{LINK})+)", after)
        if not pairs or re.sub(rf"(?:`[^`]+`[\s·]*)+→ {LINK}(?:,\s*{LINK})+", "", after).strip():
            raise ValueError(f"{title}: expected `line` → [FILE: NAME](path), [test](path), got {after!r}")
        for code, links, *_ in pairs:
            function, *tests = re.findall(LINK, links)
            found.append(Entry(title, latex, tuple(re.findall(r"`([^`]+)`", code)), function, tuple(tests)))
    return found


def definitions(path: Path) -> dict[str, ast.AST]:
    """Name -> node of a file's functions and classes, `Class.method` too; the file itself under ''."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = {"": tree} | {node.name: node for node in tree.body if isinstance(node, kinds)}
    for name, node in list(found.items()):
        if isinstance(node, ast.ClassDef):
            found |= {f"{name}.{inner.name}": inner for inner in node.body if isinstance(inner, kinds)}
    return found


def plain(text: str | None) -> str:
    """With single blanks, since docstrings are wrapped and aligned."""
    return " ".join((text or "").split())


def wrong(entry: Entry) -> list[str]:
    """What does not hold of an entry, in words."""
    label, link = entry.function
    path = (PAGE.parent / link).resolve()
    file, _, name = label.partition(": ")
    if not path.is_file() or path.name != file:
        return [f"{entry.title}: {link} is not {file}"]
    if name not in (known := definitions(path)):
        return [f"{entry.title}: {file} has no {name}"]
    docstring = plain(ast.get_docstring(known[name]))
    lacking = [f"{entry.title}: the docstring of {label} lacks `{x}`" for x in entry.lines if plain(x) not in docstring]
    lacking += [f"{entry.title}: `{line}` is no formula" for line in entry.lines if not OPERATOR.search(line)]
    for test, link in entry.tests:
        path = (PAGE.parent / link).resolve()
        if not path.is_file() or test not in definitions(path):
            lacking.append(f"{entry.title}: there is no {test} in {link}")
        elif (own := name.rpartition(".")[2]).lower() not in path.read_text(encoding="utf-8").lower():
            lacking.append(f"{entry.title}: {link} does not name {own}")
    # A letter in the docstring's line that the equation lacks is another equation. ε is also written epsilon.
    letters = {GREEK[letter] for line in entry.lines for letter in line if letter in GREEK}
    have = {word.removeprefix("var") for word in re.findall(r"\\([a-z]+)", entry.latex)}
    return lacking + [f"{entry.title}: the equation has no {letter}" for letter in sorted(letters - have)]


ENTRIES = entries(PAGE.read_text(encoding="utf-8"))


def test_every_equation_is_read():
    text = PAGE.read_text(encoding="utf-8")
    assert len({entry.title for entry in ENTRIES}) == len({entry.latex for entry in ENTRIES}) == text.count("\n$$")
    assert len(ENTRIES) > 70


@pytest.mark.parametrize("entry", ENTRIES, ids=[f"{i}-{entry.title}" for i, entry in enumerate(ENTRIES)])
def test_function_docstring_and_test_exist(entry):
    assert wrong(entry) == []


@pytest.mark.parametrize("entry", ENTRIES, ids=[f"{i}-{entry.title}" for i, entry in enumerate(ENTRIES)])
def test_the_equation_is_well_formed(entry):
    """It parses, and holds nothing that Markdown would take for itself: GitHub reads some of it before the formula."""
    assert not re.search(r"\\[!-/:-@\[-`{-~]", entry.latex), "Markdown takes a backslash before a sign away"
    assert not re.search(r"[^A-Za-z0-9]_|\*|<[A-Za-z/!?]+[\s>]", entry.latex), "Markdown may see emphasis or a tag"
    # matplotlib does not know these three by this name.
    latex = entry.latex.replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}").replace(r"\leftarrow", r"\gets")
    MathTextParser("path").parse(f"${latex.replace('gets', 'leftarrow')}$")


PIECE = """
**K** (x). y.

$$a = \\beta b$$

`{line}`
→ [losses.py: {name}](../minir1/losses.py), [{test}]({at})
"""


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, None),
        ({"line": "-A_t  log π(x_t | x_<t)"}, "the equation has no pi"),
        ({"line": "-A_t log p"}, "lacks `-A_t log p`"),
        ({"line": "Both [B, T]"}, "`Both [B, T]` is no formula"),
        ({"name": "reinforced"}, "losses.py has no reinforced"),
        ({"test": "test_a_row_is_independent_of_the_batch", "at": "../tests/test_sample.py"}, "not name reinforce"),
        ({"test": "test_none"}, "there is no test_none"),
        ({"at": "../tests/test_none.py"}, "there is no test_two_clips in ../tests/test_none.py"),
    ],
)
def test_each_fault_is_named(change, message):
    good = {"line": "0 for A_t = 0", "name": "reinforce", "test": "test_two_clips", "at": "../tests/test_losses.py"}
    (entry,) = entries(PIECE.format(**good | change))
    assert (message in " ".join(wrong(entry))) if message else wrong(entry) == []


def test_an_equation_without_links_is_refused():
    with pytest.raises(ValueError, match="K: expected"):
        entries("\n**K** (x). y.\n\n$$a$$\n\n`a` → [losses.py](../minir1/losses.py)\n")
