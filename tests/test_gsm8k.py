"""gsm8k.py and numbers.py: the numbers that texts answer with, files in other layouts, and the published data."""

import gzip
import json
import os
import random
import re
import time
from fractions import Fraction
from pathlib import Path

import number_gallery
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minir1.rewards import TAGS
from minir1.tasks import Problem, answers, load
from minir1.tasks.gsm8k import final, number, problems, verify
from minir1.tasks.numbers import in_sentence, last, value

P = Problem("How many?", "1,200")


def said(answer, thinking="hm"):
    return f"<think>{thinking}</think><answer>{answer}</answer>"


# ---------------------------------------------------------------- one number

NUMBERS = {
    "18": 18, " 18\n": 18, "18.": 18, "18.0": 18, "18.50": Fraction(37, 2), "37/2": Fraction(37, 2),
    "0.5": Fraction(1, 2), ".5": Fraction(1, 2), "$.50": Fraction(1, 2),
    "-18": -18, "- 18": -18, "+18": 18, "0": 0, "-0": 0, "007": 7,
    "1,200": 1200, "1,200.75": Fraction(4803, 4), "12,345,678": 12345678, "1200": 1200,
    "$18": 18, "$ 18": 18, "-$18": -18, "$-18": -18, "€18": 18, "\\$18": 18, "$18$": 18, "$1,200.00": 1200,
    "18%": 18, "18 %": 18, "18\\%": 18, "18 percent": 18, "18 dollars": 18, "18 miles per hour": 18, "18kg": 18,
    "18 times": 18, "**18**.": 18, "**18.**": 18,
    "\\boxed{18}": 18, "$\\boxed{18}$": 18, "\\boxed{\\$18}.": 18, "\u221218": -18,
    "9" * 60: 10**60 - 1,
    "1 1/2": Fraction(3, 2), "-1 1/2": Fraction(-3, 2), "18 1/2 cups": Fraction(37, 2), "1\\frac{1}{2}": Fraction(3, 2),
    "\\frac{1}{2}": Fraction(1, 2), "\\frac12": Fraction(1, 2), "\\dfrac{ 37 }2": Fraction(37, 2),
    "-\\tfrac{1}{2}": Fraction(-1, 2), "2 \\frac12": Fraction(5, 2), "\\text{18}": 18, "18\\text{ clips}": 18,
    "\\textbf{18} \\text{clips}": 18, "9{,}500": 9500, "\\$9{,}500": 9500, "9\\,500": 9500, "9,\\!500": 9500,
    "9\u202f500": 9500, "30^\\circ": 30, "30^{\\circ}": 30, "30°": 30, "-5°C": -5, "72\\text{ cm}^2": 72, "72 ft²": 72,
    "(18)": 18, "{18}": 18, "\\(18\\)": 18, "\\[18\\]": 18, "18 square feet": 18, "*18*": 18, "### 18": 18,
}  # fmt: skip
NO_NUMBERS = {
    "nothing": ["", " ", ".", "-", "$", "%", ",", None],
    "several numbers": ["18 19", "18, 19", "18 or 19", "18/19/20", "18-19", "18 = 18", "3 + 15", "18 (9 each)"],
    "words that change or offer": ["18 or so", "18 or nineteen", "two", "3 dozen", "3 million", "18 and half", "18 k",
                                   "18x", "18 point five", "18 squared", "18 not nineteen", "5 hundred", "18 grand",
                                   "18 lakh", "18 tenths", "18 is wrong", "18 negative", "18 double"],
    "groups": ["1,20", "12,00", ",200", "1,,200", "1,2000", "1 200", "1.200,50", "1_200"],
    "signs": ["--18", "negative 5", "+-18", "18-", "-$-18", "\u201318", "~18", "about 18"],
    "other digits": ["١٨", "１８", "¹⁸", "18\u0660", "Ⅷ"],
    "other notations": ["1e3", "1E3", "1e", "0x12", "18!", "18^2", "1.5/2", "1/2.5", "1/0", "0/0", "1/-2",
                        "18..", "18.5.2", "5 3/2", "\\frac123", "\\frac{1}{0}", "\\frac{x}{2}", "18m^2", "inf",
                        "nan", "18j 2", "__import__('os')"],
    "wrapped twice": ["$$18$$", "\\boxed{\\boxed{18}}", "\\boxed{18", "boxed{18}",
                      "****18****", "<b>18</b>", "\\boxed{}"],
    "long": ["9" * 61, "0" * 100_000, "1" + ",000" * 20, "18" + " " * 100, "18 " + "a" * 100],
    "long units": ["18 a b c d", "18 per cent of all people"],
}  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers(text):
    assert number(text) == NUMBERS[text]


@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_what_is_no_number(kind):
    assert [text for text in NO_NUMBERS[kind] if number(text) is not None] == []


# ---------------------------------------------------------------- one answer

SENTENCES = {
    "She sold 18 clips in total": 18, "18, altogether": 18, "x = 18": 18, "= 18": 18, "18 = 18": 18, "10+20=30": 30,
    "m + n = 5 + 13 = 18": 18, "36/2 = 18 clips": 18, "$18 per day": 18, "18/day": 18, "18 clips, i.e. 18": 18,
    "18 clips in three weeks": 18, "an 18-hour day": 18, "2 x 9 = 18": 18, "2 times 9 = 18": 18,
    "18 x 1 = 18 in 3 days": 18,
    "18 clips" + " more" * 300: 18,
    "18 miles in 3 days": 18, "18 since 9 + 9 = 18 and 3 = 3": 18,
}  # fmt: skip
NO_SENTENCES = ["", "clips", "1000+200", "1000 + 200", "18 19", "18 clips, 19 dollars", "not 18", "about 18",
"18 dozen",
                "It isn't 18", "17 = 18", "3x-y+13=0", "x - y = 0", "x + 13 = 20", "2x = 18", "n=2,3,4",
                "18 or nineteen",
                "half of 18", "18 and one half", "18 for 3 or 4",
                "from 17 to 18", "in 17 or 18", "[8.124,12.852]", "(2,\\infty)", "(2, x)", "12:00", "66.66...", "±18",
                "18 clips" + " more" * 500]  # fmt: skip
LAST = {
    "It is 18": "18", "The total is 72 clips, altogether.": "72", "First 3. Then 18.\nDone.": "18",
    "10 + 8 = 18.": "18",
    "She sold 48 in April and 24 in May, so 72 in total.": "72", "Half of 48 is 24, so 48 + 24 = $72 in 2 days": "72",
    "So 2x = 36 and x = 18": "18", "18.": "18", "18.0": "18.0", "It costs $1,200.50.": "1,200.50",
    "3 or 4. It is 5": "5",
    "1 1/2": "1 1/2", "-5": "-5", "a -5": "-5", "Not 3. It is 5.": "5",
}  # fmt: skip
NO_LAST = ["", "none", "18 or 19", "18, 19", "48 and 24", "18-19", "20 - 5", "x > 18", "18 dozen", "not 18",
"18 = 20 - 2",
           "2x + 13 = 18", "18 = 19", "Is it 18?", "x2", "18!", "1" * 100, "1," * 100, "1,5", "1/0",
           "Call me at 12:30"]  # fmt: skip


@pytest.mark.parametrize("text", SENTENCES)
def test_sentences(text):
    assert in_sentence(text) == SENTENCES[text]


def test_sentences_without_one_number():
    assert [text for text in NO_SENTENCES if in_sentence(text) is not None] == []


@pytest.mark.parametrize("text", LAST)
def test_last_numbers(text):
    assert last(text) == LAST[text]


def test_texts_that_state_no_last_number():
    assert [text for text in NO_LAST if last(text) is not None] == []


# ---------------------------------------------------------------- one answer

CASES = {  # of issue reports: text -> number
    "The total is 72 clips, altogether.": 72, "answer is 3 5": 5, "\\boxed{8,000}": 8000, "\\boxed{\\$9{,}500}": 9500,
    "[8.124,12.852]": None, "\\boxed{[8.124,12.852]}": None, "$29.00": 29, "The answer is $29.00.": 29,
    "#### 42\n" + "x" * 400: 42, "#### 42\n" + "and so on. " * 40: 42, "#### 42 " + "and so on " * 40: 42,
    "50%": 50, "50\\%": 50, "50": 50, "\\boxed{50\\%}": 50, "\\boxed{840} hence \\boxed{840}": 840, "\\boxed{004}": 4,
    "Put it in \\boxed . \\boxed{4}": 4, "**73**": 73, "\\text{13}": 13, "\\boxed{\\text{13}}": 13,
    "1/2": Fraction(1, 2),
    "\\boxed{\\frac{1}{2}}": Fraction(1, 2), "\\boxed{\\frac12}": Fraction(1, 2), "\\boxed{0.5}": Fraction(1, 2),
    "\\boxed{1 1/2}": Fraction(3, 2), "\\boxed{1\\frac{1}{2}}": Fraction(3, 2), "\\boxed{30^\\circ}": 30, "30°": 30,
    "1000+200": None, "10+20=30": 30, "\\boxed{1/2^99}": None, "1/2004!": None, "n=2,3,4": None, "±2021": None,
    "12:00": None, "3x-y+13=0": None, "(2,\\infty)": None, "\\boxed{-5}": -5, "\\boxed{\u22125}": -5,
    "negative 5": None,
    "The answer is negative 5": None, "not 18": None, "\\boxed{72\\text{ clips}}": 72, "#### " + "9" * 5000: None,
}  # fmt: skip


@pytest.mark.parametrize("text", CASES)
def test_cases_that_extractors_get_wrong(text):
    assert value(text) == CASES[text]


def test_the_galleries():
    """Several hundred texts: what is right in many forms, and nothing wrong is called right."""
    for n, m in (("72", "18"), ("1200", "7"), ("5", "16")):
        problem = Problem("How many?", n)
        right, wrong = number_gallery.right(n, m), number_gallery.wrong(n, m)
        assert len(right) > 300 and sum(map(len, wrong.values())) > 1000
        assert [text for text in right if verify(problem, text).status != "right"] == []
        for kind, texts in wrong.items():
            assert [text for text in texts if verify(problem, text).status != "wrong"] == [], kind


def test_a_text_has_one_guess():
    """Whatever a text lists, at most one number is right: so guessing many gains nothing."""
    texts = [text for texts in number_gallery.wrong("72", "18").values() for text in texts]
    for text in texts[::10] + number_gallery.right("72", "18")[::10]:
        right = [n for n in range(100) if verify(Problem("", str(n)), text).status == "right"]
        assert len(right) <= 1 and (not right or final(P, text) == str(right[0]))


def test_the_sign_of_the_reference():
    for reference, text in (("-5", "5"), ("5", "-5"), ("5", "\u22125"), ("-5", "negative 5"), ("-5", "minus 5")):
        assert verify(Problem("", reference), f"#### {text}").status == "wrong"
    assert verify(Problem("", "-5"), "#### \u22125").status == "right"


GOOD = "<answer>1200</answer>"
RIGHT = [said("1200"), said("$1,200.00"), said("\\boxed{1200}"), said("1,200 dollars"), "hm</think>" + GOOD,
         "<think></think>" + GOOD, "well " + said("1200") + " done", "so\n#### 1200", said("2400/2")]  # fmt: skip
WRONG = {
    "another number": said("1201"),
    "negative": said("-1200"),
    "answer twice": f"<think>x</think>{GOOD}{GOOD}",
    "two answers": f"<think>x</think><answer>3</answer>{GOOD}",
    "answer inside think": f"<think>{GOOD}</think>",
    "answer in open think": f"<think>x{GOOD}",
    "answer inside think and another after": f"<think>{GOOD}</think><answer>3</answer>",
    "several numbers": said("1200 or 1300"),
    "every number": said(" ".join(map(str, range(2000)))),
    "empty": said(""),
    "blank": said(" \n"),
    "exponent": said("1.2e3"),
    "expression": said("1000+200"),
    "equation": said("x + 1 = 1200"),
    "words": said("twelve hundred"),
    "truncated": "<think>x</think><answer>1200",
    "truncated thinking": "<think>so the answer is 1200",
    "answer in tags contradicted outside": said("3") + "\n#### 1200",
    "tags of no answer": said("nothing") + "\\boxed{1200}",
    "nothing": "",
}  # fmt: skip


@pytest.mark.parametrize("text", RIGHT)
def test_right(text):
    verdict = verify(P, text)
    assert verdict.status == "right" and verdict.scores == {"accuracy": 1.0}
    assert final(P, text) == "1200"


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    verdict = verify(P, WRONG[name])
    assert verdict.status == "wrong" and verdict.scores == {"accuracy": 0.0}


PIECES = [*TAGS, "####", "\\boxed{", "}", "the answer is", "1", "200", ",", ".", "$", "-", " ", "\n", "and", "/", "%"]
PIECES += [
    "or",
    "=",
    "x",
    "\\frac",
    "{",
    "**",
    "answer",
    "\\text{",
    "+",
    "dozen",
    "#",
    "\u2212",
    "°",
    "Answer:",
    "final answer\n",
]
pieces = st.lists(st.sampled_from(PIECES)).map("".join)


@given(st.one_of(st.text(), st.text().map(said), pieces, pieces.map(said)))
def test_no_text_raises(text):
    verdict = verify(P, text)
    assert (verdict.status == "right") == (final(P, text) == "1200")


LONG = [*PIECES, "1,", "1 ", " a", "the answer is ", "\\boxed{1}", "0", "#### ", "#### 1\n", "{", "\\{", "\\",
"1/2 ", "- 1 ",
        "\\frac12", "answer to ", "= 1 ", "(1", "a, ", "..", ".1", "$$", "\\["]  # fmt: skip


@pytest.mark.parametrize("piece", LONG)
def test_a_text_of_1_mb_takes_less_than_50_ms(piece):
    long = piece * (1_000_000 // len(piece))
    for text in (
        long,
        said(long),
        "#### " + long,
        "\\boxed{" + long,
        "the answer is 1" + long,
        long + "\\boxed{1",
        long + "!",
    ):

        def seconds():
            start = time.thread_time()
            verify(P, text)
            return time.thread_time() - start

        assert any(seconds() < 0.05 for _ in range(20))  # of the processor: other programs may take it


# ---------------------------------------------------------------- files


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def some(count, start=0):
    return [{"question": f"q{i}", "answer": f"work\n#### {i}"} for i in range(start, start + count)]


def test_splits_of_the_two_files(tmp_path):
    train, test = write(tmp_path / "train.jsonl", some(500)), write(tmp_path / "test.jsonl", some(5, 500))
    task = load("gsm8k", tmp_path)
    assert task.splits == ("train", "validation", "test") and task.name == "gsm8k"
    parts = {split: task.problems(split) for split in task.splits}
    assert parts["test"] == [Problem(f"q{i}", str(i), solution=f"work\n#### {i}") for i in range(500, 505)]
    assert 20 < len(parts["validation"]) < 55  # 7 %
    together = sorted(parts["train"] + parts["validation"], key=lambda p: int(p.reference))
    assert [p.prompt for p in together] == [f"q{i}" for i in range(500)]
    assert problems("train", train) == parts["train"] and problems("test", str(test)) == parts["test"]
    boxed = load("gsm8k:boxed", tmp_path)
    for split in task.splits:  # the same problems in the same splits
        assert [p.prompt for p in boxed.problems(split)] == [
            f"{p.prompt}\n\n{answers.BOXED_INSTRUCTION}" for p in parts[split]
        ]
    (tmp_path / "train_socratic.jsonl").write_bytes(train.read_bytes())  # beside them in the published repository
    assert problems("train", tmp_path) == parts["train"]
    packed = tmp_path / "packed" / "gsm8k-test.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(test.read_bytes()))
    assert problems("test", packed) == problems("test", packed.parent) == parts["test"]
    for path, split in ((train, "test"), (test, "train"), (test, "validation")):
        with pytest.raises(ValueError, match=f"{path.name} does not hold the split '{split}': give the folder"):
            problems(split, path)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(
        ValueError, match=f"{tmp_path} holds no file of the split 'test', .*: give the folder with train"
    ):
        problems("test", tmp_path)
    with pytest.raises(ValueError, match=f"there is no file or folder {tmp_path}/nowhere: give the folder with train"):
        problems("test", tmp_path / "nowhere")
    (tmp_path / "train.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=f"{tmp_path} holds no problems of the split 'train'"):
        problems("train", tmp_path)


@pytest.mark.parametrize("line", [
    b"{", b"[1]", b"3", b'"q"', b"\xff\xfe", b"null", b'{"question": "q"}', b'{"problem": "q", "solution": "1"}',
    b'{"question": 3, "answer": "#### 1"}', b'{"question": "q", "answer": 1}', b'{"question": "q", "answer": "1"}',
    b'{"question": "q", "answer": "#### one"}', b'{"question": "q", "answer": "#### "}', b"[" * 100_000,
    b'{"question": "\\ud800", "answer": "#### 1"}', b'{"question": "q", "answer": "#### 1", "by": "\\udfff"}',
], ids=lambda line: line[:60])  # fmt: skip
def test_files_of_another_layout_are_named(tmp_path, line):
    path = write(tmp_path / "train.jsonl", some(2))
    path.write_bytes(path.read_bytes() + line + b"\n")
    need = r'need \{"question": "…", "answer": "… #### number"}, got '
    layout = f"train.jsonl, line 3(: {need}|: need an object| is no JSON)"
    with pytest.raises(ValueError, match=layout) as error:
        problems("train", tmp_path)
    assert "\n" not in str(error.value)


PUBLISHED = Path(os.environ.get("MINIR1_GSM8K", "data/gsm8k"))


published = pytest.mark.skipif(not (PUBLISHED / "train.jsonl").is_file(), reason="no published data: set MINIR1_GSM8K")


@published
def test_the_published_references():
    """8,792 problems: each is right as published, bare and in tags; another problem's answer is wrong unless equal."""
    task = load("gsm8k", PUBLISHED)
    parts = {split: task.problems(split) for split in task.splits}
    assert {split: len(part) for split, part in parts.items()} == {"train": 6931, "validation": 542, "test": 1319}
    listed = [problem for part in parts.values() for problem in part]
    for problem in listed:
        work = problem.solution.rpartition("####")[0]
        for text in (problem.solution, problem.reference, said(problem.reference, work)):
            assert verify(problem, text).status == "right"
    others = random.Random(0).sample(listed, len(listed))
    for problem, other in zip(listed, others):
        same = number(problem.reference) == number(other.reference)
        for text in (other.solution, other.reference, f"\\boxed{{{other.reference}}}"):
            assert (verify(problem, text).status == "right") == same


@published
def test_wrong_answers_to_the_published_problems():
    for problem in load("gsm8k", PUBLISHED).problems("test"):
        n, work = number(problem.reference), problem.solution.rpartition("####")[0]
        assert final(problem, said(f"${float(n):,.2f}", work)) == str(n)
        for wrong in (n + 1, n - 1, -n or 1, n * 10):
            assert verify(problem, f"{work}\n#### {wrong}").status == "wrong"


@published
def test_worked_solutions_without_their_answer_line():
    """The last sentence alone gives the number of 19 of 20 solutions, whose calculations are published in << >>."""
    listed = load("gsm8k", PUBLISHED).problems("test")
    texts = [re.sub("<<.*?>>", "", problem.solution.rpartition("####")[0]) for problem in listed]
    right = sum(verify(problem, text).status == "right" for problem, text in zip(listed, texts))
    assert right > 0.95 * len(listed)


@pytest.mark.parametrize("more", [" and so they went home" * 20, "x" * 400, ". They sold 3." * 30, "\n" + "17 " * 133])
def test_a_marked_number_stands_whatever_follows_it(more):
    assert verify(Problem("", "42"), "work\n#### 42" + more).status == "right"


def test_last_sentences_of_models():
    for text in (
        "Natalia sold 72 clips in all (48 in April and 24 in May).", "Answer: 72 (48 in April and 24 in May)",
        "40 + 32 = 72\n\nKylar needs to pay $72 for 16 glasses.", "So it is 48 + 24 = <<48+24=72>>72 clips",
        "\\boxed{72\\text{ m}}", "The answer is 72 m/s.", "The answer is 72</s>", "72<|eot_id|>",
        "The answer is 72.\n\nQuestion: And 2 + 3?\nThe answer is 5.",
    ):  # fmt: skip
        assert value(text) == 72, text
    for text in ("40 + 32 = 72. It is 71 or 72", "40 + 32 = 72. It is not 72, but 71", "The answer is 71 (maybe 72)"):
        assert value(text) != 72, text
