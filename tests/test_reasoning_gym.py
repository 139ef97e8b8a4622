"""reasoning_gym.py: datasets of the package, their splits, and verifiers that call wrong answers right."""

import builtins
import json

import pytest

from minir1 import workers
from minir1.tasks import Problem, load
from minir1.tasks import reasoning_gym as task

PACKAGE = pytest.importorskip("reasoning_gym")
SLOW = ("futoshiki", "intermediate_integration", "knight_swap", "puzzle24", "sokoban", "sudoku", "zebra_puzzles")
UNSOLVED = ("boxnet", "rush_hour")  # without a published solution


@pytest.fixture
def few(monkeypatch):
    """Three seeds a dataset."""
    monkeypatch.setattr(task, "SIZE", 3), monkeypatch.setattr(task, "CHUNK", 3)
    task.all_problems.cache_clear()
    yield task.all_problems
    task.all_problems.cache_clear()


def said(answer, thinking="hm"):
    return f"<think>{thinking}</think><answer>{answer}</answer>"


def status(problem, answer):
    return task.verify(problem, said(answer)).status


def test_every_dataset_of_the_package_is_a_variant():
    from reasoning_gym.factory import DATASETS

    assert set(task.VARIANTS) == DATASETS.keys() - {"composite"} and task.VARIANTS[0] == "knights_knaves"
    assert len(task.VARIANTS) == 105  # with 0.1.25
    assert load("reasoning_gym:zebra_puzzles").name == "reasoning_gym:zebra_puzzles"
    with pytest.raises(ValueError, match="task reasoning_gym has no variant 'chess'; it has knights_knaves, ab, acre"):
        load("reasoning_gym:chess")
    with pytest.raises(ValueError, match="task reasoning_gym takes no data, but got 'x'"):
        load("reasoning_gym", "x")
    assert set(task.FORMS) | set(task.SAME_TEXT) | set(task.SOLUTIONS) <= set(task.VARIANTS)
    with pytest.raises(AttributeError, match="has no attribute OTHER"):
        task.OTHER


def test_without_the_package(monkeypatch):
    def without(name, *rest, real=builtins.__import__):
        if name.split(".")[0] == "reasoning_gym":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert load("countdown").name == "countdown"  # other tasks do not need it
    with pytest.raises(ValueError, match=r"needs the extra `tasks`: pip install 'minir1\[tasks\]'"):
        load("reasoning_gym:knights_knaves")


@pytest.mark.parametrize("name", [name for name in task.VARIANTS if name not in SLOW])
def test_references_are_right_and_other_texts_wrong(few, name):
    for problem in few(name)[:1]:
        assert problem.level == name and problem.subject and isinstance(problem.reference, str)
        assert bool(problem.reference) == (name not in UNSOLVED)
        if problem.reference:
            verdict = task.verify(problem, said(problem.reference))
            assert verdict.status == "right" and verdict.scores == {"accuracy": 1.0, "score": 1.0}
        for text in ("", "I do not know", "zzz", "[[[", "nan", "__import__('os')", f"{problem.reference} or zzz"):
            assert status(problem, text) == "wrong", text
        for text in ("", problem.reference, f"<think>{said(problem.reference)}", f"<answer>{problem.reference}"):
            assert task.verify(problem, text).status == "wrong", text


def test_splits_are_disjoint_and_stable():
    assert task.DATA is None
    bound = load("reasoning_gym:tower_of_hanoi")  # of 90 possible questions
    parts = {split: {p.prompt for p in bound.problems(split)} for split in bound.splits}
    assert len(set.union(*parts.values())) == sum(map(len, parts.values())) > 60
    assert all(len(part) > 4 for part in parts.values()) and bound.splits == ("train", "validation", "test")
    many = {split: len(load("reasoning_gym:chain_sum").problems(split)) for split in task.SPLITS}
    assert sum(many.values()) > 990 and 150 < many["test"] < 250 and 60 < many["validation"] < 140
    with pytest.raises(ValueError, match="unknown split 'dev'; allowed: train, validation, test"):
        task.problems("dev")


def test_the_order_of_sets_does_not_change_problems():
    """Such problems differ from process to process where Python's hash is seeded at random."""
    first = workers.Worker()
    second = workers.Worker()
    source = [task.__name__, task.generate.__code__.co_filename, "generate"]
    try:
        for name in ("isomorphic_strings", "ransom_note", "polynomial_multiplication"):
            replies = [worker.ask([60, source, [name, 5, 3]], 60) for worker in (first, second)]
            assert replies[0]["result"] == replies[1]["result"]
    finally:
        first.end(), second.end()


# ---------------------------------------------------------------- verifiers of the package that are not trusted


def of(name, entry, reference):
    """A problem from a hand-written entry."""
    import base64
    import pickle

    extra = {"dataset": name, "entry": base64.b64encode(pickle.dumps(entry)).decode()}
    return Problem("q", reference, extra=extra)


def test_expressions_of_four_numbers():
    problem = of("puzzle24", {"answer": "", "metadata": {"numbers": [10, 2, 6, 2]}}, "10*2+6-2")
    assert (
        status(problem, "10*2+6-2") == status(problem, "6-2+2*10") == status(problem, "10 × 2 + 6 - 2 = 24") == "right"
    )
    for text in ("3*(10-6+4)", "24", "10*2+6-2+0", "10*2+6/2", "12*2", "10*2+4"):
        assert status(problem, text) == "wrong"
    problem = of("countdown", {"answer": "", "metadata": {"numbers": [7, 3, 2], "target": 8}}, "7+3-2")
    assert [status(problem, text) for text in ("3+7-2", "7+3-2-0", "8")] == ["right", "wrong", "wrong"]


def test_chances():
    problem = of("coin_flip", {"answer": "3.051757812e-05", "metadata": {}}, "3.051757812e-05")
    for text, expected in {
        "1/32768": "right",
        "3.05e-05": "right",
        "0.00003052": "right",
        "0": "wrong",
        "0.00003": "wrong",
        "-1/32768": "wrong",
        "1/0": "wrong",
        "half": "wrong",
        "1e999": "wrong",
        "0.0": "wrong",
    }.items():
        assert status(problem, text) == expected, text


FOOLED = {  # dataset -> what is added to its reference so that the package alone calls it right
    "game_of_life_halting": ("x{}", "not {}"),
    "letter_jumble": ("{} more words", "{} {}"),
    "spell_backward": ("{} more", "{}{}"),
    "word_sorting": ("{}, more", "{}, {}"),
    "fraction_simplification": ("{} or 1/2", "{}, 1/2"),
    "gsm_symbolic": ("{} or 3", "{}, 3", "{} 4"),
    "simple_integration": ("{} or 1", "{} or x"),
    "polynomial_multiplication": ("{} or 1", "{} if 1 else 0"),
    "time_intervals": ("{} or 3 days", "{}, 12:00"),
    "knights_knaves": ("not {}", "{} or not"),
    "advanced_geometry": ("{}, 3, 4",),
}


@pytest.mark.parametrize("name", FOOLED)
def test_more_than_one_answer_is_wrong(few, name):
    for problem in few(name):
        for text in FOOLED[name]:
            assert status(problem, text.replace("{}", problem.reference)) == "wrong", text


def test_nan_is_no_complex_number(few):
    assert {status(p, text) for p in few("complex_arithmetic") for text in ("nan", "nan+nanj", "inf")} == {"wrong"}


EVALUATED = [
    "binary_matrix",
    "n_queens",
    "spiral_matrix",
    "string_insertion",
    "simple_integration",
    "polynomial_multiplication",
    "countdown",
]
HARMFUL = [
    "open('{}','w')",
    "__import__('pathlib').Path('{}').touch()",
    "[open('{}','w')]",
    "().__class__",
    "exec('x=1')",
    "x.diff()",
    "[c for c in ().__class__.__base__.__subclasses__()]",
    "(lambda: 0)()",
    "1 .real",
    "x1.real",
    "Integral(x, x)",
    "eval('1')",
    "globals()",
    "[].append(1)",
    "f'{{open}}'",
    "getattr(x, 'y')",
    "S('x')",
]


@pytest.mark.parametrize("name", EVALUATED)
def test_no_answer_runs_code(few, name, tmp_path):
    problem = few(name)[0]
    for text in HARMFUL:
        answer = text.replace("{}", str(tmp_path / "made"))
        assert status(problem, answer) == "wrong" and (name == "countdown" or not task._allowed(name, answer, "1")), (
            text
        )
    assert list(tmp_path.iterdir()) == []


def test_errors_and_time_outs_are_unjudged(monkeypatch):
    broken = of("chain_sum", {"answer": "3", "metadata": {}}, "3")
    assert status(broken, "3") == "right"
    maze = of("maze", {"metadata": {}}, "3")
    assert status(maze, "4") == "unjudged" and "KeyError: 'answer'" in task.verify(maze, said("4")).reason
    monkeypatch.setattr(task, "SECONDS", 1)
    powers = of("simple_integration", {"answer": "x", "metadata": {"variable": "x", "integrand": "1"}}, "x")
    assert status(powers, "x + 0*9**9**9**9") in ("unjudged", "wrong")  # ends in any case
    assert status(broken, "3" * 30_000) == "wrong"


def test_the_score_gives_credit_for_a_part(few):
    problem = few("knights_knaves")[0]
    first, second = problem.reference.rstrip(".").split(", and ")
    terms = {p.split(" is ")[1] for p in (first, second)}
    assert task.verify(problem, f"The answer is: {problem.reference}").status == "right"
    if len(terms) == 2:
        other = f"{first}, and {second.split(' is ')[0]} is {first.split(' is ')[1]}."
        verdict = task.verify(problem, said(other))
        assert verdict.status == "wrong" and 0 < verdict.scores["score"] < 1
    assert task.final(problem, said(" a  b\n")) == "ab" and task.final(problem, "") is None
    assert json.dumps(dict(problem.extra))
