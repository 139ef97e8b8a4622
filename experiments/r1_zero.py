"""R1-Zero: reinforcement learning of a base model with rule rewards alone, by GRPO (DeepSeek-R1, section 2.2).

    python -m experiments.r1_zero --checkpoint runs/base/checkpoint --out runs/r1-zero
    python -m experiments.r1_zero --checkpoint Qwen2.5-0.5B --task gsm8k --data gsm8k --template r1_zero --lora-rank 16
    python -m experiments.r1_zero --out runs/rl1 --language-weight 0.1 --epsilon-low 10 --epsilon-high 10

    J(θ) = E_q,{o_i}~π_old  1/G Σ_i 1/|o_i| Σ_t [ min(r_it A_i, clip(r_it, 1-ε, 1+ε) A_i) - β k3_it ]
    A_i  = (R_i - mean R) / (std R + 1e-6)         R_i = accuracy + 0.1·format + w·language
    r_it = π_θ(o_it | q, o_i<t) / π_old(…)         k3 = π_ref/π_θ - log(π_ref/π_θ) - 1

At ratio 1, ∇J(θ) = E 1/G Σ_i 1/|o_i| Σ_t (A_i + β (π_ref/π_θ - 1)) ∇log π_θ(o_it | q, o_i<t).
This is DeepSeekMath's objective, with one ratio per token (arXiv:2402.03300, equation 3). R1's paper writes one ratio
per answer, r_i = π_θ(o_i | q) / π_old(o_i | q), clips that, and has no 1/|o_i| (variants/sequence_grpo.py).
`--reduction` chooses the weights of the tokens: per_answer (1/G·1/|o_i|, as above), token (as in DAPO), fixed (as in
Dr. GRPO).

The third command, on a cold-started --checkpoint, is R1's first RL stage (section 2.3.2): language is the share of the
thinking's words that are in the problem's language, w is --language-weight, 0 in R1-Zero. The clip of 10 is that of the
version in Nature (2025): it bounds ratios above 11 where A > 0, and no ratio from below.

Departures from R1: the paper weights accuracy and format equally. Here the format is worth a tenth: at equal weights a
well-formed wrong answer earns half of all that can be earned, and the format is learned in a few steps anyway.
Truncated answers are rewarded as judged; --mask-truncated leaves them out of the loss. The default learning rate is a
hundred times R1's: the model of the demonstration has a million parameters.
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
from minir1.curriculum import Curriculum
from minir1.data import by_tokens
from minir1.device import peak_memory_gib, pick, pick_dtype
from minir1.distributed import deal
from minir1.judge import NO_THINK, Answer, beside, judge_rollout, sample_answers, summary, unjudged_to_mean
from minir1.log import open_run, read_metrics, steps
from minir1.losses import clipped_surrogate, is_clipped, kl_k3
from minir1.model.shards import shard
from minir1.monitor import Averages, Clock, preflight, report, show
from minir1.optim import adamw, clip_gradients
from minir1.policy import load_policy, on_policy_check, reference_logprobs, reference_of
from minir1.reduction import fixed_length, per_answer_mean, token_mean, weighted_sum
from minir1.rewards import language_consistency
from minir1.rollout import BUDGET, Rollout, collect
from minir1.rollout_file import store, stored_steps
from minir1.seed import generator, python_random, seed_everything, stream
from minir1.settings import above, at_least, fraction
from minir1.templates import TEMPLATES, encode


@dataclass(frozen=True)
class Config:
    """R1-Zero. The defaults are those of the ten-minute demonstration."""

    checkpoint: Path = Path("runs/base/checkpoint")  # the base: a Hugging Face folder, or a folder of checkpoints
    task: str = "countdown"  # a name, names joined by +, or the path of a .py file: see minir1/tasks
    data: str | None = None  # the folder or file that the task reads
    allow_code: bool = False  # the task may run programs that the model wrote, in a sandbox
    template: Literal[TEMPLATES] = "chat"
    steps: int = 40
    prompts: int = 32  # P, problems per step
    num_generations: int = 8  # G, answers per problem
    difficulty_window: tuple[float, float] | None = None  # problems outside these shares of right answers: drawn less
    max_completion_length: int = 384  # token budget of an answer
    temperature: float = 1.0
    learning_rate: float = 3e-4  # AdamW
    warmup: int = 5  # steps
    epsilon_low: float = 0.2  # ε
    epsilon_high: float = 0.2  # ε
    beta: float = 0.001  # β, KL coefficient
    reduction: Literal["per_answer", "token", "fixed"] = "per_answer"
    reference_reset: int = 0  # steps after which the reference becomes the policy again (R1: 400); 0: never
    lora_rank: int = 0  # r: train adapters only, with the model without them as the reference; 0: train all weights
    lora_alpha: float = 32.0  # α
    num_minibatches: int = 2  # optimizer steps per epoch, at most
    epochs: int = 1  # passes over a rollout
    accuracy_weight: float = 1.0
    format_weight: float = 0.1
    language_weight: float = 0.0  # w, of the share of the thinking's words that are in the problem's language
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
    out: Path = Path("runs/r1-zero")
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
        fraction(self, "difficulty_window")
        if self.difficulty_window and self.difficulty_window[0] > self.difficulty_window[1]:
            raise ValueError(f"difficulty_window = {self.difficulty_window}: the lower share comes first")
        at_least(self, 1e-6, "temperature")
        above(self, 0, "grad_clip")
        at_least(self, 0, "language_weight")
        at_least(self, 0, "reference_reset", "lora_rank", "lora_alpha")
        if self.reference_reset and (self.lora_rank or not self.beta):
            raise ValueError("reference_reset: with beta = 0 or lora_rank there is no copy of the model to reset")


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


def language(problems: list[tasks.Problem], answers: list[list[Answer]]) -> Tensor:
    """The share of the thinking's words that are in the problem's language: fp32 [P, G]."""
    of_language = [[language_consistency(a.text, p.language) for a in group] for p, group in zip(problems, answers)]
    return torch.tensor(of_language)


def reduction(mask: Tensor, config: Config, answers: int, tokens: int) -> Tensor:
    """Weights of the tokens in the loss, fp32 [B, T]; answers, tokens: how many the whole mini-batch trains on."""
    if config.reduction == "per_answer":
        return per_answer_mean(mask, answers)
    if config.reduction == "token":
        return token_mean(mask, tokens)
    return fixed_length(mask, config.max_completion_length, answers)


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
                loss = clipped_surrogate(logp, batch.logp, A, config.epsilon_low, config.epsilon_high)
                clipped = is_clipped(logp, batch.logp, A, config.epsilon_low, config.epsilon_high)
                weight = share * reduction(mask, config, answers, tokens)
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
    for problem in train if config.language_weight else ():
        language_consistency("", problem.language)  # a language without a known script is refused before the first step
    opening = {"lora_rank": config.lora_rank, "lora_alpha": config.lora_alpha, "recompute": config.recompute}
    start = policy.origin(config.checkpoint, resumed)
    dtype = pick_dtype(config.dtype, device)
    model, tokenizer, source = load_policy(start, device, dtype, **opening)
    reference = reference_of(model) if config.beta else model
    shard(device, dtype, model, reference)
    optimizer = adamw(model.parameters(), config.learning_rate)
    parts = {"optimizer": optimizer} | ({} if reference is model else {"reference": reference})
    parts["curriculum"] = curriculum = Curriculum(train, config.difficulty_window)

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
        if config.difficulty_window:
            print(f"difficulty_window: {config.num_generations} answers to each of {len(train)} problems are sampled")
            curriculum.measured(train, sample(model, tokenizer, task, train, config, config.num_generations, "measure"))
        metrics |= evaluate(model, tokenizer, task, held_out, config)
        state["best"] = max(state["best"], metrics["eval/pass@1"])  # the best checkpoint beats the base
        run.log(0, metrics)
        print(f"before: validation pass@1 {metrics['eval/pass@1']:.1%}")

    for step in steps(state["step"], config.steps, config.out.name):
        clock = Clock(device)
        problems = curriculum.draw(python_random(config.seed, step), config.prompts)
        rollout = act(model, tokenizer, problems, config, step)
        clock.lap("rollout")

        judging = beside(judge_rollout, rollout, tokenizer, task, problems, config.template, config.forced)
        metrics = on_policy_check(model, rollout, config.microbatch, most=config.max_ratio_deviation)
        ref_logp = reference_logprobs(reference, rollout, config.microbatch) if config.beta else None
        clock.lap("reference")

        answers = judging.result()
        curriculum.measured(problems, answers)
        rewards = reward(answers, config)
        if config.language_weight:
            consistency = language(problems, answers)
            rewards += config.language_weight * unjudged_to_mean(consistency, answers)
            metrics["train/language_consistency"] = consistency.mean().item()
        advantage = group_advantages(rewards).flatten().to(device)
        clock.lap("judge")

        optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, step / max(1, config.warmup))
        metrics |= learn(model, optimizer, rollout, advantage, ref_logp, config, step)
        clock.lap("update")

        if step in stored_steps(config.steps, config.store_steps):
            settings = {"groups": config.store_groups, "microbatch": config.microbatch}
            settings["clipped"] = partial(is_clipped, clip_low=config.epsilon_low, clip_high=config.epsilon_high)
            settings |= {"advantage": advantage, "ref_logp": ref_logp}
            store(config.out, step, model, tokenizer, rollout, (problems, answers, rewards), **settings)
        metrics |= report(task, problems, rollout, answers, rewards) | clock.speeds(rollout, config.epochs)
        metrics |= curriculum.metrics()
        if config.reference_reset and step % config.reference_reset == 0:
            reference.load_state_dict(model.state_dict())
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
