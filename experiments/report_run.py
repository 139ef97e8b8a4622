"""What the folders of one run of experiments/r1.py hold, for experiments/report.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from minir1 import answer_file
from minir1.files import read_json
from minir1.judge import EASE, Answer
from minir1.log import read_metrics
from minir1.metrics import share_interval

STAGES = {  # folder -> label, kind; in the order of the pipeline
    "base": ("Base", "pre-training"), "r1-zero": ("R1-Zero", "RL"), "cold-start": ("Cold start", "sampling"),
    "sft-1": ("SFT 1", "SFT"), "rl-1": ("RL 1", "RL"),
    "general-data": ("General data", "sampling"), "rejection": ("Rejection sampling", "sampling"),
    "sft-2": ("SFT 2", "SFT"), "pairs": ("Preference pairs", "sampling"),
    "reward-model": ("Reward model", "reward model"), "rl-2": ("RL 2", "RL"),
}  # fmt: skip


class Stage(NamedTuple):
    """One finished stage. Values that are not finite numbers are left out of `metrics` and `result`."""

    label: str
    kind: str
    config: dict  # empty for a stage that keeps none
    metrics: list[dict]
    result: dict[str, float]
    start: float  # seconds of the stages before it
    seconds: float | None
    trained: int | None  # tokens
    sampled: int | None  # tokens


class Pipeline(NamedTuple):
    """What the folders hold; each dict by the name of the stage, in the order of the pipeline."""

    path: Path
    stages: dict[str, Stage]
    tests: dict[str, dict[str, float]]  # on the test problems
    answers: dict[str, answer_file.Saved]  # to them
    general: dict[str, dict[str, float]]  # on the general prompts
    replies: dict[str, answer_file.Saved]  # to them
    budget: dict[str, dict[str, float]]  # at several token budgets

    def label(self, name: str) -> str:
        """What the page calls a stage."""
        return STAGES[name][0]

    @property
    def final(self) -> str:
        """The last stage that was tested; empty if there is none."""
        return next(reversed(self.tests), "")


class Shown(NamedTuple):
    """One question, and the answer of each stage to it."""

    prompt: str
    reference: str
    subject: str
    answers: dict[str, Answer]  # by label


def finite(values: dict) -> dict[str, float]:
    """The entries that are finite numbers: null and NaN stand for what could not be measured."""
    return {k: v for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}


def read(path: Path) -> Pipeline:
    """The pipeline in a folder. ValueError for a folder without one, or with a damaged file."""
    stages, start, clocks = {}, 0.0, {}
    if (path / "result.json").exists():
        clocks = finite(read_json(path / "result.json"))
    for name, (label, kind) in STAGES.items():
        if (path / name / "result.json").exists():
            stages[name] = _stage(path / name, label, kind, start, clocks.get(f"seconds/{name}"))
            start += stages[name].seconds or 0.0
    if not stages:
        raise ValueError(f"{path} is no run of experiments/r1.py: expected stages in it such as {path}/base")
    tests, general = (_results(path / part) for part in ("test", "general"))
    answers, replies = _answers(path / "test", tests), _answers(path / "general", general)
    budget = {name: spent(saved) for name, saved in answers.items()}
    return Pipeline(path, stages, tests, answers, general, replies, budget)


def spent(saved: answer_file.Saved) -> dict[str, float]:
    """Accuracy at smaller token budgets, as budget/N/pass@1 with its interval.

    It is exact without sampling again: an answer's tokens are the same under any budget, up to where that ends. Only an
    answer that ends within the budget, its end token included, is right; unjudged ones do not count (as in `rights`).
    """
    judged = [[a for a in row if not a.unjudged] for row in saved.answers.get("sampled", {}).values()]
    grid = [row for row in judged if row]
    if not grid:
        return {}
    longest, values = max(answer.tokens for row in grid for answer in row), {}
    for budget in [2**n for n in range(4, 16) if 2**n < longest] + [longest]:
        per_problem = [sum(a.right and not a.truncated and a.tokens <= budget for a in row) / len(row) for row in grid]
        interval = share_interval(per_problem)
        values |= dict(zip((f"budget/{budget}/pass@1{end}" for end in ("", "_low", "_high")), interval))
    return values


def _stage(folder: Path, label: str, kind: str, start: float, clock: float | None) -> Stage:
    """clock: the seconds that the pipeline measured; None: those that the stage reports itself."""
    result = finite(read_json(folder / "result.json"))
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    rows = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    rows = [finite(row) for row in rows]
    own = [value for key, value in result.items() if key == "seconds" or key.startswith("seconds/")]
    sampled = sum(row.get("train/sampled_tokens", 0) for row in rows) if kind == "RL" else None
    sampled = result.get("tokens") if kind == "sampling" else sampled
    trained = {"RL": sampled and sampled * (config.get("epochs") or 1), "SFT": result.get("tokens")}
    trained["pre-training"] = config.get("batch", 0) * (config.get("steps") or 0)
    seconds = clock if clock is not None else sum(own) if own else None
    return Stage(label, kind, config, rows, result, start, seconds, trained.get(kind) or None, sampled or None)


def _results(folder: Path) -> dict[str, dict[str, float]]:
    """The measured values of each stage that has been measured."""
    files = {name: folder / name / "result.json" for name in STAGES}
    results = {name: finite(read_json(file)) for name, file in files.items() if file.exists()}
    return {name: values for name, values in results.items() if values}


def _answers(folder: Path, measured: dict) -> dict[str, answer_file.Saved]:
    """The answers of each stage that has been measured. ValueError unless all are to the same problems."""
    files = {name: folder / name / "answers.jsonl" for name in measured}
    answers = {name: answer_file.read(file) for name, file in files.items() if file.exists()}
    for name, one in answers.items():
        first = next(iter(answers))
        if one.asked != answers[first].asked:
            raise ValueError(f"{files[name]} and {files[first]} hold answers to different problems: test both alike")
    return answers


def groups(tests: dict[str, dict[str, float]]) -> tuple[list[str], list[str]]:
    """The difficulties and the other groups of problems (kinds) for which accuracies were reported."""
    keys = dict.fromkeys(key for values in tests.values() for key in values if key.startswith("pass@1_low_"))
    names = [key.removeprefix("pass@1_low_") for key in keys]
    return [name for name in names if name in EASE], [name for name in names if name not in EASE]
