"""No dead link in any page or notebook, and every file that a docstring or comment names exists."""

import ast
import io
import json
import re
import tokenize
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("minir1", "kernels", "experiments", "tests", "docs", "notebooks")


def files(ending: str) -> list[Path]:
    """The project's own files, those at the top first."""
    inside = (path for folder in FOLDERS for path in (ROOT / folder).rglob(f"*{ending}"))
    return sorted(ROOT.glob(f"*{ending}")) + sorted(inside)


PAGES, NOTEBOOKS, SOURCES = files(".md"), files(".ipynb"), files(".py")
NAMES = {path.name for path in PAGES + NOTEBOOKS + SOURCES}
named = lambda paths: {"argvalues": paths, "ids": [str(path.relative_to(ROOT)) for path in paths]}


def prose(text: str) -> str:
    """Markdown without its blocks and spans of code."""
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", re.sub(r"(?ms)^ *(```|~~~).*?^ *\1", "", text))


def links(text: str) -> list[str]:
    """The targets of links and images, also those in HTML; of a reference without a definition the whole of it."""
    text = prose(text)
    title = r"(?:\s+(?:\"[^\"]*\"|'[^']*'|\([^()]*\)))?\s*\)"
    found = [bare or wrapped for wrapped, bare in re.findall(r"\]\(\s*(?:<([^>]*)>|([^)\s<]+))" + title, text)]
    defined = dict(re.findall(r"^\[([^\]]+)\]:\s*(\S+)", text, re.M))
    known = {name.lower() for name in defined}
    named = re.findall(r"\[([^\[\]]+)\]\[([^\[\]]*)\]", text)
    lacking = [f"[{shown}][{name}]" for shown, name in named if (name or shown).lower() not in known]
    html = re.findall(r"(?:href|src)\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s\"'>]+))", text)
    return found + lacking + list(defined.values()) + ["".join(forms) for forms in html]


def anchors(text: str) -> set[str]:
    """The fragments that GitHub gives to the headings of a page, and those that it sets itself."""
    found, seen = set(re.findall(r"<a (?:name|id)=\"([^\"]+)\"", text)), {}
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", re.sub(r"(?ms)^ *(```|~~~).*?^ *\1", "", text), re.M):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        count = seen[slug] = seen.get(slug, -1) + 1
        found.add(f"{slug}-{count}" if count else slug)
    return found


@lru_cache
def anchors_of(path: Path) -> set[str]:
    if path.suffix == ".ipynb":
        return set().union(*(anchors(cell) for cell in cells(path)))
    return anchors(path.read_text(encoding="utf-8"))


def cells(path: Path) -> list[str]:
    """The texts of a notebook."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "markdown"]


def dead(text: str, path: Path) -> list[str]:
    """The links of a text in the file `path` that lead nowhere. Those to other machines are not followed."""
    found = []
    for link in links(text):
        if re.match(r"[a-z][a-z+.-]*:|//", link):
            continue
        target, _, fragment = link.partition("#")
        at = (path.parent / target).resolve() if target else path
        if target and not (at.exists() and at.is_relative_to(ROOT.resolve())):
            found.append(link)
        elif fragment and at.suffix in (".md", ".ipynb") and fragment not in anchors_of(at):
            found.append(link)
        elif fragment and at.suffix == ".py":  # lines move
            found.append(link)
    return found


@pytest.mark.parametrize("path", **named(PAGES))
def test_no_dead_link_in_a_page(path):
    assert dead(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize("path", **named(NOTEBOOKS))
def test_no_dead_link_in_a_notebook(path):
    assert [link for cell in cells(path) for link in dead(cell, path)] == []


# ---- files named in sources --------------------------------------------------------------------

EXAMPLES = {"report.md", "page.md", "module.py", "my_task.py"}  # of a run, or of a user
WORD = r"(?<![\w./*-])([\w-]+(?:/[\w.-]+)*\.(?:py|md|ipynb))(?!\w)"


def said(path: Path) -> list[str]:
    """The docstrings and comments of a source."""
    text = path.read_text(encoding="utf-8")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return found + [token.string for token in tokens if token.type == tokenize.COMMENT]


def missing(text: str, path: Path) -> list[str]:
    """The files that a text in the source `path` names and that are nowhere: whole paths from the top, or from the
    source's folder or its parent; a bare name may be that of any file."""
    found = []
    for word in re.findall(WORD, re.sub(r"(?m)^ *(?:\$ )?(?:python|pip|make|curl) .*$", "", text)):
        places = [ROOT / word, path.parent / word, path.parent.parent / word]
        known = any(place.exists() for place in places) or ("/" not in word and word in NAMES | EXAMPLES)
        if not known and ("/" not in word or word.split("/")[0] in FOLDERS):
            found.append(word)
    return found


@pytest.mark.parametrize("path", **named([p for p in SOURCES if p.relative_to(ROOT).parts[0] != "tests"]))
def test_files_named_in_docstrings_and_comments_exist(path):
    assert [word for text in said(path) for word in missing(text, path)] == []


# ---- the test itself ---------------------------------------------------------------------------


def test_faults_are_found():
    page = ROOT / "docs" / "page.md"
    good = "[a](tasks.md) [b](../README.md) [c](https://x.org/y) ![d](results/count.png) `[e](none.md)`\n[f](#top)"
    assert dead(good, ROOT / "docs" / "tasks.md") == ["#top"]  # the headings are those of the file, not of this text
    assert dead("[a](tasks.md#measuring-a-checkpoint)", page) == []
    for link in ("none.md", "tasks.md#none", "../minir1/none.py", "../../x.md", "../minir1/losses.py#L10"):
        assert dead(f"see [a]({link}).", page) == [link]
    assert dead('<img src="none.png">\n```\n[a](none.md)\n```', page) == ["none.png"]
    for link in ("<none file.md>", "none.md 'title'", "none.md (title)", 'none.md "title"', "<none.md>"):
        assert dead(f"[a]({link})", page) == [re.sub("[<>]| ['\"(]title.$", "", link)]
    assert dead("<a href=none.md>x</a> <img src='none.png'>", page) == ["none.md", "none.png"]
    assert dead("[a][b] [c][] [d][E]\n\n[e]: tasks.md\n[f]: none.md", page) == ["[a][b]", "[c][]", "none.md"]
    headings = "## A `b`, c: d\n# A b\n## A b\n```\n# no\n```\n### [x](y.md) z"
    assert anchors(headings) == {"a-b-c-d", "a-b", "a-b-1", "x-z"}
    source = ROOT / "minir1" / "losses.py"
    assert missing("see reduction.py, minir1/none.py, none_here.py and docs/tasks.md\n    python -m x.py", source) == [
        "minir1/none.py", "none_here.py",
    ]  # fmt: skip
