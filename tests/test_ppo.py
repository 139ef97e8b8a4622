"""PPO at toy size: the update against formulas written out, resume to the bit, rewards from rules and from a model."""
import copy
import math
from dataclasses import replace

import pytest
import standin
import torch
from runs import assert_learns_nothing_unjudged, assert_same_run, plain_metrics, stop
from test_preference_pairs import assert_bad_option

from experiments import ppo
from minir1 import checkpoint, tasks
from minir1.judge import Answer
from minir1.log import read_metrics
from minir1.losses import kl_k1, kl_k3
from minir1.model import heads, hf
from minir1.model.heads import ScalarModel, ValueHead
from minir1.monitor import preflight
from minir1.policy import on_policy_check
from minir1.tokenizer import word_level

standin.register()  # before the first backward pass of the process
CPU = torch.device("cpu")
TOY = {"prompts": 4, "num_generations": 2, "max_completion_length": 16, "min_mixed": 0.0, "eval_answers": 1}
TOY |= {"eval_problems": 6}
PPO = ppo.Config(**TOY, steps=4, eval_every=2, value_warmup=1, warmup=1, beta=0.01, gae_lambda=0.9)


@pytest.fixture(scope="module")
def base(toy_base):
    """The checkpoint folder of an MoE that writes the tags and sometimes tries."""
    return toy_base("moe") / "checkpoint"


@pytest.fixture(scope="module")
def reward_folder(base, tmp_path_factory):
    """A reward model nobody has trained."""
    trunk, tokenizer = hf.load(checkpoint.latest(base))
    model = ScalarModel(trunk, ValueHead(32))
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("reward")
    heads.save(model, tokenizer, path)
    return path


@pytest.fixture(scope="module")
def sampled(base):
    """The policy, critics of both kinds, a rollout, and an estimate of it with another model as the reference."""
    model, tokenizer = hf.load(checkpoint.latest(base))
    rollout = ppo.act(model, tokenizer, tasks.load("countdown").problems("train")[:4], PPO, step=1)
    head = ValueHead(32)
    torch.nn.init.normal_(head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    critics = {"trunk": head, "own": ScalarModel(hf.load(checkpoint.latest(base))[0], copy.deepcopy(head))}
    rewards = torch.arange(8.0).view(4, 2).sin()
    values = ppo.state_values(model, head, rollout, 8192)
    ref_logp = rollout.logp + 0.1 * torch.randn(rollout.logp.shape, generator=torch.Generator().manual_seed(1))
    estimated = estimate(rewards, values, ref_logp.masked_fill(~rollout.mask, 0.0), rollout, PPO)
    return model, critics, rollout, rewards, estimated


def estimate(rewards, values, ref_logp, rollout, config):
    """From rewards [P, G] to advantages and returns."""
    return ppo.estimate(rewards, values, ref_logp, rollout, config)[1]


def step(sampled, kind="trunk", *, lr=1.0, frozen=False, estimated=None, **changes):
    """`learn` with plain gradient descent: (what was measured, how policy and critic moved)."""
    model, critics, rollout, _, own = sampled
    policy, critic = copy.deepcopy(model).requires_grad_(not frozen), copy.deepcopy(critics[kind])
    optimizers = [torch.optim.SGD(part.parameters(), lr=lr) for part in (policy, critic)]
    config = replace(PPO, **{"num_minibatches": 1, "grad_clip": 1e9, "critic": kind, **changes})
    measured = ppo.learn(policy, critic, optimizers, rollout, estimated or own, config, step=1)
    moves = [[(b - a).detach() for a, b in zip(old.parameters(), new.parameters())]
             for old, new in ((model, policy), (critics[kind], critic))]
    return measured, *moves


def assert_same(moves, others):
    scale = max(move.abs().max() for move in others)
    assert scale > 0
    for move, other in zip(moves, others):
        torch.testing.assert_close(move, other, atol=2e-5 * scale.item(), rtol=0)


# ---- the update --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trunk", "own"])
def test_no_result_depends_on_the_microbatch(sampled, kind):
    changes = {"num_minibatches": 2, "ent_coef": 0.1, "kl_in": "loss", "beta": 0.1, "value_clip": 0.2}
    whole, policy, critic = step(sampled, kind, lr=0.1, microbatch=10**6, **changes)
    assert min(whole[f"train/{name}"] for name in ("value_loss", "grad_norm", "value_grad_norm")) > 0
    for microbatch in (1, 80):
        measured, *others = step(sampled, kind, lr=0.1, microbatch=microbatch, **changes)
        assert_same(others[0], policy)
        assert_same(others[1], critic)
        assert measured == pytest.approx(whole, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", ["trunk", "own"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_stands_at_padding_is_not_learned_from(sampled, kind, value):
    model, critics, rollout, rewards, estimated = sampled
    changes = {"ent_coef": 0.1, "kl_in": "loss", "beta": 0.1, "value_clip": 0.2, "microbatch": 100}
    want = step(sampled, kind, **changes)
    other = estimated._replace(**{name: x.masked_fill(~rollout.mask, value) for name, x in estimated._asdict().items()})
    rollout = replace(rollout, logp=rollout.logp.masked_fill(~rollout.mask, value))
    found = step((model, critics, rollout, rewards, other), kind, **changes)
    assert found[0] == want[0]
    assert all(torch.equal(a, b) for moves, others in zip(found[1:], want[1:]) for a, b in zip(moves, others))


def apart(sampled):
    """The same rollout by an older policy and critic: no ratio is 1, no V is V_old."""
    model, critics, rollout, rewards, estimated = sampled
    generator = torch.Generator().manual_seed(2)
    log_ratio, ahead = (scale * torch.randn(rollout.logp.shape, generator=generator) for scale in (0.5, 0.3))
    rollout = replace(rollout, logp=rollout.logp - log_ratio * rollout.mask)
    return model, critics, rollout, rewards, estimated._replace(values=estimated.values - ahead * rollout.mask)


@pytest.mark.parametrize("moved", [False, True], ids=["ratio 1", "apart"])
@pytest.mark.parametrize("kind", ["trunk", "own"])
def test_the_gradient_is_that_of_the_objective_written_out(sampled, kind, moved):
    """-min(r A, clip(r) A), at most -c A, - c_H H + β k3 + c_V ½ max(…)², a mean over the tokens; the trunk gets all.

    Clips 0.1 and 0.3, c = 1.5, ε = 0.2 of the value: apart each binds for some token, at ratio 1 none does.
    """
    sampled = apart(sampled) if moved else sampled
    model, critics, rollout, _, estimated = sampled
    config = {"epsilon_low": 0.1, "epsilon_high": 0.3, "dual_clip": 1.5, "value_clip": 0.2}
    config |= {"ent_coef": 0.3, "kl_in": "loss", "beta": 0.2, "vf_coef": 0.7}
    measured, moves, critic_moves = step(sampled, kind, **config)
    policy, critic = copy.deepcopy(model), copy.deepcopy(critics[kind])
    logp, entropy = policy.logprob(rollout.tokens, lengths=rollout.length, mask=rollout.mask, entropy=True)
    hidden = policy.hidden(rollout.tokens, lengths=rollout.length)
    value = torch.nn.functional.pad(critic(hidden)[:, :-1], (1, 0)) if kind == "trunk" else critic.values(
        rollout.tokens, lengths=rollout.length)
    A, r = estimated.advantage, (logp - rollout.logp).exp()
    gain = torch.minimum(r * A, r.clamp(0.9, 1.3) * A)
    gain = torch.where(A < 0, torch.maximum(gain, 1.5 * A), gain)
    near = estimated.values + (value - estimated.values).clamp(-0.2, 0.2)
    error, near_error = (value - estimated.returns) ** 2, (near - estimated.returns) ** 2
    loss = -gain - 0.3 * entropy + 0.2 * kl_k3(logp, estimated.ref_logp)
    loss = loss + 0.7 * 0.5 * torch.maximum(error, near_error)
    loss[rollout.mask].mean().backward()
    assert_same(moves, [-p.grad for p in policy.parameters()])
    assert_same(critic_moves, [-p.grad for p in critic.parameters()])
    bounds = [(A > 0) & (r > 1.3), (A < 0) & (r < 0.9), (A < 0) & (r > 1.5)]
    assert [bool((bound & rollout.mask).any()) for bound in (*bounds, near_error > error + 1e-4)] == [moved] * 4
    assert measured["train/clip_fraction"] == pytest.approx(sum(bounds)[rollout.mask].float().mean().item())


def test_epochs_are_reshuffled(sampled, monkeypatch):
    drawn, real = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **more: drawn.append(real(*args, **more)) or drawn[-1])
    step(sampled, epochs=3, num_minibatches=2)
    step(sampled, epochs=3, num_minibatches=2)
    assert len(drawn) == 6 and len({tuple(order.tolist()) for order in drawn[:3]}) == 3
    assert all(torch.equal(a, b) for a, b in zip(drawn[:3], drawn[3:]))  # functions of seed, step and epoch


@pytest.mark.parametrize("kind", ["trunk", "own"])
def test_while_the_value_warms_up_the_policy_stays(sampled, kind):
    measured, policy, critic = step(sampled, kind, frozen=True)
    assert all(move.abs().max() == 0 for move in policy) and max(move.abs().max() for move in critic) > 0
    assert measured["train/grad_norm"] == 0 and measured["train/value_grad_norm"] > 0
    _, _, moving = step(sampled, kind)
    assert_same(critic, moving)  # what the critic learns is the same


@pytest.mark.parametrize("kind", ["trunk", "own"])
def test_fewer_answers_than_minibatches_are_as_many_updates(sampled, kind):
    """No update of an empty mini-batch, whose norms of 0 would be averaged in."""
    model, critics, rollout, rewards, estimated = sampled
    rows = torch.arange(2)
    few = rollout.select(rows)
    part = ppo.Estimate(*(x[rows, : few.tokens.shape[1]] for x in estimated))
    fewer = model, critics, few, rewards[:1], part
    enough, many = (step(fewer, kind, num_minibatches=count) for count in (2, 5))
    assert enough[0] == many[0] and enough[0]["train/value_grad_norm"] > 0


def test_entropy_is_computed_only_when_asked_for(sampled):
    model, critics, rollout, *_ = sampled
    for critic in critics.values():
        logp, entropy, value = ppo.forward(model, critic, rollout, entropy=True)
        torch.testing.assert_close(entropy, rollout.entropy, atol=1e-4, rtol=0)
        plain = ppo.forward(model, critic, rollout)
        assert len(plain) == 2 and torch.equal(plain[0], logp) and torch.equal(plain[1], value)


def test_estimates_by_hand(sampled):
    model, critics, rollout, rewards, _ = sampled
    values, mask = ppo.state_values(model, critics["trunk"], rollout, 60), rollout.mask
    torch.testing.assert_close(ppo.state_values(model, critics["own"], rollout, 8192), values)
    config = replace(PPO, gae_lambda=1.0, whiten_advantages=False, beta=0.0)
    estimated = estimate(rewards, values, rollout.logp, rollout, config)
    torch.testing.assert_close(estimated.returns, rewards.view(8, 1) * mask)
    torch.testing.assert_close(estimated.advantage, (rewards.view(8, 1) - values) * mask)
    other = rollout.logp - 0.1 * mask
    estimated = estimate(rewards, values, other, rollout, replace(config, beta=2.0))
    to_come = mask.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(kl_k1(rollout.logp, other), 0.1 * mask, atol=1e-6, rtol=0)
    torch.testing.assert_close(estimated.returns, (rewards.view(8, 1) - 0.2 * to_come) * mask, atol=1e-5, rtol=0)
    in_loss = estimate(rewards, values, other, rollout, replace(config, beta=2.0, kl_in="loss"))
    torch.testing.assert_close(in_loss.returns, rewards.view(8, 1) * mask)
    white = estimate(rewards, values, rollout.logp, rollout, replace(config, whiten_advantages=True)).advantage[mask]
    assert white.mean().abs() < 1e-6 and white.std() == pytest.approx(1)


def test_both_discounts_reach_the_estimate(sampled):
    """A_t = Σ_l (γλ)^l δ_{t+l} with γ = 0.9 and λ = 0.7, as a matrix of powers; nothing follows the last token."""
    model, critics, rollout, rewards, _ = sampled
    values, mask = ppo.state_values(model, critics["trunk"], rollout, 8192), rollout.mask
    config = replace(PPO, gamma=0.9, gae_lambda=0.7, whiten_advantages=False, beta=0.0)
    estimated = estimate(rewards, values, rollout.logp, rollout, config)
    last = torch.arange(mask.shape[1]) == rollout.length.unsqueeze(1) - 1
    to_come = torch.nn.functional.pad((values * mask)[:, 1:], (0, 1))
    delta = (rewards.view(8, 1) * last + 0.9 * to_come - values) * mask
    t = torch.arange(mask.shape[1])
    powers = (0.63 ** (t - t.unsqueeze(1)).clamp(min=0)).triu()
    want = delta @ powers.T * mask
    torch.testing.assert_close(estimated.advantage, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(estimated.returns, (want + values) * mask, atol=1e-5, rtol=1e-5)


def test_a_wrong_sampler_stops_the_run(sampled, base, tmp_path, monkeypatch):
    model, _, rollout, *_ = sampled
    assert on_policy_check(model, rollout, 8192, most=0.02)["train/ratio_deviation"] < 1e-4
    real = ppo.act

    def wrong(*args, **more):
        rollout = real(*args, **more)
        return replace(rollout, logp=rollout.logp - 0.2 * rollout.mask)

    monkeypatch.setattr(ppo, "act", wrong)
    with pytest.raises(RuntimeError, match="sampler and trainer do not compute the same policy"):
        ppo.main(replace(PPO, checkpoint=base, out=tmp_path))


def test_the_learned_reward_scores_whole_rows(base, reward_folder, sampled):
    rollout = sampled[2]
    tokenizer = hf.load(checkpoint.latest(base))[1]
    config = replace(PPO, reward=f"model:{reward_folder}")
    learned = ppo.load_reward(config, tokenizer, CPU)
    scores = ppo.reward([[]] * 4, rollout, learned, replace(config, microbatch=60))
    torch.testing.assert_close(scores.flatten(), learned.score(rollout.tokens, lengths=rollout.length))
    assert scores.std() > 0.1 and ppo.load_reward(PPO, tokenizer, CPU) is None
    with pytest.raises(ValueError, match="reward model's tokenizer is not that of the policy"):
        ppo.load_reward(config, word_level(("other",), 24), CPU)
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM, .*no scalar model"):
        ppo.load_reward(replace(config, reward=f"model:{base}"), tokenizer, CPU)


# ---- runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, dtype", [("trunk", "float32"), ("own", "float32"), ("own", "bfloat16")])
def test_a_killed_run_resumes_to_the_same_bits(base, tmp_path, monkeypatch, kind, dtype):
    config = replace(PPO, checkpoint=base, critic=kind, dtype=dtype, max_ratio_deviation=0.1)
    ppo.main(replace(config, out=tmp_path / "whole"))
    killed = replace(config, out=tmp_path / "killed")
    stop(monkeypatch, "ppo", killed, "experiments.ppo", "learn", 4)
    assert [row["step"] for row in read_metrics(killed.out)] == [0, 1, 2, 3]
    ppo.main(replace(killed, resume=True))
    assert_same_run(killed.out, tmp_path / "whole")
    whole, path = plain_metrics(tmp_path / "whole"), checkpoint.latest(tmp_path / "whole" / "checkpoint")
    state = checkpoint.load_state(path)
    assert {"critic", "optimizer", "value_optimizer"} < state.keys() and len(whole) == 5
    weights = [hf.load(folder)[0].state_dict() for folder in (path, checkpoint.latest(base))]
    assert any(not torch.equal(weights[0][name].float(), weights[1][name]) for name in weights[0])
    assert [row["train/grad_norm"] > 0 for row in whole[1:]] == [False, True, True, True]  # after the warm-up
    assert whole[1]["train/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert state["critic"]["weight" if kind == "trunk" else "head.weight"].abs().max() > 0


@pytest.mark.parametrize("kind", ["trunk", "own"])
def test_a_run_on_another_device_is_that_of_the_cpu(base, reward_folder, tmp_path, kind):
    more = {"critic": kind, "reward": f"model:{reward_folder}" if kind == "own" else "rules", "steps": 2}
    for device in ("cpu", "standin"):
        ppo.main(replace(PPO, checkpoint=base, device=device, out=tmp_path / device, **more))
    assert_same_run(tmp_path / "cpu", tmp_path / "standin")


def test_a_run_against_a_reward_model(base, reward_folder, tmp_path, monkeypatch):
    explained, real = [], ppo.explained_variance
    monkeypatch.setattr(ppo, "explained_variance", lambda *args: explained.append(args) or real(*args))
    config = replace(PPO, checkpoint=base, reward=f"model:{reward_folder}", steps=2, epochs=2)
    config = replace(config, num_generations=1, prompts=8)
    last = ppo.main(replace(config, out=tmp_path, beta=0.0, dual_clip=3.0, ent_coef=0.01, learning_rate=1e-2))
    assert last["train/proxy"] == last["train/reward"] and last["train/gold"] == last["train/accuracy"]
    assert last["train/proxy"] != last["train/gold"] and "train/kl" not in last and last["train/mixed_groups"] == 0
    values, followed, mask = explained[1]  # λ = 0.9; the λ-returns would hold V, and differ from token to token
    first = followed.gather(1, mask.int().argmax(1, keepdim=True))
    torch.testing.assert_close(followed, first * mask)
    assert values[mask].std() > 0 and first.mean().item() == pytest.approx(last["train/proxy"])


def test_a_step_in_which_no_answer_was_judged_is_not_learned_from(base, tmp_path, monkeypatch):
    row = assert_learns_nothing_unjudged(monkeypatch, ppo, replace(PPO, checkpoint=base, value_warmup=0), tmp_path)
    unknown = {"train/reward", "train/accuracy", "train/grad_norm", "train/value_loss", "train/explained_variance"}
    assert not unknown & row.keys()


def test_a_learned_reward_needs_no_verdict(base, reward_folder, tmp_path, monkeypatch):
    config = replace(PPO, checkpoint=base, value_warmup=0, reward=f"model:{reward_folder}", steps=1, out=tmp_path)
    real = ppo.judge_rollout
    unjudged = lambda *args: [[replace(a, right=False, unjudged=True) for a in group] for group in real(*args)]
    monkeypatch.setattr(ppo, "judge_rollout", unjudged)
    row = ppo.main(config)
    assert row["train/reward"] == row["train/proxy"] and row["train/value_grad_norm"] > 0
    assert not {"train/accuracy", "train/gold"} & row.keys()


def test_one_answer_a_problem_is_compared_with_all(capsys):
    def answers(*right):
        return [[Answer("", 1, False, r, True)] for r in right]

    assert preflight(answers(True, False, False), 0.5)["preflight/mixed_groups"] == 1
    with pytest.raises(ValueError, match="only 0.0% of the groups hold both right and wrong answers"):
        preflight(answers(True, True), 0.5)


@pytest.mark.parametrize(
    "line, message",
    [
        ("--gamma 2", "gamma = 2.0: 0 to 1"),
        ("--gae-lambda -1", "gae_lambda = -1.0: 0 to 1"),
        ("--value-warmup 40", "value_warmup = 40: 0 to 39, below steps"),
        ("--value-clip 0", "value_clip = 0.0: above 0"),
        ("--epsilon-high -0.1", "epsilon_high = -0.1: at least 0"),
        ("--dual-clip 1", "dual_clip = 1.0: above 1"),
        ("--reward model:", "reward = 'model:': rules, or model:PATH"),
        ("--reward rule", "reward = 'rule': rules, or model:PATH"),
        ("--reward model:x --format-weight 0", "format_weight = (1.0, 0.0): of the rules; model:x has none"),
        ("--critic none", "trunk"),
        ("--num-generations 0", "num_generations = 0: at least 1"),
    ],
)
def test_bad_options_are_named(line, message, capsys):
    assert_bad_option(ppo, line, message, capsys)
