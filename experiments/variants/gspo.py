"""GSPO: one importance ratio per answer, length-normalised (arXiv:2507.18071, section 4.1).

    python -m experiments.variants.gspo --checkpoint runs/base/checkpoint --out runs/gspo

    J(θ) = E 1/G Σ_i min(s_i A_i, clip(s_i, 1-ε_low, 1+ε_high) A_i)      s_i = (π_θ(o_i | q) / π_old(o_i | q))^{1/|o_i|}

A copy of r1_zero.py. s_i is the geometric mean of the per-token ratios, so an answer is clipped as a whole or not at
all. It stays nearer to 1, hence the narrow clip of the paper. No KL by default.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
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
from minir1.losses import gspo, is_clipped, kl_k3
from minir1.model.shards import shard
from minir1.monitor import Averages, Clock, preflight, report, show
from minir1.optim import adamw, clip_gradients
from minir1.policy import load_policy, on_policy_check, reference_logprobs, reference_of
from minir1.reduction import per_answer_mean, weighted_sum
from minir1.rollout import BUDGET, Rollout, collect
from minir1.rollout_file import store, stored_steps
from minir1.seed import generator, python_random, seed_everything, stream
from minir1.settings import above, at_least, fraction
from minir1.templates import TEMPLATES, encode


@dataclass(frozen=True)
class Config:
    """GSPO."""

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
    epsilon_low: float = 3e-4  # ε
    epsilon_high: float = 4e-4  # ε
    beta: float = 0.0  # β, KL coefficient
    num_minibatches: int = 2  # optimizer steps per epoch, at most
    epochs: int = 1  # passes over a rollout
    accuracy_weight: float = 1.0
    format_weight: float = 0.1
    mask_truncated: bool = False  # truncated answers take no part in the loss
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
    out: Path = Path("runs/gspo")
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


def learn(model, optimizer, rollout: Rollout, advantage: Tensor, ref_logp: Tensor | None, config: Config, step: int):
    """Update the policy on B = P·G rows. advantage: fp32 [B]; ref_logp: fp32 [B, T]. Returns averages over updates."""
    averages, device = Averages(), rollout.tokens.device
    trained = rollout.mask & (rollout.stop != BUDGET).unsqueeze(1) if config.mask_truncated else rollout.mask
    for epoch in range(config.epochs):
        order = torch.randperm(len(advantage), generator=generator(config.seed, step, epoch)).to(device)
        for minibatch in order.tensor_split(config.num_minibatches):
            answers, tokens = int(trained[minibatch].any(1).sum()), int(trained[minibatch].sum())
            if tokens == 0:  # every answer was truncated and masked
                continue
            for rows, share in deal(by_tokens(rollout.length[minibatch].tolist(), config.microbatch)):
                rows = minibatch[rows]
                batch = rollout.select(rows)
                T = batch.tokens.shape[1]
                mask, A = trained[rows, :T], advantage[rows].unsqueeze(1).expand(-1, T)
                logp = model.logprob(batch.tokens, lengths=batch.length, mask=mask, temperature=rollout.temperature)
                loss = gspo(logp, batch.logp, A, config.epsilon_low, config.epsilon_high, mask)
                log_ratio = (logp - batch.logp).where(mask, 0.0).sum(1, keepdim=True).expand_as(A)
                log_ratio = log_ratio / mask.sum(1, keepdim=True).clamp(min=1)
                clipped = is_clipped(log_ratio, torch.zeros_like(logp), A, config.epsilon_low, config.epsilon_high)
                weight = share * per_answer_mean(mask, answers)
                if ref_logp is not None:
                    kl = kl_k3(logp, ref_logp[rows, :T])
                    loss = loss + config.beta * kl
                    averages.add(weight, kl=kl)
                weighted_sum(weight, loss).backward()
                averages.add(weight, clip_fraction=clipped)
            averages.update(grad_norm=clip_gradients(model, config.grad_clip, step))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
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
    reference = reference_of(model) if config.beta else model
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
        metrics |= learn(model, optimizer, rollout, advantage, ref_logp, config, step)
        clock.lap("update")

        if step in stored_steps(config.steps, config.store_steps):
            settings = {"groups": config.store_groups, "microbatch": config.microbatch}
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
