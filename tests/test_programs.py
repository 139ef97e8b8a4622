"""programs.py: what the verifiers of generated programs share; the extraction is tested in test_humaneval.py."""

import pytest

from minir1.tasks import programs


@pytest.mark.parametrize("status, verdict", [("passed", "right"), ("failed", "wrong"), ("unjudged", "unjudged")])
def test_the_reason_of_the_sandbox_is_that_of_the_verdict(monkeypatch, status, verdict):
    result = programs.sandbox.Result(status, "the sandbox says why")
    monkeypatch.setattr(programs.sandbox, "run_tests", lambda program, tests, **rest: result)
    judged = programs.judged("x = 1", "", names=["x"])
    assert (judged.status, judged.reason) == (verdict, "the sandbox says why")
    assert judged.scores == {"accuracy": float(status == "passed")}


def test_no_program_is_wrong():
    judged = programs.judged(None, "", names=["x"])
    assert (judged.status, judged.reason) == ("wrong", "no program")
