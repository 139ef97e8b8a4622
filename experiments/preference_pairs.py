"""Comparisons for Countdown: two answers that a checkpoint sampled, the right one preferred to the wrong one.

    python -m experiments.preference_pairs --checkpoint runs/base/checkpoint --out runs/pairs

Stands in for annotators, so that the chain pairs -> reward model -> PPO runs without data from outside, and against a
gold reward that is known: R = accuracy + 0.1·form, as in r1_zero.py. Training problems give train.jsonl, validation
problems held_out.jsonl, both in the plain layout of minir1/preference_data.py with R as the scores.

Answers that the budget cut are in no pair: the rows of a pair end with the end token, and theirs do not. An answer
given twice to a problem counts once.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import tyro

from minir1 import checkpoint
from minir1.files import replace_text
from minir1.judge import Answer, sample_answers
from minir1.log import table
from minir1.model import hf
from minir1.tasks import Problem, countdown

FILES = {"train": "train.jsonl", "validation": "held_out.jsonl"}


@dataclass(frozen=True)
class Config:
    """How answers are sampled and paired."""

    checkpoint: Path = Path("runs/base/checkpoint")  # a Hugging Face folder, or a folder of checkpoints
    level: str = "default"  # of Countdown: default | wide | four
    problems: int = 1000  # of each split, at most
    answers: int = 12  # sampled, a problem
    pairs: int = 4  # of a problem, at most
    max_tokens: int = 384  # budget of an answer
    temperature: float = 1.0
    form_weight: float = 0.1  # of the gold reward
    seed: int = 0
    out: Path = Path("runs/pairs")

    def __post_init__(self):
        for name, least in (("problems", 1), ("answers", 2), ("pairs", 1), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: at least {least}")
        if self.temperature <= 0:
            raise ValueError(f"temperature = {self.temperature}: above 0, or the answers to a problem are all the same")


def couples(answers: list[Answer], most: int, rng: random.Random) -> list[tuple[Answer, Answer]]:
    """(right, wrong) of the finished answers to one problem: all, or `most` of them drawn by `rng`."""
    finished = {a.text: a for a in answers if not (a.truncated or a.unjudged)}.values()
    found = [(a, b) for a in finished if a.right for b in finished if not b.right]
    return found if len(found) <= most else rng.sample(found, most)


def line(problem: Problem, chosen: Answer, rejected: Answer, form_weight: float) -> str:
    """One comparison as JSON, the gold rewards beside it."""
    gold = {f"score_{name}": a.right + form_weight * a.form for name, a in (("chosen", chosen), ("rejected", rejected))}
    return json.dumps({"prompt": problem.prompt, "chosen": chosen.text, "rejected": rejected.text, **gold})


def pair_up(model, tokenizer, split: str, config: Config) -> tuple[list[str], dict[str, float]]:
    """The lines of one split, and what they are like."""
    problems = countdown.held_out(config.level, split, config.problems)
    sampling = {"answers": config.answers, "max_tokens": config.max_tokens, "temperature": config.temperature}
    grid = sample_answers(model, tokenizer, problems, countdown.verify, seed=config.seed, **sampling)
    rng = random.Random(f"pairs {split} {config.seed}")
    pairs = [(p, *two) for p, row in zip(problems, grid) for two in couples(row, config.pairs, rng)]
    if not pairs:
        right = sum(a.right for row in grid for a in row)
        told = f"{right} of {len(problems) * config.answers} answers to {split} problems are right"
        raise ValueError(f"{told}, and no problem has both kinds: start from another base, or raise --answers")
    found = {
        "problems": len(problems),
        "pass@1": sum(a.right for row in grid for a in row) / (len(grid) * config.answers),
        "mixed": len({p.prompt for p, *_ in pairs}) / len(problems),
        "pairs": len(pairs),
        "tokens_chosen": sum(a.tokens for _, a, _ in pairs) / len(pairs),
        "tokens_rejected": sum(b.tokens for *_, b in pairs) / len(pairs),
        "form_chosen": sum(a.form for _, a, _ in pairs) / len(pairs),
        "form_rejected": sum(b.form for *_, b in pairs) / len(pairs),
    }
    return [line(*pair, config.form_weight) for pair in pairs], found


COLUMNS = ["", "problems", "pass@1", "with a pair", "pairs", "tokens, chosen", "rejected", "form, chosen", "rejected"]


def rows(found: dict[str, float]) -> list[list[str]]:
    """A row a split. found: "train/pairs" and so on, as `main` returns it."""
    formats = ("{:,}", "{:.1%}", "{:.1%}", "{:,}", "{:.1f}", "{:.1f}", "{:.1%}", "{:.1%}")
    keys = ("problems", "pass@1", "mixed", "pairs", "tokens_chosen", "tokens_rejected", "form_chosen", "form_rejected")
    return [
        [name.replace("_", " "), *(text.format(found[f"{name}/{key}"]) for text, key in zip(formats, keys))]
        for name in ("train", "held_out")
    ]


def main(config: Config) -> dict[str, float]:
    """Sample, judge, pair, write both files and what they are like; returns the latter."""
    if any((config.out / name).exists() for name in FILES.values()):
        raise ValueError(f"{config.out} already holds pairs: choose another --out")
    source = checkpoint.best(config.checkpoint) or checkpoint.latest(config.checkpoint) or config.checkpoint
    model, tokenizer = hf.load(source)
    result, texts = {}, {}
    for split, name in FILES.items():
        texts[name], found = pair_up(model, tokenizer, split, config)
        result |= {f"{Path(name).stem}/{key}": value for key, value in found.items()}
    config.out.mkdir(parents=True, exist_ok=True)
    for name, lines in texts.items():
        replace_text(config.out / name, "".join(line + "\n" for line in lines))
    replace_text(config.out / "result.json", json.dumps(result, indent=2) + "\n")
    table(f"pairs in {config.out}", COLUMNS, rows(result))
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
