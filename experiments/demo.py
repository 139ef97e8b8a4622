"""The whole demonstration: pre-train a tiny base, train it by reinforcement learning, show what changed.

    python -m experiments.demo --out runs/demo

About ten minutes on two CPU cores. It runs three scripts that also run alone: pretrain.py, r1_zero.py and evaluate.py.
The test problems are used here only, once, after training; validation problems choose the checkpoint.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.markup import escape

from experiments import demo_figure, evaluate, evaluate_table, pretrain, r1_zero
from minir1 import checkpoint, cli, tasks
from minir1.device import peak_memory_gib, pick, pick_dtype
from minir1.files import read_json
from minir1.judge import Answer, rights
from minir1.log import open_run, read_metrics
from minir1.metrics import paired_bootstrap
from minir1.model import hf
from minir1.settings import at_least
from minir1.templates import encode
from minir1.tokenizer import Tokenizer, word_level


@dataclass(frozen=True)
class Config:
    """The demonstration; --base.* and --rl.* are the settings of its two trainings."""

    task: str = "countdown"  # one with a corpus to pre-train on, unless --base-from is given
    data: str | None = None  # the folder or file that the task reads
    dense: bool = False  # grouped-query attention and SwiGLU instead of MLA and experts
    no_think: bool = False  # the control: reinforcement learning of immediate answers
    base_from: Path | None = None  # a run folder, or a checkpoint, to start from instead of pre-training
    base: pretrain.Config = field(default_factory=pretrain.Config)
    rl: r1_zero.Config = field(default_factory=r1_zero.Config)
    problems: int = 400  # per held-out split, at most
    num_generations: int = 8  # sampled answers per held-out problem
    seed: int = 0  # of the base, of reinforcement learning and of the evaluation
    out: Path = Path("runs/demo")
    resume: bool = False
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32
    wandb: str = "off"

    def __post_init__(self):
        at_least(self, 1, "problems", "num_generations")
        at_least(self, 0, "seed")


SHARED = ("task", "data", "seed", "resume", "device", "dtype", "wandb")  # options of this script and both trainings


def stages(config: Config) -> tuple[pretrain.Config, r1_zero.Config]:
    """The settings of the two trainings, with those that the demonstration sets for both."""
    refuse_overridden(config)
    shared = {name: getattr(config, name) for name in SHARED}
    base = replace(config.base, **shared, dense=config.dense, out=config.out / "base")
    start = config.base_from or config.out / "base" / "checkpoint"
    rl = replace(config.rl, **shared, no_think=config.no_think, checkpoint=start, out=config.out / "rl")
    return base, rl


def refuse_overridden(config: Config) -> None:
    """ValueError for a setting of one training that the demonstration sets."""
    for part, fresh, own in (
        ("base", pretrain.Config(), (*SHARED, "dense", "out")),
        ("rl", r1_zero.Config(), (*SHARED, "no_think", "checkpoint", "out")),
    ):
        for name in own:
            if getattr(getattr(config, part), name) != getattr(fresh, name):
                flag = name.replace("_", "-")
                raise ValueError(f"--{part}.{flag}: demo.py sets it; use --{flag} (or run the script by itself)")


def held_out_splits(task: tasks.Task, rl: r1_zero.Config) -> list[str]:
    """The splits that neither trained the policy nor chose its checkpoint. ValueError where there are none."""
    splits = [split for split in task.splits if split not in ("train", rl.eval_split)]
    if not splits:
        raise ValueError(f"task {task.name} has the splits {', '.join(task.splits)}: none is left to test on")
    return splits


def final_test(
    config: Config, rl: r1_zero.Config
) -> tuple[dict[str, float], list[tuple[tasks.Problem, Answer, Answer]]]:
    """Both checkpoints on each held-out split, with one budget: values, and samples (problem, before, after)."""
    device, task = pick(config.device), tasks.load(config.task, config.data, allow_code=rl.allow_code)
    policies = {"before": checkpoint.resolve(rl.checkpoint), "after": checkpoint.resolve(rl.out / "checkpoint", "best")}
    shared = {name: getattr(rl, name) for name in ("max_completion_length", "no_think", "template", "seed")}
    shared |= {"num_generations": config.num_generations}
    first, *_ = splits = held_out_splits(task, rl)
    problems = {split: tasks.spread(task.problems(split), config.problems) for split in splits}
    result: dict[str, float] = {}
    grids, columns = {}, {}
    for split in splits:
        for name, path in policies.items():
            policy = hf.load(path, device, pick_dtype(config.dtype, device))
            settings = evaluate.Config(checkpoint=path, **shared)
            values, grids[split, name] = evaluate.measure(*policy, task, problems[split], settings)
            columns[f"{name}, {split}"] = evaluate_table.applicable(values, grids[split, name])
            prefix = name if split == first else f"{name}_{split}"
            result |= {f"{prefix}/{key}": value for key, value in values.items()}
    both = np.array([rights(grids[first, name]) for name in ("after", "before")])
    both = both[:, np.isfinite(both).all(0)]  # problems with judged answers in both
    result |= dict(zip(("gain/pass@1", "gain/pass@1_low", "gain/pass@1_high"), paired_bootstrap(*both)))
    for name in controls(result):
        for end in ("", "_low", "_high"):
            result[f"{name}/pass@1{end}"] = result[f"after/{name}{end}"]
    evaluate_table.show(f"{task.name}: problems never trained on", columns, task.rates)
    n = len(problems[first])
    shown = [n * i // 6 + n // 12 for i in (0, 2, 4)]  # three, by their position alone
    before, after = grids[first, "before"], grids[first, "after"]
    return result, [(problems[first][i], before[i][0], after[i][0]) for i in shown]


def controls(result: dict[str, float]) -> list[str]:
    """The names of what the policy is compared with: its own forced answers, and the task's baselines."""
    above = [key.removeprefix("after/over_") for key in result if key.startswith("after/over_")]
    return ["forced", *(name for name in above if not name.endswith(("_low", "_high")))]


def show_samples(samples: list[tuple[tasks.Problem, Answer, Answer]]) -> None:
    """The first sampled answer to three problems, before and after."""
    console = Console(highlight=False, width=None)
    for problem, before, after in samples:
        console.print(f"\n[bold]{escape(problem.prompt)}[/bold]")
        for name, answer in (("before", before), ("after", after)):
            mark = "[green]right[/green]" if answer.right else "[red]wrong[/red]"
            console.print(f"[dim]{name}[/dim] ({mark}) {escape(answer.text)}")


def main(config: Config) -> dict[str, float]:
    """Train, test, print, write result.json and the figure. With --resume a finished training is not run again."""
    base, rl = stages(config)
    run = open_run(config.out, config, resume=config.resume, wandb=config.wandb)
    allowed = {"allow_code": rl.allow_code}
    task = tasks.load(config.task, config.data, **allowed) if config.base_from else pretrain.task_of(base)
    # everything that can be refused is refused before the trainings
    asked = tasks.problems_of(task, ("train", rl.eval_split, *held_out_splits(task, rl)))
    if rl.prompts > len(train := task.problems("train")):
        raise ValueError(f"--rl.prompts {rl.prompts}: the task has {len(train)} training problems")
    given = config.base_from and checkpoint.resolve(config.base_from)
    encode(Tokenizer.load(given) if given else word_level(*task.vocabulary()), asked, rl.template)
    if not given:
        pretrain.main(base)
    r1_zero.main(rl)
    run.start()  # not before: what the two trainings refuse leaves nothing behind
    began = time.perf_counter()
    result, samples = final_test(config, rl)
    run.samples(rl.steps, [{"problem": p.prompt, "before": b.text, "after": a.text} for p, b, a in samples])
    show_samples(samples)
    trained = [rl.out] if config.base_from else [base.out, rl.out]
    stored = {k: v for out in trained for k, v in read_json(out / "result.json").items()}
    seconds = {k: v for k, v in stored.items() if k.startswith("seconds/")}
    seconds["seconds/test"] = time.perf_counter() - began
    result |= {k: v for k, v in stored.items() if k.startswith("skill/")} | seconds
    result |= {"seconds/total": sum(seconds.values()), "seed": config.seed}
    result["memory/peak_gib"] = peak_memory_gib(pick(config.device))
    run.result(result)
    result = read_json(config.out / "result.json")
    demo_figure.r1_zero(read_metrics(rl.out), config.out / "figures" / "r1_zero.png", result=result)
    print(
        f"\npass@1 on problems never trained on: {result['before/pass@1']:.1%} -> {result['after/pass@1']:.1%}; "
        f"forced to answer at once: {result['forced/pass@1']:.1%}"
    )
    took = f"{result['seconds/total']:.0f} s, {result['memory/peak_gib']:.1f} GiB"
    print(f"{took}; see {config.out / 'result.json'} and {config.out / 'figures'}")
    run.close()
    return result


if __name__ == "__main__":
    cli.run(main, Config)
