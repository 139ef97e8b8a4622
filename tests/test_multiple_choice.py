"""multiple_choice.py, mmlu.py, gpqa.py, arc.py: which letter a text answers with, and the published layouts."""

import csv
import json
from collections import Counter
from itertools import product

import pytest
from clock import quickest
from hypothesis import given
from hypothesis import strategies as st

from minir1.rewards import TAGS
from minir1.tasks import load
from minir1.tasks.answers import claim
from minir1.tasks.multiple_choice import INSTRUCTION, final, problem, verify


def asked(choices=("London", "Paris", "Rome", "Oslo"), right=1):
    return problem("here", "a layout", "Which?", list(choices), right)


P = asked()


def said(answer, thinking="hm"):
    return f"<think>{thinking}</think><answer>{answer}</answer>"


# ---------------------------------------------------------------- one letter

# fmt: off
LETTERS = [  # each stands for B
    "B", "(B)", "B.", "B)", "[B]", "**B**", "**(B)**", "**B.**", "`B`", '"B"', "$B$", "\\(B\\)", "{B}", "\\text{B}",
    "\\text{(B)}", "$\\textbf{(B)}$", "\\mathrm{B}.", " B\n", "option B", "Option (B)", "choice B", "letter B",
    "B. Paris", "B) Paris", "(B) Paris.", "B: Paris", "B - Paris", "B, Paris", "B (Paris)", "**B. Paris**", "B) paris",
    "**B**: Paris", "option B: Paris", "\\text{B) }Paris", "B) Paris, because it is in France", "B is correct",
    "(B) is the right answer", "therefore B",
    "(B) because it is the capital", "B, since it is in France", "Paris", "paris", "**Paris**", "Paris.",
    "\\text{Paris}",
]
NO_LETTERS = {
    "two letters": ["A or B", "B or A", "A and B", "A, B", "B, C", "B C", "BC", "B/C", "(A)(B)", "B & C", "B. C.",
                    "B|C",
                    "A B C D", "ABCD", "either B or C", "both B and C", "B; C", "B and/or C", "A-B", "B or Rome",
                    "**A** or **B**", "\\text{A} or \\text{B}", "Paris or Rome", "London, Paris", "Paris Rome"],
    "taken back": ["not B", "not (B)", "B is wrong", "B is incorrect", "B is not correct", "B?? C", "B, not really",
                   "no B", "never B", "B but maybe C", "B unless C", "B because C is wrong and it isn't A",
                   "not Paris"],
    "a word": ["Banana", "b", "(b)", "Bob", "B's", "B'", "B’s", "Be", "B2", "Bparis", "Paris B", "C# B", "I think",
               "A good answer is hard", "A", "I", "B-flat", "be", "Not sure", "A. Paris", "C. Paris", "(A) Paris"],
    "another letter": ["A", "C", "D", "E", "Z", "(E)", "option F", "1", "2", "B1"],
    "another alphabet": ["В", "(В)", "Β", "Ｂ", "𝐁", "ⓑ", "Ⓑ", "ᗷ", "Ᏼ", "в", "β", "Ḅ", "B\u0301x", "\u0412. Paris"],
    "another text": ["B) Paris, Rome", "B) Paris because C is in Italy", "B Paris or so", "B. London", "(B) Rome",
                     "B: a city", "B Paris Rome", "B. Paris, C. Rome", "Paris is nice", "Pari",
                     "Pariss", "B - Oslo", "B (C)", "B. C", "B) (A)"],
    "all": ["A. London B. Paris C. Rome D. Oslo", "A. London\nB. Paris\nC. Rome\nD. Oslo", "(A) (B) (C) (D)",
            "London, Paris, Rome, Oslo", "Which?", P.prompt, INSTRUCTION],
    "nothing": ["", " ", ".", "**", "()", "$$", "{}", "\\text{}", "none", "?", "-", "\\boxed{}", "[]", "option",
                "\x00"],
    "unfinished": ["\\boxed{B", "\\boxed{B}\\boxed{", "(B", "\\text{B", "\\boxed B C"],
}
AROUND = {  # ways to state an answer
    "tags": said("{}"), "tags and box": said("\\boxed{{{}}}"), "box": "So \\boxed{{{}}}.", "#### ": "Well.\n#### {}",
    "answer is": "It is in France.\nThe answer is {}", "answer:": "**Answer:** {}", "after thinking": "A</think>{}",
    "alone": "{}", "option is": "The correct option is {}", "must be": "So the answer must be {}",
}
# fmt: on
BOXED_IN = ("tags and box", "box")


@pytest.mark.parametrize("name", AROUND)
def test_letters(name):
    form = AROUND[name].replace("{{{}}}", "{%s}").replace("{}", "%s")
    wrong = [text for text in LETTERS if final(P, form % text) != "B"]
    assert wrong == []
    verdict = verify(P, form % "B")
    assert verdict.status == "right" and verdict.scores == {"accuracy": 1.0}


@pytest.mark.parametrize("kind", NO_LETTERS)
@pytest.mark.parametrize("name", AROUND)
def test_nothing_wrong_is_called_right(name, kind):
    """Over 1,000 texts, for the reference B, and for A where `A` is an article or one of several."""
    form = AROUND[name].replace("{{{}}}", "{%s}").replace("{}", "%s")
    first = asked(right=0)
    for text in NO_LETTERS[kind]:
        if name in BOXED_IN and "\\boxed" in text:  # a box in a box: tests/test_answers.py
            continue
        assert verify(P, form % text).status == "wrong", text
        if kind in ("two letters", "all") or text in ("A good answer is hard", "I think"):
            assert verify(first, form % text).status == "wrong", text


# fmt: off
WHOLE = {  # texts as a whole, for the reference B
    "in the thinking only": ["<think>B</think>", "<think>The answer is B</think>I am done.",
                             "<think>\\boxed{B}</think>"],
    "thinking not closed": ["<think>B", "<think>The answer is B.", "<think>a</think><think>\\boxed{B}", "<think>"],
    "tags": ["<answer>B", "B</answer>", "<think>a</think><answer>B</answer><answer>B</answer>",
             "<think><answer>B</answer>",
             "<think><answer>B</answer></think>", "<think>a</think><answer>A</answer>B", said("") + "B"],
    "later": ["The answer is B. No, the answer is C.", "\\boxed{B} or \\boxed{C}", "#### B\n#### C",
              "Answer: B\nAnswer: A"],
    "mentioned": ["B is a letter, isn't it", "I like B. And C.", "Paris is the capital of France, so I am sure.",
                  "Options A, B, C and D", "We rule out A, C and D.", "B\nC", "A\nB", "B\n\nQuestion: what?\nC"],
    "lists": ["The answer is A. B. C. D.", "Answer:\nB. Paris\nC. Rome", "The answer is B. C.", "Answer: B) C) D)",
              "The answer is **B**. **C**.", "Answer: B. Paris. C. Rome. D. Oslo.",
              "The answer is B. London", "The answer is B. Rome.",
              "The answer is B. A. London is also right.", "The answer is B. C. D. One of them is not wrong.",
              "The answer is B. A, C and D are right as well.", "Answer: B. Paris; A. London; C. Rome"],
}
# fmt: on


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_texts(kind):
    assert [text for text in WHOLE[kind] if verify(P, text).status != "wrong"] == []


GENERATED = [
    f"{x} {joint} {y}" for x, y in product("ABCD", repeat=2) if x != y for joint in ("or", "and", "/", "+", "but")
]


def test_pairs_of_letters():
    for text, right in product(GENERATED, range(4)):
        for form in ("{}", "The answer is {}.", said("{}")):
            assert verify(asked(right=right), form.replace("{}", text)).status == "wrong", text


def test_what_follows_a_sentence_does_not_matter():
    for text in (
        "The answer is B. This rules out C.",
        "The answer is B.\n\nA. London is in England.",
        "Answer: B\nDone",
        "The answer is B. A, C and D are wrong.",
        "The answer is (B). (A), (C) and (D) are all incorrect.",
        "The answer is B.\nA. London is in England.\nC. Rome is in Italy.",
        "Answer: B. Paris. A. London is in England.",
        "Therefore, B is the answer.",
        "\\boxed{(B)\\ Paris}",
    ):
        assert final(P, text) == "B", text


def test_texts_of_choices():
    both = asked(["A only", "B only", "A and B", "neither"], 2)
    assert [final(both, f"The answer is {text}") for text in ("A and B", "C", "B only", "B", "A or B")] == [
        "C",
        "C",
        "B",
        "B",
        None,
    ]
    genes = asked(["AA", "Aa", "aa", "AA "], 1)  # the case matters, and two are equal
    assert [final(genes, text) for text in ("Aa", "AA", "aa", "aA", "A", "D")] == ["B", None, "C", None, "A", "D"]
    blood = asked(["B", "A", "AB", "O"], 0)
    assert [final(blood, text) for text in ("A", "B", "O", "AB")] == ["A", "B", "D", "C"]  # letters before texts
    many = asked([str(i) for i in range(10)], 9)
    assert [final(many, text) for text in ("J", "9", "K", "I think", "$7$")] == ["J", "J", None, None, "H"]


PIECES = [
    *TAGS,
    "\\boxed{",
    "}",
    "the answer is ",
    "A",
    "B",
    "Paris",
    ". ",
    ", ",
    "(",
    ")",
    "**",
    "\n",
    "or",
    "not ",
    "$",
]
pieces = st.lists(st.sampled_from(PIECES)).map("".join)


@given(st.one_of(st.text(), st.text().map(said), pieces, pieces.map(said)))
def test_no_text_raises(text):
    assert (verify(P, text).status == "right") == (final(P, text) == "B")


@pytest.mark.parametrize(
    "piece", [*PIECES, "B ", "(B) ", "\n \n", "correct option is ", "\\text{", "\\text{A}", "A. London "]
)
def test_long_texts_are_fast(piece):
    """What this file adds to `claim`, whose time tests/test_answers.py bounds."""
    long = piece * (1_000_000 // len(piece))
    for text in (long, said(long), "The answer is A" + long, "A" + long, "The correct option is " + long):
        assert quickest(final, P, text) < 1.5 * quickest(claim, text) + 0.05, text[:30]


# ---------------------------------------------------------------- files


def put(path, rows, header=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows] if header else rows)
    return path


def agrees(task, split, count):
    """The problems; each is right by its reference, its text and its solution, and wrong by the other letters."""
    listed = task.problems(split)
    assert len(listed) == count
    for p in listed:
        choices = p.extra["choices"]
        assert all(f"\n{letter}. {choice}\n" in p.prompt for letter, choice in zip("ABCDE", choices))
        right = ["ABCDE".index(p.reference)]
        assert [i for i in range(len(choices)) if task.verify(p, said("ABCDE"[i])).status == "right"] == right
        assert [i for i in range(len(choices)) if task.verify(p, said(choices[i])).status == "right"] == right
        assert task.verify(p, p.solution).status == "right" and task.final(p, p.solution) == p.reference
    return listed


def test_mmlu_as_published(tmp_path):
    for split, count in (("dev", 5), ("val", 2), ("test", 3)):
        for subject in ("college_physics", "world_religions"):
            rows = [[f"{split} {i}\n{subject}", f"{i}", "N/A", 'say "x"', "a, b", "ABCD"[i % 4]] for i in range(count)]
            put(tmp_path / split / f"{subject}_{split}.csv", rows)
    put(tmp_path / "auxiliary_train" / "mc_test.csv", [["other", "1", "2", "3", "4", "A"]])
    task = load("mmlu", tmp_path)
    assert task.splits == ("train", "validation", "test")
    agrees(task, "train", 10), agrees(task, "validation", 4)
    listed = agrees(task, "test", 6)
    assert Counter(p.subject for p in listed) == {"college physics": 3, "world religions": 3}
    assert listed[1].prompt == (
        'test 1\ncollege_physics\n\nA. 1\nB. N/A\nC. say "x"\nD. a, b\n\n'
        "Exactly one choice is right. State its letter as the final answer."
    )
    assert listed[1].solution == "The answer is (B)." and listed[1].reference == "B"
    one = load("mmlu", tmp_path / "test" / "world_religions_test.csv")
    assert len(one.problems("test")) == 3
    with pytest.raises(ValueError, match="does not hold the split 'train'"):
        one.problems("train")


def test_mmlu_of_the_hub(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"question": f"q{i}", "subject": f"s_{i % 2}", "choices": list("wxyz"), "answer": i % 4} for i in range(8)]
    for folder in ("all", "s_0"):
        (tmp_path / folder).mkdir()
        for split in ("test", "dev", "validation", "auxiliary_train"):
            name = f"{split}-00000-of-00001.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / folder / name)
    listed = agrees(load("mmlu", tmp_path), "test", 8)
    assert {p.subject for p in listed} == {"s 0", "s 1"} and len(load("mmlu", tmp_path).problems("train")) == 8
    lettered = put(tmp_path / "mmlu.jsonl", [row | {"answer": "ABCD"[row["answer"]]} for row in rows])
    assert load("mmlu", lettered).problems("test") == listed
    with pytest.raises(ValueError, match="mmlu.jsonl names no split, so it is read as 'test': give the folder"):
        load("mmlu", lettered).problems("train")


# fmt: off
HEADER = ["Pre-Revision Question", "Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2",
          "Incorrect Answer 3", "Explanation", "Subdomain", "High-level domain", "Writer's Difficulty Estimate"]
# fmt: on


def experts(count):
    level = "Hard undergraduate level (could be a question on a hard exam)"
    return [
        ["old", f"q{i}", f"r{i}\n", f"x{i}", f"y{i}", f"z{i}", f"See {i}.\n", "Optics", "Physics", level if i else ""]
        for i in range(count)
    ]


def test_gpqa(tmp_path):
    diamond = put(tmp_path / "gpqa_diamond.csv", experts(60), HEADER)
    put(tmp_path / "gpqa_main.csv", experts(80), HEADER)
    task = load("gpqa", tmp_path)
    assert task.splits == ("test",)
    listed = agrees(task, "test", 60)
    assert listed == load("gpqa", diamond).problems("test") and len(load("gpqa:main", tmp_path).problems("test")) == 80
    assert (listed[1].subject, listed[1].level) == ("Physics", "Hard undergraduate level")
    assert listed[0].level == "default" and listed[1].extra["subdomain"] == "Optics"
    assert listed[1].solution == f"See 1.\n\nThe answer is ({listed[1].reference})."
    assert all(6 < count < 26 for count in Counter(p.reference for p in listed).values())  # the order is shuffled
    assert sorted(listed[2].extra["choices"]) == ["r2", "x2", "y2", "z2"]
    assert listed[:9] == load("gpqa", put(tmp_path / "other.csv", experts(9), HEADER)).problems("test")  # and stable
    with pytest.raises(ValueError, match="holds 0 files gpqa_extended: give GPQA's folder with"):
        load("gpqa:extended", tmp_path).problems("test")


def test_arc(tmp_path):
    def row(i, labels):
        choices = [{"text": f"t{n}", "label": label} for n, label in enumerate(labels)]
        return {"id": f"x{i}", "question": {"stem": f"q{i}", "choices": choices}, "answerKey": labels[i % len(labels)]}

    rows = [row(0, "ABCD"), row(1, "1234"), row(2, "ABC"), row(3, "ABCDE")]
    for name in ("Easy", "Challenge"):
        put(tmp_path / f"ARC-{name}" / f"ARC-{name}-Test.jsonl", rows)
        put(tmp_path / f"ARC-{name}" / f"ARC-{name}-Test.csv", [["x"]], ["questionID"])
        put(tmp_path / f"ARC-{name}" / f"ARC-{name}-Dev.jsonl", rows[:1])
        put(tmp_path / f"ARC-{name}" / f"ARC-{name}-Train.jsonl", rows[:2])
    task = load("arc", tmp_path)
    listed = agrees(task, "test", 8)
    assert [p.level for p in listed] == ["challenge"] * 4 + ["easy"] * 4
    assert [p.reference for p in listed[:4]] == ["A", "B", "C", "D"]
    agrees(task, "train", 4), agrees(task, "validation", 2)
    assert len(load("arc", tmp_path / "ARC-Easy").problems("test")) == 4
    hub = [
        {
            "id": r["id"],
            "question": r["question"]["stem"],
            "answerKey": r["answerKey"],
            "choices": {key: [c[key] for c in r["question"]["choices"]] for key in ("text", "label")},
        }
        for r in rows
    ]
    path = put(tmp_path / "hub" / "ARC-Easy" / "test-00000-of-00001.jsonl", hub)
    assert load("arc", path.parent.parent).problems("test") == listed[4:]


# fmt: off
GOOD = {
    "mmlu": {"question": "q", "choices": ["a", "b"], "answer": 1},
    "arc": {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "gpqa": dict(zip(HEADER, experts(1)[0])),
}
CHANGED = {
    "mmlu": [{"question": ""}, {"question": 3}, {"choices": ["a"]}, {"choices": ["a", 2]}, {"choices": "ab"},
             {"answer": 2},
             {"answer": -1}, {"answer": "C"}, {"answer": "b"}, {"answer": ""}, {"answer": None}, {"answer": True},
             {"answer": 1.0}, {"answer": "AB"}, {"choices": [str(i) for i in range(27)]}, {"choices": None}],
    "arc": [{"question": None}, {"answerKey": "C"}, {"answerKey": 1}, {"choices": []}, {"choices": {"text": ["a",
            "b"]}},
            {"choices": {"text": ["a", "b"], "label": ["B", "B"]}}, {"choices": {"text": ["a"], "label": ["A", "B"]}},
            {"question": {"stem": "q"}}, {"question": {"stem": "q", "choices": [1]}}, {"answerKey": None}],
    "gpqa": [{"Question": ""}, {"Correct Answer": None}, {"Incorrect Answer 3": 4}],
}
# fmt: on


@pytest.mark.parametrize("name, change", [(name, change) for name in CHANGED for change in CHANGED[name]], ids=str)
def test_files_of_another_layout_are_named(tmp_path, name, change):
    path = put(tmp_path / "test.jsonl", [GOOD[name]])
    assert len(load(name, path).problems("test")) == 1
    put(path, [GOOD[name], GOOD[name] | change])
    with pytest.raises(ValueError, match="test.jsonl, line 2: need .*, got ") as error:
        load(name, path).problems("test")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", GOOD)
def test_files_without_problems(tmp_path, name):
    path = put(tmp_path / "test.jsonl", [])
    with pytest.raises(ValueError, match="test.jsonl holds no problems"):
        load(name, path).problems("test")
    with pytest.raises(ValueError, match=f"task {name} needs data: "):
        load(name)
