"""docs/exercises.md: each function and each judge is there, and every test of a judge fails on the empty function."""

import ast
import inspect
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
EXERCISE = re.compile(
    r"^## (?P<number>\d+)\. (?P<title>.+?)\n\nWrite \[(?P<file>\w+\.py): (?P<name>[\w.]+)\]\(\.\./(?P<path>[\w/.]+)\)"
    r".+?\n\n    (?P<equation>.+?)\n\n```\npython -m pytest (?P<test>\S+) -k (?P<select>\"[^\"]+\"|\S+)\n```\n\n"
    r"<details><summary>Hint</summary>\n\n.+?\n</details>",
    re.M | re.S,
)
EXERCISES = [match.groupdict() for match in EXERCISE.finditer(PAGE)]


def arguments(exercise: dict) -> list[str]:
    """What makes pytest run the judge."""
    quiet = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--tb=line"]
    return [str(ROOT / exercise["test"]), "-k", exercise["select"].strip('"'), *quiet]


def empty(*_, **__):
    raise NotImplementedError


class Outcomes:
    """A plugin of pytest: name of each test -> how it ended."""

    def __init__(self):
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            words = "NotImplementedError" if "NotImplementedError" in report.longreprtext else report.longreprtext
            self.found[report.nodeid] = "passed" if report.passed else words


def judge_empty(exercise: dict) -> dict[str, str]:
    """Run the judge while the function is empty, under every name that it was imported by."""
    target = import_module(exercise["path"].removesuffix(".py").replace("/", "."))
    for part in exercise["name"].split("."):
        target = getattr(target, part)
    target, outcomes = inspect.unwrap(target), Outcomes()
    code, target.__code__ = target.__code__, empty.__code__
    try:
        pytest.main(arguments(exercise), plugins=[outcomes])
    finally:
        target.__code__ = code
    return outcomes.found


def test_there_are_ten_and_the_table_lists_them():
    assert [int(exercise["number"]) for exercise in EXERCISES] == list(range(1, 11))
    assert len(re.findall(r"^\| \d+ \|", PAGE, re.M)) == len(re.findall(r"^## ", PAGE, re.M)) == 10


@pytest.mark.parametrize("exercise", EXERCISES, ids=[exercise["name"] for exercise in EXERCISES])
def test_the_function_is_there_and_states_its_equation(exercise):
    path = ROOT / exercise["path"]
    node = ast.parse(path.read_text(encoding="utf-8"))
    for part in exercise["name"].split("."):
        (node,) = (x for x in node.body if isinstance(x, (ast.FunctionDef, ast.ClassDef)) and x.name == part)
    assert path.name == exercise["file"] and ast.get_docstring(node) and (ROOT / exercise["test"]).is_file()


def test_every_test_of_a_judge_fails_on_the_empty_function():
    """In one process of its own, for all ten: what is imported once stays imported."""
    run = subprocess.run([sys.executable, __file__], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert list(found) == [exercise["name"] for exercise in EXERCISES]
    for name, outcomes in found.items():
        assert outcomes and set(outcomes.values()) == {"NotImplementedError"}, (name, outcomes)


if __name__ == "__main__":
    from hypothesis import Phase, settings

    settings.register_profile("exercises", database=None, phases=[Phase.explicit, Phase.generate])
    settings.load_profile("exercises")
    sys.path.insert(0, str(ROOT / "tests"))
    results = {exercise["name"]: judge_empty(exercise) for exercise in EXERCISES}
    print("\n" + json.dumps(results))
