"""The program in a model's text: thinking, tags, Markdown and what follows the function are taken away."""

from __future__ import annotations

import re
import textwrap

from minir1 import sandbox
from minir1.tasks import Verdict

LONGEST = 2**16  # characters of a program
STARTS = re.compile(r"(?:from|import|def|async def|class|@)\b|@|#")  # lines a program can start with
STATEMENT = re.compile(
    r"(?:from|import|def|async def|class|if|elif|else|for|while|try|except|finally|with)\b.*[:\w)*]$"
)
BINDING = re.compile(r"\w+\s*(?::[^=]*)?=|@|#|[)\]}]|\"\"\"|'''")
FUTURE = re.compile(r"^from __future__ import .*$", re.MULTILINE)


def answer(text: str) -> str | None:
    """The text after the thinking, or in its answer tags; None if thinking or tags are not closed, or repeated."""
    said = text.rpartition("</think>")[2]
    if "<think>" in said:
        return None
    if "<answer>" not in said and "</answer>" not in said:
        return said
    _, opened, rest = said.partition("<answer>")
    content, closed, more = rest.partition("</answer>")
    return content if opened and closed and "answer>" not in content + more else None


def blocks(text: str) -> list[str]:
    """The contents of the fenced code blocks of a Markdown text; the last one may be unclosed."""
    contents, fence = [], ""
    for line in text.split("\n"):
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if fence:
            if mark and mark[1].startswith(fence) and line.strip() == mark[1]:
                fence = ""
            else:
                contents[-1].append(line)
        elif mark:
            fence = mark[1]
            contents.append([])
    return ["\n".join(lines) + "\n" for lines in contents]


def defines(program: str, name: str) -> bool:
    """Whether a line of the program looks like the definition of a name, at any depth."""
    name = re.escape(name)
    pattern = rf"^[ \t]*(?:(?:(?:async +)?def|class) +{name}\b|{name} *(?::.*)?=(?!=))"
    return re.search(pattern, program, re.MULTILINE) is not None


def chosen(text: str, names: list[str]) -> str | None:
    """The last fenced block that defines one of the names, else the last one; None without a block."""
    listed = blocks(text)
    if not listed:
        return None
    program = ([block for block in listed if any(defines(block, name) for name in names)] or listed)[-1]
    first = next((line for line in program.split("\n") if line.strip()), "")
    indented = first[:1].isspace() and any(defines(program, name) for name in names)
    return textwrap.dedent(program) if indented else program  # a block in a list


def continuation(text: str) -> str:
    """What a text adds to an open function, up to the next line at the margin that closes no bracket or string.

    So it ends before another function, class, comment, test or print, as in Chen et al. 2021, and before a fence.
    """
    first, *lines = text.split("\n")
    body = [first]
    for line in lines:
        if line.strip() and not line[0].isspace() and line[:1] not in tuple(")]}") and line[:3] not in ('"""', "'''"):
            break
        body.append(line)
    return "\n".join(body) + "\n"


def whole(text: str, names: list[str]) -> str:
    """The program in a text without fences: sentences before it and after the definitions of the names are left out."""
    lines = text.split("\n")
    start = next((i for i, line in enumerate(lines) if STARTS.match(line)), 0)
    program, defined = [], False
    for line in lines[start:]:
        margin = line[:1].strip() != ""
        defined = defined or any(name in line and defines(line, name) for name in names)
        if margin and defined and not STATEMENT.match(line.rstrip()) and not BINDING.match(line):
            break
        program.append(line)
    return "\n".join(program) + "\n"


def completed(prompt: str, text: str, name: str) -> str | None:
    """The program that a text makes of a prompt, which ends in the head of the function `name`; None if there is none.

    A text that defines the function anew follows the whole prompt, with its imports and helpers. Any other continues
    the prompt.
    """
    said = answer(text)
    if said is None or len(said) > LONGEST:
        return None
    first = next((line for line in said.split("\n") if line.strip()), "")
    if not first:
        return None
    if not re.match(r"  +(?!```)\S|\t", first):  # else the body of the function, at once
        block = chosen(said, [name])
        said = block if block is not None else whole(said, [name]) if defines(said, name) else said
        if defines(said, name):
            return f"{prompt}\n{FUTURE.sub('', said)}"
    return prompt + continuation(said) if said.strip() else None


def judged(program: str | None, tests: str, **rest) -> Verdict:
    """The verdict of `sandbox.run_tests`, which also takes `rest`; None, no program, is wrong."""
    if program is None:
        return Verdict("wrong", {"accuracy": 0.0}, "no program")
    result = sandbox.run_tests(program, tests, **rest)
    status = {"passed": "right", "failed": "wrong", "unjudged": "unjudged"}[result.status]
    return Verdict(status, {"accuracy": float(status == "right")}, result.reason)
