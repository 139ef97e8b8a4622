"""The pipeline of R1 over several seeds, and its first RL again without the language reward.

    python -m experiments.studies.r1_seeds --seeds 0 1 2 --jobs 2

A seed determines every stage from the base to the last RL. Each run has its own folder and continues where it was
killed. Each also runs RL 1 without its reward for language consistency, from the same SFT 1: what does the reward give,
and what does it cost in accuracy? Prints the table and writes it, with the figure, under docs/.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments import r1
from experiments.report_claims import paired
from experiments.report_run import STAGES
from experiments.studies import r1_figures
from experiments.studies.processes import run_or_resume, same_command
from minir1 import answer_file, cli
from minir1.files import read_json, write_json
from minir1.log import markdown_table, table
from minir1.metrics import over_seeds
from minir1.settings import at_least, new_file, new_folder

TESTED = {name: STAGES[name][0] for name in r1.TESTED} | {r1.PLAIN: "RL 1 without language reward"}


@dataclass(frozen=True)
class Config:
    """Settings of the pipelines."""

    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: int = 1  # runs at a time; they share the cores equally
    options: str = ""  # further options of r1.py in one string: --options="--zero.steps 100"
    out: Path = Path("runs/r1-seeds")
    results: Path = Path("docs/results/r1.json")
    figure: Path = Path("docs/results/r1_seeds.png")

    def __post_init__(self):
        at_least(self, 1, "jobs")
        at_least(self, 0, "seeds")
        new_file(self, "results", "figure")
        new_folder(self, "out")


def run(config: Config, seed: int, threads: int) -> dict[str, float]:
    """One pipeline, unless it is done; returns flat figures. Errors as in `run_or_resume`."""
    folder = config.out / f"seed-{seed}"
    words = [sys.executable, "-m", "experiments.r1", "--ablation", "--seed", str(seed), "--out", str(folder)]
    words += config.options.split()
    same_command(folder, asked := " ".join(words[3:]))  # also where nothing is left to run
    if not (folder / "report.html").exists():
        print(f"running {folder}, see {folder}.log", flush=True)
        run_or_resume(words, folder, asked, threads)
    return figures(folder)


def figures(folder: Path) -> dict[str, float]:
    """What one run of r1.py gave, flat: STAGE/KEY of the test, STAGE/preference on general prompts, and seconds/STAGE.

    STAGE/over_r1-zero and STAGE/over_rl-1, each with _low and _high: its accuracy minus theirs, paired over problems.
    """
    result = {k: v for k, v in read_json(folder / "result.json").items() if k.startswith(("seconds/", "memory/"))}
    answers = {name: answer_file.read(folder / "test" / name) for name in TESTED if (folder / "test" / name).exists()}
    for name in answers:
        values = read_json(folder / "test" / name / "result.json")
        result |= {f"{name}/{key}": value for key, value in values.items()}
        if (general := folder / "general" / name / "result.json").exists():
            result[f"{name}/preference"] = read_json(general)["preference"]
        for other in ("r1-zero", "rl-1"):
            for end, value in zip(("", "_low", "_high"), paired(answers, name, other)):
                result[f"{name}/over_{other}{end}"] = value
    return result


KEYS = (  # label, key of a stage, format
    ("right", "pass@1", ".1%"), ("easy", "pass@1_easy", ".1%"), ("hard", "pass@1_hard", ".1%"),
    ("minus R1-Zero, in points, paired", "over_r1-zero", "+.1f"),
    ("minus RL 1, in points, paired", "over_rl-1", "+.1f"), ("forced to answer at once", "forced", ".1%"),
    ("well-formed", "format", ".1%"), ("language consistency", "language_consistency", ".1%"),
    ("repeated", "repetition", ".1%"), ("tidy", "tidiness", ".1%"), ("tokens", "length", ".1f"),
    ("explicit checks", "checks", ".2f"), ("false yes, of checks", "false_yes", ".1%"),
    ("general prompts, preference", "preference", ".2f"),
)  # fmt: skip


def head() -> list[str]:
    """The first line of the table."""
    return ["", *TESTED.values()]


def rows(results: Sequence[dict[str, float]]) -> list[list[str]]:
    """A row per key; a cell per stage, the mean over seeds and its interval."""
    lines = []
    for label, key, form in KEYS:
        values = {name: [r[f"{name}/{key}"] for r in results if f"{name}/{key}" in r] for name in TESTED}
        lines.append([label, *(_cell(values[name], key, form) if values[name] else "-" for name in TESTED)])
    return lines


def _cell(values: list[float], key: str, form: str) -> str:
    if not key.startswith("over_"):
        return over_seeds(values, form, least=0.0)
    return over_seeds([100 * value for value in values], form) if any(values) else "-"  # a stage against itself


def finding(results: Sequence[dict[str, float]]) -> str:
    """The claims of the pipeline in words, from the numbers."""
    mean = lambda key: float(np.mean([result[key] for result in results]))
    final, zero = "rl-2", "r1-zero"
    gain = over_seeds([100 * result[f"{final}/over_{zero}"] for result in results], "+.1f")
    seeds = f"the mean of {len(results)} seeds" if len(results) > 1 else "one seed"
    text = f"Of problems that no stage has seen the base solves {mean('base/pass@1'):.1%}, R1-Zero "
    text += f"{mean(f'{zero}/pass@1'):.1%} and the final model {mean(f'{final}/pass@1'):.1%}, {gain} points more than "
    text += f"R1-Zero on the same problems ({seeds}). "
    for key, words in (
        ("language_consistency", "language consistency"),
        ("repetition", "repetition"),
        ("tidiness", "thinking that closes with the answer"),
    ):
        text += f"{words} {mean(f'{zero}/{key}'):.1%} → {mean(f'{final}/{key}'):.1%}, "
    return text.replace("). language", "). From R1-Zero to the end: language").removesuffix(", ") + "."


def cost(result: dict[str, float]) -> str:
    """The seconds of each stage of one run, as a table for a document.

    result: its result.json, and "demo", the seconds of `make demo` just before it on the same machine.
    """
    seconds = {key.removeprefix("seconds/"): value for key, value in result.items() if key.startswith("seconds/")}
    total = seconds.pop("total")
    lines = {name: value for name, value in seconds.items() if "/" not in name}
    lines["tests"] = sum(value for name, value in seconds.items() if "/" in name)
    rows = [[name, f"{value:.0f}", f"{value / total:.0%}"] for name, value in lines.items()]
    rows += [["**all**", f"**{total:.0f}**", ""], ["`make demo`, before it", f"{result['demo']:.0f}", ""]]
    return markdown_table(["", "seconds", "share"], rows)


def main(config: Config) -> list[dict[str, float]]:
    """Run what is missing, print and write the table; returns the figures of each seed."""
    if len(config.seeds) < 3:
        print("fewer than three seeds: no interval can be given")
    threads = max(1, (os.cpu_count() or 1) // config.jobs)
    with ThreadPoolExecutor(config.jobs) as pool:
        results = list(pool.map(lambda seed: run(config, seed, threads), config.seeds))
    table("the stages on the test problems", head(), rows(results))
    print(finding(results))
    write_json(config.results, dict(zip(config.seeds, results)))
    r1_figures.seeds(results, TESTED, config.figure)
    return results


if __name__ == "__main__":
    cli.run(main, Config)
