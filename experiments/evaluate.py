"""Measure a checkpoint on Countdown problems that it has never seen.

    python -m experiments.evaluate --checkpoint runs/r1-zero/checkpoint

Two held-out sets: `test`, whose numbers and target occur together in no training document, and `unseen`, whose numbers
occur in none under any target. Each problem gets several sampled answers at temperature 1, one greedy answer, and some
answers that are forced to begin with an empty thinking. Beside them stands a random search that is given as many tries
as the policy used and makes no mistake in arithmetic or checking.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from minir1 import checkpoint
from minir1.files import replace_text
from minir1.judge import NO_THINK, Answer, sample_answers, summary
from minir1.log import table
from minir1.metrics import bootstrap, paired_bootstrap
from minir1.model import hf
from minir1.model.transformer import Transformer
from minir1.tasks import Problem, countdown
from minir1.tokenizer import Tokenizer

BINS = (("easy", 0.0, 6.0), ("middle", 6.0, 12.0), ("hard", 12.0, float("inf")))  # by tries of a random search


@dataclass(frozen=True)
class Config:
    """Evaluation of one checkpoint."""

    checkpoint: Path  # a Hugging Face folder, or a folder of checkpoints: then the best, else the latest
    level: str = "default"  # of Countdown: default | wide | four
    split: Literal["test", "unseen", "validation", "train"] = "test"
    problems: int = 400  # at most
    answers: int = 8  # sampled, a problem
    max_tokens: int = 384  # budget of an answer
    temperature: float = 1.0
    no_think: bool = False  # the policy was trained to answer at once: force that everywhere
    seed: int = 0
    out: Path | None = None  # a JSON file for the figures


def measure(model: Transformer, tokenizer: Tokenizer, config: Config) -> tuple[dict[str, float], list[list[Answer]]]:
    """Flat figures of one checkpoint on one split, and the sampled answers [P][n]."""
    problems = countdown.held_out(config.level, config.split, config.problems)

    def sampled(answers: int, temperature: float, forced: str) -> list[list[Answer]]:
        settings = {"max_tokens": config.max_tokens, "seed": config.seed, "temperature": temperature, "forced": forced}
        return sample_answers(model, tokenizer, problems, countdown.verify, answers=answers, **settings)

    forced = NO_THINK if config.no_think else ""
    began = time.perf_counter()
    grid = sampled(config.answers, config.temperature, forced)
    values = summary(problems, grid, countdown.behaviour, seed=config.seed)
    values["tokens_per_s"] = sum(a.tokens for row in grid for a in row) / (time.perf_counter() - began)
    values["greedy"] = summary(problems, sampled(1, 0.0, forced))["pass@1"]
    quick = summary(problems, sampled(config.answers, config.temperature, NO_THINK))
    values |= {f"forced{end}": quick[f"pass@1{end}"] for end in ("", "_low", "_high")}
    return values | search(problems, grid) | by_difficulty(problems, grid), grid


def rights(grid: list[list[Answer]]) -> np.ndarray:
    """The share of right answers of each problem, float64 [P]."""
    return np.array([[a.right for a in row] for row in grid], dtype=float).mean(1)


def search(problems: list[Problem], grid: list[list[Answer]]) -> dict[str, float]:
    """A random search with the tries that each answer used (at least one, its answer), with repeats and without.

    `over_search` and `over_search_distinct` are how far the policy is above it, paired over problems.
    """
    found = {}
    tries = [[max(1, countdown.behaviour(p, a.text)["tries"]) for a in row] for p, row in zip(problems, grid)]
    for name, chance in (("search", countdown.random_search), ("search_distinct", countdown.random_search_distinct)):
        values = np.array([np.mean([chance(p, k) for k in row]) for p, row in zip(problems, tries)])
        found |= dict(zip((name, f"{name}_low", f"{name}_high"), bootstrap(values)))
        over = f"over_{name}"
        found |= dict(zip((over, f"{over}_low", f"{over}_high"), paired_bootstrap(rights(grid), values)))
    return found


def by_difficulty(problems: list[Problem], grid: list[list[Answer]]) -> dict[str, float]:
    """The same figures among problems of like difficulty, in the tries that a random search needs."""
    found = {}
    for name, low, high in BINS:
        part = [(p, row) for p, row in zip(problems, grid) if low <= countdown.difficulty(p) < high]
        if part:
            values = summary(*map(list, zip(*part)), countdown.behaviour)
            found |= {f"{key}_{name}": value for key, value in values.items()}
    return found


ROWS = (  # label, key, per cent?
    ("pass@1, sampled", "pass@1", True),
    ("  among well-formed answers", "pass@1_formed", True),
    ("  easy (a random search needs under 6 tries)", "pass@1_easy", True),
    ("  middle (6 to 12)", "pass@1_middle", True),
    ("  hard (over 12)", "pass@1_hard", True),
    ("pass@8", "pass@8", True),
    ("maj@8", "maj@8", True),
    ("pass@1, greedy", "greedy", True),
    ("pass@1, forced to answer at once", "forced", True),
    ("random search, as many tries", "search", True),
    ("  without repeats", "search_distinct", True),
    ("  policy above it", "over_search_distinct", True),
    ("tokens, hard problems", "length_hard", False),
    ("tries, hard problems", "tries_hard", False),
    ("well-formed", "form", True),
    ("tokens", "length", False),
    ("tries", "tries", False),
    ("last try says yes", "said_yes", True),
    ("answers with a false yes", "false_yes", True),
    ("wrong sums", "arithmetic_error", True),
    ("repeated tries", "repeats", True),
    ("cut by the budget", "truncated", True),
)


def show(title: str, columns: dict[str, dict[str, float]]) -> None:
    """Print measurements side by side, with intervals where there are any."""

    def cell(values: dict[str, float], key: str, percent: bool) -> str:
        if key not in values:
            return "-"
        text = f"{values[key]:.1%}" if percent else f"{values[key]:.1f}"
        if f"{key}_low" in values:
            text += f" [{100 * values[f'{key}_low']:.1f}, {100 * values[f'{key}_high']:.1f}]"
        return text

    rows = [[label, *(cell(values, key, percent) for values in columns.values())] for label, key, percent in ROWS]
    table(title, ["", *columns], [row for row in rows if set(row[1:]) != {"-"}])


def main(config: Config) -> dict[str, float]:
    """Load, measure, print."""
    model, tokenizer = hf.load(
        checkpoint.best(config.checkpoint) or checkpoint.latest(config.checkpoint) or config.checkpoint
    )
    values, _ = measure(model, tokenizer, config)
    show(f"{config.checkpoint}: {config.split} problems of level {config.level}", {config.split: values})
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(config.out, json.dumps(values, indent=2) + "\n")
    return values


if __name__ == "__main__":
    main(tyro.cli(Config))
