"""Does a model know that it is right, and what do more tokens buy? Over the models of several pipelines.

    python -m experiments.studies.thinking --pipelines runs/r1
    python -m experiments.studies.thinking --pipelines runs/r1 --students runs/distill-vs-rl/seed-0

--pipelines are folders of r1.py, --students the folders of studies/distill_vs_rl.py for the same seeds. self_verify.py
measures R1-Zero of each pipeline, budget.py R1-Zero and, beside it, the student that was taught by texts and then on
policy. Figures are means over seeds, with intervals over seeds from three on. Each seed has two files in --out, for
each script one: a killed study continues with the same command.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from experiments import budget, budget_figure, self_verify, self_verify_figure
from experiments.studies.comparison_tables import plural
from experiments.studies.processes import same_command
from minir1 import checkpoint, cli
from minir1.files import plain, read_json, write_json
from minir1.judge import EASE
from minir1.log import markdown_table, table
from minir1.metrics import over_seeds, seed_interval
from minir1.settings import at_least, new_file, new_folder

ZERO, STUDENT = "R1-Zero", "the student"
WAYS = {"limit": "thinking stopped at", "wait": "“wait” for the end", "majority": "majority of", "any": "any of"}


@dataclass(frozen=True)
class Config:
    """Which models, and how they are measured."""

    pipelines: tuple[Path, ...]  # a folder of r1.py for each seed
    students: tuple[Path, ...] = ()  # a folder of studies/distill_vs_rl.py for each seed, or none
    task: str = "world"
    max_completion_length: int = 320  # token budget of an answer
    train_problems: int = 600  # of the head
    problems: int = 300  # of the tests, at most
    num_generations: int = 8  # answers to each
    jobs: int = 1  # seeds at a time, one core each
    out: Path = Path("runs/thinking")
    results: Path = Path("docs/results/thinking.json")
    verify_figure: Path = Path("docs/results/self_verify.png")
    budget_figure: Path = Path("docs/results/budget.png")

    def __post_init__(self):
        at_least(self, 1, "max_completion_length", "train_problems", "problems", "jobs")
        at_least(self, 2, "num_generations")
        new_file(self, "results", "verify_figure", "budget_figure")
        new_folder(self, "out")
        if not self.pipelines or len(self.students) not in (0, len(self.pipelines)):
            raise ValueError("pipelines, students: a pipeline for each seed, and as many students or none")


def seed_of(config: Config, seed: int) -> dict[str, dict]:
    """verify: the figures of self_verify.py; budget: the curves of budget.py by model. Read if they are there."""
    torch.set_num_threads(1)
    pipeline, out = config.pipelines[seed], config.out / f"seed-{seed}"
    shared = {"task": config.task, "max_completion_length": config.max_completion_length, "seed": seed, "device": "cpu"}
    shared |= {"num_generations": config.num_generations}
    zero = pipeline / "r1-zero" / "checkpoint"
    sizes = {"problems": config.train_problems, "test_problems": config.problems}
    verify = self_verify.Config(zero, out=out / "verify", **sizes, **shared)
    weights = checkpoint.digests(checkpoint.resolve(zero, prefer="best"))
    same_command(verify.out, json.dumps(plain(asdict(verify)) | {"weights": weights}))
    if not (verify.out / "result.json").exists():
        shutil.rmtree(verify.out, ignore_errors=True)  # a part of it, after a kill
        self_verify.main(verify)
    models = {ZERO: zero}
    if config.students:
        models[STUDENT] = config.students[seed] / "on-policy" / "checkpoint"
    asked = {"checkpoints": tuple(models.values()), "problems": config.problems, "out": out / "budget"}
    curves = budget.main(budget.Config(**asked, **shared))
    return {"verify": read_json(out / "verify" / "result.json"), "budget": dict(zip(models, curves.values()))}


def over(runs: list) -> dict | float:
    """The mean of numbers in nested dicts of the same form; keys that not all have are left out."""
    if isinstance(runs[0], dict):
        return {key: over([run[key] for run in runs]) for key in runs[0] if all(key in run for run in runs)}
    return float(np.mean(runs))


def with_intervals(mean: dict, runs: list[dict], names: dict[str, tuple[str, str]]) -> dict:
    """The means with the intervals over seeds, of three or more, in place of those over problems.

    names: key -> keys of its two ends.
    """
    if len(runs) < 3:
        return mean
    ends = {key: np.clip(seed_interval([run[key] for run in runs])[1:], 0, 1).tolist() for key in names}
    return mean | {name: value for key, pair in names.items() for name, value in zip(pair, ends[key])}


def verified(results: list[dict]) -> dict[str, float]:
    """The figures of self_verify.py over seeds."""
    runs = [result["verify"] for result in results]
    mean = over(runs)
    return with_intervals(mean, runs, {k: (f"{k}_low", f"{k}_high") for k in mean if f"{k}_low" in mean})


def budgets(results: list[dict]) -> dict[str, dict[str, dict]]:
    """model -> way -> budget -> point over seeds, as budget.main returns."""
    runs = [result["budget"] for result in results]
    mean = over(runs)
    for model, ways in mean.items():
        for way, points in ways.items():
            for at, point in points.items():
                same = [run[model][way][at] for run in runs]
                points[at] = with_intervals(point, same, {"right": ("low", "high")})
    return mean


# ---- tables ------------------------------------------------------------------------------------

KNOWN_HEAD = ["after tokens", "answers that are longer", "AUC of the head", "within a problem", "of the mean log-prob"]
PICK_HEAD = ["k", "by the head", "by majority", "at random", "any right"]
RESTART_HEAD = ["stopped below", "right", "tokens", "majority of as many tokens"]


def known_rows(results: list[dict]) -> list[list[str]]:
    """How early the head knows, over seeds: after as many tokens, and at the end."""
    runs = [result["verify"] for result in results]
    mean = over(runs)
    cell = lambda key, form: over_seeds([run[key] for run in runs], form, 0.0, 1.0) if key in mean else "-"
    rows = []
    for at in [*(f"after/{n}" for n in self_verify.positions(mean)), "end"]:
        name = at.removeprefix("after/") if at != "end" else "the end"
        longer = f"{mean[f'{at}/running']:.0%}" if at != "end" else "-"
        rows.append([name, longer, *(cell(f"{at}/{key}", ".3f") for key in ("auc", "within", "logp"))])
    return rows


def pick_rows(results: list[dict]) -> list[list[str]]:
    """One of k answers, over seeds."""
    runs = [result["verify"] for result in results]
    cell = lambda key: over_seeds([run[key] for run in runs])
    ks = sorted(int(key.removeprefix("pass@")) for key in runs[0] if key.startswith("pass@"))
    picks = lambda k: [cell(f"head@{k}"), cell(f"maj@{k}"), cell("random"), cell(f"pass@{k}")]
    return [[str(k), *picks(k)] for k in ks]


def majority_at(run: dict[str, float], tokens: float) -> float:
    """Accuracy of the majority for this many tokens per problem: between its points, by the logarithm of tokens."""
    ks = sorted(int(key.removeprefix("pass@")) for key in run if key.startswith("pass@"))
    x, y = ([run[f"{name}@{k}"] for k in ks] for name in ("tokens", "maj"))
    return float(np.interp(np.log(tokens), np.log(x), y))


def restart_rows(results: list[dict]) -> list[list[str]]:
    """Stopping and beginning again, by threshold, over seeds."""
    runs, rows = [result["verify"] for result in results], []
    for level in (key.split("/")[1] for key in runs[0] if key.startswith("restart/") and key.endswith("/tokens")):
        tokens = [run[f"restart/{level}/tokens"] for run in runs]
        equal = [majority_at(run, n) for run, n in zip(runs, tokens)]
        right = [run[f"restart/{level}/accuracy"] for run in runs]
        rows.append([level, over_seeds(right), f"{np.mean(tokens):.0f}", over_seeds(equal)])
    return rows


def levels_of(results: list[dict]) -> list[str]:
    """The difficulties of the task."""
    return [level for level in EASE if f"right_{level}" in results[0]["budget"][ZERO]["wait"]["0"]]


def budget_head(results: list[dict]) -> list[str]:
    """The first line of `budget_rows`."""
    return ["", "tokens per problem", "right", *levels_of(results)]


def budget_rows(results: list[dict], model: str) -> list[list[str]]:
    """Every point of a model, over seeds."""
    runs, rows = [result["budget"][model] for result in results], []
    for way, label in WAYS.items():
        for at in runs[0][way]:
            points = [run[way][at] for run in runs]
            mean = over(points)
            if (way, at) in (("limit", "none"), ("majority", "1"), ("any", "1")):
                continue  # the whole budget, one answer: wait 0
            name = "one answer, the whole budget" if (way, at) == ("wait", "0") else f"{label} {at}"
            levels = [f"{mean[f'right_{level}']:.1%}" for level in levels_of(results)]
            rows.append([name, f"{mean['tokens']:.0f}", over_seeds([p["right"] for p in points]), *levels])
    return rows


def page_verify(results: dict[str, dict]) -> str:
    """The first block of docs/distillation.md; results: by seed."""
    runs = [*results.values()]
    tables = [(KNOWN_HEAD, known_rows), (PICK_HEAD, pick_rows), (RESTART_HEAD, restart_rows)]
    return "\n\n".join([*(markdown_table(head, rows(runs)) for head, rows in tables), finding_verify(runs)])


def page_budget(results: dict[str, dict]) -> str:
    """The second block: a table per model."""
    runs = [*results.values()]
    parts = [f"**{name[0].upper()}{name[1:]}**\n\n{markdown_table(budget_head(runs), budget_rows(runs, name))}"
             for name in runs[0]["budget"]]  # fmt: skip
    return "\n\n".join(parts)


def finding_verify(results: list[dict]) -> str:
    """What the head knows, in words, from the numbers."""
    runs = [result["verify"] for result in results]
    cell = lambda key, form=".2f": over_seeds([run[key] for run in runs], form, 0.0, 1.0)
    most = max(int(key.removeprefix("pass@")) for key in runs[0] if key.startswith("pass@"))
    gain = over_seeds([100 * (run[f"head@{most}"] - run[f"maj@{most}"]) for run in runs], "+.1f")
    tries = f" Before its verdict, a try is known with {cell('try/4/auc')}." if "try/4/auc" in over(runs) else ""
    early = f"after 16 tokens with an AUC of {cell('after/16/auc')}, " if "after/16/auc" in over(runs) else ""
    return (
        f"Of {cell('random', '.1%')} right answers the head knows {early}at the end with {cell('end/auc')}, among "
        f"answers to the same problem with {cell('end/within')}; the mean log-prob with {cell('end/logp')}, being "
        f"short with {cell('end/short')}.{tries} The expected calibration error at the end is "
        f"{cell('calibration_error', '.3f')}. The best of {most} by the head is {gain} points above the majority of "
        f"{most}."
    )


def main(config: Config) -> list[dict]:
    """Measure what is missing, print and write the tables and the figures; the figures of each seed."""
    seeds = range(len(config.pipelines))
    for seed in seeds:
        for folder, name in ((config.pipelines, "r1-zero"), (config.students, "on-policy")):
            if folder:
                checkpoint.resolve(folder[seed] / name / "checkpoint")  # ValueError before the work begins
    with ProcessPoolExecutor(config.jobs, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(seed_of, itertools.repeat(config), seeds))
    write_json(config.results, dict(enumerate(results)))
    table("will the answer be right?", KNOWN_HEAD, known_rows(results))
    table("one of k answers", PICK_HEAD, pick_rows(results))
    table("stopped, and begun again", RESTART_HEAD, restart_rows(results))
    for model in results[0]["budget"]:
        table(f"accuracy against tokens, {model}", budget_head(results), budget_rows(results, model))
    print(finding_verify(results))
    title = f"{config.task}, {config.problems} test problems, {plural(len(results))}"
    self_verify_figure.draw(verified(results), title, config.verify_figure)
    note = f"{title}; bands: 95 % over {'seeds' if len(results) > 2 else 'problems'}"
    budget_figure.draw(budgets(results), levels_of(results), note, config.budget_figure)
    return results


if __name__ == "__main__":
    cli.run(main, Config)
