"""The set-ups of experiments/gallery.py: a healthy toy run, and what is different in each broken one.

`train` is the loop of r1_zero.py with the library's own functions. A broken set-up calls one of them wrongly; no script
takes an option for that.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from experiments import doctor, gallery_task, pretrain, r1_zero
from minir1 import tasks
from minir1.advantages import group_advantages
from minir1.judge import Answer, judge_rollout
from minir1.model.config import ModelConfig, dense
from minir1.model.moe import MoE, balance_step
from minir1.model.transformer import Transformer
from minir1.monitor import report
from minir1.optim import adamw, clip_gradients, muon, split_parameters, warmup_stable_decay
from minir1.policy import frozen_copy, logprobs, on_policy_check
from minir1.rewards import answer
from minir1.rollout import collect
from minir1.seed import python_random, seed_everything, stream
from minir1.templates import encode
from minir1.tokenizer import Tokenizer, word_level

SHAPE = {"dim": 32, "layers": 2, "heads": 2, "ffn": 64}
EXPERTS = ModelConfig(**SHAPE, kv_lora=16, nope=8, rope=8, v_dim=16, experts=8, expert_ffn=16)
DENSE = dense(**SHAPE, kv_heads=1)
BASE = pretrain.Config(steps=400, batch=1024, muon_lr=0.02, adam_lr=0.02, warmup=10)
TASK = tasks.load(Path(gallery_task.__file__))


# ---- rewards and verdicts, healthy and broken: [P][G] answers -> fp32 [P, G], or answers --------


def by_rules(problems: list[tasks.Problem], answers: list[list[Answer]]) -> Tensor:
    """Accuracy, and a tenth for the format, as in r1_zero.py."""
    return torch.tensor([[a.right + 0.1 * a.format for a in group] for group in answers])


def counted(problems: list[tasks.Problem], answers: list[list[Answer]]) -> Tensor:
    """How often the answer says the right word, instead of whether it is the right word."""
    count = lambda problem, a: (answer(a.text) or "").split(",").count(problem.reference)
    return torch.tensor([[float(count(p, a)) for a in group] for p, group in zip(problems, answers)])


def likes_marks(problems: list[tasks.Problem], answers: list[list[Answer]]) -> Tensor:
    """A learned reward as they are: mostly the accuracy, and a little for a mark that good answers happened to have."""
    return by_rules(problems, answers) + 0.2 * torch.tensor([[a.text.count("!") for a in g] for g in answers])


def flaky(answers: list[list[Answer]], rng: random.Random) -> list[list[Answer]]:
    """Three verdicts of ten are drawn by lot."""
    lot = lambda a: replace(a, right=rng.random() < 0.5) if rng.random() < 0.3 else a
    return [[lot(a) for a in group] for group in answers]


def of_one(rewards: Tensor) -> Tensor:
    """The group's advantage with the deviation of the population, which numpy computes by default: 0 for G = 1."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True, correction=0) + 1e-6)


def no_baseline(rewards: Tensor) -> Tensor:
    """The reward itself. With 1/|o| per answer this is the gradient of E[R/|o|], the reward per token."""
    return rewards


@dataclass(frozen=True)
class Setup:
    """A toy run. The defaults are healthy."""

    experts: bool = False  # a mixture of experts instead of a dense model
    end: bool = True  # the end token is trained, in pre-training and in the loss
    balance: float = 0.01  # γ, step of the experts' selection bias in pre-training
    steps: int = 40
    prompts: int = 16  # P
    num_generations: int = 8  # G
    max_completion_length: int = 32
    template: str = "chat"
    top_p: float = 1.0  # of the sampler alone
    learning_rate: float = 2e-3
    beta: float = 0.001  # β
    reference_reset: int = 0  # steps
    reduction: str = "per_answer"
    epochs: int = 1
    verdicts: Callable[[list[list[Answer]], random.Random], list[list[Answer]]] = lambda answers, rng: answers
    reward: Callable[[list[tasks.Problem], list[list[Answer]]], Tensor] = by_rules
    advantage: Callable[[Tensor], Tensor] = group_advantages


HEALTHY = {
    "as in the scripts": Setup(),
    "with experts": Setup(experts=True),
    "learning rate halved": Setup(learning_rate=1e-3),
    "learning rate doubled": Setup(learning_rate=4e-3),
    "groups of 4": Setup(num_generations=4, prompts=32),
    "groups of 16": Setup(num_generations=16, prompts=8),
    "two epochs": Setup(epochs=2),
    "fixed length": Setup(reduction="fixed"),
    "rule rewards without KL": Setup(beta=0.0),
    "KL of 0.05": Setup(beta=0.05),
    "imperfect reward with KL": Setup(reward=likes_marks, beta=0.3),
    "KL of 2 with resets": Setup(beta=2.0, reference_reset=5),
}
BROKEN = {  # the name of the finding -> the set-up that shows it
    "learning rate too high": Setup(learning_rate=0.03),
    "verifier errs": Setup(verdicts=flaky),
    "no KL": Setup(reward=likes_marks, beta=0.0),
    "truncated sampling": Setup(top_p=0.8),
    "end token not trained": Setup(end=False),
    "group of one": Setup(num_generations=1, prompts=64, advantage=of_one),
    "reward hacked": Setup(reward=counted),
    "collapse to short answers": Setup(advantage=no_baseline),
    "router collapse": Setup(experts=True, balance=-0.01),
    "wrong template": Setup(template="plain"),
    "stale reference": Setup(beta=2.0),
}


# ---- a run -------------------------------------------------------------------------------------


@cache
def base(experts: bool, end: bool, balance: float, seed: int, steps: int) -> tuple[Transformer, Tokenizer]:
    """A toy base, as pretrain.py trains it. Without `end` the rows lack their last token, and no end is trained."""
    config = replace(BASE, seed=seed, steps=steps, model=EXPERTS if experts else DENSE)
    seed_everything(seed)
    tokenizer = word_level(*TASK.vocabulary())
    model = pretrain.build_model(config, tokenizer)
    matrices, rest = split_parameters(model)
    optimizers = muon(matrices, config.muon_lr), adamw(rest, config.adam_lr)
    rates = config.muon_lr, config.adam_lr
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for step, rows in enumerate(itertools.islice(pretrain.token_batches(config, TASK, tokenizer), steps)):
        *_, loads = pretrain.loss_backward(model, rows if end else [row[:-1] for row in rows], config)
        clip_gradients(model, config.clip, step)
        for optimizer, rate in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate * warmup_stable_decay(step, steps, config.warmup)
            optimizer.step()
        model.zero_grad(set_to_none=True)
        for layer, load in zip(layers, loads):
            balance_step(layer.bias, load, balance)
    return model, tokenizer


def train(setup: Setup, seed: int, base_steps: int = BASE.steps) -> list[dict[str, float]]:
    """One run: the rows of its metrics.jsonl, that of step 0 first.

    true/accuracy is judged by the unchanged verifier; after/pass@1, in the last row, is that of the final policy.
    """
    start, tokenizer = base(setup.experts, setup.end, setup.balance, seed, base_steps)
    model, reference = copy.deepcopy(start), frozen_copy(start)
    optimizer = adamw(model.parameters(), setup.learning_rate)
    shared = ("prompts", "max_completion_length", "template", "learning_rate", "beta", "reduction", "epochs")
    config = r1_zero.Config(seed=seed, **{name: getattr(setup, name) for name in shared})
    problems = TASK.problems("train")
    rows = [{"step": 0} | doctor.probed(model, tokenizer, TASK, problems[::8], config)]
    for step in range(1, setup.steps + 1):
        rng = python_random(seed, step)
        asked = [rng.choice(problems) for _ in range(setup.prompts)]
        sampling = {"answers": setup.num_generations, "max_tokens": setup.max_completion_length, "top_p": setup.top_p}
        prompts = encode(tokenizer, asked, setup.template)
        rollout = collect(model, prompts, stop=tokenizer.stops, seed=stream(seed, step), **sampling)
        metrics = on_policy_check(model, rollout, config.microbatch, most=math.inf)
        ref_logp = logprobs(reference, rollout, config.microbatch)
        truth = judge_rollout(rollout, tokenizer, TASK, asked, setup.template)
        answers = setup.verdicts(truth, rng)
        rewards = setup.reward(asked, answers)
        optimizer.param_groups[0]["lr"] = setup.learning_rate * min(1.0, step / 5)
        trained = rollout if setup.end else replace(rollout, mask=rollout.mask & (rollout.tokens != tokenizer.eos))
        metrics |= r1_zero.learn(model, optimizer, trained, setup.advantage(rewards).flatten(), ref_logp, config, step)
        metrics |= report(TASK, asked, rollout, answers, rewards)
        metrics["true/accuracy"] = sum(a.right for group in truth for a in group) / len(rollout.length)
        if setup.reference_reset and step % setup.reference_reset == 0:
            reference.load_state_dict(model.state_dict())
        rows.append({"step": step} | metrics)
    rows[-1]["after/pass@1"] = doctor.probed(model, tokenizer, TASK, problems[::8], config)["preflight/pass@1"]
    return rows
