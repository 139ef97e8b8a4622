"""Is it better to teach a small model, or to let it learn by itself? Distillation against RL on the same student.

    python -m experiments.studies.distill_vs_rl --teachers runs/r1
    python -m experiments.studies.distill_vs_rl --teachers runs/r1-seeds/seed-0 runs/r1-seeds/seed-1 --jobs 2

DeepSeek-R1 (arXiv:2501.12948, section 4.1) found that the large model's answers taught a small one more than RL on the
small one did. Here the teacher is the last model of a pipeline (r1.py), and the student a small dense one, pre-trained
on the same corpus. From this base:

    texts      the teacher's right answers, filtered by reject_sample.py, then distill.py without the teacher
    logits     distill.py on the same texts with the teacher's distributions, KL(T‖S)
    on-policy  distill_on_policy.py from the student that texts made: KL(S‖T) on its own samples
    rl         r1_zero.py, of 80 steps by default: compare its tokens and seconds in the table
    texts-rl   r1_zero.py from the student that texts made, as many steps as on-policy

The teacher is given: its own training counts nowhere. Tokens are those of answers that a loss is taken at, each pass
counted, and apart from them those that the teacher sampled; seconds are of sampling, judging and training, the
teacher's sampling included, without validation. The last student of each training is tested, not the best by
validation, on the same problems, so that differences are paired. A seed of the student for each teacher, which may be
given several times; a killed study continues with the same command.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.report_claims import paired
from experiments.studies import distill_figures
from experiments.studies.processes import pinned, run_or_resume, same_command
from minir1 import answer_file, checkpoint, cli
from minir1.files import read_json, write_json
from minir1.log import markdown_table, read_metrics, table
from minir1.metrics import over_seeds
from minir1.settings import at_least, new_file, new_folder

STUDENT = "--model.attention gqa --model.experts 0 --model.dim 80 --model.layers 3 --model.heads 4 --model.kv-heads 2"
WAYS = {
    "base": "the student before", "rl": "RL", "texts": "the teacher's texts", "logits": "the teacher's distributions",
    "on-policy": "texts, then on policy", "texts-rl": "texts, then RL", "teacher": "the teacher",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings of the study."""

    teachers: tuple[Path, ...]  # folders of r1.py, one for each seed
    task: str = "world"
    student: str = f"{STUDENT} --model.ffn 224 --steps 1500"  # options of pretrain.py
    sampling: str = "--problems 1600 --num-generations 4 --per-problem 3 --min-language 0.99 --tidy"  # reject_sample.py
    distilling: str = "--epochs 3"  # of distill.py
    on_policy: str = "--steps 20"  # of distill_on_policy.py, and of r1_zero.py after the texts
    rl: str = "--steps 80"  # of r1_zero.py
    max_completion_length: int = 320  # token budget of an answer
    problems: int = 300  # of the test
    num_generations: int = 4  # answers to each
    jobs: int = 1  # seeds at a time, one core each
    out: Path = Path("runs/distill-vs-rl")
    results: Path = Path("docs/results/distill_vs_rl.json")
    figure: Path = Path("docs/results/distill_vs_rl.png")

    def __post_init__(self):
        at_least(self, 1, "max_completion_length", "problems", "num_generations", "jobs")
        new_file(self, "results", "figure")
        new_folder(self, "out")
        if not self.teachers:
            raise ValueError("teachers: at least one folder of r1.py")


def commands(config: Config, teacher: Path, seed: int) -> dict[str, tuple[str, str]]:
    """folder -> script and its options, in order."""
    folder = config.out / f"seed-{seed}"
    made_by = lambda name: f"{folder / name}/checkpoint"
    last = checkpoint.resolve(teacher / "rl-2" / "checkpoint")
    budget, rl = f"--max-completion-length {config.max_completion_length}", f"--task {config.task}"
    data = f"--data {folder}/kept/kept.jsonl {config.distilling}"
    runs = {
        "base": ("pretrain", f"--task {config.task} {config.student}"),
        "kept": ("reject_sample", f"--checkpoint {last} --task {config.task} {budget} {config.sampling}"),
        "texts": ("distill", f"--student {made_by('base')} {data}"),
        "logits": ("distill", f"--student {made_by('base')} --teacher {last} {data}"),
        "on-policy": (
            "distill_on_policy", f"--student {made_by('texts')} --teacher {last} {rl} {budget} {config.on_policy}"
        ),
        "texts-rl": ("r1_zero", f"--checkpoint {made_by('texts')} {rl} {budget} {config.on_policy}"),
        "rl": ("r1_zero", f"--checkpoint {made_by('base')} {rl} {budget} {config.rl} --min-mixed 0"),
    }  # fmt: skip
    ends = lambda name: f"--seed {seed} --out {folder / name}"
    return {name: (script, f"{options} {ends(name)}") for name, (script, options) in runs.items()}


def tests(config: Config, teacher: Path, seed: int) -> dict[str, tuple[str, str]]:
    """Likewise the tests of the last checkpoint of each training, once it is there."""
    folder, runs = config.out / f"seed-{seed}", {}
    asked = f"--task {config.task} --max-completion-length {config.max_completion_length} --problems {config.problems}"
    asked += f" --num-generations {config.num_generations} --seed {seed}"
    for name in WAYS:
        path = teacher / "rl-2" / "checkpoint" if name == "teacher" else folder / name / "checkpoint"
        options = f"--checkpoint {checkpoint.resolve(path)} {asked} --out {folder / 'test' / name}"
        runs[f"test/{name}"] = "evaluate", options
    return runs


def run(config: Config, teacher: Path, seed: int) -> dict:
    """All of one seed, unless it is there; its figures, and the curve of RL on validation problems."""
    folder = config.out / f"seed-{seed}"
    for part in (commands, tests):
        for name, (script, options) in part(config, teacher, seed).items():
            same_command(folder / name, options)
            if not (folder / name / "result.json").exists():
                print(f"seed {seed}: {name}", flush=True)
                words = [sys.executable, "-m", f"experiments.{script}", *options.split()]
                run_or_resume(words, folder / name, options)
    return figures(folder)


def figures(folder: Path) -> dict:
    """What one seed gave: WAY/KEY of the test, WAY/over_rl in points, paired, and the cost of the training, WAY/tokens,
    WAY/teacher_tokens and WAY/seconds.
    """
    answers = {name: answer_file.read(folder / "test" / name) for name in WAYS}
    values: dict = {}
    for name in WAYS:
        result = read_json(folder / "test" / name / "result.json")
        values |= {f"{name}/{key}": result[key] for key in ("pass@1", "pass@1_low", "pass@1_high", "length")}
        values |= {f"{name}/{key}": result[key] for key in ("language_consistency", "tidiness") if key in result}
        difference = zip(("", "_low", "_high"), paired(answers, name, "rl"))
        values |= {f"{name}/over_rl{end}": 100 * x for end, x in difference}
    kept, spent = read_json(folder / "kept" / "result.json"), {}
    for name in ("texts", "logits"):
        result = read_json(folder / name / "result.json")
        spent[name] = result["tokens"], kept["tokens"], result["seconds/distill"] + kept["seconds"]
    rows = {name: read_metrics(folder / name) for name in ("rl", "texts-rl", "on-policy")}
    for name in rows:
        before = (0, 0, 0.0) if name == "rl" else spent["texts"]
        tokens = sum(row.get("train/sampled_tokens", 0) for row in rows[name])
        seconds = sum(x for row in rows[name] for key, x in row.items() if key.startswith("time/"))
        spent[name] = before[0] + tokens, before[1], before[2] + seconds
    names = "tokens", "teacher_tokens", "seconds"
    values |= {f"{name}/{key}": x for name, costs in spent.items() for key, x in zip(names, costs)}
    tokens = np.cumsum([row.get("train/sampled_tokens", 0) for row in rows["rl"]]).tolist()
    values["curve"] = [[t, row["eval/pass@1"]] for t, row in zip(tokens, rows["rl"]) if "eval/pass@1" in row]
    return values


def rows(results: list[dict]) -> list[list[str]]:
    """A row per way: accuracy, difference to RL, language consistency, tokens, seconds, over seeds."""
    lines = []
    for name, label in WAYS.items():
        measured = lambda key: [result[f"{name}/{key}"] for result in results if f"{name}/{key}" in result]
        cell = lambda key, form: over_seeds(measured(key), form, least=0.0) if measured(key) else "-"
        against = "-" if name == "rl" else over_seeds(measured("over_rl"), "+.1f")
        lines.append([label, cell("pass@1", ".1%"), against, cell("language_consistency", ".1%"),
                      cell("tokens", ",.0f"), cell("teacher_tokens", ",.0f"), cell("seconds", ".0f")])  # fmt: skip
    return lines


def page(results: dict[str, dict]) -> str:
    """The block of docs/distillation.md; results: by seed."""
    return markdown_table(HEAD, rows([*results.values()])) + "\n\n" + finding([*results.values()])


HEAD = ["", "right", "minus RL, in points, paired", "language consistency", "tokens trained", "tokens of the teacher"]
HEAD += ["seconds"]


def finding(results: list[dict]) -> str:
    """The answer in words, from the numbers."""
    mean = lambda key: float(np.mean([result[key] for result in results]))
    right = lambda name: f"{mean(f'{name}/pass@1'):.1%}"
    gain = over_seeds([result["texts/over_rl"] for result in results], "+.1f")
    clear = sum(result["texts/over_rl_low"] > 0 for result in results)
    tokens, sampled = mean("texts/tokens") / mean("rl/tokens"), mean("texts/teacher_tokens") / mean("rl/tokens")

    def seconds(name: str) -> str:  # other work on the machine may have slowed some
        shares = [result[f"{name}/seconds"] / result["rl/seconds"] for result in results]
        return f"{min(shares):.0%} to {max(shares):.0%}"

    return (
        f"Of problems that no stage has seen, a student taught by texts solves {right('texts')}, the same student "
        f"after RL {right('rl')}: {gain} points; within a seed, the interval over problems is above 0 in {clear} of "
        f"{len(results)}. The trained tokens are {tokens:.0%} of RL's, {tokens + sampled:.0%} with the teacher's "
        f"samples, the seconds {seconds('texts')}, by seed. On-policy distillation after the texts reaches "
        f"{right('on-policy')} for {seconds('on-policy')} of RL's seconds, RL after the texts {right('texts-rl')}; the "
        f"teacher has {right('teacher')}."
    )


def main(config: Config) -> list[dict]:
    """Run what is missing, print and write the table and the figure; the figures of each seed."""
    with pinned(config.jobs) as pool:
        results = list(pool.map(lambda pair: run(config, pair[1], pair[0]), enumerate(config.teachers)))
    table("distillation against RL", HEAD, rows(results))
    print(finding(results))
    write_json(config.results, dict(enumerate(results)))
    distill_figures.draw_against_rl(results, WAYS, config.figure)
    return results


if __name__ == "__main__":
    cli.run(main, Config)
