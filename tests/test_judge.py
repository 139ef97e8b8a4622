"""judge.py: answers sampled, judged and summed up, by hand."""

import threading
import time
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from runs import command

from minir1 import judge, templates
from minir1.judge import (
    NO_THINK,
    Answer,
    baselines,
    behaviour,
    by_group,
    judge_rollout,
    readability,
    rights,
    sample_answers,
)
from minir1.judge import summary as summed
from minir1.metrics import bootstrap, paired_bootstrap
from minir1.model.config import dense
from minir1.model.transformer import Transformer
from minir1.rollout import BUDGET, EOS, STOP, Rollout
from minir1.tasks import Problem, Task, Verdict, load
from minir1.tokenizer import Tokenizer, word_level

TOKENIZER = word_level(("User:", "\nAssistant:", "make ", " from ", " yes\n", " no\n"), 20)
PROBLEMS = [Problem(f"make {target} from 3,4", "3+4") for target in (7, 12, 1, 9, 5)]
COUNTDOWN = load("countdown")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"vocab": TOKENIZER.size, "dim": 32, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 32, "init_std": 0.2}
    return Transformer(dense(**shape)).eval()


def task(calls=None, **more) -> Task:
    """Right if the text holds a 7; unjudged if it holds a 9."""

    def verify(problem, text):
        if calls is not None:
            calls.append((problem, text))
        return Verdict("unjudged" if "9" in text else "right" if "7" in text else "wrong", {})

    return Task("toy", ("train",), lambda split: PROBLEMS, verify, COUNTDOWN.final, **more)


def summary(problems, grid, of=None, **more):
    return summed(of or task(), problems, grid, **more)


# ---- sampling ----------------------------------------------------------------------------------


def test_sample_answers_judges_every_answer(model):
    calls = []
    grid = sample_answers(model, TOKENIZER, task(calls), PROBLEMS, answers=3, max_tokens=8, seed=1)
    assert [len(row) for row in grid] == [3] * 5
    asked = [(p, a.text) for p, row in zip(PROBLEMS, grid) for a in row]
    assert sorted(calls, key=str) == sorted(asked, key=str)  # by several threads
    for a in (a for row in grid for a in row):
        assert 1 <= a.tokens <= 8 and a.entropy > 0 and (a.tokens == 8 or not a.truncated)
        assert a.right == ("7" in a.text and "9" not in a.text) and a.unjudged == ("9" in a.text) and not a.format
        assert "<|endoftext|>" not in a.text
    assert len({a.text for a in grid[0]}) == 3


def test_sample_answers_does_not_depend_on_rows_at_once(model):
    settings = {"answers": 3, "max_tokens": 8, "seed": 1}
    whole = sample_answers(model, TOKENIZER, task(), PROBLEMS, **settings)
    for rows in (1, 3, 7):
        part = sample_answers(model, TOKENIZER, task(), PROBLEMS, rows_at_once=rows, label="shown", **settings)
        for a, b in ((a, b) for x, y in zip(whole, part) for a, b in zip(x, y)):
            assert (a.text, a.tokens, a.truncated, a.right) == (b.text, b.tokens, b.truncated, b.right)
            assert a.entropy == pytest.approx(b.entropy, abs=1e-5)


def test_sample_batches_go_from_long_prompts_to_short_and_can_leave_some_out(model):
    problems = [Problem(f"make 7 from {','.join(['3'] * n)}", "3+4") for n in (2, 5, 3, 4)]
    settings = {"answers": 2, "max_tokens": 8, "seed": 1, "rows_at_once": 4}
    parts = list(judge.sample_batches(model, TOKENIZER, task(), problems, **settings))
    assert [indices for indices, _ in parts] == [[1, 3], [2, 0]]
    whole = {p: row for indices, rows in parts for p, row in zip(indices, rows)}
    rest = list(judge.sample_batches(model, TOKENIZER, task(), problems, skip=[1, 2], **settings))
    assert [indices for indices, _ in rest] == [[3, 0]]
    for p, row in zip(*rest[0]):
        assert [a.text for a in row] == [a.text for a in whole[p]]


def test_few_shot_answers_end_where_the_model_asks_the_next_question(model, monkeypatch):
    shots = [[replace(PROBLEMS[1], solution="3+4")]] * 2
    asked = []
    monkeypatch.setattr(judge.templates, "encode", lambda t, p, *rest: asked.append(rest) or [[1, 2]] * len(p))
    monkeypatch.setattr(judge.Tokenizer, "decode", lambda self, row: "7\nQuestion: make 9")
    settings = {"answers": 1, "max_tokens": 3, "template": "plain", "shots": shots}
    grid = sample_answers(model, TOKENIZER, task(), PROBLEMS[:2], **settings)
    assert [a.text for (a,) in grid] == ["7", "7"] and asked[0] == ("plain", "", shots)
    assert {(a.tokens, a.truncated) for (a,) in grid} == {(3, False)}  # the answer itself had ended


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that the sampler gets."""
    sampled, collect = [], judge.collect

    def spy(model, prompts, **settings):
        sampled.extend(prompts)
        return collect(model, prompts, **settings)

    monkeypatch.setattr(judge, "collect", spy)
    return sampled


def test_a_forced_beginning_is_in_the_prompt_and_in_the_text(model, prompts):
    grid = sample_answers(model, TOKENIZER, task(), PROBLEMS, answers=2, max_tokens=6, forced=NO_THINK)
    want = [TOKENIZER.encode(f"User:{p.prompt}\nAssistant:<think></think><answer>") for p in PROBLEMS]
    assert prompts == want and want[0][-3:] == [TOKENIZER.id(tag) for tag in ("<think>", "</think>", "<answer>")]
    assert all(a.text.startswith(NO_THINK) for row in grid for a in row)
    assert all(a.tokens <= 6 for row in grid for a in row)  # what was forced was not sampled


def test_the_template_asks_the_question(model, prompts):
    sample_answers(model, TOKENIZER, task(), PROBLEMS[:1], answers=2, max_tokens=2, template="plain")
    assert prompts == [TOKENIZER.encode("make 7 from 3,4")]
    with pytest.raises(ValueError, match="unknown template 'r1'; allowed: chat, r1_zero, plain"):
        sample_answers(model, TOKENIZER, task(), PROBLEMS[:1], answers=2, max_tokens=2, template="r1")


def test_a_template_that_opens_the_thinking_opens_it_once(model, prompts):
    opens = Tokenizer(TOKENIZER.backend, "User:{{ messages[0].content }}\nAssistant:<think>{{ '\n' }}")
    grid = sample_answers(model, opens, task(), PROBLEMS[:1], answers=2, max_tokens=4)
    assert all(a.text.startswith("<think>") and a.text.count("<think>") == 1 for a in grid[0])
    forced = sample_answers(model, opens, task(), PROBLEMS[:1], answers=2, max_tokens=4, forced=NO_THINK)
    asked = "User:make 7 from 3,4\nAssistant:<think>\n"
    assert prompts == [opens.encode(asked), opens.encode(asked + "</think><answer>")]
    assert all(a.text.startswith(NO_THINK) and a.text.count("<think>") == 1 for a in forced[0])
    assert templates.begun(asked, "<think>\nNo.") == "<think>\nNo." and templates.begun("User:") == ""


def test_greedy_answers_are_all_the_same(model):
    grid = sample_answers(model, TOKENIZER, task(), PROBLEMS, answers=3, max_tokens=6, temperature=0)
    assert all(len({a.text for a in row}) == 1 for row in grid)


def test_nothing_to_sample_or_to_sum_up(model):
    assert sample_answers(model, TOKENIZER, task(), [], answers=2, max_tokens=4) == []
    with pytest.raises(ValueError, match="answers = 0"):
        sample_answers(model, TOKENIZER, task(), PROBLEMS, answers=0, max_tokens=4)
    with pytest.raises(ValueError, match="no problems"):
        summary([], [])


# ---- judging -----------------------------------------------------------------------------------


def rollout(*answers: str, stop: list[int]) -> Rollout:
    """One row per answer to the first problem, all tokens of entropy ½; prompts of one token."""
    rows = [[TOKENIZER.id("make "), *TOKENIZER.encode(answer)] for answer in answers]
    length = torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([row + [0] * (int(length.max()) - len(row)) for row in rows])
    columns = torch.arange(tokens.shape[1])
    mask = (columns >= 1) & (columns < length.unsqueeze(1))
    one = torch.ones(len(rows), dtype=torch.int64)
    grids = {"logp": torch.zeros(mask.shape), "entropy": 0.5 * mask}
    return Rollout(tokens, one, length, mask, **grids, stop=torch.tensor(stop), group=0 * one, temperature=1.0)


def test_judge_rollout_by_hand():
    """Two answers to one problem: `7` and the end, and `4+3` truncated by the budget."""
    drawn = rollout("7<|endoftext|>", "4+3", stop=[EOS, BUDGET])
    drawn.entropy[0, 1:3] = torch.tensor([1.0, 0.5])
    ((first, second),) = judge_rollout(drawn, TOKENIZER, task(), PROBLEMS[:1])
    assert first == Answer("7", tokens=2, truncated=False, right=True, format=False, entropy=0.75)
    assert (second.text, second.tokens, second.truncated, second.right) == ("4+3", 3, True, False)
    assert second.entropy == pytest.approx(0.5)


def test_an_answer_keeps_the_scores_of_its_verdict():
    scores = {"accuracy": 1.0, "language": 0.25}
    of = replace(task(), verify=lambda problem, text: Verdict("right", scores))
    ((answer,),) = judge_rollout(rollout("7<|endoftext|>", stop=[EOS]), TOKENIZER, of, PROBLEMS[:1])
    assert answer.scores == scores and answer != replace(answer, scores={"accuracy": 1.0})
    assert hash(answer) == hash(replace(answer, scores={}))
    assert Answer("7", 1, False, True, True).scores == {}


def test_any_of_several_stop_tokens_ends_an_answer_and_is_no_part_of_its_text():
    """As of a tokenizer whose generation_config.json names two end tokens."""
    drawn = rollout("7<|endoftext|>", "7+4 no\n", stop=[EOS, STOP])
    ((first, second),) = judge_rollout(drawn, TOKENIZER, task(), PROBLEMS[:1])
    assert (first.text, second.text) == ("7", "7+4") and second.tokens == 4 and not second.truncated


def test_a_verifier_that_raises_loses_one_answer():
    def verify(problem, text):
        if text == "4":
            raise KeyError("four")
        return Verdict("right" if text == "7" else "wrong", {})

    asked = [(PROBLEMS[0], text) for text in "747"]
    verdicts = judge.judge(replace(task(), verify=verify), asked)
    assert [v.status for v in verdicts] == ["right", "unjudged", "right"]
    assert verdicts[1].reason == f"KeyError('four') at {__file__}:{verify.__code__.co_firstlineno + 2}"
    ((answer,),) = judge_rollout(rollout("4", stop=[BUDGET]), TOKENIZER, replace(task(), verify=verify), PROBLEMS[:1])
    assert answer.unjudged and not answer.right and answer.reason == verdicts[1].reason


def test_an_error_of_a_verifier_names_its_line_in_the_task(tmp_path):
    """Also where a library raises, in a mixture, and in a worker process; an error of no line of the task has none."""
    code = """
import json
from minir1 import workers
from minir1.tasks import Problem, Verdict

def problems(split, data):
    return [Problem("a", "7")]

def verify(problem, text):
    if text == "worker":
        return workers.call(inside, text, seconds=20)
    return None if text == "none" else inside(text)

def inside(text):
    return json.loads(text)
"""
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    path = tmp_path / "one.py"
    for spec in (path, f"{path}+{tmp_path / 'two.py'}"):
        loaded = load(spec)
        problem = loaded.problems("train")[0]
        library, worker, none = judge.judge(loaded, [(problem, text) for text in ("{", "worker", "none")])
        assert library.reason.startswith("JSONDecodeError(") and library.reason.endswith(f" at {path}:15")
        assert worker.reason.endswith(f" at {path}:15') at {path}:11") and "inside: JSONDecodeError" in worker.reason
        assert none.reason.endswith("which is no Verdict\")") and {library.status, worker.status} == {"unjudged"}


def test_an_unjudged_answer_is_neither_right_nor_wrong():
    right, wrong = Answer("7", 1, False, True, True), Answer("4", 1, False, False, True)
    assert [a.judged_right for a in (right, wrong, replace(wrong, unjudged=True))] == [True, False, None]


def test_several_verdicts_are_waited_for_at_once():
    running, most = set(), []

    def verify(problem, text):
        running.add(threading.get_ident())
        most.append(len(running))
        time.sleep(0.02)
        running.discard(threading.get_ident())
        return Verdict("wrong", {})

    judge.judge(replace(task(), verify=verify), [(PROBLEMS[0], "")] * 8)
    assert max(most) == min(8, judge.os.cpu_count())


def test_judging_runs_beside_the_caller():
    gate = threading.Event()
    judging = judge.beside(gate.wait, 20)
    assert not judging.done()
    gate.set()
    assert judging.result() is True
    with pytest.raises(KeyError):
        judge.beside({}.__getitem__, 1).result()


def test_an_interrupted_script_does_not_wait_for_the_verdicts(tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    began = time.monotonic()
    done = command(script)
    assert done.returncode == 130 and done.stderr == "interrupted\n" and time.monotonic() - began < 30


INTERRUPTED = """
import dataclasses, os, signal, threading, time
from minir1 import cli, judge
from minir1.tasks import Problem, Task

@dataclasses.dataclass
class Config:
    pass

def main(config):
    task = Task("slow", (), None, lambda problem, text: time.sleep(60), None)
    judging = judge.beside(judge.judge, task, [(Problem("", ""), "")] * 9)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    judging.result()

cli.run(main, Config)
"""


def test_format_is_that_of_the_whole_text_and_empty_thinking_counts_only_if_forced():
    texts = ["<think> yes\n</think><answer>7</answer>", "<think></think><answer>7</answer>"]
    texts.append("</think><answer>7</answer>")
    drawn = rollout(*(text + "<|endoftext|>" for text in texts), stop=[EOS] * 3)
    ((a, b, c),) = judge_rollout(drawn, TOKENIZER, task(), PROBLEMS[:1])
    assert (a.format, b.format, c.format) == (True, False, False) and [a.text, b.text, c.text] == texts
    rest = rollout("7</answer><|endoftext|>", stop=[EOS])
    (((forced,)),) = judge_rollout(rest, TOKENIZER, task(), PROBLEMS[:1], forced=NO_THINK)
    assert forced.format and forced.right and forced.text == texts[1]


# ---- summing up --------------------------------------------------------------------------------


def said(answer: str, thinking: str = "hm", **changes) -> Answer:
    """A well-formed answer of five tokens."""
    values = {"tokens": 5, "truncated": False, "right": False, "format": True, "entropy": 0.5} | changes
    return Answer(f"<think>{thinking}</think><answer>{answer}</answer>", **values)


def test_summary_by_hand():
    """Four answers each to three problems: half of them right, none given, all right."""
    cut = Answer("<think>hm", tokens=9, truncated=True, right=False, format=False, entropy=2.0)
    grid = [
        [said("3+4", right=True), said(" 3 + 4", right=True, format=False), replace(said("4*3"), unjudged=True), cut],
        [cut, cut, cut, cut],
        [said("4-3", right=True, entropy=0.0) for _ in range(4)],
    ]
    values = summary(PROBLEMS[:3], grid)
    mean, low, high = bootstrap([2 / 3, 0.0, 1.0])  # of the first problem three answers were judged
    _, low4, high4 = bootstrap([0.0, 1.0])  # and four only of the others
    want = {
        "pass@1": mean,
        "pass@1_low": low,
        "pass@1_high": high,
        **{f"{name}@4": 0.5 for name in ("pass", "maj")},
        **{f"{name}@4_low": low4 for name in ("pass", "maj")},
        **{f"{name}@4_high": high4 for name in ("pass", "maj")},
        "format": 6 / 12,
        "pass@1_formed": 1.0,
        "length": (7 * 5 + 5 * 9) / 12,
        "truncated": 5 / 12,
        "unjudged": 1 / 12,
        "entropy": (3 * 0.5 + 5 * 2.0) / 12,
    }
    assert values == pytest.approx(want) and mean == pytest.approx(5 / 9) and low < mean < high
    assert rights(grid).tolist() == pytest.approx([2 / 3, 0.0, 1.0])
    assert summary(PROBLEMS[:3], grid, ks=(1, 2))["maj@2"] == pytest.approx(2 / 3)  # white space is no other answer
    one = summary(PROBLEMS[:3], [row[:1] for row in grid])
    assert not any(name.startswith(("maj", "pass@")) for name in one if "pass@1" not in name)
    assert one["pass@1"] == pytest.approx(2 / 3)
    assert summary(PROBLEMS[:1], [[cut]])["pass@1_formed"] == 0.0  # none was formed


def test_majority_may_be_wrong_where_one_answer_is_right():
    grid = [[said("3+4", right=True), said("4*3"), said("4*3")]]
    values = summary(PROBLEMS[:1], grid)
    assert values["pass@1"] == pytest.approx(1 / 3) and values["pass@3"] == 1 and values["maj@3"] == 0


def test_answers_that_were_not_judged_are_no_wrong_answers():
    unjudged = replace(said("7"), unjudged=True, reason="timed out")
    grid = [[said("7", right=True), unjudged], [unjudged, unjudged]]
    values = summary(PROBLEMS[:2], grid)
    assert values["pass@1"] == 1.0 and values["unjudged"] == 0.75 and "pass@2" not in values
    assert rights(grid)[0] == 1.0 and rights(grid)[1] != rights(grid)[1]  # NaN
    with pytest.raises(RuntimeError, match="none of 2 answers could be judged: timed out"):
        summary(PROBLEMS[:1], grid[1:])


def test_no_interval_is_a_certainty():
    """Three problems, all solved or none: the exact interval, 0.025^(1/3) = 0.292."""
    right, wrong = [[said("7", right=True)]] * 3, [[said("8")]] * 3
    values = [summary(PROBLEMS[:3], grid) for grid in (right, wrong)]
    ends = [tuple(v[f"pass@1{end}"] for end in ("", "_low", "_high")) for v in values]
    assert ends == [(1.0, pytest.approx(0.2924, abs=1e-4), 1.0), (0.0, 0.0, pytest.approx(0.7076, abs=1e-4))]


def test_several_k_and_none_above_the_number_of_answers():
    grid = [[said("7", right=i < c) for i in range(4)] for c in (0, 1, 4)]
    values = summary(PROBLEMS[:3], grid, ks=(1, 2, 4))
    assert values["pass@1"] == pytest.approx(5 / 12) and values["pass@2"] == pytest.approx((0 + 1 / 2 + 1) / 3)
    assert values["pass@4"] == pytest.approx(2 / 3)
    assert values["pass@2_low"] <= values["pass@2"] <= values["pass@2_high"]
    with pytest.raises(ValueError, match="k = 5: needs as many answers per problem, but there are 4"):
        summary(PROBLEMS[:3], grid, ks=(2, 5))


def test_accuracy_does_not_depend_on_the_number_of_samples():
    """The first two of four answers, or all: the expectation is the same, and so is a constant policy's value."""
    grid = [[said("7", right=True)] * 4, [said("8")] * 4]
    assert summary(PROBLEMS[:2], grid)["pass@1"] == summary(PROBLEMS[:2], [row[:2] for row in grid])["pass@1"] == 0.5


def test_equivalent_answers_are_one_vote():
    """1/2, 0.5 and 2/4 outvote two times 7, which as texts would win."""
    grid = [[said("7"), said("1/2", right=True), said("0.5", right=True), said("7"), said("2/4", right=True)]]
    equal = replace(task(), same=lambda problem, a, b: Fraction(a) == Fraction(b))
    assert summary(PROBLEMS[:1], grid)["maj@5"] == 0.0 and summary(PROBLEMS[:1], grid, equal)["maj@5"] == 1.0


def test_the_task_says_which_answers_are_the_same():
    """7 and 7.0 are one vote where the task reads numbers, and two where it does not."""
    grid = [[said("7", right=True), said("7.0", right=True), said("8"), said("8"), said("7.00", right=True)]]
    numbers = replace(task(), final=lambda problem, text: str(float(text.split("<answer>")[1].partition("<")[0])))
    assert summary(PROBLEMS[:1], grid, numbers)["maj@5"] == 1.0 and summary(PROBLEMS[:1], grid)["maj@5"] == 0.0


# ---- what a task offers ------------------------------------------------------------------------


def test_behaviour_by_hand():
    """A search with one repeat, a false yes with a wrong sum, and three without a try."""
    problems = [Problem("make 24 from 11,3,3", "(11-3)*3")]
    search = "3*3=9,11+9=20:24 no\n3*3=9,9+11=20:24 no\n11-3=8,8*3=24:24 yes\n"
    others = [said("3+4", ""), said("1", "what now"), said("1", "24 yes")]
    grid = [[said("(11-3)*3", search, right=True), said("1", "11-3=8,8*3=25:24 yes\n"), *others]]
    values = behaviour(COUNTDOWN, problems, grid)
    want = {"tries": 4 / 5, "said_yes": 2 / 5, "false_yes": 1 / 5, "arithmetic_errors": 1 / 8, "repeats": 1 / 4}
    assert {name: values[name] for name in want} == pytest.approx(want) and values["steps"] == pytest.approx(8 / 5)
    whole = summary(problems, grid, COUNTDOWN)
    assert {name: whole[name] for name in values} == pytest.approx(values)
    nothing = behaviour(COUNTDOWN, PROBLEMS[:1], [[said("1", "")]])
    assert set(nothing.values()) == {0}
    assert behaviour(task(), problems, grid) == {}


def test_behaviour_averages_over_the_answers_that_have_a_count_and_divides_rates():
    """As in a mixture of tasks: `words` of both problems, `doubts` of one; `doubts` per word."""

    def counts(problem, text):
        return {"words": len(text), **({"checks": 3.0, "doubts": 1.0} if problem is PROBLEMS[0] else {})}

    grid = [[Answer("ab", 1, False, True, True)] * 2, [Answer("abcd", 1, False, True, True)] * 2]
    values = behaviour(task(behaviour=counts, rates={"doubts": "words"}), PROBLEMS[:2], grid)
    assert values == {"words": 3.0, "checks": 3.0, "doubts": 2 / 12}


def test_readability_by_hand():
    """An English question with a tidy answer and one in two languages, a Chinese one, and one in no known language."""
    languages = ("en", "zh", "tlh")
    problems = [Problem(f"q{i}", "8", language=language) for i, language in enumerate(languages)]
    loop = "wait no 等等\n" * 5  # 4 tokens each: 5 16-grams, 4 of them distinct
    grid = [[said("8", "it works\nso 8"), said("8", loop)], [said("8", "故8")] * 2, [said("8", "ghItlh 对")] * 2]
    values = readability(problems, grid)
    assert values == pytest.approx({
        "language_consistency": (1 + 2 / 4 + 1 + 1) / 4,
        "repetition": 1 / 5 / 6,
        "tidiness": 3 / 6,
        "reflections": 10 / 6,
        "words": (4 + 20 + 2 * 2 + 2 * 2) / 6,
    })  # fmt: skip
    grouped = readability(problems, grid, {"first": [0], "rest": [1, 2], "last": [2]})
    assert {key: grouped[key] for key in values} == values
    for name, part in (("first", [0]), ("rest", [1, 2]), ("last", [2])):
        alone = readability([problems[p] for p in part], [grid[p] for p in part])
        assert {key: grouped[f"{key}_{name}"] for key in alone} == alone
    assert "language_consistency" not in alone and alone["words"] == 2.0
    assert len(grouped) == 5 + 5 + 5 + 4
    assert readability([], []) == {}


def test_baselines_by_hand():
    """`guess` depends on the length of a text; `luck` exists for the first problem alone."""

    def chances(problem, text):
        return {"guess": len(text) / 10} | ({"luck": 0.5} if problem is PROBLEMS[0] else {})

    grid = [[Answer("ab", 1, False, True, True), Answer("abcd", 1, False, False, True)], 2 * [Answer("a", 1, 0, 1, 1)]]
    values = baselines(task(baselines=chances), PROBLEMS[:2], grid)
    assert [values[key] for key in ("guess", "guess_low", "guess_high")] == pytest.approx(bootstrap([0.3, 0.1]))
    above = [values[f"over_guess{end}"] for end in ("", "_low", "_high")]
    assert above == pytest.approx(paired_bootstrap([0.5, 1.0], [0.3, 0.1])) and above[0] == pytest.approx(0.55)
    assert values["luck"] == values["luck_low"] == 0.5 and values["over_luck"] == 0.0  # the first problem alone
    assert baselines(task(), PROBLEMS[:2], grid) == {}


def test_a_search_gets_as_many_tries_as_the_answer_shows():
    problem = COUNTDOWN.problems("test")[0]
    two = said("1", "11-3=8:24 no\n11-3=8:24 no\n")
    values = baselines(COUNTDOWN, [problem], [[two, said("1", "")]])
    want = [COUNTDOWN.baselines(problem, a.text)["search"] for a in (two, said("1", ""))]
    assert values["search"] == pytest.approx(sum(want) / 2) and want[0] > want[1] > 0
    assert {"search_without_repeats", "over_search", "over_search_without_repeats_high"} <= values.keys()


def test_by_group_sums_up_each_group():
    """Two groups; a problem without one is in none."""
    groups = dict(zip(PROBLEMS, ("easy", "hard", "", "easy")))
    right, wrong = (Answer("a", n, False, n == 3, True) for n in (3, 5))
    grid = [[right, wrong], [wrong, wrong], [right, right], [right, right]]
    values = by_group(task(difficulty=groups.get), PROBLEMS[:4], grid)
    assert values["pass@1_easy"] == 0.75 and values["pass@1_hard"] == 0.0 and values["length_hard"] == 5.0
    assert values["pass@1_low_easy"] <= 0.75 <= values["pass@1_high_easy"]
    assert not any(key.endswith("_") for key in values)
    assert by_group(task(), PROBLEMS[:4], grid) == {}


def test_groups_by_difficulty_or_level_by_subject_and_in_a_mixture_by_task():
    problems = [
        Problem("1", "", level="2", subject="Algebra", task="a"),
        Problem("2", "", level="5", task="a"),
        Problem("3", "", subject="Algebra", task="b"),
    ]
    want = {"level 2": [0], "level 5": [1], "Algebra": [0, 2], "a": [0, 1], "b": [2]}
    assert judge.groups_of(task(), problems) == want
    some = task(difficulty=lambda problem: "hard" if problem.task == "b" else "")  # as in a mixture
    assert judge.groups_of(some, problems) == {"hard": [2]} | want
    assert judge.groups_of(task(), problems[:1]) == {}
    with pytest.raises(ValueError, match="task toy: a group 'low' of problems; its figures would have others' names"):
        judge.groups_of(task(difficulty=lambda problem: "low" if problem.task == "b" else "high"), problems)
    with pytest.raises(ValueError, match="task toy: a group 'consistency' of problems"):
        judge.groups_of(task(difficulty=lambda problem: "consistency" if problem.task == "b" else ""), problems)


def test_an_unjudged_answer_gets_the_mean_of_the_judged_ones_of_its_group():
    right, unjudged = Answer("", 1, False, True, True), Answer("", 1, False, False, False, unjudged=True)
    wrong = Answer("", 1, False, False, True)
    groups = [[right, wrong, unjudged], [unjudged] * 3]
    rewards = judge.unjudged_to_mean(torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]]), groups)
    assert rewards.tolist() == [[1.0, 0.5, 0.75], [0.75, 0.75, 0.75]]  # none was judged: the mean of the batch


@pytest.mark.parametrize("reward", [1.1, 0.1, 1 / 3])
def test_unjudged_answers_leave_equal_rewards_equal(reward):
    """To the bit, whatever the sizes: otherwise a group of equal rewards would hold a signal."""
    judged, unjudged = Answer("", 1, False, True, True), Answer("", 1, False, False, False, unjudged=True)
    for G in range(2, 65):
        for k in {1, G // 3, G // 2, G - 1} - {0}:
            groups = [[judged] * (G - k) + [unjudged] * k, [unjudged] * G]
            rewards = torch.tensor([[0.0 if a.unjudged else reward for a in group] for group in groups])
            assert torch.equal(judge.unjudged_to_mean(rewards, groups), torch.full((2, G), reward))
