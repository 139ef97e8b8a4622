"""The demonstration over several seeds, with a control: the same base trained to answer without thinking.

    python -m experiments.studies.seeds --seeds 0 1 2 --jobs 2
    python -m experiments.studies.seeds --task countdown:wide --results docs/results/wide.json --figure runs/wide.png

A seed determines both the base and the reinforcement learning. Every run has its own folder and is skipped when its
result exists, so a killed comparison continues with the same command. With --jobs 2 two runs share the machine's cores.
Prints the table and writes it, with the figure, under docs/.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from experiments.studies import seeds_figures
from experiments.studies.processes import run_or_resume, same_command
from minir1 import cli, tasks
from minir1.files import write_json
from minir1.log import table
from minir1.metrics import over_seeds
from minir1.settings import at_least, new_file, new_folder


@dataclass(frozen=True)
class Config:
    """Settings of the demonstrations."""

    seeds: tuple[int, ...] = (0, 1, 2)
    task: str = "countdown"  # one with a corpus to pre-train on: countdown, countdown:wide, countdown:four
    jobs: int = 1  # runs at a time; they share the cores equally
    control: bool = True  # also train each base to answer without thinking
    options: str = ""  # further options of demo.py in one string: --options="--rl.steps 40"
    out: Path = Path("runs/seeds")
    results: Path = Path("docs/results/r1_zero.json")
    figure: Path = Path("docs/results/r1_zero_seeds.png")

    def __post_init__(self):
        at_least(self, 1, "jobs")
        at_least(self, 0, "seeds")
        new_file(self, "results", "figure")
        new_folder(self, "out")

    def folder(self, seed: int, no_think: bool = False) -> Path:
        """The folder of one run."""
        return self.out / f"{'no-think' if no_think else 'think'}-{seed}"


def command(config: Config, seed: int, no_think: bool) -> list[str]:
    """One run of demo.py; the control starts from the base of its seed."""
    words = [sys.executable, "-m", "experiments.demo", "--seed", str(seed), "--task", config.task]
    words += ["--out", str(config.folder(seed, no_think))]
    if no_think:
        words += ["--no-think", "--base-from", str(config.folder(seed) / "base")]
    return words + config.options.split()


def run(config: Config, seed: int, no_think: bool, threads: int) -> dict[str, float]:
    """Run demo.py unless it is done; returns its result. Errors as in `run_or_resume`."""
    folder = config.folder(seed, no_think)
    result, words = folder / "result.json", command(config, seed, no_think)
    same_command(folder, asked := " ".join(words[3:]))
    if not (result.exists() and "after/pass@1" in json.loads(result.read_text())):
        print(f"running {folder.name}, see {folder}.log", flush=True)
        run_or_resume(words, folder, asked, threads)
    return json.loads(result.read_text())


KEYS = (  # label, key in result.json
    ("before", "before/pass@1"),
    ("after", "after/pass@1"),
    ("gain, paired over problems", "gain/pass@1"),
    ("after, among well-formed answers", "after/pass@1_formed"),
    ("before, unseen numbers", "before_unseen/pass@1"),
    ("after, unseen numbers", "after_unseen/pass@1"),
    ("before, greedy", "before/greedy"),
    ("after, greedy", "after/greedy"),
    ("after, maj@8", "after/maj@8"),
    ("after, pass@8", "after/pass@8"),
    ("after, forced to answer at once", "forced/pass@1"),
    ("trained to answer at once", "nothink/pass@1"),
    ("random search, as many tries", "search/pass@1"),
    ("random search without repeats", "search_without_repeats/pass@1"),
    ("after, hard problems (a random search needs over 12 tries)", "after/pass@1_hard"),
    ("before, tokens", "before/length"),
    ("after, tokens", "after/length"),
    ("before, tries", "before/tries"),
    ("after, tries", "after/tries"),
    ("before, well-formed", "before/format"),
    ("after, well-formed", "after/format"),
    ("before, false yes", "before/false_yes"),
    ("after, false yes", "after/false_yes"),
    ("after, repeated tries", "after/repeats"),
    ("after, truncated by the token budget", "after/truncated"),
    ("skill of the base: sums", "skill/sums"),
    ("skill of the base: yes to a right try", "skill/yes"),
    ("peak memory, GiB", "memory/peak_gib"),
)


def rows(results: list[dict[str, float]]) -> list[list[str]]:
    """A row per key that every seed has: its label, a cell per seed, and from three seeds on the mean."""
    lines = []
    for label, key in KEYS:
        values = [result[key] for result in results if key in result]
        if values and len(values) == len(results):
            form = ".1f" if key.startswith("memory/") or key.endswith(("/length", "/tries")) else ".1%"
            mean = over_seeds(values, form) if len(values) >= 3 else "-"
            lines.append([label, *(f"{value:{form}}" for value in values), mean])
    return lines


def head(seeds) -> list[str]:
    """The first line of the table."""
    return ["", *(f"seed {seed}" for seed in seeds), "mean, 95 %"]


def main(config: Config) -> list[dict[str, float]]:
    """Run what is missing, print and write the table of seeds; returns the result of each seed."""
    tasks.load(config.task)  # an unknown one is refused once, here
    if len(config.seeds) < 3:
        print("fewer than three seeds: no interval can be given")
    threads = max(1, (os.cpu_count() or 1) // config.jobs)
    with ThreadPoolExecutor(config.jobs) as pool:
        results = list(pool.map(lambda seed: run(config, seed, False, threads), config.seeds))
        if config.control:
            controls = pool.map(lambda seed: run(config, seed, True, threads), config.seeds)
            for result, control in zip(results, controls):
                solved = {key: value for key, value in control.items() if key.startswith("after/pass@1")}
                result |= {key.replace("after/", "nothink/"): value for key, value in solved.items()}
    table(f"{config.task}: pass@1 on the test split", head(config.seeds), rows(results))
    write_json(config.results, dict(zip(config.seeds, results)))
    seeds_figures.seeds(results, config.figure)
    first = config.folder(config.seeds[0]) / "figures" / "r1_zero.png"
    if first.exists():
        shutil.copy(first, config.results.with_suffix(".png"))
    return results


if __name__ == "__main__":
    cli.run(main, Config)
