"""Self-check: while the policy learns from rewards, a head on its states learns whether the answer will be right.

    python -m experiments.variants.self_check --checkpoint runs/base/checkpoint --check-weight 0.5 --out runs/self-check

    L(θ) = L_RL + w/G · Σ_i 1/|o_i| · Σ_t (σ(e_it) - R_i)²        e_it = u·h_it, R_i = 1 if o_i is right, else 0

A copy of r1_zero.py. The squared error reaches the policy's weights through h_it, the state before each token; its
weights over tokens are those of the RL loss (--reduction), and answers that could not be judged add nothing. w is
--check-weight; 0 is r1_zero.py. u begins at 0 and has a learning rate of its own. experiments/self_verify.py trains
such a head on a frozen policy.
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
from minir1.advantages import group_advantages
from minir1.data import by_tokens
from minir1.device import peak_memory_gib, pick, pick_dtype
from minir1.distributed import deal
from minir1.judge import NO_THINK, Answer, beside, judge_rollout, sample_answers, summary, unjudged_to_mean
from minir1.log import open_run, read_metrics, steps
from minir1.losses import clipped_surrogate, is_clipped, kl_k3
from minir1.model.heads import ValueHead
from minir1.model.shards import shard
from minir1.monitor import Averages, Clock, preflight, report, show
from minir1.optim import adamw, clip_gradients
from minir1.policy import load_policy, on_policy_check, reference_logprobs, reference_of
from minir1.reduction import fixed_length, per_answer_mean, token_mean, weighted_sum
from minir1.rollout import Rollout, collect
from minir1.rollout_file import store, stored_steps
from minir1.seed import generator, python_random, seed_everything, stream
from minir1.settings import above, at_least, fraction
from minir1.templates import TEMPLATES, encode


@dataclass(frozen=True)
class Config:
    """Self-check."""

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
    check_weight: float = 0.5  # w, of the squared error of the self-check
    check_learning_rate: float = 3e-3  # of u, AdamW
    epsilon_low: float = 0.2  # ε
    epsilon_high: float = 0.2  # ε
    beta: float = 0.001  # β, KL coefficient
    reduction: Literal["per_answer", "token", "fixed"] = "per_answer"
    num_minibatches: int = 2  # optimizer steps per epoch, at most
    epochs: int = 1  # passes over a rollout
    accuracy_weight: float = 1.0
    format_weight: float = 0.1
    no_think: bool = False  # the control: every answer begins with empty thinking
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
    out: Path = Path("runs/self-check")
    resume: bool = False
    microbatch: int = 8192  # most tokens of a forward pass; no result depends on it
    recompute: bool = False  # save memory: compute activations again in the backward pass
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32
    wandb: str = "off"

    @property
    def forced(self) -> str:
        """The text that every answer is made to begin with."""
        return NO_THINK if self.no_think else ""

    def __post_init__(self):
        at_least(self, 2, "num_generations")
        at_least(self, 1, "steps", "prompts", "max_completion_length", "num_minibatches", "epochs", "microbatch")
        at_least(self, 1, "eval_every", "eval_problems", "eval_answers", "store_groups")
        at_least(self, 0, "learning_rate", "epsilon_low", "epsilon_high", "beta", "warmup", "max_ratio_deviation")
        at_least(self, 0, "accuracy_weight", "format_weight", "seed", "store_steps")
        at_least(self, 0, "check_weight", "check_learning_rate")
        fraction(self, "min_mixed")
        at_least(self, 1e-6, "temperature")
        above(self, 0, "grad_clip")


def act(model, tokenizer, problems: list[tasks.Problem], config: Config, step: int) -> Rollout:
    """P·G answers of the current policy, sampled at the temperature that the loss uses, without top-k or top-p."""
    sampling = {"answers": config.num_generations, "max_tokens": config.max_completion_length}
    sampling |= {"temperature": config.temperature, "seed": stream(config.seed, step)}
    prompts = encode(tokenizer, problems, config.template, config.forced)
    return collect(model, prompts, stop=tokenizer.stops, **sampling)


def reward(answers: list[list[Answer]], config: Config) -> Tensor:
    """R by the rules alone: fp32 [P, G]."""
    weights = config.accuracy_weight, config.format_weight
    rules = [[weights[0] * a.right + weights[1] * a.format for a in group] for group in answers]
    return unjudged_to_mean(torch.tensor(rules), answers)


def reduction(mask: Tensor, config: Config, answers: int, tokens: int) -> Tensor:
    """Weights of the tokens in the loss, fp32 [B, T]; answers, tokens: how many the whole mini-batch trains on."""
    if config.reduction == "per_answer":
        return per_answer_mean(mask, answers)
    if config.reduction == "token":
        return token_mean(mask, tokens)
    return fixed_length(mask, config.max_completion_length, answers)


def learn(model, optimizer, rollout: Rollout, advantage, ref_logp, config: Config, step: int, head, check, right):
    """Update the policy on B = P·G rows. advantage: fp32 [B]; ref_logp: fp32 [B, T]. Returns averages over updates.

    check: the optimizer of the head; right: fp32 [B], 1 or 0, NaN of an answer that was not judged.
    """
    averages, device, judged = Averages(), rollout.tokens.device, right.isfinite().unsqueeze(1)
    for epoch in range(config.epochs):
        order = torch.randperm(len(advantage), generator=generator(config.seed, step, epoch)).to(device)
        for minibatch in order.tensor_split(config.num_minibatches):
            answers, tokens = int(rollout.mask[minibatch].any(1).sum()), int(rollout.mask[minibatch].sum())
            if tokens == 0:  # fewer answers than minibatches
                continue
            for rows, share in deal(by_tokens(rollout.length[minibatch].tolist(), config.microbatch)):
                rows = minibatch[rows]
                batch = rollout.select(rows)
                T = batch.tokens.shape[1]
                mask, A = batch.mask, advantage[rows].unsqueeze(1).expand(-1, T)
                where = {"lengths": batch.length, "mask": mask, "temperature": rollout.temperature}
                logp, e = model.logprob(batch.tokens, **where, value=head)
                loss = clipped_surrogate(logp, batch.logp, A, config.epsilon_low, config.epsilon_high)
                clipped = is_clipped(logp, batch.logp, A, config.epsilon_low, config.epsilon_high)
                weight = share * reduction(mask, config, answers, tokens)
                if ref_logp is not None:
                    kl = kl_k3(logp, ref_logp[rows, :T])
                    loss = loss + config.beta * kl
                    averages.add(weight, kl=kl)
                if config.check_weight:
                    error = (torch.sigmoid(e) - right[rows].nan_to_num().unsqueeze(1)).square() * judged[rows]
                    loss = loss + config.check_weight * error
                    averages.add(weight * judged[rows], check_error=error)
                weighted_sum(weight, loss).backward()
                averages.add(weight, clip_fraction=clipped)
            averages.update(grad_norm=clip_gradients(model, config.grad_clip, step))
            for each in (optimizer, check):
                each.step()
                each.zero_grad(set_to_none=True)
    return averages.metrics()


def sample(model, tokenizer, task: tasks.Task, problems: list, config: Config, answers: int, label: str):
    """`answers` judged answers per problem, at the temperature of training, at most P·G drawn together."""
    sampling = {"answers": answers, "max_tokens": config.max_completion_length, "temperature": config.temperature}
    sampling |= {"seed": config.seed, "template": config.template, "forced": config.forced}
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
    opening = {"recompute": config.recompute}
    start = policy.origin(config.checkpoint, resumed)
    dtype = pick_dtype(config.dtype, device)
    model, tokenizer, source = load_policy(start, device, dtype, **opening)
    head = ValueHead(model.config.dim).to(device)
    reference = reference_of(model) if config.beta else model
    shard(device, dtype, model, reference)
    shard(device, torch.float32, head)
    optimizer = adamw(model.parameters(), config.learning_rate)
    check = adamw(head.parameters(), config.check_learning_rate)
    parts = {"optimizer": optimizer, "head": head, "check_optimizer": check}
    parts |= {} if reference is model else {"reference": reference}

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

        judging = beside(judge_rollout, rollout, tokenizer, task, problems, config.template, config.forced)
        metrics = on_policy_check(model, rollout, config.microbatch, most=config.max_ratio_deviation)
        ref_logp = reference_logprobs(reference, rollout, config.microbatch) if config.beta else None
        clock.lap("reference")

        answers = judging.result()
        rewards = reward(answers, config)
        advantage = group_advantages(rewards).flatten().to(device)
        clock.lap("judge")

        optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, step / max(1, config.warmup))
        right = torch.tensor([torch.nan if a.unjudged else float(a.right) for g in answers for a in g], device=device)
        metrics |= learn(model, optimizer, rollout, advantage, ref_logp, config, step, head, check, right)
        clock.lap("update")

        if step in stored_steps(config.steps, config.store_steps):
            settings = {"groups": config.store_groups, "microbatch": config.microbatch}
            settings["clipped"] = partial(is_clipped, clip_low=config.epsilon_low, clip_high=config.epsilon_high)
            settings |= {"advantage": advantage, "ref_logp": ref_logp}
            store(config.out, step, model, tokenizer, rollout, (problems, answers, rewards), **settings)
        metrics |= report(task, problems, rollout, answers, rewards) | clock.speeds(rollout, config.epochs)
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
