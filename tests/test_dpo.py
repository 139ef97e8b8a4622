"""experiments/dpo.py at toy size: its gradient written out, its run folder, resumed runs."""

import copy
import json
import math
from dataclasses import replace

import pytest
import standin
import torch
from runs import assert_resumes_by_itself, assert_same_run, plain_metrics, stop
from test_preference_pairs import assert_bad_option, save_base, write_pairs

from experiments import dpo
from minir1 import checkpoint
from minir1.log import read_metrics
from minir1.model import hf
from minir1.preference_data import load, padded

standin.register()  # before the first backward pass of the process


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    small = {"steps": 9, "batch": 6, "warmup": 2, "learning_rate": 3e-3, "eval_every": 4, "microbatch": 400}
    small["task"] = None
    return dpo.Config(checkpoint=save_base(folder / "base"), **write_pairs(folder), out=folder / "run", **small)


@pytest.fixture(scope="module")
def start(config):
    """The policy, another model as the reference, and ten pairs."""
    model, tokenizer = hf.load(config.checkpoint)
    reference = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for n, p in enumerate(reference.parameters()):
            p += 0.3 * p.abs().mean() * torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
    return model, reference, load(config.pairs, tokenizer, 1024)[:10]


def step(start, config, reference=None, **changes):
    """`learn` by plain gradient descent with rate 1: what was measured, and how each parameter moved."""
    model, other, pairs = start
    policy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    measured = dpo.learn(policy, reference or other, optimizer, pairs, replace(config, grad_clip=1e9, **changes))
    return measured, [(b - a).detach() for a, b in zip(model.parameters(), policy.parameters())]


def assert_same(moves, others):
    scale = max(move.abs().max().item() for move in others)
    assert scale > 0
    for move, other in zip(moves, others):
        torch.testing.assert_close(move, other, atol=2e-5 * scale, rtol=0)


def test_at_the_reference_the_step_is_half_of_beta_along_the_difference(start, config):
    model, _, pairs = start
    measured, moves = step(start, config, reference=model, beta=0.4)
    tokens, lengths, mask = padded(pairs)
    policy = copy.deepcopy(model)
    chosen, rejected = (policy.logprob(tokens, lengths=lengths) * mask).sum(1).chunk(2)
    (0.4 / 2 * (chosen - rejected).mean()).backward()
    assert_same(moves, [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()])
    assert measured["train/loss"] == pytest.approx(math.log(2)) and measured["train/accuracy"] == 0
    assert measured["train/reward_chosen"] == measured["train/reward_rejected"] == measured["train/gap"] == 0
    assert measured["train/logp_chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)
    assert measured["train/logp_rejected"] == pytest.approx(rejected.mean().item(), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"label_smoothing": 0.2}], ids=str)
def test_no_result_depends_on_the_microbatch(start, config, changes):
    whole, moves = step(start, config, microbatch=10**6, **changes)
    assert abs(whole["train/gap"]) > 1e-4 and whole["train/grad_norm"] > 0
    for microbatch in (1, 150, 300):
        measured, others = step(start, config, microbatch=microbatch, **changes)
        assert_same(others, moves)
        assert measured == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_label_smoothing_and_beta_reach_the_loss(start, config):
    plain, _ = step(start, config)
    smooth, _ = step(start, config, label_smoothing=0.4)
    assert smooth["train/loss"] != plain["train/loss"] and smooth["train/gap"] == plain["train/gap"]
    double, _ = step(start, config, beta=0.2)
    assert double["train/reward_chosen"] == pytest.approx(2 * plain["train/reward_chosen"], rel=1e-5)


@pytest.fixture(scope="module")
def whole(config):
    dpo.main(config)
    return config.out


def test_a_run_is_a_folder_that_shows_both_rewards(whole, config):
    first, *rows = read_metrics(whole)
    assert first["step"] == 0 and first["eval/loss"] == pytest.approx(math.log(2)) and first["eval/accuracy"] == 0.5
    assert [row["step"] for row in rows] == list(range(1, 10))
    names = ("loss", "accuracy", "gap", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")
    assert all({f"train/{name}" for name in (*names, "grad_norm")} <= row.keys() for row in rows)
    measured = [row for row in rows if {f"eval/{name}" for name in (*names, "accuracy_low")} <= row.keys()]
    assert [row["step"] for row in measured] == [4, 8, 9]
    last = measured[-1]
    assert last["eval/gap"] == pytest.approx(last["eval/reward_chosen"] - last["eval/reward_rejected"], abs=1e-5)
    for which in ("chosen", "rejected"):  # β of the change since the start
        change = last[f"eval/logp_{which}"] - first[f"eval/logp_{which}"]
        assert last[f"eval/reward_{which}"] == pytest.approx(config.beta * change, rel=1e-3, abs=1e-5)
    assert last["eval/accuracy"] > 0.95 and last["eval/loss"] < first["eval/loss"]
    result = json.loads((whole / "result.json").read_text())
    assert result["before/loss"] == first["eval/loss"] and result["after/accuracy"] == last["eval/accuracy"]
    assert (whole / "figures" / "dpo.png").stat().st_size > 10_000


def test_the_checkpoint_is_a_model_and_has_the_reference(whole, config):
    path = checkpoint.latest(whole / "checkpoint")
    policy, start = (hf.load(p)[0].state_dict() for p in (path, config.checkpoint))
    assert any(not torch.equal(policy[name], start[name]) for name in start)
    assert all(torch.equal(policy[name], start[name]) for name in start if name.endswith("ffn.bias"))
    reference = checkpoint.load_state(path)["reference"]
    assert reference.keys() == start.keys() and all(torch.equal(reference[name], start[name]) for name in start)


@pytest.mark.parametrize("count", [3, 6])
def test_a_stopped_run_resumes_to_the_same_bits(whole, config, tmp_path, monkeypatch, count):
    again = replace(config, out=tmp_path / "run")
    stop(monkeypatch, "dpo", again, "experiments.dpo", "clip_gradients", count)
    dpo.main(replace(again, resume=True))
    assert_same_run(again.out, whole)


def test_a_run_resumes_without_its_base_but_not_from_a_changed_file(whole, config, tmp_path):
    assert_resumes_by_itself(dpo.main, config, whole, tmp_path)


def test_a_run_of_other_steps_or_settings_is_not_resumed(whole, config):
    with pytest.raises(ValueError, match="steps = 12: the learning rate follows it"):
        dpo.main(replace(config, resume=True, steps=12))
    with pytest.raises(ValueError, match="beta: 0.1 then, 0.2 now"):
        dpo.main(replace(config, resume=True, beta=0.2))
    with pytest.raises(ValueError, match="already holds a run"):
        dpo.main(config)
    with pytest.raises(ValueError, match="task countdown has no variant 'five'; it has default, wide, four"):
        dpo.main(replace(config, task="countdown:five", out=whole / "other"))
    assert not (whole / "other").exists()


def test_a_run_on_another_device_is_that_of_the_cpu(config, tmp_path):
    sampled = {"task": "countdown", "max_completion_length": 8, "eval_problems": 3, "eval_answers": 1}
    for device in ("cpu", "standin"):
        dpo.main(replace(config, steps=2, label_smoothing=0.1, **sampled, device=device, out=tmp_path / device))
    assert plain_metrics(tmp_path / "cpu") == plain_metrics(tmp_path / "standin")


def test_weights_of_16_bits_are_trained_over_masters_and_resumed_to_the_same_bits(config, tmp_path, monkeypatch):
    short = replace(config, dtype="bfloat16", steps=3, eval_every=2, learning_rate=1e-4, recompute=True)
    dpo.main(replace(short, out=tmp_path / "whole"))
    again = replace(short, out=tmp_path / "run")
    stop(monkeypatch, "dpo", again, "experiments.dpo", "clip_gradients", 3)
    dpo.main(replace(again, resume=True))
    assert_same_run(again.out, tmp_path / "whole")
    folder = checkpoint.latest(again.out / "checkpoint")
    assert {m.dtype for m in checkpoint.load_state(folder)["optimizer"]["masters"]} == {torch.float32}
    assert next(hf.load(folder)[0].parameters()).dtype == torch.bfloat16


def test_with_a_task_the_policy_is_sampled(config, tmp_path):
    small = {"steps": 1, "task": "countdown", "max_completion_length": 8, "eval_problems": 3, "eval_answers": 1}
    result = dpo.main(replace(config, **small, out=tmp_path))
    assert 0 <= result["before/pass@1"] <= 1 and "after/pass@1_low" in result


def test_a_problem_that_the_tokenizer_cannot_encode_is_refused_with_nothing_left_behind(config, tmp_path):
    path = tmp_path / "accents.py"
    path.write_text(
        "from minir1.tasks import Problem, Verdict\n"
        "SPLITS = ('validation',)\n"
        "problems = lambda split, data: [Problem('make é', '3')]\n"
        "verify = lambda problem, text: Verdict('wrong', {})\n"
    )
    with pytest.raises(ValueError, match="the tokenizer has no token for 'é' in the prompt"):
        dpo.main(replace(config, task=str(path), out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_task_that_runs_programs_is_allowed_by_the_option_that_its_refusal_names(config, tmp_path):
    path = tmp_path / "programs.py"
    path.write_text(
        "from minir1.tasks import Problem, Verdict\n"
        "RUNS_CODE = True\n"
        "SPLITS = ('validation',)\n"
        "problems = lambda split, data: [Problem('make 3 from 1,2', '3')]\n"
        "verify = lambda problem, text: Verdict('wrong', {})\n"
    )
    run = replace(config, steps=1, task=str(path), max_completion_length=8, out=tmp_path / "run")
    with pytest.raises(ValueError, match="programs runs programs .*: allow it, --allow-code"):
        dpo.main(run)
    assert dpo.main(replace(run, allow_code=True))["after/pass@1"] == 0


@pytest.mark.parametrize(
    "line, message",
    [
        ("--beta 0", "beta = 0.0: above 0"),
        ("--label-smoothing 0.5", "label_smoothing = 0.5: 0 to below 0.5"),
        ("--batch 0", "batch = 0: at least 1"),
        ("--margin 1", "--margin"),
        ("--eval-problems 0", "eval_problems = 0: at least 1"),
    ],
)
def test_bad_options_are_named(line, message, capsys):
    assert_bad_option(dpo, line, message, capsys)
