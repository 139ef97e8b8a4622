"""Trainings side by side at equal cost: what the comparing studies share.

    python -m experiments.studies.comparison --policy runs/r1-zero/checkpoint --base runs/base/checkpoint

A *cell* is one training (script, options, seed) and one measurement of the policy that it ends with. Cells run in
processes of one thread, each pinned to a core, and write one line each into one JSON file under docs/results as soon as
they are done, so that a comparison goes on where it stopped: a cell that is in the file is skipped, one that was killed
resumes from its last checkpoint, and one that is there with another command, base or measurement is refused.

What is measured is always the *last* checkpoint, never the best by validation: choosing would favour methods that
fluctuate. Called by itself, this script makes one such measurement.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

from experiments.studies.processes import call, go_on, pinned
from minir1 import checkpoint
from minir1.data import by_tokens
from minir1.judge import sample_answers, summary
from minir1.log import progress, read_metrics, replace_text
from minir1.model import hf
from minir1.model.lora import merge
from minir1.rollout import collect
from minir1.tasks import countdown

PACKAGE = "experiments"  # that holds the scripts
CURVE = ("accuracy", "reward", "length", "entropy", "false_yes", "kl", "mixed_groups", "proxy")  # of train/


@dataclass(frozen=True)
class Measure:
    """One policy on held-out problems."""

    policy: Path  # a Hugging Face folder, or a folder of checkpoints: then the latest
    base: Path  # what it was trained from, to tell how far it has gone
    split: Literal["validation", "test", "unseen"] = "test"
    level: str = "default"  # of Countdown: default | wide | four
    problems: int = 400  # at most
    answers: int = 8  # sampled, a problem
    max_tokens: int = 384  # budget of an answer
    seed: int = 0  # of the sampling; the same for every policy
    out: Path = Path("runs/measured.json")


@dataclass(frozen=True)
class Config:
    """A comparison: what all of its cells have in common."""

    checkpoint: Path = Path("runs/base/checkpoint")  # the base that every training starts from
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 16
    prompts: int = 16  # P, problems a step
    answers: int = 8  # G, answers a problem
    max_tokens: int = 384  # budget of an answer
    lr: float = 3e-4  # AdamW; the middle one where several are tried
    eval_every: int = 8  # steps; a checkpoint is kept then, so a killed training loses fewer than these
    problems: int = 400  # held-out problems, at most
    test_answers: int = 4  # sampled, a held-out problem
    jobs: int = 2  # cells at a time
    out: Path = Path("runs/comparison")
    results: Path = Path("docs/results/comparison.json")
    figure: Path = Path("docs/results/comparison.png")

    def __post_init__(self):
        for name in ("steps", "eval_every", "problems", "test_answers", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: at least 1")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ValueError(f"seeds = {self.seeds}: need at least one, each once")


@dataclass(frozen=True)
class Cell:
    """One training and the measurement of its end; without a script, the measurement of the base alone."""

    name: str  # its key in the results and its folder below Config.out, such as "grpo/0"
    script: str = ""  # below experiments/
    options: dict = field(default_factory=dict)  # of the script, beside those that `command` gives, or instead of them
    steps: int = 0
    seed: int = 0
    split: str = "test"


@dataclass(frozen=True)
class Method:
    """A column of a comparison: what it is called, and how it is trained."""

    label: str
    script: str  # below experiments/
    options: dict = field(default_factory=dict)  # of the script


START = "start"  # the name of the cell that measures the base


def cells_of(methods: dict[str, Method], config: Config) -> list[Cell]:
    """The base, and every method with every seed, all methods of a seed before the next: a stop leaves a fair table."""
    return [Cell(START)] + [
        Cell(f"{name}/{seed}", method.script, method.options, config.steps, seed)
        for seed in config.seeds
        for name, method in methods.items()
    ]


# ---- one cell ----------------------------------------------------------------------------------


def command(cell: Cell, config: Config) -> list[str]:
    """The training, without the base it starts from and the folder it writes to; a cell's own options come first."""
    options = {"steps": cell.steps, "seed": cell.seed, "lr": config.lr, "prompts": config.prompts}
    options |= {"answers": config.answers, "max-tokens": config.max_tokens}
    options |= {"eval-every": config.eval_every, "eval-answers": 1} | cell.options
    return [cell.script, *(word for name, value in options.items() for word in (f"--{name}", f"{value}"))]


def identity(cell: Cell, config: Config) -> dict[str, str]:
    """What a stored result must agree with to be that of the cell: the training, the measurement and the base."""
    measured = f"{config.problems} {cell.split} problems, {config.test_answers} answers of {config.max_tokens} tokens"
    training = " ".join(command(cell, config)) if cell.script else ""
    return {"command": training, "measured": measured, "base": fingerprint(config.checkpoint)}


def fingerprint(folder: Path) -> str:
    """Twelve digits of the SHA-256 of the weights: the same base has the same, wherever it lies."""
    digest = hashlib.sha256()
    for file in sorted(resolved(folder).glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def resolved(folder: Path) -> Path:
    """The latest checkpoint in a folder of checkpoints, or the folder itself. ValueError if it holds no weights."""
    path = checkpoint.latest(folder) or folder
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"{path} holds no *.safetensors: expected a checkpoint, such as pretrain.py writes")
    return path


def run(cell: Cell, config: Config) -> dict:
    """Train and measure; RuntimeError with the end of the log if either fails. The result as it is stored."""
    folder = config.out / cell.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    asked = identity(cell, config)
    if cell.script:
        words = [sys.executable, "-m", f"{PACKAGE}.{cell.script}", *command(cell, config)[1:]]
        words += ["--checkpoint", str(config.checkpoint), "--out", str(folder)]
        go_on(words, folder, json.dumps(asked))
    policy = folder / "checkpoint" if cell.script else config.checkpoint
    measured = folder.with_name(f"{folder.name}.measured.json")
    settings = {"policy": policy, "base": config.checkpoint, "split": cell.split, "problems": config.problems}
    settings |= {"answers": config.test_answers, "max-tokens": config.max_tokens, "out": measured}
    words = [sys.executable, "-m", f"{PACKAGE}.studies.comparison"]
    call(words + [word for name, value in settings.items() for word in (f"--{name}", f"{value}")], folder)
    found = asked | {"seed": cell.seed, "steps": cell.steps} | json.loads(measured.read_text())
    batch = config.prompts * config.answers  # as `command` has it; options that cut it otherwise keep the product
    return found | (spent(read_metrics(folder), batch) if cell.script else {})


def spent(rows: list[dict], batch: int) -> dict:
    """What a training has cost, and its course. rows: of its metrics.jsonl; batch: answers in the loss of a step, P·G.

    tokens/sampled counts every sampled token, those of refilled groups and of a value's warm-up too; tokens/trained the
    answer tokens that entered a loss, once each; seconds/total is of the steps alone, without validation.
    """
    rows = [row for row in rows if "train/sampled_tokens" in row]
    sampled = [row["train/sampled_tokens"] for row in rows]
    trained = sum(row["train/length"] * batch for row in rows)
    found: dict = {"tokens/sampled": sum(sampled), "tokens/trained": round(trained)}
    seconds = {key: sum(row.get(key, 0.0) for row in rows) for key in rows[0] if key.startswith("time/")}
    found |= {f"seconds/{key[5:-2]}": round(value, 1) for key, value in seconds.items()}
    found["seconds/total"] = round(sum(seconds.values()), 1)
    curve = {"tokens": [sum(sampled[: i + 1]) for i in range(len(sampled))]}
    for name in CURVE:
        values = [row.get(f"train/{name}") for row in rows]  # of DAPO, accuracy is that of all drawn groups
        if None not in values:
            curve[name] = [round(value, 5) for value in values]
    return found | {"curve": curve}


@torch.no_grad()
def measure(config: Measure) -> dict:
    """Flat figures of `minir1.evaluate.summary`, the right answers of each problem ("right", int [P]), and the drift.

    drift: KL(π‖π_base) of an answer in nats, E[Σ_t log π(x_t) - log π_base(x_t)] over one sampled answer a problem.
    """
    model, tokenizer = hf.load(resolved(config.policy))
    base, _ = hf.load(resolved(config.base))
    model, base = merge(model), merge(base)
    problems = countdown.held_out(config.level, config.split, config.problems)
    sampling = {"max_tokens": config.max_tokens, "seed": config.seed}
    grid = sample_answers(model, tokenizer, problems, countdown.verify, answers=config.answers, **sampling)
    found = summary(problems, grid, countdown.behaviour)
    prompts = [tokenizer.encode(tokenizer.chat(p.prompt)) for p in problems]
    rollout = collect(model, prompts, answers=1, stop=tokenizer.eos, **sampling)
    drift = 0.0
    for rows in by_tokens(rollout.length.tolist(), 8192):
        part = rollout.select(torch.tensor(rows))
        base_logp = base.logprob(part.tokens, lengths=part.length, mask=part.mask, temperature=part.temperature)
        drift += ((part.logp - base_logp) * part.mask).sum().item() / len(problems)
    return found | {"drift": drift, "answers": config.answers, "right": [sum(a.right for a in row) for row in grid]}


# ---- many cells --------------------------------------------------------------------------------


def load(results: Path) -> dict[str, dict]:
    """name -> result of the cells that are done."""
    return json.loads(results.read_text()) if results.exists() else {}


def store(results: Path, name: str, result: dict) -> None:
    """Add a result to the file, a line a cell, so that each can be committed by itself."""
    results.parent.mkdir(parents=True, exist_ok=True)
    found = load(results) | {name: result}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(found[key])}" for key in sorted(found))
    replace_text(results, f"{{\n{lines}\n}}\n")


def refuse_changed(cells: list[Cell], found: dict[str, dict], config: Config) -> None:
    """ValueError if a stored result is of another training, measurement or base than the cell of its name."""
    for cell in cells:
        for key, now in identity(cell, config).items() if cell.name in found else ():
            if found[cell.name][key] != now:
                raise ValueError(
                    f"{config.results}: {cell.name} was done with {key} {found[cell.name][key]!r}, now {now!r}: go on "
                    "as it was begun, or choose another --results and --out"
                )


def complete(cells: list[Cell], config: Config, later: int = 0) -> Iterator[tuple[Cell, str]]:
    """Run what `config.results` lacks, `jobs` at a time in the given order; yields each as it ends, with what failed.

    The text of a failure, "" where there is none, ends with the end of the log; the other cells go on. later: training
    steps of cells that are to come after these, for the expected time.
    """
    found = load(config.results)
    refuse_changed(cells, found, config)
    missing = [cell for cell in cells if cell.name not in found]
    began, done, left = time.perf_counter(), 0, sum(cell.steps for cell in missing) + later
    with progress(sum(cell.steps for cell in cells) + later, config.results.stem) as bar:
        bar.advance(sum(cell.steps for cell in cells if cell.name in found))
        pool = pinned(config.jobs)
        try:
            waiting = {pool.submit(run, cell, config): cell for cell in missing}
            for count, future in enumerate(as_completed(waiting), start=1):
                cell, error = waiting[future], future.exception()
                done, left = done + cell.steps, left - cell.steps
                bar.advance(cell.steps)
                if error is None:
                    store(config.results, cell.name, future.result())
                    told = f"{cell.split} pass@1 {future.result()['pass@1']:.1%}"
                elif isinstance(error, (RuntimeError, ValueError)):
                    told = f"FAILED, {error}"
                else:
                    raise error
                minutes = f", about {(time.perf_counter() - began) / done * left / 60:.0f} min left" if done else ""
                print(f"{cell.name}: {told}\n{count} of {len(missing)} cells{minutes}", flush=True)
                yield cell, str(error or "")
        finally:  # after an interrupt nothing further begins
            pool.shutdown(cancel_futures=True)


def end(failed: list[str], config: Config) -> None:
    """SystemExit, and so a status of 1, if a cell failed."""
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the logs lie in {config.out}, and the same command tries again")


def main(config: Measure) -> dict:
    """Measure one policy, write the JSON, say what it solves."""
    found = measure(config)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(config.out, json.dumps(found) + "\n")
    low, high = 100 * found["pass@1_low"], 100 * found["pass@1_high"]
    print(f"{config.policy}: {config.split} pass@1 {found['pass@1']:.1%} [{low:.1f}, {high:.1f}]")
    return found


if __name__ == "__main__":
    main(tyro.cli(Measure))
