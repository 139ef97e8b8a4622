"""REINFORCE and the copies in experiments/variants: they run, they are short, their gradients are what they say."""

import copy
import importlib
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import standin
import torch
import tyro
from runs import assert_equal_bits, assert_learns_nothing_unjudged, assert_same_run, plain_metrics, stop
from toys import MOE

from experiments import r1_zero, reinforce
from experiments.tools import variants
from experiments.variants import dapo, ema_reference, hybrid, replayed_routes, tis
from minir1 import chat_data, checkpoint, tasks
from minir1.advantages import group_advantages
from minir1.device import pick
from minir1.judge import Answer
from minir1.log import read_metrics
from minir1.losses import grpo_sequence, gspo
from minir1.model import hf
from minir1.model.heads import ValueHead
from minir1.monitor import Clock
from minir1.policy import on_policy_check
from minir1.rollout import BUDGET, Rollout

standin.register()  # before the first backward pass of the process
SCRIPTS = Path(__file__).parent.parent / "experiments"
TOY = {"prompts": 4, "num_generations": 4, "max_completion_length": 32, "min_mixed": 0.0, "warmup": 0}
TOY |= {"eval_every": 2, "eval_answers": 1, "eval_problems": 6}
OWN = {"dapo": {"overlong_buffer": 8, "rounds": 2}, "hybrid": {"alpha": 1.0}}  # settings that the toy size needs
ALL = ["reinforce", *variants.COPIES]
NAMES = {"reinforce": "experiments.reinforce"} | {name: f"experiments.variants.{name}" for name in variants.COPIES}


@pytest.fixture(scope="module")
def base(toy_base):
    """The checkpoint folder of a toy that writes the tags and sometimes tries."""
    return toy_base("moe") / "checkpoint"


def config_of(name: str, **changes):
    return importlib.import_module(NAMES[name]).Config(**{**TOY, **OWN.get(name, {}), **changes})


@pytest.mark.parametrize("name", ALL)
def test_every_variant_runs_and_logs_what_the_others_log(base, tmp_path, name):
    script = importlib.import_module(NAMES[name])
    last = script.main(config_of(name, checkpoint=base, steps=2, out=tmp_path / "run"))
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2] and "eval/pass@1" in last
    shared = "reward accuracy format length entropy mixed_groups sampled_tokens grad_norm"
    assert {f"train/{key}" for key in shared.split()} <= rows[1].keys()
    assert {"behaviour/tries", "behaviour/false_yes", "time/rollout_s", "time/update_s"} <= rows[1].keys()
    assert rows[1]["perf/rollout_tok_s"] > 0
    assert 0 <= rows[1]["train/ratio_deviation"] < (0.1 if name == "tis" else 1e-4)
    start, end = (hf.load(checkpoint.latest(p))[0].state_dict() for p in (base, tmp_path / "run" / "checkpoint"))
    assert any(not torch.equal(start[key], end[key]) for key in start)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["checkpoint"] == str(base) and saved["num_generations"] == 4


def test_a_variant_is_a_short_copy():
    """None needs more than 60 lines to be told from its original, and each changes something that this has."""
    for name in variants.COPIES:
        assert len(variants.difference(name)) <= 60, name
        original = variants.code(SCRIPTS / f"{variants.COPIES[name]}.py")
        assert all(line[1:] in original for line in variants.difference(name) if line.startswith("-"))
        copied = "\n".join(variants.code(SCRIPTS / "variants" / f"{name}.py"))
        assert not any(option in copied for option in variants.OPTIONS if option != "reference.load_state_dict")


def test_the_difference_leaves_out_docstrings_and_names_the_function(capsys):
    variants.main(variants.Config("dr_grpo"))
    lines = capsys.readouterr().out.splitlines()
    new = "+        advantage = group_centered(rewards).flatten().to(device)"
    assert lines[lines.index(new) - 2] == "@@ def main" and lines[0] == "@@ imports"
    assert not any("arXiv" in line or '"""' in line or not line[1:].strip() for line in lines)


def test_the_commands_in_the_docstrings_are_understood():
    for name in variants.COPIES:
        script = importlib.import_module(NAMES[name])
        (line,) = re.findall(r"^ +python -m (.*)$", script.__doc__, re.M)
        module, *args = shlex.split(line)
        assert module == NAMES[name] and tyro.cli(script.Config, args=args).out == script.Config.out


# ---- gradients: at ratio 1 each is -Σ_i,t w_it A_it ∇ log π, with w and A by hand; off it, the objective is ---------


@pytest.fixture(scope="module")
def sampled(base):
    """A rollout of the toy base, rewards that differ within every group, and the base itself."""
    model, tokenizer = hf.load(checkpoint.latest(base))
    problems = tasks.load("countdown").problems("train")[:4]
    rollout = replayed_routes.act(model, tokenizer, problems, config_of("replayed_routes"), step=1)
    assert rollout.length.unique().numel() > 1
    return model, rollout, torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def learned(name: str, model, rollout, advantage, old=None, **changes):
    """`learn` with plain gradient descent, less the norm clip: (its metrics, how the weights moved)."""
    policy, script = copy.deepcopy(model), importlib.import_module(NAMES[name])
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    reference = () if variants.COPIES.get(name, "reinforce") == "reinforce" else (None,)
    more = {"tis": (rollout.logp if old is None else old,), "hybrid": (changes.pop("documents", []),)}.get(name, ())
    if name == "self_check":
        head = changes.pop("head", ValueHead(model.config.dim))
        more = head, torch.optim.SGD(head.parameters(), lr=1.0), changes.pop("right", (advantage > 0).float())
    config = config_of(name, **{"num_minibatches": 1, "grad_clip": 1e9, "beta": 0.0, **changes})
    metrics = script.learn(policy, optimizer, rollout, advantage, *reference, config, 1, *more)
    return metrics, [(b - a).detach() for a, b in zip(model.parameters(), policy.parameters())]


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


@pytest.mark.parametrize("name", [name for name in ALL if variants.COPIES.get(name) == "r1_zero"])
def test_epochs_are_reshuffled(sampled, monkeypatch, name):
    model, rollout, rewards = sampled
    drawn, real = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **more: drawn.append(real(*args, **more)) or drawn[-1])
    learned(name, model, rollout, group_advantages(rewards).flatten(), epochs=3)
    assert len({tuple(order.tolist()) for order in drawn}) == len(drawn) == 3


@pytest.mark.parametrize("microbatch", [10**6, 100])
@pytest.mark.parametrize("name", [name for name in ALL if name not in ("reinforce", "rloo", "reinforce_pp")])
def test_the_gradient_is_the_one_that_is_claimed(sampled, name, microbatch):
    model, rollout, rewards = sampled
    advantage = group_advantages(rewards).flatten()
    lengths = rollout.mask.sum(1, keepdim=True)
    weight = {
        "dr_grpo": torch.tensor(1 / (16 * TOY["max_completion_length"])),
        "dapo": 1 / lengths.sum(),
        "cispo": 1 / lengths.sum(),
        "sequence_grpo": torch.tensor(1 / 16),
    }.get(name, 1 / (16 * lengths))
    found = moved(name, model, rollout, advantage, microbatch=microbatch)
    assert_same(found, by_hand(model, rollout, weight * advantage.unsqueeze(1) * rollout.mask))


LOW, HIGH = 0.02, 0.5  # far from each other and from 0.2
OFF = {"epsilon_low": LOW, "epsilon_high": HIGH}


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
        changes = OFF | {"cap": 1.3}
    lengths, policy = mask.sum(1, keepdim=True), copy.deepcopy(model)
    weight = {"dr_grpo": 1 / (16 * TOY["max_completion_length"]), "dapo": 1 / lengths.sum(), "cispo": 1 / lengths.sum()}
    weight = weight.get(name, 1 / (16 * lengths)) * mask
    logp = policy.logprob(rollout.tokens, lengths=rollout.length, mask=mask)
    A = advantage.unsqueeze(1).expand_as(logp)
    gain, clipped = objective(name, logp, old, A, mask)
    assert all((clipped & mask)[side].any() for side in (advantage > 0, advantage < 0))
    (weight * correction * gain).sum().backward()
    measured, found = learned(name, model, rollout, advantage, old, microbatch=100, **changes)
    assert_same(found, [p.grad for p in policy.parameters()])
    assert measured["train/clip_fraction"] == pytest.approx(((weight * clipped).sum() / weight.sum()).item())


@pytest.mark.parametrize("name", ["reinforce", "rloo", "reinforce_pp"])
@pytest.mark.parametrize("microbatch, off", [(10**6, False), (100, False), (100, True)])
def test_the_gradient_of_those_with_an_advantage_a_token(sampled, name, microbatch, off):
    """With a reference at hand: the KL is in the reward, token by token or once an answer; and with an entropy bonus.

    Off ratio 1, where only REINFORCE++ has a ratio, the gradient of the others stays what it is.
    """
    model, rollout, rewards = sampled
    rollout = drifted(rollout) if off else rollout
    discount = {} if name == "rloo" else {"gamma": 0.9}
    script, config = importlib.import_module(NAMES[name]), config_of(name, beta=0.5, **discount)
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
    weight = 1 / rollout.mask.sum() if name == "reinforce_pp" else 1 / (16 * TOY["max_completion_length"])
    changes = {"microbatch": microbatch, "ent_coef": 0.3, **(OFF if name == "reinforce_pp" else {})}
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


@pytest.mark.parametrize("name", ALL)
def test_fewer_answers_than_minibatches_are_as_many_updates(sampled, documents, name):
    """No update of an empty mini-batch, whose norm of 0 would be averaged in; of SFT alone neither."""
    model, rollout, rewards = sampled
    few, advantage = rollout.select(torch.arange(2)), rewards[0, :2]
    if variants.COPIES.get(name, "reinforce") == "reinforce":
        advantage = advantage.unsqueeze(1) * few.mask
    changes = {"documents": documents, "alpha": 0.5, "sft_batch": 3} if name == "hybrid" else {}
    enough, many = (learned(name, model, few, advantage, **changes, num_minibatches=count) for count in (2, 5))
    assert enough[0] == many[0] and enough[0]["train/grad_norm"] > 0
    assert_equal_bits(enough[1], many[1])


@pytest.mark.parametrize("name, baseline", [("reinforce", "moving"), ("rloo", None), ("reinforce_pp", None)])
def test_a_step_in_which_no_answer_was_judged_is_not_learned_from(base, tmp_path, monkeypatch, name, baseline):
    script = importlib.import_module(NAMES[name])
    config = config_of(name, checkpoint=base, beta=0.01, **({"baseline": baseline} if baseline else {}))
    row = assert_learns_nothing_unjudged(monkeypatch, script, config, tmp_path)
    assert not {"train/reward", "train/accuracy", "train/grad_norm"} & row.keys() and row["train/kl"] >= 0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_stands_at_padding_is_not_learned_from(sampled, name, value):
    """The log-probs of sampler and trainer, and the advantages of single tokens."""
    model, rollout, rewards = sampled
    single = variants.COPIES.get(name, "reinforce") == "reinforce"
    advantage = rewards.flatten().unsqueeze(1) * rollout.mask if single else group_advantages(rewards).flatten()
    old = (rollout.logp - 0.1) * rollout.mask
    changes = {"cap": 1.3} if name == "tis" else {}
    want = learned(name, model, rollout, advantage, old, microbatch=100, **changes)
    padded = [x.masked_fill(~rollout.mask, value) for x in (rollout.logp, old)]
    advantage = advantage.masked_fill(~rollout.mask, value) if single else advantage
    found = learned(name, model, replace(rollout, logp=padded[0]), advantage, padded[1], microbatch=100, **changes)
    assert found[0] == want[0] and all(torch.equal(a, b) for a, b in zip(found[1], want[1]))


def test_the_weight_of_truncated_importance_corrects_the_ratio(sampled):
    """A sampler that gave half the probability of the trainer to every token: weight 2 at most C, whatever it took."""
    model, rollout, _ = sampled
    advantage = torch.ones(16)
    other = replace(rollout, logp=rollout.logp - math.log(2) * rollout.mask)
    plain = moved("tis", model, rollout, advantage)
    assert_same(moved("tis", model, other, advantage, rollout.logp, cap=4.0), [2 * move for move in plain])
    assert_same(moved("tis", model, other, advantage, rollout.logp, cap=1.5), [1.5 * move for move in plain])
    assert_same(moved("tis", model, other, advantage, rollout.logp, cap=0.0), plain)


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_the_trainer_of_tis_scores_what_a_bf16_sampler_drew(base, tmp_path, monkeypatch, cap):
    sampled, scored, act, learn = [], [], tis.act, tis.learn
    monkeypatch.setattr(tis, "act", lambda model, *args, **more: sampled.append(model) or act(model, *args, **more))
    monkeypatch.setattr(tis, "learn", lambda model, optimizer, rollout, *args: scored.append(
        (args[-1], rollout.logp, model.logprob(rollout.tokens, lengths=rollout.length, mask=rollout.mask).detach())
    ) or learn(model, optimizer, rollout, *args))  # fmt: skip
    tis.main(config_of("tis", checkpoint=base, steps=1, out=tmp_path / "run", cap=cap))
    assert sampled[-1].embedding.weight.dtype == torch.bfloat16
    old, sampler, trainer = scored[0]
    torch.testing.assert_close(old, trainer if cap else sampler, atol=1e-5, rtol=0)
    assert (sampler - trainer).abs().max() > 1e-4 and read_metrics(tmp_path / "run")[1]["train/ratio_deviation"] > 0


# ---- routes that are replayed


def elsewhere(rollout, rows=slice(None)):
    """Every token of these rows sent to other experts than the trainer would choose."""
    routes = rollout.routes.clone()
    routes[rows] = torch.where(routes[rows] < 0, -1, (routes[rows] + 1) % MOE.experts)
    return replace(rollout, routes=routes)


def test_the_update_replays_the_routes_of_the_sampler(sampled):
    model, rollout, rewards = sampled
    rollout, advantage = elsewhere(rollout), group_advantages(rewards).flatten()
    policy, mask = copy.deepcopy(model), rollout.mask
    settings = {"lengths": rollout.length, "mask": mask}
    logp = policy.logprob(rollout.tokens, **settings, routes=rollout.routes)
    rollout = replace(rollout, logp=logp.detach())
    (advantage.unsqueeze(1) * logp * mask / (16 * mask.sum(1, keepdim=True))).sum().backward()
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]
    for microbatch in (10**6, 100):
        assert_same(moved("replayed_routes", model, rollout, advantage, microbatch=microbatch), gradient)
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(moved("gspo", model, rollout, advantage), gradient))


def test_routes_that_differ_are_counted(sampled):
    model, rollout, _ = sampled
    inside = rollout.mask.sum(1) - 1  # the last token has no route
    for microbatch in (10**6, 100):
        assert replayed_routes.route_difference(model, rollout, microbatch) == 0
        share = replayed_routes.route_difference(model, elsewhere(rollout, slice(8)), microbatch)
        assert share == pytest.approx((inside[:8].sum() / inside.sum()).item(), abs=1e-6)


def test_the_check_before_the_update_replays_too(base, sampled, tmp_path, monkeypatch):
    """A sampler whose routers choose otherwise: with its routes replayed it is the trainer, without it is not."""
    act, check = replayed_routes.act, replayed_routes.on_policy_check

    def sampler(model, *args, **more):
        rollout = elsewhere(act(model, *args, **more))
        with torch.no_grad():
            seen = {"lengths": rollout.length, "mask": rollout.mask, "routes": rollout.routes}
            return replace(rollout, logp=model.logprob(rollout.tokens, **seen))

    monkeypatch.setattr(replayed_routes, "act", sampler)
    config = config_of("replayed_routes", checkpoint=base, steps=1)
    replayed_routes.main(replace(config, out=tmp_path / "replayed"))
    row = read_metrics(tmp_path / "replayed")[1]
    assert row["train/ratio_deviation"] < 1e-4 and row["train/route_difference"] == 1
    monkeypatch.setattr(replayed_routes, "on_policy_check", lambda *args, replay, **more: check(*args, **more))
    with pytest.raises(RuntimeError, match="sampler and trainer do not compute the same policy"):
        replayed_routes.main(replace(config, out=tmp_path / "free", max_ratio_deviation=1e-4))
    model, rollout, _ = sampled
    assert on_policy_check(model, rollout, 8192, most=0.02, replay=True)["train/ratio_deviation"] < 1e-4


def test_a_dense_model_has_no_routes_to_replay(toy_base, tmp_path):
    config = config_of("replayed_routes", checkpoint=toy_base("dense") / "checkpoint", out=tmp_path / "run")
    with pytest.raises(ValueError, match="a dense model has no routes"):
        replayed_routes.main(config)
    assert not config.out.exists()


# ---- hybrid: α·L_RL + (1-α)·L_SFT -----------------------------------------------------------------------------------

DIALOGUES = [("make 7 from 3,4", "<think>3+4=7</think><answer>3+4</answer>"),
             ("make 2 from 1,1", "<answer>1+1</answer>"),
             ("make 9 from 5,4", "<think>5+4=9 yes</think><answer>5+4</answer>")]  # fmt: skip


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    """A file of dialogues."""
    path = tmp_path_factory.mktemp("dialogues") / "sft.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in DIALOGUES))
    return path


@pytest.fixture(scope="module")
def documents(base, dialogues):
    """The same, as tokens."""
    return chat_data.load([dialogues], hf.load(checkpoint.latest(base))[1], 999)


@pytest.fixture
def off_policy(sampled):
    """Policy, rollout and advantage of an update that clips some tokens."""
    model, rollout, rewards = sampled
    return model, drifted(rollout), group_advantages(rewards).flatten()


def imitated(model, documents) -> list[torch.Tensor]:
    """The gradient of the mean log-prob of what the assistant says and of the end of its turn, one document a row."""
    policy, tokens = copy.deepcopy(model), 0
    for document in documents:
        row = torch.tensor([document.tokens])
        logp = policy.logprob(row)
        begin = document.trained.index(True)
        assert all(document.trained[begin:]) and not any(document.trained[:begin])
        logp[0, begin:].sum().backward()
        tokens += len(document.tokens) - begin
    return [p.grad / tokens for p in policy.parameters()]


@pytest.mark.parametrize("microbatch", [10**6, 30])
def test_without_rl_the_gradient_is_that_of_imitation(off_policy, documents, microbatch):
    metrics, moves = learned("hybrid", *off_policy, alpha=0.0, documents=documents, microbatch=microbatch)
    gradient = imitated(off_policy[0], documents)
    assert_same(moves, gradient)
    policy, trained = off_policy[0], sum(sum(d.trained) for d in documents)
    with torch.no_grad():
        nats = [-policy.logprob(torch.tensor([d.tokens]))[0, d.trained.index(True) :].sum() for d in documents]
    assert metrics["train/sft_loss"] == pytest.approx((sum(nats) / trained).item(), rel=1e-5)
    opposite = moved("hybrid", off_policy[0], off_policy[1], -off_policy[2], alpha=0.0, documents=documents,
                     microbatch=microbatch)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(moves, opposite))


def test_the_gradient_of_the_hybrid_is_linear_in_alpha(off_policy, documents):
    ends = [moved("hybrid", *off_policy, alpha=alpha, documents=documents) for alpha in (0.0, 1.0)]
    assert_same(ends[1], moved("replayed_routes", *off_policy))  # r1_zero's, by a copy that was tested above
    assert max((a - b).abs().max() for a, b in zip(*ends)) > 0.01
    for alpha in (0.25, 0.7):
        between = [(1 - alpha) * sft + alpha * rl for sft, rl in zip(*ends)]
        assert_same(moved("hybrid", *off_policy, alpha=alpha, documents=documents), between)


def test_every_optimizer_step_draws_its_own_documents(off_policy, documents, monkeypatch):
    drawn, real = [], hybrid.imitate
    monkeypatch.setattr(hybrid, "imitate", lambda model, d, *rest: drawn.append(d) or real(model, d, *rest))
    changes = {"alpha": 0.5, "documents": documents, "num_minibatches": 4, "epochs": 3}
    learned("hybrid", *off_policy, sft_batch=1, **changes)
    learned("hybrid", *off_policy, sft_batch=1, **changes)
    assert len(drawn) == 24 and drawn[:12] == drawn[12:]  # functions of seed, step and epoch
    assert {d.prompt for (d,) in drawn} == {d.prompt for d in documents}
    del drawn[:]
    learned("hybrid", *off_policy, sft_batch=99, **changes)  # at most all
    assert all(sorted(d.prompt for d in batch) == sorted(d.prompt for d in documents) for batch in drawn)


def test_with_rl_alone_the_run_is_that_of_r1_zero_to_the_bit(base, tmp_path):
    common = {**TOY, "checkpoint": base, "steps": 3, "beta": 0.01, "learning_rate": 1e-2, "epochs": 2}
    r1_zero.main(r1_zero.Config(**common, out=tmp_path / "r1_zero"))
    hybrid.main(hybrid.Config(**common, out=tmp_path / "hybrid", alpha=1.0, sft_data=Path("none")))
    rows = plain_metrics(tmp_path / "r1_zero")
    assert plain_metrics(tmp_path / "hybrid") == rows and any(row["train/grad_norm"] > 0 for row in rows[1:])
    assert "train/sft_loss" not in rows[1]
    paths = [checkpoint.latest(tmp_path / name / "checkpoint") for name in ("r1_zero", "hybrid")]
    assert (paths[0] / "model.safetensors").read_bytes() == (paths[1] / "model.safetensors").read_bytes()
    states = [checkpoint.load_state(path) for path in paths]
    states[0].pop("curriculum")
    assert_equal_bits(*states)


def test_a_killed_hybrid_resumes_to_the_same_bits(base, dialogues, tmp_path, monkeypatch):
    config = config_of("hybrid", checkpoint=base, steps=4, alpha=0.5, sft_data=dialogues, sft_batch=2)
    hybrid.main(replace(config, out=tmp_path / "whole"))
    stop(monkeypatch, "variants.hybrid", replace(config, out=tmp_path / "run"), NAMES["hybrid"], "learn", 4)
    hybrid.main(replace(config, out=tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert all(row["train/sft_loss"] > 0 for row in read_metrics(tmp_path / "run")[1:])


def test_a_hybrid_on_another_device_is_that_of_the_cpu(base, dialogues, tmp_path):
    for device in ("cpu", "standin"):
        more = {"alpha": 0.5, "sft_data": dialogues, "device": device, "out": tmp_path / device}
        hybrid.main(config_of("hybrid", checkpoint=base, steps=2, **more))
    assert_same_run(tmp_path / "cpu", tmp_path / "standin")


def test_a_hybrid_needs_its_share_and_its_dialogues(base, tmp_path):
    for alpha in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"alpha = {alpha}: 0 to 1"):
            config_of("hybrid", alpha=alpha)
    with pytest.raises(ValueError, match="none.jsonl"):
        hybrid.main(config_of("hybrid", checkpoint=base, alpha=0.5, sft_data=Path("none.jsonl"), out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# ---- what only one of them has ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tau", [0.25, 1.0])
def test_the_reference_follows_the_policy(base, tmp_path, tau, dtype):
    """θ_ref = (1 - τ) θ_0 + τ θ_1 after the first step, in fp32 also beside a bf16 policy."""
    more = {"steps": 1, "tau": tau, "dtype": dtype, "max_ratio_deviation": 0.1}
    ema_reference.main(config_of("ema_reference", checkpoint=base, out=tmp_path, **more))
    path = checkpoint.latest(tmp_path / "checkpoint")
    reference = checkpoint.load_state(path)["reference"]
    start, policy = (hf.load(p, dtype=getattr(torch, dtype))[0].state_dict() for p in (checkpoint.latest(base), path))
    assert any(not torch.equal(policy[name], start[name]) for name in policy)
    for name, value in reference.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, torch.lerp(start[name].float(), policy[name].float(), tau))


def test_the_share_of_the_reference_is_one():
    with pytest.raises(ValueError, match="tau = 2: 0 to 1"):
        config_of("ema_reference", tau=2)


def test_a_killed_run_with_a_reference_that_follows_resumes_to_the_same_bits(base, tmp_path, monkeypatch):
    config = config_of("ema_reference", checkpoint=base, steps=4, out=tmp_path / "run")
    ema_reference.main(replace(config, out=tmp_path / "whole"))
    stop(monkeypatch, "variants.ema_reference", config, NAMES["ema_reference"], "learn", 4)
    ema_reference.main(replace(config, resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_baselines_of_reinforce():
    rewards = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    none, batch, moving = (reinforce.Config(baseline=name) for name in ("none", "batch", "moving"))
    for average in (None, 0.5):
        assert torch.equal(reinforce.subtract_baseline(rewards, average, none), rewards)
        assert torch.equal(reinforce.subtract_baseline(rewards, average, batch), rewards - 1)
    assert torch.equal(reinforce.subtract_baseline(rewards, None, moving), rewards)  # nothing is known at first
    assert torch.equal(reinforce.subtract_baseline(rewards, 0.5, moving), rewards - 0.5)
    with pytest.raises(ValueError, match="gamma = 2.0: 0 to 1"):
        reinforce.Config(gamma=2.0)
    with pytest.raises(ValueError, match="baseline_decay = -1: 0 to 1"):
        reinforce.Config(baseline_decay=-1)


def test_the_moving_baseline_is_that_of_past_batches(base, tmp_path, monkeypatch):
    """b <- 0.9 b + 0.1 mean(R) after it is subtracted; a killed run resumes with it, to the same bits."""
    config = config_of("reinforce", checkpoint=base, steps=4, baseline="moving", ent_coef=0.01, gamma=0.99)
    subtracted, real = [], reinforce.subtract_baseline
    monkeypatch.setattr(reinforce, "subtract_baseline", lambda *args: subtracted.append(args[:2]) or real(*args))
    reinforce.main(replace(config, out=tmp_path / "whole"))
    means, averages = [rewards.mean().item() for rewards, _ in subtracted], [average for _, average in subtracted]
    assert averages[:2] == [None, means[0]] and averages[2] == pytest.approx(0.9 * means[0] + 0.1 * means[1])
    assert averages[3] == pytest.approx(0.9 * averages[2] + 0.1 * means[2])
    stop(monkeypatch, "reinforce", replace(config, out=tmp_path / "run"), "experiments.reinforce", "learn", 4)
    reinforce.main(replace(config, out=tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    state = checkpoint.load_state(checkpoint.latest(tmp_path / "run" / "checkpoint"))
    assert state["average"] == pytest.approx(0.9 * averages[3] + 0.1 * means[3])


def dapo_draws(monkeypatch, accuracies: list[list[int]]):
    """`refill` of dapo.py over made-up rollouts: how many of 2 answers are right, for every group of every round."""
    count = len(accuracies[0])
    config = config_of("dapo", prompts=count, num_generations=2, num_minibatches=1, rounds=len(accuracies))
    calls = []  # (problems, key) of every round

    def act(model, tokenizer, problems, config, step):
        calls.append((problems, step))
        rows = count * 2
        mask = torch.tensor([[False, True, True]]).repeat(rows, 1)
        zeros = torch.zeros(rows, 3)
        tokens = torch.full((rows, 3), len(calls))
        full = torch.full((rows,), 3)
        group = torch.arange(count).repeat_interleave(2)
        return Rollout(tokens, torch.ones_like(full), full, mask, zeros, zeros, full * 0, group, 1.0)

    def judged(rollout, *_):
        right = accuracies[len(calls) - 1]
        return [[Answer("", 2, False, i < abs(n), True, unjudged=n < 0 < i) for i in range(2)] for n in right]

    monkeypatch.setattr(dapo, "act", act)
    monkeypatch.setattr(dapo, "judge_rollout", judged)
    train = tasks.load("countdown").problems("train")
    return calls, *dapo.refill(None, None, None, train, config, 3, Clock(pick("cpu")))


def test_dapo_stops_as_soon_as_its_groups_are_mixed(monkeypatch):
    calls, problems, rollout, answers, spent = dapo_draws(monkeypatch, [[1, 1], [1, 1]])
    assert len(calls) == 1 and spent["train/rounds"] == 1 and spent["train/kept"] == 1.0
    assert spent["train/sampled_tokens"] == 8 and len(problems) == 2 and rollout.group.tolist() == [0, 0, 1, 1]


def test_dapo_refills_and_counts_what_it_throws_away(monkeypatch):
    """First round: one mixed of three; second: all mixed. Kept: the mixed one, then two of the second round."""
    calls, problems, rollout, answers, spent = dapo_draws(monkeypatch, [[0, 1, 2], [1, 1, 1], [1, 1, 1]])
    (first, one), (second, two) = calls  # rounds of a step, each with problems and noise of its own
    assert one == 3 != two
    assert not any(problem in first for problem in second) and problems == [first[1], *second[:2]]
    assert spent["train/rounds"] == 2 and spent["train/sampled_tokens"] == 2 * 12 and spent["train/kept"] == 0.5
    assert spent["train/accuracy"] == pytest.approx(6 / 12)  # of all that was drawn
    assert rollout.tokens[:, 0].tolist() == [1, 1, 2, 2, 2, 2] and rollout.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert all(len({a.right for a in group}) == 2 for group in answers)


def test_dapo_takes_right_and_not_judged_for_no_mixed_group(monkeypatch):
    calls, problems, rollout, answers, spent = dapo_draws(monkeypatch, [[-1, 1], [1, 1]])  # -1: right, not judged
    assert len(calls) == 2 and not any(a.unjudged for group in answers for a in group)
    assert spent["train/accuracy"] == pytest.approx(4 / 7)


def test_dapo_gives_up_after_its_rounds(monkeypatch):
    calls, problems, rollout, answers, spent = dapo_draws(monkeypatch, [[0, 1], [2, 2]])
    assert len(calls) == 2 and len(answers) == 2
    assert [len({a.right for a in group}) for group in answers] == [2, 1]  # filled up with one that carries nothing


def test_dapo_makes_long_answers_pay():
    config = config_of("dapo", max_completion_length=100, overlong_buffer=20)
    answers = [[Answer("", n, n == 100, True, False) for n in (50, 90, 100)]]
    torch.testing.assert_close(dapo.reward(answers, config), torch.tensor([[1.0, 0.5, 0.0]]))


def test_truncated_answers_can_be_left_out_of_a_variant(sampled):
    model, rollout, rewards = sampled
    assert (rollout.stop == BUDGET).any()
    advantage = group_advantages(rewards).flatten()
    cut = torch.where(rollout.stop == BUDGET, advantage + 5, advantage)
    a, b = (moved("dr_grpo", model, rollout, x, mask_truncated=True) for x in (advantage, cut))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_dapo_refuses_what_cannot_be_refilled_or_penalised():
    with pytest.raises(ValueError, match="rounds = 0: at least 1"):
        config_of("dapo", rounds=0)
    for buffer in (0, 33):
        with pytest.raises(ValueError, match=f"overlong_buffer = {buffer}: 1 to 32, the budget"):
            config_of("dapo", overlong_buffer=buffer)


def test_the_error_that_is_logged_is_of_the_judged_answers(sampled):
    """A head of zero says ½: ¼ from 0 and from 1 alike, however many could be judged."""
    model, rollout, rewards = sampled
    advantage, right = group_advantages(rewards).flatten(), (torch.arange(16) % 2).float()
    few = torch.where(torch.arange(16) < 12, torch.nan, right)
    logged = [learned("self_check", model, rollout, advantage, right=one)[0] for one in (right, few, right * torch.nan)]
    assert [m.get("train/check_error") for m in logged] == [pytest.approx(0.25), pytest.approx(0.25), None]


@pytest.mark.parametrize("name", ["gspo", "sequence_grpo"])
def test_an_answer_is_clipped_where_it_has_no_gradient(sampled, name):
    """The fraction that is logged is of the tokens that the loss of their answer leaves alone."""
    model, rollout, rewards = sampled
    rollout, mask = drifted(rollout, whole=name == "sequence_grpo"), rollout.mask
    advantage = group_advantages(rewards).flatten()
    logp = model.logprob(rollout.tokens, lengths=rollout.length, mask=mask).detach().requires_grad_()
    A = advantage.unsqueeze(1).expand_as(logp)
    loss = {"gspo": gspo, "sequence_grpo": grpo_sequence}[name](logp, rollout.logp, A, LOW, HIGH, mask)
    (slope,) = torch.autograd.grad((mask * loss).sum(), logp)
    untouched = ((slope == 0) & mask).float()
    assert 0.05 < untouched[mask].mean() < 0.95
    metrics, _ = learned(name, model, rollout, advantage, **OFF)
    share = (untouched / mask.sum(1, keepdim=True)).sum().item() / 16
    assert metrics["train/clip_fraction"] == pytest.approx(share)


# ---- self-check: L_RL + w · squared error ----------------------------------------------------------------------------


def test_the_squared_error_by_hand(off_policy):
    """At w the policy moves by the gradient of both parts, the second written out; with a head of zero, as without."""
    model, rollout, advantage = off_policy[:3]
    head = ValueHead(model.config.dim)
    right = (torch.arange(len(rollout.length)) % 2).float()
    plain = moved("self_check", *off_policy, check_weight=0.0, right=right)
    assert_same(moved("self_check", *off_policy, check_weight=0.7, right=right, head=copy.deepcopy(head)), plain)
    torch.nn.init.normal_(head.weight)
    both = moved("self_check", *off_policy, check_weight=0.7, right=right, head=copy.deepcopy(head))
    unjudged = torch.where(torch.arange(len(right)) < 2, torch.nan, right)
    few = moved("self_check", *off_policy, check_weight=0.7, right=unjudged, head=copy.deepcopy(head))
    assert all(move.isfinite().all() for move in few)
    none = torch.full_like(right, torch.nan)
    assert_same(moved("self_check", *off_policy, check_weight=0.7, right=none, head=copy.deepcopy(head)), plain)
    policy = copy.deepcopy(model)
    _, e = policy.logprob(rollout.tokens, lengths=rollout.length, mask=rollout.mask, value=head)
    error = (torch.sigmoid(e) - right[:, None]).square() * rollout.mask
    (error.sum(1) / rollout.mask.sum(1)).mean().mul(0.7).backward()
    zero = lambda p: torch.zeros_like(p) if p.grad is None else p.grad
    assert_same(both, [a - zero(p) for a, p in zip(plain, policy.parameters())])
