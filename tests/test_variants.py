"""REINFORCE and the copies in experiments/variants: they run, they are short, their gradients are what they say."""

import copy
import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import pretrain, reinforce, rl_common
from experiments.tools import variants
from experiments.variants import dapo
from minir1 import checkpoint
from minir1.advantages import group_advantages
from minir1.judge import Answer
from minir1.log import read_metrics
from minir1.losses import grpo_sequence, gspo
from minir1.model import hf
from minir1.model.config import ModelConfig
from minir1.rollout import BUDGET, Rollout
from minir1.tasks import countdown
from minir1.tasks.countdown_corpus import Mix

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "experiments"

SHAPE = ModelConfig(dim=32, layers=2, heads=2, kv_lora=16, nope=8, rope=8, v_dim=16, ffn=64, experts=4, expert_ffn=16)
MIX = Mix(facts=0, untagged=0, at_once=0.5, at_once_right=1, orderly=0, forgetful=0, patient=0, give_up=1)
TOY = {"prompts": 4, "answers": 4, "max_tokens": 24, "min_mixed": 0.0, "eval_every": 2, "eval_answers": 1, "warmup": 0}
OWN = {"dapo": {"overlong_buffer": 8, "rounds": 2}}  # settings that the toy size needs
ALL = ["reinforce", *variants.COPIES]
NAMES = {"reinforce": "experiments.reinforce"} | {name: f"experiments.variants.{name}" for name in variants.COPIES}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A toy that writes the tags and sometimes tries."""
    out = tmp_path_factory.mktemp("base")
    training = {"steps": 60, "batch": 768, "muon_lr": 0.02, "adam_lr": 0.02, "warmup": 5, "checkpoint_every": 60}
    pretrain.main(pretrain.Config(model=SHAPE, mix=MIX, out=out, **training))
    return out / "checkpoint"


def config_of(name: str, **changes):
    return importlib.import_module(NAMES[name]).Config(**{**TOY, **OWN.get(name, {}), **changes})


@pytest.mark.parametrize("name", ALL)
def test_every_variant_runs_and_logs_what_the_others_log(base, tmp_path, name, monkeypatch):
    script, held_out = importlib.import_module(NAMES[name]), countdown.held_out
    monkeypatch.setattr(countdown, "held_out", lambda level, part, _: held_out(level, part, 8))
    last = script.main(config_of(name, checkpoint=base, steps=2, out=tmp_path / "run"))
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2] and "eval/pass@1" in last
    shared = "reward accuracy form length entropy tries false_yes mixed_groups sampled_tokens grad_norm"
    assert {f"train/{key}" for key in shared.split()} <= rows[1].keys()
    assert {"time/rollout_s", "time/update_s", "perf/rollout_tok_s"} <= rows[1].keys()
    assert rows[1]["train/ratio_deviation_max"] < (2.0 if name == "tis" else 1e-3)
    start, end = (hf.load(checkpoint.latest(p))[0].state_dict() for p in (base, tmp_path / "run" / "checkpoint"))
    assert any(not torch.equal(start[key], end[key]) for key in start)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["checkpoint"] == str(base) and saved["answers"] == 4


def test_a_variant_is_a_short_copy():
    """None changes more than 60 lines, and each changes something that its original has."""
    for name in variants.COPIES:
        assert 5 < variants.changed(name) <= 60, name
        original = variants.code(SCRIPTS / f"{variants.COPIES[name]}.py")
        assert all(line[1:] in original for line in variants.difference(name) if line.startswith("-"))
    with pytest.raises(ValueError, match="unknown variant 'ppo'; known are rloo"):
        variants.main("ppo")


def test_the_difference_leaves_out_docstrings_and_imports_of_the_shared_part(capsys):
    variants.main("dr_grpo")
    shown = capsys.readouterr().out
    assert "+        advantage = group_centered(rewards).flatten()" in shown.splitlines()
    assert "noqa" not in shown and "arXiv" not in shown and "sys.path" not in shown


# ---- gradients: at ratio 1 each is -Σ_i,t w_it A_it ∇ log π, with w and A by hand; off it, the objective is ---------


@pytest.fixture(scope="module")
def sampled(base):
    """A rollout of the toy base, rewards that differ within every group, and the base itself."""
    model, tokenizer = hf.load(checkpoint.latest(base))
    problems = [p for p in countdown.problems("default") if countdown.split(p) == "train"][:4]
    rollout = rl_common.act(model, tokenizer, problems, config_of("reinforce"), step=1)
    assert rollout.length.unique().numel() > 1
    return model, rollout, torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def learned(name: str, model, rollout, advantage, old=None, **changes):
    """`learn` with plain gradient descent, less the norm clip: (what was measured, how the weights moved)."""
    policy, script = copy.deepcopy(model), importlib.import_module(NAMES[name])
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    config = config_of(name, minibatches=1, grad_clip=1e9, kl=0.0, **changes)
    if name == "tis":
        old = rollout.logp if old is None else old
        measured = script.learn(policy, None, optimizer, rollout, old, advantage, config)
    elif variants.COPIES.get(name, "reinforce") == "reinforce":
        measured = script.learn(policy, optimizer, rollout, advantage, config)
    else:
        measured = script.learn(policy, None, optimizer, rollout, advantage, config)
    return measured, [(b - a).detach() for a, b in zip(model.parameters(), policy.parameters())]


def moved(*arguments, **changes) -> list[torch.Tensor]:
    """How `learn` moves the weights."""
    return learned(*arguments, **changes)[1]


def by_hand(model, rollout, coefficient) -> list[torch.Tensor]:
    """The gradient of Σ coefficient · log π."""
    policy = copy.deepcopy(model)
    logp = policy.logprob(rollout.tokens, lengths=rollout.length, mask=rollout.mask)
    (coefficient * logp).sum().backward()
    return [p.grad for p in policy.parameters()]


def assert_same(moves, others):
    scale = max(move.abs().max() for move in others)
    assert scale > 0
    for move, other in zip(moves, others):
        torch.testing.assert_close(move, other, atol=3e-5 * scale.item(), rtol=0)


@pytest.mark.parametrize("microbatch", [10**6, 100])
@pytest.mark.parametrize("name", [name for name in ALL if name not in ("reinforce", "rloo", "reinforce_pp")])
def test_the_gradient_is_the_one_that_is_claimed(sampled, name, microbatch):
    model, rollout, rewards = sampled
    advantage = group_advantages(rewards).flatten()
    lengths = rollout.mask.sum(1, keepdim=True)
    weight = {
        "dr_grpo": torch.tensor(1 / (16 * TOY["max_tokens"])),
        "dapo": 1 / lengths.sum(),
        "cispo": 1 / lengths.sum(),
        "gspo": 1 / (16 * lengths),
        "tis": 1 / (16 * lengths),
        "sequence_grpo": torch.tensor(1 / 16),
    }[name]
    found = moved(name, model, rollout, advantage, microbatch=microbatch)
    assert_same(found, by_hand(model, rollout, weight * advantage.unsqueeze(1) * rollout.mask))


LOW, HIGH = 0.02, 0.5  # far from each other and from 0.2
OFF = {"clip_low": LOW, "clip_high": HIGH, "max_ratio_deviation": 1e9}


def drifted(rollout, whole: bool = False):
    """The rollout as another policy would have drawn it: no ratio is 1, and an answer's mean log r_t is the given one.

    whole: its sum is, so that the ratio of the whole answer stays near 1.
    """
    lengths = rollout.mask.sum(1, keepdim=True)
    generator = torch.Generator().manual_seed(3)  # some answer would be clipped by 0.2 and is not, or the other way
    given = torch.linspace(-0.6, 0.6, 16)[torch.randperm(16, generator=generator)].unsqueeze(1)
    noise = 0.3 * torch.randn(rollout.logp.shape, generator=generator) * rollout.mask
    log_ratio = (given + noise - noise.sum(1, keepdim=True) / lengths) * rollout.mask
    return replace(rollout, logp=rollout.logp - (log_ratio / lengths if whole else log_ratio))


def objective(name: str, logp, old, A, mask):
    """What a script maximises at each token, before its weights, and where the ratio is clipped; [B, T] each."""
    log_ratio = (logp - old) * mask
    if name == "gspo":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    if name == "sequence_grpo":
        log_ratio = log_ratio.sum(1, keepdim=True)
    r = log_ratio.exp().expand_as(logp)
    bounded = r.clamp(1 - LOW, 1 + HIGH)
    if name == "cispo":
        return bounded.detach() * A * logp, bounded != r
    return torch.minimum(r * A, bounded * A), bounded * A < r * A


@pytest.mark.parametrize("name", [name for name in ALL if variants.COPIES.get(name) == "r1_zero"])
def test_away_from_ratio_one_the_objective_is_the_one_that_is_claimed(sampled, name):
    model, rollout, rewards = sampled
    rollout, mask = drifted(rollout, whole=name == "sequence_grpo"), rollout.mask
    advantage, old, correction, changes = group_advantages(rewards).flatten(), rollout.logp, 1.0, OFF
    if name == "tis":  # its sampler is neither the old policy nor the new one, and no mismatch stops it
        mismatch = 0.5 * torch.rand(old.shape, generator=torch.Generator().manual_seed(6)) * mask
        rollout, correction = replace(rollout, logp=old - mismatch), mismatch.exp().clamp(max=1.3)
        changes = {"clip_low": LOW, "clip_high": HIGH, "cap": 1.3}
    lengths, policy = mask.sum(1, keepdim=True), copy.deepcopy(model)
    weight = {"dr_grpo": 1 / (16 * TOY["max_tokens"]), "dapo": 1 / lengths.sum(), "cispo": 1 / lengths.sum()}
    weight = weight.get(name, 1 / (16 * lengths)) * mask
    logp = policy.logprob(rollout.tokens, lengths=rollout.length, mask=mask)
    A = advantage.unsqueeze(1).expand_as(logp)
    gain, clipped = objective(name, logp, old, A, mask)
    assert all((clipped & mask)[side].any() for side in (advantage > 0, advantage < 0))
    (weight * correction * gain).sum().backward()
    measured, found = learned(name, model, rollout, advantage, old, microbatch=100, **changes)
    assert_same(found, [p.grad for p in policy.parameters()])
    assert measured["train/clip_fraction"] == pytest.approx((weight * clipped).sum().item())


@pytest.mark.parametrize("name", ["reinforce", "rloo", "reinforce_pp"])
@pytest.mark.parametrize("microbatch, off", [(10**6, False), (100, False), (100, True)])
def test_the_gradient_of_those_with_an_advantage_a_token(sampled, name, microbatch, off):
    """With a reference at hand: the KL is in the reward, token by token or once an answer; and with an entropy bonus.

    Off ratio 1, where only REINFORCE++ has a ratio, the gradient of the others stays what it is.
    """
    model, rollout, rewards = sampled
    rollout = drifted(rollout) if off else rollout
    discount = {} if name == "rloo" else {"gamma": 0.9}
    script, config = importlib.import_module(NAMES[name]), config_of(name, kl=0.5, **discount)
    ref_logp = rollout.logp - 0.3 * torch.rand(rollout.logp.shape, generator=torch.Generator().manual_seed(1))
    advantage = script.advantages(rewards, ref_logp, rollout, config)
    k1 = (rollout.logp - ref_logp) * rollout.mask
    if name == "rloo":
        scores = rewards - 0.5 * k1.sum(1).view(4, 4)
        others = (scores.sum(1, keepdim=True) - scores) / 3
        want = (scores - others).flatten().unsqueeze(1) * rollout.mask
    else:
        t = torch.arange(k1.shape[1])
        last = t == rollout.length.unsqueeze(1) - 1
        powers = (0.9 ** (t - t.unsqueeze(1)).clamp(min=0)).triu()  # Σ_l γ^l r_{t+l}
        want = (rewards.flatten().unsqueeze(1) * last - 0.5 * k1) @ powers.T * rollout.mask
    if name == "reinforce_pp":
        chosen = want[rollout.mask]
        want = (want - chosen.mean()) / chosen.std() * rollout.mask
    torch.testing.assert_close(advantage, want, atol=2e-5, rtol=1e-4)
    weight = 1 / rollout.mask.sum() if name == "reinforce_pp" else 1 / (16 * TOY["max_tokens"])
    clips = {"clip_low": LOW, "clip_high": HIGH} if name == "reinforce_pp" else {}
    changes = {"microbatch": microbatch, "entropy_weight": 0.3, "max_ratio_deviation": 1e9, **clips}
    measured, found = learned(name, model, rollout, advantage, **changes)
    policy, mask = copy.deepcopy(model), rollout.mask
    logp, entropy = policy.logprob(rollout.tokens, lengths=rollout.length, mask=mask, entropy=True)
    gain, clipped = want * logp, torch.zeros_like(mask)
    if name == "reinforce_pp":
        gain, clipped = objective(name, logp, rollout.logp, want, mask)
        assert [(clipped & mask & side).any().item() for side in (want > 0, want < 0)] == [off] * 2
    (weight * (gain + 0.3 * entropy) * mask).sum().backward()
    assert_same(found, [p.grad for p in policy.parameters()])
    assert measured.get("train/clip_fraction", 0.0) == pytest.approx((weight * clipped * mask).sum().item())


def test_the_weight_of_truncated_importance_mends_the_ratio(sampled):
    """A sampler that gave half the probability of the trainer to every token: weight 2 at most C, whatever it took."""
    model, rollout, _ = sampled
    advantage = torch.ones(16)
    other = replace(rollout, logp=rollout.logp - math.log(2) * rollout.mask)
    script = importlib.import_module("experiments.variants.tis")

    def step(cap: float):
        policy = copy.deepcopy(model)
        config = config_of("tis", minibatches=1, grad_clip=1e9, kl=0.0, cap=cap)
        script.learn(policy, None, torch.optim.SGD(policy.parameters(), lr=1.0), other, rollout.logp, advantage, config)
        return [(b - a).detach() for a, b in zip(model.parameters(), policy.parameters())]

    plain = moved("tis", model, rollout, advantage)
    assert_same(step(4.0), [2 * move for move in plain])
    assert_same(step(1.5), [1.5 * move for move in plain])


def test_what_is_replayed_in_the_update_is_replayed_in_the_score_before_it(base, tmp_path, monkeypatch):
    """Every token sent to other experts than the trainer would choose: π_old and π are still one policy at first."""
    script = importlib.import_module("experiments.variants.tis")
    act, held_out, checked = rl_common.act, countdown.held_out, []

    def elsewhere(*arguments, **more):
        rollout = act(*arguments, **more)
        return replace(rollout, routes=torch.where(rollout.routes < 0, -1, (rollout.routes + 1) % SHAPE.experts))

    def learn(model, reference, optimizer, rollout, old, *rest):
        seen = {"lengths": rollout.length, "mask": rollout.mask}
        with torch.no_grad():
            torch.testing.assert_close(old, model.logprob(rollout.tokens, **seen, routes=rollout.routes))
            checked.append((old - model.logprob(rollout.tokens, **seen)).abs().max().item())
        return real(model, reference, optimizer, rollout, old, *rest)

    real = script.learn
    monkeypatch.setattr(script, "act", elsewhere)
    monkeypatch.setattr(script, "learn", learn)
    monkeypatch.setattr(countdown, "held_out", lambda level, part, _: held_out(level, part, 8))
    script.main(config_of("tis", checkpoint=base, steps=1, out=tmp_path / "run", replay_routes=True))
    assert len(checked) == 1 and checked[0] > 1e-3


# ---- what only one of them has ------------------------------------------------------------------------------------


def test_the_baselines_of_reinforce():
    rewards = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    none, batch, moving = (reinforce.Baseline(reinforce.Config(baseline=name)) for name in ("none", "batch", "moving"))
    assert torch.equal(none.subtract(rewards), rewards) and torch.equal(batch.subtract(rewards), rewards - 1)
    assert torch.equal(moving.subtract(rewards), rewards) and moving.average == 1.0  # nothing is known at first
    torch.testing.assert_close(moving.subtract(rewards + 1), rewards + 1 - 1.0)
    assert moving.average == pytest.approx(0.9 * 1 + 0.1 * 2)
    other = reinforce.Baseline(moving.config)
    other.load_state_dict(moving.state_dict())
    assert other.average == moving.average
    with pytest.raises(ValueError, match="gamma = 2.0, baseline_decay = 0.9: 0 to 1"):
        reinforce.Config(gamma=2.0)


def test_reinforce_goes_on_to_the_same_bits_with_its_baseline(base, tmp_path, monkeypatch):
    held_out = countdown.held_out
    monkeypatch.setattr(countdown, "held_out", lambda level, part, _: held_out(level, part, 8))
    config = config_of("reinforce", checkpoint=base, steps=4, baseline="moving", entropy_weight=0.01, gamma=0.99)
    reinforce.main(replace(config, out=tmp_path / "whole"))
    learn = reinforce.learn

    def stop(*arguments):
        if arguments[-1] == 4:  # the step
            raise KeyboardInterrupt
        return learn(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reinforce, "learn", stop)
        reinforce.main(replace(config, out=tmp_path / "run"))
    reinforce.main(replace(config, out=tmp_path / "run", resume=True))
    whole, run = (checkpoint.latest(tmp_path / name / "checkpoint") for name in ("whole", "run"))
    assert (whole / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    a, b = checkpoint.load_state(whole), checkpoint.load_state(run)
    assert a["baseline"]["average"] == b["baseline"]["average"] is not None


def dapo_draws(monkeypatch, accuracies: list[list[int]]):
    """`refill` of dapo.py over made-up rollouts: how many of 2 answers are right, for every group of every round."""
    config = config_of("dapo", prompts=len(accuracies[0]), answers=2, minibatches=1, rounds=len(accuracies))
    count = len(accuracies[0])
    calls = []  # (problems, step, rows) of every round

    def act(model, tokenizer, problems, config, step, rows, **_):
        calls.append((problems, step, rows.tolist()))
        rows = count * 2
        mask = torch.tensor([[False, True, True]]).repeat(rows, 1)
        zeros = torch.zeros(rows, 3)
        tokens = torch.full((rows, 3), len(calls))
        full = torch.full((rows,), 3)
        group = torch.arange(count).repeat_interleave(2)
        return Rollout(tokens, torch.ones_like(full), full, mask, zeros, zeros, full * 0, group, 1.0)

    def judged(rollout, *_):
        right = accuracies[len(calls) - 1]
        return [[Answer("", 2, False, i < n, True) for i in range(2)] for n in right]

    monkeypatch.setattr(dapo, "act", act)
    monkeypatch.setattr(dapo, "judge_rollout", judged)
    found = dapo.refill(None, None, config, 3, rl_common.Clock(), mixed=False)
    return calls, *found


def test_dapo_stops_as_soon_as_its_groups_are_mixed(monkeypatch):
    calls, problems, rollout, answers, spent = dapo_draws(monkeypatch, [[1, 1], [1, 1]])
    assert len(calls) == 1 and spent["train/rounds"] == 1 and spent["train/kept"] == 1.0
    assert spent["train/sampled_tokens"] == 8 and len(problems) == 2 and rollout.group.tolist() == [0, 0, 1, 1]


def test_dapo_refills_and_counts_what_it_throws_away(monkeypatch):
    """First round: one mixed of three; second: all mixed. Kept: the mixed one, then two of the second round."""
    calls, problems, rollout, answers, spent = dapo_draws(monkeypatch, [[0, 1, 2], [1, 1, 1], [1, 1, 1]])
    (first, *one), (second, *two) = calls  # rounds of a step, each with problems and noise of its own
    assert one == [3, [0, 1, 2, 3, 4, 5]] and two == [3, [6, 7, 8, 9, 10, 11]]
    assert not any(problem in first for problem in second) and problems == [first[1], *second[:2]]
    assert spent["train/rounds"] == 2 and spent["train/sampled_tokens"] == 2 * 12 and spent["train/kept"] == 0.5
    assert spent["train/accuracy"] == pytest.approx(6 / 12)  # of all that was drawn
    assert rollout.tokens[:, 0].tolist() == [1, 1, 2, 2, 2, 2] and rollout.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert all(len({a.right for a in group}) == 2 for group in answers)


def test_dapo_gives_up_after_its_rounds(monkeypatch):
    calls, problems, rollout, answers, spent = dapo_draws(monkeypatch, [[0, 1], [2, 2]])
    assert len(calls) == 2 and len(answers) == 2
    assert [len({a.right for a in group}) for group in answers] == [2, 1]  # filled up with one that carries nothing


def test_dapo_makes_long_answers_pay():
    config = config_of("dapo", max_tokens=100, overlong_buffer=20)
    answers = [[Answer("", n, n == 100, True, False) for n in (50, 90, 100)]]
    torch.testing.assert_close(dapo.judge(answers, config), torch.tensor([[1.0, 0.5, 0.0]]))


def test_truncated_answers_can_be_left_out_of_a_variant(sampled):
    model, rollout, rewards = sampled
    assert (rollout.stop == BUDGET).any()
    advantage = group_advantages(rewards).flatten()
    cut = torch.where(rollout.stop == BUDGET, advantage + 5, advantage)
    a, b = (moved("dr_grpo", model, rollout, x, mask_truncated=True) for x in (advantage, cut))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_dapo_refuses_what_cannot_be_refilled_or_penalised():
    for wrong in ({"rounds": 0}, {"overlong_buffer": 0}, {"overlong_buffer": 25}):
        with pytest.raises(ValueError, match="at least 1, and 1 to max_tokens = 24"):
            config_of("dapo", **wrong)


@pytest.mark.parametrize("name", ["gspo", "sequence_grpo"])
def test_an_answer_is_clipped_where_it_has_no_gradient(name):
    """The fraction that is logged is of the tokens that the loss of their answer leaves alone."""
    script = importlib.import_module(NAMES[name])
    config = config_of(name, clip_low=0.3, clip_high=0.3)
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(8) < torch.randint(1, 9, (200, 1), generator=generator)
    old = -torch.rand(200, 8, generator=generator) * mask
    logp = (old + 0.5 * torch.randn(200, 8, generator=generator) * mask).requires_grad_()
    advantage = torch.randn(200, 1, generator=generator).expand(200, 8)
    loss = {"gspo": gspo, "sequence_grpo": grpo_sequence}[name](logp, old, advantage, 0.3, 0.3, mask)
    (slope,) = torch.autograd.grad((mask * loss).sum(), logp)
    more = (mask,) if name == "gspo" else ()
    clipped = script.whole_is_clipped(logp, old, advantage, *more, config)
    assert torch.equal((clipped & mask), (slope == 0) & mask) and 0.05 < clipped.float().mean() < 0.95
