"""judge.py: answers sampled, judged and summed up, by hand."""

from dataclasses import replace

import pytest
import torch

from minir1 import judge
from minir1.judge import NO_THINK, Answer, final_answer, habits, judge_rollout, sample_answers, summary
from minir1.metrics import bootstrap
from minir1.model.config import dense
from minir1.model.transformer import Transformer
from minir1.rollout import BUDGET, EOS, Rollout
from minir1.tasks import Problem, Verdict, countdown
from minir1.tokenizer import word_level

TOKENIZER = word_level(("User:", "\nAssistant:", "make ", " from ", " yes\n", " no\n"), 20)
PROBLEMS = [Problem(f"make {target} from 3,4", "3+4") for target in (7, 12, 1, 9, 5)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"vocab": TOKENIZER.size, "dim": 32, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 32, "init_std": 0.2}
    return Transformer(dense(**shape)).eval()


def stub(calls):
    """Right if the text holds a 7, well-formed if it has more than nine characters; unjudged if it holds a 9."""

    def verify(problem, text, allow_empty_think=False):
        calls.append((problem, text, allow_empty_think))
        status = "unjudged" if "9" in text else "right" if "7" in text else "wrong"
        return Verdict(status, {"form": float(len(text) > 9)})

    return verify


def test_sample_answers_judges_every_answer(model):
    calls = []
    grid = sample_answers(model, TOKENIZER, PROBLEMS, stub(calls), answers=3, max_tokens=8, seed=1)
    assert [len(row) for row in grid] == [3] * 5
    assert [problem for problem, _, _ in calls] == [p for p in PROBLEMS for _ in range(3)]
    assert [a.text for row in grid for a in row] == [text for _, text, _ in calls]
    assert not any(allowed for _, _, allowed in calls)
    for a in (a for row in grid for a in row):
        assert 1 <= a.tokens <= 8 and a.entropy > 0 and (a.tokens == 8 or not a.truncated)
        assert a.right == ("7" in a.text and "9" not in a.text) and a.form == (len(a.text) > 9)
        assert "<|endoftext|>" not in a.text
    assert len({a.text for a in grid[0]}) == 3


def test_sample_answers_does_not_depend_on_how_many_rows_go_at_once(model):
    settings = {"answers": 3, "max_tokens": 8, "seed": 1}
    whole = sample_answers(model, TOKENIZER, PROBLEMS, stub([]), **settings)
    for rows in (1, 3, 7):
        part = sample_answers(model, TOKENIZER, PROBLEMS, stub([]), rows=rows, **settings)
        for a, b in ((a, b) for x, y in zip(whole, part) for a, b in zip(x, y)):
            assert (a.text, a.tokens, a.truncated, a.right) == (b.text, b.tokens, b.truncated, b.right)
            assert a.entropy == pytest.approx(b.entropy, abs=1e-5)


def test_a_forced_beginning_is_in_the_prompt_and_in_the_text(model, monkeypatch):
    prompts, calls = [], []
    collect = judge.collect

    def spy(model, given, **settings):
        prompts.extend(given)
        return collect(model, given, **settings)

    monkeypatch.setattr(judge, "collect", spy)
    grid = sample_answers(model, TOKENIZER, PROBLEMS, stub(calls), answers=2, max_tokens=6, forced=NO_THINK)
    want = [TOKENIZER.encode(f"User:{p.prompt}\nAssistant:<think></think><answer>") for p in PROBLEMS]
    assert prompts == want and want[0][-3:] == [TOKENIZER.id(tag) for tag in ("<think>", "</think>", "<answer>")]
    assert all(text.startswith(NO_THINK) and allowed for _, text, allowed in calls)
    assert all(a.tokens <= 6 for row in grid for a in row)  # what was forced was not sampled


def test_greedy_answers_are_all_the_same(model):
    grid = sample_answers(model, TOKENIZER, PROBLEMS, stub([]), answers=3, max_tokens=6, temperature=0)
    assert all(len({a.text for a in row}) == 1 for row in grid)


def test_nothing_to_sample_raises(model):
    with pytest.raises(ValueError, match="problems"):
        sample_answers(model, TOKENIZER, [], stub([]), answers=2, max_tokens=4)
    with pytest.raises(ValueError, match="answers = 0"):
        sample_answers(model, TOKENIZER, PROBLEMS, stub([]), answers=0, max_tokens=4)
    with pytest.raises(ValueError, match="no problems"):
        summary([], [])


def test_judge_rollout_by_hand():
    """Two answers to one problem: `7` and the end, and `4+3` cut by the budget."""
    question, seven, end = TOKENIZER.id("make "), TOKENIZER.id("7"), TOKENIZER.eos
    four, plus, three = (TOKENIZER.id(c) for c in "4+3")
    rollout = Rollout(
        tokens=torch.tensor([[question, seven, end, 0], [question, four, plus, three]]),
        prompt_len=torch.tensor([1, 1]),
        length=torch.tensor([3, 4]),
        mask=torch.tensor([[False, True, True, False], [False, True, True, True]]),
        logp=torch.zeros(2, 4),
        entropy=torch.tensor([[0, 1.0, 0.5, 0], [0, 0.3, 0.6, 0.9]]),
        stop=torch.tensor([EOS, BUDGET]),
        group=torch.tensor([0, 0]),
        temperature=1.0,
    )
    ((first, second),) = judge_rollout(rollout, TOKENIZER, PROBLEMS[:1], stub([]))
    assert first == Answer("7", tokens=2, truncated=False, right=True, form=False, entropy=0.75)
    assert (second.text, second.tokens, second.truncated, second.right) == ("4+3", 3, True, False)
    assert second.entropy == pytest.approx(0.6)


def said(answer: str, thinking: str = "hm", **changes) -> Answer:
    """A well-formed answer of five tokens."""
    values = {"tokens": 5, "truncated": False, "right": False, "form": True, "entropy": 0.5} | changes
    return Answer(f"<think>{thinking}</think><answer>{answer}</answer>", **values)


def test_summary_by_hand():
    """Four answers each to three problems: half of them right, none given, all right."""
    cut = Answer("<think>hm", tokens=9, truncated=True, right=False, form=False, entropy=2.0)
    grid = [
        [said("3+4", right=True), said(" 3 + 4", right=True, form=False), replace(said("4*3"), unjudged=True), cut],
        [cut, cut, cut, cut],
        [said("4-3", right=True, entropy=0.0) for _ in range(4)],
    ]
    found = summary(PROBLEMS[:3], grid)
    mean, low, high = bootstrap([0.5, 0.0, 1.0])
    want = {
        "pass@1": mean,  # (1/2 + 0 + 1) / 3
        "pass@1_low": low,
        "pass@1_high": high,
        "pass@4": 2 / 3,
        "maj@4": 2 / 3,  # white space is no other answer
        "form": 6 / 12,
        "pass@1_formed": 5 / 6,
        "length": (7 * 5 + 5 * 9) / 12,
        "truncated": 5 / 12,
        "unjudged": 1 / 12,
        "entropy": (3 * 0.5 + 5 * 2.0) / 12,
    }
    assert found == pytest.approx(want) and mean == pytest.approx(0.5) and low < mean < high
    one = summary(PROBLEMS[:3], [row[:1] for row in grid])
    assert not any(name.startswith(("maj", "pass@")) for name in one if "pass@1" not in name)
    assert one["pass@1"] == pytest.approx(2 / 3)
    assert summary(PROBLEMS[:1], [[cut]])["pass@1_formed"] == 0.0  # none was formed


def test_majority_may_be_wrong_where_one_answer_is_right():
    grid = [[said("3+4", right=True), said("4*3"), said("4*3")]]
    found = summary(PROBLEMS[:1], grid)
    assert found["pass@1"] == pytest.approx(1 / 3) and found["pass@3"] == 1 and found["maj@3"] == 0


def test_habits_by_hand():
    """A search with one repeat, a false yes with a wrong sum, and three without a try."""
    problems = [Problem("make 24 from 11,3,3", "(11-3)*3")]
    search = "3*3=9,11+9=20:24 no\n3*3=9,9+11=20:24 no\n11-3=8,8*3=24:24 yes\n"
    others = [said("3+4", ""), said("1", "what now"), said("1", "24 yes")]
    answers = [[said("(11-3)*3", search, right=True), said("1", "11-3=8,8*3=25:24 yes\n"), *others]]
    found = habits(problems, answers, countdown.behaviour)
    want = {"tries": 4 / 5, "said_yes": 2 / 5, "false_yes": 1 / 5, "arithmetic_error": 1 / 8, "repeats": 1 / 4}
    assert found == pytest.approx(want)
    whole = summary(problems, answers, countdown.behaviour)
    assert {name: whole[name] for name in want} == pytest.approx(want)
    nothing = habits(PROBLEMS[:1], [[said("1", "")]], countdown.behaviour)
    assert set(nothing.values()) == {0}


def test_final_answer_has_no_white_space():
    assert final_answer("<think>a</think><answer> 3 +\n4 </answer>") == "3+4"
    assert final_answer("<think>a</think>3+4") is None
