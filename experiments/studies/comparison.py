"""Runs and measures the trainings of a comparison: the part that all comparing studies share.

    python -m experiments.studies.comparison --policy runs/r1-zero/checkpoint --base runs/base/checkpoint

A *cell* is one training (script, options, seed) and one measurement of its last policy. Cells run in processes of one
thread, each pinned to a core. Each adds a line to a JSON file under docs/results when it is done, so an interrupted
comparison continues with the same command: finished cells are skipped, a killed one resumes from its last checkpoint,
and a cell that was done with another command, base or measurement is refused.

The *last* checkpoint is measured, not the best by validation, which would favour methods that fluctuate. As a script,
this file makes one such measurement.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Literal

from experiments.studies.processes import call, pinned, run_or_resume
from minir1 import checkpoint, cli, tasks
from minir1.device import pick, pick_dtype
from minir1.files import read_json, replace_text, write_json
from minir1.judge import sample_answers, summary
from minir1.log import progress, read_metrics
from minir1.metrics import with_interval
from minir1.policy import load_policy, logprobs
from minir1.rollout import collect
from minir1.settings import at_least, new_file, new_folder
from minir1.templates import TEMPLATES, encode

PACKAGE = "experiments"  # the package of the scripts
CURVE = ("accuracy", "reward", "length", "entropy", "kl", "mixed_groups", "proxy", "check_error")  # keys below train/


@dataclass(frozen=True)
class Measure:
    """Measures one policy on held-out problems."""

    policy: Path  # a Hugging Face folder, or a folder of checkpoints: then the latest
    base: Path  # the model that it was trained from: the drift is measured from it
    task: str = "countdown"
    data: str | None = None  # what the task reads
    template: Literal[TEMPLATES] = "chat"
    split: str = "test"
    problems: int = 400  # at most
    num_generations: int = 8  # answers to a problem
    max_completion_length: int = 384  # token budget of an answer
    seed: int = 0  # of the sampling; the same for every policy
    device: str = "auto"
    out: Path = Path("runs/measured.json")

    def __post_init__(self):
        at_least(self, 1, "problems", "num_generations", "max_completion_length")
        at_least(self, 0, "seed")
        new_file(self, "out")


@dataclass(frozen=True)
class Config:
    """The settings that all cells of a comparison share."""

    checkpoint: Path = Path("runs/base/checkpoint")  # the base that every training starts from
    task: str = "countdown"
    data: str | None = None  # what the task reads
    template: Literal[TEMPLATES] = "chat"
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 16
    prompts: int = 16  # P, problems per step
    num_generations: int = 8  # G, answers per problem
    max_completion_length: int = 384  # token budget of an answer
    learning_rate: float = 3e-4  # AdamW; the middle one where several are tried
    eval_every: int = 8  # steps; a checkpoint is saved then, so a killed training loses fewer steps than this
    problems: int = 400  # held-out problems, at most
    test_answers: int = 4  # sampled per held-out problem
    jobs: int = 2  # cells at a time
    device: str = "cpu"  # of every cell
    out: Path = Path("runs/comparison")
    results: Path = Path("docs/results/comparison.json")
    figure: Path = Path("docs/results/comparison.png")

    def __post_init__(self):
        at_least(self, 1, "steps", "prompts", "num_generations", "max_completion_length", "eval_every", "problems")
        at_least(self, 1, "test_answers", "jobs")
        at_least(self, 0, "seeds", "learning_rate")
        new_file(self, "results", "figure")
        new_folder(self, "out")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {self.seeds}: each once")


@dataclass(frozen=True)
class Cell:
    """One training and the measurement of its last policy; without a script, the measurement of the base alone."""

    name: str  # its key in the results and its folder below Config.out, such as "grpo/0"
    script: str = ""  # below experiments/
    options: dict = field(default_factory=dict)  # of the script; they replace those that `command` gives
    steps: int = 0
    seed: int = 0
    split: str = "test"


@dataclass(frozen=True)
class Method:
    """A row of a comparison: its label and its training."""

    label: str
    script: str  # below experiments/
    options: dict = field(default_factory=dict)  # of the script


START = "start"  # the name of the cell that measures the base


def cells_of(methods: dict[str, Method], config: Config) -> list[Cell]:
    """The base, then all methods seed by seed, so that all have equally many seeds when the comparison is stopped."""
    return [Cell(START)] + [
        Cell(f"{name}/{seed}", method.script, method.options, config.steps, seed)
        for seed in config.seeds
        for name, method in methods.items()
    ]


# ---- one cell ----------------------------------------------------------------------------------


def flags(options: dict) -> list[str]:
    """Options as the words of a command, a tuple as several; those that are None are left out."""
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in options.items()}
    return [word for name, value in values.items() if value != (None,) for word in (f"--{name}", *map(str, value))]


def task_options(config: Config) -> dict:
    """The options that every script of a cell takes."""
    return {name: getattr(config, name) for name in ("task", "data", "template", "device")}


def command(cell: Cell, config: Config) -> list[str]:
    """The command of a training, without base and folder; the cell's options replace those of the comparison."""
    options = task_options(config) | {"steps": cell.steps, "seed": cell.seed, "learning-rate": config.learning_rate}
    options |= {"prompts": config.prompts, "num-generations": config.num_generations}
    options |= {"max-completion-length": config.max_completion_length, "eval-every": config.eval_every}
    return [cell.script, *flags(options | {"eval-answers": 1} | cell.options)]


def identity(cell: Cell, config: Config) -> dict[str, str]:
    """The training, the measurement and the base, with which a stored result must agree."""
    training = " ".join(command(cell, config)) if cell.script else ""
    measured = f"{config.problems} {cell.split} problems of {config.task}, "
    measured += f"{config.test_answers} answers of {config.max_completion_length} tokens"
    return {"command": training, "measured": measured, "base": fingerprint(config.checkpoint)}


def fingerprint(folder: Path) -> str:
    """Twelve digits of the SHA-256 of the weights. ValueError if there are none."""
    digest, files = hashlib.sha256(), sorted(checkpoint.resolve(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors: expected a checkpoint, such as pretrain.py writes")
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def run(cell: Cell, config: Config) -> dict:
    """Train and measure; returns the result as it is stored. RuntimeError with the last line of a log if one fails."""
    folder = config.out / cell.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    asked = identity(cell, config)
    python = [sys.executable, "-m"]
    if cell.script:
        words = [*python, f"{PACKAGE}.{cell.script}", *command(cell, config)[1:]]
        words += ["--checkpoint", str(config.checkpoint), "--out", str(folder)]
        run_or_resume(words, folder, json.dumps(asked))
    policy = folder / "checkpoint" if cell.script else config.checkpoint
    measured = folder.with_name(f"{folder.name}.measured.json")
    settings = {"policy": policy, "base": config.checkpoint, "split": cell.split, "problems": config.problems}
    settings |= {"num-generations": config.test_answers, "max-completion-length": config.max_completion_length}
    settings |= task_options(config) | {"out": measured}
    call([*python, f"{PACKAGE}.studies.comparison", *flags(settings)], folder)
    result = asked | {"seed": cell.seed, "steps": cell.steps} | json.loads(measured.read_text())
    batch = config.prompts * config.num_generations  # a cell's own options divide it otherwise, with the same product
    return result | (cost_and_curve(read_metrics(folder), batch) if cell.script else {})


def cost_and_curve(rows: list[dict], batch: int) -> dict:
    """The cost of a training and its learning curves, from the rows of metrics.jsonl and the answers of a step, P·G.

    tokens/sampled counts all sampled tokens, those of refilled groups and of the value's warm-up too; tokens/trained
    counts answer tokens that entered a loss, once each; seconds/total is of the steps, without validation.
    """
    rows = [row for row in rows if "train/sampled_tokens" in row]
    sampled = [row["train/sampled_tokens"] for row in rows]
    trained = sum(row["train/length"] * batch for row in rows)
    seconds = {key: sum(row.get(key, 0.0) for row in rows) for key in rows[0] if key.startswith("time/")}
    cost = {"tokens/sampled": sum(sampled), "tokens/trained": round(trained)}
    cost |= {f"seconds/{key[5:-2]}": round(value, 1) for key, value in seconds.items()}
    curve = {"tokens": list(accumulate(sampled))}
    for name in CURVE:
        values = [row.get(f"train/{name}") for row in rows]  # DAPO's accuracy is that of all drawn groups
        if None not in values:
            curve[name] = [round(value, 5) for value in values]
    return cost | {"seconds/total": round(sum(seconds.values()), 1), "curve": curve}


def measure(config: Measure) -> dict:
    """`minir1.judge.summary`, the number of right answers to each problem ("right", int [P]), and the drift.

    drift: KL(π‖π_base) of an answer in nats, E[Σ_t log π(x_t) - log π_base(x_t)] over one sampled answer per problem.
    """
    device = pick(config.device)
    dtype = pick_dtype(None, device)
    (model, tokenizer, _), (base, *_) = (load_policy(path, device, dtype) for path in (config.policy, config.base))
    task = tasks.load(config.task, config.data)
    problems = tasks.spread(task.problems(config.split), config.problems)
    sampling = {"max_tokens": config.max_completion_length, "seed": config.seed}
    shape = {"answers": config.num_generations, "template": config.template}
    grid = sample_answers(model, tokenizer, task, problems, **shape, **sampling)
    prompts = encode(tokenizer, problems, config.template)
    rollout = collect(model, prompts, answers=1, stop=tokenizer.stops, **sampling)
    drift = (rollout.logp - logprobs(base, rollout, 8192)).where(rollout.mask, 0.0).sum().item() / len(problems)
    right = [sum(answer.right for answer in row) for row in grid]
    return summary(task, problems, grid) | {"drift": drift, "answers": config.num_generations, "right": right}


# ---- many cells --------------------------------------------------------------------------------


def load(results: Path) -> dict[str, dict]:
    """name -> result of the cells that are done."""
    return read_json(results) if results.exists() else {}


def store(results: Path, name: str, result: dict) -> None:
    """Add a result to the file, which has one line per cell, so that each can be committed by itself."""
    results.parent.mkdir(parents=True, exist_ok=True)
    stored = load(results) | {name: result}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(stored[key])}" for key in sorted(stored))
    replace_text(results, f"{{\n{lines}\n}}\n")


def refuse_changed(cells: list[Cell], stored: dict[str, dict], config: Config) -> None:
    """ValueError if a stored result has another training, measurement or base than the cell of its name."""
    for cell in (cell for cell in cells if cell.name in stored):
        for key, now in identity(cell, config).items():
            if (then := stored[cell.name][key]) != now:
                raise ValueError(
                    f"{config.results}: {cell.name} was done with {key} {then!r}, now {now!r}: continue with the same "
                    "settings, or choose another --results and --out"
                )


def refuse_unusable(config: Config) -> None:
    """ValueError for a device, a task or a base that no cell could start with: once, and before the first."""
    pick(config.device)
    tasks.load(config.task, config.data).problems("train")
    fingerprint(config.checkpoint)


def complete(
    cells: list[Cell], config: Config, later: int = 0, after: Callable[[Config], None] | None = None
) -> dict[str, str]:
    """Run the cells that `config.results` lacks, in order, `jobs` at a time.

    Returns cell -> error, with the end of the log, of cells that failed; the other cells still run. later: training
    steps of the cells after these, for the expected time; after: called when a cell ends.
    """
    stored, failed = load(config.results), {}
    refuse_changed(cells, stored, config)
    missing = [cell for cell in cells if cell.name not in stored]
    if missing:
        refuse_unusable(config)
    began, done, left = time.perf_counter(), 0, sum(cell.steps for cell in missing) + later
    with progress(sum(cell.steps for cell in cells) + later, config.results.stem) as advance:
        advance(sum(cell.steps for cell in cells if cell.name in stored))
        pool = pinned(config.jobs)
        try:
            waiting = {pool.submit(run, cell, config): cell for cell in missing}
            for count, future in enumerate(as_completed(waiting), start=1):
                cell, error = waiting[future], future.exception()
                done, left = done + cell.steps, left - cell.steps
                advance(cell.steps)
                if error is None:
                    store(config.results, cell.name, future.result())
                    outcome = f"{cell.split} pass@1 {future.result()['pass@1']:.1%}"
                elif isinstance(error, (RuntimeError, ValueError)):
                    failed[cell.name] = str(error)
                    outcome = f"FAILED, {error}"
                else:
                    raise error
                minutes = f", about {(time.perf_counter() - began) / done * left / 60:.0f} min left" if done else ""
                print(f"{cell.name}: {outcome}\n{count} of {len(missing)} cells{minutes}", flush=True)
                if after:
                    after(config)
        finally:  # after an interrupt no further cell starts
            pool.shutdown(cancel_futures=True)
    return failed


def end(failed: dict[str, str], config: Config) -> None:
    """SystemExit (status 1) if a cell failed."""
    if failed:
        names = ", ".join(sorted(failed))
        raise SystemExit(f"failed: {names}; the logs lie in {config.out}, and the same command tries again")


def main(config: Measure) -> dict:
    """Measure one policy, write the JSON, print its accuracy."""
    result = measure(config)
    write_json(config.out, result)
    interval = with_interval(*(result[f"pass@1{end}"] for end in ("", "_low", "_high")))
    print(f"{config.policy}: {config.split} pass@1 {interval}")
    return result


if __name__ == "__main__":
    cli.run(main, Measure)
