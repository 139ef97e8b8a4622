r"""The one final answer of a text: which part of it counts, shared by all tasks with a stated answer.

One claim counts, so that listing guesses gains nothing: where several are made in the same way, the last one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from minir1 import rewards
from minir1.tasks import Problem

VARIANTS = ("plain", "boxed")  # boxed: the prompt asks for reasoning and an answer in \boxed{}
BOXED_INSTRUCTION = "Reason step by step, and write the final answer in \\boxed{} at the end."

MAX_CHARS = 2000  # of a claim: a longer one is no answer
TRIES = 500  # occurrences of a word, from the end, among which a claim is searched: bounds the time, with REACH
REACH = 400  # characters from such a word on that may belong to it
BOX = re.compile(r"\\boxed\s*\{")
BRACE = re.compile(r"(?P<box>\\boxed\s*\{)|\\(?:[{}]|\\(?!boxed))|(?P<open>\{)|(?P<close>\})")
STATED = re.compile(
    r"""answer (?:\*\*)? (?:\ (?:to|for|of)(?:\ (?!is\b)[^\s.:]+){1,12})?
        \s* (?: (?:is|are|was|would\ be|equals)\b | [:=] | (?<=final\ answer)[*_]*\n | (?<=final\ answer\*\*)\n )
        (?:\*\*)? [\s:]*""",
    re.IGNORECASE | re.VERBOSE,
)
DISPLAYED = re.compile(r"(?:\$\$(.*?)\$\$|\\\[(.*?)\\\])", re.DOTALL)  # a formula on lines of its own
END = re.compile(r"""(?:[.?]|(?<![0-9\\])!)(?=[\s*_)"'”]|$)|\n""")  # of a sentence or line; 5! is a factorial
HEADING = re.compile(r"[ \t*_]*[A-Za-z]{2}[^\n]*\n\s*\S")  # words with a text below them: `#### Step 2`
ENDED = re.compile(r"(?:(?:</s>|<eos>|<end_of_turn>|<[|｜][^<>\s]{1,40}[|｜]>)\s*)+$")  # special tokens at the end
NEXT_QUESTION = re.compile(r"\n[ \t]*\n(?:Question|Problem|Human|User|Q)(?: [0-9]{1,3})?:")  # a base model goes on
MATH_ENDS = r"(?:\s|\$|\*\*|\\[()\[\],;: ]|\\q?quad(?![A-Za-z]))*"
CONJUNCTION = r"(?:and|or|&|\\(?:text|mbox|mathrm)\s*\{[\s,]*(?:and|or)[\s,]*\})"
BETWEEN_BOXES = re.compile(  # `, and n =`: boxes of one list
    rf"{MATH_ENDS}(?:[,;]{MATH_ENDS}{CONJUNCTION}?|{CONJUNCTION}){MATH_ENDS}(?:[A-Za-z](?:_\w)?\s*=)?\s*"
)
GAP = 60  # characters between two boxes of one list
SPACED = re.compile(r"(?![0-9]{1,3}(?: [0-9]{3})+$)(?:[0-9]+ +)+([0-9]+)")  # 3 5, but not 8 000


def asked(problems: Iterable[Problem], variant: str) -> list[Problem]:
    """The problems with the prompts of a variant."""
    if variant == "plain":
        return list(problems)
    return [replace(problem, prompt=f"{problem.prompt}\n\n{BOXED_INSTRUCTION}") for problem in problems]


def claim(text: str, otherwise: Callable[[str], str | None] | None = None) -> str | None:
    r"""The one final answer of a text, as written and stripped; None if there is none.

    With an answer tag anywhere, it is what `rewards.answer` reads. Otherwise it is searched after the thinking. The
    first of these that occurs decides, and in it the last occurrence:

        \boxed{…}               or \fbox; None if its brace is never closed. Without a brace it is ignored
        #### …                  to the end of the sentence or line; not a heading with text below it
        the answer is …         or `Answer: …`, `Final answer`: to the end of the sentence or line, or the formula that
                                begins there. Of numbers with only blanks between them the last one counts
        otherwise(conclusion)   if given: the task's own way to find an answer, asked only if none of these occurs
    """
    if "<answer>" in text or "</answer>" in text:
        return rewards.answer(text)
    said = conclusion(text)
    if said is None:
        return None
    said = said.replace("\\fbox", "\\boxed")
    said = said[:-MAX_CHARS] + ENDED.sub("", said[-MAX_CHARS:])
    if len(parts := NEXT_QUESTION.split(said, 1)) > 1 and (first := _explicit(parts[0])):
        return first
    return _explicit(said, otherwise)


def _explicit(said: str, otherwise: Callable[[str], str | None] | None = None) -> str | None:
    """The claim of a text without thinking, as `claim` says."""
    if _last("\\boxed", BOX, said):
        return boxed(said)
    before, marked, after = said.rpartition("####")
    if marked and not HEADING.match(after[:MAX_CHARS]):
        return _short(sentence(after.partition("\n")[0].strip()[: MAX_CHARS + 1]))
    stated = _last("answer", STATED, said.replace("Answer", "answer").replace("ANSWER", "answer"))
    if stated:
        return _short(_stated(said[stated.end() : stated.end() + MAX_CHARS + 1]))
    return otherwise(said) if otherwise else None


def _stated(text: str) -> str:
    """What is stated at the beginning of a text: a displayed formula, a number, or a sentence."""
    if formula := DISPLAYED.match(text):
        return formula[1] or formula[2] or ""
    said = sentence(text)
    spaced = SPACED.fullmatch(said)
    return spaced[1] if spaced else said


def _last(word: str, pattern: re.Pattern, text: str) -> re.Match | None:
    """The last match of a pattern that begins with `word`."""
    end = len(text)
    for _ in range(TRIES):
        start = text.rfind(word, 0, end)
        if start < 0:
            return None
        if match := pattern.match(text, start, start + REACH):
            return match
        end = start
    return None


def conclusion(text: str) -> str | None:
    """What follows the thinking, which is the whole text if there are no think tags; None if it was never closed."""
    said = text.rpartition("</think>")[2]
    return None if "<think>" in said else said


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` or `\fbox{…}`, stripped; of the outer one where two are nested.

    Boxes of one list, such as `\boxed{1}$ and $\boxed{-2}`, are one answer: `1, -2`. Braces are balanced, escaped ones
    not counted. None if there is none, or the last one is never closed or longer than MAX_CHARS.
    """
    text = text.replace("\\fbox", "\\boxed")
    last = _last("\\boxed", BOX, text)
    if not last:
        return None
    window = text[max(0, last.start() - MAX_CHARS) : last.end() + MAX_CHARS]
    boxes, starts, closed = [], [], True  # starts: of the open braces, None for those that open no box
    for brace in BRACE.finditer(window):
        if brace["box"]:
            closed = False
            starts.append(brace.span())
        elif brace["open"]:
            starts.append(None)
        elif brace["close"] and starts and (start := starts.pop()):
            while boxes and boxes[-1][0] > start[0]:  # inside this one
                boxes.pop()
            boxes.append((start[0], brace.end(), window[start[1] : brace.start()].strip()))
            closed = True
    if not closed:
        return None
    begin, _, content = boxes[-1]
    contents = [content]
    for before, end, content in reversed(boxes[:-1]):
        if begin - end > GAP or not BETWEEN_BOXES.fullmatch(window, end, begin):
            break
        contents.insert(0, content)
        begin = before
    return ", ".join(dict.fromkeys(contents)) if all(contents) else None


def sentence(text: str) -> str:
    """The first sentence or line of a text, without its end and bold type; "" for a question."""
    text = re.sub(r"(?<![\w*])\*\*([^*\n]+)\*\*(?![\w*])", r"\1", text)
    end = END.search(text)
    if end is None:
        return text.strip(" \t*_")
    return "" if end[0] == "?" else text[: end.start()].strip(" \t*_")


def _short(text: str) -> str | None:
    text = text.strip()
    return text if 0 < len(text) <= MAX_CHARS else None
