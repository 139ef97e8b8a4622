"""Verifiers on the benchmarks' own references: what is right must be judged right, and what is wrong, wrong.

    python -m experiments.benchmarks.verifiers --task gsm8k --data gsm8k --out docs/results/verifiers.json
    python -m experiments.benchmarks.verifiers --task humaneval --data humaneval --allow-code

For every problem of all splits, the published solution and the bare reference between answer tags are judged as a
model's text; an empty text; and the solutions of other problems, by random permutations, which are right only where two
references are equal. Times are of single calls, one after the other.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from minir1 import cli, tasks
from minir1.files import read_json, write_json
from minir1.judge import judge
from minir1.log import markdown_table, progress, table
from minir1.seed import python_random
from minir1.settings import at_least, new_file

COLUMNS = {  # key -> what it counts
    "solution": "published solution right",
    "bare": "bare reference right",
    "empty": "empty text right",
    "shuffled": "other problem's solution right",
    "equal": "of these, references that are equal",
    "unjudged": "not judged",
}


@dataclass(frozen=True)
class Config:
    """One task and its data."""

    task: str = "gsm8k"
    data: str | None = None  # the folder or file that the task reads
    allow_code: bool = False  # the task may run programs, in a sandbox
    permutations: int = 2  # of the solutions over the problems
    timed: int = 200  # calls, at most
    seed: int = 0
    out: Path | None = None  # a JSON file, to which the task's figures are added

    def __post_init__(self):
        at_least(self, 1, "permutations", "timed")
        at_least(self, 0, "seed")
        new_file(self, "out")


def measure(config: Config) -> dict[str, float]:
    """Counts over all problems, and seconds per call (median, max)."""
    task = tasks.load(config.task, config.data, allow_code=config.allow_code)
    problems = [problem for split in task.splits for problem in available(task, split)]
    if not problems:
        raise ValueError(f"{config.data} holds no problems of task {task.name}")
    texts = {
        "solution": [(p, shown(p)) for p in problems],
        "bare": [(p, f"<think>It follows.</think><answer>{p.reference}</answer>") for p in problems],
        "empty": [(p, "") for p in problems],
    }
    order = list(range(len(problems)))
    shuffled = []
    for i in range(config.permutations):
        python_random(config.seed, i).shuffle(order)
        shuffled += [(p, problems[j]) for p, j in zip(problems, order) if p != problems[j]]
    texts["shuffled"] = [(p, shown(other)) for p, other in shuffled]
    values: dict[str, float] = {"problems": len(problems), "pairs": len(shuffled), "unjudged": 0}
    with progress(sum(map(len, texts.values())), config.task) as advance:
        for kind, asked in texts.items():
            statuses = []
            for start in range(0, len(asked), 100):
                statuses += [verdict.status for verdict in judge(task, asked[start : start + 100])]
                advance(len(asked[start : start + 100]))
            values[kind] = statuses.count("right")
            values["unjudged"] += statuses.count("unjudged")
            if kind == "shuffled":
                right = [pair for pair, status in zip(shuffled, statuses) if status == "right"]
                finals = [(a, task.final(a, shown(a)), task.final(b, shown(b))) for a, b in right]
                values["equal"] = sum(task.same(a, one, other) for a, one, other in finals)
    seconds = []
    for problem, text in texts["solution"][: config.timed]:
        began = time.perf_counter()
        task.verify(problem, text)
        seconds.append(time.perf_counter() - began)
    return values | {"seconds/median": statistics.median(seconds), "seconds/max": max(seconds)}


def shown(problem: tasks.Problem) -> str:
    """The published solution; where there is none, as for programs, the reference is one."""
    return problem.solution or problem.reference


def available(task: tasks.Task, split: str) -> list[tasks.Problem]:
    """The problems of a split; none if the data lacks it."""
    try:
        return task.problems(split)
    except ValueError:
        return []


def page(results: dict[str, dict]) -> str:
    """The table of docs/tasks.md."""
    head = ["task", "problems", *COLUMNS.values(), "ms per call, median", "max"]
    lines = []
    for name, values in results.items():
        counts = [f"{values[key]:,}" + (f" of {values['pairs']:,}" if key == "shuffled" else "") for key in COLUMNS]
        times = [f"{1000 * values[f'seconds/{key}']:.3g}" for key in ("median", "max")]
        lines.append([name, f"{values['problems']:,}", *counts, *times])
    return markdown_table(head, lines)


def main(config: Config) -> dict[str, float]:
    """Measure one task; add it to the file."""
    values = measure(config)
    lines = [[label, f"{values[key]:,}"] for key, label in COLUMNS.items()]
    lines += [[f"ms per call, {key}", f"{1000 * values[f'seconds/{key}']:.1f}"] for key in ("median", "max")]
    table(f"{config.task}: {values['problems']:,} problems, {values['pairs']:,} shuffled pairs", ["", ""], lines)
    if config.out:
        results = read_json(config.out) if config.out.exists() else {}
        write_json(config.out, results | {config.task: values})
    return values


if __name__ == "__main__":
    cli.run(main, Config)
