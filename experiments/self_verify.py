"""How early does a model know that its answer is right? A head reads it off the hidden state, and uses of it.

    python -m experiments.self_verify --checkpoint runs/r1-zero/checkpoint
    python -m experiments.self_verify --checkpoint runs/r1/rl-2/checkpoint --task world --out runs/self-verify

    e_t = f(h_t, a_t)        L = mean over answers, and over their tokens, of (σ(e_t) - y)²

The model is frozen; f is minir1/model/heads.SelfCheckHead on its state after each token of sampled answers to training
problems. y is whether the answer is right, by the task's verifier, and, in a second output, whether the try that is
being written is a solution, for a task that says where tries are (`attempts`). Squared error is a proper score: its
minimum is the probability. Measured on other problems, of which those with an answer that could not be judged are left
out:

    by position   AUC after 1, 2, 4 … tokens, among the answers that are longer, and at the end: over all pairs of
                  answers, over pairs of answers to one problem, and as a baseline of the mean log-prob of the tokens so
                  far; at the end also of how few they are. Of tries, after each quarter
    calibration   of e at the end, in ten bins
    best of k     the answer with the highest e at its end, against the majority and a random pick, k = 1, 2, 4 …
    restart       an answer is stopped where e first falls below a threshold, and the next one begun, at most n:
                  accuracy by sampled tokens, over all n orders that begin with another answer

result.json and figures/self_verify.png have the figures, head.pt the weights of the head.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from experiments import self_verify_figure
from experiments.self_verify_measures import Trace, best_of, by_position, of_tries, positions, restart
from minir1 import checkpoint, cli, tasks
from minir1.data import by_tokens
from minir1.device import peak_memory_gib, pick, pick_dtype
from minir1.judge import judge_rollout
from minir1.log import open_run, progress, progress_line, steps, table
from minir1.metrics import calibration, with_interval
from minir1.model import hf
from minir1.model.heads import SelfCheckHead
from minir1.model.transformer import Transformer
from minir1.optim import clip_gradients, warmup_cosine
from minir1.rollout import Rollout, collect
from minir1.seed import generator, seed_everything, stream
from minir1.settings import above, at_least
from minir1.templates import TEMPLATES, encode
from minir1.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    """The head, and what it is measured on."""

    checkpoint: Path = Path("runs/r1-zero/checkpoint")  # a Hugging Face folder, or a folder of checkpoints
    task: str = "countdown"  # a name, names joined by +, or the path of a .py file: see minir1/tasks
    data: str | None = None  # the folder or file that the task reads
    allow_code: bool = False  # the task may run programs that the model wrote, in a sandbox
    template: Literal[TEMPLATES] = "chat"
    problems: int = 600  # training problems, at most
    answers: int = 4  # to each of them
    test_problems: int = 300  # at most
    num_generations: int = 8  # n, answers to each test problem
    max_completion_length: int = 384  # token budget of an answer
    temperature: float = 1.0
    inner: int = 64  # width of the head's hidden layer
    steps: int = 300
    batch: int = 64  # answers per step
    learning_rate: float = 3e-3  # AdamW; rises over 10 steps, falls along a cosine to a tenth
    weight_decay: float = 0.01
    thresholds: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)  # of restarts
    seed: int = 0
    out: Path = Path("runs/self-verify")
    rows_at_once: int = 512  # answers sampled together; no answer depends on it
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32
    wandb: str = "off"

    def __post_init__(self):
        at_least(self, 1, "problems", "answers", "test_problems", "max_completion_length", "inner", "steps", "batch")
        at_least(self, 2, "num_generations")
        at_least(self, 1, "rows_at_once")
        at_least(self, 0, "weight_decay", "seed")
        at_least(self, 1e-6, "temperature")
        above(self, 0, "learning_rate")
        if not self.thresholds or not all(0 < threshold < 1 for threshold in self.thresholds):
            raise ValueError(f"thresholds = {self.thresholds}: each above 0 and below 1")


def token_ends(tokenizer: Tokenizer, tokens: list[int], begun: int) -> list[int]:
    """After how many characters of the answer's text each token ends; begun: characters before the first token."""
    return [begun + len(tokenizer.decode(tokens[:n])) for n in range(1, len(tokens) + 1)]


def tries_of(task: tasks.Task, problem: tasks.Problem, text: str, ends: Sequence[int]) -> list[tuple[int, int, bool]]:
    """`Task.attempts` in tokens instead of characters; ends: `token_ends`."""
    tries = []
    for start, end, solved in task.attempts(problem, text) if task.attempts else ():
        first = int(np.searchsorted(ends, start, side="right"))  # the token with the character at `start`
        last = int(np.searchsorted(ends, end, side="right")) - 1  # the last that ends before the verdict
        if first <= last:
            tries.append((first, last, solved))
    return tries


@torch.no_grad()
def traces(
    model: Transformer, tokenizer: Tokenizer, task: tasks.Task, problems: list, answers: int, config: Config, seed: int
) -> list[list[Trace]]:
    """Sampled and judged answers with their states: [P][answers]."""
    grid, size = [], max(1, config.rows_at_once // answers)
    with progress(len(problems), "answers") as advance:
        for start in range(0, len(problems), size):
            part = problems[start : start + size]
            prompts = encode(tokenizer, part, config.template)
            sampling = {"max_tokens": config.max_completion_length, "temperature": config.temperature}
            ids = torch.arange(start * answers, (start + len(part)) * answers)
            sampling |= {"stop": tokenizer.stops, "seed": seed, "rows": ids}
            rollout = collect(model, prompts, answers=answers, **sampling)
            judged = judge_rollout(rollout, tokenizer, task, part, config.template)
            states = states_of(model, rollout)
            for p, (problem, row) in enumerate(zip(part, judged)):
                grid.append([])
                for g, answer in enumerate(row):
                    b = p * answers + g
                    inside = rollout.mask[b]
                    tokens = rollout.tokens[b][inside].tolist()
                    shown = tokens if answer.truncated else tokens[:-1]
                    begun = len(answer.text) - len(tokenizer.decode(shown))
                    ends = token_ends(tokenizer, shown, begun) if task.attempts else ()
                    tries = tries_of(task, problem, answer.text, ends)
                    grid[-1].append(Trace(states[b], rollout.logp[b][inside].cpu(), answer, tries))
            advance(len(part))
    return grid


def states_of(model: Transformer, rollout: Rollout, microbatch: int = 8192) -> list[Tensor]:
    """The state after each answer token of each row: fp32 [n, D] on the CPU."""
    result: list[Tensor] = [torch.empty(0)] * len(rollout.length)
    for rows in by_tokens(rollout.length.tolist(), microbatch):
        batch = rollout.select(torch.tensor(rows, device=rollout.length.device))
        hidden = model.hidden(batch.tokens, lengths=batch.length)
        for i, row in enumerate(rows):
            result[row] = hidden[i][batch.mask[i]].float().cpu()
    return result


def loss_of(head: SelfCheckHead, batch: Sequence[Trace]) -> tuple[Tensor, Tensor]:
    """The squared errors of both outputs: the mean over answers of the mean over tokens, and the same over tries."""
    e = torch.sigmoid(head(torch.cat([trace.states for trace in batch])))
    parts = e.split([len(trace.states) for trace in batch])
    of_answer = torch.stack([(part[:, 0] - float(t.answer.right)).square().mean() for part, t in zip(parts, batch)])
    of_tries = [
        (part[first : last + 1, 1] - float(solved)).square().mean()
        for part, trace in zip(parts, batch)
        for first, last, solved in trace.tries
    ]
    return of_answer.mean(), torch.stack(of_tries).mean() if of_tries else of_answer.new_zeros(())


def train(head: SelfCheckHead, data: list[Trace], config: Config, run) -> None:
    """Fit the head to the traces."""
    optimizer = torch.optim.AdamW(head.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    for step in steps(0, config.steps, "head"):
        rows = torch.randint(len(data), (config.batch,), generator=generator(config.seed, step)).tolist()
        of_answer, of_tries = loss_of(head, [data[row] for row in rows])
        optimizer.param_groups[0]["lr"] = config.learning_rate * warmup_cosine(step - 1, config.steps, 10)
        (of_answer + of_tries).backward()
        clip_gradients(head, float("inf"), step)  # stops where one is not finite
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        errors = {"train/answer": of_answer.item()}
        if any(data[row].tries for row in rows):
            errors["train/try"] = of_tries.item()
        run.log(step, errors)
        if step % 50 == 0 or step == config.steps:
            shown = [(f"squared error, {key.removeprefix('train/')}", f"{error:.3f}") for key, error in errors.items()]
            progress_line(step, config.steps, shown)


def main(config: Config) -> dict[str, float]:
    """Sample, train the head, measure, write; the figures, as in result.json."""
    began = time.perf_counter()
    run = open_run(config.out, config, wandb=config.wandb)
    seed_everything(config.seed)
    device = pick(config.device)
    task = tasks.load(config.task, config.data, allow_code=config.allow_code)
    if absent := [split for split in ("train", "test") if split not in task.splits]:
        raise ValueError(f"task {task.name} has no split {absent[0]!r}; it has {', '.join(task.splits)}")
    listed, held_out = (tasks.problems_of(task, [split]) for split in ("train", "test"))
    asked = tasks.spread(listed, min(config.problems, len(listed)))
    tested = tasks.spread(held_out, min(config.test_problems, len(held_out)))
    source = checkpoint.resolve(config.checkpoint, prefer="best")
    model, tokenizer = hf.load(source, device, pick_dtype(config.dtype, device))
    encode(tokenizer, [*asked, *tested], config.template)  # refuses what the tokenizer lacks
    data = traces(model, tokenizer, task, asked, config.answers, config, stream(config.seed, 1))
    flat = [trace for row in data for trace in row if not trace.answer.unjudged and len(trace.states)]
    rights = [trace.answer.right for trace in flat]
    if len(set(rights)) < 2:
        raise ValueError(f"{sum(rights)} of {len(rights)} answers are right: there is nothing to tell apart")
    grid = traces(model, tokenizer, task, tested, config.num_generations, config, stream(config.seed, 2))
    judged = [p for p, row in enumerate(grid) if not any(trace.answer.unjudged for trace in row)]
    tested, grid = [tested[p] for p in judged], [grid[p] for p in judged]
    if not grid:
        raise ValueError("each test problem has an answer that could not be judged")

    run.start(-1)
    head = SelfCheckHead(model.config.dim, config.inner)
    train(head, flat, config, run)
    with torch.no_grad():
        known = [[torch.sigmoid(head(trace.states)).numpy() for trace in row] for row in grid]
    answers, tries = ([[x[:, i] for x in row] for row in known] for i in (0, 1))
    chained = lambda rows: [x for row in rows for x in row]
    values = by_position(chained(answers), grid) | of_tries(chained(tries), grid)
    values |= best_of(task, tested, answers, grid, config.num_generations)
    for threshold in config.thresholds:
        accuracy, tokens = restart(answers, grid, threshold)
        values |= {f"restart/{threshold:g}/accuracy": accuracy, f"restart/{threshold:g}/tokens": tokens}
    ends = [x[-1] for x in chained(answers)]
    bins = calibration(ends, [trace.answer.right for row in grid for trace in row])
    for b, (count, confidence, share) in bins.items():
        values |= {f"calibration/{b}/count": count, f"calibration/{b}/confidence": confidence}
        values[f"calibration/{b}/right"] = share
    values["calibration_error"] = sum(n * abs(c - s) for n, c, s in bins.values()) / len(ends)

    torch.save(head.state_dict(), config.out / "head.pt")
    run.result(values | {"seconds": time.perf_counter() - began, "memory/peak_gib": peak_memory_gib(device)})
    run.close()
    show(values, config)
    title = f"{task.name}, {len(tested)} test problems"
    self_verify_figure.draw(values, title, config.out / "figures" / "self_verify.png")
    return values


def show(values: dict[str, float], config: Config) -> None:
    """Print the tables."""
    head = ["after tokens", "answers that are longer", "AUC of the head", "within a problem", "of the mean log-prob"]
    cell = lambda key, form: f"{values[key]:{form}}" if key in values else "-"
    aucs = lambda at: [cell(f"{at}/{key}", ".3f") for key in ("auc", "within", "logp")]
    rows = [[str(n), cell(f"after/{n}/running", ".0%"), *aucs(f"after/{n}")] for n in positions(values)]
    table("will the answer be right?", head, [*rows, ["the end", "-", *aucs("end")]])
    print(f"AUC of few tokens, at the end: {cell('end/short', '.3f')}")
    if "try/count" in values:
        cells = [f"{values[f'try/{quarter}/auc']:.3f}" for quarter in range(5)]
        quarters = [f"{quarter / 4:.0%}" for quarter in range(5)]
        table("is this try a solution?", ["share of the try read", *quarters], [["AUC of the head", *cells]])
    ks = sorted(int(key.removeprefix("pass@")) for key in values if key.startswith("pass@"))
    interval = lambda name, k: with_interval(*(values[f"{name}@{k}{end}"] for end in ("", "_low", "_high")))
    rows = [[str(k), interval("head", k), interval("maj", k), f"{values['random']:.1%}", f"{values[f'pass@{k}']:.1%}"]
            for k in ks]  # fmt: skip
    table("one of k answers", ["k", "by the head", "by majority", "at random", "any right"], rows)
    lines = [[f"{threshold:g}", f"{values[f'restart/{threshold:g}/accuracy']:.1%}",
              f"{values[f'restart/{threshold:g}/tokens']:.0f}"] for threshold in config.thresholds]  # fmt: skip
    table("stopped below the threshold, and begun again", ["threshold", "right", "tokens"], lines)


if __name__ == "__main__":
    cli.run(main, Config)
