"""What a model does in its thinking about a puzzle of the world, and the same thinking reformatted."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import groupby

from minir1 import rewards
from minir1.tasks import Problem, countdown_search
from minir1.tasks.world_language import ENDINGS, KEY, WORDS, neutral, say
from minir1.tasks.world_puzzles import KINDS, RESULTS, kind_of
from minir1.tasks.world_talk import TRUE, recalled

ENDING = re.compile(rf"\{{({'|'.join(ENDINGS)})\}}")


def lines_of(text: str) -> list[tuple[str, str]]:
    """(neutral text, ending) of each line of the thinking that ends with one of the ending words."""
    parts = ENDING.split(neutral(rewards.thinking(text)))
    return [(part.rpartition("\n")[2].strip(), ending) for part, ending in zip(parts[::2], parts[1::2])]


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
        "false_yes": sum(ending == "yes" and _ordered(line) not in solutions for line, ending in verdicts),
        "repeats": len(verdicts) - len({line for line, _ in verdicts}),
        "wrong_sums": sum(_wrong(*m.groups()) for line, _ in lines for m in RESULTS.finditer(line)),
    }


def attempts(problem: Problem, text: str) -> list[tuple[int, int, bool]]:
    """(start, end, whether it deserves a yes) of each line of the thinking that has a verdict, which follows `end`.

    start, end: characters of the text. A line with a wrong sum deserves none.
    """
    solutions, found = _solutions(neutral(problem.prompt)), []
    start = text.find("<think>") + len("<think>") if text.lstrip().startswith("<think>") else 0
    for line in rewards.thinking(text).split("\n"):
        read = lines_of(f"{line}\n")
        if len(read) == 1 and read[0][1] in ("yes", "no"):
            shown, ending = read[0]
            verdict = next(word.rstrip("\n") for word in WORDS[ending] if line.endswith(word.rstrip("\n")))
            found.append((start, start + len(line) - len(verdict), _ordered(shown) in solutions))
        start += len(line) + 1
    return found


@lru_cache(maxsize=4096)
def _solutions(question: str) -> frozenset[str]:
    """The lines that deserve a yes: tries that solve the puzzle, or what is true of the topic."""
    if (kind := kind_of(question)) == "talk":
        topic = KEY.findall(question)[-1]
        return frozenset(recalled(topic, fact).text for fact in TRUE[topic])
    return frozenset(_ordered(line.text) for line in KINDS[kind].working(question) if line.good and KINDS[kind].search)


def _ordered(line: str) -> str:
    """The line with the larger operand of + and * first, so that 3*8=24 is 8*3=24."""
    swap = lambda m: m[2] in "+*" and int(m[1]) < int(m[3])
    return RESULTS.sub(lambda m: f"{m[3]}{m[2]}{m[1]}={m[4]}" if swap(m) else m[0], line)


def _wrong(a: str, op: str, b: str, c: str) -> bool:
    return countdown_search.apply(int(a), op, int(b)) != int(c)


def rewrite(problem: Problem, text: str) -> str | None:
    """The text in good form, by rules, as people would edit it.

    Its lines in the language of the question; without lines that have a wrong sum, unless the writer noticed (`wait`),
    without a try that was made before, and without a step that only repeats the one before; then a summary that states
    the answer. None if there is no answer, no line is left, a line says yes to what deserves a no, or a search does not
    end with a yes.
    """
    question, answer, lines = neutral(problem.prompt), rewards.answer(text), lines_of(text)
    kind, solutions = kind_of(question), _solutions(question)
    false = any(ending == "yes" and _ordered(line) not in solutions for line, ending in lines)
    right = [
        (line, ending)
        for line, ending in lines
        if ending == "wait" or not any(_wrong(*match) for match in RESULTS.findall(line))
    ]
    stepwise = kind != "talk" and not KINDS[kind].search  # a chain may need the same sum twice
    lines = [line for line, _ in groupby(right)] if stepwise else list(dict.fromkeys(right))
    if not answer or not lines or false or (kind != "talk" and not stepwise and lines[-1][1] != "yes"):
        return None
    thinking = "".join(f"{line}{{{ending}}}" for line, ending in lines) + ("" if kind == "talk" else f"{{so}}{answer}")
    return say(f"<think>{thinking}</think><answer>{neutral(answer)}</answer>", problem.language)
