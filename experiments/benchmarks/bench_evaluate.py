"""What does an evaluation cost beyond the generation of its answers?

    python -m experiments.benchmarks.bench_evaluate --checkpoint runs/r1-zero/checkpoint

Samples the same answers with `collect` alone and as evaluate.py does, which also decodes, judges and saves them, in
turns; prints the median seconds of both and their ratio.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from experiments import evaluate
from minir1 import checkpoint, cli, tasks
from minir1.device import pick, pick_dtype, synchronize
from minir1.files import write_json
from minir1.log import table
from minir1.model import hf
from minir1.rollout import collect
from minir1.settings import at_least, new_file
from minir1.templates import TEMPLATES, encode


@dataclass(frozen=True)
class Config:
    """One checkpoint on one task."""

    checkpoint: Path  # a Hugging Face folder, or a folder of checkpoints: then the latest
    task: str = "countdown"
    data: str | None = None  # the folder or file that the task reads
    allow_code: bool = False  # the task may run programs that the model wrote, in a sandbox
    template: Literal[TEMPLATES] = "chat"
    problems: int = 256
    num_generations: int = 8
    rows_at_once: int = 512
    max_completion_length: int = 160
    repeats: int = 3
    device: str = "auto"
    out: Path | None = None  # a JSON file for the figures

    def __post_init__(self):
        at_least(self, 1, "problems", "num_generations", "rows_at_once", "max_completion_length", "repeats")
        new_file(self, "out")


def main(config: Config) -> dict[str, float]:
    """Measure both in turns, print."""
    device = pick(config.device)
    task = tasks.load(config.task, config.data, allow_code=config.allow_code)
    problems = tasks.spread(task.problems("test"), config.problems)
    source = checkpoint.resolve(config.checkpoint)
    model, tokenizer = hf.load(source, device, pick_dtype(None, device))
    shared = {name: getattr(config, name) for name in ("template", "num_generations", "max_completion_length")}
    settings = evaluate.Config(checkpoint=source, forced=False, rows_at_once=config.rows_at_once, **shared)
    prompts = encode(tokenizer, problems, config.template)
    order = sorted(range(len(prompts)), key=lambda p: -len(prompts[p]))

    def generate() -> None:
        for sampling in evaluate.samplings(settings).values():
            n = sampling["answers"]
            step, more = max(1, config.rows_at_once // n), {"answers": n, "temperature": sampling["temperature"]}
            for part in (order[start : start + step] for start in range(0, len(order), step)):
                more |= {"max_tokens": config.max_completion_length, "stop": tokenizer.stops, "seed": settings.seed}
                more |= {"rows": torch.tensor([p * n + i for p in part for i in range(n)])}  # the noise of each answer
                collect(model, [prompts[p] for p in part], **more)

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            evaluate.sample(model, tokenizer, task, problems, settings, Path(folder) / "answers.jsonl")

    seconds: dict[str, list[float]] = {"generation": [], "evaluation": []}
    for _ in range(config.repeats):
        for name, run in (("generation", generate), ("evaluation", whole)):
            synchronize(device)
            began = time.perf_counter()
            run()
            synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    values = {f"seconds/{name}": statistics.median(times) for name, times in seconds.items()}
    values["ratio"] = values["seconds/evaluation"] / values["seconds/generation"]
    lines = [[name, f"{values[f'seconds/{name}']:.1f} s"] for name in seconds] + [["ratio", f"{values['ratio']:.3f}"]]
    table(f"{task.name}: {len(problems)} problems, {config.num_generations + 1} answers each", ["", ""], lines)
    if config.out:
        write_json(config.out, values)
    return values


if __name__ == "__main__":
    cli.run(main, Config)
