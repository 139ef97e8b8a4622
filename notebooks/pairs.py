"""A task so small that a policy learns it in seconds: which two of five numbers have the target as their sum?

    make 9 from 2,6,5,4,1        <think>2+6=8:9 no
                                 2+5=7:9 no
                                 2+4=6:9 no
                                 2+1=3:9 no
                                 6+5=11:9 no
                                 6+4=10:9 no
                                 6+1=7:9 no
                                 5+4=9:9 yes
                                 </think><answer>5+4</answer>

The corpus is written by people who try one pair after the other; most of them give up early and answer with the last
pair they tried. Only a reward for right answers says that going on is worth its tokens.
"""

import random
import re
from collections.abc import Iterator
from itertools import combinations

from minir1 import rewards
from minir1.tasks import Problem, Verdict, share

SPLITS = ("train", "validation", "test")
DATA = None  # problems are generated
LARGEST, NUMBERS, ORDERS = 7, 5, 6
CHECKED, AT_ONCE, PATIENT = 0.35, 0.15, 0.2  # shares: of the documents; of the problems; of the searches
RIGHT, GIVE_UP = 0.2, 0.8  # chances: of an answer at once to be right; of the others to give up after a try
PROMPT = re.compile(r"make ([0-9]+) from ([0-9](?:,[0-9])*)")
TRY = re.compile(r"([0-9])\+([0-9])=([0-9]+):([0-9]+) (yes|no)\n")


def problems(split: str, data: None = None) -> list[Problem]:
    """The problems of one split: sets of numbers in several orders, with a sum of two of them as the target.

    A set with its target is in one split only, by a stable hash, whatever the order.
    """
    low, high = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}[split]
    listed = []
    for numbers in combinations(range(1, LARGEST + 1), NUMBERS):
        for target in sorted({a + b for a, b in combinations(numbers, 2)}):
            if low <= share(f"{numbers} {target}") < high:
                for n in range(ORDERS):
                    order = sorted(numbers, key=lambda number: share(f"{numbers} {target} {n} {number}"))
                    pair = next(f"{a}+{b}" for a, b in combinations(order, 2) if a + b == target)
                    listed.append(Problem(f"make {target} from {','.join(map(str, order))}", pair))
    return listed


def parse(prompt: str) -> tuple[int, list[int]]:
    """The target, and the numbers in their order. ValueError for another text."""
    match = PROMPT.fullmatch(prompt)
    if not match:
        raise ValueError(f"no problem of this task: {prompt!r}; such as 'make 9 from 2,5,4,8,3'")
    return int(match[1]), [int(n) for n in match[2].split(",")]


def verify(problem: Problem, text: str) -> Verdict:
    """Right iff the answer is the sum of two different ones of the numbers, in either order, and makes the target."""
    target, numbers = parse(problem.prompt)
    match = re.fullmatch(r"([0-9])\+([0-9])", rewards.answer(text) or "")
    a, b = map(int, match.groups()) if match else (0, 0)
    right = a + b == target and a != b and {a, b} <= set(numbers)
    return Verdict("right" if right else "wrong", {"accuracy": float(right)})


def behaviour(problem: Problem, text: str) -> dict[str, float]:
    """Counts of the thinking: tries, and whether the last of them was called a solution."""
    found = TRY.findall(text.partition("</think>")[0])
    return {"tries": len(found), "said_yes": bool(found) and found[-1][-1] == "yes"}


def documents(seed: int) -> Iterator[str]:
    """The corpus: problems answered at once or after some tries, and pairs compared with a target."""
    rng, train = random.Random(f"pairs {seed}"), problems("train")
    while True:
        if rng.random() < CHECKED:
            yield "".join(_checked(rng) for _ in range(6))
        else:
            problem = rng.choice(train)
            thinking, answer = _at_once(rng, problem) if rng.random() < AT_ONCE else _searched(rng, problem)
            yield f"User:{problem.prompt}\nAssistant:<think>{thinking}</think><answer>{answer}</answer>"


def vocabulary() -> tuple[tuple[str, ...], int]:
    """The words of the corpus and its largest number."""
    return ("User:", "\nAssistant:", "make ", " from ", " yes\n", " no\n"), 2 * LARGEST


def probes() -> list[list[tuple[str, str]]]:
    """Three tries of 100 validation problems, whose sums and verdicts the model must predict."""
    texts = []
    for n, problem in enumerate(problems("validation")[:100]):
        target, numbers = parse(problem.prompt)
        pairs = random.Random(n).sample([*combinations(numbers, 2)], 2)
        pairs.append(tuple(map(int, problem.reference.split("+"))))
        pieces = [(f"User:{problem.prompt}\nAssistant:<think>", "")]
        for a, b in pairs:
            verdict = "yes" if a + b == target else "no"
            pieces += [(f"{a}+{b}=", ""), (str(a + b), "sums"), (f":{target}", ""), (f" {verdict}\n", verdict)]
        texts.append(pieces)
    return texts


def _at_once(rng: random.Random, problem: Problem) -> tuple[str, str]:
    """No thinking, and an answer that is sometimes right."""
    a, b = rng.sample(parse(problem.prompt)[1], 2)
    return "", problem.reference if rng.random() < RIGHT else f"{a}+{b}"


def _searched(rng: random.Random, problem: Problem) -> tuple[str, str]:
    """Tries in the order of the prompt until one succeeds or patience ends, and the last of them."""
    target, numbers = parse(problem.prompt)
    lines, patient = [], rng.random() < PATIENT
    for a, b in combinations(numbers, 2):
        lines.append(_line(a, b, target))
        if a + b == target or (not patient and rng.random() < GIVE_UP):
            break
    return "".join(lines), f"{a}+{b}"


def _checked(rng: random.Random) -> str:
    """A sum compared with a target, which it meets half of the time."""
    a, b = rng.sample(range(1, LARGEST + 1), 2)
    return _line(a, b, a + b if rng.random() < 0.5 else rng.randint(3, 2 * LARGEST - 1))


def _line(a: int, b: int, target: int) -> str:
    return f"{a}+{b}={a + b}:{target} {'yes' if a + b == target else 'no'}\n"
