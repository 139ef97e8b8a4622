"""On-policy distillation: the student writes, and the teacher says of every token how likely it would have been.

    python -m experiments.distill_on_policy --student runs/small/checkpoint --teacher runs/r1/rl-2/checkpoint
    python -m experiments.distill_on_policy --student Qwen2.5-0.5B --teacher Qwen2.5-7B --task gsm8k --data gsm8k
    python -m experiments.distill_on_policy --beta 1 --out runs/distill-exact

    J(θ) = E_q,{o}~S  mean over all tokens of min(r_t A_t, clip(r_t, 1-ε, 1+ε) A_t)
    A_t  = -(log S(o_t | q, o_<t) - log T(o_t | q, o_<t)) + w·A_R        r_t = S_θ / S_old

A policy gradient whose reward is dense: each token has its own, and none counts for those before it (discount 0). The
expectation is the gradient of KL(S‖T) at the prefixes that the student wrote, where text of the teacher never goes
(docs/distillation.md). --beta takes that divergence exactly, over the whole vocabulary, L = D_β(T, S), in place of the
sampled one: 1 is KL(S‖T) itself, 0 KL(T‖S), between them generalised Jensen-Shannon (GKD, arXiv:2306.13649).

w is --reward-weight. A_R is the answer's advantage in its group by the rules of r1_zero.py, R = accuracy + 0.1·format.
At w = 0, and with one answer to a prompt, the task gives the prompts alone, and verdicts are only logged.

S and T are distributions at --temperature, at which the student samples. Both read the tokens of the student's
template. In nats, train/reverse_kl is the mean of log S - log T over the sampled tokens, train/divergence that of D_β.
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
from minir1.distill import reverse_kl_advantage
from minir1.distributed import deal
from minir1.judge import Answer, beside, judge_rollout, sample_answers, summary, unjudged_to_mean
from minir1.log import open_run, read_metrics, steps
from minir1.losses import clipped_surrogate
from minir1.model.divergence import divergence, log_probs
from minir1.model.shards import shard
from minir1.model.transformer import Transformer
from minir1.monitor import Averages, Clock, report, show
from minir1.optim import adamw, clip_gradients
from minir1.policy import load_policy, load_teacher, logprobs, on_policy_check
from minir1.reduction import token_mean, weighted_sum
from minir1.rollout import Rollout, collect
from minir1.seed import generator, python_random, seed_everything, stream
from minir1.settings import above, at_least, fraction
from minir1.templates import TEMPLATES, encode


@dataclass(frozen=True)
class Config:
    """On-policy distillation. The defaults suit models of a million parameters."""

    student: Path = Path("runs/small/checkpoint")  # where to start: a Hugging Face folder, or a folder of checkpoints
    teacher: Path = Path("runs/r1/rl-2/checkpoint")  # likewise
    task: str = "countdown"  # of the prompts: a name, names joined by +, or the path of a .py file: see minir1/tasks
    data: str | None = None  # the folder or file that the task reads
    allow_code: bool = False  # the task may run programs that the model wrote, in a sandbox
    template: Literal[TEMPLATES] = "chat"
    beta: float | None = None  # β of the exact divergence: 1 KL(S‖T), 0 KL(T‖S); None: KL(S‖T) by sampled tokens
    reward_weight: float = 0.0  # w, of the task's rewards
    steps: int = 40
    prompts: int = 64  # P, problems per step
    num_generations: int = 4  # G, answers per problem
    max_completion_length: int = 384  # token budget of an answer
    temperature: float = 1.0  # τ
    learning_rate: float = 5e-4  # AdamW
    warmup: int = 5  # steps
    epsilon_low: float = 0.2  # ε, where sampled tokens have advantages
    epsilon_high: float = 0.2  # ε, likewise
    lora_rank: int = 0  # r: train adapters only; 0: train all weights
    lora_alpha: float = 32.0  # α
    num_minibatches: int = 2  # optimizer steps per rollout, at most
    grad_clip: float = 1.0
    max_ratio_deviation: float | None = None  # mean |r - 1| before an update; None: 0.001 in fp32, 0.05 in 16 bits
    eval_every: int = 10  # steps
    eval_split: str = "validation"
    eval_problems: int = 200  # at most
    eval_answers: int = 2  # per problem
    seed: int = 0
    out: Path = Path("runs/distill-on-policy")
    resume: bool = False
    microbatch: int = 8192  # most tokens of a forward pass; no result depends on it
    recompute: bool = False  # save memory: compute activations again in the backward pass
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the student; None: bfloat16 on CUDA, else float32
    teacher_dtype: Literal["float32", "bfloat16"] | None = None  # None: that of the student
    wandb: str = "off"

    def __post_init__(self):
        at_least(self, 1, "steps", "prompts", "num_generations", "max_completion_length", "num_minibatches")
        at_least(self, 1, "microbatch", "eval_every", "eval_problems", "eval_answers")
        at_least(self, 0, "learning_rate", "warmup", "epsilon_low", "epsilon_high", "max_ratio_deviation")
        at_least(self, 0, "reward_weight", "lora_rank", "lora_alpha", "seed")
        at_least(self, 1e-6, "temperature")
        above(self, 0, "grad_clip")
        fraction(self, "beta")
        if self.reward_weight and self.num_generations == 1:
            raise ValueError(f"reward_weight = {self.reward_weight}: needs a group, num_generations of 2 or more")
        if self.beta is not None and not self.reward_weight and (self.epsilon_low, self.epsilon_high) != (0.2, 0.2):
            raise ValueError(f"epsilon: without advantages of sampled tokens (beta = {self.beta}) nothing is clipped")


def act(model: Transformer, tokenizer, problems: list[tasks.Problem], config: Config, step: int) -> Rollout:
    """P·G answers of the student, without top-k or top-p."""
    sampling = {"answers": config.num_generations, "max_tokens": config.max_completion_length}
    sampling |= {"temperature": config.temperature, "seed": stream(config.seed, step)}
    return collect(model, encode(tokenizer, problems, config.template), stop=tokenizer.stops, **sampling)


def reward(answers: list[list[Answer]]) -> Tensor:
    """R by the rules: fp32 [P, G]."""
    return unjudged_to_mean(torch.tensor([[a.right + 0.1 * a.format for a in group] for group in answers]), answers)


def exact(model: Transformer, teacher: Transformer, batch: Rollout, h: Tensor, config: Config) -> Tensor:
    """D_β of the whole distributions at every answer token, [M]. h: the student's states there, [M, D]."""
    with torch.no_grad():
        h_t = teacher.states(batch.tokens, lengths=batch.length, mask=batch.mask)
    return divergence(model, h, teacher, h_t, config.beta, config.temperature)


def learn(
    model: Transformer, teacher: Transformer, optimizer, rollout: Rollout, advantage: Tensor, config: Config, step: int
) -> dict[str, float]:
    """Update the student on B rows. advantage: fp32 [B, T], of each token. Returns averages over updates."""
    averages = Averages()
    sampled = config.beta is None or config.reward_weight  # whether advantages of sampled tokens are in the loss
    order = torch.randperm(len(advantage), generator=generator(config.seed, step)).to(advantage.device)
    for minibatch in order.tensor_split(config.num_minibatches):
        if (tokens := int(rollout.mask[minibatch].sum())) == 0:  # fewer answers than minibatches
            continue
        for rows, share in deal(by_tokens(rollout.length[minibatch].tolist(), config.microbatch)):
            rows = minibatch[rows]
            batch = rollout.select(rows)
            mask = batch.mask  # [B, T]; what follows is of its M answer tokens, in the order of the rows
            weight, A = share * token_mean(mask, tokens)[mask], advantage[rows, : mask.shape[1]][mask]
            h = model.states(batch.tokens, lengths=batch.length, mask=mask)
            loss = torch.zeros_like(weight)
            if config.beta is not None:
                distance = exact(model, teacher, batch, h, config)
                averages.add(weight, divergence=distance)
                loss = loss + distance
            if sampled:
                logp = log_probs(model, h, batch.tokens[mask], config.temperature)
                loss = loss + clipped_surrogate(logp, batch.logp[mask], A, config.epsilon_low, config.epsilon_high)
            weighted_sum(weight, loss).backward()
        averages.update(grad_norm=clip_gradients(model, config.grad_clip, step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return averages.metrics()


def evaluate(model, tokenizer, task: tasks.Task, problems: list[tasks.Problem], config: Config) -> dict[str, float]:
    """Figures of the student on held-out problems, at the temperature of training."""
    sampling = {"answers": config.eval_answers, "max_tokens": config.max_completion_length, "seed": config.seed}
    sampling |= {"temperature": config.temperature, "template": config.template, "label": "validation"}
    rows = config.prompts * config.num_generations
    grid = sample_answers(model, tokenizer, task, problems, **sampling, rows_at_once=rows)
    return {f"eval/{name}": value for name, value in summary(task, problems, grid).items()}


def main(config: Config) -> dict[str, float]:
    """Train; save the student under out/checkpoint; return the last validation."""
    run = open_run(config.out, config, resume=config.resume, wandb=config.wandb)
    seed_everything(config.seed)
    device = pick(config.device)
    folder = config.out / "checkpoint"
    resumed = checkpoint.resume(folder) if config.resume else None
    task = tasks.load(config.task, config.data, allow_code=config.allow_code)
    train, held_out = task.problems("train"), tasks.spread(task.problems(config.eval_split), config.eval_problems)
    if config.prompts > len(train):
        raise ValueError(f"prompts = {config.prompts}: the task has {len(train)} training problems")
    opening = {"lora_rank": config.lora_rank, "lora_alpha": config.lora_alpha, "recompute": config.recompute}
    start = policy.origin(config.student, resumed)
    dtype = pick_dtype(config.dtype, device)
    model, tokenizer, source = load_policy(start, device, dtype, **opening)
    used = pick_dtype(config.teacher_dtype or config.dtype, device)
    teacher = load_teacher(config.teacher, tokenizer, device, used)
    shard(device, dtype, model)
    shard(device, used, teacher)
    optimizer = adamw(model.parameters(), config.learning_rate)
    parts = {"optimizer": optimizer}

    asked = encode(tokenizer, [*held_out, *train], config.template)
    longest = config.max_completion_length + max(map(len, asked))
    shape = {"microbatch": config.microbatch, "rows": config.prompts * config.num_generations, "length": longest}
    memory.show(memory.step_memory(model, **shape, recompute=config.recompute), device)

    state = policy.restore(resumed, model, parts) if resumed else {"step": 0, "best": -1.0, "seconds": 0.0, "tokens": 0}
    run.start(state["step"] if resumed else -1)
    began = time.perf_counter() - state["seconds"]
    if not resumed:
        metrics = evaluate(model, tokenizer, task, held_out, config)
        state["best"] = max(state["best"], metrics["eval/pass@1"])  # the best checkpoint beats the start
        run.log(0, metrics)
        print(f"before: validation pass@1 {metrics['eval/pass@1']:.1%}")

    tokens = state["tokens"]
    for step in steps(state["step"], config.steps, config.out.name):
        clock = Clock(device)
        problems = python_random(config.seed, step).sample(train, config.prompts)
        rollout = act(model, tokenizer, problems, config, step)
        tokens += int(rollout.mask.sum())
        clock.lap("rollout")

        judging = beside(judge_rollout, rollout, tokenizer, task, problems, config.template, "")
        metrics = on_policy_check(model, rollout, config.microbatch, most=config.max_ratio_deviation)
        teacher_logp = logprobs(teacher, rollout, config.microbatch) if config.beta is None else None
        clock.lap("teacher")

        answers = judging.result()
        rewards = reward(answers)
        advantage = torch.zeros_like(rollout.logp)
        if config.beta is None:
            advantage = reverse_kl_advantage(rollout.logp, teacher_logp)
            metrics["train/reverse_kl"] = -advantage[rollout.mask].mean().item()
        if config.reward_weight:
            relative = group_advantages(rewards).flatten().to(device)
            advantage = advantage + config.reward_weight * relative.unsqueeze(1)
        clock.lap("judge")

        optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, step / max(1, config.warmup))
        metrics |= learn(model, teacher, optimizer, rollout, advantage, config, step)
        clock.lap("update")

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
            state |= {"step": step, "best": max(state["best"], metrics["eval/pass@1"]), "tokens": tokens}
            state["seconds"] = time.perf_counter() - began
            saved = state | {name: part.state_dict() for name, part in parts.items()}
            checkpoint.save(folder, step, lambda path: policy.save(model, tokenizer, path, source), saved, best=best)
    seconds = {"seconds/distill": time.perf_counter() - began, "memory/peak_gib": peak_memory_gib(device)}
    run.result(seconds | {"tokens": tokens})
    run.close()
    return [row for row in read_metrics(config.out) if "eval/pass@1" in row][-1]


if __name__ == "__main__":
    cli.run(main, Config, on_ranks=True)
