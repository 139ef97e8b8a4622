"""Measure a checkpoint on the problems of one split of a task.

    python -m experiments.evaluate --checkpoint runs/r1-zero/checkpoint
    python -m experiments.evaluate --checkpoint Qwen2.5-0.5B --task gsm8k --data gsm8k --template r1_zero

Each problem gets several sampled answers at the given temperature, one greedy answer, and as many answers that are
forced to begin with empty thinking: what the weights know without thinking. Where the task has them, the table also
shows groups of problems by difficulty, what the task counts in the thinking, and baselines that do as much work as each
answer, with the difference from the policy.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minir1 import checkpoint, cli, tasks
from minir1.device import pick, pick_dtype
from minir1.files import write_json
from minir1.judge import NO_THINK, Answer, baselines, by_difficulty, sample_answers, summary
from minir1.log import table
from minir1.metrics import with_interval
from minir1.model import hf
from minir1.model.transformer import Transformer
from minir1.settings import at_least, new_file
from minir1.templates import TEMPLATES
from minir1.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    """Evaluation of one checkpoint."""

    checkpoint: Path  # a Hugging Face folder, or a folder of checkpoints: then the best, else the latest
    task: str = "countdown"  # a name, names joined by +, or the path of a .py file: see minir1/tasks
    data: str | None = None  # the folder or file that the task reads
    allow_code: bool = False  # the task may run programs that the model wrote, in a sandbox
    template: Literal[TEMPLATES] = "chat"
    split: str = "test"
    problems: int = 400  # at most
    num_generations: int = 8  # sampled answers per problem
    max_completion_length: int = 384  # token budget of an answer
    temperature: float = 1.0
    no_think: bool = False  # force every answer to begin with empty thinking, as the policy was trained
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32
    out: Path | None = None  # a JSON file for the result

    def __post_init__(self):
        at_least(self, 1, "problems", "num_generations", "max_completion_length")
        at_least(self, 0, "temperature", "seed")
        new_file(self, "out")


def measure(
    model: Transformer,
    tokenizer: Tokenizer,
    task: tasks.Task,
    problems: Sequence[tasks.Problem],
    config: Config,
) -> tuple[dict[str, float], list[list[Answer]]]:
    """The measured values of one checkpoint on these problems, and the sampled answers [P][G]."""

    def sampled(label: str, answers: int, temperature: float, forced: str) -> list[list[Answer]]:
        settings = {"max_tokens": config.max_completion_length, "seed": config.seed, "template": config.template}
        settings |= {"answers": answers, "temperature": temperature, "forced": forced, "label": label}
        return sample_answers(model, tokenizer, task, problems, **settings)

    forced = NO_THINK if config.no_think else ""
    began = time.perf_counter()
    grid = sampled("sampled answers", config.num_generations, config.temperature, forced)
    seconds = time.perf_counter() - began
    values = summary(task, problems, grid, seed=config.seed)
    values["tokens_per_s"] = sum(a.tokens for row in grid for a in row) / seconds
    values["greedy"] = summary(task, problems, sampled("greedy answers", 1, 0.0, forced))["pass@1"]
    same = config.no_think  # then the answers above are these
    quick = grid if same else sampled("forced answers", config.num_generations, config.temperature, NO_THINK)
    at_once = summary(task, problems, quick)
    values |= {f"forced{end}": at_once[f"pass@1{end}"] for end in ("", "_low", "_high")}
    return values | baselines(task, problems, grid) | by_difficulty(task, problems, grid), grid


COMMON = ("greedy", "forced", "format", "length", "truncated", "unjudged", "entropy", "tokens_per_s")


def rows(values: Mapping[str, float], rates: Mapping[str, str]) -> list[tuple[str, str, str, str]]:
    """(label, key, group or "", format) of each row of the table, by the keys that `measure` returned.

    A value's key is key + group, its interval key + "_low" + group; `rates` are the task's.
    """
    groups = [key.removeprefix("length") for key in values if key.startswith("length_")]  # such as "_hard"
    whole = [key for key in values if not key.endswith(("_low", "_high", *groups))]
    methods = [key for key in whole if f"over_{key}" in values]
    at_k = [key for key in whole if key.startswith(("pass@", "maj@")) and not key.startswith("pass@1")]
    others = {*COMMON, *methods, *at_k}
    counts = [key for key in whole if key not in others and not key.startswith(("pass@1", "over_"))]

    lines = [("pass@1, sampled", "pass@1", "", ".1%"), ("  among well-formed answers", "pass@1_formed", "", ".1%")]
    lines += [(f"  {words(group[1:])} problems", "pass@1", group, ".1%") for group in groups]
    lines += [(key, key, "", ".1%") for key in at_k]
    lines += [("pass@1, greedy", "greedy", "", ".1%"), ("pass@1, forced to answer at once", "forced", "", ".1%")]
    for name in methods:
        lines += [(f"baseline: {words(name)}", name, "", ".1%"), ("  policy above it", f"over_{name}", "", ".1%")]
    lines += [("well-formed", "format", "", ".1%"), ("truncated by the budget", "truncated", "", ".1%")]
    lines += [("not judged", "unjudged", "", ".1%")] if values.get("unjudged") else []
    lines += [("tokens", "length", "", ".1f")]
    lines += [(f"  {words(group[1:])} problems", "length", group, ".1f") for group in groups]
    for name in counts:
        rate = (f"{words(name)}, share of {words(rates[name])}", name, "", ".1%") if name in rates else None
        lines.append(rate or (f"{words(name)} per answer", name, "", ".2f"))
    return lines


def words(name: str) -> str:
    """A key in plain words."""
    return name.replace("_", " ")


def show(title: str, columns: Mapping[str, Mapping[str, float]], rates: Mapping[str, str]) -> None:
    """Print measurements side by side, with intervals where there are any."""

    def cell(values: Mapping[str, float], key: str, group: str, form: str) -> str:
        if key + group not in values:
            return "-"
        if f"{key}_low{group}" in values:
            return with_interval(*(values[f"{key}{end}{group}"] for end in ("", "_low", "_high")), form)
        return f"{values[key + group]:{form}}"

    every = {key: value for values in columns.values() for key, value in values.items()}
    lines = [[label, *(cell(values, *rest) for values in columns.values())] for label, *rest in rows(every, rates)]
    table(title, ["", *columns], lines)


def main(config: Config) -> dict[str, float]:
    """Load, measure, print."""
    device = pick(config.device)
    task = tasks.load(config.task, config.data, allow_code=config.allow_code)
    problems = tasks.spread(task.problems(config.split), config.problems)
    source = checkpoint.resolve(config.checkpoint, prefer="best")
    model, tokenizer = hf.load(source, device, pick_dtype(config.dtype, device))
    values, _ = measure(model, tokenizer, task, problems, config)
    print(source)
    show(f"{task.name}, {config.split}: {len(problems)} problems", {config.split: values}, task.rates)
    if config.out:
        write_json(config.out, values)
    return values


if __name__ == "__main__":
    cli.run(main, Config)
