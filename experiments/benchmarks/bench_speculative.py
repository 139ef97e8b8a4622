"""Speculative decoding: accepted drafts of the MTP modules, and tokens per second.

    python -m experiments.benchmarks.bench_speculative --out docs/results/speculative.json

For each D, pre-trains the tiny model with D modules for multi-token prediction on the task's corpus, then answers
held-out problems with `generate` and `speculate` in turns, with the same weights. On the CPU, seconds are processor
time of one thread, so that other work on the machine does not count; medians of several repeats.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from experiments import pretrain
from experiments.benchmarks.bench_timing import timed
from minir1 import checkpoint, cli, tasks
from minir1.device import pick, pick_dtype
from minir1.files import write_json
from minir1.log import table
from minir1.model import hf
from minir1.model.transformer import Transformer
from minir1.sample import generate
from minir1.settings import at_least, new_file, zero_or_at_least
from minir1.speculative import speculate
from minir1.templates import encode
from minir1.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    """Speculation with bases that pretrain.py trains, or has trained, in `base`/depth-D, on its device."""

    depths: tuple[int, ...] = (1, 2)  # D
    pretrain: pretrain.Config = field(default_factory=lambda: pretrain.Config(steps=300))
    base: Path = Path("runs/speculative")
    rows: tuple[int, ...] = (1, 64)  # answers at once
    problems: int = 4  # at least
    temperatures: tuple[float, ...] = (0.0, 1.0)
    max_completion_length: int = 72
    repeats: int = 3
    out: Path | None = None  # a JSON file for the figures

    def __post_init__(self):
        at_least(self, 1, "depths", "rows", "problems", "max_completion_length", "repeats")
        zero_or_at_least(self, 1e-6, "temperatures")
        new_file(self, "out")


def trained(config: Config, depth: int) -> tuple[Transformer, Tokenizer]:
    """The base with `depth` modules, trained if there is none."""
    shape = replace(config.pretrain.model, mtp_depth=depth)
    run = replace(config.pretrain, model=shape, out=config.base / f"depth-{depth}")
    if not checkpoint.latest(run.out / "checkpoint"):
        pretrain.main(run)
    device = pick(run.device)
    return hf.load(checkpoint.latest(run.out / "checkpoint"), device, pick_dtype(run.dtype, device))


def measure(model: Transformer, batches: list[list[list[int]]], temperature: float, config: Config, stop) -> dict:
    """Run `generate` and `speculate` in turns on the same prompts: acceptance, tokens per pass and per second."""
    speed = {generate: [], speculate: []}
    accepted, tried = (torch.zeros(len(model.mtp), dtype=torch.int64) for _ in range(2))
    tokens = passes = 0
    for repeat in range(config.repeats + 1):
        for way in speed:
            settings = {"max_tokens": config.max_completion_length, "temperature": temperature}
            settings |= {"stop": stop, "seed": repeat}
            work = lambda: [way(model, prompts, **settings) for prompts in batches]
            results, clock, cpu = timed(work, model.device)
            if repeat == 0:  # the warm-up
                continue
            sampled = results if way is generate else [answers for answers, _ in results]
            drawn = sum(int(answers.count.sum()) for answers in sampled)
            speed[way].append(drawn / (cpu if model.device.type == "cpu" else clock))
            if way is speculate:
                accepted += sum(drafts.accepted.sum(0).cpu() for _, drafts in results)
                tried += sum(drafts.tried.sum(0).cpu() for _, drafts in results)
                tokens += drawn - sum(map(len, batches))  # the first token of a row comes from its prompt's pass
                passes += sum(int(drafts.forwards.sum()) for _, drafts in results)
    return {
        **{f"accepted_{k}": a / max(1, t) for k, (a, t) in enumerate(zip(accepted.tolist(), tried.tolist()), start=1)},
        "tokens_a_pass": tokens / max(1, passes),
        "generate_tok_s": statistics.median(speed[generate]),
        "speculate_tok_s": statistics.median(speed[speculate]),
    }


def main(config: Config) -> dict[str, float]:
    """Train what is missing, measure, print, and write the figures."""
    torch.set_num_threads(1)
    task = tasks.load(config.pretrain.task, config.pretrain.data)
    result = {"steps": config.pretrain.steps, "max_tokens": config.max_completion_length}
    lines = []
    for depth in config.depths:
        model, tokenizer = trained(config, depth)
        for rows in config.rows:
            problems = tasks.spread(task.problems("test"), max(rows, config.problems))
            prompts = encode(tokenizer, problems, "chat", "<think>")
            batches = [prompts[i : i + rows] for i in range(0, len(prompts), rows)]
            for temperature in config.temperatures:
                one = measure(model, batches, temperature, config, tokenizer.stops)
                result |= {f"D={depth}/rows={rows}/T={temperature:g}/{key}": value for key, value in one.items()}
                lines.append([f"{depth}", f"{rows}", f"{temperature:g}", *cells(one)])
    table(f"speculation after {config.pretrain.steps} steps of pre-training, one thread", HEAD, lines)
    if config.out:
        write_json(config.out, result)
    return result


HEAD = ["D", "rows", "T", "accepted", "tokens per pass", "generate tok/s", "speculate tok/s", "times"]


def cells(one: dict[str, float]) -> list[str]:
    """The result of `measure` as the last cells of a row."""
    rates = ", ".join(f"{value:.1%}" for key, value in one.items() if key.startswith("accepted_"))
    plain, fast = one["generate_tok_s"], one["speculate_tok_s"]
    return [rates, f"{one['tokens_a_pass']:.2f}", f"{plain:,.0f}", f"{fast:,.0f}", f"{fast / plain:.2f}"]


if __name__ == "__main__":
    cli.run(main, Config)
