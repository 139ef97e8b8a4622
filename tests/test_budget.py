"""experiments/budget.py: where thinking ends, what is forced, what counts as a token, a run at toy size."""

import json
from dataclasses import replace

import pytest

from experiments import budget
from experiments.budget import Sample
from minir1 import checkpoint, tasks
from minir1.judge import Answer
from minir1.model import hf


@pytest.fixture(scope="module")
def toy(toy_base):
    """A small policy and its tokenizer."""
    return hf.load(checkpoint.latest(toy_base() / "checkpoint"))


CONFIG = budget.Config(max_completion_length=20, answer_length=6, rows_at_once=3, wait=" no\n")


def samples_of(tokenizer, *answers: str) -> list[Sample]:
    prompt = tokenizer.encode("User:make 24 from 11,3,3\nAssistant:")
    rows = [tokenizer.encode(answer) for answer in answers]
    return [Sample(i, prompt, row, budget.thought(tokenizer, row), False) for i, row in enumerate(rows)]


def test_where_the_thinking_ends(toy):
    tokenizer = toy[1]
    text = "<think>11+3=14,14+3=17:24 no\n"
    whole = tokenizer.encode(text + "</think><answer>1</answer>")
    assert budget.thought(tokenizer, whole) == len(tokenizer.encode(text))
    assert budget.thought(tokenizer, tokenizer.encode(text)) is None
    assert budget.thought(tokenizer, tokenizer.encode("<think></think>")) == 1
    assert budget.thought(tokenizer, []) is None


def test_a_limit_closes_longer_thinking_and_leaves_the_rest(toy):
    policy, tokenizer = toy
    short, long = "<think>1+1=2:3 no\n</think><answer>1+1</answer>", "<think>1+1=2:3 no\n1+2=3:3 yes\n"
    samples = samples_of(tokenizer, short, long, long + "</think><answer>1+2</answer>")
    limit = samples[0].thinking
    kept, *cut = budget.closed_at(policy, tokenizer, samples, "", limit, CONFIG)
    assert kept == samples[0].answer
    for answer in cut:
        assert tokenizer.decode(answer).startswith("<think>1+1=2:3 no\n</think>")
        assert len(answer) <= limit + 1 + CONFIG.answer_length
    nothing = budget.closed_at(policy, tokenizer, samples, "", 0, CONFIG)
    assert all(tokenizer.decode(answer).startswith("<think></think>") for answer in nothing)
    opened = budget.closed_at(policy, tokenizer, samples, "<think>", 0, CONFIG)  # by the template
    assert all(tokenizer.decode(answer).startswith("</think>") for answer in opened)


def test_an_answer_that_ended_without_thinking_stays(toy):
    policy, tokenizer = toy
    ended = samples_of(tokenizer, "<answer>1+1</answer>")[0]._replace(ended=True)
    open_ = samples_of(tokenizer, "<think>1+1=2:3 no\n")[0]._replace(ended=True)
    stays, closed, by_template = (
        budget.closed_at(policy, tokenizer, [sample], opened, 2, CONFIG)[0]
        for sample, opened in ((ended, ""), (open_, ""), (ended, "<think>"))
    )
    assert stays == ended.answer
    assert "</think>" in tokenizer.decode(closed) and "</think>" in tokenizer.decode(by_template)


def test_thinking_continues_with_wait_in_place_of_its_end_within_the_budget(toy):
    policy, tokenizer = toy
    closed, open_ = "<think>1+1=2:3 no\n</think><answer>1+1</answer>", "<think>1+1=2:3 no\n"
    samples = samples_of(tokenizer, closed, open_)
    longer, same = budget.waited(policy, tokenizer, samples, 1, CONFIG)
    assert same == samples[1]
    assert tokenizer.decode(longer.answer).startswith("<think>1+1=2:3 no\n no\n")
    assert len(longer.answer) <= CONFIG.max_completion_length
    assert longer.thinking == budget.thought(tokenizer, longer.answer)


def test_rows_of_any_batch_continue_alike(toy):
    policy, tokenizer = toy
    samples = samples_of(tokenizer, "<think>", "<think>1", "<think>1+1=2", "")
    rows = [sample.prompt + sample.answer for sample in samples]
    one = budget.continued(policy, tokenizer, rows, 8, CONFIG, 5, "")
    assert one == budget.continued(policy, tokenizer, rows, 8, replace(CONFIG, rows_at_once=1), 5, "")


def test_a_run_at_toy_size_is_measured_once(toy_base, tmp_path, monkeypatch):
    config = budget.Config(
        checkpoints=(toy_base() / "checkpoint", toy_base("dense") / "checkpoint"), problems=3, num_generations=4,
        max_completion_length=16, limits=(0, 8), answer_length=4, waits=1, wait=" no\n", out=tmp_path, device="cpu",
    )  # fmt: skip
    results = budget.main(config)
    assert [*results] == [str(path) for path in config.checkpoints]
    for ways in results.values():
        assert [*ways["limit"]] == ["0", "8", "none"] and [*ways["wait"]] == ["0", "1"]
        assert [*ways["majority"]] == [*ways["any"]] == ["1", "2", "4"]
        tokens = [point["tokens"] for point in ways["limit"].values()]
        assert tokens[0] <= 3 + config.answer_length and tokens[1] <= 9 + config.answer_length
        assert ways["any"]["4"]["tokens"] == pytest.approx(4 * ways["wait"]["0"]["tokens"])
        assert ways["wait"]["0"] == ways["limit"]["none"]
        for way in ("majority", "any"):  # of one answer
            assert ways[way]["1"] == pytest.approx(ways["wait"]["0"])
        for points in ways.values():
            assert all(p["low"] <= p["right"] <= p["high"] for p in points.values())
    assert (tmp_path / "figures" / "budget.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "result.json").read_text()) == results
    monkeypatch.setattr(budget, "curves", lambda *_: pytest.fail("measured again"))
    assert budget.main(config) == results
    with pytest.raises(BaseException, match="measured again"):
        budget.main(replace(config, limits=(4,)))


def test_points_by_difficulty_are_parts_of_the_whole(toy):
    task = tasks.load("countdown")
    problems = tasks.spread(task.problems("test"), 6)
    grid = [[Answer("", 3, False, p % 2 == 0, True)] for p in range(6)]
    point = budget.point(task, problems, grid, 3.0)
    assert point["right"] == 0.5 and point["tokens"] == 3.0
    groups = budget.groups_of(task, problems)
    levels = groups.keys() & {"easy", "middle", "hard"}
    mean = sum(point[f"right_{name}"] * len(groups[name]) for name in levels)
    assert mean / 6 == pytest.approx(0.5)


FLAKY = """
import itertools
from minir1.tasks import Problem, Verdict
def problems(split, data=None):
    return [Problem(f"make {n} from {n},1", "x", level=("easy", "hard")[n % 2]) for n in range(4)]
CALLS = {n: itertools.count() for n in range(4)}
def verify(problem, text):
    if FAILS:
        raise OSError("no sandbox")
    return Verdict("right" if len(text) % 2 else "wrong", {})
"""


@pytest.mark.parametrize("fails, left_out", [
    ("problem.level == 'hard'", {"right_level hard"}),
    ("next(CALLS[int(problem.prompt[5])]) % 2", {"majority", "any"}),  # one of the two answers to each problem
])  # fmt: skip
def test_what_could_not_be_judged_is_left_out(toy_base, tmp_path, fails, left_out):
    (tmp_path / "flaky.py").write_text(FLAKY.replace("FAILS", fails))
    config = budget.Config(
        checkpoints=(toy_base() / "checkpoint",), task=str(tmp_path / "flaky.py"), num_generations=2, waits=0,
        max_completion_length=16, limits=(4,), answer_length=4, out=tmp_path / "out", device="cpu",
    )  # fmt: skip
    (ways,) = budget.main(config).values()
    assert {way for way, points in ways.items() if not points} == left_out & ways.keys()
    groups = {"right_level easy", "right_level hard"}
    for point in (point for points in ways.values() for point in points.values()):
        assert groups - point.keys() == left_out & groups
    assert budget.main(config) == {str(config.checkpoints[0]): ways}  # drawn from the file


def test_where_nothing_could_be_judged_the_reason_is_named(toy_base, tmp_path):
    (tmp_path / "flaky.py").write_text(FLAKY.replace("FAILS", "True"))
    small = {"problems": 2, "num_generations": 2, "max_completion_length": 4, "device": "cpu", "out": tmp_path}
    config = budget.Config(checkpoints=(toy_base() / "checkpoint",), task=str(tmp_path / "flaky.py"), **small)
    with pytest.raises(RuntimeError, match="none of 4 answers could be judged: OSError.'no sandbox'. at .*flaky.py"):
        budget.main(config)


def test_words_that_the_tokenizer_does_not_know_are_named_first(toy_base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(budget, "collect", lambda *_, **__: pytest.fail("sampled"))
    shared = {"problems": 1, "out": tmp_path, "device": "cpu", "wait": " hmm no Hmm\n"}
    for waits, warned in ((2, True), (0, False)):
        with pytest.raises(pytest.fail.Exception):
            budget.main(budget.Config(checkpoints=(toy_base("moe"),), waits=waits, **shared))
        assert ("has no tokens for hmm" in capsys.readouterr().out) == warned


SENSELESS = ({"limits": ()}, {"checkpoints": ()}, {"limits": (-1,)}, {"temperature": 0.0}, {"wait": ""})


@pytest.mark.parametrize("changes", SENSELESS)
def test_senseless_settings_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        budget.Config(**changes)
