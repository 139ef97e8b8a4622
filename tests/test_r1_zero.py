"""r1_zero.py at toy size: its update against formulas written out, runs of it, killed and resumed to the same bits."""

import copy
import importlib
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import standin
import torch
import tyro
from runs import assert_same_run, kill, plain_metrics, result_of, stop
from safetensors.torch import load_file

from experiments import r1_zero
from experiments.tools.variants import COPIES
from minir1 import checkpoint, policy, tasks
from minir1.advantages import group_advantages
from minir1.judge import NO_THINK, Answer
from minir1.log import read_metrics
from minir1.losses import clipped_surrogate
from minir1.model import hf
from minir1.model.lora import adapters, adapters_off
from minir1.policy import on_policy_check, reference_logprobs
from minir1.rollout import BUDGET
from minir1.tasks import Problem, countdown

standin.register()  # before the first backward pass of the process
RL = r1_zero.Config(
    steps=9, prompts=4, num_generations=4, max_completion_length=32, min_mixed=0.0, eval_every=4, eval_problems=6,
    eval_answers=1, beta=0.01, reference_reset=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(toy_base, tmp_path_factory):
    """Uninterrupted runs of what the tests below kill, made when first asked for."""
    made = {}

    def run(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(f"whole-{kind}")
            r1_zero.main(config_of(kind, toy_base, made[kind]))
        return made[kind]

    return run


def config_of(kind: str, toy_base, out: Path, **changes) -> r1_zero.Config:
    return replace(RL, checkpoint=toy_base(kind) / "checkpoint", out=out, **changes)


# ---- the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, message",
    [
        ("--num-generations 1", "num_generations = 1: at least 2"),
        ("--prompts 0", "prompts = 0: at least 1"),
        ("--steps 0", "steps = 0: at least 1"),
        ("--num-minibatches 0", "num_minibatches = 0: at least 1"),
        ("--eval-every 0", "eval_every = 0: at least 1"),
        ("--temperature 0", "temperature = 0.0: at least 1e-06"),
        ("--max-completion-length 0", "max_completion_length = 0: at least 1"),
        ("--epsilon-high -0.1", "epsilon_high = -0.1: at least 0"),
        ("--language-weight -1", "language_weight = -1.0: at least 0"),
        ("--reduction mean", "per_answer"),
        ("--rewards 1", "--rewards"),
        ("--lora-rank -1", "lora_rank = -1: at least 0"),
        ("--lora-rank 4 --reference-reset 3", "reference_reset: with beta = 0 or lora_rank there is no copy"),
        ("--difficulty-window 0.9 0.1", "difficulty_window = (0.9, 0.1): the lower share comes first"),
        ("--template none", "chat"),
    ],
)
def test_bad_options_are_named(line, message, capsys):
    with pytest.raises(SystemExit) as end:
        tyro.cli(r1_zero.Config, args=line.split())
    assert end.value.code == 2
    shown = "".join(capsys.readouterr())
    assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", shown).split())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"task": "chess"}, "unknown task 'chess'; allowed: .*countdown"),
        ({"device": "gpu"}, "device = 'gpu': this machine has .*cpu, or auto"),
        ({"eval_split": "dev"}, "task countdown has no split 'dev'; it has train, validation"),
    ],
)
def test_a_run_names_what_it_does_not_know_and_leaves_nothing_behind(toy_base, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        r1_zero.main(config_of("moe", toy_base, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


# ---- learning: one rollout, many ways to cut it ------------------------------------------------


@pytest.fixture(scope="module")
def sampled(toy_base):
    """A rollout of the toy base, arbitrary advantages, the base, and another model's log-probs as the reference's."""
    model, tokenizer = hf.load(checkpoint.latest(toy_base() / "checkpoint"))
    problems = tasks.load("countdown").problems("train")[:4]
    rollout = r1_zero.act(model, tokenizer, problems, replace(RL, max_completion_length=20), step=1)
    advantage = torch.randn(16, generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * p.abs().mean()
    assert set(rollout.stop.tolist()) == {0, BUDGET}, "the tests below want both endings"
    return model, reference_logprobs(reference, rollout, 8192), rollout, advantage


def step(sampled, *, ref_logp=None, rollout=None, advantage=None, lr=1.0, **changes):
    """`learn` with plain gradient descent: (its metrics, how each parameter moved)."""
    model, other, drawn, given = sampled
    policy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=lr)
    config = replace(RL, **{"num_minibatches": 1, "grad_clip": 1e9, "reference_reset": 0, **changes})
    ref_logp = (other if ref_logp is None else ref_logp) if config.beta else None
    advantage = given if advantage is None else advantage
    metrics = r1_zero.learn(policy, optimizer, rollout or drawn, advantage, ref_logp, config, step=1)
    return metrics, [(b - a).detach() for a, b in zip(model.parameters(), policy.parameters())]


def assert_same(moves, others):
    scale = max(move.abs().max() for move in others)
    assert scale > 0
    for move, other in zip(moves, others):
        torch.testing.assert_close(move, other, atol=2e-5 * scale.item(), rtol=0)


@pytest.mark.parametrize(
    "changes", [{}, {"num_minibatches": 2}, {"mask_truncated": True}, {"reduction": "token"}], ids=str
)
def test_no_result_depends_on_the_microbatch(sampled, changes):
    metrics, moves = step(sampled, microbatch=10**6, **changes)
    assert metrics["train/kl"] > 0 and metrics["train/grad_norm"] > 0
    for microbatch in (1, 100, 300):
        others, other_moves = step(sampled, microbatch=microbatch, **changes)
        assert_same(other_moves, moves)
        assert others == pytest.approx(metrics, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("spread", [0.0, 0.4])
@pytest.mark.parametrize("reduction", ["per_answer", "token", "fixed"])
def test_the_gradient_is_that_of_the_objective_written_out(sampled, reduction, spread):
    """Without KL the loss is -Σ_it w_i min(r A_i, clip(r) A_i): w_i by hand for every reduction, at ratio 1 and off it.

    The sampler's log-probs are moved by noise of that spread: with 0.4 both clips, 0.1 and 0.3, bind for some token.
    """
    model, _, rollout, advantage = sampled
    noise = spread * torch.randn(rollout.logp.shape, generator=torch.Generator().manual_seed(2))
    rollout = replace(rollout, logp=rollout.logp - noise * rollout.mask)
    more = {"epsilon_low": 0.1, "epsilon_high": 0.3}
    metrics, moves = step(sampled, rollout=rollout, reduction=reduction, beta=0.0, **more)
    policy, mask = copy.deepcopy(model), rollout.mask
    logp = policy.logprob(rollout.tokens, lengths=rollout.length, mask=mask)
    lengths = (rollout.length - rollout.prompt_len).float().view(16, 1)
    fixed = torch.tensor(1 / (16 * RL.max_completion_length))
    w = {"per_answer": 1 / (16 * lengths), "token": 1 / lengths.sum(), "fixed": fixed}
    r, A = (logp - rollout.logp).exp(), advantage.view(16, 1)
    (w[reduction] * torch.minimum(r * A, r.clamp(0.9, 1.3) * A) * mask).sum().backward()
    assert_same(moves, [p.grad for p in policy.parameters()])
    bounds = [(A > 0) & (r > 1.3) & mask, (A < 0) & (r < 0.9) & mask]
    assert [bool(bound.any()) for bound in bounds] == [spread > 0] * 2
    clipped = (w[reduction] * sum(bounds)).sum() / (w[reduction] * mask).sum()
    assert metrics["train/clip_fraction"] == pytest.approx(clipped.item())


def orders(monkeypatch) -> list[torch.Tensor]:
    """The permutations that are drawn from now on."""
    drawn, real = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **more: drawn.append(real(*args, **more)) or drawn[-1])
    return drawn


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_stands_at_padding_is_not_learned_from(sampled, value):
    """Log-probs of the sampler and of the reference: the same figures, the divergence among them, and the same step."""
    model, ref_logp, rollout, _ = sampled
    changes = {"beta": 0.3, "microbatch": 100}
    want, moves = step(sampled, **changes)
    other, sampler = (x.masked_fill(~rollout.mask, value) for x in (ref_logp, rollout.logp))
    found, others = step(sampled, ref_logp=other, rollout=replace(rollout, logp=sampler), **changes)
    assert found == want and found["train/kl"] > 0 and all(torch.equal(a, b) for a, b in zip(others, moves))


def test_minibatches_are_steps_one_after_the_other(sampled, monkeypatch):
    """Each sees the policy that those before have made, against the log-probs of the sampler; epochs are reshuffled."""
    model, _, rollout, advantage = sampled
    drawn = orders(monkeypatch)
    _, moves = step(sampled, num_minibatches=2, epochs=2, beta=0.0, reduction="token", lr=0.1)
    assert len(drawn) == 2 and not torch.equal(*drawn)
    assert all(sorted(order.tolist()) == list(range(16)) for order in drawn)
    policy = copy.deepcopy(model)
    for part in [part for order in drawn for part in order.chunk(2)]:
        half = rollout.select(part)
        logp = policy.logprob(half.tokens, lengths=half.length, mask=half.mask)
        A = advantage[part].unsqueeze(1).expand_as(logp)
        ((clipped_surrogate(logp, half.logp, A, 0.2, 0.2) * half.mask).sum() / half.mask.sum()).backward()
        with torch.no_grad():
            for p in policy.parameters():
                p -= 0.1 * p.grad
        policy.zero_grad()
    assert_same(moves, [(b - a).detach() for a, b in zip(model.parameters(), policy.parameters())])


def test_the_order_is_a_function_of_seed_and_step(sampled, monkeypatch):
    model, _, rollout, advantage = sampled
    drawn = orders(monkeypatch)
    for seed, number in ((0, 1), (0, 1), (0, 2), (1, 1)):
        policy = copy.deepcopy(model)
        config = replace(RL, beta=0.0, reference_reset=0, seed=seed)
        r1_zero.learn(policy, torch.optim.SGD(policy.parameters(), 0.0), rollout, advantage, None, config, number)
    assert torch.equal(drawn[0], drawn[1]) and len({tuple(order.tolist()) for order in drawn}) == 3


def test_epochs_go_over_the_rollout_again(sampled, monkeypatch):
    norms, real = [], r1_zero.clip_gradients
    monkeypatch.setattr(r1_zero, "clip_gradients", lambda *args: norms.append(real(*args)) or norms[-1])
    metrics, _ = step(sampled, epochs=3, num_minibatches=2, lr=0.03)
    assert len(norms) == 6 and metrics["train/grad_norm"] == pytest.approx(sum(norms) / 6)
    assert metrics["train/clip_fraction"] > 0


def test_the_kl_term_pulls_towards_the_reference_alone(sampled):
    model, ref_logp, rollout, _ = sampled
    none = torch.zeros(16)
    with torch.no_grad():
        own = model.logprob(rollout.tokens, lengths=rollout.length, mask=rollout.mask)
    metrics, moves = step(sampled, ref_logp=own, advantage=none, beta=1.0)
    assert metrics["train/kl"] == pytest.approx(0, abs=1e-9) and max(m.abs().max() for m in moves) < 1e-5
    before, moves = step(sampled, advantage=none, beta=0.01)
    assert before["train/kl"] > 1e-4 and max(m.abs().max() for m in moves) > 0
    policy = copy.deepcopy(model)
    with torch.no_grad():
        for p, move in zip(policy.parameters(), moves):
            p += move
    after, _ = step((policy, ref_logp, rollout, none), beta=0.01)
    assert after["train/kl"] < before["train/kl"]


def test_the_gradient_of_the_kl_term(sampled):
    """β Σ w k3 with w = 1/(16 |o_i|), written out."""
    model, ref_logp, rollout, _ = sampled
    _, moves = step(sampled, advantage=torch.zeros(16), beta=0.5)
    policy, mask = copy.deepcopy(model), rollout.mask
    logp = policy.logprob(rollout.tokens, lengths=rollout.length, mask=mask)
    k3 = (ref_logp - logp).exp() - (ref_logp - logp) - 1
    (0.5 * k3 * mask / (16 * mask.sum(1, keepdim=True))).sum().backward()
    assert_same(moves, [-p.grad for p in policy.parameters()])


def test_the_gradient_coefficient_at_ratio_one(sampled):
    """Each ∇log π has the weight (A_i + β (π_ref/π - 1)) / (16 |o_i|) (DeepSeekMath, appendix A.1.6)."""
    model, ref_logp, rollout, advantage = sampled
    _, moves = step(sampled, beta=0.5)
    policy, mask = copy.deepcopy(model), rollout.mask
    logp = policy.logprob(rollout.tokens, lengths=rollout.length, mask=mask)
    coefficient = advantage.view(16, 1) + 0.5 * ((ref_logp - logp.detach()).exp() - 1)
    (coefficient * logp * mask / (16 * mask.sum(1, keepdim=True))).sum().backward()
    assert_same(moves, [p.grad for p in policy.parameters()])


def test_masked_truncated_answers_take_no_part(sampled):
    _, _, rollout, advantage = sampled
    other = torch.where(rollout.stop == BUDGET, advantage + 5, advantage)
    _, moves = step(sampled, mask_truncated=True)
    _, others = step(sampled, mask_truncated=True, advantage=other)
    assert all(torch.equal(a, b) for a, b in zip(moves, others))
    _, counted = step(sampled, advantage=other)
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(moves, counted))
    nothing = replace(rollout, stop=torch.full_like(rollout.stop, BUDGET))
    metrics, moves = step(sampled, mask_truncated=True, rollout=nothing)
    assert all(move.abs().max() == 0 for move in moves)
    assert metrics.get("train/grad_norm", 0.0) == 0


def test_the_mean_over_answers_counts_those_that_are_trained(sampled):
    """With masked truncated answers the weight is 1/(n |o_i|), n the answers that are left."""
    model, _, rollout, advantage = sampled
    _, moves = step(sampled, mask_truncated=True, beta=0.0)
    left = rollout.stop != BUDGET
    policy, mask = copy.deepcopy(model), rollout.mask & left.unsqueeze(1)
    logp = policy.logprob(rollout.tokens, lengths=rollout.length, mask=mask)
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / left.sum()
    (weight * advantage.unsqueeze(1) * logp).sum().backward()
    assert_same(moves, [p.grad for p in policy.parameters()])


def test_the_first_ratio_is_one_and_a_wrong_sampler_stops_the_run(sampled, toy_base, tmp_path, monkeypatch):
    """Also where the first mini-batch is truncated and masked."""
    model, _, rollout, _ = sampled
    assert on_policy_check(model, rollout, 300, most=0.02)["train/ratio_deviation"] < 1e-4
    assert step(sampled)[0]["train/clip_fraction"] == 0
    real = r1_zero.act

    def wrong(*args, **more):
        rollout = real(*args, **more)
        return replace(rollout, logp=rollout.logp - 0.2 * rollout.mask, stop=torch.full_like(rollout.stop, BUDGET))

    monkeypatch.setattr(r1_zero, "act", wrong)
    with pytest.raises(RuntimeError, match="sampler and trainer do not compute the same policy"):
        r1_zero.main(config_of("moe", toy_base, tmp_path / "run", mask_truncated=True))


def test_the_reward_is_accuracy_and_a_tenth_of_the_format():
    answers = [[Answer("", 1, False, right, form) for right, form in ((True, True), (True, False))]]
    answers += [[Answer("", 1, False, right, form) for right, form in ((False, True), (False, False))]]
    rewards = r1_zero.reward(answers, RL)
    torch.testing.assert_close(rewards, torch.tensor([[1.1, 1.0], [0.1, 0.0]]))
    torch.testing.assert_close(r1_zero.reward(answers, replace(RL, format_weight=1.0))[1], torch.tensor([1.0, 0.0]))
    half = torch.full((2,), 0.05 / (0.1 / 2**0.5 + 1e-6))  # (r - mean) / (sample deviation + 1e-6)
    torch.testing.assert_close(group_advantages(rewards)[:, 0], half, rtol=1e-4, atol=0)


def test_the_language_is_that_of_the_problem(monkeypatch):
    shares = {("a", "en"): 1.0, ("b", "en"): 0.5, ("a", "zh"): 0.0, ("b", "zh"): 0.25}
    monkeypatch.setattr(r1_zero, "language_consistency", lambda text, language: shares[text, language])
    problems = [Problem("p", "", language=language) for language in ("zh", "en")]
    answers = [[Answer(text, 1, False, False, False) for text in "ab"]] * 2
    assert r1_zero.language(problems, answers).tolist() == [[0.0, 0.25], [1.0, 0.5]]


def test_the_language_is_a_part_of_the_reward(toy_base, tmp_path, monkeypatch):
    """R = accuracy + 0.1·format + w·language, and for an answer that was not judged the mean of its group."""
    learned, language, spoiled = [], [], r1_zero.judge_rollout

    def judge(*args):
        first, *others = spoiled(*args)
        return [[replace(first[0], unjudged=True, right=False), *first[1:]], *others]

    def record(problems, answers):
        of_language = torch.arange(16.0).view(4, 4) / 16
        language.append((answers, of_language))
        return of_language

    advantages = lambda rewards: learned.append(rewards.clone()) or group_advantages(rewards)
    for name, function in (("judge_rollout", judge), ("language", record), ("group_advantages", advantages)):
        monkeypatch.setattr(r1_zero, name, function)
    config = config_of("moe", toy_base, tmp_path / "run", steps=1, eval_every=1, reference_reset=0)
    r1_zero.main(replace(config, language_weight=0.5))
    (row,), ((answers, of_language),) = read_metrics(tmp_path / "run")[1:], language
    want = torch.tensor([[a.right + 0.1 * a.format for a in group] for group in answers]) + 0.5 * of_language
    want[0, 0] = want[0, 1:].mean()
    torch.testing.assert_close(learned[0], want)
    assert row["train/language_consistency"] == pytest.approx(7.5 / 16)
    assert row["train/reward"] == pytest.approx(want.mean().item())
    r1_zero.main(replace(config, out=tmp_path / "without"))
    assert len(language) == 1 and "train/language_consistency" not in read_metrics(tmp_path / "without")[1]


def test_a_language_without_a_known_script_is_refused_before_anything_is_written(toy_base, tmp_path, monkeypatch):
    problems = lambda *args, real=countdown.problems, **more: [replace(p, language="xx") for p in real(*args, **more)]
    monkeypatch.setattr(countdown, "problems", problems)
    with pytest.raises(ValueError, match="language 'xx': no script is known for it; allowed: "):
        r1_zero.main(config_of("moe", toy_base, tmp_path / "run", language_weight=0.1))
    assert not (tmp_path / "run").exists()


# ---- runs --------------------------------------------------------------------------------------

SHOWN = "reward accuracy format length truncated entropy mixed_groups kl clip_fraction grad_norm ratio_deviation"
THINKING = "tries said_yes false_yes arithmetic_errors repeats"


def test_a_run_is_a_folder_with_all_that_must_be_shown(whole):
    out = whole("moe")
    first, *rows = read_metrics(out)
    assert first["step"] == 0 and {"preflight/pass@1", "preflight/pass@4", "preflight/mixed_groups"} < first.keys()
    assert [row["step"] for row in rows] == list(range(1, 10))
    wanted = {f"train/{name}" for name in SHOWN.split()} | {f"behaviour/{name}" for name in THINKING.split()} | {
        *("train/ratio_deviation_q99", "train/unjudged", "train/sampled_tokens"),
        *("time/rollout_s", "time/judge_s", "time/update_s", "perf/rollout_tok_s", "perf/update_tok_s"),
    }
    for row in rows:
        assert wanted <= row.keys() and all(isinstance(row[key], (int, float)) for key in wanted)
        assert row["train/reward"] == pytest.approx(row["train/accuracy"] + 0.1 * row["train/format"], abs=1e-6)
        assert row["train/ratio_deviation_q99"] < 1e-3
    evals = {"eval/pass@1", "eval/pass@1_low", "eval/pass@1_high", "eval/format", "eval/length", "eval/truncated"}
    assert [row["step"] for row in read_metrics(out) if evals <= row.keys()] == [0, 4, 8, 9]
    # There was something to learn, or the tests of a resumed run would compare nothing with nothing.
    assert sum(row["train/mixed_groups"] > 0 and row["train/grad_norm"] > 0 for row in rows) >= 5
    assert any(row["train/kl"] > 0 for row in rows)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [4] * 4 + [8] * 4 + [9] * 4
    assert all(s["problem"].startswith("make ") and s["text"] and s["right"] in (True, False) for s in samples)
    assert {"seconds/rl", "memory/peak_gib"} == result_of(out).keys()
    folder = out / "checkpoint"
    assert checkpoint.latest(folder).name == "step-000009"
    scores = {row["step"]: row["eval/pass@1"] for row in (first, *rows) if "eval/pass@1" in row}
    best = checkpoint.best(folder)
    assert scores[int(best.name[5:]) if best else 0] == max(scores.values())
    hf.load(checkpoint.resolve(folder, "best"))


@pytest.mark.parametrize("reset", [0, 2])
def test_the_policy_becomes_the_reference(toy_base, tmp_path, reset):
    r1_zero.main(config_of("moe", toy_base, tmp_path, steps=2, eval_every=2, reference_reset=reset))
    path = checkpoint.latest(tmp_path / "checkpoint")
    reference = checkpoint.load_state(path)["reference"]
    policy, start = (hf.load(p)[0].state_dict() for p in (path, checkpoint.latest(toy_base() / "checkpoint")))
    moved = [name for name in policy if not torch.equal(policy[name], start[name])]
    assert moved and not any(name.endswith("ffn.bias") for name in moved)  # the balance is frozen in RL
    expected = policy if reset else start
    assert reference.keys() == expected.keys()
    assert all(torch.equal(reference[name], expected[name]) for name in expected)


def test_options_reach_the_run(toy_base, tmp_path):
    """Every flag that changes the algorithm, in one run; the control's answers all begin with an empty thinking."""
    more = {"num_minibatches": 4, "epochs": 2, "reduction": "fixed", "mask_truncated": True, "temperature": 0.7}
    more |= {"no_think": True, "beta": 0.0, "reference_reset": 0, "max_completion_length": 10}
    more |= {"steps": 2, "eval_every": 1}
    last = r1_zero.main(config_of("moe", toy_base, tmp_path, **more))
    assert "eval/pass@1" in last and "train/kl" not in last
    assert "reference" not in checkpoint.load_state(checkpoint.latest(tmp_path / "checkpoint"))  # without KL
    assert last["behaviour/tries"] == 0 and last["train/length"] <= 10
    texts = [json.loads(line)["text"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(texts) == 8 and all(text.startswith(NO_THINK) for text in texts)
    assert any(text.endswith("</answer>") for text in texts)


def test_an_unjudged_sample_is_neither_right_nor_wrong(toy_base, tmp_path, monkeypatch):
    real = r1_zero.judge_rollout
    unjudged = lambda *args: [[replace(a, right=False, unjudged=True) for a in group] for group in real(*args)]
    monkeypatch.setattr(r1_zero, "judge_rollout", unjudged)
    r1_zero.main(config_of("moe", toy_base, tmp_path, steps=1))
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["right"] for sample in samples] == [None] * 4


def test_recomputing_activations_changes_no_bit(toy_base, tmp_path):
    for name in ("kept", "again"):
        r1_zero.main(config_of("moe", toy_base, tmp_path / name, steps=2, eval_every=2, recompute=name == "again"))
    assert_same_run(tmp_path / "kept", tmp_path / "again")


def test_a_base_without_signal_stops_the_run_with_advice(toy_base, tmp_path):
    config = config_of("dense", toy_base, tmp_path / "run", min_mixed=0.9)
    with pytest.raises(ValueError, match="of the groups hold both right and wrong.*start from a better base.*--task"):
        r1_zero.main(config)
    assert not config.out.exists()


def test_a_folder_that_holds_a_run_is_not_overwritten(whole, toy_base):
    out = whole("moe")
    before = (out / "metrics.jsonl").read_bytes()
    config = config_of("moe", toy_base, out)
    with pytest.raises(ValueError, match="already holds a run: continue it with --resume"):
        r1_zero.main(config)
    with pytest.raises(ValueError, match="another config.*beta: 0.01 then, 0.5 now.*choose another --out"):
        r1_zero.main(replace(config, beta=0.5, resume=True))
    assert (out / "metrics.jsonl").read_bytes() == before


def spoil(path: Path, what: str) -> None:
    """Damage one thing in a checkpoint folder."""
    if what == "weights missing":
        (path / "model.safetensors").unlink()
    elif what == "weights truncated":
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif what == "tokenizer missing":
        (path / "tokenizer.json").unlink()
    elif what == "vocabulary too large":
        tokenizer = json.loads((path / "tokenizer.json").read_text())
        vocab = tokenizer["model"]["vocab"]
        vocab |= {f"extra{n}": len(vocab) + n for n in range(100)}
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    elif what == "other shape":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 16}))


@pytest.mark.parametrize(
    "what, message",
    [
        ("nothing there", "is no folder: need a Hugging Face checkpoint"),
        ("weights missing", "holds no model.safetensors"),
        ("weights truncated", "model.safetensors is damaged"),
        ("tokenizer missing", "holds no tokenizer.json"),
        ("vocabulary too large", r"the tokenizer has \d+ tokens, the model only \d+"),
        ("other shape", "model.safetensors does not fit its config.json"),
    ],
)
def test_a_base_that_is_none_is_named(toy_base, tmp_path, what, message):
    path = tmp_path / "step-000001"
    if what != "nothing there":
        path = shutil.copytree(checkpoint.latest(toy_base() / "checkpoint"), path)
        spoil(path, what)
    with pytest.raises(ValueError, match=message) as error:
        r1_zero.main(replace(RL, checkpoint=path, out=tmp_path / "run"))
    assert str(path) in str(error.value) and not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_not_resumed_from(whole, toy_base, tmp_path):
    out = shutil.copytree(whole("moe"), tmp_path / "run")
    config = config_of("moe", toy_base, out, resume=True, steps=12)
    state = checkpoint.latest(out / "checkpoint") / checkpoint.STATE
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{re.escape(str(state))} cannot be read, it is cut short or damaged"):
        r1_zero.main(config)
    (out / "checkpoint" / "latest").write_text("step-000077\n")
    with pytest.raises(ValueError, match="latest names 'step-000077', which is no checkpoint"):
        r1_zero.main(config)


# ---- killed and resumed ------------------------------------------------------------------------


def test_a_killed_process_resumes_to_the_same_bits(whole, toy_base, tmp_path):
    config = config_of("moe", toy_base, tmp_path / "run")
    # Step 7, the second of its mini-batches: its gradient is ready, not applied.
    kill("r1_zero", config, "torch", "_foreach_mul_", 14, tmp_path / "config")
    assert [row["step"] for row in read_metrics(tmp_path / "run")][-1] == 6
    assert checkpoint.latest(tmp_path / "run" / "checkpoint").name == "step-000004"
    r1_zero.main(replace(config, resume=True))
    assert_same_run(tmp_path / "run", whole("moe"))


@pytest.mark.parametrize(
    "kind, owner, name, count",
    [
        ("dense", "experiments.r1_zero", "preflight", 1),
        ("dense", "experiments.r1_zero", "learn", 6),
        ("dense", "experiments.r1_zero", "evaluate", 3),  # in the last step before the second checkpoint
        ("dense", "minir1.checkpoint", "replace_text", 3),  # checkpoint 8 is written, not named
        ("dense", "minir1.checkpoint", "_clean", 4),  # checkpoint 8 is named, 4 not yet deleted
        ("moe", "minir1.log:Run", "log", 9),  # step 8 is trained, not logged
        ("moe", "minir1.log:Run", "result", 1),  # all steps done, no result yet
    ],
)
def test_a_run_stopped_anywhere_resumes_to_the_same_bits(
    whole, toy_base, tmp_path, monkeypatch, kind, owner, name, count
):
    config = config_of(kind, toy_base, tmp_path / "run")
    stop(monkeypatch, "r1_zero", config, owner, name, count)
    r1_zero.main(replace(config, resume=True))
    assert_same_run(tmp_path / "run", whole(kind))


def test_a_run_that_draws_by_difficulty_resumes_to_the_same_bits(toy_base, tmp_path, monkeypatch):
    """What was measured before the first step and since then is in the checkpoint."""
    more = {"steps": 4, "eval_every": 2, "num_generations": 2, "difficulty_window": (0.4, 0.6)}
    configs = [config_of("dense", toy_base, tmp_path / name, **more) for name in ("run", "whole")]
    load = r1_zero.tasks.load

    def few(*words, **named):
        task = load(*words, **named)
        return replace(task, problems=lambda split: task.problems(split)[:12])

    monkeypatch.setattr(r1_zero.tasks, "load", few)
    stop(monkeypatch, "r1_zero", configs[0], "experiments.r1_zero", "learn", 4)
    r1_zero.main(replace(configs[0], resume=True))
    r1_zero.main(configs[1])
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    state = checkpoint.load_state(checkpoint.latest(tmp_path / "run" / "checkpoint"))
    assert state["curriculum"]["shares"].keys() == set(range(12))


def test_a_run_stopped_twice_resumes_and_a_longer_one_too(whole, toy_base, tmp_path, monkeypatch):
    config = config_of("dense", toy_base, tmp_path / "run")
    stop(monkeypatch, "r1_zero", config, "experiments.r1_zero", "learn", 6)
    stop(monkeypatch, "r1_zero", replace(config, resume=True), "experiments.r1_zero", "learn", 5)
    r1_zero.main(replace(config, resume=True))
    assert_same_run(tmp_path / "run", whole("dense"))
    r1_zero.main(replace(config, resume=True, steps=12, microbatch=64))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(13))


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_a_bf16_run_resumes_to_the_same_bits(toy_base, tmp_path, monkeypatch, rank):
    """Weights are rounded fp32 masters, which the checkpoint holds: steps below a digit of bf16 add up in them."""
    more = {"dtype": "bfloat16", "lora_rank": rank, "reference_reset": 0, "max_ratio_deviation": 0.1}
    configs = [
        config_of("dense", toy_base, tmp_path / name, steps=3, eval_every=2, learning_rate=1e-4, **more)
        for name in ("run", "whole")
    ]
    stop(monkeypatch, "r1_zero", configs[0], "experiments.r1_zero", "learn", 3)
    r1_zero.main(replace(configs[0], resume=True))
    r1_zero.main(configs[1])
    assert_same_run(configs[0].out, configs[1].out)
    path = checkpoint.latest(configs[1].out / "checkpoint")
    masters = checkpoint.load_state(path)["optimizer"]["masters"]
    weights = load_file(path / ("adapter_model.safetensors" if rank else "model.safetensors"))
    assert {w.dtype for w in weights.values()} == {torch.bfloat16} and {m.dtype for m in masters} == {torch.float32}
    assert any((m != m.bfloat16()).any() for m in masters)


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_a_run_on_another_device_is_that_of_the_cpu(toy_base, tmp_path, rank):
    """Every tensor of a step is made on the policy's device: the stand-in refuses a step that mixes devices."""
    for device in ("cpu", "standin"):
        more = {"steps": 2, "eval_every": 2, "lora_rank": rank, "reference_reset": 0 if rank else 1}
        r1_zero.main(config_of("moe", toy_base, tmp_path / device, device=device, mask_truncated=True, **more))
    assert plain_metrics(tmp_path / "cpu") == plain_metrics(tmp_path / "standin")
    assert_same_run(tmp_path / "cpu", tmp_path / "standin")


def test_adapters_alone_are_trained_saved_and_resumed(toy_base, tmp_path, monkeypatch):
    more = {"lora_rank": 4, "reference_reset": 0, "learning_rate": 1e-3}
    config, whole = (config_of("moe", toy_base, tmp_path / name, **more) for name in ("run", "whole"))
    monkeypatch.setattr("minir1.policy.frozen_copy", None)  # no second copy for the reference
    stop(monkeypatch, "r1_zero", config, "experiments.r1_zero", "learn", 6)
    r1_zero.main(replace(config, resume=True))
    r1_zero.main(whole)
    folders = [checkpoint.latest(c.out / "checkpoint") for c in (config, whole)]
    assert [sorted(p.name for p in f.iterdir() if "adapter" in p.name or "model" in p.name) for f in folders] == 2 * [
        ["adapter_config.json", "adapter_model.safetensors"]
    ]
    file = "adapter_model.safetensors"
    assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()
    model, tokenizer = hf.load(folders[0])
    base, _ = hf.load(checkpoint.latest(toy_base() / "checkpoint"))
    x = torch.tensor([tokenizer.encode("User:make 12 from 3,4,5")])
    assert not torch.equal(model(x), base(x))
    with adapters_off(model):
        assert torch.equal(model(x), base(x))
    assert any(row.get("train/kl", 0) > 0 for row in read_metrics(config.out))


def test_training_from_a_folder_of_adapters_trains_a_whole_model(toy_base, tmp_path):
    """Its own folder must not name the adapters as its base, or nobody could open it."""
    first = config_of("moe", toy_base, tmp_path / "first", lora_rank=4, reference_reset=0, steps=1)
    r1_zero.main(first)
    second = replace(first, checkpoint=first.out / "checkpoint", lora_rank=0, out=tmp_path / "second")
    r1_zero.main(second)
    model, _ = hf.load(checkpoint.latest(second.out / "checkpoint"))
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="holds adapters: merge and save them first"):
        r1_zero.main(replace(second, lora_rank=4, out=tmp_path / "third"))
    assert not (tmp_path / "third").exists()


def test_a_resumed_run_knows_the_best_so_far(toy_base, tmp_path, monkeypatch):
    scores = iter([0.1, 0.5, 0.2, 0.5])  # of the start, and at steps 4, 8, 9
    monkeypatch.setattr(r1_zero, "evaluate", lambda *_: {"eval/pass@1": next(scores)})
    config = config_of("dense", toy_base, tmp_path / "run")
    stop(monkeypatch, "r1_zero", config, "experiments.r1_zero", "learn", 6)
    last = r1_zero.main(replace(config, resume=True))
    assert last["eval/pass@1"] == 0.5 and checkpoint.best(tmp_path / "run" / "checkpoint").name == "step-000004"


@pytest.mark.parametrize(
    "scores, best", [([0.5, 0.4, 0.5], None), ([0.5, 0.4, 0.6], "2"), ([0.5, math.nan, 0.2], None),
                     ([math.nan, 0.1, 0.1], "1"), ([0.0, 0.0, 0.0], None)]
)  # fmt: skip
@pytest.mark.parametrize("name", ["r1_zero", "reinforce", "ppo", *(f"variants.{name}" for name in COPIES)])
def test_a_checkpoint_is_the_best_if_it_beats_the_base(toy_base, tmp_path, monkeypatch, name, scores, best):
    script, left = importlib.import_module(f"experiments.{name}"), iter(scores)
    fields = {"prompts": 1, "num_generations": 2, "max_completion_length": 2, "eval_problems": 1}
    more = {"variants.dapo": {"overlong_buffer": 1}, "ppo": {"value_warmup": 0}, "variants.hybrid": {"alpha": 1.0}}
    fields |= more.get(name, {})
    config = script.Config(checkpoint=toy_base() / "checkpoint", out=tmp_path, steps=2, eval_every=1, **fields)
    monkeypatch.setattr(script, "evaluate", lambda *_: {"eval/pass@1": next(left)})
    for function in ("preflight", "learn", "show", "on_policy_check"):  # only the bookkeeping is tested
        monkeypatch.setattr(script, function, lambda *_, **__: {})
    script.main(replace(config, min_mixed=0.0))
    found = checkpoint.best(tmp_path / "checkpoint")
    assert (found and found.name) == (best and f"step-00000{best}")


def test_resuming_a_finished_run_changes_nothing(whole, toy_base, tmp_path, monkeypatch):
    out = shutil.copytree(whole("moe"), tmp_path / "run")
    monkeypatch.setattr(r1_zero, "learn", None)
    seconds = result_of(out)["seconds/rl"]
    assert r1_zero.main(config_of("moe", toy_base, out, resume=True))
    assert_same_run(out, whole("moe"))
    assert result_of(out)["seconds/rl"] > 0.5 * seconds  # of the training, not of this look
    assert result_of(out)["seconds/rl"] == seconds


@pytest.mark.parametrize("name", ["r1_zero", "reinforce", "ppo", "variants.rloo", "variants.ema_reference"])
def test_a_run_resumes_to_the_same_bits_without_its_base(toy_base, tmp_path, monkeypatch, name):
    script, bases = importlib.import_module(f"experiments.{name}"), tmp_path / "bases"
    shutil.copytree(toy_base("dense") / "checkpoint", bases)
    fields = {field: getattr(RL, field) for field in ("prompts", "num_generations", "max_completion_length", "beta")}
    fields |= {"min_mixed": 0.0, "eval_problems": 3, "eval_answers": 1, "steps": 3, "eval_every": 1}
    more = {"value_warmup": 0} if name == "ppo" else {}
    config = script.Config(checkpoint=bases, out=tmp_path / "whole", learning_rate=1e-2, **fields, **more)
    script.main(config)
    config = replace(config, out=tmp_path / "run")
    stop(monkeypatch, name, config, f"experiments.{name}", "learn", 3)
    shutil.rmtree(bases)
    script.main(replace(config, resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert any(row["train/kl"] > 0 for row in read_metrics(tmp_path / "run")[1:])


def test_a_resumed_run_starts_from_the_base_it_began_with(toy_base, tmp_path):
    """Another checkpoint that has become the latest of the base's folder since changes nothing."""
    bases = tmp_path / "bases"
    shutil.copytree(toy_base("moe") / "checkpoint", bases)
    more = {"steps": 1, "lora_rank": 2, "reference_reset": 0}
    config = replace(config_of("moe", toy_base, tmp_path / "run", **more), checkpoint=bases)
    r1_zero.main(config)
    before, later = policy.origin(bases, None), bases / "step-999999"
    shutil.copytree(before, later)
    (bases / "latest").write_text("step-999999\n")
    assert policy.origin(bases, None) == later
    assert policy.origin(bases, checkpoint.latest(tmp_path / "run" / "checkpoint")) == before.resolve() != later


def test_more_prompts_than_problems_are_refused_before_anything_is_written(toy_base, tmp_path):
    with pytest.raises(ValueError, match="prompts = 100000: the task has [0-9]+ training problems"):
        r1_zero.main(config_of("moe", toy_base, tmp_path / "run", prompts=100000))
    assert not (tmp_path / "run").exists()
