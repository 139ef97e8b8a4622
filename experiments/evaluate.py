"""Measure a checkpoint on the problems of one split of a task.

    python -m experiments.evaluate --checkpoint runs/r1-zero/checkpoint
    python -m experiments.evaluate --checkpoint Qwen2.5-0.5B --task gsm8k --data gsm8k --few-shot 4 --template plain
    python -m experiments.evaluate --checkpoint R1-Distill-Qwen-1.5B --task math:boxed --data math500 --out runs/math500
    python -m experiments.evaluate --rescore runs/math500/answers.jsonl

Each problem gets several sampled answers at the given temperature, one greedy answer, and as many answers that are
forced to begin with empty thinking: what the weights know without thinking. The table shows accuracies with 95 %
intervals over problems, groups of problems by difficulty and subject, how readable the thinking is, and, where the task
has them, counts of what the thinking does and baselines that do as much work as each answer. Answers that were
truncated or that the verifier could not judge are reported apart; those not judged count in no accuracy.

With --out, a folder gets answers.jsonl (every answer with its prompt, the settings and the digests of the weights),
result.json and figures/levels.png; a killed evaluation continues with --resume. --rescore judges the answers of such a
file again, with the settings that it was sampled with, and samples nothing; its --out gets the answers with the new
verdicts. compare.py compares two such folders.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from experiments import evaluate_table
from experiments.evaluate_figure import draw_groups
from minir1 import answer_file, checkpoint, cli, tasks
from minir1.device import pick, pick_dtype
from minir1.distributed import on_first
from minir1.files import write_json
from minir1.judge import (
    NO_THINK,
    Answer,
    baselines,
    by_group,
    groups_of,
    judge,
    readability,
    rights,
    sample_batches,
    summary,
)
from minir1.log import progress
from minir1.metrics import bootstrap, share_interval
from minir1.model import hf
from minir1.model.transformer import Transformer
from minir1.seed import python_random
from minir1.settings import at_least, new_folder, no_training, zero_or_at_least
from minir1.templates import TEMPLATES
from minir1.tokenizer import Tokenizer

SAMPLING = (  # the settings on which the answers depend
    *("task", "data", "template", "split", "problems", "few_shot", "num_generations", "max_completion_length"),
    *("temperature", "forced", "no_think", "seed", "dtype"),
)


@dataclass(frozen=True)
class Config:
    """Evaluation of one checkpoint."""

    checkpoint: Path | None = None  # a Hugging Face folder, or a folder of checkpoints: then the best, else the latest
    rescore: Path | None = None  # instead of a checkpoint: the answers.jsonl of an evaluation, to be judged again
    task: str = "countdown"  # a name, names joined by +, or the path of a .py file: see minir1/tasks
    data: str | None = None  # the folder or file that the task reads
    allow_code: bool = False  # the task may run programs that the model wrote, in a sandbox
    template: Literal[TEMPLATES] = "chat"
    split: str = "test"
    problems: int | None = None  # at most, evenly spread; None: all
    few_shot: int = 0  # solved training problems that the prompt shows first
    num_generations: int = 8  # n, sampled answers per problem
    k: tuple[int, ...] | None = None  # for pass@k and maj@k, each at most n; None: n
    max_completion_length: int = 384  # token budget of an answer
    temperature: float = 1.0
    forced: bool = True  # also measure answers that are forced to begin with empty thinking
    no_think: bool = False  # force every answer to begin with empty thinking, as the policy was trained
    rows_at_once: int = 512  # answers sampled together; no answer depends on it
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32
    out: Path | None = None  # a folder for the answers, the result and the figure
    resume: bool = False

    def __post_init__(self):
        at_least(self, 1, "problems", "num_generations", "max_completion_length", "rows_at_once")
        at_least(self, 0, "seed", "few_shot")
        zero_or_at_least(self, 1e-6, "temperature")
        at_least(self, 1, "k")
        if self.k and not self.rescore and max(self.k) > self.num_generations:
            raise ValueError(f"k = {self.k}: at most num_generations = {self.num_generations}")
        new_folder(self, "out")
        no_training(self, "out")


def examples(task: tasks.Task, problems: Sequence[tasks.Problem], config: Config) -> list[list[tasks.Problem]]:
    """For each problem the solved training problems that its prompt shows, of its own subject if that has enough.

    Empty without --few-shot. In a mixture they are of the problem's task. ValueError if there are too few.
    """
    if not config.few_shot:
        return []
    solved = [p for p in task.problems("train") if p.solution] if "train" in task.splits else []
    chosen = []
    for i, problem in enumerate(problems):
        others = [p for p in solved if p.task == problem.task and p.prompt != problem.prompt]
        if len(others) < config.few_shot:
            name = problem.task or task.name
            raise ValueError(f"few_shot = {config.few_shot}: task {name} has {len(others)} solved training problems")
        near = [p for p in others if p.subject == problem.subject]
        pool = near if len(near) >= config.few_shot else others
        chosen.append(python_random(config.seed, i).sample(pool, config.few_shot))
    return chosen


def samplings(config: Config) -> dict[str, dict]:
    """What is sampled for each problem, by kind."""
    forced = NO_THINK if config.no_think else ""
    kinds = {"sampled": {"answers": config.num_generations, "temperature": config.temperature, "forced": forced}}
    kinds["greedy"] = {"answers": 1, "temperature": 0.0, "forced": forced}
    if config.forced and not config.no_think:  # else the sampled answers are these
        kinds["forced"] = kinds["sampled"] | {"forced": NO_THINK}
    return kinds


def sample(
    model: Transformer,
    tokenizer: Tokenizer,
    task: tasks.Task,
    problems: Sequence[tasks.Problem],
    config: Config,
    path: Path | None = None,
    saved: answer_file.Answers | None = None,
) -> tuple[dict[str, list[list[Answer]]], float]:
    """Answers of each kind, [P][n], and sampled tokens a second.

    With a path, each batch is added to that file once it is judged; `saved` holds the answers that are there.
    """
    settings = {"max_tokens": config.max_completion_length, "seed": config.seed, "template": config.template}
    settings |= {"shots": examples(task, problems, config), "rows_at_once": config.rows_at_once}
    grids, tokens, began = {}, 0, time.perf_counter()
    for kind, sampling in samplings(config).items():
        done = dict((saved or {}).get(kind, {}))
        with progress(len(problems), f"{kind} answers") as advance:
            advance(len(done))
            for indices, part in sample_batches(model, tokenizer, task, problems, skip=done, **sampling, **settings):
                if path:
                    answer_file.append(path, kind, indices, [problems[p] for p in indices], part)
                done |= zip(indices, part)
                tokens += sum(a.tokens for row in part for a in row)
                advance(len(part), note=f"{tokens / (time.perf_counter() - began):,.0f} tokens/s")
        grids[kind] = [done[p] for p in range(len(problems))]
    return grids, tokens / (time.perf_counter() - began)


def judged_again(
    task: tasks.Task, problems: Sequence[tasks.Problem], saved: answer_file.Answers, config: Config
) -> dict[str, list[list[Answer]]]:
    """Saved answers with the verdicts that the task's verifier gives now. ValueError if some are missing."""
    for kind in samplings(config):
        if missing := len(problems) - len(saved.get(kind, {})):
            raise ValueError(f"the {kind} answers to {missing} of {len(problems)} problems are missing: --resume first")
    grids = {}
    for kind in samplings(config):
        groups, grid = saved[kind], []
        with progress(len(problems), f"judging {kind} answers") as advance:
            for start in range(0, len(problems), 100):
                part = range(start, min(start + 100, len(problems)))
                verdicts = iter(judge(task, [(problems[p], a.text) for p in part for a in groups[p]]))
                grid += [[renewed(a, next(verdicts)) for a in groups[p]] for p in part]
                advance(len(part))
        grids[kind] = grid
    return grids


def renewed(answer: Answer, verdict: tasks.Verdict) -> Answer:
    """The answer with another verdict."""
    right, unjudged = verdict.status == "right", verdict.status == "unjudged"
    return replace(answer, right=right, unjudged=unjudged, reason=verdict.reason, scores=verdict.scores)


def figures(
    task: tasks.Task, problems: Sequence[tasks.Problem], grids: dict[str, list[list[Answer]]], config: Config
) -> dict[str, float]:
    """The measured values, flat (`summary` and `readability` of minir1.judge)."""
    grid, ks = grids["sampled"], config.k
    values = summary(task, problems, grid, config.seed, ks)
    grouped = by_group(task, problems, grid, config.seed, ks)
    groups = {name: ps for name, ps in groups_of(task, problems).items() if f"pass@1_{name}" in grouped}
    readable = readability(problems, grid, groups)
    if taken := sorted(values.keys() & readable.keys()):
        raise ValueError(f"task {task.name}: its behaviour reports {', '.join(taken)}, which names another figure here")
    values |= readable
    liked = [[a.scores["preference"] for a in row if "preference" in a.scores] for row in grid]
    if any(liked):  # a task that ranks answers, beside right and wrong
        interval = bootstrap([np.mean(row) for row in liked if row], seed=config.seed)
        values |= dict(zip(("preference", "preference_low", "preference_high"), interval))
    other = {"greedy": grids["greedy"]} | ({"forced": grids.get("forced", grid)} if config.forced else {})
    for name, answers in other.items():
        share = rights(answers)
        if not np.isnan(share).all():
            interval = share_interval(share[~np.isnan(share)], seed=config.seed)
            values |= dict(zip((name, f"{name}_low", f"{name}_high"), interval))
    return values | baselines(task, problems, grid) | grouped


def measure(
    model: Transformer,
    tokenizer: Tokenizer,
    task: tasks.Task,
    problems: Sequence[tasks.Problem],
    config: Config,
) -> tuple[dict[str, float], list[list[Answer]]]:
    """The measured values of one checkpoint on these problems, and the sampled answers [P][n]."""
    grids, speed = sample(model, tokenizer, task, problems, config)
    return figures(task, problems, grids, config) | {"tokens_per_s": speed}, grids["sampled"]


def main(config: Config) -> dict[str, float]:
    """Load, measure, print, save."""
    if (config.checkpoint is None) == (config.rescore is None):
        raise ValueError("give either --checkpoint, or --rescore with the answers of an evaluation")
    if config.resume and not config.out:
        raise ValueError("resume: name the folder to continue with --out")
    if config.rescore:
        saved = answer_file.read(config.rescore)
        old = {name: saved.settings[name] for name in SAMPLING if name in saved.settings}
        fixed = [name for name in SAMPLING if name != "data" and getattr(config, name) != getattr(Config, name)]
        if other := [name for name in fixed if getattr(config, name) != old.get(name)]:
            raise ValueError(f"rescore: {config.rescore} has its own {', '.join(other)}: leave the option out")
        config = replace(config, **old | ({"data": config.data} if config.data else {}))
        if config.k and max(config.k) > config.num_generations:
            raise ValueError(f"k = {config.k}: {config.rescore} has {config.num_generations} answers to each problem")
        if config.out and (config.out / "answers.jsonl").exists():
            raise ValueError(f"{config.out} holds answers: choose another --out for the new verdicts")
    task = tasks.load(config.task, config.data, allow_code=config.allow_code)
    listed = task.problems(config.split)
    problems = tasks.spread(listed, config.problems or len(listed))
    counts = {name: len(indices) for name, indices in groups_of(task, problems).items()}
    if config.rescore:
        answer_file.same_problems(saved, problems)
        source, speed, grids = saved.settings["checkpoint"], {}, judged_again(task, problems, saved.answers, config)
        if config.out:
            answer_file.begin(config.out / "answers.jsonl", saved.settings, problems, resume=False)
            for kind, grid in grids.items():
                answer_file.append(config.out / "answers.jsonl", kind, range(len(problems)), problems, grid)
    else:
        device = pick(config.device)
        dtype = pick_dtype(config.dtype, device)
        config = replace(config, dtype=str(dtype).removeprefix("torch."))
        source, path, answers = checkpoint.resolve(config.checkpoint, prefer="best"), None, {}
        if config.out:
            path, asked = config.out / "answers.jsonl", asdict(config)
            settings = {name: asked[name] for name in SAMPLING}
            settings |= {"checkpoint": str(source), "weights": checkpoint.digests(source)}
            answers = answer_file.begin(path, settings, problems, config.resume)
        model, tokenizer = hf.load(source, device, dtype)
        grids, tokens_per_s = sample(model, tokenizer, task, problems, config, path, answers)
        speed = {"tokens_per_s": tokens_per_s} if tokens_per_s else {}  # nothing was left to sample
    values = figures(task, problems, grids, config) | speed
    print(source)
    columns = {config.split: evaluate_table.applicable(values, grids["sampled"])}
    evaluate_table.show(f"{task.name}, {config.split}: {len(problems)} problems", columns, task.rates)
    for reason, count in reasons(grids["sampled"]):
        print(f"not judged {count} times: {reason}")
    if config.out:
        on_first(lambda: write_json(config.out / "result.json", values))
        draw_groups(values, counts, f"{task.name}, {config.split}", str(source), config.out / "figures" / "levels.png")
        print(f"answers, result and figure are in {config.out}")
    return values


def reasons(grid: list[list[Answer]]) -> list[tuple[str, int]]:
    """The most frequent reasons for which answers were not judged, with their counts."""
    return Counter(a.reason or "no reason given" for row in grid for a in row if a.unjudged).most_common(5)


if __name__ == "__main__":
    cli.run(main, Config, on_ranks=True)
