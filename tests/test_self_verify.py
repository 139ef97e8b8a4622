"""experiments/self_verify.py: its measures by hand, tries in tokens, and a run at toy size."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import result_of
from toys import BASE

from experiments import pretrain, self_verify
from experiments.self_verify import Trace
from minir1 import checkpoint, tasks
from minir1.judge import Answer
from minir1.log import read_metrics
from minir1.model import hf
from minir1.model.heads import SelfCheckHead
from minir1.tasks import Problem


def trace(right: bool, length: int = 4, text: str = "<think>a</think><answer>1</answer>", tries=()) -> Trace:
    """An answer of `length` tokens whose states say nothing."""
    return Trace(torch.zeros(length, 8), torch.zeros(length), Answer(text, length, False, right, right), list(tries))


def test_tries_in_tokens(toy_base):
    """A try is from its first token to the last before its verdict, also where the template opened <think>."""
    _, tokenizer = hf.load(checkpoint.latest(toy_base() / "checkpoint"))
    task, problem = tasks.load("countdown"), Problem("make 24 from 11,3,3", "")
    text = "<think>11+3=14,14+3=17:24 no\n11-3=8,8*3=24:24 yes\n</think><answer>(11-3)*3</answer>"
    for begun in ("", "<think>"):
        tokens = tokenizer.encode(text.removeprefix(begun))
        ends = self_verify.token_ends(tokenizer, tokens, len(begun))
        assert ends[-1] == len(text) and ends == sorted(ends)
        found = self_verify.tries_of(task, problem, text, ends)
        shown = [tokenizer.decode(tokens[first : last + 1]) for first, last, _ in found]
        assert shown == ["11+3=14,14+3=17:24", "11-3=8,8*3=24:24"] and [good for *_, good in found] == [False, True]
        assert all(tokenizer.decode(tokens[last + 1 : last + 2]).startswith(" ") for _, last, _ in found)


def test_the_loss_weighs_answers_alike_whatever_their_length():
    head = SelfCheckHead(8)
    torch.nn.init.zeros_(head.out.weight)
    with torch.no_grad():
        head.out.bias.copy_(torch.tensor([0.0, 2.0]))  # σ = ½ and 0.881
    of_answer, of_tries = self_verify.loss_of(head, [trace(True, 3, tries=[(0, 1, True)]), trace(False, 9)])
    assert of_answer.item() == pytest.approx(0.25)
    assert of_tries.item() == pytest.approx((1 / (1 + np.exp(-2)) - 1) ** 2)
    assert self_verify.loss_of(head, [trace(True)])[1] == 0  # no tries


def test_a_head_that_diverges_is_named():
    """Weight decay alone multiplies the weights by 1 - 10⁷ in a step."""
    config = self_verify.Config(steps=20, batch=2, learning_rate=1e9)
    data = [trace(True)._replace(states=torch.ones(4, 8)), trace(False)]
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match=r"^step \d+: the gradient of [a-z.]+.* is not finite$"):
        self_verify.train(SelfCheckHead(8), data, config, SimpleNamespace(log=lambda *_: None))


def test_restarts_by_hand():
    """Two answers, a wrong one that is doubted at its third token, a right one that always is: in both orders, where
    the last is kept whatever it says."""
    grid = [[trace(False, 10), trace(True, 10)]]
    doubted = [np.array([0.9, 0.9, 0.1] + [0.9] * 7), np.full(10, 0.01)]
    assert self_verify.restart([doubted], grid, 0.5) == (0.5, (3 + 10 + 2 + 10) / 2)  # none before the second token
    assert self_verify.restart([doubted], grid, 0.05) == (0.0, (10 + 2 + 10) / 2)  # the first is never below
    assert self_verify.restart([doubted[:1]], [grid[0][:1]], 0.5) == (0.0, 10)  # no second one


def test_the_best_of_n_by_hand():
    task, problems = tasks.load("countdown"), [Problem("make 3 from 1,2", "1+2")] * 2
    said = lambda answer: f"<think>a</think><answer>{answer}</answer>"
    grid = [[trace(False, text=said("1")), trace(False, text=said("1")), trace(True, text=said("1+2")),
             trace(False, text=said("2"))]] * 2  # fmt: skip
    e = [[np.array([x]) for x in row] for row in ((0.1, 0.2, 0.9, 0.3), (0.8, 0.2, 0.1, 0.3))]
    values = self_verify.best_of(task, problems, e, grid, 4)
    assert values["head@4"] == 0.5 and values["maj@4"] == 0.0 and values["pass@4"] == 1.0
    assert values["random"] == 0.25 and values["head@2"] == 0.25 and values["pass@2"] == 0.5 and values["tokens@2"] == 8
    assert values["head@1"] == values["maj@1"] == values["pass@1"] == 0.25


def test_a_head_that_knows_is_measured_as_such():
    grid = [[trace(True, 5, tries=[(0, 3, True)]), trace(False, 7, tries=[(1, 4, False)])]]
    knows = [np.linspace(0.5, 1, 5), np.linspace(0.5, 0, 7)]
    values = self_verify.by_position(knows, grid)
    assert values["after/1/auc"] == 0.5 and values["after/2/auc"] == values["after/4/within"] == 1.0
    assert values["end/auc"] == values["end/within"] == 1.0 and values["end/squared_error"] == 0
    assert values["end/short"] == 1.0 and values["squared_error_of_the_mean"] == 0.25
    assert not any(key.startswith("after/8/") for key in values)  # no answer is longer


def test_positions_count_the_answers_that_are_longer():
    grid = [[trace(True, 5), trace(False, 2), trace(False, 9)]]
    values = self_verify.by_position([np.full(n, x) for n, x in ((5, 0.9), (2, 0.1), (9, 0.2))], grid)
    assert self_verify.positions(values) == [1, 2, 4]  # after 8 tokens one is left
    assert [values[f"after/{n}/running"] for n in (1, 2, 4, 8)] == pytest.approx([1, 2 / 3, 2 / 3, 1 / 3])
    assert "after/8/auc" not in values  # of one kind


def test_a_head_that_knows_only_the_problem_knows_nothing_within_it():
    grid = [[trace(True, 4), trace(True, 4), trace(False, 4)], [trace(False, 4), trace(True, 4), trace(False, 4)]]
    values = self_verify.by_position([np.full(4, x) for x in (0.7, 0.7, 0.7, 0.3, 0.3, 0.3)], grid)
    assert values["end/auc"] == pytest.approx((4 + 2 * 0.5 + 0.5 * 2) / 9) and values["end/within"] == 0.5


def test_tries_of_a_head_that_knows():
    grid = [[trace(True, 5, tries=[(0, 3, True)]), trace(False, 7, tries=[(1, 4, False)])]]
    knows = [np.linspace(0.5, 1, 5), np.linspace(0.5, 0, 7)]
    assert self_verify.of_tries(knows, grid)["try/4/auc"] == 1.0
    assert self_verify.of_tries(knows[:1], [grid[0][:1]]) == {}


@pytest.mark.parametrize("task", ["countdown", "world"])
def test_a_run_at_toy_size(toy_base, tmp_path, monkeypatch, task):
    """Where half of the verdicts are by chance, so that both kinds are there."""
    base, real = toy_base(), tasks.load(task)
    if task == "world":  # the toy base has no tokens for its words
        base = tmp_path / "base"
        pretrain.main(replace(BASE, task=task, mix={}, steps=60, out=base))
    by_length = lambda problem, text: tasks.Verdict("right" if len(text) % 2 else "wrong", {})
    monkeypatch.setattr(self_verify.tasks, "load", lambda *_, **__: replace(real, verify=by_length))
    config = self_verify.Config(
        checkpoint=base / "checkpoint", task=task, problems=8, answers=2, test_problems=4, num_generations=4,
        max_completion_length=24, steps=8, batch=4, out=tmp_path / "run", device="cpu",
    )  # fmt: skip
    values = self_verify.main(config)
    assert result_of(config.out)["calibration_error"] == pytest.approx(values["calibration_error"])
    assert {"end/auc", "head@4", "maj@2", "calibration_error", "restart/0.5/tokens"} <= values.keys()
    head = SelfCheckHead(hf.load(checkpoint.latest(config.checkpoint))[0].config.dim)
    head.load_state_dict(torch.load(config.out / "head.pt", weights_only=True))
    assert (config.out / "figures" / "self_verify.png").stat().st_size > 10_000
    assert json.loads((config.out / "config.json").read_text())["task"] == task


@pytest.fixture
def small(toy_base, tmp_path):
    return self_verify.Config(
        checkpoint=toy_base() / "checkpoint", task=str(tmp_path / "own.py"), problems=8, answers=2, test_problems=4,
        num_generations=4, max_completion_length=8, steps=4, batch=4, out=tmp_path / "run", device="cpu",
    )  # fmt: skip


OWN = """from minir1.tasks import Verdict, countdown
SPLITS = ("train", "test")
def problems(split, data):
    return countdown.problems(split)[:9]
TESTED = {p.prompt for p in problems("test", None)}
def verify(problem, text):
    test, odd = problem.prompt in TESTED, sum(map(ord, problem.prompt + text)) % 2
    return Verdict(STATUS, {})
"""


def write_task(config, status: str, more: str = "") -> None:
    Path(config.task).write_text(OWN.replace("STATUS", status) + more)


@pytest.mark.parametrize("length", [1, 8])
@pytest.mark.parametrize("right, share", [("test or odd", 1), ("odd and not test", 0)])
def test_test_answers_of_one_kind_are_measured_without_an_auc(small, right, share, length):
    write_task(small, f"'right' if {right} else 'wrong'")
    values = self_verify.main(replace(small, max_completion_length=length))
    assert not {"end/auc", "end/within"} & values.keys() and values["random"] == values["pass@1"] == share
    assert result_of(small.out)["random"] == values["random"] and (small.out / "head.pt").exists()
    assert (small.out / "figures" / "self_verify.png").stat().st_size > 10_000


def test_answers_of_one_token_are_measured_at_their_end_alone(small):
    write_task(small, "'right' if odd else 'wrong'")
    values = self_verify.main(replace(small, max_completion_length=1))
    assert "end/auc" in values and not any(key.startswith("after/") for key in values)
    assert (small.out / "figures" / "self_verify.png").stat().st_size > 10_000


def test_a_test_whose_answers_cannot_be_judged_is_refused_before_the_training(small, monkeypatch):
    monkeypatch.setattr(self_verify, "train", None)
    write_task(small, "'unjudged' if test else 'right' if odd else 'wrong'")
    with pytest.raises(ValueError, match="each test problem has an answer that could not be judged"):
        self_verify.main(small)
    assert not small.out.exists()


def test_the_error_of_tries_is_logged_only_where_there_are_tries(small):
    for name, more in (("without", ""), ("with", "def attempts(problem, text): return [(0, len(text), True)]\n")):
        write_task(small, "'right' if odd else 'wrong'", more)
        self_verify.main(replace(small, out=small.out / name))
        assert all(("train/try" in row) == (name == "with") for row in read_metrics(small.out / name))


def test_splits_and_prompts_that_are_missing_are_named_before_anything_is_sampled(small, monkeypatch):
    monkeypatch.setattr(self_verify, "traces", None)
    for more, message in (
        ("SPLITS = ('train', 'dev')", "^task own has no split 'test'; it has train, dev$"),  # no option chooses another
        ("problems = lambda split, data: []", "^task own: split 'train' has no problems$"),
        ("problems = lambda split, data: [Problem('é', '')]", "the tokenizer has no token for 'é'"),
    ):
        write_task(small, "'wrong'", f"from minir1.tasks import Problem\n{more}\n")
        with pytest.raises(ValueError, match=message):
            self_verify.main(small)
    assert not small.out.exists()


def test_answers_of_one_kind_are_refused(toy_base, tmp_path):
    config = self_verify.Config(
        checkpoint=toy_base() / "checkpoint", problems=2, answers=1, test_problems=1, num_generations=2,
        max_completion_length=1, steps=1, out=tmp_path / "run", device="cpu",
    )  # fmt: skip
    with pytest.raises(ValueError, match="0 of 2 answers are right"):
        self_verify.main(config)
    assert not config.out.exists()
