"""chat_task.py: the task of a model in a chat."""

import json
from pathlib import Path

import pytest

from experiments import chat_task
from minir1.tasks import load

EXAMPLE = Path(__file__).parent.parent / "docs" / "example_task.py"


def run_folder(path: Path, **config) -> Path:
    """A run whose checkpoint is runs/x/checkpoint/step-000001."""
    step = path / "checkpoint" / "step-000001"
    step.mkdir(parents=True)
    (step / "config.json").write_text(json.dumps({"architectures": ["X"]}))
    (path / "config.json").write_text(json.dumps(config))
    return step


def test_the_task_of_the_run(tmp_path):
    step = run_folder(tmp_path / "a", task="countdown:wide", data=None)
    assert chat_task.of_run(step) == ("countdown:wide", None)
    assert chat_task.find(step, None, None, False).name == "countdown:wide"
    assert chat_task.find(step, "countdown", None, False).name == "countdown"  # what is named counts
    assert chat_task.of_run(run_folder(tmp_path / "b", data="x")) is None
    assert chat_task.find(tmp_path / "b", None, None, False) is None


def test_the_longest_answer_is_that_of_the_runs_training(tmp_path):
    assert chat_task.budget(run_folder(tmp_path / "a", task="x.py", max_completion_length=384)) == 384
    assert chat_task.budget(run_folder(tmp_path / "b", task="countdown", max_completion_length=None)) == 1024
    assert chat_task.budget(tmp_path / "none") == 1024


def test_to_open_a_model_runs_no_code_beside_it(tmp_path, capsys):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    for spec in (f"{tmp_path}/evil.py", f"countdown+{tmp_path}/evil.py:x"):
        step = run_folder(tmp_path / f"{len(spec)}", task=spec)
        assert chat_task.of_run(step) is None
        assert chat_task.find(step, None, None, False) is None
        assert capsys.readouterr().out.rstrip().endswith(f"for questions and verdicts: --task {spec!r}")


def test_a_task_that_cannot_be_loaded_is_a_line(tmp_path, capsys):
    step = run_folder(tmp_path / "a", task="humaneval", data="x")
    assert chat_task.find(step, None, None, False) is None
    assert "answers are not judged: task humaneval runs programs" in capsys.readouterr().out
    with pytest.raises(ValueError, match="unknown task 'nosuch'"):
        chat_task.find(step, "nosuch", None, False)


def test_examples_suit_the_model(capsys):
    task = load(EXAMPLE)
    shown = chat_task.examples(task, "chat")
    assert len(shown) == 4 and set(shown) <= {problem.prompt for problem in task.problems("test")}
    assert chat_task.examples(None, "chat") != chat_task.examples(None, "plain")
    assert chat_task.examples(load("gsm8k", "absent"), "chat") == []
    assert "no example questions: " in capsys.readouterr().out


def said(answer):
    return f"<think>hm</think><answer>{answer}</answer>"


def test_the_verdict_on_a_question_that_the_task_knows():
    recognised, listed = (chat_task.verifier(load(spec)) for spec in ("countdown", EXAMPLE))
    assert recognised("make 24 from 3,11,3", said("(11-3)*3")) == ("right", "")
    assert recognised("make 24 from 3,11,3", said("11-3")) == ("wrong", "right would be (11-3)*3")
    assert recognised("make 1000 from 1,2,3", said("1")) == ("wrong", "")  # none is known
    assert listed(" What is 12 + 30?\n", said("42")) == ("right", "")
    assert listed("What is 12 + 30?", said("43")) == ("wrong", "right would be 42")
    for verdict in (recognised, listed, chat_task.verifier(None)):
        assert verdict("What is love?", said("42")) is None


def test_a_verifier_that_fails_judges_nothing(tmp_path):
    (tmp_path / "own.py").write_text(
        "from minir1.tasks import Problem\n"
        "def problems(split, data=None): return [Problem('q', 'r')]\n"
        "def verify(problem, text): raise KeyError('oops')\n"
    )
    status, why = chat_task.verifier(load(tmp_path / "own.py"))("q", "")
    assert status == "unjudged" and "oops" in why
