"""What happens to right answers when PPO keeps raising the score of a learned reward model, with and without KL?

    python -m experiments.studies.overoptimization --checkpoint runs/base/checkpoint --jobs 2

The proxy is a Bradley-Terry model of pairs that the base sampled (experiments/preference_pairs.py, then
experiments/reward_model.py; made once, under --out). The gold reward is the rule that judged the pairs: whether the
answer is right. PPO is trained on the proxy alone. In Gao et al. (arXiv:2210.10760) the proxy keeps rising while the
gold reward turns down. The learning rate is twice the usual one, to get there in few steps; the control, PPO on the
rules at the same rate, shows how much is due to the learned reward.
"""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.studies import comparison_figures
from experiments.studies import comparison_tables as tables
from experiments.studies.comparison import PACKAGE, Config, Method, flags, load, refuse_unusable
from experiments.studies.processes import call, run_or_resume
from minir1 import cli, log
from minir1.log import markdown_table

COLUMNS = ("", "proxy, first sixth", "last sixth", "right answers, first sixth", "best sixth", "last sixth")
DEFAULT = Config(
    steps=32,
    learning_rate=6e-4,
    eval_every=16,
    out=Path("runs/overoptimization"),
    results=Path("docs/results/overoptimization.json"),
    figure=Path("docs/results/overoptimization.png"),
)


def methods(config: Config) -> dict[str, Method]:
    """PPO against the learned reward, with and without the KL term in it, and against the rules."""
    reward = f"model:{config.out / 'reward_model' / 'checkpoint'}"
    return {
        "free": Method("without KL", "ppo", {"reward": reward, "beta": 0.0}),
        "kl": Method("with KL 0.05", "ppo", {"reward": reward, "beta": 0.05}),
        "rules": Method("rules without KL", "ppo", {"reward": "rules", "beta": 0.0}),
    }


def reward_model(config: Config) -> None:
    """Sample pairs from the base and train a reward model on them, unless this is done."""
    pairs, folder = config.out / "pairs", config.out / "reward_model"
    config.out.mkdir(parents=True, exist_ok=True)
    base = ["--checkpoint", str(config.checkpoint), "--device", config.device]
    task = flags({"task": config.task, "data": config.data, "template": config.template})
    if not (pairs / "result.json").exists():
        print(f"sampling pairs, see {pairs}.log", flush=True)
        call([sys.executable, "-m", f"{PACKAGE}.preference_pairs", *base, *task, "--out", str(pairs)], pairs)
    if not (folder / "result.json").exists():
        print(f"training the reward model, see {folder}.log", flush=True)
        words = [sys.executable, "-m", f"{PACKAGE}.reward_model", *base, "--out", str(folder)]
        words += ["--pairs", str(pairs / "train.jsonl"), "--held-out", str(pairs / "held_out.jsonl")]
        run_or_resume(words, folder, " ".join(words[3:]))


def rows(results: tables.Results, config: Config = DEFAULT) -> list[list[str]]:
    """A row per method, columns as in COLUMNS: means over seeds of the answers sampled in training."""
    lines = []
    for name, method in methods(config).items():
        curves = [result["curve"] for result in tables.of(results, name).values()]
        if not curves:
            continue
        sixth = max(1, len(curves[0]["accuracy"]) // 6)

        def sixths(key: str) -> list[float]:
            values = [sum(x) / len(x) for x in zip(*(curve[key] for curve in curves if key in curve))]
            return [sum(values[i : i + sixth]) / sixth for i in range(len(values) - sixth + 1)]

        proxy, gold = sixths("proxy"), sixths("accuracy")
        ends = [f"{proxy[0]:.2f}", f"{proxy[-1]:.2f}"] if proxy else ["-", "-"]
        lines.append([method.label, *ends, *(f"{share:.1%}" for share in (gold[0], max(gold), gold[-1]))])
    return lines


def page(results: tables.Results) -> str:
    """The block of docs/algorithms.md."""
    text = tables.page(results, methods(DEFAULT), "free", DEFAULT, "studies.overoptimization")
    if lines := rows(results):
        text = f"Answers sampled in training, by sixths of the steps:\n\n{markdown_table(COLUMNS, lines)}\n\n{text}"
    return text


def draw(config: Config) -> None:
    """The figure of the results so far."""
    if curves := tables.parts(load(config.results), methods(config))["curves"]:
        comparison_figures.overoptimization(curves, config.figure)


def main(config: Config) -> None:
    """Make the reward model, run what is missing, draw, print. SystemExit if a cell fails."""
    refuse_unusable(config)
    reward_model(config)
    tables.compare(config, methods(config), "free", "learned reward", draw)
    log.table("proxy and gold reward", list(COLUMNS), rows(load(config.results), config))


if __name__ == "__main__":
    cli.run(main, Config, default=DEFAULT)
