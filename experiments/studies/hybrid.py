"""How much supervised fine-tuning belongs into the loss of RL? α·L_RL + (1-α)·L_SFT for five values of α.

    python -m experiments.studies.hybrid --jobs 2

All settings are experiments/variants/hybrid.py with the same steps, and imitate the same dialogues: sft.jsonl in --out,
of any layout that minir1/chat_data.py reads. By default from SFT 1 of a pipeline (experiments/r1.py), whose
rejection/kept.jsonl holds such dialogues. α = 1 is GRPO alone. α = 0 is supervised fine-tuning alone; it has as many
optimizer steps, and its loss uses no answers: they are sampled for the log alone.
"""

from __future__ import annotations

from pathlib import Path

from experiments.studies import comparison_tables as tables
from experiments.studies.comparison import Config, Method
from experiments.studies.comparison_figures import draw_settings
from minir1 import cli

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
PANELS = {"accuracy": ("Training problems", "share"), "entropy": ("Entropy", "nats")}
DEFAULT = Config(
    checkpoint=Path("runs/r1/sft-1/checkpoint"),
    task="world",
    max_completion_length=320,
    out=Path("runs/hybrid-study"),
    results=Path("docs/results/hybrid.json"),
    figure=Path("docs/results/hybrid.png"),
)


def methods(config: Config) -> dict[str, Method]:
    """A method per α."""
    data = config.out / "sft.jsonl"
    return {f"{alpha:g}": Method(f"α = {alpha:g}", "variants.hybrid", {"alpha": alpha, "sft-data": data})
            for alpha in ALPHAS}  # fmt: skip


def page(results: tables.Results) -> str:
    """The block of docs/objectives.md."""
    return tables.page(results, methods(DEFAULT), "1", DEFAULT, "studies.hybrid")


def main(config: Config) -> None:
    """Run what is missing, draw, print. ValueError without the dialogues, SystemExit if a cell fails."""
    if not (data := config.out / "sft.jsonl").is_file():
        raise ValueError(f"{data} is no file: put the dialogues to imitate there, such as reject_sample's answers")
    draw = lambda config: draw_settings(config, methods(config), PANELS)
    tables.compare(config, methods(config), "1", "hybrid loss", draw)


if __name__ == "__main__":
    cli.run(main, Config, default=DEFAULT)
