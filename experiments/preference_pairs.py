"""Comparisons from a task: two answers that a checkpoint sampled, the right or the preferred one over the other.

    python -m experiments.preference_pairs --checkpoint runs/base/checkpoint --out runs/pairs

It replaces annotators: pairs -> reward model -> PPO runs without other data, and the true reward is known,
R = accuracy + 0.1·format as in r1_zero.py. Training problems give train.jsonl, those of --eval-split held_out.jsonl,
both in the plain layout of minir1/preference_data.py with R as the scores.

A task may rank answers by a rule of its own, in place of people: its verdicts then have scores["preference"]. Two
answers that have it are compared by it instead, if they differ by at least --min-gap, and it is their gold reward.

Truncated answers are left out: the rows of a pair end with the end token. Equal answers to a problem count once.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from minir1 import checkpoint, cli, tasks
from minir1.device import pick, pick_dtype
from minir1.files import replace_text, write_json
from minir1.judge import Answer, rights, sample_answers
from minir1.log import table
from minir1.model import hf
from minir1.settings import above, at_least, new_folder, no_training
from minir1.templates import TEMPLATES

FILES = ("train.jsonl", "held_out.jsonl")


@dataclass(frozen=True)
class Config:
    """How answers are sampled and paired."""

    checkpoint: Path = Path("runs/base/checkpoint")  # a Hugging Face folder, or a folder of checkpoints
    task: str = "countdown"  # a name, names joined by +, or the path of a .py file: see minir1/tasks
    data: str | None = None  # the folder or file that the task reads
    allow_code: bool = False  # the task may run programs that the model wrote, in a sandbox
    template: Literal[TEMPLATES] = "chat"  # give reward_model.py and dpo.py the same
    eval_split: str = "validation"  # of the held-out pairs
    problems: int = 1000  # of each split, at most
    num_generations: int = 12  # sampled answers per problem
    pairs: int = 4  # per problem, at most
    max_completion_length: int = 384  # token budget of an answer
    temperature: float = 1.0
    format_weight: float = 0.1  # of the gold reward R
    min_gap: float = 0.05  # between the preferences of a pair, for a task that has them
    seed: int = 0
    out: Path = Path("runs/pairs")
    resume: bool = False  # sample anew where a killed run left files without a result
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32

    def __post_init__(self):
        at_least(self, 1, "problems", "pairs", "max_completion_length")
        at_least(self, 2, "num_generations")
        at_least(self, 0, "format_weight", "seed")
        at_least(self, 1e-6, "temperature")  # or the answers to a problem are all the same
        above(self, 0, "min_gap")
        new_folder(self, "out")
        no_training(self, "out")


def ranked(*answers: Answer) -> bool:
    """Whether the task has a preference for each of these answers."""
    return all("preference" in answer.scores for answer in answers)


def better(a: Answer, b: Answer, min_gap: float) -> bool:
    """Whether a is preferred to b: by at least `min_gap` if the task ranks both, else a is right and b wrong."""
    if ranked(a, b):
        return round(a.scores["preference"] - b.scores["preference"], 9) >= min_gap  # 0.8 - 0.75 counts as 0.05
    return a.right and not b.right


def couples(answers: list[Answer], most: int, rng: random.Random, min_gap: float) -> list[tuple[Answer, Answer]]:
    """(better, worse) of the finished answers to one problem: all, or `most` of them drawn by `rng`."""
    finished = {a.text: a for a in answers if not (a.truncated or a.unjudged)}.values()
    pairs = [(a, b) for a in finished for b in finished if better(a, b, min_gap)]
    return pairs if len(pairs) <= most else rng.sample(pairs, most)


def line(problem: tasks.Problem, chosen: Answer, rejected: Answer, format_weight: float) -> str:
    """One comparison as JSON, the gold rewards beside it."""
    both = {"chosen": chosen, "rejected": rejected}
    reward = lambda a: a.scores["preference"] if ranked(chosen, rejected) else a.right + format_weight * a.format
    gold = {f"score_{name}": float(reward(a)) for name, a in both.items()}
    return json.dumps({"prompt": problem.prompt, **{name: a.text for name, a in both.items()}, **gold})


def pair_up(model, tokenizer, task: tasks.Task, split: str, config: Config) -> tuple[list[str], dict[str, float]]:
    """The lines of one split, and statistics of them."""
    problems = tasks.spread(task.problems(split), config.problems)
    sampling = {"answers": config.num_generations, "max_tokens": config.max_completion_length, "seed": config.seed}
    sampling |= {"temperature": config.temperature, "template": config.template, "label": f"answers, {split}"}
    grid = sample_answers(model, tokenizer, task, problems, **sampling)
    rng = random.Random(f"pairs {split} {config.seed}")
    pairs = [(p, *two) for p, row in zip(problems, grid) for two in couples(row, config.pairs, rng, config.min_gap)]
    if not pairs:
        flat = [a for row in grid for a in row]
        right, failed = sum(a.right for a in flat), [a.reason for a in flat if a.unjudged]
        raise ValueError(
            f"{right} of {len(flat)} answers to {split} problems are right, and no problem has both kinds, or "
            f"preferences that differ by {config.min_gap}: start from another base, or raise --num-generations"
            + (f"; {len(failed)} could not be judged: {failed[0] or 'no reason given'}" if failed else "")
        )
    values = {
        "problems": len(problems),
        "pass@1": np.nanmean(rights(grid)),
        "mixed": len({p.prompt for p, *_ in pairs}) / len(problems),
        "pairs": len(pairs),
        "tokens": sum(a.tokens for row in grid for a in row),
    }
    for name, answers in (("chosen", [a for _, a, _ in pairs]), ("rejected", [b for *_, b in pairs])):
        values[f"tokens_{name}"] = sum(a.tokens for a in answers) / len(pairs)
        values[f"format_{name}"] = sum(a.format for a in answers) / len(pairs)
    return [line(*pair, config.format_weight) for pair in pairs], values


COLUMNS = (  # of the table: key, title, format
    ("problems", "problems", ","), ("pass@1", "pass@1", ".1%"), ("mixed", "with a pair", ".1%"),
    ("pairs", "pairs", ","),
    ("tokens_chosen", "tokens, chosen", ".1f"), ("tokens_rejected", "tokens, rejected", ".1f"),
    ("format_chosen", "format, chosen", ".1%"), ("format_rejected", "format, rejected", ".1%"),
)  # fmt: skip


def rows(result: dict[str, float]) -> list[list[str]]:
    """One row per file. result: "train/pairs" and so on, as `main` returns it."""
    return [
        [name.replace("_", " "), *(f"{result[f'{name}/{key}']:{form}}" for key, _, form in COLUMNS)]
        for name in ("train", "held_out")
    ]


def main(config: Config) -> dict[str, float]:
    """Sample, judge, pair; write both files and their statistics, which are returned."""
    left = [name for name in (*FILES, "result.json") if (config.out / name).exists()]
    if left and not (config.resume and "result.json" not in left):
        raise ValueError(f"{config.out} already holds pairs: choose another --out")
    began = time.perf_counter()
    device, task = pick(config.device), tasks.load(config.task, config.data, allow_code=config.allow_code)
    source = checkpoint.resolve(config.checkpoint, prefer="best")
    model, tokenizer = hf.load(source, device, pick_dtype(config.dtype, device))
    result, texts = {}, {}
    for split, name in zip(("train", config.eval_split), FILES):
        texts[name], values = pair_up(model, tokenizer, task, split, config)
        result |= {f"{Path(name).stem}/{key}": value for key, value in values.items()}
    config.out.mkdir(parents=True, exist_ok=True)
    for name, lines in texts.items():
        replace_text(config.out / name, "".join(line + "\n" for line in lines))
    result["tokens"] = sum(result.pop(f"{Path(name).stem}/tokens") for name in FILES)  # sampled, for both files
    result["seconds"] = time.perf_counter() - began
    write_json(config.out / "result.json", result)
    table(f"pairs in {config.out}", ["", *(title for _, title, _ in COLUMNS)], rows(result))
    return result


if __name__ == "__main__":
    cli.run(main, Config)
