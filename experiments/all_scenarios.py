"""RL for all scenarios: rules on reasoning, and at the end a learned reward on general prompts (R1, section 2.3.4).

    python -m experiments.all_scenarios --checkpoint runs/sft2/checkpoint --out runs/rl2
    python -m experiments.all_scenarios --checkpoint my-model --task gsm8k --data gsm8k --general-task my_prompts.py

    J(θ)      = that of r1_zero.py, at a lower temperature; each A_i is relative to the answers of its own prompt
    reasoning:  R_i = accuracy + 0.1·format + w·language
    general:    R_i = (s_i - mean s) / (std s + 1e-6) + 0.1·format + w·language

s_i is the score of a reward model (reward_model.py), mean and deviation are those of all general answers of the step. A
learned reward has no natural scale; standardised, every reward model weighs the same against the rules. Only the last
--preference-steps steps have general prompts (400 of R1's 1,700 steps): trained on a learned reward for longer, the
policy exploits its errors. train/reward_model is the mean of s_i. The verdicts and preferences of the general task are
logged as train/general and train/general_preference, eval/general and eval/general_preference; nothing is learned from
them. The other figures of answers are those of reasoning alone.

The checkpoint to use is the last: validation accuracy, which is of reasoning, would choose one from before the steps
that have general prompts. No checkpoint is marked as the best.

Departures from R1: the reward model scores whole rows [prompt | answer], as it was trained. R1 judges how helpful an
answer is by the summary after the thinking, and how harmless by all of it. Scores are standardised over the step. The
weights of the rules are r1_zero.py's: R1 adds accuracy and language consistency with equal weight, here w is 0.1, and
0.2 in the pipeline (r1.py).
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
from minir1.judge import Answer, beside, judge_rollout, sample_answers, summary, unjudged_to_mean
from minir1.log import open_run, read_metrics, steps
from minir1.losses import clipped_surrogate, is_clipped, kl_k3
from minir1.model.shards import shard
from minir1.monitor import Averages, Clock, preflight, report, show
from minir1.optim import adamw, clip_gradients
from minir1.policy import (
    learned_rewards,
    load_policy,
    load_reward_model,
    on_policy_check,
    reference_logprobs,
    reference_of,
)  # fmt: skip
from minir1.reduction import fixed_length, per_answer_mean, token_mean, weighted_sum
from minir1.rewards import language_consistency
from minir1.rollout import BUDGET, Rollout, collect, concatenate
from minir1.seed import generator, python_random, seed_everything, stream
from minir1.settings import above, at_least, fraction, same_steps
from minir1.templates import TEMPLATES, encode


@dataclass(frozen=True)
class Config:
    """RL for all scenarios."""

    checkpoint: Path = Path("runs/sft2/checkpoint")  # where to start: a Hugging Face folder, or a folder of checkpoints
    task: str = "countdown"  # of the reasoning problems: a name, names joined by +, or the path of a .py file
    data: str | None = None  # the folder or file that the task reads
    general_task: str = "world:talk"  # of the general prompts
    general_data: str | None = None  # what that reads
    reward_model: Path = Path("runs/reward-model/checkpoint")  # of general answers: a folder of reward_model.py
    allow_code: bool = False  # the tasks may run programs that the model wrote, in a sandbox
    template: Literal[TEMPLATES] = "chat"
    steps: int = 40
    prompts: int = 32  # P, problems per step, general ones included
    preference_steps: int = 10  # the last steps, which have general prompts too
    general_prompts: int = 16  # of the P problems of such a step
    num_generations: int = 8  # G, answers per problem
    max_completion_length: int = 384  # token budget of an answer
    temperature: float = 0.7
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
    language_weight: float = 0.1  # w, of the share of the thinking's words that are in the problem's language
    mask_truncated: bool = False  # truncated answers take no part in the loss
    grad_clip: float = 1.0
    max_ratio_deviation: float | None = None  # mean |r - 1| before an update; None: 0.001 in fp32, 0.05 in 16 bits
    min_mixed: float = 0.05  # the run starts only if this share of groups has right and wrong answers
    eval_every: int = 10  # steps
    eval_split: str = "validation"
    eval_problems: int = 200  # at most
    eval_answers: int = 2  # per problem
    seed: int = 0
    out: Path = Path("runs/rl2")
    resume: bool = False
    microbatch: int = 8192  # most tokens of a forward pass; no result depends on it
    recompute: bool = False  # save memory: compute activations again in the backward pass
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32
    wandb: str = "off"

    def __post_init__(self):
        at_least(self, 2, "num_generations")
        at_least(self, 1, "steps", "prompts", "max_completion_length", "num_minibatches", "epochs", "microbatch")
        at_least(self, 1, "eval_every", "eval_problems", "eval_answers")
        at_least(self, 0, "learning_rate", "epsilon_low", "epsilon_high", "beta", "warmup", "max_ratio_deviation")
        at_least(self, 0, "accuracy_weight", "format_weight", "seed")
        fraction(self, "min_mixed")
        at_least(self, 1e-6, "temperature")
        above(self, 0, "grad_clip")
        at_least(self, 0, "language_weight")
        at_least(self, 0, "reference_reset", "lora_rank", "lora_alpha")
        if self.reference_reset and (self.lora_rank or not self.beta):
            raise ValueError("reference_reset: with beta = 0 or lora_rank there is no copy of the model to reset")
        if not 1 <= self.preference_steps <= self.steps:
            raise ValueError(f"preference_steps = {self.preference_steps}: 1 to {self.steps}, the steps")
        if not 1 <= self.general_prompts < self.prompts:
            raise ValueError(f"general_prompts = {self.general_prompts}: 1 to {self.prompts - 1}, below prompts")


def act(model, tokenizer, problems: list[tasks.Problem], config: Config, seed: int) -> Rollout:
    """P·G answers of the current policy, sampled at the temperature that the loss uses, without top-k or top-p."""
    sampling = {"answers": config.num_generations, "max_tokens": config.max_completion_length}
    sampling |= {"temperature": config.temperature, "seed": seed}
    return collect(model, encode(tokenizer, problems, config.template), stop=tokenizer.stops, **sampling)


def language(problems: list[tasks.Problem], answers: list[list[Answer]]) -> Tensor:
    """The share of the thinking's words that are in the problem's language: fp32 [P, G]."""
    of_language = [[language_consistency(a.text, p.language) for a in group] for p, group in zip(problems, answers)]
    return torch.tensor(of_language)


def reward(
    answers: list[list[Answer]], config: Config, consistency: Tensor | None = None, scores: Tensor | None = None
) -> Tensor:
    """R: fp32 [P, G]. consistency: as from `language`; None: without a language reward.

    scores: of general answers, by the reward model, fp32 [P, G]; None: reasoning, by the rules.
    """
    R = config.format_weight * torch.tensor([[float(a.format) for a in group] for group in answers])
    if consistency is not None:
        R += config.language_weight * consistency
    if scores is not None:
        return R + (scores - scores.mean()) / (scores.std() + 1e-6)
    right = torch.tensor([[float(a.right) for a in group] for group in answers])
    return unjudged_to_mean(R + config.accuracy_weight * right, answers)


def general_figures(answers: list[list[Answer]], prefix: str) -> dict[str, float]:
    """What general answers are like; the verdicts and preferences of their task, if it gives any."""
    flat = [a for group in answers for a in group]
    values = {"": [a.right for a in flat if not a.unjudged]}
    values["_preference"] = [a.scores["preference"] for a in flat if "preference" in a.scores]
    values |= {"_format": [a.format for a in flat], "_length": [a.tokens for a in flat]}
    return {f"{prefix}/general{name}": sum(value) / len(value) for name, value in values.items() if value}


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
    sampling |= {"seed": config.seed, "template": config.template}
    rows = config.prompts * config.num_generations
    return sample_answers(model, tokenizer, task, problems, **sampling, rows_at_once=rows, label=label)


def evaluate(model, tokenizer, reasoning: tuple, general: tuple, config: Config) -> dict[str, float]:
    """Figures of the policy on held-out problems. reasoning, general: (task, problems)."""
    grid = sample(model, tokenizer, *reasoning, config, config.eval_answers, "validation")
    figures = {f"eval/{name}": value for name, value in summary(*reasoning, grid).items()}
    return figures | general_figures(sample(model, tokenizer, *general, config, config.eval_answers, "general"), "eval")


def main(config: Config) -> dict[str, float]:
    """Train; save the latest checkpoint under out/checkpoint; return the last validation."""
    run = open_run(config.out, config, resume=config.resume, wandb=config.wandb)
    seed_everything(config.seed)
    device = pick(config.device)
    folder = config.out / "checkpoint"
    resumed = checkpoint.resume(folder) if config.resume else None
    task = tasks.load(config.task, config.data, allow_code=config.allow_code)
    talk = tasks.load(config.general_task, config.general_data, allow_code=config.allow_code)
    (train, held_out), (prompts, held_out_prompts) = (
        (t.problems("train"), tasks.spread(t.problems(config.eval_split), config.eval_problems)) for t in (task, talk)
    )
    if config.prompts > len(train):
        raise ValueError(f"prompts = {config.prompts}: the task has {len(train)} training problems")
    if config.general_prompts > len(prompts):
        raise ValueError(f"general_prompts = {config.general_prompts}: the task has {len(prompts)} to train on")
    for problem in [*train, *prompts] if config.language_weight else ():
        language_consistency("", problem.language)  # a language without a known script is refused before the first step
    opening = {"lora_rank": config.lora_rank, "lora_alpha": config.lora_alpha, "recompute": config.recompute}
    start = policy.origin(config.checkpoint, resumed)
    dtype = pick_dtype(config.dtype, device)
    model, tokenizer, source = load_policy(start, device, dtype, **opening)
    reward_model = load_reward_model(config.reward_model, tokenizer, device, pick_dtype(config.dtype, device))
    reference = reference_of(model) if config.beta else model
    shard(device, dtype, model, reference)
    optimizer = adamw(model.parameters(), config.learning_rate)
    parts = {"optimizer": optimizer} | ({} if reference is model else {"reference": reference})

    asked = encode(tokenizer, [*held_out, *held_out_prompts, *train, *prompts], config.template)
    longest = config.max_completion_length + max(map(len, asked))
    shape = {"microbatch": config.microbatch, "rows": config.prompts * config.num_generations, "length": longest}
    shape |= {"reference": reference is not model, "recompute": config.recompute}
    memory.show(memory.step_memory(model, **shape), device)

    if resumed:
        state = policy.restore(resumed, model, parts)
        same_steps(config.steps, state["steps"], "the last ones differ")
    else:  # before `start` writes to the folder of the run, so that a refusal leaves nothing behind
        first = python_random(config.seed, 0).sample(train, min(64, 4 * config.prompts, len(train)))
        answers = sample(model, tokenizer, task, first, config, config.num_generations, "preflight")
        state, metrics = {"step": 0, "steps": config.steps, "seconds": 0.0}, preflight(answers, config.min_mixed)
    run.start(state["step"] if resumed else -1)
    began = time.perf_counter() - state["seconds"]
    if not resumed:
        metrics |= evaluate(model, tokenizer, (task, held_out), (talk, held_out_prompts), config)
        run.log(0, metrics)
        print(f"before: validation pass@1 {metrics['eval/pass@1']:.1%}")

    for step in steps(state["step"], config.steps, config.out.name):
        clock = Clock(device)
        count = config.general_prompts if step > config.steps - config.preference_steps else 0
        rng = python_random(config.seed, step)
        problems, general = rng.sample(train, config.prompts - count), rng.sample(prompts, count)
        rollout = reasoned = act(model, tokenizer, problems, config, stream(config.seed, step))
        judging = beside(judge_rollout, reasoned, tokenizer, task, problems, config.template)
        if general:
            talked = act(model, tokenizer, general, config, stream(config.seed, step, 1))
            rollout = concatenate([reasoned, talked])
        clock.lap("rollout")

        metrics = on_policy_check(model, rollout, config.microbatch, most=config.max_ratio_deviation)
        ref_logp = reference_logprobs(reference, rollout, config.microbatch) if config.beta else None
        clock.lap("reference")

        answers = judging.result()
        consistency = language(problems, answers) if config.language_weight else None
        rewards = reward(answers, config, consistency)
        advantage = group_advantages(rewards)
        metrics |= report(task, problems, reasoned, answers, rewards)
        metrics["train/sampled_tokens"] = int(rollout.mask.sum())  # general answers included
        if consistency is not None:
            metrics["train/language_consistency"] = consistency.mean().item()
        if general:
            replies = judge_rollout(talked, tokenizer, talk, general, config.template)
            scores = learned_rewards(reward_model, talked, config.microbatch).view(len(general), -1)
            consistency = language(general, replies) if config.language_weight else None
            general_rewards = reward(replies, config, consistency, scores)
            advantage = torch.cat([advantage, group_advantages(general_rewards)])
            metrics |= general_figures(replies, "train") | {"train/reward_model": scores.mean().item()}
        advantage = advantage.flatten().to(device)
        clock.lap("judge")

        optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, step / max(1, config.warmup))
        metrics |= learn(model, optimizer, rollout, advantage, ref_logp, config, step)
        clock.lap("update")

        metrics |= clock.speeds(rollout, config.epochs)
        if config.reference_reset and step % config.reference_reset == 0:
            reference.load_state_dict(model.state_dict())
        due = step % config.eval_every == 0 or step == config.steps
        if due:
            metrics |= evaluate(model, tokenizer, (task, held_out), (talk, held_out_prompts), config)
        run.log(step, metrics)
        show(step, config.steps, metrics)
        if due:
            both = [*zip(problems[:8], answers), *(zip(general[:8], replies) if general else ())]
            shown = [(p.prompt, group[0]) for p, group in both]
            run.samples(step, [{"problem": prompt, "text": a.text, "right": a.judged_right} for prompt, a in shown])
            state |= {"step": step, "seconds": time.perf_counter() - began}
            saved = state | {name: part.state_dict() for name, part in parts.items()}
            checkpoint.save(folder, step, lambda path: policy.save(model, tokenizer, path, source), saved)
    run.result({"seconds/rl": time.perf_counter() - began, "memory/peak_gib": peak_memory_gib(device)})
    run.close()
    return [row for row in read_metrics(config.out) if "eval/pass@1" in row][-1]


if __name__ == "__main__":
    cli.run(main, Config, on_ranks=True)
