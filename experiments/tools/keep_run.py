"""Keep what a reader needs of a run of experiments/r1.py: its results, thinned metrics and sampled answers, no weights.

    python -m experiments.tools.keep_run runs/r1 docs/results/r1_pipeline

The result is a folder that experiments/report_run.py and notebooks/05_the_pipeline.ipynb read as they read the run.
Of pre-training and SFT every n-th row is kept, of RL every row, and of each row the values that figures use; of the
tests all results, and the answers to some problems, from which figures and claims then have wider intervals.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.report_run import STAGES
from minir1 import answer_file, cli, tasks
from minir1.files import read_json, replace_text, write_json
from minir1.log import read_metrics
from minir1.settings import at_least

SETTINGS = ("task", "seed", "steps", "batch", "epochs", "prompts", "num_generations", "max_completion_length",
            "temperature", "learning_rate")  # fmt: skip
METRICS = ("step", "train/loss", "eval/loss", "train/reward", "train/accuracy", "train/length", "train/entropy",
           "train/kl", "train/sampled_tokens", "eval/pass@1")  # fmt: skip
SUMMED = "train/sampled_tokens"  # over all rows: they are not thinned where it is logged


@dataclass(frozen=True)
class Config:
    """What is kept, and where."""

    run: Annotated[Path, tyro.conf.Positional]  # the folder of experiments/r1.py
    out: Annotated[Path, tyro.conf.Positional]  # a new folder
    rows: int = 60  # of the metrics of a stage that is not RL, about
    problems: int = 100  # of each test whose answers are kept, at most
    answers: int = 4  # to each of them, at most

    def __post_init__(self):
        at_least(self, 1, "rows", "problems", "answers")
        if self.out.exists():
            raise ValueError(f"out = {self.out} exists: name a new folder")


def short(value: Any) -> Any:
    """All numbers in it with five digits, everything else as it is."""
    if isinstance(value, dict):
        return {key: short(one) for key, one in value.items()}
    if isinstance(value, list):
        return [short(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def thinned(metrics: list[dict], rows: int) -> list[dict]:
    """The values that figures use, of about `rows` rows evenly spread and of those with an evaluation."""
    whole = any(SUMMED in row for row in metrics)
    every = 1 if whole else max(1, len(metrics) // rows)
    chosen = [row for n, row in enumerate(metrics) if n % every == 0 or n == len(metrics) - 1 or "eval/loss" in row]
    return [{key: short(row[key]) for key in METRICS if row.get(key) is not None} for row in chosen]


def lines(records: list[dict]) -> str:
    """JSONL."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def stage(source: Path, target: Path, rows: int) -> None:
    """Result, settings and metrics of one stage."""
    write_json(target / "result.json", short(read_json(source / "result.json")))
    if (source / "config.json").exists():
        config = read_json(source / "config.json")
        write_json(target / "config.json", {key: config[key] for key in SETTINGS if key in config})
    if (source / "metrics.jsonl").exists():
        replace_text(target / "metrics.jsonl", lines(thinned(read_metrics(source), rows)))


def test(source: Path, target: Path, problems: int, answers: int) -> None:
    """Result of one test, and the first sampled answers to some of its problems, without greedy and forced ones."""
    write_json(target / "result.json", short(read_json(source / "result.json")))
    saved = answer_file.read(source)  # ValueError if it is none
    records = [json.loads(line) for line in (source / "answers.jsonl").read_bytes().split(b"\n")[1:-1]]
    sampled = [record for record in records if record["kind"] == "sampled"]
    some = tasks.spread(sorted(sampled, key=lambda record: record["index"]), problems)  # the same ones of every stage
    chosen = [short(record | {"answers": record["answers"][:answers]}) for record in some]
    settings = {key: saved.settings[key] for key in ("task", "data", "split") if key in saved.settings}
    replace_text(target / "answers.jsonl", lines([{"settings": settings}, *chosen]))


def main(config: Config) -> None:
    """Copy what is kept of every finished stage and test."""
    whole = read_json(config.run / "result.json", "the run has not ended, or is none of r1.py")
    part = config.out.with_name(f"{config.out.name}.tmp")  # an error leaves nothing that the next attempt would refuse
    shutil.rmtree(part, ignore_errors=True)
    write_json(part / "result.json", short({k: v for k, v in whole.items() if k.startswith("seconds/")}))
    for name in STAGES:
        if (config.run / name / "result.json").exists():
            stage(config.run / name, part / name, config.rows)
        for kind in ("test", "general"):
            if (config.run / kind / name / "result.json").exists():
                test(config.run / kind / name, part / kind / name, config.problems, config.answers)
    part.rename(config.out)
    files = [path for path in config.out.rglob("*") if path.is_file()]
    print(f"{config.out}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e3:.0f} kB")


if __name__ == "__main__":
    cli.run(main, Config)
