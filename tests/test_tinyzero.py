"""tinyzero.py: expressions that make the target and those that do not, and files in both layouts."""

import json
from fractions import Fraction
from itertools import permutations, product

import pytest
from clock import quickest
from hypothesis import given
from hypothesis import strategies as st

from minir1.rewards import TAGS
from minir1.tasks import load, tinyzero
from minir1.tasks.tinyzero import solve, solves, verify

TINYZERO = load("tinyzero", "unread")
NUMBERS = (3, 5, 8)
TARGETS = {19: "3*8-5", 1: "8/(3+5)", 16: "3+5+8", 64: "(3+5)*8"}


def asked(target, numbers=NUMBERS):
    return tinyzero._problem(numbers, target, "")


def test_final_answers_are_expressions_in_plain_writing():
    """Where verify reads an answer, a majority vote must too."""
    for text in ("\\boxed{3 \\times 8 - 5}", "The answer is 3*8 - 5 = 19.", said("$3×8-5$")):
        assert verify(asked(19), text).status == "right" and TINYZERO.final(asked(19), text) == "3*8-5"
    assert TINYZERO.final(asked(19), "I give up") is None and TINYZERO.final(asked(19), "\\boxed{}") is None


def said(answer, thinking="hm"):
    return f"<think>{thinking}</think><answer>{answer}</answer>"


RIGHT = {  # target -> texts
    19: [
        "3*8-5",
        "3 * 8 - 5",
        "8*3-5",
        "(3*8)-5",
        "((3*8)-5)",
        "3×8-5",
        "3·8−5",
        "3\\times 8-5",
        "3 \\cdot 8 - 5",
        "\\(3 \\times 8 - 5\\)",
        "\\[3 \\times 8 - 5\\]",
        "$3*8-5$",
        "\\boxed{3*8-5}",
        "$\\boxed{3 \\times 8 - 5}$",
        "3*8-5 = 19",
        "3*8-5=19",
        "**3*8-5**",
        "\\left(3*8\\right)-5",
        "`3*8-5`",
        "3*8-5.",
        "3*8-5 = 19.",
    ],
    1: ["8/(3+5)", "8÷(5+3)", "8 \\div (3 + 5) = 1", "(3+5)/8"],
    64: ["8*(3+5)", "(5+3)*8=64"],
}
FRACTIONS = [((3, 3, 8, 8), 24, "8/(3-8/3)"), ((1, 5, 5, 5), 24, "5*(5-1/5)"), ((1, 3, 4, 6), 24, "6/(1-3/4)")]
WRONG = {  # for the target 19
    "another value": ["3+5+8", "3*5-8", "8-5+3", "3*8+5", "3-8*5", "5-3*8", "8/3+5", "(3-5)*8"],
    "a number twice": ["3*8-5+3-3", "3*5+8-4", "3*8-5*1", "8+8+3", "3+8+8", "5+5+3+3+3", "(3*8-5)*5/5", "3*8-5+0"],
    "a number left out": ["19", "24-5", "3*8", "8*3-5-0", "11+8", "8+11", "38/2", "3"],
    "another number": ["20-1", "3*8-5.0", "3*8-05", "3*8-5e0", "3*08-5", "03*8-5", "3.0*8-5", "4*8-13", "3_*8-5"],
    "digits joined": ["38-5", "3 8-5", "35-8", "83-5", "3*85", "3*8 5", "8(3)-5", "3(8)-5", "(3)(8)-5"],
    "a sign": ["-5+3*8", "+3*8-5", "3*8+-5", "3*8--5", "-(5-3*8)", "(-5)+3*8", "3*8-+5", "8*-3-5"],
    "other operators": [
        "3**8-5",
        "3*8%5",
        "3//8-5",
        "8^3-5",
        "3*8-5!",
        "3|8-5",
        "8<<3-5",
        "3 mod 8",
        "3*8-sqrt(5)",
        "3x8-5",
        "3*8,-5",
        "3&8",
        "3*8-5|0",
        "~3*8-5",
        "3*8-5 if 1 else 0",
        "max(3*8-5,0)",
        "__import__('os')",
        "3X8-5",
    ],
    "equations": [
        "3*8-5=20",
        "3*8-5==19",
        "3*8-5=19=19",
        "19=3*8-5",
        "x=3*8-5",
        "3*8=24-5",
        "3*8-5=19.0",
        "3*8-5=nineteen",
        "3*8=24\n24-5=19",
        "3*8-5=3*8-5",
        "3+5+8=19",
        "3*8-5=",
        "=19",
        "=",
        "3*8-5=-19",
        "3*8-5≈19",
    ],
    "open": ["(3*8-5", "3*8-5)", "3*8-", "/3*8-5", "3*8-(5", ")3*8-5(", "()3*8-5", "3*8-5()", "3*(8-5", "((3*8-5)"],
    "division by zero": ["3/(8-8)", "5/(3-3)", "3/0", "8/(5-5)*3", "3*8-5/0", "0/0"],
    "other digits": ["٣*٨-٥", "３*８-５", "³*8-5", "3*8-⁵", "Ⅲ*8-5", "3*8-5\u0660", "3∗8-5", "3⋅8-5"],
    "several": ["3*8-5 or 3*8-5", "3*8-5, 8*3-5", "3*8-5; 8*3-5", "3*8-5 and more", "3*8-5 3*8-5", "not 3*8-5"],
    "words": [
        "three*8-5",
        "3 times 8 minus 5",
        "the answer",
        "3*8-five",
        "target",
        "no solution",
        "3*8-5 (I think)",
        "n/a",
    ],
    "other scripts": [
        "3*8-5#",
        "3*8-5//",
        "3*8-5 # = 19",
        "eval('3*8-5')",
        "\\frac{3*8-5}{1}",
        "[3*8-5]",
        "{3*8-5}",
        "3*8-5;",
    ],
    "empty": ["", " ", "()", "$$", "\\boxed{}", "\n", ".", "-", "\x00", "**", "``"],
    "unfinished": ["\\boxed{3*8-5", "\\boxed{3*8-5}\\boxed{", "$3*8-5", "\\left(3*8-5", "**3*8-5"],
    "long": [
        "3*8-5" + " " * 300 + "+0",
        "(" * 30 + "3*8-5" + ")" * 30,
        "3*8-5+" * 60 + "0",
        "1" * 5000,
        "9*" * 90 + "9",
    ],
}
TEXTS = {  # whole texts, for the target 19
    "thinking": [
        "<think>3*8-5",
        "<think>3*8-5</think>",
        "<think><answer>3*8-5</answer></think>",
        "<think>\\boxed{3*8-5}</think>",
    ],
    "tags": [
        said("3*8-5") + "<answer>3*8-5</answer>",
        "<think>a</think><answer>3*8-5",
        said("3+5+8") + " \\boxed{3*8-5}",
        "<think>a<answer>3*8-5</answer>",
        said("3*8-5\n8*3-5"),
    ],
    "bare": ["3*8-5", "I think 3*8-5", "We get 3*8-5 = 19"],
    "later": ["The answer is 3*8-5. The answer is 3+5+8.", "\\boxed{3*8-5} \\boxed{16}", "#### 3*8-5\n#### 16"],
}


@pytest.mark.parametrize("target", RIGHT)
def test_right(target):
    for text in RIGHT[target]:
        for form in (said(text), f"So\n#### {text}", f"The answer is: {text}\n"):
            assert verify(asked(target), form).status == "right", form
    assert verify(asked(19), said("3*8-5")).scores == {"accuracy": 1.0}


@pytest.mark.parametrize("kind", WRONG)
def test_nothing_wrong_is_called_right(kind):
    for text in WRONG[kind]:
        assert not solves(text, NUMBERS, 19), text
        for form in (said(text), f"#### {text}", f"The answer is {text}", f"\\boxed{{{text}}}"):
            if (
                not ("\\boxed" in text and "boxed{\\" in form) and text != "**3*8-5"
            ):  # \boxed{\boxed{…}: test_answers.py
                assert verify(asked(19), form).status == "wrong", form


@pytest.mark.parametrize("kind", TEXTS)
def test_whole_texts(kind):
    assert [text for text in TEXTS[kind] if verify(asked(19), text).status != "wrong"] == []


def test_there_are_enough_adversarial_texts():
    assert sum(map(len, WRONG.values())) + sum(map(len, TEXTS.values())) >= 150  # each in up to four forms


@pytest.mark.parametrize("numbers, target, text", FRACTIONS)
def test_values_are_exact_fractions(numbers, target, text):
    assert solves(text, numbers, target) and not solves(text, numbers, target + 1)
    assert not solves(text.replace("/", "//"), numbers, target)


def test_every_expression_of_three_numbers_has_the_value_that_python_gives():
    """All 192 orders, operators and parentheses, against fractions computed here."""
    count = 0
    for (a, b, c), p, q, left in product(permutations(NUMBERS), "+-*/", "+-*/", (True, False)):
        text = f"({a}{p}{b}){q}{c}" if left else f"{a}{p}({b}{q}{c})"
        names = dict(zip("abc", map(Fraction, (a, b, c))))
        value = eval(f"(a{p}b){q}c" if left else f"a{p}(b{q}c)", names)  # of this test's own text
        for target in (19, 16, 1, 64, 0):
            assert solves(text, NUMBERS, target) == (value == target), (text, value)
        count += 1
    assert count == 192


def test_the_search_finds_what_there_is():
    for numbers, target, _ in FRACTIONS:
        assert solves(solve(numbers, target), numbers, target)
    for target, text in TARGETS.items():
        assert solves(text, NUMBERS, target) and solves(solve(NUMBERS, target), NUMBERS, target)
    assert solve(NUMBERS, 17) == "" and solve((1, 1, 1, 1), 99) == ""


PIECES = [
    *TAGS,
    "\\boxed{",
    "}",
    "the answer is ",
    "3",
    "8",
    "5",
    "*",
    "-",
    "/",
    "(",
    ")",
    "=",
    "19",
    " ",
    "\\times",
    "$",
]
pieces = st.lists(st.sampled_from(PIECES)).map("".join)


@given(st.one_of(st.text(), st.text().map(said), pieces, pieces.map(said)))
def test_no_text_raises(text):
    assert verify(asked(19), text).status in ("right", "wrong")


@pytest.mark.parametrize("piece", [*PIECES, "3*8-5", "\\left(", "×", "****"])
def test_long_texts_are_fast(piece):
    long = piece * (1_000_000 // len(piece))
    for text in (long, said(long), "#### " + long):
        assert quickest(verify, asked(19), text) < 0.25  # under 0.05


# ---------------------------------------------------------------- files


def rows(count):
    return [
        {"target": a + b + c, "nums": [a, b, c]} for a in range(1, 20) for b in range(20, 40) for c in range(40, 60)
    ][:count]


def verl(row):
    truth = {"target": row["target"], "numbers": row["nums"]}
    return {
        "data_source": "countdown",
        "prompt": [{"role": "user", "content": "…"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": "train", "index": 0},
    }


def put(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_one_file_has_three_splits(tmp_path):
    task = load("tinyzero", put(tmp_path / "countdown.jsonl", rows(7000)))
    parts = {split: task.problems(split) for split in task.splits}
    assert sum(map(len, parts.values())) == 7000 and len({p.prompt for part in parts.values() for p in part}) == 7000
    assert all(40 < len(parts[split]) < 110 for split in ("validation", "test"))
    turned = [{"target": r["target"], "nums": r["nums"][::-1]} for r in rows(7000)]
    other = load("tinyzero", put(tmp_path / "train.jsonl", turned)).problems("test")
    assert [p.extra["target"] for p in other] == [p.extra["target"] for p in parts["test"]]  # the order does not matter
    for p in parts["test"]:
        assert task.verify(p, said(p.reference)).status == "right" and task.verify(p, said("1")).status == "wrong"
    assert {p.reference for p in parts["train"]} == {""}  # too many to search
    p = parts["test"][0]
    assert p.level == "3 numbers" and p.prompt.startswith(f"Make {p.extra['target']} from the numbers ")


def test_both_layouts(tmp_path):
    plain = load("tinyzero", put(tmp_path / "a.jsonl", rows(300))).problems("train")
    assert load("tinyzero", put(tmp_path / "b.jsonl", map(verl, rows(300)))).problems("train") == plain
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for form in (rows(300), list(map(verl, rows(300)))):
        parquet.write_table(pyarrow.Table.from_pylist(form), tmp_path / "c.parquet")
        assert load("tinyzero", tmp_path / "c.parquet").problems("train") == plain


def test_a_folder(tmp_path):
    put(tmp_path / "train-00000-of-00001.jsonl", rows(500))
    task = load("tinyzero", tmp_path)
    assert sum(len(task.problems(split)) for split in task.splits) == 500  # train alone is split in three
    put(tmp_path / "test-00000-of-00001.jsonl", rows(3))
    assert len(task.problems("test")) == 3 and len(task.problems("train")) + len(task.problems("validation")) == 500
    test = load("tinyzero", tmp_path / "test-00000-of-00001.jsonl")
    assert len(test.problems("test")) == 3
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match="does not hold the split"):
            test.problems(split)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"target": 3},
        {"target": 3, "nums": []},
        {"target": 3, "nums": [3]},
        {"target": "3", "nums": [1, 2]},
        {"target": 3, "nums": [1, "2"]},
        {"target": 3, "nums": [1, -2]},
        {"target": 3.0, "nums": [1, 2]},
        {"target": True, "nums": [1, 2]},
        {"reward_model": {"ground_truth": "3"}},
        {"reward_model": None, "nums": [1, 2]},
    ],
    ids=str,
)
def test_files_of_another_layout_are_named(tmp_path, row):
    path = put(tmp_path / "a.jsonl", [*rows(1), row])
    with pytest.raises(ValueError, match='a.jsonl, line 2: need {"target": 24, "nums".* got ') as error:
        load("tinyzero", path).problems("train")
    assert "\n" not in str(error.value)


def test_empty_files(tmp_path):
    with pytest.raises(ValueError, match="a.jsonl holds no problems"):
        load("tinyzero", put(tmp_path / "a.jsonl", [])).problems("test")
    with pytest.raises(ValueError, match="task tinyzero needs data: TinyZero's or verl's"):
        load("tinyzero")
