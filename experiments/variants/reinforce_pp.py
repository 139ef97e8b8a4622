"""REINFORCE++: PPO without a critic, the advantages whitened over the batch (arXiv:2501.03262).

    python -m experiments.variants.reinforce_pp --checkpoint runs/base/checkpoint --out runs/reinforce-pp

    J(θ) = E 1/Σ|o_i| Σ_i Σ_t min(r_it A_it, clip(r_it, 1-ε_low, 1+ε_high) A_it)
    A_it = (R_it - mean R) / std R          R_it = Σ_{l>=0} γ^l (r_{t+l} - β k1_{t+l})

A copy of reinforce.py. Mean and deviation are those of the whole batch, not of a group, so --num-generations 1 works
too. The ratio is clipped as in PPO, which allows several updates per rollout.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minir1 import checkpoint, cli, memory, policy, tasks
from minir1.advantages import at_last_token, discounted_returns, kl_in_reward, whiten
from minir1.data import by_tokens
from minir1.device import peak_memory_gib, pick, pick_dtype
from minir1.distributed import deal
from minir1.judge import Answer, any_judged, beside, judge_rollout, sample_answers, summary, unjudged_to_mean
from minir1.log import open_run, read_metrics, steps
from minir1.losses import clipped_surrogate, entropy_bonus, is_clipped, kl_k3
from minir1.model.shards import shard
from minir1.monitor import Averages, Clock, preflight, report, show
from minir1.optim import adamw, clip_gradients
from minir1.policy import frozen_copy, load_policy, logprobs, on_policy_check
from minir1.reduction import token_mean, weighted_sum
from minir1.rollout import Rollout, collect
from minir1.rollout_file import store, stored_steps
from minir1.seed import generator, python_random, seed_everything, stream
from minir1.settings import above, at_least, fraction
from minir1.templates import TEMPLATES, encode


@dataclass(frozen=True)
class Config:
    """REINFORCE++."""

    checkpoint: Path = Path("runs/base/checkpoint")  # the base: a Hugging Face folder, or a folder of checkpoints
    task: str = "countdown"  # a name, names joined by +, or the path of a .py file: see minir1/tasks
    data: str | None = None  # the folder or file that the task reads
    allow_code: bool = False  # the task may run programs that the model wrote, in a sandbox
    template: Literal[TEMPLATES] = "chat"
    steps: int = 40
    prompts: int = 32  # P, problems per step
    num_generations: int = 8  # G, answers per problem
    max_completion_length: int = 384  # token budget of an answer
    temperature: float = 1.0
    learning_rate: float = 3e-4  # AdamW
    warmup: int = 5  # steps
    epsilon_low: float = 0.2  # ε
    epsilon_high: float = 0.2  # ε
    gamma: float = 1.0  # γ, discount per token
    beta: float = 0.001  # β, KL coefficient, in the reward
    ent_coef: float = 0.0  # c_H, weight of the entropy bonus
    num_minibatches: int = 2  # optimizer steps per rollout
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
    out: Path = Path("runs/reinforce-pp")
    resume: bool = False
    microbatch: int = 8192  # most tokens of a forward pass; no result depends on it
    recompute: bool = False  # save memory: compute activations again in the backward pass
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32
    wandb: str = "off"

    def __post_init__(self):
        at_least(self, 1, "steps", "prompts", "num_generations", "max_completion_length", "num_minibatches")
        at_least(self, 1, "microbatch", "eval_every", "eval_problems", "eval_answers", "store_groups")
        at_least(self, 0, "learning_rate", "epsilon_low", "epsilon_high", "beta", "ent_coef", "warmup")
        at_least(self, 0, "accuracy_weight", "format_weight", "max_ratio_deviation", "seed", "store_steps")
        fraction(self, "min_mixed", "gamma")
        at_least(self, 1e-6, "temperature")
        above(self, 0, "grad_clip")


def act(model, tokenizer, problems: list[tasks.Problem], config: Config, step: int) -> Rollout:
    """P·G answers of the current policy, sampled at the temperature that the loss uses, without top-k or top-p."""
    sampling = {"answers": config.num_generations, "max_tokens": config.max_completion_length}
    sampling |= {"temperature": config.temperature, "seed": stream(config.seed, step)}
    prompts = encode(tokenizer, problems, config.template)
    return collect(model, prompts, stop=tokenizer.stops, **sampling)


def reward(answers: list[list[Answer]], config: Config) -> Tensor:
    """R by the rules alone: fp32 [P, G]."""
    weights = config.accuracy_weight, config.format_weight
    rules = [[weights[0] * a.right + weights[1] * a.format for a in group] for group in answers]
    return unjudged_to_mean(torch.tensor(rules), answers)


def advantages(rewards: Tensor, ref_logp: Tensor, rollout: Rollout, config: Config) -> Tensor:
    """A, fp32 [B, T]: what an answer earned less the KL penalty of the tokens to come, whitened over the batch."""
    earned = at_last_token(rewards.flatten(), rollout.mask)
    earned = kl_in_reward(earned, rollout.logp, ref_logp, rollout.mask, config.beta)
    return whiten(discounted_returns(earned, rollout.mask, config.gamma), rollout.mask)


def learn(model, optimizer, rollout: Rollout, advantage: Tensor, config: Config, step: int) -> dict[str, float]:
    """Update the policy on B = P·G rows; advantage: fp32 [B, T]. Returns averages over updates."""
    averages, device = Averages(), rollout.tokens.device
    order = torch.randperm(len(advantage), generator=generator(config.seed, step)).to(device)
    for minibatch in order.tensor_split(config.num_minibatches):
        if not len(minibatch):  # fewer answers than minibatches
            continue
        for rows, share in deal(by_tokens(rollout.length[minibatch].tolist(), config.microbatch)):
            rows = minibatch[rows]
            batch = rollout.select(rows)
            A = advantage[rows, : batch.tokens.shape[1]]
            settings = {"lengths": batch.length, "mask": batch.mask, "temperature": rollout.temperature}
            logp, entropy = model.logprob(batch.tokens, **settings, entropy=True)
            loss = clipped_surrogate(logp, batch.logp, A, config.epsilon_low, config.epsilon_high)
            loss = loss + config.ent_coef * entropy_bonus(entropy)
            weight = share * token_mean(batch.mask, int(rollout.mask[minibatch].sum()))
            weighted_sum(weight, loss).backward()
            averages.add(weight, clip_fraction=is_clipped(logp, batch.logp, A, config.epsilon_low, config.epsilon_high))
        averages.update(grad_norm=clip_gradients(model, config.grad_clip, step))
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
    reference = frozen_copy(model) if config.beta else model
    shard(device, dtype, model, reference)
    optimizer = adamw(model.parameters(), config.learning_rate)
    parts = {"optimizer": optimizer} | ({} if reference is model else {"reference": reference})

    asked = encode(tokenizer, [*held_out, *train], config.template)
    longest = config.max_completion_length + max(map(len, asked))
    shape = {"microbatch": config.microbatch, "rows": config.prompts * config.num_generations, "length": longest}
    shape |= {"reference": reference is not model, "recompute": config.recompute}
    memory.show(memory.step_memory(model, **shape), device)

    if resumed:
        state = policy.restore(resumed, model, parts)
    else:  # before `start` writes to the folder of the run, so that a refusal leaves nothing behind
        first = python_random(config.seed, 0).sample(train, min(64, 4 * config.prompts, len(train)))
        answers = sample(model, tokenizer, task, first, config, config.num_generations, "preflight")
        state = {"step": 0, "best": -1.0, "seconds": 0.0}
        metrics = preflight(answers, config.min_mixed)
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
        clock.lap("reference")

        answers = judging.result()
        rewards = reward(answers, config).to(device)
        clock.lap("judge")

        advantage = advantages(rewards, ref_logp, rollout, config)
        optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, step / max(1, config.warmup))
        if any_judged(answers):
            metrics |= learn(model, optimizer, rollout, advantage, config, step)
        if config.beta:
            weight = token_mean(rollout.mask, int(rollout.mask.sum()))
            metrics["train/kl"] = weighted_sum(weight, kl_k3(rollout.logp, ref_logp)).item()
        clock.lap("update")

        if step in stored_steps(config.steps, config.store_steps):
            settings = {"groups": config.store_groups, "microbatch": config.microbatch}
            settings["clipped"] = partial(is_clipped, clip_low=config.epsilon_low, clip_high=config.epsilon_high)
            settings |= {"advantage": advantage, "ref_logp": ref_logp if config.beta else None}
            store(config.out, step, model, tokenizer, rollout, (problems, answers, rewards), **settings)
        metrics |= report(task, problems, rollout, answers, rewards) | clock.speeds(rollout)
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
