"""What happens to right answers when PPO goes on raising the score of a learned reward model, with and without KL?

    python -m experiments.studies.overoptimization --checkpoint runs/base/checkpoint --jobs 2

The proxy is a Bradley-Terry model of pairs that the base sampled (experiments/preference_pairs.py, then
experiments/reward_model.py; made once, under --out). The gold reward is the rule that judged the pairs: whether the
answer is right. PPO sees the proxy alone. Gao et al. (arXiv:2210.10760) drew the two against each other: the proxy
keeps rising, the gold reward turns. Every answer beyond those that the base gives is one that no pair has shown. The
learning rate is twice the usual one, to get there in few steps; the control, PPO on the rules themselves at the same
rate, tells what of it is the learned reward's doing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

from experiments.studies import algorithms_figures as figures_algorithms
from experiments.studies import comparison_tables as tables
from experiments.studies.comparison import PACKAGE, Config, Method, cells_of, complete, end, load
from experiments.studies.processes import call, go_on
from minir1 import log

COLUMNS = ("", "proxy, first sixth", "last sixth", "right answers, first sixth", "most at a time", "last sixth")
DEFAULT = Config(
    steps=32,
    lr=6e-4,
    eval_every=16,
    out=Path("runs/overoptimization"),
    results=Path("docs/results/overoptimization.json"),
    figure=Path("docs/results/overoptimization.png"),
)


def methods(config: Config) -> dict[str, Method]:
    """PPO against the learned reward, with and without the KL term in it, and against the rules."""
    reward = f"model:{config.out / 'reward_model' / 'checkpoint'}"
    return {
        "free": Method("without KL", "ppo", {"reward": reward, "kl": 0.0}),
        "kl": Method("with KL 0.05", "ppo", {"reward": reward, "kl": 0.05}),
        "rules": Method("rules without KL", "ppo", {"reward": "rules", "kl": 0.0}),
    }


def reward_model(config: Config) -> None:
    """Pairs from the base, and a reward model of them, unless they are there."""
    pairs, folder = config.out / "pairs", config.out / "reward_model"
    config.out.mkdir(parents=True, exist_ok=True)
    base = ["--checkpoint", str(config.checkpoint)]
    if not (pairs / "result.json").exists():
        print(f"sampling pairs, see {pairs}.log", flush=True)
        call([sys.executable, "-m", f"{PACKAGE}.preference_pairs", *base, "--out", str(pairs)], pairs)
    if not (folder / "result.json").exists():
        print(f"training the reward model, see {folder}.log", flush=True)
        words = [sys.executable, "-m", f"{PACKAGE}.reward_model", *base, "--out", str(folder)]
        words += ["--pairs", str(pairs / "train.jsonl"), "--held-out", str(pairs / "held_out.jsonl")]
        go_on(words, folder, " ".join(words[3:]))


def rows(found: tables.Found, config: Config = DEFAULT) -> list[list[str]]:
    """A row a method, columns as in COLUMNS: means over seeds of the training's own samples."""
    lines = []
    for name, method in methods(config).items():
        curves = [result["curve"] for result in tables.of(found, name).values()]
        if not curves:
            continue
        line, sixth = [method.label], max(1, len(curves[0]["accuracy"]) // 6)
        for key, form, most in (("proxy", "{:.2f}", False), ("accuracy", "{:.1%}", True)):
            values = [sum(x) / len(x) for x in zip(*(curve[key] for curve in curves if key in curve))]
            means = [sum(values[i : i + sixth]) / sixth for i in range(len(values) - sixth + 1)]
            told = [means[0], *([max(means)] if most else []), means[-1]] if means else []
            line += [form.format(value) for value in told] or ["-", "-"]
        lines.append(line)
    return lines


def page(found: tables.Found) -> str:
    """What docs/algorithms.md says of it."""
    parts = []
    if lines := rows(found):
        parts = ["Samples of the training itself, in sixths of its steps:", tables.table(COLUMNS, lines)]
    parts.append(tables.page(found, methods(DEFAULT), "free", DEFAULT, "studies.overoptimization"))
    return "\n\n".join(parts)


def draw(config: Config) -> None:
    """The figure of what is done so far."""
    found = load(config.results)
    curves = tables.parts(found, methods(config))["curves"]
    if curves:
        figures_algorithms.overoptimization(curves, config.figure)


def main(config: Config) -> None:
    """Make the reward model, run what is missing, draw, print. SystemExit if a cell fails."""
    reward_model(config)
    failed = []
    for cell, failure in complete(cells_of(methods(config), config), config):
        failed += [cell.name] if failure else []
        draw(config)
    found = load(config.results)
    log.table("proxy and gold reward", list(COLUMNS), rows(found, config))
    tables.show(f"learned reward, {config.steps} steps, test split", found, methods(config), "free")
    end(failed, config)


if __name__ == "__main__":
    main(tyro.cli(Config, default=DEFAULT))
