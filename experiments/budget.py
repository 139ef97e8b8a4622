"""Thinking as a budget: accuracy against tokens, spent on one longer thinking or on several answers.

    python -m experiments.budget --checkpoints runs/r1-zero/checkpoint
    python -m experiments.budget --checkpoints runs/r1/r1-zero/checkpoint runs/r1/rl-2/checkpoint --task world
    python -m experiments.budget --checkpoints R1-Distill-Qwen-1.5B --task math:boxed --data math500 --wait Wait

For each problem n answers are sampled, once, with the whole token budget. Then:

    limit     thinking that is longer than a limit ends there by force, and the model must answer; all limits share the
              same samples
    wait      thinking that ends within the token budget continues, "wait" in place of its end, up to --waits times
              (s1, arXiv:2501.19393, section 3.1)
    majority  the answer that most of k answers give, k = 1, 2, 4 … up to n: so many tokens in parallel
    any       whether one of k is right: what a perfect choice among them would reach

The table and figures/budget.png have accuracy by mean tokens per problem for each checkpoint, and by difficulty. What
is forced (the end of the thinking, "wait") counts as tokens, too. Answers that could not be judged count in no
accuracy, and problems with one in no majority and no "any". A point or a group with no judged answer is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from experiments import budget_figure
from minir1 import checkpoint, cli, tasks, templates
from minir1.answer_text import CLOSE, OPEN
from minir1.conversation import forced_end, unreadable
from minir1.device import pick, pick_dtype
from minir1.files import plain, read_json, write_json
from minir1.judge import Answer, any_judged, groups_of, judge, majority_vote, rights
from minir1.log import progress, table
from minir1.metrics import pass_at_k, share_interval, with_interval
from minir1.model import hf
from minir1.model.transformer import Transformer
from minir1.rollout import BUDGET, answers_of, collect
from minir1.seed import stream
from minir1.settings import at_least, new_folder, no_training
from minir1.templates import TEMPLATES, encode
from minir1.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    """Which models, which problems, which budgets."""

    checkpoints: tuple[Path, ...] = (Path("runs/r1-zero/checkpoint"),)  # Hugging Face folders, or of checkpoints
    task: str = "countdown"  # a name, names joined by +, or the path of a .py file: see minir1/tasks
    data: str | None = None  # the folder or file that the task reads
    allow_code: bool = False  # the task may run programs that the model wrote, in a sandbox
    template: Literal[TEMPLATES] = "chat"
    split: str = "test"
    problems: int = 200  # at most, evenly spread
    num_generations: int = 8  # n, answers per problem
    max_completion_length: int = 384  # token budget of an answer
    limits: tuple[int, ...] = (0, 16, 32, 64, 96, 128, 192, 256)  # of thinking tokens
    answer_length: int = 48  # tokens that an answer may take after its thinking was closed by force
    wait: str = " wait\n"  # what stands in place of the end of the thinking
    waits: int = 2  # at most, per answer
    temperature: float = 1.0
    rows_at_once: int = 512  # answers sampled together; no answer depends on it
    seed: int = 0
    out: Path = Path("runs/budget")
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32

    def __post_init__(self):
        at_least(self, 1, "problems", "num_generations", "max_completion_length", "answer_length", "rows_at_once")
        at_least(self, 0, "limits", "waits", "seed")
        at_least(self, 1e-6, "temperature")
        if not self.wait:
            raise ValueError("wait = '': at least one character")
        if not self.checkpoints or not self.limits:
            raise ValueError("checkpoints, limits: at least one of each")
        new_folder(self, "out")
        no_training(self, "out")


def thought(tokenizer: Tokenizer, answer: Sequence[int]) -> int | None:
    """How many tokens the thinking of an answer has, before its end tag; None if it has no end."""
    text = tokenizer.decode(answer)
    if CLOSE not in text:
        return None
    before = text.index(CLOSE)
    low, high = 0, len(answer)  # the longest beginning of the answer whose text stops before the tag
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(tokenizer.decode(answer[:middle])) <= before else (low, middle - 1)
    return low


def continued(
    policy: Transformer, tokenizer: Tokenizer, rows: list[list[int]], most: int, config: Config, seed: int, label: str
) -> list[tuple[list[int], bool]]:
    """One continuation of each row of tokens, of at most `most` tokens, and whether it ended by itself."""
    result: list[tuple[list[int], bool]] = [([], True)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    with progress(len(rows), label) as advance:
        for start in range(0, len(order), config.rows_at_once):
            part = order[start : start + config.rows_at_once]
            sampling = {"answers": 1, "max_tokens": most, "temperature": config.temperature, "stop": tokenizer.stops}
            rollout = collect(policy, [rows[i] for i in part], seed=seed, rows=torch.tensor(part), **sampling)
            for i, tokens, stop in zip(part, answers_of(rollout), rollout.stop.tolist()):
                ended = stop != BUDGET
                result[i] = tokens[:-1] if ended else tokens, ended
            advance(len(part))
    return result


class Sample(NamedTuple):
    """One sampled answer: its problem, the prompt's tokens, its own, how many of them are thinking (None without an end
    tag), and whether it ended by itself.
    """

    problem: int
    prompt: list[int]
    answer: list[int]
    thinking: int | None
    ended: bool


def sampled(policy: Transformer, tokenizer: Tokenizer, problems: list[tasks.Problem], config: Config) -> list[Sample]:
    """n answers to each problem, with the whole budget, the end token left out; those of a problem adjacent."""
    prompts = encode(tokenizer, problems, config.template)
    rows = [prompt for prompt in prompts for _ in range(config.num_generations)]
    answers = continued(policy, tokenizer, rows, config.max_completion_length, config, config.seed, "answers")
    return [
        Sample(i // config.num_generations, row, answer, thought(tokenizer, answer), ended)
        for i, (row, (answer, ended)) in enumerate(zip(rows, answers))
    ]


def closed_at(
    policy: Transformer, tokenizer: Tokenizer, samples: list[Sample], opened: str, limit: int, config: Config
) -> list[list[int]]:
    """The answers with at most `limit` tokens of thinking; longer ones are closed by force and continued.

    opened: what the prompt's template has begun of the thinking. Thinking that never ended counts as longer, also where
    the budget ended before it began; an answer that ended by itself without thinking stays.
    """

    def longer(sample: Sample) -> bool:
        if sample.thinking is not None:
            return sample.thinking > limit
        return not sample.ended or OPEN in opened + tokenizer.decode(sample.answer)

    rows, long = [], [i for i, sample in enumerate(samples) if longer(sample)]
    for i in long:
        cut = samples[i].answer[:limit]
        rows.append([*cut, *forced_end(tokenizer, opened + tokenizer.decode(cut))])
    asked = [samples[i].prompt + row for i, row in zip(long, rows)]
    seed, label = stream(config.seed, 1, limit), f"limit {limit}"
    ends = continued(policy, tokenizer, asked, config.answer_length, config, seed, label)
    closed = {i: row + end for i, row, (end, _) in zip(long, rows, ends)}
    return [closed.get(i, sample.answer) for i, sample in enumerate(samples)]


def waited(
    policy: Transformer, tokenizer: Tokenizer, samples: list[Sample], times: int, config: Config
) -> list[Sample]:
    """Answers whose thinking ended continue with "wait" in place of the end, within the whole budget; others stay."""
    wait, rows = tokenizer.encode(config.wait), {}
    for i, sample in enumerate(samples):
        if sample.thinking is not None and sample.thinking + len(wait) < config.max_completion_length:
            rows[i] = sample.answer[: sample.thinking] + wait
    most = config.max_completion_length
    prompts = [samples[i].prompt + row for i, row in rows.items()]
    ends = continued(policy, tokenizer, prompts, most, config, stream(config.seed, 2, times), f"wait {times}")
    result = list(samples)
    for (i, row), (end, ended) in zip(rows.items(), ends):
        answer = (row + end)[:most]
        ended = ended and len(row + end) <= most
        result[i] = samples[i]._replace(answer=answer, thinking=thought(tokenizer, answer), ended=ended)
    return result


def measured(
    task: tasks.Task, problems: list, tokenizer: Tokenizer, opened: str, samples: list[Sample], answers: list[list[int]]
) -> tuple[list[list[Answer]], float]:
    """The answers judged, [P][n], and their mean number of tokens."""
    texts = [opened + tokenizer.decode(answer) for answer in answers]
    verdicts = judge(task, [(problems[s.problem], text) for s, text in zip(samples, texts)])
    grid: list[list[Answer]] = [[] for _ in problems]
    for sample, answer, text, verdict in zip(samples, answers, texts, verdicts):
        right, unjudged = verdict.status == "right", verdict.status == "unjudged"
        judged = Answer(text, len(answer), False, right, False, unjudged=unjudged, reason=verdict.reason)
        grid[sample.problem].append(judged)
    return grid, float(np.mean([len(answer) for answer in answers]))


def point(task: tasks.Task, problems: list, grid: list[list[Answer]], tokens: float) -> dict[str, float]:
    """Accuracy with its interval, also of each group of problems, and tokens."""
    return of_shares(task, problems, rights(grid), tokens)


def of_shares(task: tasks.Task, problems: list, share: np.ndarray, tokens: float) -> dict[str, float]:
    """`point` of the share of right answers to each problem, NaN where it is not known; empty where none is known."""
    if np.isnan(share).all():
        return {}
    values = dict(zip(("right", "low", "high"), share_interval(share[~np.isnan(share)]))) | {"tokens": tokens}
    groups = {name: share[rows] for name, rows in groups_of(task, problems).items()}
    return values | {f"right_{name}": float(np.nanmean(one)) for name, one in groups.items() if not np.isnan(one).all()}


def curves(path: Path, task: tasks.Task, problems: list[tasks.Problem], config: Config) -> dict[str, dict[str, dict]]:
    """way -> budget -> its point, of one checkpoint. RuntimeError if no answer with the whole budget was judged."""
    device = pick(config.device)
    policy, tokenizer = hf.load(path, device, pick_dtype(config.dtype, device))
    if config.waits and (words := unreadable(tokenizer, config.wait)):
        unknown = f"it has no tokens for {', '.join(words)}, and sees its unknown token instead"
        print(f"warning: --wait {config.wait!r} of {path}: {unknown}")
    opened = templates.opened(templates.prompt(tokenizer, problems[0].prompt, config.template))
    samples = sampled(policy, tokenizer, problems, config)
    judged = lambda rows: measured(task, problems, tokenizer, opened, samples, rows)
    grid, tokens = judged([sample.answer for sample in samples])
    if not any_judged(grid):
        reason = grid[0][0].reason or "no reason given"
        raise RuntimeError(f"none of {len(samples)} answers could be judged: {reason}")
    result: dict[str, dict[str, dict]] = {"limit": {}, "wait": {}, "majority": {}, "any": {}}
    for limit in sorted(set(config.limits)):
        answers = closed_at(policy, tokenizer, samples, opened, limit, config)
        result["limit"][str(limit)] = point(task, problems, *judged(answers))
    result["limit"]["none"] = result["wait"]["0"] = point(task, problems, grid, tokens)
    longer = samples
    for times in range(1, config.waits + 1):
        longer = waited(policy, tokenizer, longer, times, config)
        result["wait"][str(times)] = point(task, problems, *judged([sample.answer for sample in longer]))
    known, n, k = [not any(a.unjudged for a in row) for row in grid], config.num_generations, 1
    while k <= n:
        votes = [majority_vote(task, p, row, k) if ok else np.nan for p, row, ok in zip(problems, grid, known)]
        hits = pass_at_k(n, [sum(a.right for a in row) for row in grid], k)
        for way, share in (("majority", np.array(votes)), ("any", np.where(known, hits, np.nan))):
            result[way][str(k)] = of_shares(task, problems, share, k * tokens)
        k *= 2
    return {way: {budget: values for budget, values in points.items() if values} for way, points in result.items()}


def main(config: Config) -> dict[str, dict]:
    """Measure every checkpoint, or read what was measured before; draw, print, write. Returns the curves of each."""
    task = tasks.load(config.task, config.data, allow_code=config.allow_code)
    problems = tasks.spread(task.problems(config.split), config.problems)
    dtype = str(pick_dtype(config.dtype, pick(config.device))).removeprefix("torch.")
    asked = {key: value for key, value in plain(asdict(config)).items() if key not in ("checkpoints", "out", "device")}
    asked["dtype"] = dtype
    results: dict[str, dict] = {}
    for path in config.checkpoints:
        source = checkpoint.resolve(path, prefer="best")
        settings = {"settings": asked, "weights": checkpoint.digests(source)}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        file = config.out / f"curves-{digest}.json"
        if not file.exists():
            write_json(file, settings | {"checkpoint": str(path), "curves": curves(source, task, problems, config)})
        results[str(path)] = read_json(file)["curves"]
    write_json(config.out / "result.json", results)
    for name, ways in results.items():
        show(name, ways)
    levels = list(groups_of(task, problems))
    note = f"{task.name}, {len(problems)} problems of {config.split}; bands: 95 % over problems"
    budget_figure.draw(results, levels, note, config.out / "figures" / "budget.png")
    print(f"curves and figure are in {config.out}")
    return results


def show(name: str, ways: dict[str, dict[str, dict]]) -> None:
    """Print the points of one checkpoint."""
    rows = [
        [way, budget, f"{p['tokens']:.0f}", with_interval(p["right"], p["low"], p["high"])]
        for way, points in ways.items()
        for budget, p in points.items()
    ]
    table(name, ["way", "budget", "tokens per problem", "right"], rows)


if __name__ == "__main__":
    cli.run(main, Config)
