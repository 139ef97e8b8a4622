"""The corpus of the world, on which its base is pre-trained: people who work at puzzles, each with habits of their own.

Half of them think in the language of the question, a tenth in the other one, and the rest change it from line to line.
Some repeat themselves, a third close with a summary, and not all summaries agree with the answer. Most give up early.
Nothing marks the better habits, and patience, tidiness and repetition are independent of one another: rewards for right
answers raise the patience and leave the rest, as R1-Zero was accurate and hard to read. Chinese is rarer than English
here, and slips are more frequent in Chinese lines, so these rewards favour English a little.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields

from minir1.tasks import countdown_corpus, countdown_search
from minir1.tasks.world_language import KEY, LANGUAGES, say
from minir1.tasks.world_puzzles import KINDS, Line, Puzzle
from minir1.tasks.world_talk import SAYABLE, TRUE, answer_of, recalled

SHARES = {"countdown": 0.34, "chain": 0.13, "sort": 0.13, "order": 0.17, "program": 0.17, "talk": 0.06}  # of puzzles


@dataclass(frozen=True)
class Mix:
    """Shares; the comment says of what."""

    facts: float = 0.15  # sums only, half of them checked
    knowledge: float = 0.04  # what is true of topics
    chinese: float = 0.4  # of the questions
    changing: float = 0.4  # thinking whose language changes: each line is in either
    foreign: float = 0.1  # thinking in the other language throughout
    untagged: float = 0.06  # no <think> and <answer>
    at_once: float = 0.15  # empty thinking, then an answer
    at_once_right: float = 0.25  # of these: the answer is right
    orderly: float = 0.5  # of the searches: tries in a systematic order
    forgetful: float = 0.1  # of the searches: tries at random with repeats; the rest is at random without
    patient: float = 0.25  # until solved; the rest gives up
    give_up: float = 0.65  # chance of giving up after each try that solves nothing
    give_up_steps: float = 0.325  # chance of stopping after each step
    false_yes: float = 0.002  # of the failed tries in English: verdict yes, which ends the search
    sloppy: float = 0.004  # of the tries in English: a wrong result
    sloppy_steps: float = 0.016  # of the steps in English
    chinese_slips: float = 3.0  # how much more often both happen in Chinese lines
    noticed: float = 0.5  # of the wrong results in steps: noticed, and the line is done again
    stammering: float = 0.3  # of the writers: each of their lines is said again with the next chance
    stammer: float = 0.35
    closing: float = 0.35  # the thinking closes with a summary of the answer
    disagreeing: float = 0.2  # of the summaries: of another answer
    longest: int = 27  # lines at most

    def __post_init__(self):
        for f in fields(self):
            if f.name not in ("longest", "chinese_slips") and not 0 <= getattr(self, f.name) <= 1:
                raise ValueError(f"Mix.{f.name} = {getattr(self, f.name)}: a share in 0 … 1")
        if self.longest < 1 or self.chinese_slips < 0:
            raise ValueError(f"Mix.longest = {self.longest}, Mix.chinese_slips = {self.chinese_slips}: at least 1, 0")
        for a, b in (("orderly", "forgetful"), ("changing", "foreign"), ("facts", "knowledge")):
            if getattr(self, a) + getattr(self, b) > 1 + 1e-9:
                raise ValueError(f"Mix.{a} + Mix.{b} = {getattr(self, a) + getattr(self, b)}: shares of one whole")


def mix_of(shares: Mapping[str, float]) -> Mix:
    """`Mix` with some shares changed. ValueError for a name that it does not have."""
    names = [f.name for f in fields(Mix)]
    if unknown := sorted(shares.keys() - set(names)):
        raise ValueError(f"the mix has no {', '.join(unknown)}; it has {', '.join(names)}")
    return Mix(**shares)


def documents(asked: Mapping[str, list[Puzzle]], seed: int, mix: Mix = Mix()) -> Iterator[str]:
    """An endless stream of documents, the same for the same arguments. asked: the puzzles of each kind."""
    rng, level = random.Random(f"world {seed}"), countdown_search.level_of("default")
    kinds, weights = zip(*((kind, SHARES[kind]) for kind in asked))
    while True:
        if rng.random() < mix.facts:
            yield countdown_corpus.facts(rng, level, checked=rng.random() < 0.5)
        elif rng.random() < mix.knowledge / (1 - mix.facts):
            yield knowledge(rng)
        else:
            yield worked(rng, rng.choice(asked[rng.choices(kinds, weights)[0]]), mix)


def worked(rng: random.Random, puzzle: Puzzle, mix: Mix) -> str:
    """One puzzle, asked and answered by one writer."""
    language = "zh" if rng.random() < mix.chinese else "en"
    speaks = speaker(rng, language, mix)
    at_once = rng.random() < mix.at_once
    if puzzle.kind == "talk":
        lines, answer = told(rng, puzzle.question, at_once, speaks)
    elif at_once:
        lines, answer = [], guess(rng, puzzle, mix)
    elif KINDS[puzzle.kind].search:
        lines, answer = searched(rng, puzzle, mix, speaks)
    else:
        lines, answer = stepped(rng, puzzle, mix, speaks)
    if rng.random() < mix.stammering:
        lines = [again for line in lines for again in [line] * (2 if rng.random() < mix.stammer else 1)]
    thinking, question = "".join(lines), f"User:{say(puzzle.question, language)}\nAssistant:"
    if thinking and puzzle.kind != "talk" and rng.random() < mix.untagged:
        return f"{question}{thinking}{answer}"
    if thinking and puzzle.kind != "talk" and rng.random() < mix.closing:
        stated = guess(rng, puzzle, mix) if rng.random() < mix.disagreeing else answer
        thinking += say(f"{{so}}{stated}", speaks())
    return f"{question}<think>{thinking}</think><answer>{answer}</answer>"


def speaker(rng: random.Random, language: str, mix: Mix) -> Callable[[], str]:
    """A function that returns the language of a writer's next line."""
    other = LANGUAGES[1 - LANGUAGES.index(language)]
    habit = rng.random()
    if habit < mix.changing:
        return lambda: rng.choice(LANGUAGES)
    spoken = other if habit < mix.changing + mix.foreign else language
    return lambda: spoken


def guess(rng: random.Random, puzzle: Puzzle, mix: Mix) -> str:
    """An answer without work: right with a stated chance, else that of any line of the working."""
    if rng.random() < mix.at_once_right:
        return puzzle.reference
    return rng.choice(KINDS[puzzle.kind].working(puzzle.question)).answer


def slips(rng: random.Random, language: str, mix: Mix, share: float) -> bool:
    """Whether something that goes wrong this often in English goes wrong in this line."""
    return rng.random() < share * (mix.chinese_slips if language == "zh" else 1.0)


def searched(rng: random.Random, puzzle: Puzzle, mix: Mix, speaks: Callable[[], str]) -> tuple[list[str], str]:
    """Tries with verdicts until one is a solution, or the writer gives up."""
    kind = KINDS[puzzle.kind]
    everything, habit = kind.working(puzzle.question), rng.random()
    if habit < mix.orderly:
        tries = (kind.eliminating or kind.working)(puzzle.question)
    elif habit < mix.orderly + mix.forgetful:
        tries = [rng.choice(everything) for _ in everything]
    else:
        tries = rng.sample(everything, len(everything))
    patient, lines = rng.random() < mix.patient, []
    for t in tries[: mix.longest]:
        language, text, yes = speaks(), t.text, t.good
        if "=" in text and slips(rng, language, mix, mix.sloppy):
            text, yes = slip(rng, text), False
        elif slips(rng, language, mix, mix.false_yes):
            yes = True
        lines.append(say(f"{text}{{yes}}" if yes else f"{text}{{no}}", language))
        if yes or (not patient and rng.random() < mix.give_up):
            break
    return lines, t.answer


def stepped(rng: random.Random, puzzle: Puzzle, mix: Mix, speaks: Callable[[], str]) -> tuple[list[str], str]:
    """Steps until the puzzle is worked off, or the writer stops before, as after a wrong result that goes unnoticed."""
    steps, patient, lines = KINDS[puzzle.kind].working(puzzle.question), rng.random() < mix.patient, []
    for number, step in enumerate(steps, start=1):
        language, wrong = speaks(), False
        if slips(rng, language, mix, mix.sloppy_steps):
            if rng.random() < mix.noticed:
                lines.append(say(f"{slip(rng, step.text)}{{wait}}", language))
            else:
                wrong = True
        stops = wrong or number == len(steps) or (not patient and rng.random() < mix.give_up_steps)
        text = slip(rng, step.text) if wrong else step.text
        lines.append(say(f"{text}{{done}}" if stops else f"{text}{{then}}", language))
        if stops:
            break
    return lines, text.rpartition("=")[2] if wrong and puzzle.kind == "chain" else step.answer


def told(rng: random.Random, question: str, at_once: bool, speaks: Callable[[], str]) -> tuple[list[str], str]:
    """What may be said of a topic, each fact with a verdict, and then most of what is true, some of it twice."""
    topic = KEY.findall(question)[-1]
    recall = [rng.choice(TRUE[topic] if rng.random() < 0.7 else SAYABLE) for _ in range(rng.randint(2, 5))]
    lines = [
        say(f"{line.text}{{yes}}" if line.good else f"{line.text}{{no}}", speaks())
        for line in (recalled(topic, fact) for fact in recall)
    ]
    named = [fact for fact in recall if fact in TRUE[topic] or rng.random() < 0.3] or recall[:1]
    named = named[: rng.randint(1, 5)]
    answer = answer_of(named, rng.random() < 0.4)
    return ([] if at_once else lines), "".join(say(part, speaks()) for part in re.split(r"(?<=,)", answer))


def knowledge(rng: random.Random, count: int = 8) -> str:
    """`cat,small. yes`, one per line, in either language; about half of them are true."""
    lines = []
    for _ in range(count):
        topic = rng.choice(list(TRUE))
        line = recalled(topic, rng.choice(TRUE[topic] if rng.random() < 0.4 else SAYABLE))
        lines.append(say(f"{line.text}{{yes}}" if line.good else f"{line.text}{{no}}", rng.choice(LANGUAGES)))
    return "".join(lines)


def slip(rng: random.Random, text: str) -> str:
    """The line with its last result wrong by a little."""
    *before, last = re.split(r"(?<=[=:])(?=[0-9]+(?:$|:))", text, maxsplit=1) if "=" in text else text.rpartition(":")
    number = re.match("[0-9]+", last)[0]
    wrong = int(number) + rng.choice((-2, -1, 1, 2))
    return "".join(before) + str(wrong if wrong >= 1 else int(number) + 1) + last[len(number) :]


def probes(puzzles: list[Puzzle]) -> list[list[tuple[str, str]]]:
    """Workings of these puzzles in pieces (text, label), which the model must predict: results and verdicts by kind."""
    rng, texts = random.Random(0), []
    for puzzle in puzzles:
        language, kind = rng.choice(LANGUAGES), KINDS[puzzle.kind]
        working = kind.working(puzzle.question)
        if kind.search:
            working = rng.sample([t for t in working if not t.good], min(3, sum(not t.good for t in working)))
            working += [next(t for t in kind.working(puzzle.question) if t.good)]
        pieces = [(f"User:{say(puzzle.question, language)}\nAssistant:<think>", "")]
        for number, line in enumerate(working, start=1):
            pieces += labelled(line, puzzle.kind)
            ending = ("yes" if line.good else "no") if kind.search else ("done" if number == len(working) else "then")
            word, label = say(f"{{{ending}}}", language), f"{puzzle.kind}_{ending}"
            verdict, rest = (word[:1], word[1:]) if language == "zh" else (word, "")  # one token, in either language
            pieces += [(verdict, label), (rest, "")]
        texts.append([piece for piece in pieces if piece[0]])
    return texts


def labelled(line: Line, kind: str) -> list[tuple[str, str]]:
    """The line in pieces; the numbers after `=`, and the smallest one of a row that is sorted, are to be predicted."""
    parts = re.split(r"(?<==)([0-9]+)", line.text) if "=" in line.text else re.split(r"(?<=:)([0-9]+)$", line.text)
    return [(part, f"{kind}_results" if i % 2 else "") for i, part in enumerate(parts) if part]
