"""aime.py: competition problems with integer answers, in the layouts in which they are shared."""

import csv
import gzip
import json

import number_gallery
import pytest
from clock import quickest
from hypothesis import given
from hypothesis import strategies as st

from minir1.tasks import Problem, answers, gsm8k, load
from minir1.tasks.aime import final, problems, verify

LAYOUTS = {  # as on the hub -> reference
    "aime_2024": ({"id": 60, "problem": "q", "solution": "s \\boxed{204}.", "answer": "204", "url": "u",
        "year": "2024"}, "204"),
    "AIME_2024": ({"ID": "2024-II-4", "Problem": "q", "Solution": "s", "Answer": 33}, "33"),
    "leading zeros": ({"problem": "q", "answer": "004"}, "4"),
    "zeros": ({"problem": "q", "answer": "000"}, "0"),
    "aime25": ({"problem": "q", "answer": "70", "id": "0"}, "70"),
    "AIME2025": ({"question": "q", "answer": "588"}, "588"),
    "AIME_1983_2024": ({"ID": "1983-1", "Year": 1983, "Problem Number": 1, "Question": "q", "Answer": "60",
        "Part": None}, "60"),
    "validation-amc": ({"id": 0, "problem": "q", "answer": 142.0, "url": "u"}, "142"),
    "amc23": ({"question": "q", "answer": "27.0"}, "27"),
    "degrees": ({"problem": "q", "answer": "336^\\circ"}, "336"),
    "negative": ({"problem": "q", "answer": -1}, "-1"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name):
    record, reference = LAYOUTS[name]
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(record) + "\n")
    [problem] = problems("test", path)
    assert (problem.prompt, problem.reference) == ("q", reference)
    assert problem.solution == (record.get("solution") or record.get("Solution") or "")
    assert (
        verify(problem, f"\\boxed{{{reference}}}").status == "right"
        and final(problem, f"#### {reference}") == reference
    )
    assert load("aime", path).problems("test") == load("aime", tmp_path).problems("test") == [problem]
    assert load("aime", path).splits == ("test",)


def test_what_else_a_record_says(tmp_path):
    record = {"problem": "q", "answer": 5, "level": 3, "subject": "Algebra", "year": 2024, "ID": "I-1", "url": None}
    (tmp_path / "test.json").write_text(json.dumps([record, {"problem": "r", "answer": "6"}]))
    one, two = problems("test", tmp_path)
    assert (one.level, one.subject, one.extra) == ("3", "Algebra", {"year": 2024, "id": "I-1"})
    assert two == Problem("r", "6")
    boxed = load("aime:boxed", tmp_path).problems("test")
    assert [p.prompt for p in boxed] == [f"{text}\n\n{answers.BOXED_INSTRUCTION}" for text in "qr"]
    assert answers.BOXED_INSTRUCTION == gsm8k.answers.BOXED_INSTRUCTION


def test_files_and_folders(tmp_path):
    records = [{"question": f"q{i}", "answer": str(i)} for i in range(4)]
    for name, part in (("aime2025-I.jsonl", records[:2]), ("aime2025-II.jsonl", records[2:])):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in part))
    assert [p.prompt for p in problems("test", tmp_path)] == ["q0", "q1", "q2", "q3"]  # all files of a folder
    (tmp_path / "train.csv.gz").write_bytes(b"")
    with gzip.open(tmp_path / "train.csv.gz", "wt", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(records[1:2])
    assert [p.prompt for p in problems("test", tmp_path)] == ["q1"]
    (tmp_path / "test.jsonl").write_text(json.dumps(records[3]))
    assert [p.prompt for p in problems("test", tmp_path)] == ["q3"]


@pytest.mark.parametrize("line", [
    '{"problem": "q"}', '{"answer": 3}', '{"problem": "q", "answer": null}', '{"problem": "q", "answer": true}',
    '{"problem": "q", "answer": 2.5}', '{"problem": "q", "answer": "1/2"}', '{"problem": 3, "answer": 3}',
    '{"problem": "", "answer": 3}', '{"problem": "q", "answer": "A"}', '{"problem": "q", "answer": [3]}',
    '{"problem": "q", "answer": "3 or 4"}', '[1]', '3', '{', '',
])  # fmt: skip
def test_other_layouts_are_named(tmp_path, line):
    (tmp_path / "test.jsonl").write_text(line)
    layout = r'test.jsonl, line 1(: need \{"problem": "…", "answer": an integer\}, got |: need an object| is no JSON)'
    with pytest.raises(ValueError, match=layout if line else "holds no problems: give the file") as error:
        problems("test", tmp_path)
    assert "\n" not in str(error.value)


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match="holds no file of the split .*: give the file with the problems"):
        problems("test", tmp_path)
    with pytest.raises(ValueError, match="there is no file or folder .*nowhere: give the file with the problems"):
        problems("test", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="task aime needs data: the file with the problems"):
        load("aime")


P = Problem("q", "204")
RIGHT = [
    "\\boxed{204}", "\\boxed{0204}", "$\\boxed{204}$.", "\\boxed{m+n = 204}", "\\boxed{204^\\circ}",
    "\\boxed{\\textbf{204}}",
    "\\boxed{\\textbf{(E) }204}", "The answer is $204$.", "Answer: 204", "<think>x</think><answer>204</answer>",
    "So $m + n = 200 + 4 = \\boxed{204}$.", "m + n = 200 + 4 = 204", "Therefore $p+q+r = 204$.", "**204**", "\\[204\\]",
]  # fmt: skip
WRONG = [
    "\\boxed{102/2}", "\\boxed{204\\pi}", "\\boxed{204 \\pmod{1000}}", "\\boxed{100m+n}", "\\boxed{\\frac{204}{5}}",
    "\\boxed{200+4}", "\\boxed{x^2=204}", "\\boxed{n=204,205}", "\\boxed{\\sqrt{204}}", "\\boxed{-204}",
    "\\boxed{204i}",
    "\\boxed{204_8}", "\\boxed{2.04}", "\\boxed{20,4}", "\\boxed{204204}", "\\boxed{\\{204\\}, 5}", "\\boxed{204!}",
    "\\boxed{3x+204=0}", "\\boxed{204} \\boxed{205}", "\\boxed{204", "\\boxed{204m}", "\\boxed{\\binom{204}{1}}",
]  # fmt: skip


def test_competition_answers():
    assert [text for text in RIGHT if verify(P, text).status != "right"] == []
    assert [text for text in WRONG if verify(P, text).status != "wrong"] == []
    assert verify(Problem("q", "0"), "\\boxed{x-y=0}").status == "wrong"
    assert verify(Problem("q", "4"), "\\boxed{004}").status == "right"


@pytest.mark.parametrize("n, m", [("204", "7"), ("33", "18"), ("999", "5")])
def test_the_galleries(n, m):
    problem = Problem("q", n)
    assert [text for text in number_gallery.right(n, m) if verify(problem, text).status != "right"] == []
    wrong = [text for texts in number_gallery.wrong(n, m).values() for text in texts]
    assert len(wrong) > 1000 and [text for text in wrong if verify(problem, text).status != "wrong"] == []


@given(st.text(), st.integers(-999, 999))
def test_no_text_raises(text, n):
    problem = Problem("q", str(n))
    for said in (text, f"\\boxed{{{text}}}", f"The answer is {text}", f"<think>x</think><answer>{text}</answer>"):
        assert (verify(problem, said).status == "right") == (final(problem, said) == str(n))
    assert verify(problem, f"{text}</think>\\boxed{{{n}}}").status == ("wrong" if "<answer>" in text else "right")


@pytest.mark.parametrize("piece", ["9", "\\boxed{1}", "= 1 ", "x + 1 = ", "{", "-"])
def test_a_text_of_1_mb_takes_less_than_50_ms(piece):
    text = piece * (1_000_000 // len(piece))
    assert quickest(verify, P, text) < 0.05
