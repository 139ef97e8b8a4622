"""The whole demonstration: pre-train a tiny base, train it by reinforcement learning, and show what changed.

    python -m experiments.demo --out runs/demo

About ten minutes on two CPU cores. It composes three scripts, each of which runs alone: pretrain.py, r1_zero.py and
evaluate.py. The test problems are looked at here, once, after training: validation problems alone chose the checkpoint.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.markup import escape

from experiments import demo_figure, evaluate, pretrain, r1_zero
from minir1 import checkpoint
from minir1.judge import Answer
from minir1.log import open_run, peak_memory_gib, read_metrics
from minir1.metrics import paired_bootstrap
from minir1.model import hf
from minir1.tasks import Problem, countdown


@dataclass(frozen=True)
class Config:
    """The demonstration; --base and --rl hold the settings of its two trainings."""

    level: str = "default"  # of Countdown: default | wide | four
    dense: bool = False  # grouped-query attention and SwiGLU instead of MLA and experts
    no_think: bool = False  # the control: reinforcement learning of immediate answers
    base_from: Path | None = None  # a folder of checkpoints to start from, instead of pre-training
    base: pretrain.Config = field(default_factory=pretrain.Config)
    rl: r1_zero.Config = field(default_factory=r1_zero.Config)
    problems: int = 400  # test problems, at most
    answers: int = 8  # sampled a test problem
    seed: int = 0  # of the base, of reinforcement learning and of the evaluation
    out: Path = Path("runs/demo")
    resume: bool = False
    wandb: str = "off"


def stages(config: Config) -> tuple[pretrain.Config, r1_zero.Config]:
    """The settings of the two trainings, with what the demonstration says of both."""
    refuse_overridden(config)
    common = {"level": config.level, "seed": config.seed, "resume": config.resume, "wandb": config.wandb}
    base = replace(config.base, **common, dense=config.dense, out=config.out / "base")
    start = (config.base_from or config.out / "base") / "checkpoint"
    rl = replace(config.rl, **common, no_think=config.no_think, checkpoint=start, out=config.out / "rl")
    return base, rl


def refuse_overridden(config: Config) -> None:
    """ValueError for a setting of one training that the demonstration gives to both, or itself."""
    for part, fresh, own in (
        ("base", pretrain.Config(), ("level", "dense", "seed", "out", "resume", "wandb")),
        ("rl", r1_zero.Config(), ("level", "no_think", "seed", "out", "resume", "wandb", "checkpoint")),
    ):
        for name in own:
            if getattr(getattr(config, part), name) != getattr(fresh, name):
                flag = name.replace("_", "-")
                raise ValueError(f"--{part}.{flag}: demo.py sets it; use --{flag} (or run the script by itself)")


def final_test(config: Config, rl: r1_zero.Config) -> tuple[dict[str, float], list[tuple[Problem, Answer, Answer]]]:
    """Both checkpoints on both held-out sets, with one budget; flat figures, and samples (problem, before, after)."""
    policies = {
        "before": checkpoint.latest(rl.checkpoint) or rl.checkpoint,
        "after": checkpoint.best(rl.out / "checkpoint"),
    }
    result: dict[str, float] = {}
    grids, columns = {}, {}
    for split in ("test", "unseen"):
        for name, path in policies.items():
            settings = evaluate.Config(
                checkpoint=path,
                level=config.level,
                split=split,
                problems=config.problems,
                answers=config.answers,
                max_tokens=rl.max_tokens,
                no_think=rl.no_think,
                seed=config.seed,
            )
            values, grids[split, name] = evaluate.measure(*hf.load(path), settings)
            columns[name if split == "test" else f"{name}, unseen numbers"] = values
            prefix = name if split == "test" else f"{name}_unseen"
            result |= {f"{prefix}/{key}": value for key, value in values.items()}
    both = [evaluate.rights(grids["test", name]) for name in ("after", "before")]
    result |= dict(zip(("gain/pass@1", "gain/pass@1_low", "gain/pass@1_high"), paired_bootstrap(*both)))
    for name in ("forced", "search", "search_distinct"):  # the controls of the trained policy
        for end in ("", "_low", "_high"):
            result[f"{name}/pass@1{end}"] = result[f"after/{name}{end}"]
    evaluate.show("Countdown problems never trained on", columns)
    problems = countdown.held_out(config.level, "test", config.problems)
    shown = [len(problems) * i // 6 + len(problems) // 12 for i in (0, 2, 4)]  # three, chosen before any was looked at
    return result, [(problems[i], grids["test", "before"][i][0], grids["test", "after"][i][0]) for i in shown]


def show_samples(samples: list[tuple[Problem, Answer, Answer]]) -> None:
    """The first sampled answer to three problems, before and after."""
    console = Console(highlight=False, width=None)
    for problem, before, after in samples:
        console.print(f"\n[bold]{problem.prompt}[/bold]")
        for name, answer in (("before", before), ("after", after)):
            mark = "[green]right[/green]" if answer.right else "[red]wrong[/red]"
            console.print(f"[dim]{name}[/dim] ({mark}) {escape(answer.text)}")


def main(config: Config) -> dict[str, float]:
    """Train, test, print, write result.json and the figure. With --resume a training that is done is only looked up."""
    base, rl = stages(config)
    run = open_run(config.out, config, resume=config.resume, wandb=config.wandb)
    run.cut_back(-1)
    if config.base_from is None:
        pretrain.main(base)
    r1_zero.main(rl)
    began = time.perf_counter()
    result, samples = final_test(config, rl)
    run.samples(rl.steps, [{"problem": p.prompt, "before": b.text, "after": a.text} for p, b, a in samples])
    show_samples(samples)
    stored = (read_result(base.out) if config.base_from is None else {}) | read_result(rl.out)
    seconds = {k: v for k, v in stored.items() if k.startswith("seconds/")}
    seconds["seconds/test"] = time.perf_counter() - began
    result |= {k: v for k, v in stored.items() if k.startswith("skill/")} | seconds
    result |= {"seconds/total": sum(seconds.values()), "memory/peak_gib": peak_memory_gib(), "seed": config.seed}
    run.result(result)
    result = read_result(config.out)
    demo_figure.r1_zero(read_metrics(rl.out), config.out / "figures" / "r1_zero.png", result=result)
    print(
        f"\npass@1 on problems never seen: {result['before/pass@1']:.1%} -> {result['after/pass@1']:.1%}; "
        f"forced to answer at once {result['forced/pass@1']:.1%}"
    )
    took = f"{result['seconds/total']:.0f} s, {result['memory/peak_gib']:.1f} GiB"
    print(f"{took}; see {config.out / 'result.json'} and {config.out / 'figures'}")
    run.close()
    return result


def read_result(folder: Path) -> dict[str, float]:
    """result.json of a run."""
    return json.loads((folder / "result.json").read_text())


if __name__ == "__main__":
    main(tyro.cli(Config))
