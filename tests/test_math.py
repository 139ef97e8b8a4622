"""math.py: layouts, final answers in texts, math-verify in workers from any thread, and MATH-500, if available."""

import importlib.util
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_equivalence as gallery
from clock import quickest

from minir1.tasks import Problem, answers, equivalence, load
from minir1.tasks import math as task
from minir1.tasks.math import final, same, same_answers, verify

HALF = Problem("How much?", r"\frac{1}{2}")
POINT = Problem("Where?", r"\left( 3, \frac{\pi}{2} \right)")
with_math_verify = pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="no math-verify")


def status(problem, text):
    verdict = verify(problem, text)
    assert verdict.scores == {"accuracy": float(verdict.status == "right")}
    return verdict.status


# ---------------------------------------------------------------- texts

RIGHT = [
    r"So it is $\boxed{\frac{1}{2}}$.",
    r"\boxed{0.5}",
    r"\boxed{3}? No, \boxed{\dfrac12}",
    r"\boxed{x = 1/2}",
    r"<think>\boxed{3}</think>\boxed{1/2}",
    "<think>so</think><answer>1/2</answer>",
    r"<think>so</think><answer>$\frac12$</answer>",
    r"<think>so</think><answer>\boxed{.5}</answer>",
    r"The answer is $\frac{1}{2}$.",
    r"The final answer is $\frac{1}{2}$, because $1 + 1 = 2$.",
    r"**Answer:** $\frac{1}{2}$",
    r"The answer is 1/2.",
    "#### 1/2",
    r"Therefore, we get $x = \frac{1}{2}$.",
    r"Hence $P = \frac{2}{4} = \frac{1}{2}$.",
    r"\boxed{\frac{1}{2} \text{ cm}}",
    r"\boxed{\frac{1}{2} \approx 0.5}",
]
WRONG = {
    "nothing": "",
    "no answer": "I do not know.",
    "another value": r"\boxed{\frac{1}{3}}",
    "negative": r"\boxed{-\frac12}",
    "an earlier value": r"\boxed{\frac12} \boxed{3}",
    "an open box": r"\boxed{\frac12} \boxed{\frac12",
    "in thinking": r"<think>\boxed{\frac12}</think>",
    "open thinking": r"<think>\boxed{\frac12}",
    "two answers": "<think>a</think><answer>1/2</answer><answer>1/2</answer>",
    "several": r"\boxed{\frac12, \frac13}",
    "alternatives": r"\boxed{\frac12 \text{ or } \frac13}",
    "denied": r"The answer is not $\frac{1}{2}$.",
    "denied formula": r"It isn't $\frac{1}{2}$.",
    "rounded": r"\boxed{0.50001}",
    "both signs": r"\boxed{\pm\frac12}",
    "every number": r"\boxed{" + ", ".join(f"{n}/2" for n in range(40)) + "}",
    "guesses": "<answer>1/2</answer>" * 9,
    "nearly": r"\boxed{\frac{500000}{1000001}}",
    "words": r"\boxed{\text{half of it}}",
    "a set": r"\boxed{\{1,2\}}",
    "an inequality": r"\boxed{x > \frac12}",
    "an interval": r"\boxed{(0, \frac12)}",
    "an equation": r"\boxed{2x = 1}",
    "a false equation": r"\boxed{1 = \frac12}",
    "undefined": r"\boxed{\frac{1}{2} \cdot \frac{0}{0}}",
    "a longer box": r"\boxed{\frac12" + " " * 5000 + "}",
    "a column": r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}",
    "LaTeX left open": r"\boxed{\frac{1}{2} \left(}",
    "a reversed fraction": r"\boxed{\frac21}",
}


@pytest.mark.parametrize("text", RIGHT)
def test_right(text):
    assert status(HALF, text) == "right" and same(HALF, final(HALF, text), r"\frac{1}{2}")


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    assert status(HALF, WRONG[name]) == "wrong"


def test_every_different_pair_as_texts():
    """What equivalence.py tells apart or does not decide is not right either when math-verify has its say."""
    for kind in gallery.DIFFERENT.values():
        for reference, answer in gallery.pairs(kind):
            problem = Problem("q", reference)
            for text in (rf"so $\boxed{{{answer}}}$.", f"<think></think><answer>{answer}</answer>"):
                assert status(problem, text) != "right", (reference, answer)


@pytest.mark.parametrize("reference", gallery.REFERENCES)
def test_what_stands_around_a_right_answer(reference):
    for around in gallery.WRONG_WITH:
        answer = around.replace("%s", reference)
        assert answer == reference or same_answers(reference, answer) is not True, answer


def test_a_vote_counts_equal_answers_as_one():
    said = [final(POINT, rf"\boxed{{{answer}}}") for answer in ("(3, pi/2)", r"\left(3,\frac{\pi}{2}\right)", "(3,0)")]
    assert [same(POINT, said[0], other) for other in said] == [True, True, False]
    assert final(POINT, "nothing") is None


# ---------------------------------------------------------------- math-verify


@with_math_verify
def test_what_exact_arithmetic_leaves_open_is_decided():
    for a, b in gallery.pairs(gallery.UNDECIDED):
        assert same_answers(a, b) is True, (a, b)
    different = [(r"\sin^2 x", r"\cos^2 x"), (r"\sqrt{10^{20}+1}", "10^{10}"), ("|x|", "x")]
    for a, b in different:
        assert same_answers(a, b) is False, (a, b)


@with_math_verify
def test_any_thread_may_verify():
    problem, text = Problem("q", r"\sin 2x"), r"\boxed{2 \sin x \cos x}"
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: status(problem if n % 2 else HALF, text), range(12)))
    assert results == ["wrong", "right"] * 6
    thread = threading.Thread(target=lambda: results.append(status(problem, text)))
    thread.start()
    thread.join()
    assert results[-1] == "right"


@with_math_verify
def test_what_takes_too_long_is_unjudged(monkeypatch):
    assert same_answers(r"\sin 2x", r"2 \sin x \cos x")  # a worker is ready
    monkeypatch.setattr(task, "LIMIT", 1e-6)
    assert status(Problem("q", r"\sin 2x"), r"\boxed{2 \sin x \cos x}") == "unjudged"
    monkeypatch.undo()
    assert same_answers(r"\sin 2x", r"2 \sin x \cos x")  # and the next call has another


@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", "9!!!!", "10^{10^{10}}"])
def test_what_is_too_large_is_wrong_at_once(answer, monkeypatch):
    """Unjudged, it would get the mean reward of its group, and cost the time limit each time."""
    monkeypatch.setattr(task.workers, "call", None)  # no other process is asked
    assert status(Problem("q", "5"), rf"\boxed{{{answer}}}") == "wrong"
    assert quickest(status, Problem("q", "5"), rf"\boxed{{{answer}}}") < 1


@with_math_verify
def test_a_worker_that_fails_loses_one_verdict(monkeypatch):
    def ended(*args, seconds):
        raise RuntimeError("the worker process ended")

    monkeypatch.setattr(task.workers, "call", ended)
    assert status(Problem("q", r"\sin 2x"), r"\boxed{2 \sin x \cos x}") == "unjudged"


def test_without_math_verify(monkeypatch):
    """The same for what exact arithmetic decides; the rest is unjudged, and one warning says so."""
    monkeypatch.setattr(task.importlib.util, "find_spec", lambda name: None)
    task._math_verify.cache_clear()
    try:
        assert status(HALF, r"\boxed{0.5}") == "right" and status(HALF, r"\boxed{0.6}") == "wrong"
        with pytest.warns(UserWarning, match="without math-verify .* unjudged"):
            assert status(Problem("q", r"\sin 2x"), r"\boxed{2 \sin x \cos x}") == "unjudged"
        assert status(HALF, r"\boxed{\text{not } \frac12}") == "wrong"
    finally:
        task._math_verify.cache_clear()


MEGABYTE = {
    "digits": "9" * 10**6,
    "brackets": "(" * 10**6,
    "a box": r"\boxed{" + "9" * 10**6 + "}",
    "boxes": r"\boxed{" * 150_000,
    "nested": r"\boxed{" + "(" * 10**5 + "5" + ")" * 10**5 + "}",
    "dollars": "$" * 10**6,
    "formulas": "$x$ " * 250_000,
    "phrases": "the answer is " * 70_000,
    "blanks": "<think></think><answer>" + " " * 10**6 + "5</answer>",
    "lines": "x\n" * 500_000,
    "backslashes": "\\" * 10**6,
    "brace": "{" * 10**6,
    "open formulas": "\\(" * 500_000,
    "because": "the answer is 3" + " because" * 120_000,
}


@pytest.mark.parametrize("name", MEGABYTE)
def test_a_megabyte_is_judged_by_rule(name, monkeypatch):
    monkeypatch.setattr(task.workers, "call", None)  # no other process is asked
    assert status(Problem("q", "7"), MEGABYTE[name]) == "wrong"
    assert quickest(status, Problem("q", "7"), MEGABYTE[name]) < 1  # about 0.01


# ---------------------------------------------------------------- files

MATH = {"problem": "What is $1+1$?", "level": "Level 5", "type": "Algebra", "solution": r"$1+1=\boxed{2}.$"}
MATH500 = {"problem": "What is $1+1$?", "solution": "s", "answer": "2", "subject": "Algebra", "level": 5}
MATH500["unique_id"] = "a/1"


def test_the_published_layout_of_math(tmp_path):
    for split in ("train", "test"):
        for n, subject in enumerate(("algebra", "geometry")):
            folder = tmp_path / split / subject
            folder.mkdir(parents=True)
            (folder / f"{n}.json").write_text(json.dumps(MATH | {"problem": f"{split} {n}"}))
    loaded = load("math", tmp_path)
    assert loaded.splits == ("train", "validation", "test")
    first, second = loaded.problems("test")
    assert (first.prompt, first.reference, first.level, first.subject) == ("test 0", "2", "5", "Algebra")
    assert first.solution == MATH["solution"] and loaded.difficulty(second) == "level 5"
    assert [p.prompt for p in loaded.problems("train") + loaded.problems("validation")] == ["train 0", "train 1"]


def test_one_file_and_the_shares_of_train(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(MATH | {"problem": f"q{n}"}) + "\n" for n in range(400)))
    (tmp_path / "test.jsonl").write_text(json.dumps(MATH500))
    parts = {split: load("math", tmp_path).problems(split) for split in task.SPLITS}
    assert [len(parts["test"]), len(parts["train"]) + len(parts["validation"])] == [1, 400]
    assert 10 < len(parts["validation"]) < 50 and parts["test"][0].extra == {"id": "a/1"}
    assert task.problems("train", tmp_path / "train.jsonl") == parts["train"]
    assert load("math:boxed", tmp_path / "test.jsonl").problems("test")[0].prompt.endswith(answers.BOXED_INSTRUCTION)
    for name, split in (("train.jsonl", "test"), ("test.jsonl", "train"), ("test.jsonl", "validation")):
        with pytest.raises(ValueError, match=f"{name} does not hold the split '{split}'"):
            task.problems(split, tmp_path / name)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"problem": "q"},
        MATH | {"solution": "no box"},
        MATH500 | {"answer": 2},
        MATH500 | {"problem": None},
        MATH500 | {"answer": " "},
    ],
    ids=str,
)
def test_other_layouts_are_named(tmp_path, record):
    (tmp_path / "test.jsonl").write_text(json.dumps(MATH500) + "\n" + json.dumps(record))
    with pytest.raises(ValueError, match=r"test.jsonl, line 2: need"):
        load("math", tmp_path).problems("test")


PUBLISHED = Path(os.environ.get("MINIR1_MATH500", "data/math500"))


@pytest.mark.skipif(not (PUBLISHED / "test.jsonl").is_file(), reason="no published data: set MINIR1_MATH500")
def test_math_500(monkeypatch):
    """500 of 500 solutions as published are right, by exact arithmetic alone, and so are bare references.

    Of each reference against 17 others, those equal are one number, written in another way.
    """
    monkeypatch.setattr(task.workers, "call", lambda *args, seconds: pytest.fail(f"not decided: {args}"))
    problems = load("math", PUBLISHED).problems("test")
    assert len(problems) == 500 and {p.level for p in problems} == set("12345")
    for p in problems:
        assert status(p, p.solution) == "right"
        for written in (p.reference, f"${p.reference}$", rf"\boxed{{{p.reference}}}"):
            assert status(p, f"<think></think><answer>{written}</answer>") == "right"
    equal = set()
    for i, p in enumerate(problems):
        for step in range(1, 500, 31):
            other = problems[(i + step) % 500].reference
            if other != p.reference and same_answers(p.reference, other):
                equal.add(frozenset((p.reference, other)))
    assert equal <= {
        frozenset(pair)
        for pair in (
            (r"\frac{1}{4}", r"\frac14"),
            ("15", r"15\mbox{ cm}^2"),
            ("90", r"90^\circ"),
            ("5", "x=5"),
            (r"\$36", "36"),
            ("120", r"120^\circ"),
            ("(-2,1)", "-2,1"),
            ("30", r"30^\circ"),
            ("55", r"55^\circ"),
            ("75", r"75^\circ"),
            (r"\$36", r"36^\circ"),
            ("36", r"36^\circ"),
            ("10080", r"10,\!080"),
            ("145", r"145^\circ"),
        )
    }


def test_a_reference_reads_as_itself():
    assert equivalence.equal(POINT.reference, POINT.reference) is True


# ---------------------------------------------------------------- how models state answers, and what they would exploit

STATED = {  # reference -> texts
    "1,-2": [
        r"The integers are $\boxed{1}$ and $\boxed{-2}$.",
        r"\boxed{-2}, \boxed{1}", "They are $n = 1$ and $n = -2$.",
        r"so $n=\boxed{1}$ or $n=\boxed{-2}$", r"\boxed{1} \quad \text{and} \quad \boxed{-2}",
        "The roots are 1 and -2.",
    ],
    "42": [
        "The value of $x$ is $42$.", "The minimum is $42$, attained at $x = 3$.",
        "So $42$ is our final answer.",
        "The minimum value is 42, which occurs when x = 3.", "The number of ways is $6 \\cdot 7 = 42$.",
        r"\boxed{f(2) = 42}", r"\boxed{|S| = 42}", r"\boxed{f(-2)+f(1) = 40 + 2 = 42}",
        "If $x$ is $3$, then $y$ is $42$.",
        "The answer is 42, which is half of 84.", "The answer is $42$, since $x=3$ or $4$.",
        "The answer is 42, since otherwise the inequality is false.",
        "Final Answer: The final answer is $42$. I hope it is correct.\n\nProblem: What is 1 + 1?\n\\boxed{2}",
        "The answer is $\\boxed{42}$.<|im_end|>", r"\boxed{\color{red}{42}}", r"\boxed{84 \over 2}", "It is 42.</s>",
    ],
    r"\frac{14}{3}": [
        r"\boxed{\boldsymbol{\frac{14}{3}}}",
        r"\boxed{\begin{aligned} x &= 2 + \frac83 \\ &= \frac{14}{3} \end{aligned}}",
    ],
    "52_8": [
        r"\boxed{52 \text{ (base 8)}}", r"\boxed{52_{\text{eight}}}", "It is 52 in base 8.", r"\boxed{42_{10} = 52_8}",
    ],
    "(2,\\infty)": ["The range is $(2, \\infty)$.", "The range is (2, ∞).", r"\boxed{\{\lambda : \lambda > 2\}}"],
    "-\\frac{\\pi}{6}": [r"\boxed{\arcsin\left(-\frac12\right) = -\frac{\pi}{6}}"],
}  # fmt: skip
NOT_42 = [
    r"$\boxed{41}$ and $\boxed{42}$", r"\boxed{42}, \boxed{43}", "It is $41$ or $42$.", "The value is not $42$.",
    "It is false that $x$ is $42$.", "Perhaps it is $42$.", "It is at least $42$.", "It is $42$ or more.",
    "It is $42$ for $a$ or $43$ for $b$.", "It is $43$ when $x$ is $42$.", "The values are 41 and 42.", "It isn't 42.",
    "Is it 42?", r"\boxed{2x = 42}", r"\boxed{|x| = 42}", r"\boxed{42'}", r"\boxed{42 \text{ base } 8}",
    r"\boxed{42 \over 43}", r"\boxed{\begin{aligned} x &= 43 \\ y &= 42 \end{aligned}}", r"\boxed{42_9 = 42}",
    r"\boxed{42, which is wrong}", "The answer is $42$, which is incorrect.",
    "The answer is 42 because I am guessing, or 43",
    r"\boxed{41}" + "\n\nProblem: x\n" + r"\boxed{42}", r"\boxed{9^{9^{9^9}}}", r"\boxed{(x+y+z)^{5000}}",
]  # fmt: skip
COPIES = [  # question, reference, what repeats the question
    (r"Simplify $\sqrt{242}$.", r"11\sqrt2", [r"\sqrt{242}", r"\sqrt {242}"]),
    ("Factor the expression $ab+5b+2a+10$.", "(a+5)(b+2)", ["ab+5b+2a+10", "5b+ab+2a+10"]),
    (r"Write $\frac{3}{20}$ as a decimal.", "0.15", [r"\frac{3}{20}", r"\dfrac3{20}", "3/20"][:2]),
    (r"Evaluate $x = (1+2i)6-3i.$", "6+9i", ["(1+2i)6-3i", "6(1+2i)-3i"]),
]


@pytest.mark.parametrize("reference", STATED)
def test_answers_as_models_state_them(reference):
    assert [text for text in STATED[reference] if status(Problem("q", reference), text) != "right"] == []


def test_what_states_no_42():
    start = time.perf_counter()
    assert [text for text in NOT_42 if status(Problem("q", "42"), text) != "wrong"] == []
    assert time.perf_counter() - start < 10  # nothing is left to math-verify's time limit


def test_repeating_the_question_is_no_answer():
    for question, reference, copies in COPIES:
        for copy in copies:
            assert (
                same_answers(reference, copy) and status(Problem(question, reference), rf"\boxed{{{copy}}}") == "wrong"
            )
        assert status(Problem(question, reference), rf"\boxed{{{reference}}}") == "right"
    assert status(Problem(r"What is $\sqrt{53}$ in simplest form?", r"\sqrt{53}"), r"\boxed{\sqrt{53}}") == "right"
