"""fuzz_commands.py: no wrong command line of any script ends in a traceback."""

from experiments.tools import fuzz_commands


def test_wrong_lines_of_every_script_are_refused_in_one_line(capsys):
    counts = fuzz_commands.main(fuzz_commands.Config(cases=60 + len(fuzz_commands.scripts()), seed=0))
    assert sum(counts.values(), fuzz_commands.Counter())["refused"] > 60 and "0 failed" in capsys.readouterr().out


def test_a_traceback_is_a_failure(monkeypatch):
    def wrong(*_):
        raise TypeError("a bug")

    monkeypatch.setattr("minir1.tasks.load", wrong)
    assert fuzz_commands.outcome("evaluate", ["--checkpoint", "x"])[0] == "failed"
