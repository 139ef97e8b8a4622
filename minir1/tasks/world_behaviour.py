"""What a model does in its thinking about a puzzle of the world, and the same thinking rewritten in form."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import groupby

from minir1 import rewards
from minir1.tasks import Problem
from minir1.tasks.world_language import ENDINGS, neutral, say
from minir1.tasks.world_puzzles import KINDS, RESULTS, kind_of

# A line starts after a line break or a brace: without that, a long text without an ending takes quadratic time.
LINE = re.compile(
    rf"(?<![^{{}}\n])([^{{}}\n]*(?:\{{(?!(?:{'|'.join(ENDINGS)})\}})[a-z]+\}}[^{{}}\n]*)*)\{{({'|'.join(ENDINGS)})\}}"
)


def lines_of(text: str) -> list[tuple[str, str]]:
    """(neutral text, ending) of each line of the thinking that ends with one of the ending words."""
    thinking = text.partition("</think>")[0].replace("<think>", "\n")
    return [(match[1].strip(), match[2]) for match in LINE.finditer(neutral(thinking))]


def behaviour(problem: Problem, text: str) -> dict[str, float]:
    """Counts over the lines of the thinking, in either language. Keys:
    tries, steps       lines with a verdict, yes or no; other lines
    checks             explicit checks: verdicts, and `wait`
    failed_checks      of these: no, or wait
    corrections        failed checks after which another line follows
    false_yes          verdicts yes on a line with a wrong sum, or that is no solution
    repeats            lines with a verdict that occurred before
    wrong_sums         sums whose result is wrong
    """
    lines, question = lines_of(text), neutral(problem.prompt)
    verdicts = [line for line in lines if line[1] in ("yes", "no")]
    failed = [i for i, (_, ending) in enumerate(lines) if ending in ("no", "wait")]
    solutions = _solutions(question)
    return {
        "tries": len(verdicts),
        "steps": len(lines) - len(verdicts) - sum(ending == "wait" for _, ending in lines),
        "checks": sum(ending in ("yes", "no", "wait") for _, ending in lines),
        "failed_checks": len(failed),
        "corrections": sum(i + 1 < len(lines) for i in failed),
        "false_yes": sum(ending == "yes" and line not in solutions for line, ending in verdicts),
        "repeats": len(verdicts) - len({line for line, _ in verdicts}),
        "wrong_sums": sum(_wrong(*m.groups()) for line, _ in lines for m in RESULTS.finditer(line)),
    }


@lru_cache(maxsize=4096)
def _solutions(question: str) -> frozenset[str]:
    """The lines that deserve a yes."""
    kind = kind_of(question)
    if kind == "talk":
        return frozenset()
    return frozenset(line.text for line in KINDS[kind].working(question) if line.good and KINDS[kind].search)


def _wrong(a: str, op: str, b: str, c: str) -> bool:
    return {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op] != int(c)


def rewrite(problem: Problem, text: str) -> str | None:
    """The text in good form, by rules, as people would edit it.

    Its lines in the language of the question; without a line that only repeats the one before, and without lines that
    have a wrong sum, unless the writer noticed (`wait`); then a summary that states the answer. None if there is no
    answer, no line is left, or a line says yes to what is no solution.
    """
    question, answer = neutral(problem.prompt), rewards.answer(text)
    lines = [
        (line, ending)
        for (line, ending), _ in groupby(lines_of(text))
        if ending == "wait" or not any(_wrong(*match.groups()) for match in RESULTS.finditer(line))
    ]
    talk = kind_of(question) == "talk"
    false = not talk and any(ending == "yes" and line not in _solutions(question) for line, ending in lines)
    if not answer or not lines or false:
        return None
    thinking = "".join(f"{line}{{{ending}}}" for line, ending in lines) + ("" if talk else f"{{so}}{answer}")
    return say(f"<think>{thinking}</think><answer>{neutral(answer)}</answer>", problem.language)
