"""The filters of experiments/reject_sample.py, which also says what each of them removes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from experiments.evaluate import renewed
from minir1 import rewards
from minir1.judge import Answer, judge
from minir1.seed import python_random
from minir1.tasks import Problem, Task

if TYPE_CHECKING:
    from experiments.reject_sample import Config

CORRECT = {  # name -> whether an answer passes
    "truncated": lambda problem, answer: not answer.truncated,
    "unjudged": lambda problem, answer: not answer.unjudged,
    "wrong": lambda problem, answer: answer.right,
}


def readable(config: Config) -> dict[str, Callable[[Problem, Answer], bool]]:
    """The filters of form and language that are on: name -> whether an answer passes."""
    filters = {"malformed": lambda problem, answer: answer.format}
    if config.min_language > 0:
        language = lambda problem, text: rewards.language_consistency(text, problem.language)
        filters["mixed"] = lambda problem, answer: language(problem, answer.text) >= config.min_language
    if config.max_repetition < 1:
        filters["repetitive"] = lambda problem, answer: rewards.repetition(answer.text) <= config.max_repetition
    if config.tidy:
        filters["untidy"] = lambda problem, answer: rewards.tidiness(answer.text) == 1
    if config.max_length:
        filters["too_long"] = lambda problem, answer: answer.tokens <= config.max_length
    return filters


def select(
    task: Task,
    problems: Sequence[Problem],
    grid: Sequence[Sequence[Answer]],
    config: Config,
    length: Callable[[Problem, str], int],
) -> tuple[list[tuple[int, Answer]], dict[str, int]]:
    """(index of the problem, answer) of each kept answer, and how many each filter removed, in the filters' order.

    grid: the answers to each problem [P][n]; length: the tokens of a rewritten answer to a problem. The sum of what was
    removed and of what was kept is the number of answers.
    """
    left = [(p, answer) for p, row in enumerate(grid) for answer in row]
    removed: dict[str, int] = {}

    def apply(name: str, passing: list[bool]) -> None:
        nonlocal left
        removed[name] = passing.count(False)
        left = [one for one, passes in zip(left, passing) if passes]

    for name, passes in CORRECT.items():
        apply(name, [passes(problems[p], answer) for p, answer in left])
    if config.rewrite:
        texts = [task.rewrite(problems[p], answer.text) for p, answer in left]
        apply("not_rewritten", [text is not None for text in texts])
        asked = [(problems[p], text) for (p, _), text in zip(left, (text for text in texts if text is not None))]
        new = [rewritten(a, *pair, length(*pair)) for (_, a), pair in zip(left, asked)]
        left = [(p, renewed(a, verdict)) for (p, _), a, verdict in zip(left, new, judge(task, asked))]
        apply("wrong_rewritten", [answer.right for _, answer in left])
    for name, passes in readable(config).items():
        apply(name, [passes(problems[p], answer) for p, answer in left])
    apply("duplicate", first_of_each([(p, *answer.text.split()) for p, answer in left]))
    if config.per_problem:
        apply("surplus", drawn([p for p, _ in left], config.per_problem, config.seed))
    return left, removed


def rewritten(answer: Answer, problem: Problem, text: str, tokens: int) -> Answer:
    """The answer with another text; the one that it had already keeps its form and its tokens."""
    if text == answer.text:
        return answer
    return replace(answer, text=text, tokens=tokens, format=rewards.format_reward(text) > 0)


def first_of_each(keys: Sequence) -> list[bool]:
    """Whether each key is the first of its value."""
    first: dict = {}
    return [first.setdefault(key, i) == i for i, key in enumerate(keys)]


def drawn(indices: Sequence[int], most: int, seed: int) -> list[bool]:
    """For each answer, given the index of its problem, whether it is among the `most` that are drawn for that one."""
    answers = defaultdict(list)
    for i, p in enumerate(indices):
        answers[p].append(i)
    chosen = {i for p, group in answers.items() for i in python_random(seed, p).sample(group, min(most, len(group)))}
    return [i in chosen for i in range(len(indices))]
