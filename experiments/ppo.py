"""PPO: a critic says what each state is worth (arXiv:1707.06347; for language models arXiv:2203.02155).

    python -m experiments.ppo --checkpoint runs/base/checkpoint --out runs/ppo
    python -m experiments.ppo --checkpoint runs/base/checkpoint --out runs/ppo-trunk --critic trunk --gae-lambda 0.95
    python -m experiments.ppo --out runs/ppo-proxy --reward model:runs/reward-model/checkpoint --beta 0.05

    J(θ, φ) = E 1/N Σ_t [ min(r_t A_t, clip(r_t, 1-ε_low, 1+ε_high) A_t) + c_H H_t - c_V ½ (V_φ(s_t) - R_t)² ]
    δ_t = ρ_t + γ V_old(s_{t+1}) - V_old(s_t)        A_t = δ_t + γλ A_{t+1}        R_t = A_t + V_old(s_t)
    ρ_T = reward of the answer, 0 before; less β k1_t per token with --kl-in reward (with `loss`, β k3_t in J instead)

r_t = π_θ(o_t | s_t) / π_old(o_t | s_t), s_t is the prompt and o_<t, N counts the trained tokens of a mini-batch. The
advantages are whitened over the whole batch. With λ = 1 they are A_t = R - V(s_t): the critic is a baseline and adds no
bias, however wrong it is. With λ < 1 it also predicts the reward of the rest of the answer.

The critic is a copy of the base with a head of its own, or a head on the policy's trunk: one forward pass, and c_V is
the weight of the value's gradient in the trunk. Both give V = 0 at first; in the first --value-warmup steps only the
critic learns and the policy is frozen. A truncated answer ends there: no value is added for what might have followed.

train/explained_variance is that of the returns Σ_l γ^l ρ_{t+l} for any λ: with λ < 1 the R_t contain V itself, so that
a critic of pure noise would explain them.

With `--reward model:PATH` a learned reward (reward_model.py) scores whole rows [prompt | answer]. Its mean is logged as
train/proxy, the accuracy of the same answers by the rules as train/gold.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minir1 import checkpoint, cli, memory, policy, tasks
from minir1.advantages import at_last_token, discounted_returns, explained_variance, gae, kl_in_reward, whiten
from minir1.data import by_tokens
from minir1.device import peak_memory_gib, pick, pick_dtype
from minir1.distributed import deal, my_share, sum_of_ranks
from minir1.judge import Answer, any_judged, beside, judge_rollout, sample_answers, summary, unjudged_to_mean
from minir1.log import open_run, read_metrics, steps
from minir1.losses import clipped_surrogate, entropy_bonus, is_clipped, kl_k3, value_loss
from minir1.model.heads import ScalarModel, ValueHead
from minir1.model.shards import gathered, shard
from minir1.model.transformer import Transformer
from minir1.monitor import Averages, Clock, preflight, report, show
from minir1.optim import adamw, clip_gradients
from minir1.policy import frozen_copy, learned_rewards, load_policy, load_reward_model, logprobs, on_policy_check
from minir1.reduction import token_mean, weighted_sum
from minir1.rollout import Rollout, collect
from minir1.rollout_file import store, stored_steps
from minir1.seed import generator, python_random, seed_everything, stream
from minir1.settings import above, at_least, fraction
from minir1.templates import TEMPLATES, encode
from minir1.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    """PPO."""

    checkpoint: Path = Path("runs/base/checkpoint")  # the base: a Hugging Face folder, or a folder of checkpoints
    task: str = "countdown"  # a name, names joined by +, or the path of a .py file: see minir1/tasks
    data: str | None = None  # the folder or file that the task reads
    allow_code: bool = False  # the task may run programs that the model wrote, in a sandbox
    template: Literal[TEMPLATES] = "chat"
    steps: int = 40
    prompts: int = 32  # P, problems per step
    num_generations: int = 8  # G, answers per problem; 1 is enough: answers are not compared within groups
    max_completion_length: int = 384  # token budget of an answer
    temperature: float = 1.0
    learning_rate: float = 3e-4  # of the policy, AdamW
    warmup: int = 5  # steps, of the policy's learning rate
    epsilon_low: float = 0.2  # ε_low
    epsilon_high: float = 0.2  # ε_high
    dual_clip: float | None = None  # c, bounds the loss where A < 0
    gamma: float = 1.0  # γ, discount per token
    gae_lambda: float = 1.0  # λ
    whiten_advantages: bool = True
    critic: Literal["trunk", "own"] = "own"  # a head on the policy's trunk, or a model of its own
    value_learning_rate: float = 1e-3  # of the head, or of the critic of its own; AdamW
    vf_coef: float = 0.1  # c_V
    value_clip: float = float("inf")  # ε of the value loss
    value_warmup: int = 2  # steps in which only the critic learns
    beta: float = 0.001  # β, KL coefficient
    kl_in: Literal["reward", "loss"] = "reward"
    ent_coef: float = 0.0  # c_H
    num_minibatches: int = 2  # optimizer steps per epoch, at most
    epochs: int = 1  # passes over a rollout
    reward: str = "rules"  # rules | model:PATH, the folder of a reward model or of its checkpoints
    accuracy_weight: float = 1.0
    format_weight: float = 0.1
    grad_clip: float = 1.0
    max_ratio_deviation: float | None = None  # mean |r - 1| before an update; None: 0.001 in fp32, 0.05 in 16 bits
    min_mixed: float = 0.05  # the run starts only if this share of groups has right and wrong answers
    eval_every: int = 10  # steps
    eval_split: str = "validation"
    eval_problems: int = 200  # at most
    eval_answers: int = 2  # per problem
    store_steps: int = 3  # steps whose rollouts are stored for inspect_tokens.py, from first to last; 0: none
    store_groups: int = 8  # problems stored per such step, with all answers
    seed: int = 0
    out: Path = Path("runs/ppo")
    resume: bool = False
    microbatch: int = 8192  # most tokens of a forward pass; no result depends on it
    recompute: bool = False  # save memory: compute activations again in the backward pass
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32
    wandb: str = "off"

    def __post_init__(self):
        at_least(self, 1, "steps", "prompts", "num_generations", "max_completion_length", "num_minibatches", "epochs")
        at_least(self, 1, "microbatch", "eval_every", "eval_problems", "eval_answers", "store_groups")
        at_least(self, 0, "learning_rate", "epsilon_low", "epsilon_high", "vf_coef", "beta", "ent_coef", "warmup")
        at_least(self, 0, "accuracy_weight", "format_weight", "max_ratio_deviation", "seed", "value_learning_rate")
        at_least(self, 0, "store_steps")
        fraction(self, "min_mixed", "gamma", "gae_lambda")
        at_least(self, 1e-6, "temperature")
        above(self, 0, "grad_clip")
        above(self, 1, "dual_clip")
        if not 0 <= self.value_warmup < self.steps:
            raise ValueError(f"value_warmup = {self.value_warmup}: 0 to {self.steps - 1}, below steps")
        if not self.value_clip > 0:
            raise ValueError(f"value_clip = {self.value_clip}: above 0, inf for none")
        kind, _, path = self.reward.partition(":")
        if self.reward != "rules" and (kind != "model" or not path):
            raise ValueError(f"reward = {self.reward!r}: rules, or model:PATH")
        weights = self.accuracy_weight, self.format_weight
        if kind == "model" and weights != (Config.accuracy_weight, Config.format_weight):
            raise ValueError(f"accuracy_weight, format_weight = {weights}: of the rules; {self.reward} has none")


def act(model, tokenizer, problems: list[tasks.Problem], config: Config, step: int) -> Rollout:
    """P·G answers of the current policy, sampled at the temperature that the loss uses, without top-k or top-p."""
    sampling = {"answers": config.num_generations, "max_tokens": config.max_completion_length}
    sampling |= {"temperature": config.temperature, "seed": stream(config.seed, step)}
    prompts = encode(tokenizer, problems, config.template)
    return collect(model, prompts, stop=tokenizer.stops, **sampling)


class Estimate(NamedTuple):
    """Of each token; fp32 [B, T]."""

    advantage: Tensor  # A
    returns: Tensor  # R
    values: Tensor  # V_old
    ref_logp: Tensor  # log π_ref


def load_reward(config: Config, tokenizer: Tokenizer, device: torch.device) -> ScalarModel | None:
    """The learned reward, or None for the rules. ValueError if its tokenizer is not the policy's."""
    if config.reward == "rules":
        return None
    path = Path(config.reward.partition(":")[2])
    return load_reward_model(path, tokenizer, device, pick_dtype(config.dtype, device))


def reward(answers: list[list[Answer]], rollout: Rollout, learned: ScalarModel | None, config: Config) -> Tensor:
    """Rewards fp32 [P, G], by the rules or by the learned reward."""
    if learned is None:
        weights = config.accuracy_weight, config.format_weight
        rules = [[weights[0] * a.right + weights[1] * a.format for a in group] for group in answers]
        return unjudged_to_mean(torch.tensor(rules), answers)
    return learned_rewards(learned, rollout, config.microbatch).view(len(answers), -1)


@torch.no_grad()
def state_values(model: Transformer, critic: ValueHead | ScalarModel, rollout: Rollout, microbatch: int) -> Tensor:
    """V(s_t) of the answers' tokens, fp32 [B, T]; no gradient."""
    values = torch.zeros_like(rollout.logp)
    with gathered(model), gathered(critic):
        for rows in my_share(by_tokens(rollout.length.tolist(), microbatch)):
            rows = torch.tensor(rows, device=values.device)
            batch = rollout.select(rows)
            settings, own = {"lengths": batch.length, "mask": batch.mask}, isinstance(critic, ScalarModel)
            part = critic.values(batch.tokens, **settings) if own else forward(model, critic, batch)[-1]
            values[rows, : batch.tokens.shape[1]] = part
    return sum_of_ranks(values)


def estimate(rewards, values: Tensor, ref_logp: Tensor, rollout: Rollout, config: Config) -> tuple[Tensor, Estimate]:
    """ρ, fp32 [B, T], of the rewards [P, G]; and from ρ, V_old and log π_ref, [B, T] each, advantages and returns."""
    earned = at_last_token(rewards.flatten(), rollout.mask)
    if config.kl_in == "reward":
        earned = kl_in_reward(earned, rollout.logp, ref_logp, rollout.mask, config.beta)
    advantage, returns = gae(earned, values, rollout.mask, config.gamma, config.gae_lambda)
    advantage = whiten(advantage, rollout.mask) if config.whiten_advantages else advantage
    return earned, Estimate(advantage, returns, values, ref_logp)


def forward(model, critic: ValueHead | ScalarModel, batch: Rollout, entropy: bool = False) -> tuple[Tensor, ...]:
    """log π, the entropy if asked for, and V of the answers' tokens, fp32 [B, T]; one pass if the critic is a head."""
    settings = {"lengths": batch.length, "mask": batch.mask}
    sampling = {"temperature": batch.temperature, "entropy": entropy}
    if isinstance(critic, ValueHead):
        return model.logprob(batch.tokens, **settings, **sampling, value=critic)
    scores = model.logprob(batch.tokens, **settings, **sampling)
    return *(scores if entropy else [scores]), critic.values(batch.tokens, **settings)


def learn(model, critic, optimizers, rollout: Rollout, estimated: Estimate, config: Config, step: int):
    """Update critic and, unless it is frozen, policy, each by its optimizer, on B = P·G rows. Returns averages."""
    averages, device = Averages(), rollout.tokens.device
    clips = config.epsilon_low, config.epsilon_high, config.dual_clip
    for epoch in range(config.epochs):
        order = torch.randperm(len(rollout.length), generator=generator(config.seed, step, epoch)).to(device)
        for minibatch in order.tensor_split(config.num_minibatches):
            if (tokens := int(rollout.mask[minibatch].sum())) == 0:  # fewer answers than minibatches
                continue
            for rows, share in deal(by_tokens(rollout.length[minibatch].tolist(), config.microbatch)):
                rows = minibatch[rows]
                batch = rollout.select(rows)
                A, returns, old_values, ref_logp = (x[rows, : batch.tokens.shape[1]] for x in estimated)
                logp, *entropy, value = forward(model, critic, batch, entropy=config.ent_coef > 0)
                loss = clipped_surrogate(logp, batch.logp, A, *clips)
                if config.ent_coef:
                    loss = loss + config.ent_coef * entropy_bonus(*entropy)
                if config.beta and config.kl_in == "loss":
                    loss = loss + config.beta * kl_k3(logp, ref_logp)
                error = value_loss(value, old_values, returns, config.value_clip)
                weight = share * token_mean(batch.mask, tokens)
                weighted_sum(weight, loss + config.vf_coef * error).backward()
                averages.add(weight, value_loss=error, clip_fraction=is_clipped(logp, batch.logp, A, *clips))
            norms = clip_gradients(model, config.grad_clip, step), clip_gradients(critic, config.grad_clip, step)
            averages.update(grad_norm=norms[0], value_grad_norm=norms[1])
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return averages.metrics()


def sample(model, tokenizer, task: tasks.Task, problems: list, config: Config, answers: int, label: str):
    """`answers` judged answers per problem, at the temperature of training, at most P·G drawn together."""
    sampling = {"answers": answers, "max_tokens": config.max_completion_length, "temperature": config.temperature}
    sampling |= {"seed": config.seed, "template": config.template}
    rows = config.prompts * config.num_generations
    return sample_answers(model, tokenizer, task, problems, **sampling, rows_at_once=rows, label=label)


def evaluate(model, tokenizer, task: tasks.Task, problems: list[tasks.Problem], config: Config) -> dict[str, float]:
    """Figures of the policy on held-out problems."""
    grid = sample(model, tokenizer, task, problems, config, config.eval_answers, "validation")
    return {f"eval/{name}": value for name, value in summary(task, problems, grid).items()}


def main(config: Config) -> dict[str, float]:
    """Train; save the latest and the best checkpoint under out/checkpoint; return the last validation."""
    run = open_run(config.out, config, resume=config.resume, wandb=config.wandb)
    seed_everything(config.seed)
    device = pick(config.device)
    folder = config.out / "checkpoint"
    resumed = checkpoint.resume(folder) if config.resume else None
    task = tasks.load(config.task, config.data, allow_code=config.allow_code)
    train, held_out = task.problems("train"), tasks.spread(task.problems(config.eval_split), config.eval_problems)
    if config.prompts > len(train):
        raise ValueError(f"prompts = {config.prompts}: the task has {len(train)} training problems")
    dtype = pick_dtype(config.dtype, device)
    start = policy.origin(config.checkpoint, resumed)
    model, tokenizer, source = load_policy(start, device, dtype, recompute=config.recompute)
    learned = load_reward(config, tokenizer, device)
    reference = frozen_copy(model) if config.beta else model
    head = ValueHead(model.config.dim).to(device)
    critic = head if config.critic == "trunk" else ScalarModel(copy.deepcopy(model), head)
    shard(device, dtype, model, reference)
    shard(device, torch.float32 if critic is head else dtype, critic)
    optimizer = adamw(model.parameters(), config.learning_rate)
    value_optimizer = adamw(critic.parameters(), config.value_learning_rate)
    parts = {"optimizer": optimizer, "critic": critic, "value_optimizer": value_optimizer}
    parts |= {} if reference is model else {"reference": reference}

    asked = encode(tokenizer, [*held_out, *train], config.template)
    longest = config.max_completion_length + max(map(len, asked))
    shape = {"microbatch": config.microbatch, "rows": config.prompts * config.num_generations, "length": longest}
    shape |= {"reference": reference is not model, "critic": config.critic == "own", "recompute": config.recompute}
    memory.show(memory.step_memory(model, **shape), device)

    if resumed:
        state = policy.restore(resumed, model, parts)
    else:  # before `start` writes to the folder of the run, so that a refusal leaves nothing behind
        first = python_random(config.seed, 0).sample(train, min(64, 4 * config.prompts, len(train)))
        answers = sample(model, tokenizer, task, first, config, config.num_generations, "preflight")
        state, metrics = {"step": 0, "best": -1.0, "seconds": 0.0}, preflight(answers, config.min_mixed)
    run.start(state["step"] if resumed else -1)
    began = time.perf_counter() - state["seconds"]
    if not resumed:
        metrics |= evaluate(model, tokenizer, task, held_out, config)
        state["best"] = max(state["best"], metrics["eval/pass@1"])  # the best checkpoint beats the base
        run.log(0, metrics)
        print(f"before: validation pass@1 {metrics['eval/pass@1']:.1%}")

    for step in steps(state["step"], config.steps, config.out.name):
        clock = Clock(device)
        problems = python_random(config.seed, step).sample(train, config.prompts)
        rollout = act(model, tokenizer, problems, config, step)
        clock.lap("rollout")

        judging = beside(judge_rollout, rollout, tokenizer, task, problems, config.template)
        metrics = on_policy_check(model, rollout, config.microbatch, most=config.max_ratio_deviation)
        ref_logp = logprobs(reference, rollout, config.microbatch) if config.beta else rollout.logp
        values = state_values(model, critic, rollout, config.microbatch)
        clock.lap("reference")

        answers = judging.result()
        rewards = reward(answers, rollout, learned, config).to(device)
        clock.lap("judge")

        earned, estimated = estimate(rewards, values, ref_logp, rollout, config)
        model.requires_grad_(step > config.value_warmup)
        factor = min(1.0, (step - config.value_warmup) / max(1, config.warmup))
        optimizer.param_groups[0]["lr"] = config.learning_rate * max(0.0, factor)
        if learned is not None or any_judged(answers):
            metrics |= learn(model, critic, (optimizer, value_optimizer), rollout, estimated, config, step)
            returns = discounted_returns(earned, rollout.mask, config.gamma)
            metrics["train/explained_variance"] = explained_variance(values, returns, rollout.mask)
        if config.beta:
            weight = token_mean(rollout.mask, int(rollout.mask.sum()))
            metrics["train/kl"] = weighted_sum(weight, kl_k3(rollout.logp, ref_logp)).item()
        clock.lap("update")

        if step in stored_steps(config.steps, config.store_steps):
            clips = {"clip_low": config.epsilon_low, "clip_high": config.epsilon_high, "dual_clip": config.dual_clip}
            settings = {"groups": config.store_groups, "microbatch": config.microbatch}
            grids = estimated._asdict() if config.beta else estimated._replace(ref_logp=None)._asdict()
            settings |= {"clipped": partial(is_clipped, **clips), **grids}
            store(config.out, step, model, tokenizer, rollout, (problems, answers, rewards), **settings)
        metrics |= report(task, problems, rollout, answers, rewards) | clock.speeds(rollout, config.epochs)
        if learned is not None:
            metrics["train/reward"] = metrics["train/proxy"] = rewards.mean().item()
            if "train/accuracy" in metrics:  # some answers could be judged
                metrics["train/gold"] = metrics["train/accuracy"]
        due = step % config.eval_every == 0 or step == config.steps
        if due:
            metrics |= evaluate(model, tokenizer, task, held_out, config)
        run.log(step, metrics)
        show(step, config.steps, metrics)
        if due:
            shown = [(p.prompt, group[0]) for p, group in zip(problems[:8], answers)]
            run.samples(step, [{"problem": prompt, "text": a.text, "right": a.judged_right} for prompt, a in shown])
            best = metrics["eval/pass@1"] > state["best"]
            state |= {"step": step, "best": max(state["best"], metrics["eval/pass@1"])}
            state["seconds"] = time.perf_counter() - began
            saved = state | {name: part.state_dict() for name, part in parts.items()}
            checkpoint.save(folder, step, lambda path: policy.save(model, tokenizer, path, source), saved, best=best)
    run.result({"seconds/rl": time.perf_counter() - began, "memory/peak_gib": peak_memory_gib(device)})
    run.close()
    return [row for row in read_metrics(config.out) if "eval/pass@1" in row][-1]


if __name__ == "__main__":
    cli.run(main, Config, on_ranks=True)
