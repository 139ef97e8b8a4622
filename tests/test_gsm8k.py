"""gsm8k.py: the numbers that texts answer with, files in other layouts, and the published data, if available."""

import json
import os
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minir1.rewards import TAGS
from minir1.tasks import Problem, load
from minir1.tasks.gsm8k import claim, final, number, problems, verify

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
}
NO_NUMBERS = {
    "nothing": ["", " ", ".", "-", "$", "%", ",", None],
    "several numbers": ["18 19", "18, 19", "18 or 19", "18/19/20", "18-19", "18 = 18", "3 + 15", "18 (9 each)"],
    "words that change or offer": ["18 or so", "18 or nineteen", "two", "3 dozen", "3 million", "18 and half", "18 k",
                                   "18x", "18 point five", "18 squared", "18 not nineteen", "5 hundred", "18 grand",
                                   "18 m", "18 lakh", "18 tenths", "18 is wrong", "18 negative", "18 double"],
    "groups": ["1,20", "12,00", ",200", "1,,200", "1,2000", "1 200", "1.200,50", "1_200"],
    "signs": ["--18", "+-18", "18-", "-$-18", "\u201318", "~18", "about 18"],
    "other digits": ["١٨", "１８", "¹⁸", "18\u0660", "Ⅷ"],
    "other notations": ["1e3", "1E3", "1e", "0x12", "18!", "18^2", "1.5/2", "1/2.5", "18 1/2", "1/0", "0/0", "1/-2",
                        "18..", "18.5.2", "\\frac{1}{2}", "inf", "nan", "18j 2", "__import__('os')"],
    "wrapped twice": ["$$18$$", "\\boxed{\\boxed{18}}", "\\boxed{18", "boxed{18}",
                      "****18****", "<b>18</b>", "\\boxed{}"],
    "long": ["9" * 61, "0" * 100_000, "1" + ",000" * 20, "18" + " " * 100, "18 " + "a" * 100],
    "long units": ["18 a b c d", "18 per cent of all people"],
}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers(text):
    assert number(text) == NUMBERS[text]


@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_what_is_no_number(kind):
    assert [text for text in NO_NUMBERS[kind] if number(text) is not None] == []


# ---------------------------------------------------------------- one answer

CLAIMS = {  # without answer tags
    "#### 18": " 18", "work\n#### 18\n": " 18", "so \\boxed{18}.": "18", "The answer is 18.": " 18.",
    "the final answer is: 18\nDone": " 18", "<think>\\boxed{3}</think>The answer is \\boxed{18}": "18",
    "thinking 3 #### 4</think>\n#### 18": " 18", "the answer is 3\n#### 18": " 18", "#### 3 \\boxed{18}": "18",
}
NO_CLAIMS = ["", "18", "It is 18", "#### 18\n#### 18", "#### 18 #### 19", "\\boxed{18} \\boxed{18}", "\\boxed 18",
             "\\boxed{18", "The answer is 18. The answer is 19.", "the answer is 18\nthe answer is 18",
             "<think>the answer is 18", "<think>#### 18", "a</think><think>#### 18", "<answer>#### 18",
             "#### 18</answer>",
             "<think>#### 18</think>", "<think>\\boxed{18}</think>I am done", "the answers is 18"]


@pytest.mark.parametrize("text", CLAIMS)
def test_answers_without_tags(text):
    assert claim(text) == CLAIMS[text]


@pytest.mark.parametrize("text", NO_CLAIMS)
def test_texts_without_one_answer(text):
    assert claim(text) is None and final(P, text) is None


GOOD = "<answer>1200</answer>"
RIGHT = [said("1200"), said("$1,200.00"), said("\\boxed{1200}"), said("1,200 dollars"), "hm</think>" + GOOD,
         "<think></think>" + GOOD, "well " + said("1200") + " done", "so\n#### 1200", said("2400/2")]
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
    "equation": said("x = 1200"),
    "words": said("twelve hundred"),
    "truncated": "<think>x</think><answer>1200",
    "truncated thinking": "<think>so the answer is 1200",
    "answer in tags contradicted outside": said("3") + "\n#### 1200",
    "tags of no answer": said("nothing") + "\\boxed{1200}",
    "nothing": "",
}


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
pieces = st.lists(st.sampled_from(PIECES)).map("".join)


@given(st.one_of(st.text(), st.text().map(said), pieces, pieces.map(said)))
def test_no_text_raises(text):
    verdict = verify(P, text)
    assert (verdict.status == "right") == (final(P, text) == "1200")


@pytest.mark.parametrize("piece", [*PIECES, "1,", "1 ", " a", "the answer is ", "\\boxed{1}", "0"])
def test_long_texts_are_fast(piece):
    long = piece * (200_000 // len(piece))
    start = time.perf_counter()
    for text in (long, said(long), "#### " + long, "\\boxed{" + long, "the answer is 1" + long, long + "!"):
        verify(P, text)
    assert time.perf_counter() - start < 1


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
    assert parts["test"] == [Problem(f"q{i}", str(i)) for i in range(500, 505)]
    assert 20 < len(parts["validation"]) < 55  # 7 %
    together = sorted(parts["train"] + parts["validation"], key=lambda p: int(p.reference))
    assert [p.prompt for p in together] == [f"q{i}" for i in range(500)]
    assert problems("train", train) == parts["train"] and problems("test", str(test)) == parts["test"]
    for path, split in ((train, "test"), (test, "train"), (test, "validation")):
        with pytest.raises(ValueError, match=f"{path.name} does not hold the split '{split}': give the folder"):
            problems(split, path)


def test_missing_and_empty_files(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"there is no file {path}.*: give the folder with train.jsonl"):
            problems("test", path)
    (tmp_path / "train.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="train.jsonl holds no problems"):
        problems("train", tmp_path)


@pytest.mark.parametrize("line", [
    b"{", b"[1]", b"3", b'"q"', b"\xff\xfe", b"null", b'{"question": "q"}', b'{"problem": "q", "solution": "1"}',
    b'{"question": 3, "answer": "#### 1"}', b'{"question": "q", "answer": 1}', b'{"question": "q", "answer": "1"}',
    b'{"question": "q", "answer": "#### one"}', b'{"question": "q", "answer": "#### "}', b"[" * 100_000,
    b'{"question": "\\ud800", "answer": "#### 1"}', b'{"question": "q", "answer": "#### 1", "by": "\\udfff"}',
], ids=lambda line: line[:60])
def test_files_of_another_layout_are_named(tmp_path, line):
    path = write(tmp_path / "train.jsonl", some(2))
    path.write_bytes(path.read_bytes() + line + b"\n")
    layout = r'train.jsonl, line 3: need {"question": "…", "answer": "… #### number"}, got '
    with pytest.raises(ValueError, match=layout.replace("{", r"\{")) as error:
        problems("train", tmp_path)
    assert "\n" not in str(error.value)


PUBLISHED = Path(os.environ.get("MINIR1_GSM8K", "data/gsm8k"))


@pytest.mark.skipif(not (PUBLISHED / "train.jsonl").is_file(), reason="no published data: set MINIR1_GSM8K")
def test_the_published_data():
    """8,792 problems: each solution is right, tagged or as published, and its neighbours are wrong."""
    task = load("gsm8k", PUBLISHED)
    parts = {split: task.problems(split) for split in task.splits}
    assert {split: len(part) for split, part in parts.items()} == {"train": 6931, "validation": 542, "test": 1319}
    solutions = {}
    for name in ("train", "test"):
        for line in (PUBLISHED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            solutions[record["question"]] = record["answer"]
    for problem in [p for part in parts.values() for p in part]:
        value, solution = number(problem.reference), solutions[problem.prompt]
        work = solution.rpartition("####")[0]
        assert verify(problem, solution).status == "right"
        assert verify(problem, said(problem.reference, work)).status == "right"
        assert final(problem, said(f"${float(value):,.2f}", work)) == str(value)
        for wrong in (value + 1, value - 1, -value or 1):
            assert verify(problem, said(wrong, work)).status == "wrong"
