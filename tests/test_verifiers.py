"""Texts that extractors and verifiers are known to misjudge, from public reports, with the verdicts that are right."""

import threading
from importlib.util import find_spec

import pytest

from minir1.rewards import format_reward
from minir1.tasks import Problem, aime, gsm8k, math

VERIFIERS = {"gsm8k": gsm8k.verify, "math": math.verify, "aime": aime.verify}


def box(content: str) -> str:
    return f"So \\boxed{{{content}}}."


MATRIX = "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"
RIGHT = [  # verifier, reference, text
    ("gsm8k", "72", "The total is 72 clips, altogether."),
    ("gsm8k", "5", "answer is 3 5"),
    ("gsm8k", "8000", box("8,000")),
    ("gsm8k", "9500", box("\\$9{,}500")),
    ("gsm8k", "29", "$29.00"),
    ("gsm8k", "-5", "\u22125"),
    ("gsm8k", "50", "50%"),
    ("gsm8k", "42", "#### 42" + " blah" * 80),
    ("gsm8k", "840", "\\boxed{840} … \\boxed{840}"),
    ("gsm8k", "840", "Put it in \\boxed please: \\boxed{840}"),
    ("gsm8k", "73", "**73**"),
    ("gsm8k", "13", "\\text{13}"),
    ("aime", "4", box("004")),
    ("math", "\\left(1,2\\right)", box("\\left(1,2\\right)")),
    ("math", "(2,\\infty)", box("(2,\\infty)")),
    ("math", "5\\text{ ft}", box("5 ft")),
    ("math", "5", box("5\\text{ ft}")),
    ("math", "50\\%", box("50")),
    ("math", "50", box("50%")),
    ("math", "50%", box("50\\%")),
    ("math", "13", box("\\text{13}")),
    ("math", "1/2^99", box("\\frac{1}{2^{99}}")),
    ("math", "3x-y+13=0", box("y=3x+13")),
    ("math", "[8.124,12.852]", box("[8.124,12.852]")),
    ("math", "\\frac{1}{2}", box("\\frac12")),
    ("math", "1\\frac{1}{2}", box("\\frac{3}{2}")),
    ("math", "-5", box("\u22125")),
    ("math", "30^\\circ", box("30")),
    ("math", "[a,b]", box("x \\in [a,b]")),
    ("math", "\\{1,2\\}", box("\\{2,1\\}")),
    ("math", "\\text{(A)}", box("A")),
    ("math", MATRIX, box(MATRIX.replace("pmatrix", "bmatrix"))),
]
WRONG = [
    *(("gsm8k", reference, "[8.124,12.852]") for reference in ("8.12412.852", "8.124", "12.852")),
    ("gsm8k", "-5", "5"),
    ("gsm8k", "5", "-5"),
    ("gsm8k", "840", "\\boxed{840} then \\boxed{84"),
    ("math", "840", "\\boxed{840} then \\boxed{84"),
    ("math", "1/2^99", box("1/2^98")),
    ("math", "1/2004!", box("1/2006!")),
    ("math", "n=2,3,4", box("n=1,2,3")),
    ("math", "\\pm 2021", box("2021")),
    ("math", "2021", box("±2021")),
    ("math", "12:00", box("1:00")),
    ("math", "3x-y+13=0", box("3x+4y+14=0")),
    ("math", "8.12412.852", box("[8.124,12.852]")),
    ("math", "(1,2)", box("[1,2]")),
    ("math", MATRIX, box(MATRIX.replace("3&4", "4&3"))),
]


@pytest.mark.parametrize("name, reference, text", RIGHT)
def test_right(name, reference, text):
    assert VERIFIERS[name](Problem("How many?", reference), text).status == "right"


@pytest.mark.parametrize("name, reference, text", WRONG)
def test_wrong(name, reference, text):
    assert VERIFIERS[name](Problem("How many?", reference), text).status == "wrong"


@pytest.mark.skipif(not find_spec("math_verify"), reason="needs math-verify")
def test_algebra_from_a_thread_that_is_not_the_main_one():
    verdicts = []
    problem = Problem("Simplify.", "\\sin^2 x")
    grade = lambda: verdicts.extend(math.verify(problem, box(said)).status for said in ("1-\\cos^2 x", "1+\\cos^2 x"))
    thread = threading.Thread(target=grade)
    thread.start()
    thread.join()
    assert verdicts == ["right", "wrong"]


def test_what_counts_as_thinking():
    assert format_reward("<think>one\ntwo\n\nthree</think><answer>1</answer>") == 1.0
    for text in (
        "<think>a</think><answer>1</answer></answer>",
        "<think>a</think><think>b</think><answer>1</answer>",
        "<think>a<answer>1</answer></think>",
    ):
        assert format_reward(text) == 0.0
