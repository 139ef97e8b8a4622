"""evaluate.py: numbers worked by hand, enumeration, the coverage of the intervals, and the sampling of answers."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from minir1 import evaluate
from minir1.evaluate import (
    NO_THINK,
    Answer,
    bootstrap,
    final_answer,
    habits,
    judge_rollout,
    maj_at_k,
    majority,
    paired_bootstrap,
    pass_at_k,
    sample_answers,
    seed_interval,
    summary,
)
from minir1.model.config import dense
from minir1.model.transformer import Transformer
from minir1.rollout import BUDGET, EOS, Rollout
from minir1.tasks import Problem, Verdict, countdown
from minir1.tokenizer import word_level


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 1) == pytest.approx(0.25)
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)  # 1 - C(3,2)/C(4,2) = 1 - 3/6
    assert pass_at_k(5, 2, 3) == pytest.approx(0.9)  # 1 - C(3,3)/C(5,3) = 1 - 1/10
    assert pass_at_k(5, 3, 3) == 1.0  # only two are wrong
    assert pass_at_k(5, 0, 5) == 0.0


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]), abs=1e-12)


def test_pass_at_k_over_problems_and_large_numbers():
    assert pass_at_k([4, 5, 5], [1, 2, 0], 2) == pytest.approx([0.5, 0.7, 0.0])
    assert pass_at_k(16, np.array([0, 4, 16]), 1) == pytest.approx([0, 0.25, 1])
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5), ([8, 4], [1, 1], 5)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


def test_majority():
    assert majority(["7", "7", "8"], [True, True, False]) == 1.0
    assert majority(["7", "8", "8"], [True, False, False]) == 0.0
    assert majority(["7", "8"], [True, False]) == 0.5
    assert majority(["7", "8", "9"], [False, True, False]) == pytest.approx(1 / 3)
    assert majority(["7", "7.0", "8", "8"], [True, True, False, False]) == 0.0  # compares texts
    assert majority([None, None, "7"], [False, False, True]) == 1.0  # no answer has no vote
    assert majority([None, None], [False, False]) == 0.0
    assert majority([], []) == 0.0
    assert majority(["7", "7", "8"], [True, False, False]) == 0.5  # one of the two 7s is malformed
    with pytest.raises(ValueError, match="2 answers but 1"):
        majority(["7", "8"], [True])


def test_maj_at_k_takes_disjoint_groups():
    answers = ["7", "7", "8", "8", "8", None, "7"]
    right = [answer == "7" for answer in answers]
    assert maj_at_k(answers, right, 3) == 0.5  # 7 7 8 right, 8 8 None wrong, the last left out
    assert maj_at_k(answers, right, 1) == pytest.approx(3 / 7)
    assert maj_at_k(answers, right, 7) == 0.5  # three against three
    with pytest.raises(ValueError, match="8"):
        maj_at_k(answers, right, 8)
    with pytest.raises(ValueError, match="verdicts"):
        maj_at_k(answers, right[:-1], 1)


def test_bootstrap_matches_the_normal_interval():
    values = np.random.default_rng(1).normal(0.3, 1.0, size=400)
    mean, low, high = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.015)
    assert bootstrap(values) == (mean, low, high) != bootstrap(values, seed=1)
    narrow = bootstrap(values, level=0.5)
    assert low < narrow[1] < narrow[2] < high


def test_bootstrap_covers():
    draw = np.random.default_rng(0)
    trials = [bootstrap(draw.random(60) < 0.3, resamples=200) for _ in range(200)]
    assert 0.89 <= np.mean([low <= 0.3 <= high for _, low, high in trials]) <= 0.99


def test_bootstrap_edges():
    assert bootstrap([0.5]) == (0.5, 0.5, 0.5)
    for bad in ([], [[0.1, 0.2]], [0.1, np.nan]):
        with pytest.raises(ValueError):
            bootstrap(bad)
    with pytest.raises(ValueError, match="level is 95"):
        bootstrap([0.1, 0.2], level=95)


def test_paired_bootstrap_cancels_the_hardness_of_problems():
    draw = np.random.default_rng(2)
    hardness = draw.random(200)
    a, b = hardness + 0.05, hardness + draw.normal(0, 0.05, 200)
    mean, low, high = paired_bootstrap(a, b)
    assert mean == pytest.approx((a - b).mean()) and 0 < low < 0.05 < high
    assert bootstrap(a)[1] < bootstrap(b)[2]  # the separate intervals overlap
    assert paired_bootstrap(a, a) == (0, 0, 0)
    with pytest.raises(ValueError, match="same problems"):
        paired_bootstrap(a, b[:-1])


def test_seed_interval_by_hand():
    # s = 0.1, n = 3: 4.303 · 0.1 / √3 = 0.24843
    assert seed_interval([0.4, 0.5, 0.6]) == pytest.approx((0.5, 0.5 - 0.24843, 0.5 + 0.24843), abs=1e-4)
    # s² = 10/4 for 1..5: 2.776 · √2.5 / √5 = 1.96293
    assert seed_interval([1, 2, 3, 4, 5]) == pytest.approx((3, 3 - 1.96293, 3 + 1.96293), abs=1e-4)
    mean, low, high = seed_interval(list(range(40)))
    assert low < mean == 19.5 < high
    with pytest.raises(ValueError, match="at least 3 seeds"):
        seed_interval([0.1, 0.2])


@pytest.mark.parametrize("n", [3, 10])
def test_seed_interval_covers(n):
    draws = np.random.default_rng(n).normal(size=(2000, n))
    covered = np.mean([low <= 0 <= high for _, low, high in map(seed_interval, draws)])
    assert covered == pytest.approx(0.95, abs=0.015)  # 3 deviations of √(0.95 · 0.05 / 2000)


# ---- sampling answers and counting what they do


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
    collect = evaluate.collect

    def spy(model, given, **settings):
        prompts.extend(given)
        return collect(model, given, **settings)

    monkeypatch.setattr(evaluate, "collect", spy)
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
