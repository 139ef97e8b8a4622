"""monitor.py: averages, clock, report, preflight and alarms by hand."""

import re
from pathlib import Path

import pytest
import torch

from minir1 import monitor
from minir1.judge import Answer
from minir1.monitor import Averages, Clock, alarms, contradictions, outlook, preflight, report, show
from minir1.rollout import EOS, Rollout
from minir1.tasks import Problem, Task, Verdict, countdown

PROBLEMS = [Problem("a", "1"), Problem("b", "2")]
QUIET = {"train/entropy": 0.5, "train/truncated": 0.1}


def task(**more) -> Task:
    return Task("toy", ("train",), lambda split: PROBLEMS, lambda *_: Verdict("wrong", {}), lambda *_: None, **more)


def answer(right: bool = False, **changes) -> Answer:
    return Answer(**{"text": "abc", "tokens": 4, "truncated": False, "right": right, "format": right} | changes)


def rollout() -> Rollout:
    """Two rows of three and two tokens, two and one of them sampled, entropies 1, 2 and 3."""
    mask = torch.tensor([[False, True, True], [False, True, False]])
    one = torch.ones(2, dtype=torch.int64)
    grids = {"tokens": torch.zeros(2, 3, dtype=torch.int64), "logp": torch.zeros(2, 3)}
    entropy = torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 0.0]])
    lists = {"prompt_len": one, "length": torch.tensor([3, 2]), "stop": EOS * one, "group": torch.tensor([0, 1])}
    return Rollout(**grids, mask=mask, entropy=entropy, **lists, temperature=1.0)


# ---- averages and clock ------------------------------------------------------------------------


def test_averages_over_updates_with_the_weights_of_the_loss():
    """Two micro-batches in the first update, one in the second: (¼·1 + ¾·2 + 1·5) / 2; norms 3 and 4."""
    averages = Averages()
    averages.add(torch.tensor([[0.25, 0.0]]), kl=torch.tensor([[1.0, 99.0]]))
    averages.add(torch.tensor([[0.75]]), kl=torch.tensor([[2.0]], requires_grad=True))
    averages.update(grad_norm=3.0)
    averages.add(torch.tensor([[1.0]]), kl=torch.tensor([[5.0]]))
    averages.update(grad_norm=4.0)
    assert averages.metrics() == {"train/kl": 3.375, "train/grad_norm": 3.5}
    assert Averages().metrics() == {}  # every answer was masked
    averages = Averages()
    averages.add(torch.zeros(1, 2), check_error=torch.ones(1, 2))
    averages.update(grad_norm=3.0)
    assert averages.metrics() == {"train/grad_norm": 3.0}  # no answer was judged
    averages = Averages()
    averages.add(torch.tensor([[1.0, 0.0]]), kl=torch.tensor([[2.0, float("nan")]]), clip=torch.tensor([[True, True]]))
    assert averages.metrics() == {"train/kl": 2.0, "train/clip": 1.0}  # whatever stands at padding


def test_the_clock_adds_up_laps_and_divides_tokens(monkeypatch):
    times = iter([10.0, 12.0, 12.5, 13.5, 14.5])
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: next(times))
    clock = Clock(torch.device("cpu"))
    for name in ("rollout", "judge", "update", "rollout"):
        clock.lap(name)
    assert clock.speeds(rollout()) == {
        "time/rollout_s": 3.0,
        "time/judge_s": 0.5,
        "time/update_s": 1.0,
        "perf/rollout_tok_s": 1.0,  # three sampled tokens in 2 + 1 seconds
        "perf/update_tok_s": 5.0,  # five tokens of the rows
    }


# ---- the answers -------------------------------------------------------------------------------


def test_report_by_hand():
    grid = [[answer(True), answer(tokens=8, truncated=True)], [answer(unjudged=True), answer(format=True)]]
    rewards = torch.tensor([[1.1, 0.0], [0.1, 0.1]])
    metrics = report(task(), PROBLEMS, rollout(), grid, rewards)
    assert metrics == pytest.approx({
        "train/reward": 1.3 / 4,
        "train/accuracy": 1 / 3,  # of those that were judged
        "train/format": 2 / 4,
        "train/length": (3 * 4 + 8) / 4,
        "train/truncated": 1 / 4,
        "train/endless": 0.0,
        "train/contradictions": 1 / 2,  # of the first group, whose texts are equal
        "train/unjudged": 1 / 4,
        "train/entropy": 2.0,  # (1 + 2 + 3) / 3 tokens
        "train/mixed_groups": 1 / 2,
        "train/sampled_tokens": 3,
    })  # fmt: skip
    unknown = [[answer(unjudged=True)] * 2] * 2
    assert "train/accuracy" not in report(task(), PROBLEMS, rollout(), unknown, torch.zeros(2, 2))
    assert "train/reward" not in report(task(), PROBLEMS, rollout(), unknown, torch.zeros(2, 2))
    counted = task(behaviour=lambda problem, text: {"words": len(text), "e": 6.0}, rates={"e": "words"})
    metrics = report(counted, PROBLEMS, rollout(), grid, rewards)
    assert metrics["behaviour/words"] == 3.0 and metrics["behaviour/e"] == 2.0


def test_endless_answers_were_truncated_after_their_answer():
    """Of the text after the tag: a budget that is short by the end token alone ends in the tag, or in a blank."""
    cut = {"<answer>7</answer> 7": True, "<answer>7</answer> 8": False, "<answer>7": True}
    cut |= {"<answer>7</answer>": True, "<answer>7</answer>\n": True}
    group = [answer(text=text, truncated=truncated) for text, truncated in cut.items()]
    assert report(task(), PROBLEMS, rollout(), [group], torch.zeros(1, 5))["train/endless"] == 1 / 5


def test_a_contradiction_is_one_text_judged_both_ways_in_a_group():
    a, b, late = answer(True, text="a"), answer(text="b"), answer(text="a", unjudged=True)
    assert contradictions([[a, b, a], [a, late], [b, b]]) == 0  # between groups it is another problem
    assert contradictions([[a, b, answer(text="a")], [a, b]]) == 0.5


def test_preflight_by_hand(capsys):
    """Of four groups two are mixed; pass@1 is 5/12, pass@3 3/4."""
    groups = [(1, 0, 0), (1, 1, 1), (0, 0, 0), (0, 0, 1)]
    grid = [[answer(bool(right)) for right in group] for group in groups]
    want = {"pass@1": 5 / 12, "pass@3": 0.75, "mixed_groups": 0.5, "truncated": 0.0, "format": 5 / 12}
    assert outlook(grid) == pytest.approx(want | {"contradictions": 0.5})  # all texts of a group are equal
    assert preflight(grid, 0.5) == {f"preflight/{name}": value for name, value in outlook(grid).items()}
    shown = "preflight: pass@1 41.7%  pass@3 75.0%  mixed_groups 50.0%  truncated 0.0%  format 41.7%\n"
    assert capsys.readouterr().out == shown + "warning: the verifier judged one text both right and wrong\n"
    advice = "only 50.0% of the groups hold both right and wrong.*easier --task .pass@1 is 41.7%.*--num-generations"
    with pytest.raises(ValueError, match=advice):
        preflight(grid, 0.51)
    with pytest.raises(ValueError, match="only 0.0% of the groups .* a harder --task .pass@1 is 100.0%"):
        preflight([[answer(True), answer(True)]], 0.05)


def test_answers_that_were_not_judged_are_no_signal(capsys):
    """Right and not judged is no mixed group; of three groups one has a right and a wrong answer."""
    late = answer(unjudged=True)
    grid = [[answer(True), late], [answer(True), answer()], [late, late], [late, answer()]]
    want = {"preflight/pass@1": 0.5, "preflight/pass@2": 2 / 3, "preflight/mixed_groups": 1 / 3}
    assert want.items() <= preflight(grid, 0.3).items()
    with pytest.raises(RuntimeError, match="no answer could be judged: no reason given"):
        preflight([[late, late]], 0.0)


def test_preflight_of_single_answers_takes_all_as_one_group():
    """With G = 1 an objective with a baseline over the batch learns as soon as not all answers are alike."""
    mixed = [[answer(True)], [answer()], [answer()]]
    assert {"preflight/pass@1": 1 / 3, "preflight/mixed_groups": 1.0}.items() <= preflight(mixed, 1.0).items()
    with pytest.raises(ValueError, match="only 0.0% of the groups"):
        preflight([[answer()], [answer()]], 0.05)
    assert preflight([[answer()]], 0.0)["preflight/mixed_groups"] == 0.0


# ---- what is shown -----------------------------------------------------------------------------


def test_alarms():
    assert alarms(QUIET) == []
    for change, word in (
        ({"train/entropy": 1e-4}, "nearly certain: lower --learning-rate"),
        ({"train/entropy": 2.5}, "nearly noise: lower --learning-rate"),
        ({"train/truncated": 0.6}, "more than half of the answers are truncated: raise --max-completion-length"),
        ({"train/unjudged": 0.06}, "verifier failed on more than 5 %"),
    ):
        (sign,) = alarms(QUIET | change)
        assert word in sign
        assert "--beta" not in sign  # the interpolation of generalised JSD in distill_on_policy
    assert len(alarms({"train/entropy": 0.0, "train/truncated": 1.0, "train/unjudged": 1.0})) == 3
    nan = float("nan")  # neither above nor below any limit
    assert alarms({"train/entropy": nan, "train/truncated": 0.0}) == ["train/entropy is nan"]
    assert alarms(QUIET | {"train/kl": -float("inf")}) == ["train/kl is -inf"]


def test_a_step_is_one_line_with_what_was_measured_and_its_alarms(capsys):
    show(3, 40, QUIET | {"train/reward": 0.5, "behaviour/tries": 2.0, "train/truncated": 0.7, "eval/pass@1": 0.25})
    line, alarm = capsys.readouterr().out.splitlines()
    assert line.split() == "3/40 reward 0.5 entropy 0.5 validation 25.0% tries 2".split()
    assert alarm.startswith("warning, step 3: more than half of the answers are truncated")


def test_the_fields_of_a_step_are_explained():
    page = (Path(__file__).parent.parent / "docs" / "commands.md").read_text(encoding="utf-8")
    section = page.partition("## What a step prints\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| (?:`([^`]+)` \| )?", section, re.M)
    assert [(key, label) for label, key in rows if key] == [(key, label) for key, label, _ in monitor.SHOWN]
    counts = countdown.behaviour(Problem("make 24 from 11,3,3", ""), "")
    assert [label for label, key in rows if not key] == list(counts)
