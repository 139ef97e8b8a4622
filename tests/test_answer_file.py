"""answer_file.py: what is written is read, torn lines are dropped, other settings and problems refused."""

import json
from dataclasses import replace

import pytest

from minir1 import answer_file
from minir1.judge import Answer
from minir1.tasks import Problem

PROBLEMS = [Problem(f"q{i}\u2028\n", str(i), "zh", "2", subject="Algebra") for i in range(3)]
SETTINGS = {"task": "toy", "temperature": 0.5, "weights": {"model.safetensors": "9f"}}
GRID = [[Answer(f"a{i}\n\u2028é", 3, False, i == 1, True, 0.25, i == 2, "late" * (i == 2), {"accuracy": i / 2})]
        for i in range(3)]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "new" / "answers.jsonl"
    assert answer_file.begin(file, SETTINGS, PROBLEMS, resume=False) == {}
    answer_file.append(file, "sampled", [2, 0], [PROBLEMS[2], PROBLEMS[0]], [GRID[2], GRID[0]])
    return file


def test_answers_are_read_as_written(path):
    answer_file.append(path, "greedy", [1], PROBLEMS[1:2], GRID[1:2])
    settings, answers, asked, about = answer_file.read(path)
    assert settings == SETTINGS and answers == {"sampled": {2: GRID[2], 0: GRID[0]}, "greedy": {1: GRID[1]}}
    assert asked == {i: (PROBLEMS[i].prompt, str(i)) for i in (2, 0, 1)}
    assert about == dict.fromkeys((2, 0, 1), ("Algebra", "zh"))
    line = json.loads(path.read_bytes().split(b"\n")[1])
    assert (line["kind"], line["level"], line["subject"]) == ("sampled", "2", "Algebra")


def test_an_older_file_without_languages_is_read(path):
    path.write_text(path.read_text(encoding="utf-8").replace(', "language": "zh"', ""), encoding="utf-8")
    assert answer_file.read(path).about == dict.fromkeys((2, 0), ("Algebra", ""))


def test_an_older_file_without_scores_is_read(path):
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    for answer in (answer for line in lines[1:] for answer in line["answers"]):
        del answer["scores"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = answer_file.read(path).answers["sampled"]
    assert answers == {p: [replace(answer, scores={}) for answer in GRID[p]] for p in (2, 0)}


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_torn_last_line_is_dropped_and_the_file_goes_on(path, cut):
    path.write_bytes(path.read_bytes()[:-cut])
    kept = answer_file.begin(path, SETTINGS, PROBLEMS, resume=True)
    assert kept == {"sampled": {2: GRID[2]}}
    answer_file.append(path, "sampled", [0], PROBLEMS[:1], GRID[:1])
    assert answer_file.read(path).answers == {"sampled": {2: GRID[2], 0: GRID[0]}}


def test_other_settings_and_problems_are_refused(path):
    with pytest.raises(ValueError, match="answers.jsonl exists: continue it with --resume, or choose another --out"):
        answer_file.begin(path, SETTINGS, PROBLEMS, resume=False)
    with pytest.raises(ValueError, match=r"sampled with other settings \(temperature: 0.5 and 1.0\): choose another"):
        answer_file.begin(path, SETTINGS | {"temperature": 1.0}, PROBLEMS, resume=True)
    other = [PROBLEMS[0], PROBLEMS[1], Problem("q9", "2")]
    with pytest.raises(ValueError, match="other problems: number 2 was 'q2.*' and is 'q9'"):
        answer_file.begin(path, SETTINGS, other, resume=True)
    with pytest.raises(ValueError, match=r"number 2 was .* and is '\(none\)'"):
        answer_file.same_problems(answer_file.read(path), PROBLEMS[:2])
    assert answer_file.begin(path, SETTINGS, PROBLEMS, resume=True).keys() == {"sampled"}


@pytest.mark.parametrize(
    "text", ["", "{}\n", "[]\n", '{"settings": 3}\n', '{"settings": {}}\n{"kind": "x"}\n', "\xff\n"]
)
def test_a_file_of_something_else(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match="a.jsonl, line [12]: no answers of an evaluation, but b"):
        answer_file.read(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="there is no file"):
        answer_file.read(tmp_path / "b.jsonl")


def test_what_differs_is_named():
    assert answer_file.differing({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}) == ["b: 2 and 3"]
    assert answer_file.differing({"weights": {"x": "1"}}, {"weights": {"x": "2"}}) == ["weights"]
